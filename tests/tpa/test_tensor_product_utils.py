"""The named helpers against what the toolkit itself computes, the definitions, and transformers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_model, small_config, tokens
from torch import nn

from tpa_train.errors import UserError
from tpa_train.gemma3.attention import Documents, attend
from tpa_train.gemma3.layers import apply_rotary, rotary_table
from tpa_train.tpa.tensor_product_utils import (
    create_attention_mask,
    image_blocks,
    populate_image_embeddings,
    register_freqs_cis,
    reshape_for_broadcast,
)

IMAGE = 7  # the image token of these tests
KINDS = ("local", "global")


def pairs(x):
    """[..., d] -> complex [..., d/2] of the half-split pairs."""
    return torch.complex(*x.chunk(2, dim=-1))


# ------------------------------------------------------------------------------------------------------------ rotation


@pytest.mark.parametrize("kind", KINDS)
def test_freqs_are_the_rotary_table(kind):
    """Both bases and the linear scaling, and an angle written out by hand."""
    config, module = small_config(), nn.Module()
    register_freqs_cis(module, "freqs", config, kind, 500)
    cos, sin = rotary_table(config, kind, torch.arange(500))
    assert module.freqs.dtype == torch.complex64 and module.freqs.shape == (500, 4)
    assert torch.equal(module.freqs.real, cos[:, 0]) and torch.equal(module.freqs.imag, sin[:, 0])
    speed = 100.0 ** (-2 / 8) if kind == "local" else 10_000.0 ** (-2 / 8) / 8.0
    assert complex(module.freqs[11, 1]) == pytest.approx(complex(math.cos(11 * speed), math.sin(11 * speed)), abs=1e-5)
    assert not module.state_dict(), "checkpoints do not carry it"


def test_freqs_go_where_the_module_is():
    module = nn.Linear(2, 2, device="meta")
    register_freqs_cis(module, "freqs", small_config(), "local", 3)
    assert module.freqs.device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_complex_rotation_is_apply_rotary(kind, data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, 6))
    per_row = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    config, module = small_config(), nn.Module()
    register_freqs_cis(module, "freqs", config, kind, 100)
    positions = torch.randint(0, 100, (batch, length) if per_row else (length,), generator=generator)
    x = torch.randn(batch, length, heads, 8, generator=generator)
    factors = reshape_for_broadcast(module.freqs[positions], pairs(x))
    assert factors.shape == (batch if per_row else 1, length, 1, 4)
    product = pairs(x) * factors
    rotated = torch.cat((product.real, product.imag), dim=-1)
    torch.testing.assert_close(rotated, apply_rotary(x, rotary_table(config, kind, positions)), rtol=0, atol=1e-6)


def test_reshaped_factors_share_memory():
    freqs = torch.randn(5, 4, dtype=torch.complex64)
    x = torch.randn(2, 5, 3, 4, dtype=torch.complex64)
    assert reshape_for_broadcast(freqs, x).data_ptr() == freqs.data_ptr()
    assert reshape_for_broadcast(freqs.expand(2, 5, 4), x).data_ptr() == freqs.data_ptr()


@pytest.mark.parametrize("shape", [(4, 4), (5, 8), (3, 5, 4), (5,), (2, 5, 1, 4)])
def test_factors_of_another_shape_are_refused(shape):
    with pytest.raises(UserError, match=r"freqs_cis has shape .* needs \[5, 4\] or \[2, 5, 4\]"):
        reshape_for_broadcast(torch.zeros(shape), torch.zeros(2, 5, 3, 4))
    with pytest.raises(UserError, match=r"x must be \[B, L, heads, d/2\], but its shape is \[2, 5, 4\]"):
        reshape_for_broadcast(torch.zeros(5, 4), torch.zeros(2, 5, 4))


def test_register_refuses():
    with pytest.raises(UserError, match="unknown layer kind 'globl'; did you mean 'global'"):
        register_freqs_cis(nn.Module(), "freqs", small_config(), "globl", 4)
    with pytest.raises(UserError, match="max_length=0 must be at least 1"):
        register_freqs_cis(nn.Module(), "freqs", small_config(), "global", 0)


# --------------------------------------------------------------------------------------------------------------- masks


def by_definition(positions, queries, window, images, documents):
    """bool [B, L, S], one pair at a time; everything is a list of rows."""
    batch, length = len(positions), len(positions[0])
    mask = torch.zeros(batch, queries, length, dtype=torch.bool)
    for row in range(batch):
        for i, query in enumerate(range(length - queries, length)):
            for key in range(length):
                distance = positions[row][query] - positions[row][key]
                same_image = images[row][query] >= 0 and images[row][query] == images[row][key]
                real = positions[row][query] >= 0 and positions[row][key] >= 0
                sees = real and documents[row][query] == documents[row][key]
                sees = sees and (distance >= 0 or same_image) and (window is None or distance < window)
                mask[row, i, key] = sees or key == query
    return mask


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_mask_by_the_definition(data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    queries = data.draw(st.integers(1, length))
    window = data.draw(st.none() | st.integers(1, length + 1))

    def rows(values):
        return data.draw(st.lists(st.lists(values, min_size=length, max_size=length), min_size=batch, max_size=batch))

    # Any order, with gaps and padding: a ring's slots. Positions differ inside a row, as those of a cache do.
    order = [data.draw(st.permutations(range(-2, length))) for _ in range(batch)]
    positions = [list(row[:length]) for row in order]
    images, documents = rows(st.integers(-1, 1)), rows(st.integers(0, 1))
    mask = create_attention_mask(
        torch.tensor(positions), queries=queries, window=window, image_ids=torch.tensor(images),
        document_ids=torch.tensor(documents),
    )  # fmt: skip
    assert mask.dtype == torch.bool and mask.shape == (batch, 1, queries, length)
    assert torch.equal(mask[:, 0], by_definition(positions, queries, window, images, documents))


def test_a_mask_written_out():
    """Two texts around an image of three tokens, W = 3; the last two tokens are the queries of the second mask."""
    images = image_blocks(torch.tensor([[1, IMAGE, IMAGE, IMAGE, 2]]), IMAGE)
    rows = ["10000", "11110", "11110", "01110", "00111"]
    expected = torch.tensor([[digit == "1" for digit in row] for row in rows])
    assert torch.equal(create_attention_mask(5, window=3, image_ids=images)[0, 0], expected)
    assert torch.equal(create_attention_mask(5, queries=2, window=3, image_ids=images[0])[0, 0], expected[3:])


@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_masked_softmax_is_attend(window):
    """The mask says in words what the toolkit's kernels do without one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 20, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    ids = torch.tensor([[0] * 7 + [1] * 13, [0] * 20])
    mask = create_attention_mask(20, window=window, document_ids=ids)
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, scale=0.4,
                                         enable_gqa=True).transpose(1, 2)  # fmt: skip
    torch.testing.assert_close(out, attend(q, k, v, 0.4, window, Documents(ids)), rtol=0, atol=1e-12)


