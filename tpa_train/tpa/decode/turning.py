"""RoPE in a few terms: how a span of positions turns keys that are not there.

Within S neighbouring tokens the cosines and sines of all pairs, as functions of the position t in the span, lie (to
rounding) in a space of few dimensions: φ_1 … φ_J. With cos θ_f t = Σ_j C_jf φ_j(t), and sines likewise by S, the score
of a key k = U c + k₀ is, q being turned back to the span's start,

    Σ_f k_f (q_f cos θ_f t + q_f' sin θ_f t) + k_f' (q_f' cos θ_f t − q_f sin θ_f t) = Σ_j φ_j(t) (a_j · k)
    with a_j = (q_f C_jf + q_f' S_jf ; q_f' C_jf − q_f S_jf)_f, and so a_j · k = (Uᵀ a_j) · c + a_j · k₀.

So U is applied J times a span and query head instead of once for every token: 16 times in 256 tokens where positions
are scaled by 8, as in the global layers of Gemma 3 4B, 12B and 27B. Unscaled pairs turn up to a radian a token and take
more terms than that saves.

The dimensions are counted as those of prolate functions are (Slepian and Pollak 1961): about the span times the
fastest pair's frequency over π, and a few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPANS = (64, 128, 256, 512)
TERMS = (4, 8, 16, 32)
MOST = 64  # terms of all query heads of a KV head
LEAST = 16  # the same: the smallest side of a product
MADE = 3  # what making W takes, in time of as many other products: they are few and small
SHARE = 0.25  # of numbers of W, made and read, to a token's
TOLERANCE = {torch.float32: 4e-7, torch.float16: 4e-4, torch.bfloat16: 2e-3}  # of cosines: what operands are rounded to


@dataclass(frozen=True)
class Turning:
    """``basis``: φ [S, J], orthogonal, of mean square 1. ``bends``: C and S, [2, J, d/2]."""

    basis: Tensor
    bends: Tensor

    @property
    def span(self) -> int:
        return self.basis.shape[0]

    @property
    def terms(self) -> int:
        return self.basis.shape[1]


def turning(
    angles: tuple[Tensor, Tensor], tokens: int, heads: int, rank: int, dtype: torch.dtype, always: bool = False
) -> Turning | None:
    """Returns the span and terms that take the fewest products a token; None where rebuilding keys takes fewer.

    Args:
        angles: cos and sin of the positions 0 … n − 1, each [n, d/2]; no span is longer than n.
        tokens: of a tile, which divide a span.
        heads: query heads of a KV head, padded to a power of two.
        rank: numbers of a latent.
        dtype: of the operands, which decides how well φ must serve.
        always: whatever it takes.
    """
    cos, sin = (t.detach().double().cpu() for t in angles)
    pairs = cos.shape[1]
    best, least = None, float("inf") if always else 2.0 * pairs * (rank + max(LEAST, heads))
    for span in dict.fromkeys((tokens, *SPANS)):
        if span % tokens or span > len(cos):
            continue
        table = torch.cat((cos[:span], sin[:span]), dim=1)
        left, _, _ = torch.linalg.svd(table, full_matrices=False)
        for terms in TERMS:
            columns = terms * heads
            cost = columns * rank * (1 + MADE * 2 * pairs / span)
            if terms > min(table.shape) or columns < LEAST or cost >= least:
                continue
            if not always and (columns > MOST or columns > SHARE * span):
                continue
            basis = left[:, :terms]
            bends = basis.T @ table
            if (basis @ bends - table).abs().max() <= TOLERANCE[dtype]:
                bends = torch.stack(bends.chunk(2, dim=1)) / span**0.5
                best, least = Turning(basis * span**0.5, bends), cost
    return best
