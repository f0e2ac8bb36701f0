"""Decoding attention in PyTorch: unpacks the whole cache of a layer, rebuilds its keys and values, and attends."""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_train.gemma3.attention import Attention, sdpa
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.tpa.decode.cached import CachedTokens

GROUP_BYTES = 1 << 29  # of keys, values and what they are made from, that are expanded at once; a sequence is not cut


def attend_reference(attention: Attention, queries: Tensor, cached: CachedTokens) -> Tensor:
    """See ``decode.attend_cached``: [B, H, d] -> [B, H, e]."""
    size = max(1, GROUP_BYTES // (cached.slots * expanded_bytes(attention, queries.dtype)))
    if size < len(queries):
        parts = [_attend(attention, queries[i : i + size], cached.part(i, size)) for i in range(0, len(queries), size)]
        return torch.cat(parts)
    return _attend(attention, queries, cached)


def expanded_bytes(attention: Attention, dtype: torch.dtype) -> int:
    """Returns about how many bytes one cached token takes while it is read, in queries of ``dtype``."""
    config, narrow, wide = attention.config, dtype.itemsize, accumulation_dtype(dtype).itemsize
    dense = config.num_kv_heads * config.head_dim
    exact, packed = 2 * dense, 0
    if entries := getattr(attention, "entries", None):
        exact = sum(entry.rows * entry.count for entry in entries if entry.exact)
        packed = sum(entry.rows * entry.count for entry in entries if not entry.exact)
    # Codes are unpacked in 64-bit words and become float32; keys are rotated in the accumulation type.
    return 3 * narrow * exact + 28 * packed + dense * (4 * narrow + 5 * wide)


def _attend(attention: Attention, queries: Tensor, cached: CachedTokens) -> Tensor:
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
