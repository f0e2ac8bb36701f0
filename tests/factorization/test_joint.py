"""The joint latent: exact at full rank, optimal where a closed form exists, and never worse for taking turns."""

import pytest
import torch
from calibrated_models import calibrated, calibrated_bases
from random_models import tokens

from tpa_train.errors import UserError
from tpa_train.factorization.joint import JointBasis, JointProblem, _readers, _Turns
from tpa_train.factorization.solutions import Bases, build_student
from tpa_train.factorization.stacked import key_moments, value_moments
from tpa_train.tpa.spec import LayerSpec, dense_specs


def _positive(n, seed, decay=0.7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n, generator=generator, dtype=torch.float64) * decay ** torch.arange(n)
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return turn @ x @ x.mT @ turn.mT


def _problem(n=12, same=False, seed=0):
    """A problem of two (or one, where the ``same``) token weightings; keys and values are correlated."""
    second = _positive(n, seed)
    return JointProblem(
        3.0 * second, second if same else _positive(n, seed + 1), torch.zeros(n).double(),
        _positive(n // 2, seed + 2), 5.0 * _positive(n // 2, seed + 3),
    )  # fmt: skip


def _objective(problem, balance, solution):
    keys, values = problem.error(*solution)
    return keys + balance * values


def _specs(config, rank, layers=(1, 5), bits=16):
    specs = dense_specs(config)
    for layer in layers:
        specs[layer] = LayerSpec("joint", rank, "joint", rank, bits)
    return specs


# -------------------------------------------------------------------------------------------------------------- problem


def test_errors_are_those_of_vectors():
    """Over samples: E ‖M_K^½ (k − U_k P y)‖² under one weighting, the same of values under the other."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(400, 12, generator=generator, dtype=torch.float64) @ _positive(12, 5)
    weight_k, weight_v = torch.rand(2, 400, generator=generator, dtype=torch.float64) / 400
    problem = _problem()
    problem.second_k = torch.einsum("t,ti,tj->ij", weight_k, y, y)
    problem.second_v = torch.einsum("t,ti,tj->ij", weight_v, y, y)
    project, keys, values = (torch.randn(s, generator=generator).double() for s in ((4, 12), (6, 4), (6, 4)))
    rest_k = y[:, :6] - y @ project.T @ keys.T
    rest_v = y[:, 6:] - y @ project.T @ values.T
    expected = (
        torch.einsum("t,ti,ij,tj->", weight_k, rest_k, problem.metric_k, rest_k),
        torch.einsum("t,ti,ij,tj->", weight_v, rest_v, problem.metric_v, rest_v),
    )
    assert problem.error(project, keys, values) == pytest.approx([float(e) for e in expected], rel=1e-9)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_readers_are_least_squares(rank):
    problem = _problem()
    project = torch.randn(rank, 12, generator=torch.Generator().manual_seed(1)).double()
    keys, values = _readers(problem, project)
    best = problem.error(project, keys, values)
    for trial in range(40):
        noise = torch.randn(2, 6, rank, generator=torch.Generator().manual_seed(trial)).double() * 10.0 ** -(trial % 4)
        for own, other in zip(problem.error(project, keys + noise[0], values + noise[1]), best, strict=True):
            assert own >= other - 1e-9


@pytest.mark.parametrize("groups", [1, 4])
def test_problems_hold_the_calibrated_moments(groups):
    model, calibration = calibrated(groups)
    attention, moments, half = model.layers[5].self_attn, calibration.layers[5], groups * 8
    problem = JointProblem.of(attention, moments, calibration.tokens)
    keys, values = key_moments(moments, calibration.tokens), value_moments(attention, moments)
    for found, expected in (
        (problem.second_k[:half, :half], keys.second), (problem.metric_k, keys.metric),
        (problem.second_v[half:, half:], values.second), (problem.metric_v, values.metric),
        (problem.mean[half:, None], values.mean),
    ):  # fmt: skip
        assert torch.equal(found, expected.reshape(found.shape))


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize("balance", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_nested_solution_is_optimal_under_one_weighting(balance, rank):
    """Its error is the tail; nothing near it, nor any random start improved in turns, is better; turns keep it."""
    problem = _problem(same=True)
    basis = JointBasis.solve(problem, 1, balance)
    project = basis.project[:rank]
    nested = (project, *_readers(problem, project))
    # Both moments are divided by their trace in the closed form; here they are multiples of one matrix.
    one = JointProblem(
        problem.mean_second, problem.mean_second, problem.mean, problem.metric_k, problem.metric_v
    )  # fmt: skip
    best = _objective(one, balance, nested)
    assert best == pytest.approx(basis.tail(rank), rel=1e-6)
    generator = torch.Generator().manual_seed(2)
    for trial in range(200):
        size = 10.0 ** -(trial % 5)
        noisy = [t + torch.randn(t.shape, generator=generator).double() * size * t.std() for t in nested]
        assert _objective(one, balance, noisy) >= best * (1 - 1e-9)
        assert _objective(one, balance, (noisy[0], *_readers(one, noisy[0]))) >= best * (1 - 1e-9)
    alone = JointBasis.solve(one, 1, balance)
    assert _objective(one, balance, alone.at(rank)) == pytest.approx(best, rel=1e-6)


def test_energies_fall_and_nothing_is_left_at_full_rank():
    basis = JointBasis.solve(_problem(), 1, 0.5)
    energies = basis.energies.tolist()
    assert energies == sorted(energies, reverse=True) and basis.tail(12) == 0 < basis.tail(11)
    solution = basis.at(12)
    assert max(basis.problem.error(*solution)) < 1e-9 * sum(basis.problem.error(*(0 * t for t in solution)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("balance", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_turns_never_end_worse(seed, balance, rank):
    problem = _problem(seed=10 * seed)
    basis = JointBasis.solve(problem, 1, balance)
    project = basis.project[:rank]
    nested = _objective(problem, balance, (project, *_readers(problem, project)))
    values = [_objective(problem, balance, basis.at(rank, sweeps)) for sweeps in (0, 1, 2, 4, 8)]
    assert values[0] == pytest.approx(nested, rel=1e-6)
    assert all(b <= a * (1 + 1e-9) for a, b in zip(values, values[1:], strict=False))
    assert values[-1] < nested * 0.999, "weightings that differ leave room"


@pytest.mark.parametrize("rank", [2, 6])
def test_each_turn_is_the_minimum_over_the_projection(rank):
    """For given U_k and U_v no other P is better: gradient zero."""
    problem, balance = _problem(), 0.3
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(6, rank, generator=generator).double() for _ in range(2))
    project = _Turns(problem, balance).projection(keys, values).requires_grad_()
    half = torch.eye(12, dtype=torch.float64).split(6)
    objective = sum(
        factor * torch.einsum("ij,ja,ab,ib->", metric, half[i] - read @ project, second, half[i] - read @ project)
        for i, (factor, metric, second, read) in enumerate(
            ((1.0, problem.metric_k, problem.second_k, keys), (balance, problem.metric_v, problem.second_v, values))
        )
    )
    (gradient,) = torch.autograd.grad(objective, project)
    scale = keys.mT @ problem.metric_k @ problem.second_k[:6]
    assert gradient.abs().max() < 1e-6 * scale.abs().max()


@pytest.mark.parametrize("rank", [2, 5])
def test_separate_optima_are_approached_at_extreme_balances(rank):
    """λ → 0 leaves all of P to the keys, λ → ∞ to the values: each alone is then as good as it can be."""
    problem = _problem()

    def alone(second, metric, part):
        """The tail of M^½ E[x xᵀ] M^½ of keys (or values) by themselves."""
        values, vectors = torch.linalg.eigh(metric)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
        return float(torch.linalg.eigvalsh(root @ second[part, part] @ root)[:-rank].sum())

    keys = alone(problem.second_k, problem.metric_k, slice(0, 6))
    values = alone(problem.second_v, problem.metric_v, slice(6, 12))
    errors = {b: problem.error(*JointBasis.solve(problem, 1, b).at(rank, sweeps=20)) for b in (1e-6, 1.0, 1e6)}
    assert errors[1e-6][0] == pytest.approx(keys, rel=0.01) and errors[1e6][1] == pytest.approx(values, rel=0.01)
    assert errors[1.0][0] >= keys * (1 - 1e-6) and errors[1.0][1] >= values * (1 - 1e-6)
    assert errors[1e-6][1] > errors[1.0][1] * 1.05 and errors[1e6][0] > errors[1.0][0] * 1.05


@pytest.mark.parametrize("balance", [0.1, 1.0, 10.0])
def test_separate_latents_are_a_special_case(balance):
    """A joint latent of as many numbers as a pair of separate ones is at least as good, in the same metric."""
    problem = _problem()
    root = [torch.linalg.cholesky(m + 1e-12 * torch.eye(6).double()).mT for m in (problem.metric_k, problem.metric_v)]
    joint = _objective(problem, balance, JointBasis.solve(problem, 1, balance).at(6, sweeps=20))
    for rank_k in (1, 3, 5):
        errors = []
        for i, (second, r) in enumerate(((problem.second_k, rank_k), (problem.second_v, 6 - rank_k))):
            part = slice(6 * i, 6 * i + 6)
            errors.append(float(torch.linalg.eigvalsh(root[i] @ second[part, part] @ root[i].mT)[:-r].sum()))
        assert joint <= (errors[0] + balance * errors[1]) * 1.001


# -------------------------------------------------------------------------------------------------------------- latents


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank,balance", [(1, 1.0), (5, 1.0), (5, 1e-3), (12, 50.0)])
def test_latents_have_unit_spread_and_their_rounding_costs_ever_less(groups, rank, balance):
    model, bases = calibrated_bases(groups)
    bases.balances[5] = balance
    basis = bases.joint(model.layers[5].self_attn, 5)
    problem = basis.problem
    for project, keys, values in (basis.at(rank), basis.at(rank, sweeps=0)):
        covariance = project @ problem.mean_second @ project.mT
        torch.testing.assert_close(covariance, torch.eye(rank).double(), rtol=0, atol=1e-6)
        cost = keys.mT @ problem.metric_k @ keys + basis.balance * values.mT @ problem.metric_v @ values
        diagonal = cost.diagonal()
        assert (cost - diagonal.diag()).abs().max() < 1e-6 * diagonal.max()
        assert (diagonal[1:] <= diagonal[:-1] * (1 + 1e-9)).all() and diagonal[0] > diagonal[-1] or rank == 1


def test_signs_are_fixed_and_solutions_repeat():
    first, second = (JointBasis.solve(_problem(), 1, 0.7).at(5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------------------- students


@torch.no_grad()
@pytest.mark.parametrize("groups,hidden", [(1, 24), (2, 64), (4, 100), (2, 24), (4, 24)])
def test_full_rank_is_the_teacher(groups, hidden):
    """With D = 24 and G = 2 or 4, y = [k; v] has 32 or 64 numbers but only 24 directions: as many latents suffice."""
    model, bases = calibrated_bases(groups, hidden_size=hidden)
    ids, full = tokens(model.config, 2, 40), 2 * groups * 8
    for rank in {full, min(full, hidden), min(full, hidden + 3)}:
        student = build_student(model, bases, _specs(model.config, rank))
        torch.testing.assert_close(student(ids), model(ids), rtol=0, atol=5e-9)
    student = build_student(model, bases, _specs(model.config, min(full, hidden) // 2))
    assert (student(ids) - model(ids)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4])
def test_factors_are_the_solution(groups):
    """c = P [W_K; W_V] x; keys U_k c, values their mean plus U_v (c − P mean)."""
    model, bases = calibrated_bases(groups)
    attention = model.layers[5].self_attn
    basis, rank, half = bases.joint(attention, 5), 6, groups * 8
    project, keys, values = basis.at(rank)
    factors = basis.factors(attention, rank)
    x = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.cat((attention.k_proj(x), attention.v_proj(x)), dim=-1)
    c = x @ factors["keys.down.weight"].T
    torch.testing.assert_close(c, y @ project.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(factors["keys.up"].flatten(0, 1), keys, rtol=0, atol=0)
    mean = basis.problem.mean
    expected = mean[half:] + (y - mean) @ project.T @ values.T
    rebuilt = torch.einsum("tr,gdr->tgd", c - factors["keys.center"], factors["values.up"]).repeat_interleave(
        4 // groups, dim=1
    )
    torch.testing.assert_close(
        attention.o_proj(rebuilt.flatten(1)) + factors["values.bias"],
        attention.o_proj(expected.unflatten(-1, (groups, 8)).repeat_interleave(4 // groups, dim=1).flatten(1)),
        rtol=0, atol=1e-9,
    )  # fmt: skip


def test_bases_solve_once_for_a_balance():
    model, bases = calibrated_bases(4)
    attention = model.layers[5].self_attn
    first = bases.joint(attention, 5)
    assert first is bases.joint(attention, 5) and first.balance == 1.0
    bases.balances[5] = 0.25
    assert bases.joint(attention, 5) is not first and bases.joint(attention, 5).balance == 0.25
    bases.balances[5] = 1.0
    assert bases.joint(attention, 5) is first


def test_without_calibration_there_is_no_joint_latent():
    model, calibration = calibrated(1)
    with pytest.raises(UserError, match="^joint is solved from calibrated moments; calibrate the model first.$"):
        Bases({}, {}).joint(model.layers[5].self_attn, 5)
    assert set(calibration.layers) == {1, 5}
