"""RoPE in a few terms: how a span of positions turns keys that are not there.

Within S neighbouring tokens the cosines and sines of all pairs, as functions of the position t in the span, lie (to
rounding) in a space of few dimensions: φ_1 … φ_J. With cos θ_f t = Σ_j C_jf φ_j(t), and sines likewise by S, the score
of a key k = U c + k₀ is, q being turned back to the span's start,

    Σ_f k_f (q_f cos θ_f t + q_f' sin θ_f t) + k_f' (q_f' cos θ_f t − q_f sin θ_f t) = Σ_j φ_j(t) (a_j · k)
    with a_j = (q_f C_jf + q_f' S_jf ; q_f' C_jf − q_f S_jf)_f, and so a_j · k = (Uᵀ a_j) · c + a_j · k₀.

So U is applied J times a span and query head instead of once for every token: 16 times in 256 tokens where positions
are scaled by 8, as in the global layers of Gemma 3 4B, 12B and 27B. Unscaled pairs turn up to a radian a token and take
more terms than that saves; but only the fastest do. So the fastest pairs' numbers of a key are rebuilt and rotated, a
quarter of a key in the 270M and 1B, and the score is their share of it and the absorbed share of all other pairs.

The dimensions are counted as those of prolate functions are (Slepian and Pollak 1961): about the span times the
fastest pair's frequency over π, and a few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SPANS = (64, 128, 192, 256, 384, 512)
TERMS = (4, 8, 16, 32)
FAST = (16, 32, 64)  # pairs that may be rebuilt: sides of products
MOST = 64  # terms of all query heads of a KV head
LEAST = 16  # the same: the smallest side of a product
MADE = 3  # what making W takes, in time of as many other products: they are few and small
MOVED = 600  # what writing and reading a number of W takes, in products
TURNED, SUMMED = 100, 64  # what a rebuilt number and a term take outside products, in products: rotation; φ and the sum
CLEARLY = 0.75  # of what rebuilding all pairs takes, at most, where some are
SHARE = 0.25  # of numbers of W, made and read, to a token's
TOLERANCE = {torch.float32: 4e-7, torch.float16: 4e-4, torch.bfloat16: 2e-3}  # of cosines: what operands are rounded to


@dataclass(frozen=True)
class Turning:
    """``basis``: φ [S, J], orthogonal, of mean square 1. ``bends``: C and S, [2, J, d/2], zero for the first ``fast``
    pairs, which are rebuilt."""

    basis: Tensor
    bends: Tensor
    fast: int = 0

    @property
    def span(self) -> int:
        return self.basis.shape[0]

    @property
    def terms(self) -> int:
        return self.basis.shape[1]


def rebuilt_cost(pairs: int, heads: int, rank: int) -> float:
    """Returns what rebuilding ``pairs`` of a key takes a token, in products: U, the rotation, and the score."""
    return 2.0 * pairs * (rank + TURNED + max(LEAST, heads))


def absorbed_cost(columns: int, span: int, pairs: int, rank: int) -> float:
    """Returns what ``columns``, terms of all query heads, take a token, in products, making W included."""
    return columns * (rank * (1 + (MADE * 2 * pairs + MOVED) / span) + SUMMED)


def turning(
    angles: tuple[Tensor, Tensor],
    tokens: int,
    heads: int,
    rank: int,
    dtype: torch.dtype,
    always: bool = False,
    fast: int | None = None,
) -> Turning | None:
    """Returns the span and terms that take the fewest products a token; None where rebuilding keys takes fewer.

    Pairs are rebuilt only where absorbing all of them does not pay.

    Args:
        angles: cos and sin of the positions 0 … n − 1, each [n, d/2]; no span is longer than n. The first pairs turn
            fastest.
        tokens: of a tile, which divide a span.
        heads: query heads of a KV head, padded to a power of two.
        rank: numbers of a latent.
        dtype: of the operands, which decides how well φ must serve.
        always: whatever it takes.
        fast: pairs that are rebuilt, 0 or a power of two; None: as many as take the fewest products.
    """
    cos, sin = (t.detach().double().cpu() for t in angles)
    pairs = cos.shape[1]
    whole = rebuilt_cost(pairs, heads, rank)
    found = None
    if not fast:
        found = _shortest((cos, sin), 0, tokens, heads, rank, dtype, always, whole)[0]
    if found is not None or fast == 0:
        return found
    least = whole * CLEARLY
    for count in FAST if fast is None else (fast,):
        if count < pairs:
            other, cost = _shortest((cos, sin), count, tokens, heads, rank, dtype, always, least)
            if other is not None:
                found, least = other, cost
    return found


def _shortest(
    angles: tuple[Tensor, Tensor],
    fast: int,
    tokens: int,
    heads: int,
    rank: int,
    dtype: torch.dtype,
    always: bool,
    limit: float,
) -> tuple[Turning | None, float]:
    """As ``turning`` with that many ``fast`` pairs, for less than ``limit``, and what it takes."""
    cos, sin = (t[:, fast:] for t in angles)
    slow = cos.shape[1]
    best, least = None, float("inf") if always else limit
    for span in sorted({tokens, *SPANS}):
        if span % tokens or span > len(cos):
            continue
        table, left = torch.cat((cos[:span], sin[:span]), dim=1), None
        for terms in TERMS:
            columns = terms * heads
            cost = absorbed_cost(columns, span, slow, rank)
            if fast:  # in the product that gives their scores, a head has two columns
                cost += rebuilt_cost(fast, 2 * heads, rank)
            if terms > min(table.shape) or columns < LEAST or cost >= least:
                continue
            if not always and (columns > MOST or columns > SHARE * span):
                continue
            if left is None:
                left, _, _ = torch.linalg.svd(table, full_matrices=False)
            basis = left[:, :terms]
            bends = basis.T @ table
            if (basis @ bends - table).abs().max() <= TOLERANCE[dtype]:
                bends = F.pad(torch.stack(bends.chunk(2, dim=1)) / span**0.5, (fast, 0))
                best, least = Turning(basis * span**0.5, bends, fast), cost
    return best, least
