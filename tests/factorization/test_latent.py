"""The closed form is the optimum of its metric; the factors say what the basis says."""

import pytest
import torch
from random_models import random_model, small_config, specs_of, tokens

from tpa_train.factorization.calibration import LayerMoments
from tpa_train.factorization.latent import Basis, key_basis, latent_key_factors, latent_value_factors, value_basis
from tpa_train.factorization.solutions import Bases, build_student


def _positive(groups, d, seed, decay=0.6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, d, d, generator=generator, dtype=torch.float64) * decay ** torch.arange(d)
    turn = torch.linalg.qr(torch.randn(groups, d, d, generator=generator, dtype=torch.float64)).Q
    return turn @ (x @ x.mT) @ turn.mT


def random_moments(config, seed=0) -> LayerMoments:
    """Moments as a calibration could give them."""
    g, d = config.num_kv_heads, config.head_dim
    mean = torch.randn(g, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    outer = mean[:, :, None] * mean[:, None, :]
    moments = LayerMoments.zeros(config)
    own = 50 * _positive(g, d, seed)
    for head in range(g):
        moments.cross_fisher[head, :, head] += own[head]
    for kind in ("key", "value"):
        weight = torch.arange(2.0, 2.0 + g, dtype=torch.float64)
        setattr(moments, f"{kind}_weight", weight)
        setattr(moments, f"{kind}_first", weight[:, None] * mean)
        setattr(moments, f"{kind}_second", weight[:, None, None] * (_positive(g, d, seed + 7) + outer))
    return moments


def _error(metric, second, projection):
    rest = torch.eye(metric.shape[-1], dtype=torch.float64) - projection
    return torch.einsum("gij,gjk,gkl,gil->", metric, rest, second, rest)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_closed_form_is_optimal(groups, rank):
    d = 10
    metric, second = _positive(groups, d, 0), _positive(groups, d, 1)
    basis = Basis.from_metric(second, metric, torch.zeros(groups, d, dtype=torch.float64))
    up, down = basis.up[:, :, :rank], basis.down[:, :rank]
    best = _error(metric, second, up @ down)
    assert float(best) == pytest.approx(basis.tail(rank), rel=1e-6)
    generator = torch.Generator().manual_seed(2)
    for trial in range(200):
        size = 10.0 ** -(trial % 5)
        noise = [torch.randn(t.shape, generator=generator, dtype=torch.float64) * size * t.std() for t in (up, down)]
        assert _error(metric, second, (up + noise[0]) @ (down + noise[1])) >= best * (1 - 1e-9)
    # Plain SVD ignores the metric, or the data too.
    for vectors in (torch.linalg.eigh(second).eigenvectors, torch.linalg.eigh(metric).eigenvectors):
        top = vectors[:, :, -rank:]
        assert _error(metric, second, top @ top.mT) > best * 1.05


@pytest.mark.parametrize("groups", [1, 4])
def test_tails_fall_to_zero_and_full_rank_is_the_identity(groups):
    basis = Basis.from_metric(_positive(groups, 8, 1), _positive(groups, 8, 0), torch.zeros(groups, 8).double())
    tails = [basis.tail(r) for r in range(9)]
    assert tails == sorted(tails, reverse=True) and tails[8] == 0 < tails[7]
    steps = [a - b for a, b in zip(tails, tails[1:], strict=False)]
    assert groups > 1 or steps == sorted(steps, reverse=True)
    torch.testing.assert_close(basis.up @ basis.down, torch.eye(8).double().expand(groups, 8, 8), rtol=0, atol=1e-6)


def test_a_metric_blind_to_a_direction_is_survived():
    metric = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64))[None]
    basis = Basis.from_metric(torch.eye(4).double()[None], metric, torch.zeros(1, 4).double())
    assert torch.isfinite(basis.up).all() and basis.tail(2) < 1e-6 and basis.tail(1) == pytest.approx(1)


def test_signs_are_fixed():
    """Eigenvectors that a library returns with the other sign give the same basis: the largest entry is positive."""
    second, metric = _positive(1, 6, 1), _positive(1, 6, 0)
    a = Basis.from_metric(second, metric, torch.zeros(1, 6).double())
    values, vectors = torch.linalg.eigh(metric)
    root = (vectors * values.sqrt()[:, None, :]) @ vectors.mT
    coordinates = root @ a.up
    assert (coordinates.gather(-2, coordinates.abs().argmax(-2, keepdim=True)) > 0).all()


