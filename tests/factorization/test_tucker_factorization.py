"""Errors are tensorly's or better without data, below that in the data's metric; figures are those of real modules."""

import math

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_model, small_config, tokens
from tensorly.decomposition import partial_tucker

from tpa_train.errors import UserError
from tpa_train.factorization.latent import Basis, symmetric_power
from tpa_train.factorization.stacked import HeadMoments
from tpa_train.factorization.tucker_factorization import (
    InputMoments,
    TuckerMoments,
    _build_parts,
    _factorize_and_set_weights,
    _factorize_mha_weights_with_shared_factors,
    adaptive_rank_selection,
    attention_weights,
    factorize_all_layers_with_shared_factors,
    tucker_spec,
)
from tpa_train.factorization.tucker_ranks import tucker_parameters
from tpa_train.factorization.tucker_solver import State, refine
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import dense_specs

DOUBLE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:Trying to compute SVD")


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _weights(groups=4, heads=8, d=8, hidden=40):
    """Random heads with decaying spectra in every mode, alike in part."""
    decay = [0.8 ** torch.arange(n, dtype=DOUBLE) for n in (d, hidden)]
    turn = torch.linalg.qr(_randn(hidden, hidden, seed=9)).Q
    return {
        kind: (_randn(n, d, hidden, seed=i) * decay[0][:, None] * decay[1]) @ turn
        for i, (kind, n) in enumerate({"q": heads, "k": groups, "v": groups, "o": heads}.items())
    }


def _config(groups=4, **changes):
    return small_config(num_kv_heads=groups, num_heads=8, hidden_size=40, **changes)


def _sample(hidden=40, seed=3):
    """Inputs with a mean and strong correlations."""
    return (_randn(400, hidden, seed=seed) * 0.9 ** torch.arange(hidden)) @ _randn(hidden, hidden, seed=7) + 0.4


def _moments(weights, x, hidden=False, same_metric=False) -> TuckerMoments:
    """What a calibration on inputs ``x`` could give, with metrics of every head of its own, across heads too."""
    found = {}
    for seed, kind in enumerate("kv"):
        w = weights[kind]
        groups, d, _ = w.shape
        vectors = torch.einsum("gdi,ti->tgd", w, x)
        mean = vectors.mean(0) if kind == "v" else torch.zeros_like(w[..., 0])
        centred = vectors - mean
        if same_metric:
            own = _randn(d, d, seed=20 + seed) * 0.7 ** torch.arange(d)
            metric = torch.einsum("gh,de->gdhe", torch.eye(groups, dtype=DOUBLE), own @ own.mT)
        else:
            root = _randn(groups * d, groups * d, seed=30 + seed) * 0.9 ** torch.arange(groups * d)
            metric = (root @ root.mT).view(groups, d, groups, d)
        found[kind] = HeadMoments(torch.einsum("tgd,the->gdhe", centred, centred) / len(x), metric, mean)
    return TuckerMoments(found["k"], found["v"], InputMoments.of_sample(x) if hidden else None)


def _metric_error(weights, found, spec, moments):
    """√ of the kinds' mean of tr(L δ S δᵀ) / tr(L W S Wᵀ), by the definition, on the inputs themselves."""
    shares = []
    for kind, w in weights.items():
        if getattr(spec, f"form_{kind}") != "tucker":
            continue
        heads = {"k": moments.keys, "v": moments.values}.get(kind)
        size = w.shape[0] * w.shape[1]
        metric = torch.eye(size, dtype=DOUBLE) if heads is None else heads.metric.reshape(size, size)
        inner = torch.eye(w.shape[2], dtype=DOUBLE)
        if kind != "o" and (moments.inputs is not None or heads is not None):
            x = _sample(w.shape[2])
            x = x - x.mean(0) if kind == "v" else x
            inner = x.mT @ x / len(x)

        def cost(t, metric=metric, inner=inner):
            return float(((metric @ t.flatten(0, 1)) * (t.flatten(0, 1) @ inner)).sum())

        shares.append(cost(w - found.reconstruct(kind)) / cost(w))
    return math.sqrt(sum(shares) / len(shares))


