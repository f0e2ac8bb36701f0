"""Triton kernels of decoding: one program a sequence, a block of KV heads and a part of the context (flash-decoding).

A program goes through its part of the context in tiles of T tokens, in the order of their positions, so a ring's wrap
is never seen: position p lies in slot p modulo the slots.

``attend_direct``, here, serves keys that are cached rotated: score(h, s) = Σ_j a(s, j, h) · (q_h · row_j(s));
``packed.attend_packed`` those of them that are packed, ``rebuilt.attend_rebuilt`` and ``absorbed`` latents.

Values are Σ_j w(s, j, h) · row_j(s), with p(h, s) multiplied into the weights; a row may be a latent. See ``values``.

Shapes: B sequences, G KV heads, H query heads, d head_dim, T tokens of a tile, BH heads of a program, padded to what a
matrix product wants. PIECES: see ``unpacking``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpa_train.tpa.decode.chain import begin_next
from tpa_train.tpa.decode.unpacking import bounded, columns, dot, operand, order
from tpa_train.tpa.decode.values import UNROLLED, add_values, leave, no_values, weighted

EMPTY = tl.constexpr(float("-inf"))


@triton.jit
def split_size(held, splits, T: tl.constexpr):
    """Returns the tokens of a part of a context of ``held`` tokens: whole tiles, as even as they come."""
    return tl.cdiv(tl.cdiv(held, splits), T) * T


@triton.jit
def part_of(lengths, rows, slots, pitch, splits, HAS_ROWS: tl.constexpr, T: tl.constexpr):
    """Returns the program's tokens [begin, end) among those held, the position of the first one held, and where the
    sequence begins in the buffers."""
    b = tl.program_id(2)
    length = tl.load(lengths + b)
    held = tl.minimum(length, slots)
    size = split_size(held, splits, T)
    begin = tl.program_id(1) * size
    at = b
    if HAS_ROWS:
        at = tl.load(rows + b)
    return begin, tl.minimum(begin + size, held), length - held, at.to(tl.int64) * pitch


@triton.jit
def exponentials(s, valid, m):
    """One tile of the running softmax, base 2. Returns p [T, BH], the new maximum, and what scales the old."""
    s = tl.where(valid[:, None], s, EMPTY)
    new = tl.maximum(m, tl.max(s, 0))
    alpha = tl.exp2(m - new)
    return tl.exp2(s - new[None, :]), new, alpha


@triton.jit
def softmax(s, valid, m, total):
    """As ``exponentials``, and the new sum."""
    p, new, alpha = exponentials(s, valid, m)
    return p, new, total * alpha + tl.sum(p, 0), alpha


@triton.jit
def _query_piece(q, head, inside, d: tl.constexpr, PIECES: tl.constexpr, i: tl.constexpr, TYPE: tl.constexpr):
    """[BLOCK, BH], zero beyond the piece's numbers."""
    n = order(PIECES[7 * i + 1], PIECES[7 * i + 4])
    keep = (n < PIECES[7 * i + 2] - PIECES[7 * i + 3])[:, None] & inside[None, :]
    x = tl.load(q + (head * d)[None, :] + columns(n, PIECES, i)[:, None], mask=keep, other=0.0)
    if x.dtype != TYPE:
        x = bounded(x.to(tl.float32), TYPE)
    return x


