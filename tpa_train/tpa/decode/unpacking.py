"""Device functions that read cached entries: what is quantized (``tpa.quantization``) is unpacked in registers, or its
codes are handed on as numbers.

The last dimension of an entry is read in PIECES, seven whole numbers each: tensor, bits, numbers of its row, first
number, BLOCK, groups of the entry (16 bits each), column where all blocks are padded. T is the tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpa_train.tpa.quantization import planes

planes_of = triton.constexpr_function(planes)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def plane_of(BITS, k):
    """Returns the width of the k-th plane of codes, 0 where there is none."""
    return (*planes_of(BITS), 0)[k]


@triton.constexpr_function
def start_of(BITS, COUNT, k):
    """Returns where the k-th plane of COUNT codes begins, in bytes; the one after the last: where the row ends."""
    return sum(-(-COUNT * width // 8) for width in planes_of(BITS)[:k])


@triton.constexpr_function
def bit_of(BITS, j):
    """Returns at which bit the j-th code of a unit is taken out: where it lies, or eight to the right, since codes are
    the last ten bits of float16 numbers."""
    at = planes_of(BITS)[0] * j
    return 0 if BITS == 8 else at if at + BITS <= 10 else at - 8


@triton.constexpr_function
def factor_of(BITS, j):
    """Returns by which factor the j-th code is then larger than at bit 0."""
    return float(1 << bit_of(BITS, j))


@triton.constexpr_function
def in_words(BITS, COUNT):
    """Returns whether rows of COUNT codes, and planes in them, are whole words."""
    return all(start_of(BITS, COUNT, k) % 4 == 0 for k in range(1, len(planes_of(BITS)) + 1))


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


@triton.constexpr_function
def _neighbours(PIECES, i):
    first = _group_at(PIECES, i, 0)
    held = range(1, _groups_in(PIECES, i))
    return all(_group_at(PIECES, i, k) in (first + k, 0) for k in held)  # 0: beyond the last


@triton.jit
def columns(n, PIECES: tl.constexpr, i: tl.constexpr):
    """Which numbers of the entry the numbers ``n`` of the i-th piece are; ``plan.columns`` says the same."""
    n += PIECES[7 * i + 3] % 32
    if _neighbours(PIECES, i):  # said so that loads and stores can be wide
        n += _group_at(PIECES, i, 0) * 32
    else:
        group = 0 * n + _group_at(PIECES, i, 0)
        for k in tl.static_range(1, _groups_in(PIECES, i)):
            group = tl.where(n // 32 == k, _group_at(PIECES, i, k), group)
        n = group * 32 + n % 32
    return n


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
def _plane(
    base, at, valid, WIDTH: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr, COUNT: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """COUNT times eight codes of one plane, from byte FIRST of the rows at ``at`` [T] on, those before byte END: int32
    [T, COUNT], each half of which has four. Of 8 bits twice as many, which have four each."""
    UNIT: tl.constexpr = WIDTH if WIDTH < 8 else 4  # bytes
    UNITS: tl.constexpr = COUNT if WIDTH < 8 else 2 * COUNT
    if not WORDS:
        x = load_words(base, at, valid, FIRST, UNIT, UNITS, END)
        for i in tl.static_range(1, UNIT):
            x |= load_words(base, at, valid, FIRST + i, UNIT, UNITS, END) << 8 * i
    else:
        KIND: tl.constexpr = tl.int32 if UNIT == 4 else (tl.int16 if UNIT == 2 else tl.uint8)
        base = base.to(tl.pointer_type(KIND), bitcast=True)
        x = load_words(base, at * (4 // UNIT), valid, FIRST // UNIT, 1, UNITS, END // UNIT)
    if WIDTH == 2:
        x = x & 0xFF | (x & 0xFF00) << 8
    elif WIDTH == 1:
        x = x & 0xF | (x & 0xF0) << 12
    return x


@triton.jit
def _words_of(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr,
    TENSOR: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The codes of a piece of packed numbers, for ``_pairs``: two words [T, BLOCK / 32, 4]."""
    WORDS: tl.constexpr = in_words(BITS, COUNT)
    KIND: tl.constexpr = tl.int32 if WORDS else tl.uint8
    pitch: tl.constexpr = start_of(BITS, COUNT, 2) // (4 if WORDS else 1)
    base = stored[TENSOR].to(tl.pointer_type(KIND), bitcast=True) + sequence * (ROWS * pitch) + row * pitch
    at = slot * (ROWS * pitch)
    LOW: tl.constexpr = plane_of(BITS, 0)
    HIGH: tl.constexpr = plane_of(BITS, 1)
    FIRST: tl.constexpr = START * LOW // 8
    x = _plane(base, at, valid, LOW, FIRST, start_of(BITS, COUNT, 1), BLOCK // 8, WORDS)
    if BITS == 8:
        one, other = tl.split(tl.reshape(x, (x.shape[0], BLOCK // 32, 4, 2)))
        found = (one & 0xFFFF | other << 16, one >> 16 & 0xFFFF | other & -65536)
    else:
        x = tl.reshape(x, (x.shape[0], BLOCK // 32, 4))
        found = (x, x)
        if HIGH > 0:
            ABOVE: tl.constexpr = start_of(BITS, COUNT, 1) + START * HIGH // 8
            y = _plane(base, at, valid, HIGH, ABOVE, start_of(BITS, COUNT, 2), BLOCK // 8, WORDS)
            found = (x, tl.reshape(y, (x.shape[0], BLOCK // 32, 4)))
    return found


@triton.jit
def _moved(x, FROM: tl.constexpr, TO: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH bits of both halves of ``x`` from bit FROM at bit TO, and nothing else."""
    if FROM > TO:
        x = x >> (FROM - TO)
    elif FROM < TO:
        x = x << (TO - FROM)
    return x & ((1 << WIDTH) - 1 << TO) * 0x10001


@triton.jit
def _pairs(words, BITS: tl.constexpr, j: tl.constexpr):
    """The j-th codes of four of both columns: at ``bit_of`` of both halves of [T, BLOCK / 32, 4]."""
    LOW: tl.constexpr = plane_of(BITS, 0)
    HIGH: tl.constexpr = plane_of(BITS, 1)
    AT: tl.constexpr = bit_of(BITS, j)
    if BITS == 8:
        x = _moved(words[j // 2], j % 2 * 8, 0, 8)
    else:
        x = _moved(words[0], LOW * j, AT, LOW)
        if HIGH > 0:
            x = x | _moved(words[1], HIGH * j, AT + LOW, HIGH)
    return x


@triton.jit
def _codes(words, BITS: tl.constexpr, j: tl.constexpr):
    """The j-th codes as float16 numbers without an exponent, 2^−24 · code · ``factor_of``: [T, BLOCK / 32, 4, 2]."""
    x = _pairs(words, BITS, j)
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
    first = tl.where(n == 0, factor_of(BITS, 0), factor_of(BITS, 1))
    return tl.where(n < 2, first, tl.where(n == 2, factor_of(BITS, 2), factor_of(BITS, 3)))


@triton.jit
def _decoded(words, pair, BITS: tl.constexpr, j: tl.constexpr, TYPE: tl.constexpr):
    """The j-th codes as low + scale · code in TYPE, [T, BLOCK / 32, 4, 2].

    ``pair``: scales and lows, [T, BLOCK / 32]. Rounded once, as these and the codes are exact in float16: two codes at
    a time become the last bits of two mantissas of 1024, and are moved to their place by a product rather than shifted.
    """
    x = _pairs(words, BITS, j)
    FROM: tl.constexpr = bit_of(BITS, j)
    pair = tl.broadcast_to(pair[:, :, None], (x.shape[0], x.shape[1], x.shape[2]))
    if INTERPRETED or TYPE == tl.float32:
        scale = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x = x >> FROM
        first, second = (x & 0xFFFF).to(tl.float32) * scale + low, (x >> 16).to(tl.float32) * scale + low
        x = tl.join(first, second).to(TYPE)
    else:
        # 2^−FROM and −1024 · 2^−FROM, twice
        UNDO: tl.constexpr = (15 - FROM << 10) * 0x10001
        LESS: tl.constexpr = (25 - FROM << 10) * 0x10001 - 0x7FFF8000
        first, second = tl.inline_asm_elementwise(
            "{.reg .b32 a, b, c; or.b32 a, $2, 0x64006400; fma.rn.f16x2 a, a, $3, $4;"
            " prmt.b32 b, $5, $5, 0x1010; prmt.b32 c, $5, $5, 0x3232; fma.rn.f16x2 a, a, b, c; mov.b32 {$0, $1}, a;}",
            "=h,=h,r,r,r,r", [x, UNDO, LESS, pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
        x = tl.join(first, second)
    return x


@triton.jit
def _in_columns(evens, odds, BLOCK: tl.constexpr):
    """[T, BLOCK / 32, 4, 2, 2] twice as [T, BLOCK], in the ``order`` of columns."""
    x = tl.permute(tl.join(evens, odds), (0, 1, 4, 5, 2, 3))
    return tl.reshape(x, (x.shape[0], BLOCK))


@triton.jit
def pairs_of(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr, TENSOR: tl.constexpr, COUNT: tl.constexpr,
    START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scale and low of every group of a piece, the two halves of int32 [T, BLOCK / 32]."""
    groups: tl.constexpr = (COUNT + 31) // 32
    base = stored[TENSOR + 1] + sequence * (ROWS * groups) + row * groups
    return load_words(base, slot * (ROWS * groups), valid, START // 32, 1, BLOCK // 32, groups)


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
        words = _words_of(stored, sequence, slot, valid, row, ROWS, TENSOR, BITS, COUNT, START, BLOCK)
        pair = pairs_of(stored, sequence, slot, valid, row, ROWS, TENSOR, COUNT, START, BLOCK)
        evens = tl.join(_decoded(words, pair, BITS, 0, TYPE), _decoded(words, pair, BITS, 2, TYPE))
        odds = tl.join(_decoded(words, pair, BITS, 1, TYPE), _decoded(words, pair, BITS, 3, TYPE))
        x = _in_columns(evens, odds, BLOCK)
    return x


@triton.jit
def code_piece(
    stored, sequence, slot, valid, row, ROWS: tl.constexpr,
    TENSOR: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``load_piece`` of packed numbers, their codes: float16, 2^−24 · code · ``moved_by``."""
    words = _words_of(stored, sequence, slot, valid, row, ROWS, TENSOR, BITS, COUNT, START, BLOCK)
    evens = tl.join(_codes(words, BITS, 0), _codes(words, BITS, 2))
    odds = tl.join(_codes(words, BITS, 1), _codes(words, BITS, 3))
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