@pytest.mark.parametrize(
    "kinds,rank,hidden,heads,shared,modes",
    [
        ("kv", 5, 0, 0, True, [1]),
        ("kv", 5, 12, 0, True, [1, 2]),
        ("qkvo", 3, 9, 0, True, [1, 2]),
        ("qo", 4, 30, 0, True, [1, 2]),
        ("k", 4, 10, 2, False, [0, 1, 2]),
        ("v", 8, 0, 3, True, [0]),
    ],
)
def test_data_free_error_is_tensorlys(kinds, rank, hidden, heads, shared, modes):
    config, weights = _config(), _weights()
    spec = tucker_spec(config, rank, hidden=hidden, heads=heads, kinds=tuple(kinds), shared_features=shared)
    before = tl.get_backend()
    found = _factorize_mha_weights_with_shared_factors(weights, spec)
    assert tl.get_backend() == before
    stacked = torch.cat([weights[kind] for kind in kinds])
    with tl.backend_context("pytorch", local_threadsafe=True):
        ranks = {0: heads, 1: rank, 2: hidden}
        _, errors = partial_tucker(stacked, [ranks[m] for m in modes], modes, tol=1e-9, n_iter_max=500)
    assert 0.05 < found.plain_error <= 1.01 * float(errors[-1])
    rebuilt = torch.cat([found.reconstruct(kind) for kind in kinds])
    assert float((stacked - rebuilt).norm() / stacked.norm()) == pytest.approx(found.plain_error, rel=1e-9)
    assert found.relative_error == pytest.approx(found.plain_error, rel=1e-9)


def test_kinds_stacked_as_a_four_way_tensor():
    """{K, V} as (hidden, head_dim, kind, head), the form of the paper: the same error."""
    weights = _weights()
    tensor = torch.stack([weights["k"], weights["v"]]).permute(3, 2, 0, 1)
    found = _factorize_mha_weights_with_shared_factors(weights, tucker_spec(_config(), 4, hidden=11))
    with tl.backend_context("pytorch", local_threadsafe=True):
        _, errors = partial_tucker(tensor, [11, 4], [0, 1], tol=1e-9, n_iter_max=500)
    assert found.plain_error == pytest.approx(float(errors[-1]), rel=1e-3)


def test_coupled_kinds_are_better_than_separate_starts():
    """Per-kind U_feat and U_head with one U_hidden: no single tensor, but no worse than any fixed U_hidden."""
    weights = _weights()
    spec = tucker_spec(_config(), 4, hidden=10, heads=2, shared_features=False)
    found = _factorize_mha_weights_with_shared_factors(weights, spec)
    apart = {
        kind: _factorize_mha_weights_with_shared_factors(
            weights, tucker_spec(_config(), 4, hidden=10, heads=2, kinds=(kind,), shared_features=False)
        )
        for kind in "kv"
    }
    energy = {kind: float(weights[kind].square().sum()) for kind in "kv"}
    bound = math.sqrt(sum(apart[k].plain_error ** 2 * energy[k] for k in "kv") / sum(energy.values()))
    assert found.plain_error >= bound * (1 - 1e-6)
    for kind in "kv":  # the other kind's best U_hidden, with everything else solved
        given = _factorize_mha_weights_with_shared_factors(weights, spec, fixed={"hidden": apart[kind].hidden})
        assert torch.equal(given.hidden, apart[kind].hidden)
        assert found.plain_error < given.plain_error