@triton.jit
def _row_scores(
    qs, stored, sequence, slot, valid, row,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    s = tl.zeros((slot.shape[0], BH), tl.float32)
    for i in tl.static_range(len(PIECES) // 7):
        k = operand(stored, sequence, slot, valid, row, ROWS, PIECES, i, TYPE)
        s = dot(k, qs[i], s, TYPE)
    return s


@triton.jit(do_not_specialize=("slots", "pitch", "splits"))
def attend_direct(
    q, out, partial, lse, lengths, rows, stored, key_weights, value_weights, places, slots, pitch, splits, scale,
    d: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr, PER_PROGRAM: tl.constexpr,
    KEY_MODE: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_TENSOR: tl.constexpr, NORM: tl.constexpr,
    KEY_PIECES: tl.constexpr,
    VALUE_MODE: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_TENSOR: tl.constexpr, VALUE_PIECES: tl.constexpr,
    HAS_ROWS: tl.constexpr, RING: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
    KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr, DTYPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (G / PER_PROGRAM, splits, B).

    Args (in memory):
        q, out: [B, H, d], [B, H, E].
        lengths, rows: as in ``CachedTokens``; without HAS_ROWS ``rows`` is not read.
        stored: the layer's buffers, scales as int32 [rows, slots, ..., groups] (a pair of float16 each).
        key_weights, value_weights: float32 [rows, G], read in mode CONSTANT.
        places: int16 0 … 31, read where units of codes are parts of bytes; see ``values``.
    ``pitch``: tokens from one row of the buffers to the next. ``scale``: of scores, log2(e) included. NORM: tensor of
    the scores' [1, G] factors of a token, −1 without. DEPENDENT: see ``chain``.
    """
    begin_next(DEPENDENT and SPLIT)
    row = tl.program_id(0) * PER_PROGRAM
    n = tl.arange(0, BH)
    WHOLE: tl.constexpr = PER_PROGRAM == GROUPS and GROUPS & (GROUPS - 1) == 0
    if WHOLE:  # padded within every KV head
        inside = n % (BH // GROUPS) < REPEATS
        group = n // (BH // GROUPS)
        head = group * REPEATS + n % (BH // GROUPS)
    else:
        inside = n < PER_PROGRAM * REPEATS
        group = row + tl.where(inside, n, 0) // REPEATS
        head = row * REPEATS + n
    qs = ()  # asked for before the program knows its part, which takes as long to arrive
    for i in tl.static_range(len(KEY_PIECES) // 7):
        own = q + tl.program_id(2) * (GROUPS * REPEATS * d)
        qs = qs + (_query_piece(own, head, inside, d, KEY_PIECES, i, KEY_TYPE),)
    begin, end, first, sequence = part_of(lengths, rows, slots, pitch, splits, HAS_ROWS, T)
    if SPLIT:
        if begin >= end:
            return
    m = tl.full((BH,), EMPTY, tl.float32)
    total = tl.zeros((BH,), tl.float32)
    accs = no_values(VALUE_PIECES, T, BH, VALUE_TYPE, 0)
    for tile in range(begin, end, T):
        slot = tile + tl.arange(0, T)
        valid = slot < end
        if RING:
            slot = (first + slot) % slots
        if KEY_MODE == 0:
            s = _row_scores(qs, stored, sequence, slot, valid, row, KEY_ROWS, KEY_PIECES, BH, KEY_TYPE)
        else:
            s = tl.zeros((T, BH), tl.float32)
            if KEY_ROWS <= UNROLLED:
                for j in tl.static_range(KEY_ROWS):
                    x = _row_scores(qs, stored, sequence, slot, valid, j, KEY_ROWS, KEY_PIECES, BH, KEY_TYPE)
                    s += weighted(
                        x, j, stored, sequence, slot, valid, group, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_TENSOR,
                        WHOLE,
                    )  # fmt: skip
            else:
                for j in range(KEY_ROWS):
                    x = _row_scores(qs, stored, sequence, slot, valid, j, KEY_ROWS, KEY_PIECES, BH, KEY_TYPE)
                    s += weighted(
                        x, j, stored, sequence, slot, valid, group, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_TENSOR,
                        WHOLE,
                    )  # fmt: skip
        if NORM >= 0:
            s = weighted(s, 0, stored, sequence, slot, valid, group, key_weights, 2, 1, GROUPS, NORM, WHOLE)
        p, m, total, alpha = softmax(s * scale, valid, m, total)
        accs = add_values(
            accs, p, alpha, stored, sequence, slot, valid, group, row, value_weights, places,
            VALUE_MODE, VALUE_ROWS, GROUPS, VALUE_TENSOR, VALUE_PIECES, WHOLE, VALUE_TYPE, 0,
        )  # fmt: skip
    leave(
        accs, m, total, out, partial, lse, head, inside, GROUPS * REPEATS, splits, E, SPLIT, VALUE_PIECES, VALUE_TYPE,
        0, DTYPE,
    )  # fmt: skip
