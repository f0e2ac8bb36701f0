"""Device functions that attend to values: Σ_s p(s, h) · w(s, j, h) · row_j(s), and leave the result.

PIECES: see ``unpacking``. A piece is multiplied as it is cached where it can be (``unit_of``): of packed numbers
low + scale · code, a weight takes the scale, Σ_s (p scale_g) code + Σ_s p low_g, so codes go into products unchanged,
as float16 numbers 2^−24 · code. A group g of 32 numbers has scales of its own, and rows of its own in the products:
of BH columns of weights, which a product of tensor cores has anyway, RH heads fill few. Column n is head n // 2 % RH
and group 2 (n // (2 RH)) + n % 2, up to SHARES = BH / RH groups; with SHARES = 0 columns are heads, nothing is shared.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpa_train.tpa.decode import plan
from tpa_train.tpa.decode.unpacking import (
    INTERPRETED,
    bit_of,
    bounded,
    columns,
    dot,
    factor_of,
    in_words,
    load_words,
    narrow,
    operand,
    order,
    pairs_of,
    plane_of,
    planes_of,
    start_of,
    zeros,
)

UNROLLED = tl.constexpr(plan.UNROLLED)  # more rows than this are a loop of their own
COLUMNS = 32  # of a product, which four warps share in blocks of eight: of fewer, several would do the same
TINY = tl.constexpr(2.0**24)  # codes are the last bits of float16 numbers, without an exponent


@triton.constexpr_function
def unit_of(PIECES, i, TYPE, SHARES):
    """Returns how many neighbouring codes of the i-th piece are read as one unit; 0 where it is unpacked instead.

    A unit has up to 16 bits of every plane, and a code of every part in which the piece is multiplied.
    """
    bits, count, block = PIECES[7 * i + 1], PIECES[7 * i + 2], PIECES[7 * i + 4]
    if bits == 16 or TYPE != tl.float16 or not in_words(bits, count) or block // 32 > SHARES:
        return 0
    return min(block // COLUMNS, 16 // max(planes_of(bits)))


@triton.constexpr_function
def boost_of(BITS):
    """Returns by what weights times scales are multiplied, which are products' operands in float16.

    They saturate where the numbers of a group are more than about 6,000 apart, and what is below 2^−25 is lost, which
    are weights below 2^−28 where numbers are 1 apart: fewer than of weights alone where they are 1/8 apart or more.
    """
    return float(1 << BITS + 3)


@triton.constexpr_function
def parts_of(PIECES, i, TYPE, SHARES):
    """Returns in how many parts the i-th piece is multiplied."""
    return max(1, unit_of(PIECES, i, TYPE, SHARES))


@triton.constexpr_function
def first_of(PIECES, i, TYPE, SHARES):
    """Returns which accumulator is the i-th piece's first: each part has one, and lows of codes another."""
    return sum(parts_of(PIECES, k, TYPE, SHARES) + (unit_of(PIECES, k, TYPE, SHARES) > 0) for k in range(i))


@triton.constexpr_function
def _masking(BITS, j):
    """Returns assembly that leaves the j-th codes of two units, of one plane or two."""
    low, high = (*planes_of(BITS), 0)[:2]
    at = bit_of(BITS, j)
    text = f"shr.b32 a, $1, {low * j - at}; and.b32 a, a, {((1 << low) - 1 << at) * 0x10001};"
    if high:
        by = high * j - at - low
        move = f"shr.b32 b, $2, {by};" if by >= 0 else f"shl.b32 b, $2, {-by};"
        text += f"{move} and.b32 b, b, {((1 << high) - 1 << at + low) * 0x10001}; or.b32 a, a, b;"
    return f"{{.reg .b32 a, b; {text} mov.b32 $0, a;}}"


