"""Contextual and constant forms: by the definition, exact at full rank, the same when decoded from the cache."""

import pytest
import torch
from random_models import factors_for, head_shapes, random_model, small_config, tokens

from tpa_train.factorization.contextual_factorization import _init_contextual_factorization, _layer_factors
from tpa_train.gemma3.config import SIZES
from tpa_train.gemma3.layers import apply_rotary, rotary_table
from tpa_train.tpa.forms import build_keys, build_queries, build_values
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs

FORMS = ("contextual", "constant_a", "constant_b")


def _student(model, specs: dict[int, LayerSpec], noise: float = 0.0) -> Gemma3ForMultimodalLMwithTPA:
    """Closed-form factors (latent ones from random_models), and noise on all so that W_A and every bias count."""
    layers, generator = dense_specs(model.config), torch.Generator().manual_seed(5)
    factors = {}
    for index, spec in specs.items():
        layers[index] = spec
        attention = model.layers[index].self_attn
        contextual = LayerSpec(
            spec.form_k if spec.form_k in FORMS else "dense", spec.rank_k,
            spec.form_v if spec.form_v in FORMS else "dense", spec.rank_v, form_q=spec.form_q, rank_q=spec.rank_q,
        )  # fmt: skip
        found = _layer_factors(attention, contextual, None, None, 0)
        factors |= {f"layers.{index}.self_attn.{name}": t for name, t in found.items()}
    factors |= factors_for(model, layers)
    for name, t in factors.items():
        scale = t.std() if t.numel() > 1 and t.std() > 0 else 0.1
        factors[name] = t + noise * scale * torch.randn(t.shape, generator=generator, dtype=torch.float64)
    return Gemma3ForMultimodalLMwithTPA.from_dense(model, layers, factors)


