"""The best rank-R matrix [G, d] of every single token under a metric that couples the heads: the oracle of the forms.

Where one metric serves all heads (M = I ⊗ M₂) a truncated SVD solves it. Under a full metric [G, d, G, d] this is a
weighted low-rank approximation (Srebro and Jaakkola 2003), which has no closed form: a [R, G] and b [R, d] alternate,
each a least squares problem given the other, from the SVD in the heads' average metric and from factors that are
known. No step raises a token's error, so the result is never worse than any of its starts; a local minimum is possible.

Shapes: T tokens, R rank, G heads, d head_dim. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpa_train.factorization.contextual_fit import TokenTargets
from tpa_train.factorization.latent import symmetric_power

SVD_SWEEPS = 5  # of the SVD against the constant of the values
SWEEPS = 200  # of the alternation, at most
IMPROVEMENT = 1e-3  # relative; the alternation stops below it
RIDGE = 1e-11  # of the normal matrix's mean diagonal
CHUNK_NUMBERS = 2**18  # of the largest temporary of a chunk of tokens: what a cache holds

Factors = tuple[Tensor, Tensor]  # a [T, R, G] and b [T, R, d] of Σ_r a_r ⊗ b_r


@torch.no_grad()
def best_token_factors(targets: TokenTargets, rank: int, starts: Sequence[Factors] = ()) -> tuple[Tensor, float]:
    """Returns the best rank-R matrices that were found, [T, G, d], and their error as ``targets.error`` counts it.

    Every token starts at whichever of the SVD and ``starts`` suits it best. Values have any constant beside their
    matrix: it and the matrices alternate as well, from each of the constants that the starts imply.

    Args:
        targets: the tokens' vectors and the metric.
        rank: R, below G and d.
        starts: factors of this rank that the result must not be worse than.
    """
    starts = [*_svd_starts(targets, rank), *((a / targets.scale, b) for a, b in starts)]
    nothing = torch.zeros_like(targets.mean)
    best: tuple[Factors, float] | None = None
    for constant in [targets.missing(_matrices(targets, s)) for s in starts] if targets.centred else [nothing]:
        pooled = _best_per_token(targets, starts, constant)
        error = targets.error(_matrices(targets, pooled))
        if best is None or error < best[1]:
            best = pooled, error
    factors, error = best
    matrices = _matrices(targets, factors)
    for _ in range(SWEEPS):
        previous = error
        factors = _sweep(targets, factors, targets.missing(matrices) if targets.centred else nothing)
        found = _matrices(targets, factors)
        if (found_error := targets.error(found)) < error:
            matrices, error = found, found_error
        if found_error >= previous * (1.0 - IMPROVEMENT):
            break
    return matrices, error


def _matrices(targets: TokenTargets, factors: Factors) -> Tensor:
    """Returns what scaled factors stand for, [T, G, d], in the units of the original's vectors."""
    a, b = factors
    return a.mT @ b * targets.scale


def _svd_starts(targets: TokenTargets, rank: int) -> list[Factors]:
    """Returns the SVD in the heads' average metric; of values two, alternated from no constant and from the mean."""
    full = _metric(targets)
    average = torch.einsum("gdge->de", full) / full.shape[0]
    root, inverse = symmetric_power(average, 0.5), symmetric_power(average, -0.5)
    found = []
    for constant in (torch.zeros_like(targets.mean), targets.mean) if targets.centred else (targets.mean,):
        best, best_error = None, float("inf")
        for _ in range(SVD_SWEEPS if targets.centred else 1):
            y = (targets.vectors - constant) / targets.scale
            left, values, right = torch.linalg.svd(y @ root, full_matrices=False)
            factors = (left[..., :rank] * values[:, None, :rank]).mT, right[:, :rank] @ inverse
            matrices = _matrices(targets, factors)
            error = targets.error(matrices)
            if best is None or error < best_error:
                best, best_error = factors, error
            constant = targets.missing(matrices)
        found.append(best)
    return found


def _metric(targets: TokenTargets) -> Tensor:
    """Returns the metric [G, d, G, d] that ``targets.error`` measures with: floored, and scaled."""
    return (targets.root @ targets.root).view_as(targets.metric)


def _best_per_token(targets: TokenTargets, starts: Sequence[Factors], constant: Tensor) -> Factors:
    """Returns for every token the start that is closest to its vector less ``constant``."""
    y = (targets.vectors - constant) / targets.scale
    costs = torch.stack([((y - a.mT @ b).flatten(1) @ targets.root).square().sum(1) for a, b in starts])
    a, b = starts[0]
    for number, (other_a, other_b) in enumerate(starts):
        mine = (costs.argmin(0) == number)[:, None, None]
        a, b = torch.where(mine, other_a, a), torch.where(mine, other_b, b)
    return a, b


def _sweep(targets: TokenTargets, factors: Factors, constant: Tensor) -> Factors:
    """Solves b given a, then a given b, of every token against its vector less ``constant``."""
    groups, width, _, _ = targets.metric.shape
    metric = _metric(targets)
    flat = metric.reshape(groups * width, -1)
    by_heads = metric.permute(0, 2, 1, 3).reshape(groups * groups, -1)  # [G·G, d·d]
    by_width = by_heads.mT.contiguous()
    y = (targets.vectors - constant) / targets.scale
    found = []
    rows = max(1, CHUNK_NUMBERS // (factors[0].shape[1] * max(groups, width)) ** 2)
    for a, b, own in zip(*(t.split(rows) for t in (*factors, y)), strict=True):
        a, b = _least_squares(a, b, _pull(own, a, b, flat), by_heads)
        b, a = _least_squares(b, a, _pull(own, a, b, flat).mT, by_width)
        found.append((a, b))
    return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])


def _pull(y: Tensor, a: Tensor, b: Tensor, metric: Tensor) -> Tensor:
    """Returns M·δ [T, G, d] of what the factors lack."""
    return ((y - a.mT @ b).flatten(1) @ metric).view_as(y)


def _least_squares(fixed: Tensor, free: Tensor, pull: Tensor, metric: Tensor) -> Factors:
    """Minimises δ·M·δ over one factor given the other, for δ = y − Σ_r fixed_r ⊗ free_r.

    The ridge is on the step, not on the factor: a singular problem stays where it is, and no error rises.

    Args:
        fixed: [T, R, m].
        free: [T, R, n], from which the step is taken.
        pull: M·δ [T, m, n] at these factors.
        metric: M as [m·m, n·n].

    Returns:
        Both factors of the same product, the fixed one with orthonormal rows.
    """
    # A token of lower rank than R has rows that do nothing; orthonormal rows give them a direction to use.
    fixed, mixed = torch.linalg.qr(fixed.mT)
    fixed, free = fixed.mT, mixed @ free
    count, rank, width = free.shape
    pairs = [(i, j) for i in range(rank) for j in range(i + 1)]
    outer = torch.stack([fixed[:, i, :, None] * fixed[:, j, None] for i, j in pairs], 1)
    blocks = (outer.flatten(2) @ metric).unflatten(-1, (width, width))
    normal = blocks.new_zeros(count, rank, width, rank, width)
    for number, (i, j) in enumerate(pairs):  # the Cholesky decomposition reads the lower triangle only
        normal[:, i, :, j] = blocks[:, number]
    normal = normal.view(count, rank * width, -1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True)
    step = torch.cholesky_solve((fixed @ pull).view(count, -1, 1), torch.linalg.cholesky(normal))
    return fixed, free + step.view_as(free)
