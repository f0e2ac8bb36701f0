"""Device functions that read cached entries: what is quantized (``tpa.quantization``) is unpacked in registers.

The last dimension of an entry is read in PIECES, seven whole numbers each: tensor, bits, numbers of its row, first
number, BLOCK, groups of the entry (16 bits each), column where all blocks are padded. T is the tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def shift_of(BITS, AT):
    """Returns by how many bits codes at bit AT are shifted to be among the ten last bits of float16 numbers."""
    return 0 if AT + BITS <= 10 else (8 if BITS == 4 else AT)


@triton.constexpr_function
def factor_of(BITS, AT):
    """Returns by which factor codes at bit AT are then larger than at bit 0."""
    return float(1 << AT - shift_of(BITS, AT))


@triton.constexpr_function
def last_of(BITS):
    """Returns at which bit of ``_paired``'s last words the third pair of codes lies; the fourth lies BITS beyond."""
    return {6: 4, 8: 0}.get(BITS, 2 * BITS)


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
def bounded(x, DTYPE: tl.constexpr):
    """As ``narrow``, for what a model of bfloat16 brings into a product in float16: at most its largest number."""
    if DTYPE == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return narrow(x, DTYPE)


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


@triton.constexpr_function
def _group_at(PIECES, i, k):
    return PIECES[7 * i + 5] >> 16 * k & 0xFFFF


@triton.constexpr_function
def _groups_in(PIECES, i):
    return (PIECES[7 * i + 4] + 31) // 32


