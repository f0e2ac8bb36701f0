"""Triton kernels of decoding: one program a sequence, a block of KV heads and a part of the context (flash-decoding).

A program goes through its part of the context in tiles of T tokens, in the order of their positions, so a ring's wrap
is never seen: position p lies in slot p modulo the slots. What is quantized is unpacked in registers.

``attend_direct`` serves keys that are cached rotated: score(h, s) = Σ_j a(s, j, h) · (q_h · row_j(s)).
``attend_rebuilt`` serves latents, whose keys U c + k₀ exist only as a tile [T, d]. Their RoPE needs no table of the whole
context: the query is rotated back by the position of the tile's first token, and a table of T relative positions serves
every tile.

Values are Σ_j w(s, j, h) · row_j(s), with p(h, s) multiplied into the weights; a row may be a latent.

Shapes: B sequences, G KV heads, H query heads, d head_dim, T tokens of a tile, BH heads of a program and HB half a
head, padded to what a matrix product wants. The last dimension of an entry is read in ``PIECES``, seven whole numbers each:
tensor, bits, numbers of its row, first number, BLOCK, column in the entry, column where all blocks are padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
OWN, ONE_HOT, CACHED, CONSTANT = 0, 1, 2, 3  # whose weights the rows of a sum have: ``_weighted``
UNROLLED = tl.constexpr(4)  # more rows than this are a loop of their own
EMPTY = tl.constexpr(float("-inf"))


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    """Rounds float32 to the operands' type."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter cannot multiply it, and truncates to it
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = x.to(DTYPE)
    return x


@triton.jit
def _dot(a, b, c, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        c = tl.dot(a, b, c, input_precision="ieee")
    elif INTERPRETED and DTYPE == tl.bfloat16:
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), c)
    else:
        c = tl.dot(a, b, c)
    return c