def test_a_cached_prefix_is_masked_as_the_cache_does():
    config = small_config()
    model = random_model(config)
    cache = model.allocate_cache(1, 30, dtype=torch.float64)
    model(tokens(config, 1, 5), cache=cache)
    for layer, window in ((0, config.sliding_window), (5, None)):
        view = cache._update(layer, tuple(torch.zeros(1, 3, *t.shape[2:]) for t in cache.buffers[layer]))
        assert torch.equal(create_attention_mask(8, queries=3, window=window), cache._mask(3, view.slots, window))


def transformers_masks(token_type_ids, window, cached=0):
    """Masks [B, 1, L, S] by layer kind that the installed transformers gives Gemma 3; S of local ones may be cut."""
    pytest.importorskip("transformers")
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    if not hasattr(gemma3, "create_masks_for_vision_model"):
        pytest.skip("this version of transformers makes its masks elsewhere")
    from transformers import DynamicCache, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, sliding_window=window, layer_types=["sliding_attention", "full_attention"],
        attn_implementation="sdpa",
    )  # fmt: skip
    batch, length = token_type_ids.shape
    cache = DynamicCache(config=config)
    for layer in range(2):
        if cached:
            cache.update(torch.zeros(batch, 1, cached, 8), torch.zeros(batch, 1, cached, 8), layer)
    masks = gemma3.create_masks_for_vision_model(
        config=config, inputs_embeds=torch.zeros(batch, length - cached, 8), attention_mask=None,
        cache=cache if cached else None, position_ids=None,
        block_sequence_ids=gemma3.get_block_sequence_ids_for_mask(token_type_ids),
    )  # fmt: skip
    return {"local": masks["sliding_attention"], "global": masks["full_attention"]}


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_masks_of_transformers(data):
    """Text and images at random, longer and shorter than the window, as one prompt and after a cached prefix."""
    batch, length, window = data.draw(st.integers(1, 2)), data.draw(st.integers(2, 16)), data.draw(st.integers(2, 10))
    cached = data.draw(st.integers(0, length - 1))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    is_image = torch.tensor(data.draw(st.lists(flags, min_size=batch, max_size=batch)))
    images = image_blocks(torch.where(is_image, IMAGE, 1), IMAGE)
    for kind, theirs in transformers_masks(is_image.long(), window, cached).items():
        ours = create_attention_mask(
            length, queries=length - cached, window=window if kind == "local" else None, image_ids=images
        )
        cut = length - theirs.shape[-1]  # a local layer's cache has dropped what no query sees any more
        assert torch.equal(ours[..., cut:], theirs) and not ours[..., :cut].any()


