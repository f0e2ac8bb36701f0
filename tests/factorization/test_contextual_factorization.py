"""The closed form is optimal where that can be known and the original at full rank; the fit only ever helps."""

import warnings

import pytest
import torch
from contextual_problems import DOUBLE, heads_of, random_layer, random_moments, random_sample, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_model, small_config, tokens

from tpa_train.errors import UserError
from tpa_train.factorization.contextual_factorization import (
    _basis_given_maps,
    _constant_mode,
    _init_contextual_factorization,
    apply_contextual_tensor_decomposition,
    contextual_error,
    contextual_tensor_decomposition,
    convert_from_standard_weights,
    per_token_error,
)
from tpa_train.factorization.contextual_fit import TokenTargets, fit_contextual
from tpa_train.gemma3.attention import AttentionContext
from tpa_train.gemma3.model import Gemma3ForCausalLM


def _weight(g, d, hidden=24, seed=0):
    return torch.randn(g, d, hidden, generator=seeded(seed), dtype=DOUBLE)


def _map(found, weight):
    """k̂ = T k as a matrix on stacked heads, from the weights that were found (W has full row rank)."""
    if found.a.dim() == 2:
        maps = torch.einsum("rg,rdx->gdx", found.a, found.b)
    else:
        maps = torch.einsum("rgx,rd->gdx", found.a, found.b)
    return maps.flatten(0, 1) @ torch.linalg.pinv(weight.flatten(0, 1))


def _error(moments, matrix):
    n = matrix.shape[0]
    metric, second = moments.metric.reshape(n, n), moments.second.reshape(n, n)
    rest = torch.eye(n, dtype=DOUBLE) - matrix
    return float(torch.trace(metric @ rest @ second @ rest.mT) / torch.trace(metric @ second))


# --------------------------------------------------------------------------------------------------------- closed form


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([None, "a", "b"]))
@settings(max_examples=30, deadline=None)
def test_full_rank_is_the_original(groups, half, seed, constant):
    weight = _weight(groups, 2 * half, 40, seed)
    rank = 2 * half if constant == "b" else groups
    found = contextual_tensor_decomposition(weight, None, rank, constant)
    assert found.error == 0 and not found.lost.any()
    torch.testing.assert_close(_map(found, weight), torch.eye(groups * 2 * half, dtype=DOUBLE), rtol=0, atol=1e-10)


@pytest.mark.parametrize("constant,ranks", [(None, (1, 2, 3)), ("b", (1, 4, 7))])
@pytest.mark.parametrize("metric", ["same", "heads", "full"])
def test_the_error_is_that_of_the_factors(constant, ranks, metric):
    """In the metric, on the weights themselves; falling with the rank; and the mean's loss is what it says."""
    weight = _weight(4, 8, 40)
    moments, errors = random_moments(weight, metric=metric), []
    for rank in ranks:
        found = contextual_tensor_decomposition(weight, moments, rank, constant)
        matrix = _map(found, weight)
        assert torch.linalg.matrix_rank(matrix) == rank * (4 if constant == "b" else 8)
        assert found.error == pytest.approx(_error(moments, matrix), rel=1e-6)
        torch.testing.assert_close(
            found.lost.flatten(), moments.mean.flatten() - matrix @ moments.mean.flatten(), rtol=0, atol=1e-8
        )
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True) and errors[-1] > 1e-6
    again = contextual_tensor_decomposition(weight, moments, ranks[-1], constant)
    assert torch.equal(again.a, found.a) and torch.equal(again.b, found.b)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_eigenvectors_where_one_metric_serves_all_heads(rank):
    """Constant-A: the tail of the head-mode moment's eigenvalues; constant-B: that of the feature mode's.

    Up to where the alternation stops.
    """
    weight = _weight(4, 8, 40)
    moments = random_moments(weight, metric="same")
    shared = moments.metric[0, :, 0]
    heads = torch.linalg.eigvalsh(torch.einsum("de,gdhe->gh", shared, moments.second))
    found = contextual_tensor_decomposition(weight, moments, rank)
    assert found.error == pytest.approx(float(heads[: 4 - rank].sum() / heads.sum()), rel=2e-6)
    values, vectors = torch.linalg.eigh(shared)
    root = (vectors * values.sqrt()) @ vectors.mT
    features = torch.linalg.eigvalsh(root @ torch.einsum("gdge->de", moments.second) @ root)
    found = contextual_tensor_decomposition(weight, moments, rank, "b")
    assert found.error == pytest.approx(float(features[: 8 - rank].sum() / features.sum()), rel=2e-6)


