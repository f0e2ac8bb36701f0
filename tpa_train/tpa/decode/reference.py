"""Decoding attention in PyTorch: unpacks the whole cache of a layer, rebuilds its keys and values, and attends."""

from __future__ import annotations

from torch import Tensor

from tpa_train.gemma3.attention import Attention, sdpa
from tpa_train.tpa.decode.cached import CachedTokens


def attend_reference(attention: Attention, queries: Tensor, cached: CachedTokens) -> Tensor:
    """See ``decode.attend_cached``: [B, H, d] -> [B, H, e]."""
    positions, held = cached.positions()
    # An idle row sees its first slot, so that no row of the softmax is empty.
    held[:, 0] |= cached.lengths == 0
    stored = cached.stored
    if cached.rows is not None:
        stored = tuple(t[cached.rows.long()] for t in stored)
    stored = tuple(t[: len(queries)] for t in stored)
    rotary = tuple(t[positions] for t in cached.rotary)
    keys, values = attention.read(attention.unpack(stored, queries.dtype), rotary)
    mask = held[:, None, None, :]
    return sdpa(queries[:, None], keys, values, attention.config.scale, mask)[:, 0]
