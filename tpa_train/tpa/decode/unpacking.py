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
def _load_codes(base, at, valid, BITS: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr):
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
