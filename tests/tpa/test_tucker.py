"""Tucker parts at full rank are the dense model; truncated ones the formulas, whole or decoded from the cache."""

import dataclasses

import pytest
import torch
from random_models import head_shapes, random_model, small_config, tokens

from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES
from tpa_train.gemma3.layers import apply_rotary, rotary_table
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.forms.tucker import features_of, rank_of, tucker_kinds
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs

MODULES = {"q": "query_form", "k": "keys", "v": "values", "o": "output_form"}


def tucker(config, kinds, rank=None, **fields) -> LayerSpec:
    """``rank`` for every kind, head_dim if left out."""
    rank = rank or config.head_dim
    forms = {f"form_{kind}": "tucker" for kind in kinds}
    ranks = {"rank_k": config.head_dim, "rank_v": config.head_dim} | {f"rank_{kind}": rank for kind in kinds}
    return LayerSpec(**forms, **ranks, **fields)


def layer_factors(attention, spec, seed=1):
    """Exact factors in random, badly scaled bases and random centers, cut to the ranks; from the formulas alone."""
    config = attention.config
    d, generator = config.head_dim, torch.Generator().manual_seed(seed)
    factors = {}

    def basis(n):
        q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        return q * (0.5 + torch.rand(n, generator=generator, dtype=torch.float64))

    hidden = basis(config.hidden_size) if spec.hidden else torch.eye(config.hidden_size, dtype=torch.float64)
    r1 = spec.hidden or config.hidden_size
    if spec.hidden:
        factors["shared.hidden"] = hidden[:, :r1]
    features, weights = {}, {}
    for kind in "qkvo":
        weight = getattr(attention, f"{kind}_proj").weight.detach()
        weights[kind] = (weight.mT if kind == "o" else weight).unflatten(0, (-1, d))  # [N, d, D]
    value_center = 0
    for kind in tucker_kinds(spec):
        key, rank, weight = features_of(spec, kind), rank_of(spec, kind), weights[kind]
        absorbed = kind == "o" and spec.form_v == "tucker"
        u = features.setdefault(key, basis(d))
        core = u.mT @ weight if absorbed else u.inverse() @ weight  # [N, d, D]
        core = core @ hidden.inverse().mT
        heads = getattr(spec, f"heads_{kind}") if kind in "kv" else 0
        mixing = basis(len(weight))
        if heads:
            core = torch.einsum("hn,nrx->hrx", mixing.inverse(), core)[:heads]
            factors[f"{MODULES[kind]}.heads"] = mixing[:, :heads]
        factors[f"{MODULES[kind]}.core"] = core[:, :rank, :r1]
        if kind != "v" and not absorbed:
            factors["shared.features" if key == "shared" else f"{MODULES[kind]}.features"] = u[:, :rank]
        if kind in "kv":
            center = 0.3 * torch.randn(core.shape[0], rank, generator=generator, dtype=torch.float64)
            factors[f"{MODULES[kind]}.center"] = center
            if kind == "v":  # of what attention sees: [G, r₂]
                value_center = mixing[:, :heads] @ center if 0 < heads < len(weight) else center
    repeats = config.num_heads // config.num_kv_heads
    if "v" in tucker_kinds(spec):
        out = torch.einsum("hdo,dr->hro", weights["o"], features[features_of(spec, "v")][:, : spec.rank_v])
        if spec.form_o == "dense":
            factors["values.out.weight"] = out.permute(2, 0, 1).flatten(1)
        else:
            out = factors["output_form.core"] @ hidden[:, :r1].mT
        bias = torch.einsum("hro,hr->o", out, value_center.repeat_interleave(repeats, 0))
        factors["output_form.bias" if spec.form_o == "tucker" else "values.bias"] = bias
    elif spec.form_o == "tucker":
        factors["output_form.bias"] = torch.zeros(config.hidden_size, dtype=torch.float64)
    return factors


