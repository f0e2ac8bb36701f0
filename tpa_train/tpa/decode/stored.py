"""Keys and values that are cached as they are: a library's kernel attends to them, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_train.gemma3.attention import Attention, sdpa
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.decode.cached import CachedTokens
from tpa_train.tpa.forms.latent import DenseKeys, DenseValues, LatentValues


def plain(queries: Tensor) -> bool:
    """Returns whether queries are such that the kernels of a CPU take them: on one, and no gradient is wanted."""
    if queries.device.type != "cpu" or queries.dtype not in (torch.float32, torch.bfloat16):
        return False
    return not (torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and queries.requires_grad))


def are_stored(attention: Attention) -> bool:
    """Returns whether a layer's keys and values (or latents, if attention runs on those) are cached as they are."""
    if not isinstance(attention, FactorizedAttention):
        return type(attention) is Attention
    forms = isinstance(attention.keys, DenseKeys) and isinstance(attention.values, (DenseValues, LatentValues))
    return forms and all(entry.exact for entry in attention.entries)


def attend_stored(attention: Attention, queries: Tensor, cached: CachedTokens) -> Tensor:
    """See ``decode.attend_cached``: [B, H, d] -> [B, H, e]. Only where they ``are_stored`` and queries are ``plain``.

    A group's query heads are its queries: each key is read once for all of them.
    """
    lengths = cached.lengths.tolist()
    rows = range(len(lengths)) if cached.rows is None else cached.rows.tolist()
    keys, values = cached.stored
    queries = queries.unflatten(1, (keys.shape[2], -1)).transpose(1, 2)  # [B, H/G, G, d]
    if cached.rows is None and len(set(lengths)) == 1 and lengths[0]:
        parts = [(slice(0, len(lengths)), slice(0, len(lengths)), lengths[0])]
    else:
        parts = [(slice(i, i + 1), slice(r, r + 1), n) for i, (r, n) in enumerate(zip(rows, lengths, strict=True))]
    out = queries.new_zeros(len(lengths), *queries.shape[1:3], values.shape[-1])
    for mine, row, length in parts:
        if length:
            k, v = (t[row, :length].to(queries.dtype) for t in (keys, values))
            out[mine] = sdpa(queries[mine], k, v, attention.config.scale)
    return out.transpose(1, 2).flatten(1, 2)
