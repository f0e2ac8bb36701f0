"""Multilinear ranks of a tensor for a wanted error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.factorization.tucker_solver import leading_vectors, tensorly_factors

SMALLEST_ERROR = 1e-7  # relative; below it an error, the root of a difference of energies, is rounding


def tucker_parameters(shape: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """Returns the numbers in core and factors; a mode left whole has no factor."""
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True) if rank < size)


def rank_for_error(energies: Tensor, max_error: float) -> int:
    """Returns how many of a mode's directions must stay: √(energy of the others / all energy) ≤ ``max_error``.

    Args:
        energies: of the directions [n], largest first.
        max_error: relative.
    """
    tail = energies.flip(0).cumsum(0).flip(0) / energies.sum()  # energy lost by keeping the directions before
    return max(1, int((tail > max(max_error, SMALLEST_ERROR) ** 2).sum()))


def adaptive_rank_selection(tensor: Tensor, max_error: float, max_compression: float = math.inf) -> tuple[int, ...]:
    """Returns the smallest ranks, one a mode, whose Tucker decomposition stays within ``max_error``.

    Compression is parameters before / after (``tucker_parameters``). Ranks are smallest in that no single one can be
    lowered without breaking a bound; if the smallest by error compress more than ``max_compression``, the modes with
    most energy left are given more. A tensor that only gets larger is left whole. Deterministic: candidates come from
    the modes' spectra (HOSVD), ``partial_tucker`` verifies them.

    Args:
        tensor: any order from 2 on; not all zero.
        max_error: ‖T − T̂‖ / ‖T‖, from 0 on and below 1. Below 1e-7 it counts as 1e-7.
        max_compression: at least 1; whole modes, which always meet the error, compress by exactly 1.

    Raises:
        UserError: no ranks meet both bounds, or the tensor has no relative error.
    """
    if not 0 <= max_error < 1 or not max_compression >= 1:
        raise UserError(
            f"no ranks meet max_error={max_error} and max_compression={max_compression}: set an error from 0 to below "
            "1 and a compression (parameters before / after) of at least 1."
        )
    t = tensor.detach().double().cpu()
    total = float(t.square().sum())
    if t.dim() < 2 or not 0 < total < math.inf:
        raise UserError(f"ranks are of a finite, non-zero tensor of two or more modes, not of shape {list(t.shape)}.")
    shape, bound = tuple(t.shape), max(max_error, SMALLEST_ERROR)

    # In the basis of the modes' singular vectors truncation is slicing, and errors of all ranks are one cumulative sum.
    for mode in range(t.dim()):
        flat = t.movedim(mode, 0).flatten(1)
        t = torch.tensordot(t, leading_vectors(flat @ flat.mT, shape[mode]), ([mode], [0])).movedim(-1, mode)
    spectra = [t.square().sum([m for m in range(t.dim()) if m != mode]) for mode in range(t.dim())]
    inside = t.square()
    for mode in range(t.dim()):
        inside = inside.cumsum(mode)

    def sliced_error(ranks: list[int]) -> float:
        return math.sqrt(max(0.0, 1 - float(inside[tuple(r - 1 for r in ranks)]) / total))

    def verified_error(ranks: list[int]) -> float:
        kept = t
        for mode, factor in tensorly_factors(t, dict(enumerate(ranks))).items():
            kept = torch.tensordot(kept, factor, ([mode], [0])).movedim(-1, mode)
        return math.sqrt(max(0.0, 1 - float(kept.square().sum()) / total))

    def raised(ranks: list[int]) -> list[int]:
        """Gives one more direction to the mode whose next one holds most energy."""
        open_modes = [m for m in range(len(ranks)) if ranks[m] < shape[m]]
        best = max(open_modes, key=lambda m: float(spectra[m][ranks[m]]))
        return [r + (m == best) for m, r in enumerate(ranks)]

    def compression(ranks: list[int]) -> float:
        return math.prod(shape) / tucker_parameters(shape, tuple(ranks))

    # No mode alone may lose more than the bound, so these are the least ranks that could do.
    ranks = [rank_for_error(energies, bound) for energies in spectra]
    while sliced_error(ranks) > bound:
        ranks = raised(ranks)
    lowered = True
    while lowered:  # alternating finds better factors than slicing, and may need less
        lowered = False
        for mode in range(len(ranks)):
            fewer = [r - (m == mode) for m, r in enumerate(ranks)]
            if fewer[mode] >= 1 and verified_error(fewer) <= bound:
                ranks, lowered = fewer, True
    while compression(ranks) > max_compression:
        ranks = raised(ranks)
    return tuple(ranks) if compression(ranks) >= 1 else shape
