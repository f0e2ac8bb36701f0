"""The joint latent in closed form: one latent c = P y, y = [k; v] of all heads, that keys and values are read from.

Keys want P to keep what matters under their metric and token weights, values under theirs, with λ between them:

    min over P, U_k, U_v of  E_K ‖M_K^½ (k − U_k c) / s‖² + λ E_V ‖M_V^½ (v − U_v c)‖²

Under one token weighting this is a principal component analysis of [M_K^½ k; √λ M_V^½ v], solved for all ranks at once.
The weightings differ, so the solution for one rank is then improved in turns: U_k and U_v are least squares given P,
and P solves a linear system that the generalised eigenvectors of the two moments split into one small system each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tpa_train.factorization.calibration import LayerMoments
from tpa_train.factorization.latent import output_heads, symmetric_power
from tpa_train.factorization.stacked import centred_values, key_metric, value_metric
from tpa_train.gemma3.attention import Attention

RIDGE = 1e-10  # of a matrix' mean diagonal, added before it is inverted
SEEN = 1e-9  # of the largest eigenvalue; directions of y with less were never shown


@dataclass
class JointProblem:
    """One layer's moments and metrics over y = [k; v] (n = 2·G·d), float64."""

    second_k: Tensor  # [n, n], E_K[y yᵀ / s²]
    second_v: Tensor  # [n, n], covariance of y under the values' weights
    mean: Tensor  # [n], of y under the values' weights
    metric_k: Tensor  # [n/2, n/2], of k / s
    metric_v: Tensor  # [n/2, n/2], of v

    @classmethod
    def of(cls, attention: Attention, moments: LayerMoments, tokens: int) -> JointProblem:
        size = moments.key_first.numel()
        mean, covariance = centred_values(moments)
        return cls(
            moments.shared_key_second / moments.shared_key_weight, covariance, mean,
            key_metric(moments, tokens).reshape(size, size), value_metric(attention).reshape(size, size),
        )  # fmt: skip

    @property
    def scales(self) -> tuple[float, float]:
        """Traces of the two moments; divided by them, they weigh the same."""
        return tuple(float(s.diagonal().sum().clamp_min(1e-300)) for s in (self.second_k, self.second_v))

    @cached_property
    def mean_second(self) -> Tensor:
        """Sum of the two moments [n, n], each divided by its trace."""
        return self.second_k / self.scales[0] + self.second_v / self.scales[1]

    @cached_property
    def coordinates(self) -> tuple[Tensor, Tensor]:
        """T [n, m] in which both moments are diagonal and their mean is the identity; the values' share [m].

        Directions that no token showed are left out: D < n ties keys to values.
        """
        values, vectors = torch.linalg.eigh(self.mean_second)
        seen = values > values.max() * SEEN
        whiten = vectors[:, seen] / values[seen].sqrt()
        share, turn = torch.linalg.eigh(whiten.mT @ self.second_v @ whiten / self.scales[1])
        return whiten @ turn, share.clamp(0.0, 1.0)

    def error(self, project: Tensor, keys: Tensor, values: Tensor) -> tuple[float, float]:
        """Returns the errors of keys and of values, unweighted by λ, for P [r, n], U_k and U_v [n/2, r]."""
        half = self.metric_k.shape[0]
        eye = torch.eye(2 * half, dtype=project.dtype)
        rest_k, rest_v = eye[:half] - keys @ project, eye[half:] - values @ project
        k = torch.einsum("ij,ja,ab,ib->", self.metric_k, rest_k, self.second_k, rest_k)
        v = torch.einsum("ij,ja,ab,ib->", self.metric_v, rest_v, self.second_v, rest_v)
        return float(k), float(v)


