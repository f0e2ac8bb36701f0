"""Attention around and inside images against explicit masks, and decoding against the full forward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multimodal_models import VISION, random_multimodal
from random_models import factors_for, small_config, specs_of

from tpa_train.errors import UserError
from tpa_train.gemma3.attention import Documents, attend
from tpa_train.gemma3.images import NO_IMAGE, ImageBlocks, image_blocks
from tpa_train.serving import engine, prompts
from tpa_train.tpa import generation
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec
from tpa_train.tpa.tensor_product_utils import create_attention_mask

IMAGE = 90
CONFIG = small_config(num_kv_heads=4, vision=VISION)


def blocks_of(length: int, *spans: tuple[int, int]) -> torch.Tensor:
    ids = torch.full((length,), 1)
    for start, end in spans:
        ids[start:end] = IMAGE
    return image_blocks(ids[None], IMAGE)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_attend_equals_the_explicit_mask(data):
    """Any window, documents and images; values narrower than keys; gradients too."""
    batch, length, heads, groups, dim = 2, data.draw(st.integers(2, 30)), 4, 2, 8
    window = data.draw(st.sampled_from([None, 1, 3, 8, 40]))
    ids = torch.tensor(data.draw(st.lists(
        st.lists(st.sampled_from([1, 1, IMAGE]), min_size=length, max_size=length), min_size=batch, max_size=batch
    )))  # fmt: skip
    ids[0, 0] = IMAGE  # at least one
    blocks = image_blocks(ids, IMAGE)
    documents = None
    if data.draw(st.booleans()):  # documents begin between images
        inside = torch.nn.functional.pad((blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] >= 0), (1, 0))
        starts = torch.tensor(data.draw(st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch
        )))  # fmt: skip
        documents = Documents((starts & ~inside).int().cumsum(1))
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, heads, dim), (batch, length, groups, dim), (batch, length, groups, 5))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    out = attend(q, k, v, 0.4, window, documents, ImageBlocks(blocks, documents))
    mask = create_attention_mask(
        length, window=window, image_ids=blocks, document_ids=None if documents is None else documents.ids
    )
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 0.4
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_spans_are_the_images():
    ids = torch.cat([blocks_of(12, (0, 3), (5, 9)), blocks_of(12, (8, 12)), blocks_of(12)])
    documents = Documents(torch.tensor([[0] * 4 + [1] * 8, [0] * 12, [0] * 12]))
    assert ImageBlocks(ids).spans == [(0, 0, 3, 0), (0, 5, 9, 0), (1, 8, 12, 0)]
    assert ImageBlocks(ids, documents).spans == [(0, 0, 3, 0), (0, 5, 9, 4), (1, 8, 12, 0)]
    assert ids[2].unique().tolist() == [NO_IMAGE]


def prompt_ids(generator: torch.Generator, *parts: int | None) -> list[int]:
    """Text of so many tokens, and an image at None; no image token in the text."""
    ids: list[int] = [2]
    for part in parts:
        if part is None:
            ids += [91, *[IMAGE] * VISION.tokens_per_image, 92]
        else:
            ids += torch.randint(3, 90, (part,), generator=generator).tolist()
    return ids


def students() -> dict[str, Gemma3ForMultimodalLMwithTPA]:
    dense = random_multimodal(CONFIG)
    specs = specs_of(CONFIG, {1: (3, 5), 5: (8, 4)})
    quantized = [dataclasses.replace(s, bits_k=8, bits_v=4) for s in specs]
    return {
        "dense": Gemma3ForMultimodalLMwithTPA.from_dense(dense, [LayerSpec(rank_k=8, rank_v=8)] * 6, {}),
        "latent": Gemma3ForMultimodalLMwithTPA.from_dense(dense, specs, factors_for(dense, specs)),
        "quantized": Gemma3ForMultimodalLMwithTPA.from_dense(dense, quantized, factors_for(dense, specs)),
    }


@pytest.mark.parametrize("chunk", [1024, 9, 5])
@pytest.mark.parametrize("name", ["dense", "latent", "quantized"])
def test_decoding_equals_the_full_forward(name, chunk, monkeypatch):
    """Prompts of several lengths with images at different places, padded in one batch, in small prefill steps."""
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    model = students()[name]
    generator = torch.Generator().manual_seed(3)
    texts = [
        prompt_ids(generator, 4, None, 7, None, 2), prompt_ids(generator, 30), prompt_ids(generator, None, None, None)
    ]  # fmt: skip
    pixels = [torch.randint(0, 256, (n, 3, 56, 56), generator=generator, dtype=torch.uint8) for n in (2, 0, 3)]
    steps = 12
    written = torch.stack(list(generation.stream_ids(model, texts, steps, images=pixels)), dim=1)
    for prompt, own, tokens in zip(texts, pixels, written.tolist(), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens]), images=own if len(own) else None)[0, len(prompt) - 1 : -1]
        logits[:, IMAGE] = -torch.inf  # a model never writes an image
        assert logits.argmax(-1).tolist() == tokens


def test_prefill_steps_end_between_images():
    model = random_multimodal(CONFIG)
    ids = prompt_ids(torch.Generator().manual_seed(3), 4, None, 3, None, 9)
    pixels = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    for chunk in (1, 3, 6, 20):
        chunks = list(prompts.prefill_chunks(model, ids, pixels, chunk))
        assert torch.cat([c["token_ids"] for c in chunks], 1).tolist() == [ids]
        assert sum(len(c["images"]) for c in chunks if c["images"] is not None) == 2
        for left, right in zip(chunks, chunks[1:], strict=False):
            assert not (int(left["token_ids"][0, -1]) == IMAGE == int(right["token_ids"][0, 0]))
        assert all(c["token_ids"].shape[1] <= max(chunk, VISION.tokens_per_image) for c in chunks)


def test_images_that_do_not_fit_their_places_are_refused():
    model = random_multimodal(CONFIG)
    ids = prompt_ids(torch.Generator().manual_seed(3), 4, None, 3, None)
    with pytest.raises(UserError, match="places for 2 images, but 1 were given"):
        next(generation.stream_ids(model, [ids], 2, images=[torch.zeros(1, 3, 56, 56, dtype=torch.uint8)]))
    with pytest.raises(UserError, match="has 1 image tokens, but 1 images take 4"):
        next(generation.stream_ids(model, [[2, IMAGE]], 2, images=[torch.zeros(1, 3, 56, 56, dtype=torch.uint8)]))


def test_an_image_token_beyond_the_vocabulary():
    """As in the released checkpoints, whose text vocabulary ends below the image token."""
    config = small_config(vision=dataclasses.replace(VISION, image_token_id=97))
    model = random_multimodal(config)
    ids = torch.tensor([[2, 91, *[97] * 4, 92, 5, 6]])
    pixels = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        embedded = model.embed(ids, pixels)
        assert torch.equal(embedded[:, 2:6], model.vision(pixels, torch.float64))
        assert model(ids, images=pixels).shape == (1, 9, 97)


def test_the_student_shares_the_vision_side():
    dense = random_multimodal(CONFIG)
    specs = specs_of(CONFIG, {5: (8, 4)})
    student = Gemma3ForMultimodalLMwithTPA.from_dense(dense, specs, factors_for(dense, specs))
    ours, theirs = dict(student.named_parameters()), dict(dense.named_parameters())
    vision = [n for n in ours if n.startswith("vision.")]
    assert len(vision) > 30 and all(ours[n] is theirs[n] for n in vision)