@pytest.mark.parametrize(
    "groups,kinds,hidden,heads,shared",
    [(4, "kv", 0, 0, False), (4, "kv", 0, 0, True), (4, "kv", 0, 2, True), (1, "qkvo", 0, 0, True),
     (1, "qkvo", 12, 0, False), (4, "kv", 12, 0, True), (4, "k", 12, 3, False), (1, "kv", 0, 0, True)],
)  # fmt: skip
def test_data_aware_error_falls_and_is_below_the_data_free_one(groups, kinds, hidden, heads, shared):
    spec = tucker_spec(_config(groups), 4, hidden=hidden, heads=heads, kinds=tuple(kinds), shared_features=shared)
    weights = _weights(groups)
    moments = _moments(weights, _sample(), hidden=bool(hidden))
    found = _factorize_mha_weights_with_shared_factors(weights, spec, moments)
    free = _factorize_mha_weights_with_shared_factors(weights, spec)
    assert found.errors == sorted(found.errors, reverse=True)
    ours, plain = (_metric_error(weights, f, spec, moments) for f in (found, free))
    assert found.relative_error == pytest.approx(ours, rel=1e-3)
    assert found.errors[-1] == pytest.approx(ours, rel=1e-3)
    assert ours < plain and free.plain_error < found.plain_error
    if groups > 1 and "q" not in kinds:
        assert len(found.errors) > 2 and found.errors[-1] < 0.97 * found.errors[0]


@pytest.mark.parametrize("shared", [False, True])
def test_coupled_sweeps_reach_a_stationary_point(shared):
    """Alternating least squares, another algorithm for the same error, finds nothing left to gain."""
    weights = _weights() | {"v": 0.2 * _weights()["v"].flip(0, 1)}
    spec = tucker_spec(_config(), 4, hidden=7, heads=2, shared_features=shared)
    found = _factorize_mha_weights_with_shared_factors(weights, spec)
    state = State(found.hidden, dict(found.features), dict(found.heads))
    errors = refine(_build_parts(weights, spec, TuckerMoments(), 7), state, {})
    energy = float(weights["k"].square().sum() + weights["v"].square().sum())
    assert math.sqrt(errors[0] / energy) == pytest.approx(found.plain_error, rel=1e-9)
    assert errors[-1] > errors[0] * (1 - 2e-4)


def test_data_aware_solution_is_stationary():
    """No small change of a factor, with the best core, lowers the error noticeably."""
    weights = _weights()
    spec = tucker_spec(_config(), 4, hidden=12, heads=2)
    moments = _moments(weights, _sample(), hidden=True)
    parts = _build_parts(weights, spec, moments, 12)
    found = _factorize_mha_weights_with_shared_factors(weights, spec, moments)
    state = State(found.hidden, dict(found.features), dict(found.heads))
    for _ in range(8):
        refine(parts, state, {})
    best = state.total(parts)
    for seed in range(60):
        size = 10.0 ** -(1 + seed % 4)
        other = State(
            state.hidden + size * _randn(*state.hidden.shape, seed=seed) * state.hidden.std(),
            {k: t + size * _randn(*t.shape, seed=seed + 1) * t.std() for k, t in state.features.items()},
            {k: t + size * _randn(*t.shape, seed=seed + 2) * t.std() for k, t in state.heads.items()},
        )
        assert other.total(parts) > best * (1 - 1e-4)


@pytest.mark.parametrize("groups,same_metric", [(1, False), (4, True)])
@pytest.mark.parametrize("rank", [2, 5])
def test_one_metric_for_all_heads_is_solved_in_closed_form(groups, same_metric, rank):
    """r₁ = D, r_h = G: the latent form with one U for all heads, whose optimum is an eigenproblem."""
    weights = _weights(groups)
    moments = _moments(weights, _sample(), same_metric=same_metric)
    metric = moments.keys.metric[0, :, 0]
    second = torch.einsum("gdge->de", moments.keys.second)[None]
    basis = Basis.from_metric(second, metric[None], torch.zeros(1, 8, dtype=DOUBLE))
    for hidden in (0, 40):
        spec = tucker_spec(_config(groups), rank, hidden=hidden, kinds=("k",), shared_features=False)
        found = _factorize_mha_weights_with_shared_factors(weights, spec, moments)
        expected = math.sqrt(basis.tail(rank) / float(basis.energies.sum()))
        assert found.relative_error == pytest.approx(expected, rel=1e-5)
        # The same subspace: projections agree.
        up, down = basis.up[0, :, :rank], basis.down[0, :rank]
        for head in range(groups):
            torch.testing.assert_close(found.reconstruct("k")[head], up @ down @ weights["k"][head], rtol=0, atol=1e-5)