@triton.jit
def _codes_of(units, BITS: tl.constexpr, j: tl.constexpr):
    """The j-th codes of ``units``, int16 of every plane, as float16: 2^(bit − 24) · code."""
    LOW: tl.constexpr = plane_of(BITS, 0)
    HIGH: tl.constexpr = plane_of(BITS, 1)
    if INTERPRETED:
        x = units[0].to(tl.int32) >> LOW * j & (1 << LOW) - 1
        if HIGH > 0:
            x = x | (units[1].to(tl.int32) >> HIGH * j & (1 << HIGH) - 1) << LOW
        x = (x << bit_of(BITS, j)).to(tl.int16).to(tl.float16, bitcast=True)
    elif HIGH > 0:
        x = tl.inline_asm_elementwise(
            _masking(BITS, j), "=r,r,r", [units[0], units[1]], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        x = tl.inline_asm_elementwise(_masking(BITS, j), "=r,r", [units[0]], dtype=tl.float16, is_pure=True, pack=2)
    return x


@triton.constexpr_function
def _shifting(SIZE):
    """Returns assembly that moves units of SIZE bits to the ends of two int16, whose places are the same. What is
    moved from one to the other lies above its unit."""
    return f"{{.reg .b32 a; mul.lo.u32 a, $2, {SIZE}; and.b32 a, a, 7; shr.b32 $0, $1, a;}}"


@triton.jit
def _shifted(x, places, SIZE: tl.constexpr):
    """Bytes, int16, shifted so that those of ``places`` among units of SIZE bits are their last bits."""
    if INTERPRETED:
        x = x >> places * SIZE % 8
    else:
        x = tl.inline_asm_elementwise(_shifting(SIZE), "=r,r,r", [x, places], dtype=tl.int16, is_pure=True, pack=2)
    return x


@triton.jit
def spread(x, BH: tl.constexpr, RH: tl.constexpr):
    """[T, RH] to [T, BH]: every head in the columns of all groups."""
    if BH > RH:
        x = tl.broadcast_to(x[:, None, :, None], (x.shape[0], BH // (2 * RH), RH, 2))
        x = tl.reshape(x, (x.shape[0], BH))
    return x


@triton.jit
def spread_groups(x, BH: tl.constexpr, RH: tl.constexpr):
    """[T, n] to [T, BH]: every group in the columns of all heads; n groups over and over, where there is room."""
    if x.shape[1] == 1:
        x = tl.broadcast_to(x, (x.shape[0], BH))
    else:
        AGAIN: tl.constexpr = BH // (RH * x.shape[1])
        x = tl.reshape(x, (x.shape[0], 1, x.shape[1] // 2, 1, 2))
        x = tl.broadcast_to(x, (x.shape[0], AGAIN, x.shape[2], RH, 2))
        x = tl.reshape(x, (x.shape[0], BH))
    return x


@triton.jit
def head_of(n, BH: tl.constexpr, SHARES: tl.constexpr):
    """The head of column ``n``."""
    if SHARES > 1:
        n = n // 2 % (BH // SHARES)
    return n


@triton.jit
def group_of(n, BH: tl.constexpr, SHARES: tl.constexpr):
    """The group of column ``n``, counted from the first of a piece."""
    if SHARES > 1:
        n = n // (2 * (BH // SHARES)) * 2 + n % 2
    else:
        n = 0 * n
    return n


@triton.jit
def scales_of(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr, TENSOR: tl.constexpr, COUNT: tl.constexpr,
    START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scale and low of every group of a piece, float32 [T, BLOCK / 32]."""
    pair = pairs_of(stored, sequence, slot, valid, row, ROWS, TENSOR, COUNT, START, BLOCK)
    scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _units(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr, TENSOR: tl.constexpr, BITS: tl.constexpr,
    COUNT: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, places,
):  # fmt: skip
    """The units of every plane of a piece, each a right operand [T, BLOCK / UNIT], int16.

    Every thread of the product needs other units, so it reads its own as they are cached; units of two tokens share a
    register, as the numbers of their codes do in a product.
    """
    found = ()
    for k in tl.static_range(2 if plane_of(BITS, 1) > 0 else 1):
        found = found + (
            _plane_units(stored, sequence, slot, valid, row, ROWS, TENSOR, BITS, COUNT, START, BLOCK, UNIT, k, places),
        )  # fmt: skip
    return found


@triton.jit
def _plane_units(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr, TENSOR: tl.constexpr, BITS: tl.constexpr,
    COUNT: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, k: tl.constexpr, places,
):  # fmt: skip
    SIZE: tl.constexpr = UNIT * plane_of(BITS, k)  # bits
    KIND: tl.constexpr = tl.int16 if SIZE == 16 else tl.uint8
    BYTES: tl.constexpr = 2 if SIZE == 16 else 1
    pitch: tl.constexpr = start_of(BITS, COUNT, 2) // BYTES
    base = stored[TENSOR].to(tl.pointer_type(KIND), bitcast=True) + sequence * (ROWS * pitch) + row * pitch
    at = slot * (ROWS * pitch)
    FIRST: tl.constexpr = start_of(BITS, COUNT, k) // BYTES + START * plane_of(BITS, k) // (8 * BYTES)
    END: tl.constexpr = start_of(BITS, COUNT, k + 1) // BYTES
    if SIZE >= 8:
        x = load_words(base, at, valid, FIRST, 1, BLOCK // UNIT, END, tl.int16)
    else:  # several in a byte
        EACH: tl.constexpr = 8 // SIZE
        x = load_words(base, at, valid, FIRST, 1, BLOCK // UNIT // EACH, END, tl.int16)
        x = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], EACH))
        x = tl.reshape(x, (x.shape[0], BLOCK // UNIT))
        # Only what is loaded in the loop can be where products want it at once; this load is then taken out of it.
        place = tl.load(places + tl.arange(0, BLOCK // UNIT))[None, :]
        x = _shifted(x, tl.broadcast_to(place, (x.shape[0], x.shape[1])), SIZE)
    return x


@triton.jit
def weighted(
    x, j, stored, sequence, slot, valid, group, constants,
    MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, TENSOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Multiplies ``x`` [T, BH] by the weights of row ``j`` for every token and head.

    ONE_HOT: rows are KV heads. CACHED: [R, G] numbers of the token. CONSTANT: ``constants`` [rows, G].
    ``group``: the KV head of every column, or the one of all (not with ONE_HOT).
    WHOLE: the heads are those of all KV heads in turn, equally many each; their numbers are read as they lie, in words.
    """
    ONE: tl.constexpr = len(group.shape) == 0
    if MODE == 1:
        x = tl.where((group == j)[None, :], x, 0.0)
    elif MODE == 2:
        base = stored[TENSOR] + sequence * (ROWS * GROUPS) + j * GROUPS
        if ONE:  # as a tensor [T, BH] it would decide how threads share the weights, which ``_paired`` relies on
            w = tl.load(base + slot * (ROWS * GROUPS) + group, mask=valid, other=0.0)
            x = x * w.to(tl.float32)[:, None]
        elif WHOLE:
            at = (slot * (ROWS * GROUPS))[:, None] + tl.arange(0, GROUPS)[None, :]
            w = tl.load(base + at, mask=valid[:, None], other=0.0)
            w = tl.broadcast_to(w[:, :, None], (x.shape[0], GROUPS, x.shape[1] // GROUPS))
            x = x * tl.reshape(w, (x.shape[0], x.shape[1])).to(tl.float32)
        else:
            at = (slot * (ROWS * GROUPS))[:, None] + group[None, :]
            x = x * tl.load(base + at, mask=valid[:, None], other=0.0).to(tl.float32)
    elif MODE == 3:
        w = tl.load(constants + j * GROUPS + group)
        x = x * (w if ONE else w[None, :])
    return x


@triton.jit
def _paired(x):
    """[T, BH] to [T / 2, BH]: sums of two rows of every sixteen, which one thread has of a product's result."""
    x = tl.reshape(x, (x.shape[0] // 16, 2, 8, x.shape[1]))
    return tl.reshape(tl.sum(x, 1), (x.shape[0] * 8, x.shape[3]))


@triton.jit
def no_values(PIECES: tl.constexpr, T: tl.constexpr, BH: tl.constexpr, TYPE: tl.constexpr, SHARES: tl.constexpr):
    """Accumulators: [BH, BLOCK / parts] for every part of every piece; after those of codes, ``_paired``, of lows."""
    accs = ()
    for i in tl.static_range(len(PIECES) // 7):
        for _ in tl.static_range(parts_of(PIECES, i, TYPE, SHARES)):
            accs = accs + (zeros(BH, PIECES[7 * i + 4] // parts_of(PIECES, i, TYPE, SHARES)),)
        if unit_of(PIECES, i, TYPE, SHARES) > 0:
            accs = accs + (zeros(T // 2, BH),)
    return accs


@triton.jit
def _add_piece(
    accs, weights, stored, sequence, slot, valid, row, places, ROWS: tl.constexpr, PIECES: tl.constexpr,
    i: tl.constexpr, WEIGHTED: tl.constexpr, TYPE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Returns the accumulators of the i-th piece with Σ_s weights[s, h] · row(s) added to those among ``accs``."""
    UNIT: tl.constexpr = unit_of(PIECES, i, TYPE, SHARES)
    FIRST: tl.constexpr = first_of(PIECES, i, TYPE, SHARES)
    if UNIT == 0:
        left = bounded(weights, TYPE) if WEIGHTED else narrow(weights, TYPE)
        x = operand(stored, sequence, slot, valid, row, ROWS, PIECES, i, TYPE)
        new = (dot(tl.trans(left), x, accs[FIRST], TYPE),)
    else:
        TENSOR: tl.constexpr = PIECES[7 * i]
        BITS: tl.constexpr = PIECES[7 * i + 1]
        COUNT: tl.constexpr = PIECES[7 * i + 2]
        START: tl.constexpr = PIECES[7 * i + 3]
        BLOCK: tl.constexpr = PIECES[7 * i + 4]
        BH: tl.constexpr = weights.shape[1]
        scale, low = scales_of(stored, sequence, slot, valid, row, ROWS, TENSOR, COUNT, START, BLOCK)
        left = tl.trans(bounded(weights * spread_groups(scale * boost_of(BITS), BH, BH // SHARES), TYPE))
        x = _units(stored, sequence, slot, valid, row, ROWS, TENSOR, BITS, COUNT, START, BLOCK, UNIT, places)
        new = ()
        for j in tl.static_range(UNIT):
            new = new + (dot(left, _codes_of(x, BITS, j), accs[FIRST + j], TYPE),)
        new = new + (accs[FIRST + UNIT] + _paired(weights * spread_groups(low, BH, BH // SHARES)),)
    return new


@triton.jit
def _add_row(
    accs, weights, stored, sequence, slot, valid, row, places, ROWS: tl.constexpr, PIECES: tl.constexpr,
    WEIGHTED: tl.constexpr, TYPE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Adds Σ_s weights[s, h] · row(s)."""
    new = ()
    for i in tl.static_range(len(PIECES) // 7):
        new = new + _add_piece(
            accs, weights, stored, sequence, slot, valid, row, places, ROWS, PIECES, i, WEIGHTED, TYPE, SHARES
        )  # fmt: skip
    return new


@triton.jit
def add_values(
    accs, p, alpha, stored, sequence, slot, valid, group, row, constants, places,
    MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, TENSOR: tl.constexpr, PIECES: tl.constexpr,
    WHOLE: tl.constexpr, TYPE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Scales the accumulators by ``alpha`` [BH] and adds the values of a tile, weighted by ``p`` [T, BH].

    ``constants``: as ``weighted`` takes them. ``places``: int16 0 … 31.
    """
    new = ()
    for i in tl.static_range(len(PIECES) // 7):
        for j in tl.static_range(parts_of(PIECES, i, TYPE, SHARES)):
            new = new + (accs[first_of(PIECES, i, TYPE, SHARES) + j] * alpha[:, None],)
        if unit_of(PIECES, i, TYPE, SHARES) > 0:
            new = new + (accs[first_of(PIECES, i + 1, TYPE, SHARES) - 1] * alpha[None, :],)
    if MODE == 0:
        new = _add_row(new, p, stored, sequence, slot, valid, row, places, ROWS, PIECES, False, TYPE, SHARES)
    elif ROWS <= UNROLLED:
        for j in tl.static_range(ROWS):
            w = weighted(p, j, stored, sequence, slot, valid, group, constants, MODE, ROWS, GROUPS, TENSOR, WHOLE)
            new = _add_row(new, w, stored, sequence, slot, valid, j, places, ROWS, PIECES, MODE != 1, TYPE, SHARES)
    else:
        for j in range(ROWS):
            w = weighted(p, j, stored, sequence, slot, valid, group, constants, MODE, ROWS, GROUPS, TENSOR, WHOLE)
            new = _add_row(new, w, stored, sequence, slot, valid, j, places, ROWS, PIECES, MODE != 1, TYPE, SHARES)
    return new


@triton.jit
def _leave_part(
    x, n, place, inside, own, out, partial, splits, PIECES: tl.constexpr, i: tl.constexpr, E: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes ``x`` [BH, …], the numbers ``n`` of the i-th piece. ``inside``: which are wanted, [BH, …]; ``own``: where
    a head's columns begin, [BH, 1]."""
    to = columns(n, PIECES, i)[None, :] - own
    keep = inside & (n < PIECES[7 * i + 2] - PIECES[7 * i + 3])[None, :] & (to >= 0) & (to < E)
    if SPLIT:
        at = (place.to(tl.int64) * splits + tl.program_id(1)) * E
        tl.store(partial + at[:, None] + to, x, mask=keep)
    else:
        at = place.to(tl.int64) * E
        tl.store(out + at[:, None] + to, narrow(x, DTYPE), mask=keep)


@triton.jit
def leave(
    accs, m, total, out, partial, lse, head, inside, heads, splits,
    E: tl.constexpr, SPLIT: tl.constexpr, PIECES: tl.constexpr, TYPE: tl.constexpr, SHARES: tl.constexpr,
    DTYPE: tl.constexpr, SHARING: tl.constexpr = 0,
):  # fmt: skip
    """Writes the result [B, H, E]; of several splits, float32 [B, H, splits, E] and the log-sum-exp of each, base 2.

    ``head``, ``inside``, ``m``, ``total``: of every column of weights. SHARING: heads of each KV head where rows are
    those of several, one beside the other, and a head has its own's.
    """
    BH: tl.constexpr = head.shape[0]
    column = tl.arange(0, BH)
    group = group_of(column, BH, SHARES)
    once = inside & (group == 0)
    place = tl.program_id(2) * heads + head
    scale = 1.0 / tl.where(total > 0, total, 1.0)
    own = 0 * column
    if SHARING > 0:
        own = head_of(column, BH, SHARES) // SHARING * E
    if SPLIT:
        tl.store(lse + place * splits + tl.program_id(1), m + tl.log2(total), mask=once)
    for i in tl.static_range(len(PIECES) // 7):
        _leave_piece(
            accs, place, scale, group, inside, once, own, out, partial, splits, PIECES, i, E, SPLIT, TYPE, SHARES,
            DTYPE,
        )  # fmt: skip


@triton.jit
def _leave_piece(
    accs, place, scale, group, inside, once, own, out, partial, splits, PIECES: tl.constexpr, i: tl.constexpr,
    E: tl.constexpr, SPLIT: tl.constexpr, TYPE: tl.constexpr, SHARES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = unit_of(PIECES, i, TYPE, SHARES)
    FIRST: tl.constexpr = first_of(PIECES, i, TYPE, SHARES)
    BITS: tl.constexpr = PIECES[7 * i + 1]
    BLOCK: tl.constexpr = PIECES[7 * i + 4]
    if UNIT == 0:
        n = order(BITS, BLOCK)
        wanted = once[:, None] & (n >= 0)[None, :]
        x = accs[FIRST] * scale[:, None]
        _leave_part(
            x, n, place, wanted, own[:, None], out, partial, splits, PIECES, i, E, SPLIT, DTYPE
        )  # fmt: skip
    else:
        low = tl.sum(accs[FIRST + UNIT], 0)
        for j in tl.static_range(UNIT):
            n = UNIT * tl.arange(0, BLOCK // UNIT) + j
            wanted = inside[:, None] & (group[:, None] == (n // 32)[None, :])
            x = (accs[FIRST + j] * (TINY / (boost_of(BITS) * factor_of(BITS, j))) + low[:, None]) * scale[:, None]
            _leave_part(
                x, n, place, wanted, own[:, None], out, partial, splits, PIECES, i, E, SPLIT, DTYPE
            )  # fmt: skip
