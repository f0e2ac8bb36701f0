"""One step of decoding: attention of one new query a sequence on everything that its layer has cached.

``attend_cached`` is the only door. ``reference`` reads the cache with PyTorch, on any device; it defines what is right.
``cpu`` reads it block by block.
"""

from __future__ import annotations

from torch import Tensor

from tpa_train.gemma3.attention import Attention
from tpa_train.tpa.decode import cpu
from tpa_train.tpa.decode.cached import CachedTokens
from tpa_train.tpa.decode.reference import attend_reference

__all__ = ["CachedTokens", "attend_cached"]


def attend_cached(attention: Attention, queries: Tensor, cached: CachedTokens) -> Tensor:
    """Returns what attention gives for one query a sequence, [B, H, e]: ``attention.output`` takes it from there.

    Args:
        attention: the layer's, dense or factorized.
        queries: normalised and rotated, [B, H, d].
        cached: the layer's entries, the new token's among them.
    """
    if cpu.supported(attention, queries):
        return cpu.attend_cpu(attention, queries, cached)
    return attend_reference(attention, queries, cached)
