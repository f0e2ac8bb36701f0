"""The decoding kernel of latents, whose keys U c + k₀ exist only as a tile [T, d].

Their RoPE needs no table of the whole context: the query is rotated back by the position of the tile's first token, and
a table of T relative positions serves every tile. Shapes as in ``kernel``, and HB half a head, padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpa_train.tpa.decode import plan
from tpa_train.tpa.decode.chain import begin_next
from tpa_train.tpa.decode.kernel import EMPTY, part_of, softmax
from tpa_train.tpa.decode.unpacking import bounded, dot, load_piece, narrow, operand, zeros
from tpa_train.tpa.decode.values import add_values, head_of, leave, no_values

# Numbers of a latent: a wider one's pieces go into all products as soon as they are read, rather than be kept for the
# next, and a joint one's are read once more as values.
WIDE = tl.constexpr(plan.TOGETHER)


@triton.jit
def _up_piece(up, column, PIECES: tl.constexpr, i: tl.constexpr, HB: tl.constexpr):
    """Columns of half of U for one piece, [BLOCK, HC]; ``up`` holds blocks that are padded with zeros."""
    n = PIECES[7 * i + 6] + tl.arange(0, PIECES[7 * i + 4])
    return tl.load(up + n[:, None] * HB + column[None, :])


@triton.jit
def _half_keys(
    cs, ups, up, offset, column, FIRST: tl.constexpr, RESIDENT: tl.constexpr, PIECES: tl.constexpr, HB: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Some columns of half of the keys, float32 [T, HC], from the latents' pieces ``cs``."""
    k = zeros(cs[0].shape[0], column.shape[0]) + tl.load(offset + column)[None, :]
    for i in tl.static_range(len(PIECES) // 7):
        if RESIDENT:
            k = dot(cs[i], ups[FIRST + i], k, TYPE)
        else:
            k = dot(cs[i], _up_piece(up, column, PIECES, i, HB), k, TYPE)
    return k


@triton.jit
def norms(stored, sequence, slot, valid, group, GROUPS: tl.constexpr, NORM: tl.constexpr):
    """The factors [T] of the scores of one KV head, from tensor NORM; not read where that is −1.

    Too small and too far apart to be loaded ahead by the compiler: a tile's are read while the one before is computed.
    """
    x = tl.zeros((slot.shape[0],), tl.float32)
    if NORM >= 0:
        x = tl.load(stored[NORM] + (sequence + slot) * GROUPS + group, mask=valid, other=0.0).to(tl.float32)
    return x


@triton.jit
def latent(
    stored, sequence, slot, valid, row, mix, MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    PIECES: tl.constexpr, i: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The i-th piece of a KV head's latents, [T, BLOCK]; in mode CONSTANT mixed of all rows by ``mix`` [rows, G]."""
    if MODE == 3:
        x = zeros(slot.shape[0], PIECES[7 * i + 4])
        for j in tl.static_range(ROWS):
            part = load_piece(
                stored, sequence, slot, valid, j, ROWS, PIECES[7 * i], PIECES[7 * i + 1], PIECES[7 * i + 2],
                PIECES[7 * i + 3], PIECES[7 * i + 4], TYPE,
            )  # fmt: skip
            x += part.to(tl.float32) * tl.load(mix + j * GROUPS + row)
        x = bounded(x, TYPE)
    else:
        if ROWS == 1:
            row = 0
        x = operand(stored, sequence, slot, valid, row, ROWS, PIECES, i, TYPE)
    return x


@triton.jit
def _keys_at_once(
    stored, sequence, slot, valid, row, mix, ups, up, offset, column, MODE: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, RESIDENT: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr, HB: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Both halves of the keys, float32 [T, HB]: a piece of the latents is used up before the next is read."""
    k1 = zeros(slot.shape[0], HB) + tl.load(offset + column)[None, :]
    k2 = zeros(slot.shape[0], HB) + tl.load(offset + HB + column)[None, :]
    COUNT: tl.constexpr = len(PIECES) // 7
    for i in tl.static_range(COUNT):
        c = latent(stored, sequence, slot, valid, row, mix, MODE, ROWS, GROUPS, PIECES, i, TYPE)
        if RESIDENT:
            k1 = dot(c, ups[i], k1, TYPE)
            k2 = dot(c, ups[COUNT + i], k2, TYPE)
        else:
            k1 = dot(c, _up_piece(up, column, PIECES, i, HB), k1, TYPE)
            k2 = dot(c, _up_piece(up + WIDTH * HB, column, PIECES, i, HB), k2, TYPE)
    return k1, k2


@triton.jit(do_not_specialize=("slots", "pitch", "splits"))
def attend_rebuilt(
    q, out, partial, lse, lengths, rows, stored, key_weights, value_weights, places, up, offset, gamma, relative, cos,
    sin, slots, pitch, splits, scale, eps,
    d: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr,
    KEY_MODE: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_PIECES: tl.constexpr, NORM: tl.constexpr,
    OWN_UP: tl.constexpr, HAS_RMS: tl.constexpr, RESIDENT: tl.constexpr, WIDTH: tl.constexpr, LONGEST: tl.constexpr,
    VALUE_MODE: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_TENSOR: tl.constexpr, VALUE_PIECES: tl.constexpr,
    HAS_ROWS: tl.constexpr, RING: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
    HB: tl.constexpr, HC: tl.constexpr, SHARES: tl.constexpr, KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr,
    DTYPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (G, splits, B); keys are rebuilt HC columns of each half at a time. As ``attend_direct``, and

    Args (in memory):
        up: U (with 1 + w, where the latents are normalised) in both halves, [G or 1, 2, WIDTH, HB].
        offset: keys of a zero latent, float32 [G, 2, HB].
        gamma: 1 + w, float32 [2, HB]; read with HAS_RMS, where keys are normalised here (``eps``).
        relative: cos and sin of the positions 0 … LONGEST − 1, [2, LONGEST, HB].
        cos, sin: of the positions that tokens have, float32 [capacity, d/2].
    NORM: tensor of factors [1, G] of a token that its scores take, −1 without. DEPENDENT: see ``chain``.
    """
    begin_next(DEPENDENT and SPLIT)
    begin, end, first, sequence = part_of(lengths, rows, slots, pitch, splits, HAS_ROWS, T)
    if SPLIT:
        if begin >= end:
            return
    row = tl.program_id(0)
    n = head_of(tl.arange(0, BH), BH, SHARES)
    inside = n < REPEATS
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
    accs = no_values(VALUE_PIECES, T, BH, VALUE_TYPE, SHARES)
    at = begin + tl.arange(0, T)
    factor = norms(stored, sequence, (first + at) % slots if RING else at, at < end, row, GROUPS, NORM)
    for tile in range(begin, end, T):
        slot = tile + tl.arange(0, T)
        valid = slot < end
        at = slot + T
        following = norms(stored, sequence, (first + at) % slots if RING else at, at < end, row, GROUPS, NORM)
        if RING:
            slot = (first + slot) % slots
        cs = ()  # where the keys come in several blocks of columns, which all need the latents
        for i in tl.static_range(COUNT if HC < HB else 0):
            c = latent(
                stored, sequence, slot, valid, row, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_PIECES, i, KEY_TYPE
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
                k1 = _half_keys(cs, ups, u, o, column, 2 * b * COUNT, RESIDENT, KEY_PIECES, HB, KEY_TYPE)
                u, o = u + WIDTH * HB, o + HB
                k2 = _half_keys(cs, ups, u, o, column, (2 * b + 1) * COUNT, RESIDENT, KEY_PIECES, HB, KEY_TYPE)
            else:
                k1, k2 = _keys_at_once(
                    stored, sequence, slot, valid, row, key_weights, ups, u, o, column, KEY_MODE, KEY_ROWS, GROUPS,
                    RESIDENT, KEY_PIECES, WIDTH, HB, KEY_TYPE,
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
            s *= factor[:, None]
        p, m, total, alpha = softmax(s * scale, valid, m, total)
        # Wide joint latents are read twice: kept for the values, they would fill the registers.
        again = sequence + zero if WIDTH > WIDE else sequence
        accs = add_values(
            accs, p, alpha, stored, again, slot, valid, row, row if VALUE_ROWS > 1 else 0, value_weights, places,
            VALUE_MODE, VALUE_ROWS, GROUPS, VALUE_TENSOR, VALUE_PIECES, False, VALUE_TYPE, SHARES,
        )  # fmt: skip
        factor = following
    leave(
        accs, m, total, out, partial, lse, head, inside, GROUPS * REPEATS, splits, E, SPLIT, VALUE_PIECES, VALUE_TYPE,
        SHARES, DTYPE,
    )  # fmt: skip
