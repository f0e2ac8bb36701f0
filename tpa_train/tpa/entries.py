"""What one token puts into the cache, as data: the layout of every form, its bytes, and packing to them and back.

An entry is a matrix of numbers a token, [rows, count]; its last dimension is stored in groups of 32, each at a width
of its own (16: the cache's floating-point type). Groups of one width lie together, whatever is between them: a GPU
reads as many of one width at a time as there are. Several widths in one entry are how a latent in its eigenbasis spends
bits where the energy is (transform coding: Goyal, IEEE SPM 2001, §"reverse water-filling").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.tpa.quantization import (
    GROUP,
    check_bits,
    code_levels,
    decode,
    dequantize,
    entry_bytes,
    fake_quantize,
    pack_codes,
    quantize,
    stored_shapes,
)

Bits = int | tuple[int, ...]  # one width for all groups of 32, or one a group

StoredShape = tuple[tuple[int, ...], torch.dtype | None]  # trailing shape and dtype; None: the cache's own


def check_widths(bits: Bits, count: int | None = None) -> None:
    """Refuses widths that the cache cannot store, or that do not fit ``count`` numbers.

    Raises:
        UserError: see the message.
    """
    widths = (bits,) if isinstance(bits, int) else bits
    for width in widths:
        check_bits(width)
    if not isinstance(bits, int) and count is not None and len(bits) != -(-count // GROUP):
        raise UserError(f"{len(bits)} widths were given for {count} cached numbers, one a group of {GROUP} is needed.")


def mean_bits(bits: Bits) -> float:
    """Returns the average width of the groups."""
    return float(bits) if isinstance(bits, int) else sum(bits) / max(1, len(bits))


def describe_bits(bits: Bits) -> str:
    """Returns widths for a person: ``4``, or ``8+4×3`` for one group of 8 bits and three of 4."""
    if isinstance(bits, int):
        return str(bits)
    runs = [(width, len(list(run))) for width, run in groupby(bits)]
    return "+".join(f"{width}×{count}" if count > 1 else str(width) for width, count in runs)


class Segment(NamedTuple):
    """Groups of one width, which are stored together: ``count`` numbers, of which only the last group can have less
    than 32."""

    bits: int
    count: int
    groups: tuple[int, ...]


class Run(NamedTuple):
    """Numbers ``start`` … ``start + count`` of an entry, which lie from its segment's ``within``-th on."""

    bits: int
    start: int
    count: int
    segment: int
    within: int

    @property
    def numbers(self) -> slice:
        return slice(self.start, self.start + self.count)

    @property
    def groups(self) -> slice:
        return slice(self.start // GROUP, -(-(self.start + self.count) // GROUP))


def _joined(parts: list[Tensor], dim: int = -1) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


@dataclass(frozen=True)
class Entry:
    """``rows`` × ``count`` numbers that one token caches, e.g. one row a KV head."""

    rows: int
    count: int
    bits: Bits = 16

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The width of every group."""
        return (self.bits,) * -(-self.count // GROUP) if isinstance(self.bits, int) else self.bits

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The groups of each width, in the order in which widths first come."""
        return tuple(
            Segment(bits, sum(self._size(g) for g in groups), groups)
            for bits in dict.fromkeys(self.widths)
            for groups in [tuple(g for g, width in enumerate(self.widths) if width == bits)]
        )

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Neighbouring groups of one width, in the order of the numbers."""
        found: list[Run] = []
        for bits, neighbours in groupby(range(len(self.widths)), key=self.widths.__getitem__):
            first, *_ = groups = list(neighbours)
            segment = next(index for index, s in enumerate(self.segments) if s.bits == bits)
            count = sum(self._size(g) for g in groups)
            within = self.segments[segment].groups.index(first) * GROUP
            found.append(Run(bits, first * GROUP, count, segment, within))
        return tuple(found)

    def _size(self, group: int) -> int:
        return min(GROUP, self.count - group * GROUP)

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded beyond the cache's floating-point type."""
        return all(bits == 16 for bits in self.widths)

    @property
    def nbytes(self) -> int:
        """Bytes a token, scales counted, in a 16-bit cache."""
        return self.rows * sum(entry_bytes(s.count, s.bits) for s in self.segments)

    def storage(self) -> list[StoredShape]:
        """Returns the trailing shape and dtype of every tensor that holds the entry."""
        shapes: list[StoredShape] = []
        for bits, count, _ in self.segments:
            if bits == 16:
                shapes.append(((self.rows, count), None))
                continue
            codes, scales = stored_shapes(count, bits)
            shapes += [((self.rows, *codes), torch.uint8), ((self.rows, *scales), torch.float16)]
        return shapes

    def pack(self, x: Tensor, levels: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns what the cache stores of ``x`` [..., rows, count], one tensor per item of ``storage``.

        ``levels``: as in ``rounded``.
        """
        return (x,) if self.exact else self._store(x, *self._quantized(x, levels))

    def pack_rounded(self, x: Tensor, levels: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Returns ``pack``'s tensors, and ``x`` as ``unpack`` will give it back, without a gradient."""
        if self.exact:
            return (x,), x
        codes, scales = self._quantized(x, levels)
        rounded = dequantize(codes, scales, x.dtype)
        for run in self.runs:
            if run.bits == 16:
                rounded[..., run.numbers] = x[..., run.numbers]
        return self._store(x, codes, scales), rounded

    def _quantized(self, x: Tensor, levels: Tensor | None) -> tuple[Tensor, Tensor]:
        # All widths in one pass: a new token's numbers are few, and calls would cost more than they.
        return quantize(x, (self.levels() if levels is None else levels).to(x.device))

    def _store(self, x: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        """Returns ``pack``'s tensors from ``quantize``'s."""
        stored: list[Tensor] = []
        for index, segment in enumerate(self.segments):
            runs = [run for run in self.runs if run.segment == index]
            if segment.bits == 16:
                stored.append(_joined([x[..., run.numbers] for run in runs]))
            else:
                stored.append(pack_codes(_joined([codes[..., run.numbers] for run in runs]), segment.bits))
                # As int32: autocast on a CPU cannot join float16. Sliced: an index would be copied to the device, which
                # a recorded step cannot do.
                pairs = scales.view(torch.int32)
                stored.append(_joined([pairs[..., run.groups, :] for run in runs], dim=-2).view(scales.dtype))
        return tuple(stored)

    def unpack(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Returns the numbers [..., rows, count] that ``pack`` stored, in ``dtype``."""
        parts, rest = [], list(stored)
        for bits, count, _ in self.segments:
            if bits == 16:
                parts.append(rest.pop(0).to(dtype))
            else:
                parts.append(decode(rest.pop(0), rest.pop(0), bits, count, dtype))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([parts[run.segment][..., run.within : run.within + run.count] for run in self.runs], dim=-1)

    def levels(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns what ``rounded`` needs to know of the widths (``quantization.code_levels``)."""
        return code_levels(self.widths, device)

    def rounded(self, x: Tensor, levels: Tensor | None = None) -> Tensor:
        """Returns ``x`` as the cache would give it back; the gradient passes straight through.

        ``levels``: of this entry, where the caller keeps them (best on x's device).
        """
        if self.exact:
            return x
        return fake_quantize(x, (self.levels() if levels is None else levels).to(x.device))