def _full(config, form_k, form_v, queries=True) -> LayerSpec:
    g, d = config.num_kv_heads, config.head_dim
    rank_k, rank_v = (d if form in ("constant_b", "dense") else g for form in (form_k, form_v))
    query = {"form_q": "contextual", "rank_q": config.num_heads} if queries else {}
    return LayerSpec(form_k, rank_k, form_v, rank_v, **query)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_full_rank_equals_the_dense_model(size):
    """R = G and R_Q = H, before any training, with QK-norm and RoPE."""
    config = head_shapes(size)
    model, ids = random_model(config), tokens(config, 1, 20)
    expected = model(ids)
    for first, second in ((("contextual", "contextual"), ("constant_a", "constant_b")),
                          (("constant_b", "constant_a"), ("contextual", "dense"))):  # fmt: skip
        student = _student(model, {0: _full(config, *first), 1: _full(config, *second, queries=False)})
        assert student.converted_layers == [0, 1]
        torch.testing.assert_close(student(ids), expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("heads,groups", [(1, 1), (4, 1), (6, 3), (4, 4)])
def test_full_rank_for_every_kind_of_head_sharing(heads, groups):
    config = small_config(num_heads=heads, num_kv_heads=groups)
    model, ids = random_model(config), tokens(config, 2, 40)
    student = _student(model, {i: _full(config, FORMS[i % 3], FORMS[(i + i // 3) % 3]) for i in range(6)})
    torch.testing.assert_close(student(ids), model(ids), rtol=0, atol=1e-10)
    cache = student.allocate_cache(2, 40, dtype=torch.float64)
    out = torch.cat([student(part, cache=cache) for part in ids.split([11, 1, 1, 20, 7], dim=1)], dim=1)
    torch.testing.assert_close(out, model(ids), rtol=0, atol=1e-10)


def _randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def _factors(module, x, heads, rank):
    """a(x) [B, L, R, heads] and b(x) [B, L, R, d] written out."""
    a = module.a_bias.expand(*x.shape[:2], -1, -1)
    if module.a is not None:
        a = a + (x @ module.a.weight.T).view(*x.shape[:2], rank, heads)
    return a, (x @ module.b.weight.T).view(*x.shape[:2], rank, -1)


@torch.no_grad()
@pytest.mark.parametrize("form", ["contextual", "constant_a"])
@pytest.mark.parametrize("groups,rank", [(1, 1), (4, 3), (4, 1)])
@pytest.mark.parametrize("kind", ["local", "global"])
def test_keys_by_the_definition(form, groups, rank, kind):
    config = small_config(num_kv_heads=groups)
    spec = LayerSpec(form, rank, "dense", 8)
    keys = _randomised(build_keys(config, spec))
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rotary = rotary_table(config, kind, torch.arange(9)[None])
    a, b = _factors(keys, x, groups, rank)
    k = sum(a[:, :, r, :, None] * b[:, :, r, None, :] for r in range(rank)) / rank
    rms = (k.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    expected = apply_rotary(k / rms * (1 + keys.norm.weight), rotary)
    entries = keys.write(x, rotary)
    assert [tuple(e.shape[2:]) for e in entries] == [(e.rows, e.count) for e in spec.key_entries(config)]
    torch.testing.assert_close(keys.read(entries, rotary), expected, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("form", ["contextual", "constant_a"])
def test_values_by_the_definition(form):
    config = small_config(num_kv_heads=4)
    spec = LayerSpec("dense", 8, form, 3)
    values = _randomised(build_values(config, spec))
    x = torch.randn(2, 5, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    entries = values.write(x)
    assert [tuple(e.shape[2:]) for e in entries] == [(e.rows, e.count) for e in spec.value_entries(config)]
    expected = torch.einsum("blrg,blrd->blgd", *_factors(values, x, 4, 3)) / 3
    torch.testing.assert_close(values.read(entries, ()), expected, rtol=0, atol=1e-12)
    heads = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    projected = heads.flatten(-2) @ values.out.weight.T + values.bias
    torch.testing.assert_close(values.output(heads), projected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_queries_by_the_definition():
    config = small_config(num_kv_heads=2)
    queries = _randomised(build_queries(config, LayerSpec(form_q="contextual", rank_q=3)))
    x = torch.randn(2, 5, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("blrh,blrd->blhd", *_factors(queries, x, 4, 3)) / 3
    torch.testing.assert_close(queries(x), expected, rtol=0, atol=1e-12)
    assert build_queries(config, LayerSpec()) is None


@torch.no_grad()
def test_no_context_is_the_constant_a_form():
    """W_A = 0: the same keys and values as the form without W_A, from the same a₀ and W_B."""
    config = small_config(num_kv_heads=4)
    x = torch.randn(1, 7, config.hidden_size, dtype=torch.float64)
    rotary = rotary_table(config, "global", torch.arange(7)[None])
    for build, kind in ((build_keys, "k"), (build_values, "v")):
        wide, constant = (_randomised(build(config, LayerSpec(**{f"form_{kind}": f, f"rank_{kind}": 2})))
                          for f in ("contextual", "constant_a"))  # fmt: skip
        for name, p in constant.named_parameters():
            p.copy_(wide.get_parameter(name))

        def through_cache(module, kind=kind):
            return module.read(module.write(x, rotary), rotary) if kind == "k" else module.read(module.write(x), ())

        expected = through_cache(constant)
        assert (through_cache(wide) - expected).abs().max() > 1e-2, "W_A counts"
        wide.a.weight.zero_()
        torch.testing.assert_close(through_cache(wide), expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_constant_b_is_a_latent_with_one_u():
    config = small_config(num_kv_heads=4)
    ours = _randomised(build_keys(config, LayerSpec("constant_b", 3, "dense", 8)))
    latent = build_keys(config, LayerSpec("latent", 3, "dense", 8)).double()
    assert ours.up.shape == (1, 8, 3) and latent.up.shape == (4, 8, 3)
    for name, p in latent.named_parameters():
        p.copy_(ours.get_parameter(name).expand_as(p))
    x = torch.randn(1, 7, config.hidden_size, dtype=torch.float64)
    rotary = rotary_table(config, "global", torch.arange(7)[None])
    for mine, theirs in zip(ours.write(x, rotary), latent.write(x, rotary), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        ours.read(ours.write(x, rotary), rotary), latent.read(latent.write(x, rotary), rotary), rtol=0, atol=1e-12
    )


@torch.no_grad()
@torch.no_grad()
@torch.no_grad()
@torch.no_grad()
def test_the_norm_is_wide_under_autocast():
    """From bf16 factors, but to float32's precision."""
    config = small_config(num_kv_heads=4)
    keys = _randomised(build_keys(config, LayerSpec("contextual", 2, "dense", 8))).float()
    x = torch.randn(1, 200, config.hidden_size, generator=torch.Generator().manual_seed(4))
    rotary = rotary_table(config, "global", torch.arange(200)[None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inverse = keys._factors(x, rotary)[0]
        a, b = keys.scaled_a(x), keys.features(x)
        assert {t.dtype for t in keys.write(x, rotary)} == {b.dtype} == {torch.bfloat16}
    square = torch.einsum("bsrg,bsrd->bsgd", a.double(), b.double()).square().mean(-1)[:, :, None]
    expected = torch.rsqrt(square + config.rms_norm_eps).float()
    torch.testing.assert_close(inverse, expected, rtol=1e-4, atol=0)


@torch.no_grad()
def test_keys_that_cancel_stay_finite():
    """A Gram matrix of float32 may say that a sum of squares is less than nothing."""
    config = small_config(num_kv_heads=4)
    keys = _randomised(build_keys(config, LayerSpec("constant_a", 2, "dense", 8))).float()
    keys.a_bias[1] = -keys.a_bias[0]
    first, second = keys.b.weight.chunk(2)
    second.copy_(first * (1 + 1e-7 * torch.randn(first.shape, generator=torch.Generator().manual_seed(0))))
    x = 1e3 * torch.randn(1, 500, config.hidden_size, generator=torch.Generator().manual_seed(4))
    entries = keys.write(x, rotary_table(config, "global", torch.arange(500)[None]))
    assert all(torch.isfinite(t).all() for t in entries)


def test_gradients_reach_every_factor():
    """From the closed form, where W_A is exactly zero, and through a quantized cache."""
    config = small_config(num_kv_heads=4)
    model, ids = random_model(config), tokens(config, 1, 30)
    specs = {
        0: LayerSpec("contextual", 2, "contextual", 3, 8, form_q="contextual", rank_q=2),
        3: LayerSpec("constant_a", 2, "constant_b", 3, 8),
        5: LayerSpec("constant_b", 3, "constant_a", 2, 16, form_q="contextual", rank_q=4),
    }
    student = _student(model, specs)
    assert student.get_parameter("layers.0.self_attn.keys.a.weight").abs().max() == 0
    parameters = {n: p.requires_grad_() for n, p in student.named_parameters() if n in student.factor_names()}
    expected = ("0.keys.a.weight", "0.values.a.weight", "0.query_form.a.weight", "0.values.bias", "3.keys.a_bias",
                "3.values.down.weight", "5.keys.up", "5.values.b.weight")  # fmt: skip
    assert {"layers." + name.replace(".", ".self_attn.", 1) for name in expected} <= set(parameters)
    assert not any(name.endswith(("values.out.weight", "norm.weight")) for name in parameters if ".3." not in name)
    student(ids).logsumexp(-1).sum().backward()
    for name, p in parameters.items():
        # A key's center is subtracted before the cache and added after it: exactly no gradient.
        assert (p.grad.abs().max() > 1e-8) != name.endswith("keys.center"), name


WINDOW, LENGTH = 16, 200
MIXED = [
    ("contextual", 2, "contextual", 3), ("contextual", 1, "dense", 8), ("dense", 8, "contextual", 2),
    ("constant_a", 3, "constant_b", 5), ("constant_b", 6, "constant_a", 2), ("latent", 5, "contextual", 1),
    ("constant_a", 1, "latent", 3), ("contextual", 3, "constant_a", 3),
]  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("kinds", ["local", "global"])
@pytest.mark.parametrize("bits,dtype,tolerance", [(16, torch.float32, 1e-3), (8, torch.float64, 1e-6)])
def test_factored_decode_equals_the_full_forward(kinds, bits, dtype, tolerance):
    """Chunks below and above the window, then single tokens, for every form beside dense and latent ones."""
    config = small_config(num_layers=8, layer_kinds=(kinds,) * 8, num_kv_heads=4, sliding_window=WINDOW)
    model = random_model(config)
    specs = {i: LayerSpec(*forms, bits, form_q="contextual" if i % 2 else "dense", rank_q=3)
             for i, forms in enumerate(MIXED)}  # fmt: skip
    student, ids = _student(model, specs, noise=0.3).to(dtype), tokens(config, 1, LENGTH, seed=bits)
    full = student(ids)
    cache = student.allocate_cache(1, LENGTH, dtype=dtype)
    parts = ids.split([10] + [1] * 20 + [40, 3, 70] + [1] * (LENGTH - 143), dim=1)
    decoded = torch.cat([student(part, cache=cache) for part in parts], dim=1)
    torch.testing.assert_close(decoded, full, rtol=0, atol=tolerance)
    assert (full - model.to(dtype)(ids)).abs().max() > 0.1, "the layers are really truncated"


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_bytes_equal_the_formula(bits):
    """R(G + d) numbers contextual; R·d and G norms (keys) constant-A; G·R constant-B; coefficients at 16 bits."""
    g, d, rank = 4, 40, 3
    config = small_config(num_kv_heads=g, head_dim=d, num_layers=3, layer_kinds=("global",) * 3)

    def row(count):
        return {16: 2 * count, 8: count + 4 * -(-count // 32), 4: -(-count // 2) + 4 * -(-count // 32)}[bits]

    expected = {
        "contextual": 2 * (rank * 2 * g + rank * row(d)),
        "constant_a": 2 * rank * row(d) + 2 * g,
        "constant_b": 2 * g * row(rank),
    }
    specs = [LayerSpec(form, rank, form, rank, bits) for form in expected]
    with torch.device("meta"):
        student = Gemma3ForMultimodalLMwithTPA(config, specs)
    cache = student.allocate_cache(1, 100, dtype=torch.bfloat16, device="cpu")
    allocated = [sum(t.untyped_storage().nbytes() for t in layer) for layer in cache.buffers]
    assert allocated == [100 * numbers for numbers in expected.values()]
    assert sum(allocated) == student.cache_bytes(100) == cache.nbytes
    if bits == 16:
        assert expected["contextual"] == 2 * 2 * rank * (g + d)


def test_names_in_the_module_are_those_of_the_conversion():
    config = small_config(num_kv_heads=4)
    attention = random_model(config).layers[5].self_attn
    kept = {"keys.norm.weight", "values.out.weight"}
    for kind, prefix, build in (("k", "keys.", build_keys), ("v", "values.", build_values),
                                ("q", "query_form.", build_queries)):  # fmt: skip
        for form, constant in (("contextual", None), ("constant_a", "a"), ("constant_b", "b")):
            if kind == "q" and constant:
                continue
            factors = _init_contextual_factorization(attention, kind, 2, constant=constant)
            module = build(config, LayerSpec(**{f"form_{kind}": form, f"rank_{kind}": 2}))
            shapes = {prefix + n: p.shape for n, p in module.named_parameters()}
            needed = {n: s for n, s in shapes.items() if n not in kept or (n in factors and form == "constant_b")}
            assert {n: t.shape for n, t in factors.items()} == needed