def student_of(model, specs, extra=None):
    factors = {
        f"layers.{i}.self_attn.{name}": tensor
        for i, spec in enumerate(specs)
        for name, tensor in layer_factors(model.layers[i].self_attn, spec, seed=i).items()
    }
    return Gemma3ForMultimodalLMwithTPA.from_dense(model, specs, factors | (extra or {}))


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_full_rank_equals_the_dense_model(size):
    """Every set of kinds; hidden whole or explicit, heads whole or explicit, features shared or not, all met by the
    270M and the 4B; every third set by the others."""
    config = head_shapes(size)
    model, ids = random_model(config), tokens(config, 1, 20)
    expected = model(ids)
    sets = ["k", "v", "kv", "q", "o", "vo", "qo", "kvo", "qkvo", "qk", "qkv", "ko", "qv", "qvo", "qko"]
    options = [(32 * (n // 4 % 2), config.num_kv_heads * (n // 2 % 2), bool(n % 2)) for n in range(len(sets))]
    specs = []
    for kinds, (hidden, heads, shared) in zip(sets, options, strict=True):
        explicit = {f"heads_{kind}": heads for kind in set(kinds) & {"k", "v"}}
        specs.append(tucker(config, kinds, hidden=hidden, shared_features=shared, **explicit))
    specs.append(tucker(config, "qkvo", hidden=32, heads_k=config.num_kv_heads, heads_v=0))
    if size not in ("270m", "4b"):
        specs = specs[list(SIZES).index(size) % 2 :: 3][:4]
    for pair in zip(specs[::2], specs[1::2], strict=True):
        student = student_of(model, list(pair))
        assert student.converted_layers == [0, 1]
        torch.testing.assert_close(student(ids), expected, rtol=0, atol=1e-10, msg=lambda m, pair=pair: f"{pair}: {m}")


def _random_part(name, config, spec):
    attention = FactorizedAttention(config, 0, spec).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in attention.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return attention, getattr(attention, name)


@torch.no_grad()
@pytest.mark.parametrize("heads", [0, 2, 4])
@pytest.mark.parametrize("kind", ["local", "global"])
def test_keys_by_the_definition(heads, kind):
    config = small_config(num_kv_heads=4)
    attention, keys = _random_part("keys", config, tucker(config, "k", 3, heads_k=heads, hidden=7))
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.float64)
    rotary = rotary_table(config, kind, torch.arange(9)[None])
    mixing = keys.heads if heads else torch.eye(4, dtype=torch.float64)
    k = torch.einsum("gh,dr,hrx,ix,bli->blgd", mixing, keys.features, keys.core, attention.shared.hidden, x)
    rms = (k.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    expected = apply_rotary(k / rms * (1 + keys.norm.weight), rotary)
    entries = keys.write(x, rotary)
    assert [e.shape for e in entries] == ([(2, 9, 2, 3), (2, 9, 1, 4)] if heads == 2 else [(2, 9, 4, 3)])
    torch.testing.assert_close(keys.read(entries, rotary), expected, rtol=0, atol=1e-12)
    # What is cached does not grow with the token.
    torch.testing.assert_close(keys.write(1e4 * x, rotary), keys.write(1e5 * x, rotary), rtol=0, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("heads", [0, 2, 4])
def test_values_by_the_definition(heads):
    config = small_config(num_kv_heads=4, num_heads=8)
    attention, values = _random_part("values", config, tucker(config, "v", 3, heads_v=heads))
    x = torch.randn(2, 5, config.hidden_size, dtype=torch.float64)
    mixing = values.heads if heads else torch.eye(4, dtype=torch.float64)
    center = mixing @ values.center if heads == 2 else values.center
    expected = torch.einsum("gh,hrx,blx->blgr", mixing, values.core, x) - center
    entries = values.write(x)
    assert entries[0].shape == (2, 5, heads or 4, 3)
    torch.testing.assert_close(values.read(entries, ()), expected, rtol=0, atol=1e-12)
    heads_out = torch.randn(2, 5, 8, 3, dtype=torch.float64)
    expected = heads_out.flatten(-2) @ values.out.weight.T + values.bias
    torch.testing.assert_close(attention.output(heads_out), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("form_v", ["dense", "tucker"])
def test_queries_and_output_by_the_definition(form_v):
    config = small_config(num_kv_heads=2)
    kinds = "qo" if form_v == "dense" else "qvo"
    attention, output = _random_part("output_form", config, tucker(config, kinds, 3, hidden=7, shared_features=True))
    shared, x = attention.shared, torch.randn(2, 5, config.hidden_size, dtype=torch.float64)
    expected = torch.einsum("dr,hrx,ix,bli->blhd", shared.features, attention.query_form.core, shared.hidden, x)
    torch.testing.assert_close(attention.raw_queries(x), expected, rtol=0, atol=1e-12)
    z = torch.randn(2, 5, 4, 3 if form_v == "tucker" else 8, dtype=torch.float64)
    latents = z if form_v == "tucker" else z @ shared.features
    expected = torch.einsum("blhr,hrx,ix->bli", latents, output.core, shared.hidden) + output.bias
    torch.testing.assert_close(attention.output(z), expected, rtol=0, atol=1e-12)


def _mixed(groups, bits):
    """Tucker K/V/Q/O, whole and mixed heads, beside dense and latent parts; in local and global layers."""
    config = small_config(
        num_layers=8, layer_kinds=("local",) * 4 + ("global",) * 4, num_kv_heads=groups, sliding_window=16
    )
    fewer = max(1, groups - 1)
    local = [
        tucker(config, "qkvo", 5, hidden=20, heads_k=fewer, heads_v=fewer, shared_features=True),
        dataclasses.replace(tucker(config, "k", 6, heads_k=groups), form_v="latent", rank_v=3),
        dataclasses.replace(tucker(config, "vo", 4, heads_v=fewer), form_k="latent", rank_k=5),
        tucker(config, "qo", 5, hidden=11),
    ]
    specs = [dataclasses.replace(s, bits_k=bits, bits_v=bits) for s in [*local, *reversed(local)]]
    model, extra = random_model(config, seed=groups), {}
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Gemma3ForMultimodalLMwithTPA(config, specs).named_parameters()}
    for i, spec in enumerate(specs):
        part = {"k": "keys", "v": "values"}.items()
        latent = [f"layers.{i}.self_attn.{m}." for k, m in part if getattr(spec, f"form_{k}") == "latent"]
        for name in (n for n in shapes if any(n.startswith(p) for p in latent) and "norm" not in n):
            extra[name] = torch.randn(shapes[name], generator=generator, dtype=torch.float64) * 0.3
    return student_of(model, specs, extra)


@torch.inference_mode()
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [16, 8])
def test_factored_decode_equals_the_full_forward(groups, bits):
    """A prompt, chunks below and above the window, and single tokens; far past the window."""
    student = _mixed(groups, bits)
    ids = tokens(student.config, 1, 110)
    cache = student.allocate_cache(1, 110, dtype=torch.float64)
    sizes = [12] + [1] * 10 + [30, 7, 20]
    parts = ids.split(sizes + [1] * (110 - sum(sizes)), dim=1)
    decoded = torch.cat([student(part, cache=cache) for part in parts], dim=1)
    torch.testing.assert_close(decoded, student(ids), rtol=0, atol=1e-10 if bits == 16 else 1e-6)


@pytest.mark.parametrize("groups", [1, 4])
def test_cache_bytes_are_those_of_core_activations(groups):
    config = small_config(num_kv_heads=groups)
    fewer = max(1, groups - 1)
    specs = dense_specs(config)
    specs[5] = tucker(config, "kv", 5, heads_k=fewer, heads_v=fewer)
    norms = groups if fewer < groups else 0
    assert specs[5].bytes_per_token(config) == 2 * (2 * fewer * 5 + norms)
    with torch.device("meta"):
        student = Gemma3ForMultimodalLMwithTPA(config, specs)
    cache = student.allocate_cache(1, 100, device="meta")
    assert cache.nbytes == cache_bytes(config, specs, 100)
    assert sum(t[0, 0].numel() for t in cache.buffers[5]) == 2 * fewer * 5 + norms


@pytest.mark.parametrize("shared", [False, True])
def test_the_state_dict_holds_every_tensor_once(shared):
    config = small_config(num_kv_heads=4)
    specs = dense_specs(config)
    specs[5] = tucker(config, "qkvo", 5, hidden=11, heads_k=2, heads_v=2, shared_features=shared)
    student = student_of(random_model(config), specs)
    state = student.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    names = {n.removeprefix("layers.5.self_attn.") for n in state if n.startswith("layers.5.self_attn.")}
    own = {"shared.features"} if shared else {"query_form.features", "keys.features"}
    assert names == own | {
        "shared.hidden", "query_form.core", "q_norm.weight", "keys.core", "keys.heads", "keys.center",
        "keys.norm.weight", "values.core", "values.heads", "values.center", "output_form.core", "output_form.bias",
    }  # fmt: skip
    assert {n for n in student.factor_names() if ".5." in n} == {
        f"layers.5.self_attn.{n}" for n in names if "norm" not in n
    }
    # References see what from_dense and load_state_dict put in.
    attention = student.layers[5].self_attn
    assert attention.keys.shared.hidden is attention.query_form.shared.hidden is attention.shared.hidden
    ids = tokens(config, 1, 12)
    with torch.no_grad():
        before = student(ids)
        student.load_state_dict({n: t * 1.5 if n.endswith("shared.hidden") else t for n, t in state.items()})
        assert (student(ids) - before).abs().max() > 1e-3


@pytest.mark.parametrize("bits", [16, 8])
def test_gradients_reach_every_factor(bits):
    config = small_config(num_kv_heads=4)
    specs = dense_specs(config)
    specs[0] = tucker(config, "qkvo", 5, hidden=20, heads_k=2, heads_v=2, shared_features=True, bits_k=bits)
    specs[3] = tucker(config, "qo", 4, hidden=9, bits_k=bits)
    specs[5] = tucker(config, "kv", 5, heads_k=4, bits_k=bits)
    student = student_of(random_model(config), specs)
    parameters = {n: p.requires_grad_() for n, p in student.named_parameters() if n in student.factor_names()}
    student(tokens(config, 1, 30)).logsumexp(-1).sum().backward()
    for name, p in parameters.items():
        # A key's center is subtracted before the cache and added after it: no gradient.
        assert (p.grad.abs().max() > 1e-8) != name.endswith("keys.center"), name


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"form_k": "tucker"}, "rank_k=0 must lie between 1 and head_dim, 8"),
        ({"form_v": "tucker", "rank_v": 9}, "rank_v=9 must lie between 1 and head_dim, 8"),
        ({"form_q": "tucker", "rank_q": -1}, "rank_q=-1 must lie between 1 and head_dim, 8"),
        ({"form_o": "tucker"}, "rank_o=0 must lie between 1 and head_dim, 8"),
        ({"form_k": "tucker", "rank_k": 3, "heads_k": 5}, "heads_k=5 must lie between 0 .whole. and the 4 KV heads"),
        ({"form_k": "tucker", "rank_k": 3, "heads_v": 2}, "heads_v=2 is Tucker's: give form_v the form 'tucker'"),
        ({"form_k": "tucker", "rank_k": 3, "hidden": 25}, "hidden=25 must lie between 0 .whole. and the hidden"),
        (
            {"form_k": "tucker", "rank_k": 3, "form_v": "tucker", "rank_v": 4, "shared_features": True},
            "shared_features is one U_feat for all Tucker parts; set equal ranks instead of rank_k=3, rank_v=4",
        ),
        ({"form_v": "latent", "rank_v": 3, "form_o": "tucker"}, "form_o='tucker' needs form_v 'tucker' or 'dense'"),
        ({"form_k": "latent", "rank_k": 3, "hidden": 5}, "hidden and shared_features are Tucker's"),
    ],
)  # fmt: skip
def test_bad_ranks_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as error:
        FactorizedAttention(small_config(num_kv_heads=4), 0, LayerSpec(**fields))
    assert "\n" not in str(error.value)