@pytest.mark.parametrize("constant,rank", [(None, 2), ("b", 3)])
@pytest.mark.parametrize("metric", ["heads", "full"])
@pytest.mark.parametrize("seed", [0, 100, 200])
def test_no_random_restart_finds_a_better_one(monkeypatch, constant, rank, metric, seed):
    import tpa_train.factorization.contextual_factorization as module

    weight = _weight(4, 8, 40)
    moments = random_moments(weight, seed, metric)
    found = contextual_tensor_decomposition(weight, moments, rank, constant)
    eigen, starts = module._eigen_start, []
    monkeypatch.setattr(module, "SWEEPS", 1)
    start = contextual_tensor_decomposition(weight, moments, rank, constant)
    assert found.error < start.error * (1 - 1e-6), "the alternation does something"
    monkeypatch.setattr(module, "SWEEPS", 100)
    for restart in range(6):
        generator = seeded(restart)
        monkeypatch.setattr(module, "_eigen_start", lambda second, metric, r, generator=generator: torch.linalg.qr(
            torch.randn(second.shape[0], r, generator=generator, dtype=DOUBLE)).Q)  # fmt: skip
        starts.append(contextual_tensor_decomposition(weight, moments, rank, constant).error)
    assert module._eigen_start is not eigen and found.error <= min(starts) * (1 + 1e-3)


def test_sweeps_never_raise_the_error(monkeypatch):
    import tpa_train.factorization.contextual_factorization as module

    moments, errors = random_moments(_weight(4, 8), metric="full"), []
    for sweeps in range(1, 12):
        monkeypatch.setattr(module, "SWEEPS", sweeps)
        errors.append(_constant_mode(moments.second, moments.metric, 2)[2])
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_the_basis_of_given_maps_is_the_least_squares_solution():
    """Conjugate gradients against the normal equations written out."""
    moments = random_moments(_weight(3, 4), metric="full")
    maps = torch.randn(2, 4, 3, 4, generator=seeded(0), dtype=DOUBLE)
    cross = torch.einsum("iajb,rcjb->iarc", moments.second, maps)
    second_y = torch.einsum("raib,ibsc->rasc", maps, cross)
    normal = torch.einsum("iajb,sbra->irjs", moments.metric, second_y).reshape(6, 6)
    right = torch.einsum("iajb,jbra->ir", moments.metric, cross).flatten()
    expected = torch.linalg.solve(normal, right).view(3, 2)
    start = torch.randn(3, 2, generator=seeded(1), dtype=DOUBLE)
    torch.testing.assert_close(_basis_given_maps(moments.metric, cross, second_y, start), expected, rtol=0, atol=1e-8)


def test_blind_metrics_and_dead_weights_are_survived():
    weight = _weight(4, 8, 40)
    moments = random_moments(weight)
    moments.metric[:, 4:], moments.metric[..., 4:] = 0, 0
    for constant in (None, "b"):
        found = contextual_tensor_decomposition(weight, moments, 2, constant)
        assert all(torch.isfinite(t).all() for t in (found.a, found.b, found.lost)) and 0 <= found.error < 1
        dead = contextual_tensor_decomposition(torch.zeros_like(weight), None, 2, constant)
        assert torch.isfinite(dead.a).all() and dead.error == 0


# ----------------------------------------------------------------------------------------------------------------- fit