@dataclass
class JointBasis:
    """Nested solution of one layer, the most important direction first; latents have unit spread."""

    problem: JointProblem
    balance: float  # λ
    energies: Tensor  # [n], of the objective; its tail sum is the error of a rank, under one token weighting
    project: Tensor  # [n, n]; the first r rows are P
    groups: int

    @classmethod
    def solve(cls, problem: JointProblem, groups: int, balance: float) -> JointBasis:
        """Solves for all ranks under the mean of the two token weightings."""
        half = problem.metric_k.shape[0]
        target = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
        target[:half, :half] = symmetric_power(problem.metric_k, 0.5)
        target[half:, half:] = symmetric_power(problem.metric_v, 0.5) * balance**0.5
        values, vectors = torch.linalg.eigh(target @ problem.mean_second @ target)
        values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
        vectors = vectors * vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()
        floor = values.max() * RIDGE + torch.finfo(values.dtype).tiny
        return cls(problem, balance, values, (vectors / values.clamp_min(floor).sqrt()).mT @ target, groups)

    def tail(self, rank: int) -> float:
        """Returns the objective's error at ``rank``."""
        return float(self.energies[rank:].sum())

    def at(self, rank: int, sweeps: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """Returns P [r, n], U_k and U_v [n/2, r] at ``rank``, improved in turns; never worse than the nested one."""
        problem, balance = self.problem, self.balance
        project = self.project[:rank]
        best = (project, *_readers(problem, project))
        if rank == self.project.shape[0]:  # nothing is lost
            return best

        def objective(solution: tuple[Tensor, Tensor, Tensor]) -> float:
            of_keys, of_values = problem.error(*solution)
            return of_keys + balance * of_values

        lowest = objective(best)
        turns = _Turns(problem, balance)
        for _ in range(sweeps):
            project = turns.projection(*best[1:])
            candidate = (project, *_readers(problem, project))
            value = objective(candidate)
            if not value < lowest:
                break
            best, lowest = candidate, value
        return self._ordered(*best)

    def _ordered(self, project: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turns the latents into uncorrelated ones of unit spread, those whose rounding would cost most first."""
        problem = self.problem
        covariance = project @ problem.mean_second @ project.mT
        root, inverse = symmetric_power(covariance, 0.5), symmetric_power(covariance, -0.5)
        cost = keys.mT @ problem.metric_k @ keys + self.balance * values.mT @ problem.metric_v @ values
        vectors = torch.linalg.eigh(root @ cost @ root).eigenvectors.flip(-1)
        vectors = vectors * vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()
        return vectors.mT @ inverse @ project, keys @ root @ vectors, values @ root @ vectors

    def factors(self, attention: Attention, rank: int) -> dict[str, Tensor]:
        """Returns the parameters of ``JointKeys`` and ``JointValues`` at ``rank`` by their names."""
        config = attention.config
        project, keys, values = self.at(rank)
        shape = (config.num_kv_heads, config.head_dim, rank)
        weights = [p.weight.detach().double().cpu() for p in (attention.k_proj, attention.v_proj)]
        heads, size = output_heads(attention), self.problem.metric_k.shape[0]
        center = project @ self.problem.mean
        return {
            "keys.down.weight": project @ torch.cat(weights),
            "keys.up": keys.reshape(shape),
            "keys.center": center,
            "values.up": values.reshape(shape),
            # Latents are read without their center; around it, values are their mean.
            "values.bias": torch.einsum("ghod,gd->o", heads, self.problem.mean[size:].reshape(shape[:2])),
        }


def _inverse(matrix: Tensor) -> Tensor:
    ridge = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * RIDGE
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    return torch.linalg.inv(matrix + ridge * eye)


def _readers(problem: JointProblem, project: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the least-squares U_k and U_v [n/2, r] for latents P y (any metric gives the same ones)."""
    half = problem.metric_k.shape[0]
    read = [s @ project.mT @ _inverse(project @ s @ project.mT) for s in (problem.second_k, problem.second_v)]
    return read[0][:half], read[1][half:]


class _Turns:
    """The step that solves for P: Q_k P S_k + λ Q_v P S_v = U_kᵀ M_K S_k[k] + λ U_vᵀ M_V S_v[v].

    In the coordinates where S_k and S_v (over their traces) are diagonal and add up to the identity, every coordinate
    has a small system of its own.
    """

    def __init__(self, problem: JointProblem, balance: float) -> None:
        self.problem, self.balance = problem, balance
        self.basis, self.share = problem.coordinates

    def projection(self, keys: Tensor, values: Tensor) -> Tensor:
        """Returns the best P [r, n] for given U_k and U_v."""
        p, half = self.problem, self.problem.metric_k.shape[0]
        quad_k, quad_v = keys.mT @ p.metric_k @ keys, self.balance * values.mT @ p.metric_v @ values
        right = keys.mT @ p.metric_k @ p.second_k[:half] + self.balance * values.mT @ p.metric_v @ p.second_v[half:]
        right = right @ self.basis  # [r, n], one column a system
        # Column j of X solves ((1 - s_j) Q_k + s_j Q_v) x = b, with the traces in Q. The eigenvectors of one matrix
        # relative to the sum of both make all these systems diagonal at once.
        quad_k, quad_v = quad_k * p.scales[0], quad_v * p.scales[1]
        whiten = symmetric_power(quad_k + quad_v, -0.5)
        part_v, turn = torch.linalg.eigh(whiten @ quad_v @ whiten)
        basis, part_v = whiten @ turn, part_v.clamp(0.0, 1.0)[:, None]
        diagonal = (1 - part_v) * (1 - self.share) + part_v * self.share
        solved = basis @ ((basis.mT @ right) / diagonal.clamp_min(RIDGE))
        return solved @ self.basis.mT  # P = X Tᵀ, so that P S T = X (Tᵀ S T)
