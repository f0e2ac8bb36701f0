"""The decoding kernel of packed keys that are cached rotated, beside values that each KV head has its own rows of.

Keys go into products as codes, as values do (``values``): with low + scale · code for a group g of 32 numbers,
score(h, s) = Σ_g scale_g(s) (q_hg · code_g(s)) + low_g(s) Σ q_hg. The query of a head, which is alone in few of the
columns that a product has, stands in one of them for every group, with zeros for the numbers of others.

Shapes as in ``kernel``; columns as in ``values``, RH heads with padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpa_train.tpa.decode.chain import begin_next
from tpa_train.tpa.decode.kernel import EMPTY, exponentials, part_of
from tpa_train.tpa.decode.unpacking import bounded, code_piece, columns, dot, moved_by, operand, order, zeros
from tpa_train.tpa.decode.values import (
    TINY,
    add_values,
    group_of,
    head_of,
    leave,
    no_values,
    scales_of,
    spread,
    spread_groups,
)


@triton.jit
def _query_piece(
    q, head, group, inside, d: tl.constexpr, PIECES: tl.constexpr, i: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """The i-th piece of the queries: [BLOCK, BH] as codes take it, and Σ q of every column, float32 [BH]."""
    n = order(PIECES[7 * i + 1], PIECES[7 * i + 4])
    of = n // 32 if PIECES[7 * i + 1] < 16 else 0 * n
    keep = (n < PIECES[7 * i + 2] - PIECES[7 * i + 3])[:, None] & inside[None, :] & (of[:, None] == group[None, :])
    x = tl.load(q + (head * d)[None, :] + columns(n, PIECES, i)[:, None], mask=keep, other=0.0).to(tl.float32)
    if PIECES[7 * i + 1] < 16:
        by = moved_by(n, PIECES[7 * i + 1])
        x = bounded(x / by[:, None], TYPE)
        total = tl.sum(x.to(tl.float32) * by[:, None], 0)
    else:
        x = bounded(x, TYPE)
        total = tl.sum(x.to(tl.float32), 0)
    return x, total


@triton.jit
def _add_scores(
    s, q, total, stored, sequence, slot, valid, row, ROWS: tl.constexpr, PIECES: tl.constexpr, i: tl.constexpr,
    BH: tl.constexpr, RH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Adds the i-th piece's part of the scores, divided by TINY, to ``s`` [T, BH], whose groups are summed up later."""
    T: tl.constexpr = slot.shape[0]
    if PIECES[7 * i + 1] == 16:
        k = operand(stored, sequence, slot, valid, row, ROWS, PIECES, i, TYPE)
        s += dot(k, q, zeros(T, BH), TYPE) / TINY
    else:
        scale, low = scales_of(
            stored, sequence, slot, valid, row, ROWS, PIECES[7 * i], PIECES[7 * i + 2], PIECES[7 * i + 3],
            PIECES[7 * i + 4],
        )  # fmt: skip
        k = code_piece(
            stored, sequence, slot, valid, row, ROWS, PIECES[7 * i], PIECES[7 * i + 1], PIECES[7 * i + 2],
            PIECES[7 * i + 3], PIECES[7 * i + 4],
        )  # fmt: skip
        x = dot(k, q, zeros(T, BH), TYPE)
        s += x * spread_groups(scale, BH, RH) + spread_groups(low, BH, RH) * (total / TINY)[None, :]
    return s


@triton.jit(do_not_specialize=("slots", "pitch", "splits"))
def attend_packed(
    q, out, partial, lse, lengths, rows, stored, places, slots, pitch, splits, scale,
    d: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr, RH: tl.constexpr,
    KEY_ROWS: tl.constexpr, KEY_PIECES: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_PIECES: tl.constexpr,
    HAS_ROWS: tl.constexpr, RING: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
    KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr, DTYPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (G, splits, B). Arguments as of ``kernel.attend_direct``; a block of keys has at most BH / RH groups."""
    begin_next(DEPENDENT and SPLIT)
    SHARES: tl.constexpr = BH // RH
    row = tl.program_id(0)
    n = tl.arange(0, BH)
    member, group = head_of(n, BH, SHARES), group_of(n, BH, SHARES)
    inside = member < REPEATS
    head = row * REPEATS + member
    own = q + tl.program_id(2) * (GROUPS * REPEATS * d)
    qs = ()  # asked for before the program knows its part, which takes as long to arrive
    sums = ()
    for i in tl.static_range(len(KEY_PIECES) // 7):
        x, total = _query_piece(own, head, group, inside, d, KEY_PIECES, i, KEY_TYPE)
        qs = qs + (x,)
        sums = sums + (total,)
    begin, end, first, sequence = part_of(lengths, rows, slots, pitch, splits, HAS_ROWS, T)
    if SPLIT:
        if begin >= end:
            return
    m = tl.full((RH,), EMPTY, tl.float32)
    totals = zeros(T, RH)  # of every place in a tile: summed up once, at the end
    accs = no_values(VALUE_PIECES, T, BH, VALUE_TYPE, SHARES)
    for tile in range(begin, end, T):
        slot = tile + tl.arange(0, T)
        valid = slot < end
        if RING:
            slot = (first + slot) % slots
        s = zeros(T, BH)
        for i in tl.static_range(len(KEY_PIECES) // 7):
            s = _add_scores(
                s, qs[i], sums[i], stored, sequence, slot, valid, row, KEY_ROWS, KEY_PIECES, i, BH, RH, KEY_TYPE
            )  # fmt: skip
        s = tl.sum(tl.sum(tl.reshape(s, (T, BH // (2 * RH), RH, 2)), 3), 1)
        p, m, alpha = exponentials(s * (scale * TINY), valid, m)
        totals = totals * alpha[None, :] + p
        accs = add_values(
            accs, spread(p, BH, RH), tl.reshape(spread(alpha[None, :], BH, RH), (BH,)), stored, sequence, slot, valid,
            n, row, places, places, 0, VALUE_ROWS, GROUPS, -1, VALUE_PIECES, False, VALUE_TYPE, SHARES,
        )  # fmt: skip
    m = tl.reshape(spread(m[None, :], BH, RH), (BH,))
    total = tl.reshape(spread(tl.sum(totals, 0)[None, :], BH, RH), (BH,))
    leave(
        accs, m, total, out, partial, lse, head, inside, GROUPS * REPEATS, splits, E, SPLIT, VALUE_PIECES, VALUE_TYPE,
        SHARES, DTYPE,
    )  # fmt: skip
