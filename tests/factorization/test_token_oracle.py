"""The oracle is optimal where that can be known, and never worse than factors that it is given."""

import pytest
import torch
from contextual_problems import DOUBLE, heads_of, random_layer, random_moments, random_sample, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_train.errors import UserError
from tpa_train.factorization import token_oracle
from tpa_train.factorization.contextual_factorization import (
    _init_contextual_factorization,
    contextual_error,
    per_token_error,
)
from tpa_train.factorization.contextual_fit import TokenTargets
from tpa_train.factorization.stacked import ActivationSample, HeadMoments
from tpa_train.factorization.token_oracle import best_token_factors


def skewed_moments(weight, seed) -> HeadMoments:
    """Head metrics of very different sizes and directions, with what couples them."""
    moments, size = random_moments(weight, seed, "full"), weight.shape[0] * weight.shape[1]
    scale = torch.exp(1.5 * torch.randn(size, generator=seeded(seed + 7), dtype=DOUBLE)).view(weight.shape[:2])
    moments.metric = scale[..., None, None] * moments.metric * scale
    return moments


@pytest.mark.parametrize("rank", [1, 3])
def test_the_oracle_is_a_truncated_svd_where_one_metric_serves_all_heads(rank):
    """M = I ⊗ M₁: the tail of the singular values of k·M₁^½, whatever other start is given."""
    attention = random_layer()
    weight, sample = heads_of(attention, "k"), random_sample(attention, "k", False, 50)
    share = sample.key_weight.double()[:, None]
    for moments in (None, random_moments(weight, metric="same")):
        metric = torch.eye(8, dtype=DOUBLE) if moments is None else moments.metric[0, :, 0]
        k = torch.einsum("gdi,ti->tgd", weight, sample.x.double())
        scaled = k / k.square().mean((1, 2), keepdim=True).sqrt() @ torch.linalg.cholesky(metric)
        values = torch.linalg.svdvals(scaled).square()
        expected = float((share * values[:, rank:]).sum() / (share * values).sum())
        factors = [_init_contextual_factorization(attention, "k", rank, moments)]
        for starts in ([], factors):
            assert per_token_error(weight, sample, moments, rank, "k", starts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["k", "v", "q"])
def test_no_rank_is_lost_at_full_rank(kind):
    attention = random_layer(heads=4)
    weight, sample = heads_of(attention, kind), random_sample(attention, kind, False, 20)
    moments = random_moments(weight, metric="full")
    assert per_token_error(weight, sample, moments, 4, kind) == 0
    assert TokenTargets(weight, sample, moments, kind).reference > 0
    matrices, error = best_token_factors(TokenTargets(weight, sample, moments, kind), 4)
    assert error < 1e-12 and matrices.shape == (20, 4, 8)


@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from("kvq"))
@settings(max_examples=12, deadline=None)
def test_the_oracle_bounds_contextual_factors(seed, rank, kind):
    """Where the SVD in the average metric does not: the closed form, and factors that were never fitted."""
    attention = random_layer(heads=4)
    weight, sample = heads_of(attention, kind), random_sample(attention, kind, seed % 2 == 0, 60)
    moments = skewed_moments(weight, seed)
    factors = [
        _init_contextual_factorization(attention, kind, rank, moments),
        _init_contextual_factorization(attention, kind, rank, moments, constant=None if kind == "q" else "a"),
    ]
    for name, tensor in factors[0].items():
        if name.endswith("a.weight"):
            tensor += 0.1 * torch.randn(tensor.shape, generator=seeded(seed), dtype=DOUBLE)
    errors = [contextual_error(weight, f, sample, moments, kind) for f in factors]
    assert 0 < per_token_error(weight, sample, moments, rank, kind, factors) <= min(errors) * (1 + 1e-9)
    assert per_token_error(weight, sample, moments, rank, kind) > 0


def test_the_oracle_finds_tokens_of_low_rank():
    """Keys of rank 1 a token under a metric in which their SVD is no rank-1 solution of noisy ones."""
    attention = random_layer()
    weight, generator = heads_of(attention, "k"), seeded(4)
    a, b = (torch.randn(40, n, generator=generator, dtype=DOUBLE) for n in (4, 8))
    noise = 0.05 * torch.randn(40, 4, 8, generator=generator, dtype=DOUBLE)
    k = torch.einsum("tg,td->tgd", a, b) + noise
    x = torch.linalg.lstsq(weight.flatten(0, 1), k.flatten(1).mT).solution.mT
    sample, moments = ActivationSample(x.float(), torch.ones(40), torch.ones(40)), skewed_moments(weight, 3)
    targets = TokenTargets(weight, sample, moments, "k")
    svd = targets.error(token_oracle._matrices(targets, token_oracle._svd_starts(targets, 1)[0]))
    truth = targets.error(k - noise)
    assert per_token_error(weight, sample, moments, 1) < min(truth, 0.5 * svd)


@pytest.mark.parametrize("kind", ["k", "v"])
def test_no_sweep_raises_a_tokens_error(kind):
    """Each factor is the least squares solution given the other; dead tokens and blind metrics are survived."""
    attention = random_layer()
    weight, sample = heads_of(attention, kind), random_sample(attention, kind, False, 30)
    sample.x[3] = 0
    moments = skewed_moments(weight, 0)
    moments.metric[0], moments.metric[:, :, 0] = 0, 0
    targets = TokenTargets(weight, sample, moments, kind)
    constant = torch.zeros_like(targets.mean)
    factors, y = token_oracle._svd_starts(targets, 2)[0], targets.vectors / targets.scale

    def costs(factors):
        return ((y - factors[0].mT @ factors[1]).flatten(1) @ targets.root).square().sum(1)

    first = before = costs(factors)
    for _ in range(6):
        factors = token_oracle._sweep(targets, factors, constant)
        after = costs(factors)
        assert (after <= before * (1 + 1e-9) + 1e-18).all() and torch.isfinite(after).all()
        before = after
    assert after.sum() < 0.9 * first.sum()
    a, b = factors
    other = a + 1e-4 * torch.randn(a.shape, generator=seeded(0), dtype=DOUBLE)
    assert (costs((other, b)) >= after * (1 - 1e-9)).all(), "a is the best for its b"


def test_factors_of_another_rank_are_refused():
    attention = random_layer()
    weight, sample = heads_of(attention, "k"), random_sample(attention, "k", False, 10)
    factors = _init_contextual_factorization(attention, "k", 2)
    with pytest.raises(UserError, match="factors have rank 2, but the oracle's is rank=1"):
        per_token_error(weight, sample, None, 1, factors=[factors])


def test_the_oracle_of_values_has_a_constant_of_its_own():
    """Values of rank 1 around a constant that is not their mean: no matrix alone is left with so little."""
    attention = random_layer()
    weight, generator = heads_of(attention, "v"), seeded(0)
    a, b, constant = (torch.randn(*shape, generator=generator, dtype=DOUBLE) for shape in ((300, 4), (300, 8), (4, 8)))
    v = torch.einsum("tg,td->tgd", a + 1, b + 1) + constant
    x = torch.linalg.lstsq(weight.flatten(0, 1), v.flatten(1).mT).solution.mT
    sample = ActivationSample(x.float(), torch.ones(300), torch.ones(300))
    targets = TokenTargets(weight, sample, None, "v")
    for start in (0 * constant, targets.mean):  # the best matrices around each
        left, values, right = torch.linalg.svd(targets.vectors - start, full_matrices=False)
        fixed = targets.error(left[..., :1] * values[:, None, :1] @ right[:, :1])
        assert per_token_error(weight, sample, None, 1, "v") < 0.7 * fixed
