"""Full-rank latents are the dense model, at every size's head shapes; truncated ones follow DESIGN §3 exactly."""

import pytest
import torch
from random_models import random_model, small_config, student_of, tokens

from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES
from tpa_train.gemma3.layers import apply_rotary, rotary_table
from tpa_train.tpa.forms import LatentKeys, LatentValues
from tpa_train.tpa.spec import LayerSpec


def _head_shapes(size):
    """The size's attention on a narrow model of one local and one global layer, window shorter than the text."""
    c = SIZES[size]
    return small_config(
        num_layers=2, layer_kinds=("local", "global"), hidden_size=32, num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, query_pre_attn_scalar=c.query_pre_attn_scalar,
        rope_scaling_factor=c.rope_scaling_factor, rope_theta=c.rope_theta, rope_local_theta=c.rope_local_theta,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_full_rank_equals_the_dense_model(size):
    config = _head_shapes(size)
    d = config.head_dim
    model, ids = random_model(config), tokens(config, 1, 20)
    expected = model(ids)
    for forms in ({0: (d, d), 1: (d, d)}, {0: (d, 0), 1: (0, d)}):
        student = student_of(model, forms)
        assert student.converted_layers == [0, 1]
        torch.testing.assert_close(student(ids), expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4])
def test_full_rank_with_documents_and_cache(groups):
    config = small_config(num_kv_heads=groups)
    model, ids = random_model(config), tokens(config, 2, 40)
    student = student_of(model, {i: (8, 8) for i in range(6)})
    documents = (torch.arange(40)[None].expand(2, -1) >= torch.tensor([[7], [30]])).long()
    torch.testing.assert_close(student(ids, documents), model(ids, documents), rtol=0, atol=1e-10)
    cache = student.allocate_cache(2, 40, dtype=torch.float64)
    out = torch.cat([student(part, cache=cache) for part in ids.split([11, 1, 1, 20, 7], dim=1)], dim=1)
    torch.testing.assert_close(out, model(ids), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", ["local", "global"])
def test_latent_keys_by_the_definition(groups, kind):
    """Rank 3: K = U A x, its exact rms, the norm's 1 + w, then RoPE."""
    config = small_config(num_kv_heads=groups)
    generator = torch.Generator().manual_seed(0)
    keys = LatentKeys(config, 3).double()
    for p in keys.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 9, config.hidden_size, generator=generator, dtype=torch.float64)
    rotary = rotary_table(config, kind, torch.arange(9)[None])
    k = torch.einsum("blgr,gdr->blgd", (x @ keys.down.weight.T).unflatten(-1, (groups, 3)), keys.up)
    rms = (k.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    expected = apply_rotary(k / rms * (1 + keys.norm.weight), rotary)
    (entry,) = keys.write(x, rotary)
    assert entry.shape == (2, 9, groups, 3)
    torch.testing.assert_close(keys.read((entry,), rotary), expected, rtol=0, atol=1e-12)
    # The center only shifts what is cached.
    torch.testing.assert_close(
        torch.einsum("blgr,gdr->blgd", entry + keys.center, keys.up), k / rms, rtol=0, atol=1e-12
    )
    assert keys.center.abs().min() > 0


@torch.no_grad()
def test_latent_values_subtract_their_center_and_add_the_bias():
    config = small_config(num_kv_heads=4)
    values = LatentValues(config, 5).double()
    for p in values.parameters():
        p.normal_()
    x = torch.randn(1, 4, config.hidden_size, dtype=torch.float64)
    expected = (x @ values.down.weight.T).unflatten(-1, (4, 5)) - values.center
    torch.testing.assert_close(values.write(x)[0], expected, rtol=0, atol=1e-12)
    heads = torch.randn(1, 4, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(
        values.output(heads), heads.flatten(-2) @ values.out.weight.T + values.bias, rtol=0, atol=1e-12
    )


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4])
def test_truncation_changes_the_output_and_only_from_its_layer_on(groups):
    config = small_config(num_kv_heads=groups)
    model, ids = random_model(config), tokens(config, 1, 30)
    student = student_of(model, {3: (4, 4)})
    context = model.context(ids)
    x = model.embed(ids)
    assert torch.equal(model.run_layers(x, context, stop=3), student.run_layers(x, context, stop=3))
    assert (student(ids) - model(ids)).abs().max() > 1e-2


def test_gradients_reach_every_factor():
    config = small_config(num_kv_heads=4)
    model, ids = random_model(config), tokens(config, 1, 30)
    student = student_of(model, {0: (4, 3), 5: (5, 2)}, bits=8)
    parameters = {n: p.requires_grad_() for n, p in student.named_parameters() if n in student.factor_names()}
    student(ids).logsumexp(-1).sum().backward()
    for name, p in parameters.items():
        # A key's center is subtracted before the cache and added after it: exactly no gradient.
        assert (p.grad.abs().max() > 1e-8) != name.endswith("keys.center"), name


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"form_k": "latnet"}, "unknown TPA form 'latnet'; did you mean 'latent'"),
        ({"form_v": "tuker"}, "unknown TPA form 'tuker'; did you mean 'tucker'"),
        ({"bits_k": 5}, "cache bits must be one of 16, 8, 6, 4, 3, 2, not 5"),
    ],
)
def test_bad_specifications_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        LayerSpec(**arguments)