def test_images_are_runs():
    ids = torch.tensor([[IMAGE, IMAGE, 1, IMAGE, 2, 2], [1, 2, IMAGE, IMAGE, IMAGE, IMAGE]])
    assert image_blocks(ids, IMAGE).tolist() == [[0, 0, -1, 1, -1, -1], [-1, -1, 0, 0, 0, 0]]


def test_masks_refuse():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    three = ids[[0] * 3]
    for message, positions, options in (
        ("queries=6 must lie between 1 and the number of tokens, 5", 5, {"queries": 6}),
        ("queries=0 must lie", 5, {"queries": 0}),
        ("window=0 must be at least 1", 5, {"window": 0}),
        (r"image_ids must be whole numbers \[5\] or \[B, 5\], not torch.int64 \[2, 4\]", 5, {"image_ids": ids[:, 1:]}),
        ("document_ids must be whole numbers .* not torch.bool", 5, {"document_ids": ids > 0}),
        (r"different numbers of rows: positions \[2, 5\], document_ids \[3, 5\]", ids, {"document_ids": three}),
    ):
        with pytest.raises(UserError, match=message):
            create_attention_mask(positions, **options)


# -------------------------------------------------------------------------------------------------------------- images


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_soft_tokens_fill_the_places_in_order(data):
    batch, each, images = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 4))
    flat = [IMAGE] * (each * images) + [1] * data.draw(st.integers(1, 6))
    flat += [1] * (-len(flat) % batch)
    ids = torch.tensor(data.draw(st.permutations(flat))).view(batch, -1)
    hidden = torch.randn(*ids.shape, 6, requires_grad=True)
    soft = torch.randn(images, each, 6, requires_grad=True)
    before = hidden.detach().clone()
    out = populate_image_embeddings(hidden, ids, soft, IMAGE)
    expected, queue = before.clone(), list(soft.detach().flatten(0, 1))
    for row in range(batch):
        for position in range(ids.shape[1]):
            if ids[row, position] == IMAGE:
                expected[row, position] = queue.pop(0)
    assert torch.equal(out, expected) and torch.equal(hidden, before), "out of place"
    (out * 3.0).sum().backward()
    assert torch.equal(hidden.grad, 3.0 * (ids != IMAGE)[..., None].expand_as(hidden)), "text where text is"
    assert torch.equal(soft.grad, torch.full_like(soft, 3.0)), "every soft token is used once"


def test_images_in_a_model():
    """Half-precision soft tokens enter the float32 residual stream unscaled, and change only what sees them."""
    config = small_config()
    model = random_model(config, dtype=torch.float32)
    ids = tokens(config, 1, 9)
    ids[ids == IMAGE] = 1
    ids[0, 4:6] = IMAGE
    soft = torch.randn(1, 2, config.hidden_size).bfloat16()
    hidden = populate_image_embeddings(model.embed(ids), ids, soft, IMAGE)
    assert hidden.dtype == torch.float32 and torch.equal(hidden[0, 4:6], soft[0].float())
    out, plain = (model.run_layers(x, model.context(ids)) for x in (hidden, model.embed(ids)))
    assert torch.equal(out[:, :4], plain[:, :4]) and not torch.allclose(out[:, 6:], plain[:, 6:])


def test_counts_and_shapes_must_fit():
    ids = torch.tensor([[1, IMAGE, IMAGE], [IMAGE, 1, 1]])
    hidden = torch.zeros(2, 3, 6)
    with pytest.raises(UserError, match="the text has 3 image tokens, but 2 images of 2 soft tokens make 4"):
        populate_image_embeddings(hidden, ids, torch.zeros(2, 2, 6), IMAGE)
    with pytest.raises(UserError, match=r"image_embeddings must be \[images, soft tokens, 6\], not \[3, 1, 5\]"):
        populate_image_embeddings(hidden, ids, torch.zeros(3, 1, 5), IMAGE)
    with pytest.raises(UserError, match=r"token_ids \[B, L\], but they are \[2, 3, 6\] and \[2, 2\]"):
        populate_image_embeddings(hidden, ids[:, 1:], torch.zeros(1, 3, 6), IMAGE)
