"""Full-rank latents are the dense model, at every size's head shapes; truncated ones follow the formulas exactly."""

import copy

import pytest
import torch
from random_models import factors_for, head_shapes, random_model, small_config, student_of, tokens

from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES
from tpa_train.gemma3.layers import apply_rotary, rotary_table
from tpa_train.tpa.forms.latent import JointKeys, JointValues, LatentKeys, LatentValues
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs


def _joint_student(model, ranks, bits=16, cached_norm=False):
    """``ranks``: layer -> rank of the joint latent."""
    specs = dense_specs(model.config)
    for layer, rank in ranks.items():
        specs[layer] = LayerSpec("joint", rank, "joint", rank, bits, cached_norm=cached_norm)
    return Gemma3ForMultimodalLMwithTPA.from_dense(model, specs, factors_for(model, specs))


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_full_rank_equals_the_dense_model(size):
    config = head_shapes(size)
    d = config.head_dim
    model, ids = random_model(config), tokens(config, 1, 20)
    expected = model(ids)
    for forms in ({0: (d, d), 1: (d, d)}, {0: (d, 0), 1: (0, d)}):
        student = student_of(model, forms)
        assert student.converted_layers == [0, 1]
        torch.testing.assert_close(student(ids), expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("size", ["270m", "4b"])
def test_joint_latents_of_full_rank_equal_the_dense_model(size):
    """2·G·d numbers: 512 and 2048, one latent for all heads."""
    config = head_shapes(size)
    model, ids = random_model(config), tokens(config, 1, 20)
    student = _joint_student(model, {1: 2 * config.num_kv_heads * config.head_dim})
    torch.testing.assert_close(student(ids), model(ids), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("form", ["latent", "joint"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_full_rank_with_documents_and_cache(groups, form):
    config = small_config(num_kv_heads=groups)
    model, ids = random_model(config), tokens(config, 2, 40)
    if form == "latent":
        student = student_of(model, {i: (8, 8) for i in range(6)})
    else:
        student = _joint_student(model, {i: 16 * groups for i in range(6)})
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
@pytest.mark.parametrize("kind", ["local", "global"])
def test_joint_latents_by_the_definition(groups, kind):
    """Rank 5: one c = A x; K = U_k c with its exact rms, 1 + w and RoPE; V = U_v c around its mean, then W_O."""
    config = small_config(num_kv_heads=groups)
    generator = torch.Generator().manual_seed(0)
    keys, values = JointKeys(config, 5).double(), JointValues(config, 5).double()
    for p in (*keys.parameters(), *values.parameters()):
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 9, config.hidden_size, generator=generator, dtype=torch.float64)
    rotary = rotary_table(config, kind, torch.arange(9)[None])
    c = x @ keys.down.weight.T
    k = torch.einsum("blr,gdr->blgd", c, keys.up)
    rms = (k.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    expected = apply_rotary(k / rms * (1 + keys.norm.weight), rotary)
    (entry,) = keys.write(x, rotary)
    torch.testing.assert_close(entry, (c - keys.center)[:, :, None], rtol=0, atol=1e-12)
    torch.testing.assert_close(keys.read((entry,), rotary), expected, rtol=0, atol=1e-12)
    assert values.write(x) == () and keys.center.abs().min() > 0
    v = torch.einsum("blr,gdr->blgd", c - keys.center, values.up)
    torch.testing.assert_close(values.read((), (entry,)), v, rtol=0, atol=1e-12)
    heads = torch.randn(2, 9, 4, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        values.output(heads), heads.flatten(-2) @ values.out.weight.T + values.bias, rtol=0, atol=1e-12
    )


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4])
def test_a_joint_latent_holds_separate_ones(groups):
    """The special case: [c_k; c_v] side by side, U_k blind to one half and U_v to the other."""
    config = small_config(num_kv_heads=groups)
    model, ids = random_model(config), tokens(config, 1, 30)
    separate = student_of(model, {5: (3, 4)})
    prefix, k, v = "layers.5.self_attn.", 3 * groups, 4 * groups
    ours = {n.removeprefix(prefix): p for n, p in separate.named_parameters() if n.startswith(prefix)}
    up_k, up_v = torch.zeros(groups, 8, k + v).double(), torch.zeros(groups, 8, k + v).double()
    out = model.layers[5].self_attn.o_proj.weight.unflatten(1, (4, 8))
    for head in range(groups):
        up_k[head, :, 3 * head : 3 * head + 3] = ours["keys.up"][head]
        # W_O^h U_v is what the separate form holds; W_O has full column rank.
        folded = ours["values.out.weight"].unflatten(1, (4, 4))[:, head * 4 // groups]
        up_v[head, :, k + 4 * head : k + 4 * head + 4] = torch.linalg.pinv(out[:, head * 4 // groups]) @ folded
    factors = {
        "keys.down.weight": torch.cat((ours["keys.down.weight"], ours["values.down.weight"])), "keys.up": up_k,
        "keys.center": torch.cat((torch.zeros(k).double(), ours["values.center"].flatten())), "values.up": up_v,
        "values.bias": ours["values.bias"],
    }  # fmt: skip
    specs = dense_specs(config)
    specs[5] = LayerSpec("joint", k + v, "joint", k + v)
    joint = Gemma3ForMultimodalLMwithTPA.from_dense(model, specs, {prefix + n: t for n, t in factors.items()})
    torch.testing.assert_close(joint(ids), separate(ids), rtol=0, atol=1e-10)
    assert (joint(ids) - model(ids)).abs().max() > 1e-2


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


@pytest.mark.parametrize("bits", [16, (8, 3), (16, 2)])
def test_cached_norms_are_those_of_the_rounded_latents(bits):
    """So keys and their gradients are what they are without cached norms; only rounding 1/rms makes a difference."""
    config = small_config(num_kv_heads=4, head_dim=40, hidden_size=48)
    model, ids = random_model(config, dtype=torch.float64), tokens(config, 1, 30)
    found = []
    for cached_norm in (True, False):
        student = _joint_student(model, {5: 50}, bits, cached_norm)
        parameters = {n: p.requires_grad_() for n, p in student.named_parameters() if n in student.factor_names()}
        logits = student(ids)
        found.append((logits, torch.autograd.grad(logits.logsumexp(-1).sum(), list(parameters.values()))))
        attention = student.layers[5].self_attn
        for dtype in (torch.float64, torch.bfloat16):  # entries as they come back are what training sees, to the bit
            layer, x = copy.deepcopy(attention).to(dtype), torch.randn(2, 7, 48, dtype=dtype)
            entries = layer.write(x, None)
            for mine, theirs in zip(layer.unpack(layer.pack(entries), dtype), layer.as_cached(entries), strict=True):
                assert mine.dtype == dtype and torch.equal(mine, theirs)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    (rounded,) = attention.as_cached(attention.write(x.double(), None))  # of the layer without cached norms
    norms = attention.keys.inverse_norms(rounded)
    keys = torch.einsum("blr,gdr->blgd", rounded[:, :, 0] + attention.keys.center, attention.keys.up)
    assert norms.shape == (2, 7, 1, 4)
    torch.testing.assert_close((keys * norms.mT).square().mean(-1), torch.ones(2, 7, 4).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups,cached_norm", [(1, False), (4, False), (4, True)])
def test_gradients_reach_every_factor_of_a_joint_latent(groups, cached_norm):
    config = small_config(num_kv_heads=groups)
    model, ids = random_model(config), tokens(config, 1, 30)
    student = _joint_student(model, {0: 6, 5: 9}, bits=8, cached_norm=cached_norm)
    parameters = {n: p.requires_grad_() for n, p in student.named_parameters() if n in student.factor_names()}
    assert {n.split("self_attn.")[1] for n in parameters} == {
        "keys.down.weight", "keys.up", "keys.center", "values.up", "values.bias"
    }  # fmt: skip
    student(ids).logsumexp(-1).sum().backward()
    for name, p in parameters.items():  # the center moves the values: they are read without it
        assert p.grad.abs().max() > 1e-8, name


def test_a_joint_student_shares_what_is_not_a_factor():
    model = random_model(small_config(num_kv_heads=4))
    ours, theirs = _joint_student(model, {5: 9}).layers[5].self_attn, model.layers[5].self_attn
    assert ours.keys.norm.weight is theirs.k_norm.weight and ours.values.out.weight is theirs.o_proj.weight
    assert ours.q_proj.weight is theirs.q_proj.weight


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
