"""Device functions that read cached entries: what is quantized (``tpa.quantization``) is unpacked in registers.

The last dimension of an entry is read in PIECES, seven whole numbers each: tensor, bits, numbers of its row, first
number, BLOCK, column in the entry, column where all blocks are padded. T is the tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Rounds float32 to the operands' type."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter cannot multiply it, and truncates to it
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = x.to(DTYPE)
    return x


@triton.jit
def dot(a, b, c, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        c = tl.dot(a, b, c, input_precision="ieee")
    elif INTERPRETED and DTYPE == tl.bfloat16:
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), c)
    else:
        c = tl.dot(a, b, c)
    return c


@triton.jit
def order(BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Which numbers of a piece its columns hold, [BLOCK]; for U, ``plan.order`` says the same.

    Operands of products lie so that the t-th of four threads holds the columns 2 t and 2 t + 1 of every eight. Of a
    group of 32 packed numbers these are eight neighbours, which it reads at once.
    """
    n = tl.arange(0, BLOCK)
    if BITS < 16:
        n = n // 32 * 32 + n // 2 % 4 * 8 + n % 2 * 4 + n // 8 % 4
    return n


@triton.jit
def _load_at(base, at, valid, word, WORDS: tl.constexpr):
    """Some words of the rows at ``at`` [T]; the last one instead of those beyond WORDS."""
    return tl.load(base + at[:, None] + tl.minimum(word, WORDS - 1)[None, :], mask=valid[:, None], other=0)


@triton.jit
def _load_words(
    base, at, valid, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """COUNT words (or bytes) of the rows at ``at`` [T], from FIRST on, STEP apart; those beyond WORDS are 0."""
    word = FIRST + STEP * tl.arange(0, COUNT)
    if FIRST + STEP * (COUNT - 1) < WORDS:
        x = tl.load(base + at[:, None] + word[None, :], mask=valid[:, None], other=0)
    else:
        x = tl.load(base + at[:, None] + word[None, :], mask=valid[:, None] & (word < WORDS)[None, :], other=0)
    return x.to(tl.int32)


@triton.jit
def _units(
    base, at, valid, FIRST: tl.constexpr, UNIT: tl.constexpr, COUNT: tl.constexpr, BYTES: tl.constexpr,
    IN_WORDS: tl.constexpr,
):  # fmt: skip
    """COUNT times UNIT bytes of the rows at ``at`` [T], which have BYTES, from FIRST on: the low bits of int32."""
    n = tl.arange(0, COUNT)
    if not IN_WORDS:
        x = _load_words(base, at, valid, FIRST, UNIT, COUNT, BYTES)
        for i in tl.static_range(1, UNIT):
            x |= _load_words(base, at, valid, FIRST + i, UNIT, COUNT, BYTES) << 8 * i
    elif UNIT == 4:
        x = _load_words(base, at, valid, FIRST // 4, 1, COUNT, BYTES // 4)
    else:  # neighbours read the same word, where they have a part of it each
        bit = (n * (8 * UNIT) % 32)[None, :]
        x = _load_at(base, at, valid, FIRST // 4 + n * UNIT // 4, BYTES // 4)
        if UNIT == 3:
            after = _load_at(base, at, valid, FIRST // 4 + n * UNIT // 4 + 1, BYTES // 4)
            x = (x.to(tl.uint32, bitcast=True) >> bit).to(tl.int32, bitcast=True) | (after << 1) << (31 - bit)
        else:
            x = x >> bit
    return x


@triton.jit
def _load_steps(
    base, at, valid, BITS: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr,
    IN_WORDS: tl.constexpr,
):  # fmt: skip
    """Returns 1 + code / 2^BITS of the codes START … START + BLOCK of the rows at ``at`` [T], which have BYTES.

    Float32 [T, BLOCK / 32, 4, 4, 2], in ``order``. A code becomes the first bits of a mantissa: no conversion, and what
    is subtracted is for ``load_piece`` to do once a group.
    """
    # A unit is eight codes or, where those are more than a word, four.
    UNIT: tl.constexpr = BITS if BITS <= 4 else BITS // 2
    HALVES: tl.constexpr = 2 * UNIT // BITS
    COUNT: tl.constexpr = BLOCK * BITS // (8 * UNIT)
    x = _units(base, at, valid, START * BITS // 8, UNIT, COUNT, BYTES, IN_WORDS)
    x = tl.reshape(x, (x.shape[0], BLOCK // 32, 1, 4, 3 - HALVES))
    bit = (BITS * tl.arange(0, 4))[None, None, :, None, None]
    if HALVES == 2:
        bit = bit + (4 * BITS * tl.arange(0, 2))[None, None, None, None, :]
    left = 23 - BITS - bit
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    if INTERPRETED:
        x = ((x << tl.maximum(left, 0)) >> tl.maximum(-left, 0)) & MASK | 0x3F800000
    else:  # two instructions, as one shift is by nothing; from the line above the compiler makes four
        x = tl.inline_asm_elementwise(
            "{.reg .b32 a; shl.b32 a, $1, $2; shr.u32 a, a, $3; lop3.b32 $0, a, $4, $5, 0xEA;}", "=r,r,r,r,r,r",
            [x, tl.maximum(left, 0), tl.maximum(-left, 0), MASK, 0x3F800000], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return x.to(tl.float32, bitcast=True)


@triton.jit
def _scales(pair):
    """Of a float16 pair in an int32: both, in float32."""
    if INTERPRETED:
        scale = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:  # the same in two instructions
        scale, low = tl.inline_asm_elementwise(
            "{.reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}",
            "=f,=f,r", [pair], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return scale, low


@triton.jit
def load_piece(
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
        in_words: tl.constexpr = stored[TENSOR].dtype.element_ty == tl.int32
        pitch: tl.constexpr = bytes_of_row // 4 if in_words else bytes_of_row
        base = stored[TENSOR] + sequence * (ROWS * pitch) + row * pitch
        steps = _load_steps(base, slot * (ROWS * pitch), valid, BITS, START, BLOCK, bytes_of_row, in_words)
        groups: tl.constexpr = (COUNT + 31) // 32
        base = stored[TENSOR + 1] + sequence * (ROWS * groups) + row * groups
        pair = _load_words(base, slot * (ROWS * groups), valid, START // 32, 1, BLOCK // 32, groups)
        scale, low = _scales(pair)
        # low + scale · code: what is subtracted is exact, and the sum's rounding 2⁻²⁴ of the group's range.
        span = scale * (1 << BITS)
        x = steps * span[:, :, None, None, None] + (low - span)[:, :, None, None, None]
        x = tl.reshape(x, (slot.shape[0], BLOCK))
    return x


@triton.jit
def operand(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr, PIECES: tl.constexpr, i: tl.constexpr, DTYPE: tl.constexpr
):
    """The i-th piece of a row as an operand of a matrix product."""
    x = load_piece(
        stored, sequence, slot, valid, row, ROWS, PIECES[7 * i], PIECES[7 * i + 1], PIECES[7 * i + 2],
        PIECES[7 * i + 3], PIECES[7 * i + 4],
    )  # fmt: skip
    if x.dtype != DTYPE:  # else it goes from memory to the product as it is
        x = narrow(x.to(tl.float32), DTYPE)
    return x


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)