@pytest.mark.parametrize("groups", [1, 4])
def test_key_factors_project_in_the_metric(groups):
    """The map U A of the factors, seen on the keys themselves, has the error that the tail promises."""
    model = random_model(small_config(num_kv_heads=groups))
    attention, moments = model.layers[5].self_attn, random_moments(model.config)
    basis = key_basis(moments, 100)
    weight = attention.k_proj.weight.detach().unflatten(0, (groups, 8))
    second = moments.key_second / moments.key_weight[:, None, None]
    for rank in (2, 5, 8):
        factors = latent_key_factors(attention, basis, rank)
        assert factors["keys.up"].shape == (groups, 8, rank)
        down = factors["keys.down.weight"].unflatten(0, (groups, rank))
        projection = factors["keys.up"] @ down @ torch.linalg.pinv(weight)
        error = _error(moments.key_fisher / 100, second, projection)
        assert float(error) == pytest.approx(basis.tail(rank), rel=1e-6, abs=1e-9)
        center = torch.einsum("gdr,gr->gd", factors["keys.up"], factors["keys.center"])
        mean = moments.key_first / moments.key_weight[:, None]
        torch.testing.assert_close(center, torch.einsum("gde,ge->gd", projection, mean), rtol=0, atol=1e-7)


def test_value_factors_have_the_error_of_the_tail():
    """One head: ‖W_O (v − v̂)‖² over vectors with exactly the calibrated mean and covariance."""
    config = small_config(num_heads=1, num_kv_heads=1)
    model = random_model(config)
    attention = model.layers[5].self_attn
    x = torch.randn(500, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    v = attention.v_proj(x).detach()
    weight = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moments = LayerMoments.zeros(config)
    moments.value_weight += weight.sum()
    moments.value_first += (weight[:, None] * v).sum(0)
    moments.value_second += torch.einsum("t,td,te->de", weight, v, v)
    basis = value_basis(attention, moments)
    tails = []
    for rank in (1, 4, 7):
        f = latent_value_factors(attention, basis, rank)
        cached = x @ f["values.down.weight"].T - f["values.center"].flatten()
        out = cached @ f["values.out.weight"].T + f["values.bias"]
        error = (weight * (out - attention.o_proj(v).detach()).square().sum(-1)).sum() / weight.sum()
        assert float(error) == pytest.approx(basis.tail(rank), rel=1e-6)
        tails.append(float(error))
        # Plain SVD of the two weights at the same rank, with the same bias for the mean.
        left, s, right = torch.linalg.svd((attention.o_proj.weight @ attention.v_proj.weight).detach())
        plain = (x - x.mean(0)) @ (right[:rank].T * s[:rank]) @ left[:, :rank].T + attention.o_proj(v).mean(0).detach()
        plain_error = (weight * (plain - attention.o_proj(v).detach()).square().sum(-1)).sum() / weight.sum()
        assert error < plain_error
    assert tails == sorted(tails, reverse=True)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("layers", [[5], [0, 3, 5]])
def test_full_rank_students_equal_the_model(groups, layers):
    model = random_model(small_config(num_kv_heads=groups))
    moments = {i: random_moments(model.config, i) for i in layers}
    bases = Bases(
        {i: key_basis(m, 100) for i, m in moments.items()},
        {i: value_basis(model.layers[i].self_attn, m) for i, m in moments.items()},
    )
    ids = tokens(model.config, 2, 30)
    for forms in ((8, 8), (8, 0), (0, 8)):
        student = build_student(model, bases, specs_of(model.config, dict.fromkeys(layers, forms)))
        torch.testing.assert_close(student(ids), model(ids), rtol=0, atol=1e-6)
    truncated = build_student(model, bases, specs_of(model.config, dict.fromkeys(layers, (3, 3))))
    assert (truncated(ids) - model(ids)).abs().max() > 1e-2


def test_students_hold_float32_factors_of_half_precision_models():
    model = random_model(small_config(), dtype=torch.bfloat16)
    moments = random_moments(model.config)
    bases = Bases({5: key_basis(moments, 100)}, {5: value_basis(model.layers[5].self_attn, moments)})
    student = build_student(model, bases, specs_of(model.config, {5: (4, 4)}))
    assert {student.get_parameter(n).dtype for n in student.factor_names()} == {torch.float32}
