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
    """Which numbers of a piece its columns hold, [BLOCK]. ``Plan.lay_out`` and ``plan.packed_order`` know it as well."""
    n = tl.arange(0, BLOCK)
    if BITS < 16:
        n = n // 32 * 32 + n // 2 % 4 * 8 + n % 2 * 4 + n // 8 % 4
    return n


@triton.jit
def _load_at(base, at, valid, word, WORDS: tl.constexpr):
    """Some words of the rows at ``at`` [T]; the last one instead of those beyond WORDS."""
    return tl.load(base + at[:, None] + tl.minimum(word, WORDS - 1)[None, :], mask=valid[:, None], other=0)


@triton.jit
def _funnel(low, high, bit):
    """The 32 bits from ``bit`` on, 0 to 31, of int64 in two int32."""
    return (low.to(tl.uint32, bitcast=True) >> bit).to(tl.int32, bitcast=True) | (high << 1) << (31 - bit)


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
def _bytes_of_eight(
    base, at, valid, FIRST: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """The first and the second four of every eight codes, where rows are no whole words."""
    low = _load_words(base, at, valid, FIRST, BITS, COUNT, WORDS)
    if BITS == 3:
        low |= _load_words(base, at, valid, FIRST + 1, BITS, COUNT, WORDS) << 8
        low |= _load_words(base, at, valid, FIRST + 2, BITS, COUNT, WORDS) << 16
        high = low
    else:
        high = _load_words(base, at, valid, FIRST + BITS // 2, BITS, COUNT, WORDS)
        for i in tl.static_range(1, BITS // 2):
            low |= _load_words(base, at, valid, FIRST + i, BITS, COUNT, WORDS) << 8 * i
            high |= _load_words(base, at, valid, FIRST + BITS // 2 + i, BITS, COUNT, WORDS) << 8 * i
    return low, high


@triton.jit
def _words_of_eight(
    base, at, valid, FIRST: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """The first and the second four of every eight codes, [T, BLOCK / 8] each: in the low bits of an int32."""
    if BITS == 8:
        word = _load_words(base, at, valid, FIRST, 1, BLOCK // 4, WORDS)
        low, high = tl.split(tl.reshape(word, (word.shape[0], BLOCK // 8, 2)))
    elif BITS == 4:
        low = _load_words(base, at, valid, FIRST, 1, BLOCK // 8, WORDS)
        high = low
    else:
        # Eight codes are no word: every one of them reads what it needs, and neighbours partly the same.
        n = tl.arange(0, BLOCK // 8)
        bit = n * (8 * BITS) % 32
        low = _load_at(base, at, valid, FIRST + n * BITS // 4, WORDS)
        if BITS == 2:
            low = low >> bit[None, :]
            high = low
        else:
            after = _load_at(base, at, valid, FIRST + n * BITS // 4 + 1, WORDS)
            second = (low >> 24 & 255) | after << 8
            low = _funnel(low, after, bit[None, :])
            high = low
            if BITS == 6:
                high = tl.where((bit == 0)[None, :], second, after >> 8)
    return low, high


@triton.jit
def _steps(codes, AT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Of four codes each, from bit AT of int32 [T, BLOCK / 8] on: 1 + code / 2^BITS, float32 [T, BLOCK / 32, 4 (of
    these), 4]. No conversion: a code becomes the first bits of a mantissa."""
    codes = tl.reshape(codes, (codes.shape[0], BLOCK // 32, 1, 4))
    left = (23 - BITS - AT) - (BITS * tl.arange(0, 4))[None, None, :, None]
    right = tl.maximum(-left, 0)
    left = tl.maximum(left, 0)
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    if INTERPRETED:
        codes = (((codes << left) >> right) & MASK) | 0x3F800000
    else:  # two instructions, as one shift is by nothing; from the line above the compiler makes four
        codes = tl.inline_asm_elementwise(
            "{.reg .b32 a; shl.b32 a, $1, $2; shr.u32 a, a, $3; lop3.b32 $0, a, $4, $5, 0xEA;}", "=r,r,r,r,r,r",
            [codes, left, right, MASK, 0x3F800000], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return codes.to(tl.float32, bitcast=True)


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
        first: tl.constexpr = START * BITS // 8
        in_words: tl.constexpr = stored[TENSOR].dtype.element_ty == tl.int32
        if in_words:
            words: tl.constexpr = bytes_of_row // 4
            base = stored[TENSOR] + sequence * (ROWS * words) + row * words
            early, late = _words_of_eight(base, slot * (ROWS * words), valid, first // 4, BITS, BLOCK, words)
        else:
            base = stored[TENSOR] + sequence * (ROWS * bytes_of_row) + row * bytes_of_row
            at = slot * (ROWS * bytes_of_row)
            early, late = _bytes_of_eight(base, at, valid, first, BITS, BLOCK // 8, bytes_of_row)
        at_late: tl.constexpr = 4 * BITS if BITS == 3 or (in_words and BITS <= 4) else 0
        steps = tl.join(_steps(early, 0, BITS, BLOCK), _steps(late, at_late, BITS, BLOCK))
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
