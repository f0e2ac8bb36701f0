"""Decoding kernels of latents whose keys are never built: U is absorbed into the query, as in multi-head latent
attention (DeepSeek-V2, arXiv:2405.04434, §2.1.2), although RoPE comes between them (see ``turning``).

1. ``lay_out_queries``: P and Q of every query head, which hold U and the query;
2. ``absorb``: W = X P + Y Q, J vectors for every span of S tokens; X and Y are constants of the span;
3. ``attend_absorbed`` reads latents and W: score(t) = Σ_j φ_j(t) (W_j · c_t + a_j · k₀); values as in every kernel.

Where the FAST first pairs of a key are rebuilt, 1. also turns their queries back to the first token of every tile, 2.
leaves them out of W, and 3. adds their scores, as ``rebuilt`` has them.

Shapes as in ``kernel``, and HB half a head, padded; RH query heads of a KV head, padded; BJ = RH · J; N spans; R
numbers of a latent with its padding. No buffer is a ring: spans begin at multiples of S. DEPENDENT: see ``chain``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpa_train.tpa.decode.chain import await_previous, begin_next
from tpa_train.tpa.decode.kernel import EMPTY, exponentials, part_of
from tpa_train.tpa.decode.rebuilt import WIDE, latent, norms
from tpa_train.tpa.decode.unpacking import bounded, dot, narrow, zeros
from tpa_train.tpa.decode.values import add_values, head_of, leave, no_values, spread


@triton.jit
def _lay_out(
    q, both, along, up, offset, place, group, column, d: tl.constexpr, R: tl.constexpr, HB: tl.constexpr,
    BR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """P and Q of one query head in some columns."""
    inside = column < d // 2
    q1 = tl.load(q + place * d + column, mask=inside, other=0.0).to(tl.float32)
    q2 = tl.load(q + place * d + d // 2 + column, mask=inside, other=0.0).to(tl.float32)
    o1 = tl.load(offset + group * (2 * HB) + column)
    o2 = tl.load(offset + group * (2 * HB) + HB + column)
    tl.store(along + place * (2 * HB) + column, narrow(q1 * o1 + q2 * o2, DTYPE))
    tl.store(along + place * (2 * HB) + HB + column, narrow(q2 * o1 - q1 * o2, DTYPE))
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        keep = (r < R)[None, :]
        at = up + r[None, :] * HB + column[:, None]
        u1 = tl.load(at, mask=keep, other=0.0).to(tl.float32)
        u2 = tl.load(at + R * HB, mask=keep, other=0.0).to(tl.float32)
        to = both + place.to(tl.int64) * (2 * HB * R) + column[:, None] * R + r[None, :]
        tl.store(to, narrow(q1[:, None] * u1 + q2[:, None] * u2, DTYPE), mask=keep)
        tl.store(to + HB * R, narrow(q2[:, None] * u1 - q1[:, None] * u2, DTYPE), mask=keep)


@triton.jit
def _turn(
    q, turned, cos, sin, place, tile, tiles, d: tl.constexpr, FAST: tl.constexpr, T: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The fast pairs of one query head, turned back by the positions of the first tokens of some tiles."""
    pair = tl.arange(0, FAST)
    keep = (tile < tiles)[:, None]
    at = (tile * (T * (d // 2)))[:, None] + pair[None, :]
    c = tl.load(cos + at, mask=keep, other=0.0)
    s = tl.load(sin + at, mask=keep, other=0.0)
    q1 = tl.load(q + place * d + pair).to(tl.float32)[None, :]
    q2 = tl.load(q + place * d + d // 2 + pair).to(tl.float32)[None, :]
    to = turned + place.to(tl.int64) * tiles * (2 * FAST) + (tile * (2 * FAST))[:, None]
    both = narrow(tl.interleave(q1 * c + q2 * s, q2 * c - q1 * s), DTYPE)
    tl.store(to + tl.arange(0, 2 * FAST)[None, :], both, mask=keep)


@triton.jit(do_not_specialize=("tiles",))
def lay_out_queries(
    q, both, along, up, offset, turned, cos, sin, lengths, tiles,
    d: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr, OWN_UP: tl.constexpr, R: tl.constexpr,
    FAST: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
    DTYPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid ((HB − FAST) / BK and, with fast pairs, ⌈tiles / BT⌉ more, H, B).

    Args (in memory):
        q: [B, H, d].
        both: written, P and Q, [B, H, 2, HB, R]; those of fast pairs are left as they are.
        along: written, the same of the offset k₀ instead of U, [B, H, 2, HB].
        up: U in both halves, [G or 1, 2, R, HB].
        offset: keys of a zero latent, float32 [G, 2, HB].
        turned: written, [B, H, tiles, FAST, 2]; tiles beyond ``lengths`` are left as they are.
        cos, sin: of the positions that tokens have, float32 [capacity, d/2].
    """
    begin_next(DEPENDENT)
    head, sequence = tl.program_id(1), tl.program_id(2)
    group = head // REPEATS
    place = sequence * (GROUPS * REPEATS) + head
    BLOCKS: tl.constexpr = (HB - FAST) // BK
    if tl.program_id(0) < BLOCKS:
        column = FAST + tl.program_id(0) * BK + tl.arange(0, BK)
        own = up
        if OWN_UP:
            own += group * (2 * R * HB)
        _lay_out(q, both, along, own, offset, place, group, column, d, R, HB, BR, DTYPE)
    elif FAST > 0:
        first = (tl.program_id(0) - BLOCKS) * BT
        if first * T < tl.load(lengths + sequence):
            _turn(q, turned, cos, sin, place, first + tl.arange(0, BT), tiles, d, FAST, T, DTYPE)


@triton.jit(do_not_specialize=("spans",))
def absorb(
    both, along, turns, w, bias, lengths, spans, J: tl.constexpr, S: tl.constexpr, CENTERED: tl.constexpr,
    R: tl.constexpr, FAST: tl.constexpr, HB: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KEY_TYPE: tl.constexpr, DTYPE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (⌈N · J / BM⌉, H / HEADS · BLOCKS, B): one product [BM, 2 (HB − FAST)] [2 (HB − FAST), HEADS · R], since
    all heads take the same left side; or, of a head with a wide latent, BN of its numbers in each of some BLOCKS.

    Args (in memory):
        both, along: of ``lay_out_queries``; ``along`` is not read where keys are CENTERED.
        turns: X and Y of every span, [N, J, 2 HB].
        w, bias: written, [B, H, N, J, R] and float32 [B, H, N, J].
        lengths: as in ``CachedTokens``; spans beyond it are left as they are.
    """
    begin_next(DEPENDENT)
    if tl.program_id(0) * BM // J * S >= tl.load(lengths + tl.program_id(2)):
        await_previous(DEPENDENT)
        return
    block = tl.program_id(1) % BLOCKS
    first = (tl.program_id(2) * (tl.num_programs(1) // BLOCKS) + tl.program_id(1) // BLOCKS) * HEADS
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    kept = row < spans * J
    n, k, member = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, 16)
    place, r = first + n // (BN // HEADS), block * BN + n % (BN // HEADS)
    narrower = (r < R)[None, :]
    at_turns = turns + tl.where(kept, row, 0)[:, None] * (2 * HB) + k[None, :]
    at_both = both + (place.to(tl.int64) * (2 * HB * R) + r)[None, :] + k[:, None] * R
    at_along = along + ((first + member) * (2 * HB))[None, :] + k[:, None]
    total, base = zeros(BM, BN), zeros(BM, 16)
    await_previous(DEPENDENT)
    for column in range(0, 2 * (HB - FAST), BK):
        start = column + FAST + (column >= HB - FAST) * FAST
        x = tl.load(at_turns + start)
        total = dot(x, tl.load(at_both + start * R, mask=narrower, other=0.0), total, DTYPE)
        if not CENTERED:
            base = dot(x, tl.load(at_along + start, mask=(member < HEADS)[None, :], other=0.0), base, DTYPE)
    if not CENTERED:
        at = (first + member).to(tl.int64)[None, :] * spans * J + row[:, None]
        tl.store(bias + at, base, mask=kept[:, None] & (member < HEADS)[None, :])
    at = place.to(tl.int64)[None, :] * spans * J + row[:, None]
    tl.store(w + at * R + r[None, :], bounded(total, KEY_TYPE), mask=kept[:, None] & narrower)


@triton.jit(do_not_specialize=("slots", "pitch", "splits", "spans", "tiles"))
def attend_absorbed(
    out, partial, lse, lengths, rows, stored, key_weights, value_weights, places, w, bias, basis, turned, up, offset,
    table, slots, pitch, splits, scale, spans, tiles, E: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr,
    KEY_MODE: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_PIECES: tl.constexpr, NORM: tl.constexpr,
    J: tl.constexpr, RH: tl.constexpr, S: tl.constexpr, CENTERED: tl.constexpr, R: tl.constexpr,
    JOINED: tl.constexpr, FAST: tl.constexpr, KEPT: tl.constexpr, OWN_UP: tl.constexpr, HB: tl.constexpr,
    VALUE_MODE: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_TENSOR: tl.constexpr, VALUE_PIECES: tl.constexpr,
    HAS_ROWS: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
    KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr, DTYPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (G, splits, B). As ``kernel.attend_direct``, and

    Args (in memory):
        w, bias: of ``absorb``.
        basis: φ [S, J], S a multiple of T.
        turned: of ``lay_out_queries``; this and the next three are read with FAST pairs only.
        up, offset: as there.
        table: cos and sin of the positions 0 … T − 1, [T, FAST, 2].
    NORM: tensor of factors [1, G] of a token that its scores take, −1 without.
    KEPT: whether the table is kept in registers.
    JOINED: KV heads whose latents, side by side, are one row; GROUPS, REPEATS, RH and PIECES count such rows.
    """
    begin_next(DEPENDENT and SPLIT)
    begin, end, _, sequence = part_of(lengths, rows, slots, pitch, splits, HAS_ROWS, T)
    if SPLIT:
        if begin >= end:
            await_previous(DEPENDENT)
            return
    row = tl.program_id(0)
    # Columns of W are two terms of every head, then two more: a thread has all of a head's in a product's result.
    column = tl.arange(0, RH * J)
    member, term = column // 2 % RH, column // (2 * RH) * 2 + column % 2
    # Of heads that only fill a product, the first stands for all.
    head = (tl.program_id(2) * GROUPS + row) * REPEATS + tl.where(member < REPEATS, member, 0)
    at_bias = bias + head.to(tl.int64) * spans * J + term
    at_w = w + ((head.to(tl.int64) * spans * J + term) * R)[None, :]
    owner = member // (RH // JOINED)  # of the joined KV heads
    at_basis = basis + tl.arange(0, T)[:, None] * J + tl.arange(0, J)[None, :]
    COUNT: tl.constexpr = len(KEY_PIECES) // 7
    JOINT: tl.constexpr = KEY_PIECES[0] == VALUE_PIECES[0]
    TOGETHER: tl.constexpr = FAST > 0 and R > WIDE
    SHARES: tl.constexpr = BH // RH
    ups = ()
    if FAST > 0:
        # Both numbers of a pair lie side by side, and so in one thread.
        place = tl.arange(0, 2 * FAST)
        if OWN_UP:
            up += row * (2 * R * HB)
        at_up = up + (place % 2 * (R * HB) + place // 2)[None, :]
        for i in tl.static_range(COUNT):
            k = KEY_PIECES[7 * i + 6] + tl.arange(0, KEY_PIECES[7 * i + 4])
            ups = ups + (tl.load(at_up + k[:, None] * HB),)
        origin = tl.load(offset + row * (2 * HB) + place % 2 * HB + place // 2)[None, :]
        at_table = table + tl.arange(0, T)[:, None] * (2 * FAST) + place[None, :]
        if KEPT:
            angles = tl.load(at_table)
        # Of the columns that a head has in the smallest product, all but the first are zero.
        QS: tl.constexpr = 2 * RH if RH > 8 else 16
        column = tl.arange(0, QS)
        once = ((column // (2 * RH) == 0) & (column % 2 == 0))[None, :]
        member = tl.where(column // 2 % RH < REPEATS, column // 2 % RH, 0)
        head = (tl.program_id(2) * GROUPS + row) * REPEATS + member
        at_turned = turned + (head.to(tl.int64) * tiles * (2 * FAST))[None, :] + place[:, None]
    m = tl.full((RH,), EMPTY, tl.float32)
    totals = zeros(T, RH)  # of every place in a tile: summed up once, at the end
    accs = no_values(VALUE_PIECES, T, BH, VALUE_TYPE, SHARES)
    at = begin + tl.arange(0, T)
    factor = norms(stored, sequence, at, at < end, row, GROUPS, NORM)
    await_previous(DEPENDENT)  # W, its bias and the turned queries are read from here on
    if not CENTERED:  # as ``norms``, read a tile ahead
        shift = tl.load(at_bias + begin // S * J)
    for tile in range(begin, end, T):
        slot = tile + tl.arange(0, T)
        valid = slot < end
        following = norms(stored, sequence, slot + T, slot + T < end, row, GROUPS, NORM)
        span = tile // S
        if not CENTERED:
            ahead = tl.load(at_bias + tl.minimum((tile + T) // S, spans - 1) * J)
        x = zeros(T, RH * J)
        keys = zeros(T, 2 * FAST) if FAST > 0 else 0.0
        cs = ()
        for i in tl.static_range(COUNT):
            c = latent(
                stored, sequence, slot, valid, row, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_PIECES, i, KEY_TYPE
            )
            k = KEY_PIECES[7 * i + 6] + tl.arange(0, KEY_PIECES[7 * i + 4])
            if JOINED > 1:
                at_own = at_w + k[:, None] - (owner * R)[None, :] + span * (J * R)
                x = dot(c, tl.load(at_own, mask=k[:, None] // R == owner[None, :], other=0.0), x, KEY_TYPE)
            else:
                x = dot(c, tl.load(at_w + k[:, None] + span * (J * R)), x, KEY_TYPE)
            if TOGETHER:
                keys = dot(c, ups[i], keys, KEY_TYPE)
            else:
                cs = cs + (c,)
        if not CENTERED:
            x += shift[None, :]
            shift = ahead
        phi = tl.load(at_basis + tile % S * J).to(tl.float32)
        x = tl.reshape(x, (T, J // 2, RH, 2)) * tl.reshape(phi, (T, J // 2, 1, 2))
        s = tl.sum(tl.sum(x, 3), 1)
        if FAST > 0:
            for i in tl.static_range(0 if TOGETHER else COUNT):
                keys = dot(cs[i], ups[i], keys, KEY_TYPE)
            if not CENTERED:
                keys += origin
            if not KEPT:  # not loaded before the loop: see ``rebuilt``
                angles = tl.load(at_table + tl.multiple_of((tile - begin) % T, 4))
            k1, k2 = tl.split(tl.reshape(keys, (T, FAST, 2)))
            cos, sin = tl.split(tl.reshape(angles.to(tl.float32), (T, FAST, 2)))
            keys = narrow(tl.interleave(k1 * cos - k2 * sin, k2 * cos + k1 * sin), DTYPE)
            queries = tl.load(at_turned + tile // T * (2 * FAST), mask=once, other=0.0)
            x = dot(keys, queries, zeros(T, QS), DTYPE)
            s += tl.sum(tl.sum(tl.reshape(x, (T, QS // (2 * RH), RH, 2)), 3), 1)
        if NORM >= 0:
            s *= factor[:, None]
        p, m, alpha = exponentials(s * scale, valid, m)
        totals = totals * alpha[None, :] + p
        again = sequence + tl.multiple_of((tile - begin) % T, 16) if JOINT and R > WIDE else sequence
        accs = add_values(
            accs, spread(p, BH, RH), tl.reshape(spread(alpha[None, :], BH, RH), (BH,)), stored, again, slot, valid,
            row, row if VALUE_ROWS > 1 else 0, value_weights, places,
            VALUE_MODE, VALUE_ROWS, GROUPS, VALUE_TENSOR, VALUE_PIECES, False, VALUE_TYPE, SHARES,
        )  # fmt: skip
        factor = following
    n = head_of(tl.arange(0, BH), BH, SHARES)
    m = tl.reshape(spread(m[None, :], BH, RH), (BH,))
    total = tl.reshape(spread(tl.sum(totals, 0)[None, :], BH, RH), (BH,))
    leave(
        accs, m, total, out, partial, lse, row * REPEATS + n, n < REPEATS, GROUPS * REPEATS, splits, E, SPLIT,
        VALUE_PIECES, VALUE_TYPE, SHARES, DTYPE, REPEATS // JOINED if JOINED > 1 else 0,
    )  # fmt: skip