@triton.jit
def columns(n, PIECES: tl.constexpr, i: tl.constexpr):
    """Which numbers of the entry the numbers ``n`` of the i-th piece are; ``plan.columns`` says the same."""
    n += PIECES[7 * i + 3] % 32
    group = 0 * n + _group_at(PIECES, i, 0)
    for k in tl.static_range(1, _groups_in(PIECES, i)):
        group = tl.where(n // 32 == k, _group_at(PIECES, i, k), group)
    return group * 32 + n % 32


@triton.jit
def load_words(
    base, at, valid, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr,
    KIND: tl.constexpr = tl.int32,
):  # fmt: skip
    """COUNT words (or bytes) of rows at ``at`` [T], from FIRST on, STEP apart, as KIND; those beyond WORDS are 0."""
    word = FIRST + STEP * tl.arange(0, COUNT)
    if FIRST + STEP * (COUNT - 1) < WORDS:
        x = tl.load(base + at[:, None] + word[None, :], mask=valid[:, None], other=0)
    else:
        x = tl.load(base + at[:, None] + word[None, :], mask=valid[:, None] & (word < WORDS)[None, :], other=0)
    return x.to(KIND)


@triton.jit
def _units(
    base, at, valid, FIRST: tl.constexpr, UNIT: tl.constexpr, COUNT: tl.constexpr, BYTES: tl.constexpr,
    IN_WORDS: tl.constexpr,
):  # fmt: skip
    """COUNT times UNIT bytes of the rows at ``at`` [T], which have BYTES, from FIRST on: the low bits of int32."""
    if not IN_WORDS:
        x = load_words(base, at, valid, FIRST, UNIT, COUNT, BYTES)
        for i in tl.static_range(1, UNIT):
            x |= load_words(base, at, valid, FIRST + i, UNIT, COUNT, BYTES) << 8 * i
    elif UNIT == 4:
        x = load_words(base, at, valid, FIRST // 4, 1, COUNT, BYTES // 4)
    elif UNIT == 2:  # two in a word
        x = load_words(base, at, valid, FIRST // 4, 1, COUNT // 2, BYTES // 4)
        x = tl.broadcast_to(x[:, :, None], (x.shape[0], COUNT // 2, 2)) >> (16 * tl.arange(0, 2))[None, None, :]
        x = tl.reshape(x, (x.shape[0], COUNT))
    else:  # four lie in three words; told that it reads neighbours, the compiler lets neighbouring threads do it
        n = tl.arange(0, COUNT) % 4
        word = tl.max_contiguous(FIRST // 4 + tl.arange(0, COUNT) // 4 * 3 + n, 4)
        begins = valid[:, None] & ((n < 3) & (word < BYTES // 4))[None, :]
        ends = valid[:, None] & ((n > 0) & (word <= BYTES // 4))[None, :]
        x = tl.load(base + at[:, None] + word[None, :], mask=begins, other=0)
        before = tl.load(base + at[:, None] + (word - 1)[None, :], mask=ends, other=0).to(tl.uint32, bitcast=True)
        bit = (8 * n)[None, :]
        x = x << bit | (before >> 1 >> 31 - bit).to(tl.int32, bitcast=True)
    return x


@triton.jit
def _paired(x, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the units of ``load_piece``: two words [T, BLOCK / 32, 4] whose halves hold the codes of two neighbouring
    columns each: the first two codes and the last two."""
    if BITS <= 4:  # a unit has both columns' four codes, one after the other
        x = tl.reshape(x, (x.shape[0], BLOCK // 32, 4))
        if BITS == 3:
            x = x & 0xFFF | (x & 0xFFF000) << 4
        elif BITS == 2:
            x = x & 0xFF | (x & 0xFF00) << 8
        first, last = x, x
    else:  # each column has a unit, the first two codes of which are in its first 16 bits
        one, other = tl.split(tl.reshape(x, (x.shape[0], BLOCK // 32, 4, 2)))
        AFTER: tl.constexpr = 16 if BITS == 8 else 8
        first = one & 0xFFFF | other << 16
        last = one >> AFTER & 0xFFFF | other >> AFTER << 16
    return first, last


@triton.jit
def _codes(x, BITS: tl.constexpr, AT: tl.constexpr):
    """Codes at bit AT of both halves of the words ``x`` [T, BLOCK / 32, 4] as float16 numbers without an exponent,
    [..., 2]: 2^−24 · code, moved to the left where that spares a shift."""
    BY: tl.constexpr = shift_of(BITS, AT)
    x = x >> BY & ((1 << BITS) - 1 << AT - BY) * 0x10001
    if INTERPRETED:
        first = (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        last = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        first, last = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
        )
    return tl.join(first, last)


@triton.jit
def moved_by(n, BITS: tl.constexpr):
    """By which factors ``code_piece`` moves the codes of the numbers ``n``."""
    n = n % 4
    first = tl.where(n == 0, factor_of(BITS, 0), factor_of(BITS, BITS))
    last = tl.where(n == 2, factor_of(BITS, last_of(BITS)), factor_of(BITS, last_of(BITS) + BITS))
    return tl.where(n < 2, first, last)


@triton.jit
def _decoded(x, pair, BITS: tl.constexpr, AT: tl.constexpr, TYPE: tl.constexpr):
    """Codes at bit AT of both halves of the words ``x`` [T, BLOCK / 32, 4], as low + scale · code in TYPE, [..., 2].

    ``pair``: scales and lows, [T, BLOCK / 32]. Rounded once, as these and the codes are exact in float16: two codes at
    a time become the last bits of two mantissas of 1024, and are moved to their place by a product rather than shifted.
    """
    SHIFT: tl.constexpr = shift_of(BITS, AT)
    FROM: tl.constexpr = AT - SHIFT
    MASK: tl.constexpr = ((1 << BITS) - 1 << FROM) * 0x10001
    pair = tl.broadcast_to(pair[:, :, None], (x.shape[0], x.shape[1], x.shape[2]))
    if SHIFT > 0:
        x = x >> SHIFT
    if INTERPRETED or TYPE == tl.float32:
        scale = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x = (x & MASK) >> FROM
        first, second = (x & 0xFFFF).to(tl.float32) * scale + low, (x >> 16).to(tl.float32) * scale + low
        x = tl.join(first, second).to(TYPE)
    else:
        # 2^−FROM and −1024 · 2^−FROM, twice
        UNDO: tl.constexpr = (15 - FROM << 10) * 0x10001
        LESS: tl.constexpr = (25 - FROM << 10) * 0x10001 - 0x7FFF8000
        first, second = tl.inline_asm_elementwise(
            "{.reg .b32 a, b, c; lop3.b32 a, $2, $3, 0x64006400, 0xEA; fma.rn.f16x2 a, a, $4, $5;"
            " prmt.b32 b, $6, $6, 0x1010; prmt.b32 c, $6, $6, 0x3232; fma.rn.f16x2 a, a, b, c; mov.b32 {$0, $1}, a;}",
            "=h,=h,r,r,r,r,r", [x, MASK, UNDO, LESS, pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
        x = tl.join(first, second)
    return x


@triton.jit
def _words_of(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr,
    TENSOR: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``_paired`` words of a piece of packed numbers."""
    bytes_of_row: tl.constexpr = (COUNT * BITS + 7) // 8
    in_words: tl.constexpr = stored[TENSOR].dtype.element_ty == tl.int32
    pitch: tl.constexpr = bytes_of_row // 4 if in_words else bytes_of_row
    base = stored[TENSOR] + sequence * (ROWS * pitch) + row * pitch
    # A unit is eight codes or, where those are more than a word, four.
    UNIT: tl.constexpr = BITS if BITS <= 4 else BITS // 2
    COUNT_OF_UNITS: tl.constexpr = BLOCK * BITS // (8 * UNIT)
    x = _units(base, slot * (ROWS * pitch), valid, START * BITS // 8, UNIT, COUNT_OF_UNITS, bytes_of_row, in_words)
    return _paired(x, BITS, BLOCK)


@triton.jit
def _in_columns(evens, odds, BLOCK: tl.constexpr):
    """[T, BLOCK / 32, 4, 2, 2] twice as [T, BLOCK], in the ``order`` of columns."""
    x = tl.permute(tl.join(evens, odds), (0, 1, 4, 5, 2, 3))
    return tl.reshape(x, (x.shape[0], BLOCK))


@triton.jit
def load_piece(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr,
    TENSOR: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Returns the numbers START … START + BLOCK of one row of an entry, for the tokens in ``slot`` [T]: [T, BLOCK].

    ``sequence``: int64, tokens that lie before the sequence in every buffer. Packed numbers in TYPE, float16 or
    float32; others as the cache has them. Numbers beyond COUNT are finite, and 0 in 16 bits.
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
        first, last = _words_of(stored, sequence, slot, valid, row, ROWS, TENSOR, BITS, COUNT, START, BLOCK)
        groups: tl.constexpr = (COUNT + 31) // 32
        base = stored[TENSOR + 1] + sequence * (ROWS * groups) + row * groups
        pair = load_words(base, slot * (ROWS * groups), valid, START // 32, 1, BLOCK // 32, groups)
        LAST: tl.constexpr = last_of(BITS)
        evens = tl.join(_decoded(first, pair, BITS, 0, TYPE), _decoded(last, pair, BITS, LAST, TYPE))
        odds = tl.join(_decoded(first, pair, BITS, BITS, TYPE), _decoded(last, pair, BITS, LAST + BITS, TYPE))
        x = _in_columns(evens, odds, BLOCK)
    return x


@triton.jit
def code_piece(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr,
    TENSOR: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``load_piece`` of packed numbers, their codes: float16, 2^−24 · code · ``moved_by``."""
    first, last = _words_of(stored, sequence, slot, valid, row, ROWS, TENSOR, BITS, COUNT, START, BLOCK)
    LAST: tl.constexpr = last_of(BITS)
    evens = tl.join(_codes(first, BITS, 0), _codes(last, BITS, LAST))
    odds = tl.join(_codes(first, BITS, BITS), _codes(last, BITS, LAST + BITS))
    return _in_columns(evens, odds, BLOCK)


@triton.jit
def operand(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr, PIECES: tl.constexpr, i: tl.constexpr, TYPE: tl.constexpr
):
    """The i-th piece of a row as an operand of a matrix product, in TYPE."""
    x = load_piece(
        stored, sequence, slot, valid, row, ROWS, PIECES[7 * i], PIECES[7 * i + 1], PIECES[7 * i + 2],
        PIECES[7 * i + 3], PIECES[7 * i + 4], TYPE,
    )  # fmt: skip
    if x.dtype != TYPE:  # else it goes from memory to the product as it is
        x = bounded(x.to(tl.float32), TYPE)
    return x


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)