@triton.jit
def _number(codes):
    """int32 below 2²³ to float32, without a conversion unit: its bits are the low ones of 2²³ + code."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _load_bytes(base, at, valid, first, COUNT: tl.constexpr, BYTES: tl.constexpr, STEP: tl.constexpr):
    byte = first + STEP * tl.arange(0, COUNT)
    return tl.load(base + at[:, None] + byte[None, :], mask=valid[:, None] & (byte < BYTES)[None, :], other=0).to(
        tl.int32
    )


@triton.jit
def _load_codes(
    base, at, valid, BITS: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr
):
    """Returns the codes START … START + BLOCK of the rows at ``at`` [T], as whole float32 numbers [T, BLOCK].

    A word is the bytes that whole codes fit into: 1 byte, or 3 for widths of 3 and 6. The i-th codes of all words are
    one plane; planes are interleaved in the order that gives the codes' own.
    """
    first: tl.constexpr = START * BITS // 8
    if BITS == 8:
        codes = _load_bytes(base, at, valid, first, BLOCK, BYTES, 1)
    elif BITS == 4:
        word = _load_bytes(base, at, valid, first, BLOCK // 2, BYTES, 1)
        codes = tl.interleave(word & 15, word >> 4)
    elif BITS == 2:
        word = _load_bytes(base, at, valid, first, BLOCK // 4, BYTES, 1)
        even = tl.interleave(word & 3, (word >> 4) & 3)
        codes = tl.interleave(even, tl.interleave((word >> 2) & 3, word >> 6))
    else:
        words: tl.constexpr = BLOCK * BITS // 24
        word = _load_bytes(base, at, valid, first, words, BYTES, 3)
        word |= _load_bytes(base, at, valid, first + 1, words, BYTES, 3) << 8
        word |= _load_bytes(base, at, valid, first + 2, words, BYTES, 3) << 16
        if BITS == 6:
            even = tl.interleave(word & 63, (word >> 12) & 63)
            codes = tl.interleave(even, tl.interleave((word >> 6) & 63, word >> 18))
        else:
            a = tl.interleave(word & 7, (word >> 12) & 7)
            b = tl.interleave((word >> 6) & 7, (word >> 18) & 7)
            even = tl.interleave(a, b)
            a = tl.interleave((word >> 3) & 7, (word >> 15) & 7)
            b = tl.interleave((word >> 9) & 7, word >> 21)
            codes = tl.interleave(even, tl.interleave(a, b))
    return _number(codes)


@triton.jit
def _load_piece(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr,
    TENSOR: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns the numbers START … START + BLOCK of one row of an entry, for the tokens in ``slot`` [T]: [T, BLOCK].

    ``sequence``: int64, tokens that lie before the sequence in every buffer. In float32, or in the cache's type.
    Numbers beyond COUNT are finite, and 0 in 16 bits.
    """
    if BITS == 16:
        column = START + tl.arange(0, BLOCK)
        base = stored[TENSOR] + sequence * (ROWS * COUNT) + row * COUNT
        at = (slot * (ROWS * COUNT))[:, None] + column[None, :]
        if START + BLOCK <= COUNT:
            x = tl.load(base + at, mask=valid[:, None], other=0.0)
        else:
            x = tl.load(base + at, mask=valid[:, None] & (column < COUNT)[None, :], other=0.0)
    else:
        bytes_of_row: tl.constexpr = (COUNT * BITS + 7) // 8
        base = stored[TENSOR] + sequence * (ROWS * bytes_of_row) + row * bytes_of_row
        codes = _load_codes(base, slot * (ROWS * bytes_of_row), valid, BITS, START, BLOCK, bytes_of_row)
        groups: tl.constexpr = (COUNT + 31) // 32
        group = START // 32 + tl.arange(0, BLOCK // 32)
        base = stored[TENSOR + 1] + sequence * (ROWS * groups) + row * groups
        at = (slot * (ROWS * groups))[:, None] + group[None, :]
        pair = tl.load(base + at, mask=valid[:, None] & (group < groups)[None, :], other=0)
        scale = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x = tl.reshape(codes, (slot.shape[0], BLOCK // 32, 32)) * scale[:, :, None] + low[:, :, None]
        x = tl.reshape(x, (slot.shape[0], BLOCK))
    return x


@triton.jit
def _operand(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr, PIECES: tl.constexpr, i: tl.constexpr, DTYPE: tl.constexpr
):
    """The i-th piece of a row as an operand of a matrix product."""
    x = _load_piece(
        stored, sequence, slot, valid, row, ROWS, PIECES[7 * i], PIECES[7 * i + 1], PIECES[7 * i + 2],
        PIECES[7 * i + 3], PIECES[7 * i + 4],
    )  # fmt: skip
    return _narrow(x.to(tl.float32), DTYPE)


@triton.jit
def _weighted(
    x, j, stored, sequence, slot, valid, group, constants,
    MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, TENSOR: tl.constexpr,
):  # fmt: skip
    """Multiplies ``x`` [T, BH] by the weights of row ``j`` for every token and head.

    ONE_HOT: rows are KV heads. CACHED: [R, G] numbers of the token. CONSTANT: ``constants`` [rows, G].
    """
    if MODE == 1:
        x = tl.where((group == j)[None, :], x, 0.0)
    elif MODE == 2:
        base = stored[TENSOR] + sequence * (ROWS * GROUPS) + j * GROUPS
        at = (slot * (ROWS * GROUPS))[:, None] + group[None, :]
        x = x * tl.load(base + at, mask=valid[:, None], other=0.0).to(tl.float32)
    elif MODE == 3:
        x = x * tl.load(constants + j * GROUPS + group)[None, :]
    return x


@triton.jit
def _zeros(PIECES: tl.constexpr, i: tl.constexpr, BH: tl.constexpr):
    return tl.zeros((BH, PIECES[7 * i + 4]), tl.float32)


@triton.jit
def _no_values(PIECES: tl.constexpr, BH: tl.constexpr):
    accs = ()
    for i in tl.static_range(len(PIECES) // 7):
        accs = accs + (_zeros(PIECES, i, BH),)
    return accs


@triton.jit
def _add_row(
    accs, weights, stored, sequence, slot, valid, row,
    ROWS: tl.constexpr, PIECES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds Σ_s weights[s, h] · row(s) to the accumulators [BH, BLOCK]."""
    left = _narrow(tl.trans(weights), DTYPE)
    new = ()
    for i in tl.static_range(len(PIECES) // 7):
        x = _operand(stored, sequence, slot, valid, row, ROWS, PIECES, i, DTYPE)
        new = new + (_dot(left, x, accs[i], DTYPE),)
    return new


@triton.jit
def _add_values(
    accs, p, alpha, stored, sequence, slot, valid, group, row, constants,
    MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, TENSOR: tl.constexpr, PIECES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Scales the accumulators by ``alpha`` [BH] and adds the values of a tile, weighted by ``p`` [T, BH]."""
    new = ()
    for i in tl.static_range(len(PIECES) // 7):
        new = new + (accs[i] * alpha[:, None],)
    if MODE == 0:
        new = _add_row(new, p, stored, sequence, slot, valid, row, ROWS, PIECES, DTYPE)
    elif ROWS <= UNROLLED:
        for j in tl.static_range(ROWS):
            w = _weighted(p, j, stored, sequence, slot, valid, group, constants, MODE, ROWS, GROUPS, TENSOR)
            new = _add_row(new, w, stored, sequence, slot, valid, j, ROWS, PIECES, DTYPE)
    else:
        for j in range(ROWS):
            w = _weighted(p, j, stored, sequence, slot, valid, group, constants, MODE, ROWS, GROUPS, TENSOR)
            new = _add_row(new, w, stored, sequence, slot, valid, j, ROWS, PIECES, DTYPE)
    return new


@triton.jit
def split_size(held, SPLITS: tl.constexpr, T: tl.constexpr):
    """Returns the tokens of a part of a context of ``held`` tokens: whole tiles, as even as they come."""
    return tl.cdiv(tl.cdiv(held, SPLITS), T) * T


@triton.jit
def _part(lengths, rows, slots, HAS_ROWS: tl.constexpr, SPLITS: tl.constexpr, T: tl.constexpr):
    """Returns the program's tokens [begin, end) among those held, the position of the first one held, and where the
    sequence begins in the buffers."""
    b = tl.program_id(2)
    length = tl.load(lengths + b)
    held = tl.minimum(length, slots)
    size = split_size(held, SPLITS, T)
    begin = tl.program_id(1) * size
    at = b
    if HAS_ROWS:
        at = tl.load(rows + b)
    return begin, tl.minimum(begin + size, held), length - held, at.to(tl.int64) * slots


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
    accs, m, total, out, partial, lse, head, inside, heads,
    E: tl.constexpr, SPLITS: tl.constexpr, PIECES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the result [B, H, E]; of several splits, float32 [B, H, SPLITS, E] and the log-sum-exp of each, base 2."""
    place = tl.program_id(2) * heads + head
    scale = 1.0 / tl.where(total > 0, total, 1.0)
    if SPLITS > 1:
        tl.store(lse + place * SPLITS + tl.program_id(1), m + tl.log2(total), mask=inside)
    for i in tl.static_range(len(PIECES) // 7):
        # Of the columns that are stored, those of the piece.
        column = PIECES[7 * i + 5] + tl.arange(0, PIECES[7 * i + 4])
        keep = inside[:, None] & (tl.arange(0, PIECES[7 * i + 4]) < PIECES[7 * i + 2] - PIECES[7 * i + 3])[None, :]
        x = accs[i] * scale[:, None]
        if SPLITS > 1:
            at = (place.to(tl.int64) * SPLITS + tl.program_id(1)) * E
            tl.store(partial + at[:, None] + column[None, :], x, mask=keep)
        else:
            at = place.to(tl.int64) * E
            tl.store(out + at[:, None] + column[None, :], _narrow(x, DTYPE), mask=keep)


@triton.jit
def _query_piece(q, head, inside, d: tl.constexpr, PIECES: tl.constexpr, i: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK, BH], zero beyond the piece's numbers."""
    n = tl.arange(0, PIECES[7 * i + 4])
    keep = (n < PIECES[7 * i + 2] - PIECES[7 * i + 3])[:, None] & inside[None, :]
    x = tl.load(q + (head * d)[None, :] + (PIECES[7 * i + 5] + n)[:, None], mask=keep, other=0.0)
    return _narrow(x.to(tl.float32), DTYPE)


@triton.jit
def _row_scores(
    qs, stored, sequence, slot, valid, row,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    s = tl.zeros((slot.shape[0], BH), tl.float32)
    for i in tl.static_range(len(PIECES) // 7):
        k = _operand(stored, sequence, slot, valid, row, ROWS, PIECES, i, DTYPE)
        s = _dot(k, qs[i], s, DTYPE)
    return s


@triton.jit
def attend_direct(
    q, out, partial, lse, lengths, rows, stored, key_weights, value_weights, slots, scale,
    d: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr, PER_PROGRAM: tl.constexpr,
    KEY_MODE: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_TENSOR: tl.constexpr, NORM: tl.constexpr,
    KEY_PIECES: tl.constexpr,
    VALUE_MODE: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_TENSOR: tl.constexpr, VALUE_PIECES: tl.constexpr,
    HAS_ROWS: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (G / PER_PROGRAM, SPLITS, B).

    Args (in memory):
        q, out: [B, H, d], [B, H, E].
        lengths, rows: as in ``CachedTokens``; without HAS_ROWS ``rows`` is not read.
        stored: the layer's buffers, scales as int32 [rows, slots, ..., groups] (a pair of float16 each).
        key_weights, value_weights: float32 [rows, G], read in mode CONSTANT.
    ``scale``: of scores, log2(e) included. NORM: tensor of the scores' [1, G] factors of a token, −1 without.
    """
    begin, end, first, sequence = _part(lengths, rows, slots, HAS_ROWS, SPLITS, T)
    if SPLITS > 1:
        if begin >= end:
            return
    row = tl.program_id(0) * PER_PROGRAM
    n = tl.arange(0, BH)
    inside = n < PER_PROGRAM * REPEATS
    group = row + tl.where(inside, n, 0) // REPEATS
    head = row * REPEATS + n
    qs = ()
    for i in tl.static_range(len(KEY_PIECES) // 7):
        qs = qs + (
            _query_piece(q + tl.program_id(2) * (GROUPS * REPEATS * d), head, inside, d, KEY_PIECES, i, DTYPE),
        )
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
                        x, j, stored, sequence, slot, valid, group, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_TENSOR
                    )
            else:
                for j in range(KEY_ROWS):
                    x = _row_scores(qs, stored, sequence, slot, valid, j, KEY_ROWS, KEY_PIECES, BH, DTYPE)
                    s += _weighted(
                        x, j, stored, sequence, slot, valid, group, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_TENSOR
                    )
        if NORM >= 0:
            s = _weighted(s, 0, stored, sequence, slot, valid, group, key_weights, 2, 1, GROUPS, NORM)
        p, m, total, alpha = _softmax(s * scale, valid, m, total)
        accs = _add_values(
            accs, p, alpha, stored, sequence, slot, valid, group, row, value_weights,
            VALUE_MODE, VALUE_ROWS, GROUPS, VALUE_TENSOR, VALUE_PIECES, DTYPE,
        )  # fmt: skip
    _leave(accs, m, total, out, partial, lse, head, inside, GROUPS * REPEATS, E, SPLITS, VALUE_PIECES, DTYPE)


@triton.jit
def _up_piece(up, PIECES: tl.constexpr, i: tl.constexpr, HB: tl.constexpr):
    """Half of U for one piece, [BLOCK, HB]; ``up`` holds blocks that are padded with zeros."""
    n = PIECES[7 * i + 6] + tl.arange(0, PIECES[7 * i + 4])
    return tl.load(up + n[:, None] * HB + tl.arange(0, HB)[None, :])


@triton.jit
def _latent(
    stored, sequence, slot, valid, row, mix, MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    PIECES: tl.constexpr, i: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The i-th piece of a KV head's latents, [T, BLOCK]; in mode CONSTANT mixed of all rows by ``mix`` [rows, G]."""
    if MODE == 3:
        x = tl.zeros((slot.shape[0], PIECES[7 * i + 4]), tl.float32)
        for j in tl.static_range(ROWS):
            part = _load_piece(
                stored, sequence, slot, valid, j, ROWS, PIECES[7 * i], PIECES[7 * i + 1], PIECES[7 * i + 2],
                PIECES[7 * i + 3], PIECES[7 * i + 4],
            )  # fmt: skip
            x += part.to(tl.float32) * tl.load(mix + j * GROUPS + row)
        x = _narrow(x, DTYPE)
    else:
        if ROWS == 1:
            row = 0
        x = _operand(stored, sequence, slot, valid, row, ROWS, PIECES, i, DTYPE)
    return x


@triton.jit
def attend_rebuilt(
    q, out, partial, lse, lengths, rows, stored, key_weights, value_weights, up, offset, gamma, relative, cos, sin,
    slots, scale, eps,
    d: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr,
    KEY_MODE: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_PIECES: tl.constexpr, NORM: tl.constexpr,
    OWN_UP: tl.constexpr, HAS_RMS: tl.constexpr, RESIDENT: tl.constexpr, WIDTH: tl.constexpr, LONGEST: tl.constexpr,
    VALUE_MODE: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_TENSOR: tl.constexpr, VALUE_PIECES: tl.constexpr,
    HAS_ROWS: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
    HB: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (G, SPLITS, B); as ``attend_direct``, and

    Args (in memory):
        up: U (with 1 + w, where the latents are normalised) in both halves, [G or 1, 2, WIDTH, HB].
        offset: keys of a zero latent, float32 [G, 2, HB].
        gamma: 1 + w, float32 [2, HB]; read with HAS_RMS, where keys are normalised here (``eps``).
        relative: cos and sin of the positions 0 … LONGEST − 1, [2, LONGEST, HB].
        cos, sin: of the positions that tokens have, float32 [capacity, d/2].
    NORM: tensor of factors [1, G] of a token that its scores take, −1 without.
    """
    begin, end, first, sequence = _part(lengths, rows, slots, HAS_ROWS, SPLITS, T)
    if SPLITS > 1:
        if begin >= end:
            return
    row = tl.program_id(0)
    n = tl.arange(0, BH)
    inside = n < REPEATS
    group = row + 0 * n
    head = row * REPEATS + n
    half = tl.arange(0, HB)
    low = half < d // 2
    at_q = q + ((tl.program_id(2) * GROUPS * REPEATS + head) * d)[None, :] + half[:, None]
    keep = low[:, None] & inside[None, :]
    q1 = tl.load(at_q, mask=keep, other=0.0).to(tl.float32)
    q2 = tl.load(at_q + d // 2, mask=keep, other=0.0).to(tl.float32)
    if OWN_UP:
        up += row * (2 * WIDTH * HB)
    offset += row * (2 * HB)
    ups1 = ()
    ups2 = ()
    if RESIDENT:
        for i in tl.static_range(len(KEY_PIECES) // 7):
            ups1 = ups1 + (_up_piece(up, KEY_PIECES, i, HB),)
            ups2 = ups2 + (_up_piece(up + WIDTH * HB, KEY_PIECES, i, HB),)
    at_table = relative + tl.arange(0, T)[:, None] * HB + half[None, :]
    m = tl.full((BH,), EMPTY, tl.float32)
    total = tl.zeros((BH,), tl.float32)
    accs = _no_values(VALUE_PIECES, BH)
    for tile in range(begin, end, T):
        slot = tile + tl.arange(0, T)
        valid = slot < end
        if RING:
            slot = (first + slot) % slots
        k1 = tl.zeros((T, HB), tl.float32) + tl.load(offset + half)[None, :]
        k2 = tl.zeros((T, HB), tl.float32) + tl.load(offset + HB + half)[None, :]
        for i in tl.static_range(len(KEY_PIECES) // 7):
            c = _latent(
                stored, sequence, slot, valid, row, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_PIECES, i, DTYPE
            )
            if RESIDENT:
                k1 = _dot(c, ups1[i], k1, DTYPE)
                k2 = _dot(c, ups2[i], k2, DTYPE)
            else:
                # A number that is zero, which the compiler does not know: or it would load all of U before the loop.
                here = up + tl.multiple_of((tile - begin) % T, 16)
                k1 = _dot(c, _up_piece(here, KEY_PIECES, i, HB), k1, DTYPE)
                k2 = _dot(c, _up_piece(here + WIDTH * HB, KEY_PIECES, i, HB), k2, DTYPE)
        if HAS_RMS:
            square = tl.sum(k1 * k1, 1) + tl.sum(k2 * k2, 1)
            k1 *= tl.load(gamma + half)[None, :]
            k2 *= tl.load(gamma + HB + half)[None, :]
        c1 = tl.load(at_table).to(tl.float32)
        s1 = tl.load(at_table + LONGEST * HB).to(tl.float32)
        base = (first + tile) * (d // 2) + half
        cb = tl.load(cos + base, mask=low, other=0.0)[:, None]
        sb = tl.load(sin + base, mask=low, other=0.0)[:, None]
        left = _narrow(k1 * c1 - k2 * s1, DTYPE)
        s = _dot(left, _narrow(q1 * cb + q2 * sb, DTYPE), tl.zeros((T, BH), tl.float32), DTYPE)
        left = _narrow(k2 * c1 + k1 * s1, DTYPE)
        s = _dot(left, _narrow(q2 * cb - q1 * sb, DTYPE), s, DTYPE)
        if HAS_RMS:
            s *= tl.rsqrt(square / d + eps)[:, None]
        if NORM >= 0:
            s = _weighted(s, 0, stored, sequence, slot, valid, group, key_weights, 2, 1, GROUPS, NORM)
        p, m, total, alpha = _softmax(s * scale, valid, m, total)
        accs = _add_values(
            accs, p, alpha, stored, sequence, slot, valid, group, row if VALUE_ROWS > 1 else 0, value_weights,
            VALUE_MODE, VALUE_ROWS, GROUPS, VALUE_TENSOR, VALUE_PIECES, DTYPE,
        )  # fmt: skip
    _leave(accs, m, total, out, partial, lse, head, inside, GROUPS * REPEATS, E, SPLITS, VALUE_PIECES, DTYPE)
