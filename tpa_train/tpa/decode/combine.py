"""Joins what the programs of several parts of a context left: the second launch of flash-decoding."""

from __future__ import annotations

import triton
import triton.language as tl

from tpa_train.tpa.decode.chain import await_previous
from tpa_train.tpa.decode.kernel import EMPTY, split_size
from tpa_train.tpa.decode.unpacking import narrow


@triton.jit(do_not_specialize=("slots", "splits"))
def combine(
    partial, lse, out, lengths, slots, splits,
    HEADS: tl.constexpr, E: tl.constexpr, T: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
    DTYPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Σ_i 2^lse_i · partial_i / Σ_i 2^lse_i over the parts that hold tokens; grid (⌈E / BE⌉, B·H).

    Args (in memory):
        partial, lse: float32 [B, H, splits, E] and [B, H, splits], base 2.
        out: [B, H, E]; zeros where a sequence has no tokens.
    """
    place = tl.program_id(1)
    held = tl.minimum(tl.load(lengths + place // HEADS), slots)
    parts = tl.cdiv(held, tl.maximum(split_size(held, splits, T), 1))
    column = tl.program_id(0) * BE + tl.arange(0, BE)
    base = partial + place.to(tl.int64) * (splits * E)
    m = tl.full((1,), EMPTY, tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BE,), tl.float32)
    await_previous(DEPENDENT)
    for start in range(0, parts, BS):
        part = start + tl.arange(0, BS)
        keep = (part < parts)[:, None] & (column < E)[None, :]
        x = tl.load(base + part[:, None] * E + column[None, :], mask=keep, other=0.0)
        weight = tl.load(lse + place * splits + part, mask=part < parts, other=EMPTY)
        new = tl.maximum(m, tl.max(weight, 0))
        weight = tl.exp2(weight - new)
        alpha = tl.exp2(m - new)
        total = total * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(x * weight[:, None], 0)
        m = new
    x = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + place * E + column, narrow(x, DTYPE), mask=column < E)
