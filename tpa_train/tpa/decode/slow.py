"""Slow pairs: what of RoPE's turning need not be done for every key.

Within a tile of T tokens most of RoPE's pairs turn little: as functions of the position in the tile, their cosines and
sines lie (to rounding) in a space of a few dimensions, spanned by φ_1 … φ_J. With cos θ_f t = Σ_j C_jf φ_j(t), and
sines likewise by S, the score of a key k = U c + k₀ is, over these pairs (q already turned back to the tile's start),

    Σ_f k_f (q_f cos θ_f t + q_f' sin θ_f t) + k_f' (q_f' cos θ_f t − q_f sin θ_f t) = Σ_j φ_j(t) (a_j · k)
    with a_j = (q_f C_jf + q_f' S_jf ; q_f' C_jf − q_f S_jf)_f, and so a_j · k = (Uᵀ a_j) · c + a_j · k₀,

of which Uᵀ a_j is made once a tile. Only the fast pairs, which come first, are rebuilt and turned for each token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TERMS = (4, 8, 16)
LEAST_FAST = 16  # a product's smallest side
TOLERANCE = {torch.float32: 4e-7, torch.float16: 1e-4, torch.bfloat16: 4e-4}  # of cosines; φ and C are rounded as well


@dataclass(frozen=True)
class SlowPairs:
    """``first``: pairs before it are fast. ``basis``: φ [T, J]. ``bends``: C and S, [2, d/2, J] (0 before ``first``).

    φ are orthogonal, of mean square 1.
    """

    first: int
    basis: Tensor
    bends: Tensor

    @property
    def terms(self) -> int:
        return self.basis.shape[1]


def slow_pairs(
    angles: tuple[Tensor, Tensor], half: int, heads: int, rank: int, dtype: torch.dtype, always: bool = False
) -> SlowPairs | None:
    """Returns the split of the pairs that costs a tile the fewest products; None where rebuilding every pair does.

    Args:
        angles: cos and sin of the tile's positions, each [T, d/2].
        half: pairs with what they are padded to, a power of two.
        heads: query heads of a KV head, padded to a power of two.
        rank: numbers of a latent, padded.
        dtype: of the operands, which decides how well φ must serve.
        always: splits wherever it is possible, whatever it costs.
    """
    cos, sin = (t.detach().double().cpu() for t in angles)
    tokens, pairs = cos.shape
    best, least = None, float("inf") if always else products(tokens, half, half, 0, rank, heads)
    first = LEAST_FAST
    while first < min(half, pairs):
        table = torch.cat((cos[:, first:], sin[:, first:]), dim=1)
        left, _, _ = torch.linalg.svd(table, full_matrices=False)
        for terms in TERMS:
            cost = products(tokens, half, first, terms, rank, heads)
            if terms > min(table.shape) or terms * heads < LEAST_FAST or cost >= least:
                continue
            basis = left[:, :terms]
            bends = basis.T @ table
            if (basis @ bends - table).abs().max() <= TOLERANCE[dtype]:
                bends = torch.stack(bends.T.chunk(2)) / tokens**0.5
                before = bends.new_zeros(2, first, terms)
                best = SlowPairs(first, basis * tokens**0.5, torch.cat((before, bends), dim=1))
                least = cost
        first *= 2
    return best


def products(tokens: int, half: int, first: int, terms: int, rank: int, heads: int) -> float:
    """Returns the multiplications of a tile's scores with ``first`` fast pairs; W is made of all ``half`` of them."""
    rebuilt = tokens * 2 * first * (rank + max(LEAST_FAST, heads))
    columns = terms * heads
    return rebuilt + columns * rank * (2 * half + tokens)