def test_whole_features_and_fewer_heads_are_constant_a():
    """r₂ = d, r_h < G: K_t[g] = Σ_r a_r[g] b_r(x) with constant a; without data an SVD over heads."""
    weights = _weights()
    spec = tucker_spec(_config(), 8, heads=2, kinds=("k",))
    found = _factorize_mha_weights_with_shared_factors(weights, spec)
    values = torch.linalg.svdvals(weights["k"].flatten(1))
    expected = float(values[2:].norm() / values.norm())
    assert found.plain_error == pytest.approx(expected, rel=1e-6)


def test_latents_are_uncorrelated_and_errors_count_equally():
    """The gauge of U_feat: a quantizer's error costs the same in every latent."""
    weights = _weights(1)
    moments = _moments(weights, _sample())
    found = _factorize_mha_weights_with_shared_factors(weights, tucker_spec(_config(1), 5, kinds=("k",)), moments)
    u, metric = found.features["shared"], moments.keys.metric[0, :, 0]
    gram = u.mT @ metric @ u
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(5, dtype=DOUBLE), rtol=0, atol=1e-6)
    latents = _sample() @ found.cores["k"][0].mT
    second = latents.mT @ latents / len(latents)
    assert (second - second.diagonal().diag()).abs().max() < 1e-5 * second.diagonal().max()


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(
    "kinds,hidden,heads,shared", [("kv", 0, 0, True), ("qkvo", 40, 1, False), ("vo", 0, 0, False), ("qo", 40, 0, True)]
)
def test_full_rank_students_equal_the_model(groups, data, kinds, hidden, heads, shared):
    config = _config(groups, num_layers=2, layer_kinds=("local", "global"))
    model, ids = random_model(config), tokens(config, 2, 20)
    moments = {i: _moments(attention_weights(model.layers[i].self_attn), _sample(), bool(hidden)) for i in range(2)}
    student, reports = factorize_all_layers_with_shared_factors(
        model, 8, hidden=hidden, heads=heads * groups, kinds=tuple(kinds), shared_features=shared,
        moments=moments if data else None,
    )  # fmt: skip
    torch.testing.assert_close(student(ids), model(ids), rtol=0, atol=1e-6 if data else 1e-10)
    assert all(r.relative_error < 1e-4 for r in reports)
    cut, _ = factorize_all_layers_with_shared_factors(model, 3, kinds=tuple(kinds), shared_features=shared)
    assert (cut(ids) - model(ids)).abs().max() > 1e-3
    assert cut.embed_tokens.weight is model.embed_tokens.weight
    dense = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    names = dict(cut.named_parameters())
    for kind, module in (("k", "keys.proj"), ("v", "values.proj"), ("q", "q_proj")):
        if kind not in kinds:
            assert names[f"layers.1.self_attn.{module}.weight"] is model.layers[1].self_attn.get_parameter(
                f"{dense[kind]}.weight"
            )


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["kv", "kvo", "vo", "o", "qo"])
@pytest.mark.parametrize("hidden,heads", [(0, 0), (0, 2), (15, 2), (15, 4)])
def test_the_mean_of_the_values_is_never_lost(kinds, hidden, heads):
    """With attention that averages tokens, the layer's output is the original's on average."""
    config = _config()
    model, x = random_model(config), _sample()
    attention = model.layers[5].self_attn
    moments = _moments(attention_weights(attention), x, hidden=bool(hidden))
    heads = heads if "v" in kinds else 0
    spec = tucker_spec(config, 3, hidden=hidden, heads=heads, kinds=tuple(kinds), shared_features=False)
    factors, report = _factorize_and_set_weights(model, 5, spec, moments)
    specs = dense_specs(config)
    specs[5] = spec
    ours = Gemma3ForMultimodalLMwithTPA.from_dense(model, specs, factors).layers[5].self_attn
    values = ours.values.read(ours.values.write(x[None]), ())
    original = attention.v_proj(x[None]).unflatten(-1, (4, 8))
    got, expected = (
        module.output(v.repeat_interleave(2, 2).mean(1, keepdim=True))
        for module, v in ((ours, values), (attention, original))
    )
    assert report.relative_error > 0.05
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    # Cached values lie around zero, as a quantizer wants them.
    if "v" in kinds:
        assert ours.values.write(x[None])[0].mean(1).abs().max() < 1e-6


