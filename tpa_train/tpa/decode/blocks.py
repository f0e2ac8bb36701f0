"""Reading a cache entry block by block on the CPU, in as few passes over memory as PyTorch allows.

Numbers come out in *storage order*: the codes of one bit plane lie together, so that no plane is ever interleaved with
another; whoever multiplies with them permutes a matrix once instead. What a group of 32 has in common is kept apart:
a number is value + base[group], with value = scale · (code − half) small and base = minimum + scale · half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpa_train.tpa.entries import Entry
from tpa_train.tpa.quantization import GROUP, unpack_codes


@dataclass(frozen=True)
class _Part:
    """Neighbouring groups of one width, equally full: ``planes`` × ``groups`` × ``width`` columns from ``column``."""

    bits: int
    stored: int  # index of the tensor that holds the codes; the scales are the next one
    first_byte: int
    first_group: int
    column: int
    planes: int
    groups: int
    width: int

    @property
    def columns(self) -> int:
        return self.planes * self.groups * self.width


class EntryReader:
    """Reads rows of an entry into preallocated blocks.

    Attributes:
        columns: of a block's values; more than ``entry.count`` where the last byte of a plane is not full.
        bases: of a block's bases, one a group of 32 that is rounded.
        order: int64 [columns], which of the entry's numbers a column is; −1 where it is none (and its value arbitrary,
            but finite).
        group: int64 [columns], which base belongs to a column; −1 where none does.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.parts: list[_Part] = []
        order: list[Tensor] = []
        group: list[Tensor] = []
        column = bases = stored = 0
        for start, stop, bits in entry.segments:
            if bits == 16:
                part = _Part(bits, stored, 0, -1, column, 1, 1, stop - start)
                order.append(torch.arange(start, stop))
                group.append(torch.full((stop - start,), -1))
                self.parts.append(part)
                column, stored = column + part.columns, stored + 1
                continue
            planes = 8 // bits if 8 % bits == 0 else 1
            for first, count in _full_and_rest(stop - start):
                per_group = min(GROUP, count)
                width = -(-per_group // planes)
                groups = count // per_group
                part = _Part(bits, stored, first * bits // 8, bases, column, planes, groups, width)
                # Little-endian: byte j of a group holds its codes j·planes + plane.
                plane, member, byte = torch.meshgrid(
                    torch.arange(planes), torch.arange(groups), torch.arange(width), indexing="ij"
                )
                within = byte * planes + plane
                number = torch.where(within < per_group, start + first + GROUP * member + within, -1)
                order.append(number.flatten())
                group.append(torch.where(within < per_group, bases + member, -1).flatten())
                self.parts.append(part)
                column, bases = column + part.columns, bases + groups
            stored += 2
        self.columns, self.bases, self.tensors = column, bases, stored
        self.order, self.group = torch.cat(order), torch.cat(group)

    def read(self, stored: tuple[Tensor, ...], values: Tensor, bases: Tensor, codes: Tensor) -> None:
        """Unpacks n tokens.

        Args:
            stored: what ``Entry.pack`` gave for them, each [n, rows, ...].
            values: [n, rows, columns], written. bases: [n, rows, bases], written. Both in float32 or float64.
            codes: uint8 with at least n · rows · columns numbers, to work in.
        """
        tokens, rows = values.shape[:2]
        for part in self.parts:
            out = values[..., part.column : part.column + part.columns]
            packed = stored[part.stored]
            if part.bits == 16:
                out.copy_(packed)
                continue
            out = out.unflatten(-1, (part.planes, part.groups, part.width))
            half, last = 1 << (part.bits - 1), part.first_group + part.groups
            if part.planes * part.bits == 8:
                width = part.groups * part.width
                packed = packed[..., part.first_byte : part.first_byte + width]
                room = codes[: tokens * rows * part.columns].view(tokens, rows, part.planes, width)
                _planes(packed, part.bits, room)
            else:
                first = part.first_byte * 8 // part.bits
                number = unpack_codes(packed, part.bits, first + part.columns)
                room = codes[: tokens * rows * part.columns].view(tokens, rows, 1, part.columns)
                torch.sub(number[..., None, first:], half, out=room)  # wraps around, as a signed number has it
            out.copy_(room.view(torch.int8).unflatten(-1, (part.groups, part.width)))
            inside = part.first_group - self._first_group(part)
            scale, low = stored[part.stored + 1][..., inside : inside + part.groups, :].to(values.dtype).unbind(-1)
            out.mul_(scale[:, :, None, :, None])
            torch.add(low, scale, alpha=half, out=bases[..., part.first_group : last])

    def _first_group(self, part: _Part) -> int:
        """Returns the number of the first group that is stored in the same tensor."""
        return next(other.first_group for other in self.parts if other.stored == part.stored)


def _full_and_rest(count: int) -> list[tuple[int, int]]:
    """Returns (start, count) of the full groups of 32, and of what is left."""
    full = count // GROUP * GROUP
    return [(start, size) for start, size in ((0, full), (full, count - full)) if size]


def _planes(packed: Tensor, bits: int, out: Tensor) -> None:
    """Writes the codes of bytes ``packed`` [n, rows, w] less half their range into ``out`` [n, rows, 8/bits, w].

    The result is to be read as int8. In the highest plane a code's top bit is the byte's: flipping it, and an
    arithmetic shift, give the signed number.
    """
    half = 1 << (bits - 1)
    if bits == 8:
        torch.bitwise_xor(packed[:, :, None], half, out=out)
        return
    planes = 8 // bits
    for plane in range(planes):
        part = out[:, :, plane]
        if plane == 0:
            torch.bitwise_and(packed, (1 << bits) - 1, out=part)
        else:
            torch.bitwise_right_shift(packed, bits * plane, out=part)
            if plane + 1 < planes:
                part.bitwise_and_((1 << bits) - 1)
    out.sub_(half)