@pytest.mark.parametrize("kind", ["k", "v", "q"])
def test_the_fit_lowers_the_error_where_context_helps(kind):
    attention = random_layer()
    weight, sample = heads_of(attention, kind), random_sample(attention, kind)
    moments = random_moments(weight)
    k = torch.einsum("gdi,ti->tgd", weight, sample.x.double())
    moments.second = torch.einsum("tgd,the->gdhe", k, k) / len(k)
    start = _init_contextual_factorization(attention, kind, 1, moments)
    fitted = _init_contextual_factorization(attention, kind, 1, moments, sample)
    errors = [contextual_error(weight, f, sample, moments, kind) for f in (start, fitted)]
    oracle = per_token_error(weight, sample, moments, 1, kind)
    assert errors[1] < 0.6 * errors[0] and oracle < errors[1], (errors, oracle)
    again = _init_contextual_factorization(attention, kind, 1, moments, sample)
    assert all(torch.equal(fitted[n], again[n]) for n in fitted) and fitted.keys() == start.keys()
    # Weights, means and scales count: the error written out, one token at a time.
    a = (sample.x.double() @ next(t for n, t in fitted.items() if n.endswith(".a.weight")).mT).view(len(k), 1, -1)
    a = a + next(t for n, t in fitted.items() if n.endswith("a_bias"))
    b = sample.x.double() @ next(t for n, t in fitted.items() if n.endswith("b.weight")).mT
    share = {"k": sample.key_weight, "v": sample.value_weight, "q": torch.ones(len(k))}[kind].double()
    mean = (share[:, None, None] * k).sum(0) / share.sum() if kind == "v" else 0 * k[0]
    size = torch.ones(len(k)) if kind == "v" else k.square().mean((1, 2)).sqrt()
    delta = k - torch.einsum("trg,trd->tgd", a, b[:, None])
    if kind == "v":
        lost = (share[:, None, None] * delta).sum(0) / share.sum()
        delta = delta - lost
        out = attention.o_proj.weight.detach().unflatten(1, (4, 2, 8))
        torch.testing.assert_close(fitted["values.bias"], torch.einsum("oghd,gd->o", out, lost), rtol=0, atol=1e-9)
    cost, total = (sum(float(w * torch.einsum("gd,gdhe,he->", e / s, moments.metric, e / s))
                       for w, e, s in zip(share, es, size, strict=True)) for es in (delta, k - mean))  # fmt: skip
    assert errors[1] == pytest.approx(cost / total, rel=1e-6)


@pytest.mark.parametrize("structure", [True, False])
@pytest.mark.parametrize("steps,count", [(1, 300), (20, 300), (60, 20), (60, 1)])
def test_the_fit_never_ends_worse(structure, steps, count):
    attention = random_layer()
    for kind in "kv":
        weight, sample = heads_of(attention, kind), random_sample(attention, kind, structure, count)
        start = _init_contextual_factorization(attention, kind, 2)
        fitted = _init_contextual_factorization(attention, kind, 2, None, sample, steps)
        before, after = (contextual_error(weight, f, sample, None, kind) for f in (start, fitted))
        assert after <= before * (1 + 1e-6) + 1e-12


def test_held_out_tokens_judge_the_fit():
    """Too few tokens without structure: what fits them all better is noise, and new tokens would pay for it."""
    attention = random_layer()
    sample, fresh = (random_sample(attention, "k", False, count) for count in (100, 1500))
    weight = heads_of(attention, "k")
    start = _init_contextual_factorization(attention, "k", 1)
    fitted = _init_contextual_factorization(attention, "k", 1, None, sample)
    before, after = (contextual_error(weight, f, fresh, None, "k") for f in (start, fitted))
    assert after < before * 1.01


