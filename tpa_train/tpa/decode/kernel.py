"""Triton kernels of decoding: one program a sequence, a block of KV heads and a part of the context (flash-decoding).

A program goes through its part of the context in tiles of T tokens, in the order of their positions, so a ring's wrap
is never seen: position p lies in slot p modulo the slots.

``attend_direct`` serves keys that are cached rotated: score(h, s) = Σ_j a(s, j, h) · (q_h · row_j(s)).
``attend_rebuilt`` serves latents, whose keys U c + k₀ exist only as a tile [T, d]. Their RoPE needs no table of the
whole context: the query is rotated back by the position of the tile's first token, and a table of T relative positions
serves every tile.

Values are Σ_j w(s, j, h) · row_j(s), with p(h, s) multiplied into the weights; a row may be a latent.

Shapes: B sequences, G KV heads, H query heads, d head_dim, T tokens of a tile, BH heads of a program and HB half a
head, padded to what a matrix product wants. PIECES: see ``unpacking``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpa_train.tpa.decode import plan
from tpa_train.tpa.decode.unpacking import dot, load_piece, narrow, operand, zeros

UNROLLED = tl.constexpr(plan.UNROLLED)  # more rows than this are a loop of their own
EMPTY = tl.constexpr(float("-inf"))


@triton.jit
def _weighted(
    x, j, stored, sequence, slot, valid, group, constants,
    MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, TENSOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Multiplies ``x`` [T, BH] by the weights of row ``j`` for every token and head.

    ONE_HOT: rows are KV heads. CACHED: [R, G] numbers of the token. CONSTANT: ``constants`` [rows, G].
    WHOLE: the heads are those of all KV heads in turn, equally many each; their numbers are read as they lie, in words.
    """
    if MODE == 1:
        x = tl.where((group == j)[None, :], x, 0.0)
    elif MODE == 2:
        base = stored[TENSOR] + sequence * (ROWS * GROUPS) + j * GROUPS
        if WHOLE:
            at = (slot * (ROWS * GROUPS))[:, None] + tl.arange(0, GROUPS)[None, :]
            w = tl.load(base + at, mask=valid[:, None], other=0.0)
            w = tl.broadcast_to(w[:, :, None], (x.shape[0], GROUPS, x.shape[1] // GROUPS))
            x = x * tl.reshape(w, (x.shape[0], x.shape[1])).to(tl.float32)
        else:
            at = (slot * (ROWS * GROUPS))[:, None] + group[None, :]
            x = x * tl.load(base + at, mask=valid[:, None], other=0.0).to(tl.float32)
    elif MODE == 3:
        x = x * tl.load(constants + j * GROUPS + group)[None, :]
    return x


@triton.jit
def _no_values(PIECES: tl.constexpr, BH: tl.constexpr):
    accs = ()
    for i in tl.static_range(len(PIECES) // 7):
        accs = accs + (zeros(BH, PIECES[7 * i + 4]),)
    return accs


@triton.jit
def _add_row(
    accs, weights, stored, sequence, slot, valid, row,
    ROWS: tl.constexpr, PIECES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds Σ_s weights[s, h] · row(s) to the accumulators [BH, BLOCK]."""
    left = narrow(tl.trans(weights), DTYPE)
    new = ()
    for i in tl.static_range(len(PIECES) // 7):
        x = operand(stored, sequence, slot, valid, row, ROWS, PIECES, i, DTYPE)
        new = new + (dot(left, x, accs[i], DTYPE),)
    return new


@triton.jit
def _add_values(
    accs, p, alpha, stored, sequence, slot, valid, group, row, constants,
    MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, TENSOR: tl.constexpr, PIECES: tl.constexpr,
    WHOLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Scales the accumulators by ``alpha`` [BH] and adds the values of a tile, weighted by ``p`` [T, BH]."""
    new = ()
    for i in tl.static_range(len(PIECES) // 7):
        new = new + (accs[i] * alpha[:, None],)
    if MODE == 0:
        new = _add_row(new, p, stored, sequence, slot, valid, row, ROWS, PIECES, DTYPE)
    elif ROWS <= UNROLLED:
        for j in tl.static_range(ROWS):
            w = _weighted(p, j, stored, sequence, slot, valid, group, constants, MODE, ROWS, GROUPS, TENSOR, WHOLE)
            new = _add_row(new, w, stored, sequence, slot, valid, j, ROWS, PIECES, DTYPE)
    else:
        for j in range(ROWS):
            w = _weighted(p, j, stored, sequence, slot, valid, group, constants, MODE, ROWS, GROUPS, TENSOR, WHOLE)
            new = _add_row(new, w, stored, sequence, slot, valid, j, ROWS, PIECES, DTYPE)
    return new


@triton.jit
def split_size(held, splits, T: tl.constexpr):
    """Returns the tokens of a part of a context of ``held`` tokens: whole tiles, as even as they come."""
    return tl.cdiv(tl.cdiv(held, splits), T) * T


@triton.jit
def _part(lengths, rows, slots, pitch, splits, HAS_ROWS: tl.constexpr, T: tl.constexpr):
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
def _softmax(s, valid, m, total):
    """One tile of the running softmax, base 2. Returns p [T, BH], the new maximum and sum, and what scales the old."""
    s = tl.where(valid[:, None], s, EMPTY)
    new = tl.maximum(m, tl.max(s, 0))
    alpha = tl.exp2(m - new)
    p = tl.exp2(s - new[None, :])
    return p, new, total * alpha + tl.sum(p, 0), alpha


@triton.jit
def _leave(
    accs, m, total, out, partial, lse, head, inside, heads, splits,
    E: tl.constexpr, SPLIT: tl.constexpr, PIECES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the result [B, H, E]; of several splits, float32 [B, H, splits, E] and the log-sum-exp of each, base 2."""
    place = tl.program_id(2) * heads + head
    scale = 1.0 / tl.where(total > 0, total, 1.0)
    if SPLIT:
        tl.store(lse + place * splits + tl.program_id(1), m + tl.log2(total), mask=inside)
    for i in tl.static_range(len(PIECES) // 7):
        # Of the columns that are stored, those of the piece.
        column = PIECES[7 * i + 5] + tl.arange(0, PIECES[7 * i + 4])
        keep = inside[:, None] & (tl.arange(0, PIECES[7 * i + 4]) < PIECES[7 * i + 2] - PIECES[7 * i + 3])[None, :]
        x = accs[i] * scale[:, None]
        if SPLIT:
            at = (place.to(tl.int64) * splits + tl.program_id(1)) * E
            tl.store(partial + at[:, None] + column[None, :], x, mask=keep)
        else:
            at = place.to(tl.int64) * E
            tl.store(out + at[:, None] + column[None, :], narrow(x, DTYPE), mask=keep)


@triton.jit
def _query_piece(q, head, inside, d: tl.constexpr, PIECES: tl.constexpr, i: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK, BH], zero beyond the piece's numbers."""
    n = tl.arange(0, PIECES[7 * i + 4])
    keep = (n < PIECES[7 * i + 2] - PIECES[7 * i + 3])[:, None] & inside[None, :]
    x = tl.load(q + (head * d)[None, :] + (PIECES[7 * i + 5] + n)[:, None], mask=keep, other=0.0)
    return x


@triton.jit
def _row_scores(
    qs, stored, sequence, slot, valid, row,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    s = tl.zeros((slot.shape[0], BH), tl.float32)
    for i in tl.static_range(len(PIECES) // 7):
        k = operand(stored, sequence, slot, valid, row, ROWS, PIECES, i, DTYPE)
        s = dot(k, qs[i], s, DTYPE)
    return s


@triton.jit(do_not_specialize=("slots", "pitch", "splits"))
def attend_direct(
    q, out, partial, lse, lengths, rows, stored, key_weights, value_weights, slots, pitch, splits, scale,
    d: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr, PER_PROGRAM: tl.constexpr,
    KEY_MODE: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_TENSOR: tl.constexpr, NORM: tl.constexpr,
    KEY_PIECES: tl.constexpr,
    VALUE_MODE: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_TENSOR: tl.constexpr, VALUE_PIECES: tl.constexpr,
    HAS_ROWS: tl.constexpr, RING: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (G / PER_PROGRAM, splits, B).

    Args (in memory):
        q, out: [B, H, d], [B, H, E].
        lengths, rows: as in ``CachedTokens``; without HAS_ROWS ``rows`` is not read.
        stored: the layer's buffers, scales as int32 [rows, slots, ..., groups] (a pair of float16 each).
        key_weights, value_weights: float32 [rows, G], read in mode CONSTANT.
    ``pitch``: tokens from one row of the buffers to the next. ``scale``: of scores, log2(e) included. NORM: tensor of
    the scores' [1, G] factors of a token, −1 without.
    """
    begin, end, first, sequence = _part(lengths, rows, slots, pitch, splits, HAS_ROWS, T)
    if SPLIT:
        if begin >= end:
            return
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
    qs = ()
    for i in tl.static_range(len(KEY_PIECES) // 7):
        qs = qs + (_query_piece(q + tl.program_id(2) * (GROUPS * REPEATS * d), head, inside, d, KEY_PIECES, i, DTYPE),)
    m = tl.full((BH,), EMPTY, tl.float32)
    total = tl.zeros((BH,), tl.float32)
    accs = _no_values(VALUE_PIECES, BH)
    for tile in range(begin, end, T):
        slot = tile + tl.arange(0, T)
        valid = slot < end
        if RING:
            slot = (first + slot) % slots
        if KEY_MODE == 0:
            s = _row_scores(qs, stored, sequence, slot, valid, row, KEY_ROWS, KEY_PIECES, BH, DTYPE)
        else:
            s = tl.zeros((T, BH), tl.float32)
            if KEY_ROWS <= UNROLLED:
                for j in tl.static_range(KEY_ROWS):
                    x = _row_scores(qs, stored, sequence, slot, valid, j, KEY_ROWS, KEY_PIECES, BH, DTYPE)
                    s += _weighted(
                        x, j, stored, sequence, slot, valid, group, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_TENSOR,
                        WHOLE,
                    )  # fmt: skip
            else:
                for j in range(KEY_ROWS):
                    x = _row_scores(qs, stored, sequence, slot, valid, j, KEY_ROWS, KEY_PIECES, BH, DTYPE)
                    s += _weighted(
                        x, j, stored, sequence, slot, valid, group, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_TENSOR,
                        WHOLE,
                    )  # fmt: skip
        if NORM >= 0:
            s = _weighted(s, 0, stored, sequence, slot, valid, group, key_weights, 2, 1, GROUPS, NORM, WHOLE)
        p, m, total, alpha = _softmax(s * scale, valid, m, total)
        accs = _add_values(
            accs, p, alpha, stored, sequence, slot, valid, group, row, value_weights,
            VALUE_MODE, VALUE_ROWS, GROUPS, VALUE_TENSOR, VALUE_PIECES, WHOLE, DTYPE,
        )  # fmt: skip
    _leave(accs, m, total, out, partial, lse, head, inside, GROUPS * REPEATS, splits, E, SPLIT, VALUE_PIECES, DTYPE)


@triton.jit
def _up_piece(up, column, PIECES: tl.constexpr, i: tl.constexpr, HB: tl.constexpr):
    """Columns of half of U for one piece, [BLOCK, HC]; ``up`` holds blocks that are padded with zeros."""
    n = PIECES[7 * i + 6] + tl.arange(0, PIECES[7 * i + 4])
    return tl.load(up + n[:, None] * HB + column[None, :])


@triton.jit
def _half_keys(
    cs, ups, up, offset, column, FIRST: tl.constexpr, RESIDENT: tl.constexpr, PIECES: tl.constexpr, HB: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Some columns of half of the keys, float32 [T, HC], from the latents' pieces ``cs``."""
    k = zeros(cs[0].shape[0], column.shape[0]) + tl.load(offset + column)[None, :]
    for i in tl.static_range(len(PIECES) // 7):
        if RESIDENT:
            k = dot(cs[i], ups[FIRST + i], k, DTYPE)
        else:
            k = dot(cs[i], _up_piece(up, column, PIECES, i, HB), k, DTYPE)
    return k


@triton.jit
def _latent(
    stored, sequence, slot, valid, row, mix, MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    PIECES: tl.constexpr, i: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The i-th piece of a KV head's latents, [T, BLOCK]; in mode CONSTANT mixed of all rows by ``mix`` [rows, G]."""
    if MODE == 3:
        x = zeros(slot.shape[0], PIECES[7 * i + 4])
        for j in tl.static_range(ROWS):
            part = load_piece(
                stored, sequence, slot, valid, j, ROWS, PIECES[7 * i], PIECES[7 * i + 1], PIECES[7 * i + 2],
                PIECES[7 * i + 3], PIECES[7 * i + 4],
            )  # fmt: skip
            x += part.to(tl.float32) * tl.load(mix + j * GROUPS + row)
        x = narrow(x, DTYPE)
    else:
        if ROWS == 1:
            row = 0
        x = operand(stored, sequence, slot, valid, row, ROWS, PIECES, i, DTYPE)
    return x


@triton.jit
def _keys_at_once(
    stored, sequence, slot, valid, row, mix, ups, up, offset, column, MODE: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, RESIDENT: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr, HB: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Both halves of the keys, float32 [T, HB]: a piece of the latents is used up before the next is read."""
    k1 = zeros(slot.shape[0], HB) + tl.load(offset + column)[None, :]
    k2 = zeros(slot.shape[0], HB) + tl.load(offset + HB + column)[None, :]
    COUNT: tl.constexpr = len(PIECES) // 7
    for i in tl.static_range(COUNT):
        c = _latent(stored, sequence, slot, valid, row, mix, MODE, ROWS, GROUPS, PIECES, i, DTYPE)
        if RESIDENT:
            k1 = dot(c, ups[i], k1, DTYPE)
            k2 = dot(c, ups[COUNT + i], k2, DTYPE)
        else:
            k1 = dot(c, _up_piece(up, column, PIECES, i, HB), k1, DTYPE)
            k2 = dot(c, _up_piece(up + WIDTH * HB, column, PIECES, i, HB), k2, DTYPE)
    return k1, k2


@triton.jit(do_not_specialize=("slots", "pitch", "splits"))
def attend_rebuilt(
    q, out, partial, lse, lengths, rows, stored, key_weights, value_weights, up, offset, gamma, relative, cos, sin,
    slots, pitch, splits, scale, eps,
    d: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr,
    KEY_MODE: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_PIECES: tl.constexpr, NORM: tl.constexpr,
    OWN_UP: tl.constexpr, HAS_RMS: tl.constexpr, RESIDENT: tl.constexpr, WIDTH: tl.constexpr, LONGEST: tl.constexpr,
    VALUE_MODE: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_TENSOR: tl.constexpr, VALUE_PIECES: tl.constexpr,
    HAS_ROWS: tl.constexpr, RING: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
    HB: tl.constexpr, HC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (G, splits, B); keys are rebuilt HC columns of each half at a time. As ``attend_direct``, and

    Args (in memory):
        up: U (with 1 + w, where the latents are normalised) in both halves, [G or 1, 2, WIDTH, HB].
        offset: keys of a zero latent, float32 [G, 2, HB].
        gamma: 1 + w, float32 [2, HB]; read with HAS_RMS, where keys are normalised here (``eps``).
        relative: cos and sin of the positions 0 … LONGEST − 1, [2, LONGEST, HB].
        cos, sin: of the positions that tokens have, float32 [capacity, d/2].
    NORM: tensor of factors [1, G] of a token that its scores take, −1 without.
    """
    begin, end, first, sequence = _part(lengths, rows, slots, pitch, splits, HAS_ROWS, T)
    if SPLIT:
        if begin >= end:
            return
    row = tl.program_id(0)
    n = tl.arange(0, BH)
    inside = n < REPEATS
    group = row + 0 * n
    head = row * REPEATS + n
    if OWN_UP:
        up += row * (2 * WIDTH * HB)
    offset += row * (2 * HB)
    at_q = q + ((tl.program_id(2) * GROUPS * REPEATS + head) * d)[None, :]
    COUNT: tl.constexpr = len(KEY_PIECES) // 7
    qs = ()  # both halves of HC columns, then of the next
    ups = ()
    for b in tl.static_range(HB // HC):
        column = b * HC + tl.arange(0, HC)
        keep = (column < d // 2)[:, None] & inside[None, :]
        for part in tl.static_range(2):
            x = tl.load(at_q + (part * (d // 2) + column)[:, None], mask=keep, other=0.0)
            qs = qs + (x,)
            if RESIDENT:
                for i in tl.static_range(COUNT):
                    ups = ups + (_up_piece(up + part * (WIDTH * HB), column, KEY_PIECES, i, HB),)
    at_table = relative + tl.arange(0, T)[:, None] * HB
    m = tl.full((BH,), EMPTY, tl.float32)
    total = tl.zeros((BH,), tl.float32)
    accs = _no_values(VALUE_PIECES, BH)
    for tile in range(begin, end, T):
        slot = tile + tl.arange(0, T)
        valid = slot < end
        if RING:
            slot = (first + slot) % slots
        cs = ()  # where the keys come in several blocks of columns, which all need the latents
        for i in tl.static_range(COUNT if HC < HB else 0):
            c = _latent(
                stored, sequence, slot, valid, row, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_PIECES, i, DTYPE
            )
            cs = cs + (c,)
        # Zero, which the compiler does not know: or it would load constants before the loop, into more registers than
        # there are. The table is declared as aligned to 8 bytes only: copies of 16 bypass the L1 cache, its place.
        zero = tl.multiple_of((tile - begin) % T, 16)
        shift = tl.multiple_of((tile - begin) % T, 4)
        s = tl.zeros((T, BH), tl.float32)
        square = tl.zeros((T,), tl.float32)
        for b in tl.static_range(HB // HC):
            column = b * HC + tl.arange(0, HC)
            u, o = up + zero, offset + zero
            if HC < HB:
                k1 = _half_keys(cs, ups, u, o, column, 2 * b * COUNT, RESIDENT, KEY_PIECES, HB, DTYPE)
                u, o = u + WIDTH * HB, o + HB
                k2 = _half_keys(cs, ups, u, o, column, (2 * b + 1) * COUNT, RESIDENT, KEY_PIECES, HB, DTYPE)
            else:
                k1, k2 = _keys_at_once(
                    stored, sequence, slot, valid, row, key_weights, ups, u, o, column, KEY_MODE, KEY_ROWS, GROUPS,
                    RESIDENT, KEY_PIECES, WIDTH, HB, DTYPE,
                )  # fmt: skip
            if HAS_RMS:
                square += tl.sum(k1 * k1, 1) + tl.sum(k2 * k2, 1)
                k1 *= tl.load(gamma + zero + column)[None, :]
                k2 *= tl.load(gamma + zero + HB + column)[None, :]
            c1 = tl.load(at_table + column[None, :] + shift).to(tl.float32)
            s1 = tl.load(at_table + LONGEST * HB + column[None, :] + shift).to(tl.float32)
            low = column < d // 2
            base = (first + tile) * (d // 2) + column
            cb = tl.load(cos + base, mask=low, other=0.0)[:, None]
            sb = tl.load(sin + base, mask=low, other=0.0)[:, None]
            q1 = qs[2 * b].to(tl.float32)
            q2 = qs[2 * b + 1].to(tl.float32)
            s = dot(narrow(k1 * c1 - k2 * s1, DTYPE), narrow(q1 * cb + q2 * sb, DTYPE), s, DTYPE)
            s = dot(narrow(k2 * c1 + k1 * s1, DTYPE), narrow(q2 * cb - q1 * sb, DTYPE), s, DTYPE)
        if HAS_RMS:
            s *= tl.rsqrt(square / d + eps)[:, None]
        if NORM >= 0:
            s = _weighted(s, 0, stored, sequence, slot, valid, group, key_weights, 2, 1, GROUPS, NORM, False)
        p, m, total, alpha = _softmax(s * scale, valid, m, total)
        # Wide joint latents are read twice: kept for the values, they would fill the registers.
        again = sequence + zero if WIDTH > 192 else sequence
        accs = _add_values(
            accs, p, alpha, stored, again, slot, valid, group, row if VALUE_ROWS > 1 else 0, value_weights,
            VALUE_MODE, VALUE_ROWS, GROUPS, VALUE_TENSOR, VALUE_PIECES, False, DTYPE,
        )  # fmt: skip
    _leave(accs, m, total, out, partial, lse, head, inside, GROUPS * REPEATS, splits, E, SPLIT, VALUE_PIECES, DTYPE)