@pytest.mark.parametrize("groups,heads", [(1, 0), (4, 0), (4, 2)])
@pytest.mark.parametrize("kinds,hidden", [("kv", 0), ("qkvo", 9), ("vo", 5)])
def test_reported_figures_are_those_of_the_allocated_modules(groups, heads, kinds, hidden):
    model = random_model(_config(groups))
    student, reports = factorize_all_layers_with_shared_factors(
        model, 3, hidden=hidden, heads=heads, kinds=tuple(kinds), layers=[5, 0], bits=8
    )
    assert [r.layer for r in reports] == [0, 5] and student.converted_layers == [0, 5]
    ours, theirs = (m.allocate_cache(1, 8) for m in (student, model))
    for report in reports:
        for m, cache, parameters, size in (
            (model, theirs, report.parameters_before, report.cache_bytes_before),
            (student, ours, report.parameters_after, report.cache_bytes_after),
        ):
            state = m.layers[report.layer].self_attn.state_dict()
            assert sum(t.numel() for t in state.values()) == parameters
            assert sum(t.untyped_storage().nbytes() for t in cache.buffers[report.layer]) == 8 * size
        assert report.parameter_compression == report.parameters_before / report.parameters_after
        assert report.cache_compression == report.cache_bytes_before / report.cache_bytes_after
        free = _factorize_mha_weights_with_shared_factors(
            model.layers[report.layer].self_attn, student.specs[report.layer]
        )
        for error in (report.relative_error, report.plain_error):
            assert error == pytest.approx(free.plain_error, rel=1e-9)


def test_factors_shared_by_all_layers():
    model = random_model(_config(num_layers=2, layer_kinds=("local", "global")))
    arguments = dict(hidden=12, kinds=("q", "k", "v"), shared_features=True)
    student, reports = factorize_all_layers_with_shared_factors(model, 4, share_across_layers=True, **arguments)
    apart, own = factorize_all_layers_with_shared_factors(model, 4, **arguments)
    first, second = (layer.self_attn.shared for layer in student.layers)
    assert torch.equal(first.hidden, second.hidden) and torch.equal(first.features, second.features)
    assert not torch.equal(apart.layers[0].self_attn.shared.hidden, apart.layers[1].self_attn.shared.hidden)
    for ours, theirs in zip(reports, own, strict=True):
        assert ours.relative_error > theirs.relative_error
        assert ours.shareable_parameters == 40 * 12 + 8 * 4 and theirs.shareable_parameters == 0
        assert ours.parameters_after == theirs.parameters_after  # every layer stores its own copy


def _low_rank(shape, ranks, seed=0):
    core = _randn(*ranks, seed=seed)
    for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
        basis = torch.linalg.qr(_randn(size, rank, seed=seed + mode + 1)).Q
        core = torch.tensordot(core, basis, ([mode], [1])).movedim(-1, mode)
    return core


@pytest.mark.parametrize("ranks", [(3, 4, 2), (1, 1, 1), (6, 5, 4), (2, 3, 6)])
@pytest.mark.parametrize("error", [0.0, 1e-6])
def test_exactly_low_rank_tensors_give_their_ranks(ranks, error):
    assert adaptive_rank_selection(_low_rank((10, 9, 8), ranks), error) == ranks