def test_a_fit_that_cannot_help_changes_nothing(monkeypatch):
    """A learning rate that throws the factors away: no iterate is better, and the closed form stays."""
    import tpa_train.factorization.contextual_fit as module

    monkeypatch.setattr(module, "LEARNING_RATE", 1e4)
    attention = random_layer()
    weight, sample = heads_of(attention, "k"), random_sample(attention, "k", count=200)
    start = _init_contextual_factorization(attention, "k", 1)
    fitted = _init_contextual_factorization(attention, "k", 1, None, sample, 20)
    assert all(torch.equal(start[n], fitted[n]) for n in start)
    found = contextual_tensor_decomposition(weight, None, 1)
    assert fit_contextual(TokenTargets(weight, sample, None, "k"), found.a, found.b, 20) is None


# ---------------------------------------------------------------------------------------------------------- conversion


def _model(groups=4, dtype=DOUBLE) -> Gemma3ForCausalLM:
    return random_model(small_config(num_kv_heads=groups), dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:rank_[kv]=")
def test_full_rank_models_equal_the_original(groups):
    model = _model(groups)
    ids = tokens(model.config, 2, 30)
    student = apply_contextual_tensor_decomposition(model, 4, groups, groups)
    assert student.converted_layers == list(range(6))
    assert {(s.form_q, s.form_k, s.form_v) for s in student.specs} == {("contextual",) * 3}
    torch.testing.assert_close(student(ids), model(ids), rtol=0, atol=1e-10)
    for options in ({"constant_k": "a", "constant_v": "b", "rank_k": groups, "rank_v": 8},
                    {"constant_k": "b", "rank_k": 8}):  # fmt: skip
        student = apply_contextual_tensor_decomposition(model, layers=[1, 5], **options)
        assert student.converted_layers == [1, 5]
        torch.testing.assert_close(student(ids), model(ids), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:rank_[kv]=")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_lower_ranks_start_exactly_at_constant_a(rank):
    """The same outputs, with calibrated moments and a mean in the values, and more error than at a higher rank."""
    model = _model()
    ids = tokens(model.config, 1, 30)
    heads = {i: {kind: heads_of(model.layers[i].self_attn, kind) for kind in "kv"} for i in range(6)}
    moments = {i: {kind: random_moments(heads[i][kind], i) for kind in "kv"} for i in range(6)}
    contextual = apply_contextual_tensor_decomposition(model, None, rank, rank, moments=moments)
    constant = apply_contextual_tensor_decomposition(
        model, None, rank, rank, constant_k="a", constant_v="a", moments=moments
    )
    torch.testing.assert_close(contextual(ids), constant(ids), rtol=0, atol=1e-9)
    assert (contextual(ids) - model(ids)).abs().max() > 1e-2
    name = "layers.5.self_attn.values.bias"
    assert contextual.get_parameter(name).abs().max() > 1e-2
    for kind in "kv":
        weight = heads_of(model.layers[2].self_attn, kind)
        errors = [contextual_tensor_decomposition(weight, moments[2][kind], rank, c).error for c in (None, "a")]
        assert errors[0] <= errors[1]


@torch.no_grad()
@pytest.mark.parametrize("constant,rank", [(None, 2), ("a", 2), ("b", 3)])
def test_the_bias_gives_back_the_mean_value(constant, rank):
    """A text of one token over and over: values are its mean, and the layer's output is exact in any rank."""
    model = _model()
    attention = model.layers[5].self_attn
    x = torch.randn(1, 1, 24, generator=seeded(0), dtype=DOUBLE).expand(1, 12, 24)
    moments = random_moments(heads_of(attention, "v"))
    moments.mean = (heads_of(attention, "v") @ x[0, 0]).detach()
    converted = convert_from_standard_weights(attention, rank_v=rank, constant_v=constant, moments={"v": moments})
    context = AttentionContext(model.config, torch.arange(12)[None])
    torch.testing.assert_close(converted(x, context), attention(x, context), rtol=0, atol=1e-9)
    assert converted.values.bias.abs().max() > 1e-2


@torch.no_grad()
def test_one_layer_shares_what_is_not_a_factor():
    attention = _model().layers[5].self_attn
    converted = convert_from_standard_weights(attention, rank_k=2, rank_v=2)
    assert converted.q_proj.weight is attention.q_proj.weight and converted.q_norm.weight is attention.q_norm.weight
    assert converted.keys.norm.weight is attention.k_norm.weight
    assert converted.values.out.weight is attention.o_proj.weight
    assert not converted.keys.a.weight.any() and not hasattr(converted, "query_form")
    queries = convert_from_standard_weights(attention, rank_q=4)
    assert queries.keys.proj.weight is attention.k_proj.weight and not hasattr(queries, "q_proj")
    x = torch.randn(1, 12, 24, dtype=DOUBLE)
    context = AttentionContext(attention.config, torch.arange(12)[None])
    torch.testing.assert_close(queries(x, context), attention(x, context), rtol=0, atol=1e-10)
    low = convert_from_standard_weights(attention, rank_q=2, bits_k=8)
    assert low.spec.bits_v == 8 and (low(x, context) - attention(x, context)).abs().max() > 1e-3


def test_samples_and_moments_reach_their_layer():
    model = _model()
    sample = random_sample(model.layers[5].self_attn, "k", count=1500)
    student = apply_contextual_tensor_decomposition(model, None, 1, layers=[4, 5], samples={5: sample}, steps=60)
    contexts = [bool(student.get_parameter(f"layers.{i}.self_attn.keys.a.weight").any()) for i in (4, 5)]
    assert contexts == [False, True]


def test_factors_of_half_precision_models_are_float32():
    student = apply_contextual_tensor_decomposition(_model(dtype=torch.bfloat16), 2, 2, 2, layers=[5])
    assert {student.get_parameter(n).dtype for n in student.factor_names()} == {torch.float32}
    assert torch.isfinite(student(tokens(student.config, 1, 10))).all()


def test_one_kv_head_cannot_pay():
    with pytest.warns(UserWarning, match=r"rank_k=1 caches 9 numbers a token, the original 8: with one KV .*latent"):
        apply_contextual_tensor_decomposition(_model(1), rank_k=1, layers=[5])
    with pytest.warns(UserWarning, match=r"rank_v=4 caches 48 numbers a token, the original 32: .*lower the rank"):
        convert_from_standard_weights(_model().layers[5].self_attn, rank_v=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_contextual_tensor_decomposition(_model(), rank_q=4, rank_k=2, rank_v=2, layers=[5])


@pytest.mark.parametrize(
    "options,message",
    [
        ({}, "give at least one of rank_q, rank_k and rank_v"),
        ({"rank_k": 5}, "rank_k=5 must lie between 1 and the number of heads, 4"),
        ({"rank_q": 5}, "rank_q=5 must lie between 1 and the number of heads, 4"),
        ({"rank_v": 0}, "rank_v=0 must lie between 1"),
        ({"rank_v": 9, "constant_v": "b"}, "rank_v=9 must lie between 1 and head_dim, 8"),
        ({"rank_k": 2, "constant_k": "c"}, "constant_k='c' must be 'a', 'b' or left out"),
        ({"rank_k": 2, "layers": [6]}, "layers names layer 6, but the model has layers 0 to 5"),
    ],
)
@pytest.mark.filterwarnings("ignore:rank_[kv]=")
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        apply_contextual_tensor_decomposition(_model(), **options)


def test_other_mistakes_are_refused():
    weight, attention = _weight(4, 8), _model().layers[5].self_attn
    with pytest.raises(UserError, match="rank=5 must lie between 1 and the number of heads, 4"):
        contextual_tensor_decomposition(weight, None, 5)
    with pytest.raises(UserError, match="constant='c' must be"):
        contextual_tensor_decomposition(weight, None, 2, "c")
    with pytest.raises(UserError, match="queries have no form with a constant"):
        _init_contextual_factorization(attention, "q", 2, constant="b")
    with pytest.raises(UserError, match="layer 5 is factorized already"):
        convert_from_standard_weights(convert_from_standard_weights(attention, rank_k=2), rank_v=2)