def _tucker_error(tensor, ranks):
    with tl.backend_context("pytorch", local_threadsafe=True):
        _, errors = partial_tucker(tensor, list(ranks), list(range(tensor.dim())), tol=1e-9, n_iter_max=300)
    return float(errors[-1])


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.8), st.floats(1.0, 12.0))
def test_selected_ranks_meet_their_bounds(seed, error, compression):
    shape = (8, 7, 6)
    decay = [0.75 ** torch.arange(n, dtype=DOUBLE) for n in shape]
    tensor = _randn(*shape, seed=seed) * decay[0][:, None, None] * decay[1][:, None] * decay[2]
    ranks = adaptive_rank_selection(tensor, error, compression)
    assert ranks == adaptive_rank_selection(tensor, error, compression)
    assert _tucker_error(tensor, ranks) <= error + 1e-3
    assert 1 <= tensor.numel() / tucker_parameters(shape, ranks) <= compression + 1e-12
    free = adaptive_rank_selection(tensor, error)
    assert math.prod(free) <= math.prod(ranks)
    if free != shape:  # no single rank could be lower
        for mode in range(3):
            fewer = tuple(r - (m == mode) for m, r in enumerate(free))
            assert 0 in fewer or _tucker_error(tensor, fewer) > error - 1e-2


def test_bounds_that_nothing_meets_are_refused():
    tensor = _randn(4, 5, 6)
    for error, compression in ((0.1, 0.5), (-0.1, 2), (1.0, 2), (math.nan, 2), (0.1, math.nan)):
        with pytest.raises(UserError, match="^no ranks meet max_error=.* and max_compression="):
            adaptive_rank_selection(tensor, error, compression)
    for bad in (torch.zeros(3, 4), torch.ones(5), torch.full((2, 2), math.inf)):
        with pytest.raises(UserError, match="ranks are of a finite, non-zero tensor"):
            adaptive_rank_selection(bad, 0.1)
    assert adaptive_rank_selection(tensor, 0.1, 1.0) == (4, 5, 6)


def test_mistakes_are_refused_in_one_sentence():
    model = random_model(_config())
    weights = _weights()
    factorize = factorize_all_layers_with_shared_factors
    student, _ = factorize(model, 4, layers=[5])
    moments = _moments(weights, _sample())
    for call, message in (
        (lambda: factorize(model, 0), "rank_k=0 must lie between 1 and head_dim, 8"),
        (lambda: factorize(model, 9), "rank_k=9 must lie between 1 and head_dim, 8"),
        (lambda: factorize(model, 4, heads=5), "heads_k=5 must lie between"),
        (lambda: factorize(model, 4, hidden=41), "hidden=41 must lie between"),
        (lambda: factorize(model, {"k": 3, "v": 4}), "shared_features is one U_feat"),
        (lambda: factorize(model, {"k": 3}), "rank has no entry for kind 'v'"),
        (lambda: factorize(model, 4, kinds=("k", "w")), "unknown kind 'w'"),
        (lambda: factorize(model, 4, layers=[6]), r"layers=\[6\] must name some of the model's layers, 0 to 5"),
        (lambda: factorize(model, 4, layers=[]), "must name some of the model's layers"),
        (lambda: factorize(student, 4, layers=[5]), "layer 5 is converted already"),
        (lambda: factorize(model, 4, hidden=9, layers=[0], moments={0: moments}), "hidden=9 truncates .* input"),
        (lambda: _factorize_and_set_weights(model, 5, dense_specs(model.config)[5]), "layer 5 has no Tucker part"),
        (
            lambda: _factorize_mha_weights_with_shared_factors({"k": weights["k"]}, tucker_spec(_config(), 4)),
            "ranks give the form 'tucker' to .* but the weights are of",
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_factors_of_half_precision_models_are_float32():
    model = random_model(_config(), dtype=torch.bfloat16)
    student, _ = factorize_all_layers_with_shared_factors(model, 4, layers=[5])
    assert {student.get_parameter(n).dtype for n in student.factor_names()} == {torch.float32}


def test_a_metric_may_ignore_directions():
    """A metric that ignores most directions still gives finite factors."""
    weights = _weights()
    moments = _moments(weights, _sample())
    flat = moments.keys.metric.reshape(32, 32)
    root = symmetric_power(flat, 0.5)[:, :3]
    moments.keys.metric = (root @ root.mT).view_as(moments.keys.metric)
    found = _factorize_mha_weights_with_shared_factors(weights, tucker_spec(_config(), 4), moments)
    assert all(bool(torch.isfinite(t).all()) for t in [*found.cores.values(), *found.features.values()])
    assert found.errors == sorted(found.errors, reverse=True)
