"""What a layer has cached of several sequences of different lengths, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpa_train.gemma3.attention import RotaryTable


@dataclass
class CachedTokens:
    """The entries of B sequences in one layer's buffers. Position p of a sequence lies in slot p modulo the slots.

    A global layer has a slot for every position; a local one has as many as its window (or fewer, where the cache is
    shorter), so that what fell out of the window is overwritten and all that is left may be seen.

    Attributes:
        stored: what ``Attention.pack`` gave, one tensor per item of ``Attention.storage``, each [rows, slots, ...].
        lengths: int32 [B], tokens of each sequence, the new one counted; 0 where a row is idle (its result is unused).
        rotary: cos and sin of the positions 0, 1, …, each [capacity, 1, d/2], float32, of the layer's kind.
        rows: int [B], which row of the buffers a sequence has; None: sequence i has row i.
    """

    stored: tuple[Tensor, ...]
    lengths: Tensor
    rotary: RotaryTable
    rows: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.stored[0].shape[1]

    def part(self, start: int, count: int) -> CachedTokens:
        """Returns the sequences ``start`` … ``start + count`` alone, without a copy of what they have cached."""
        part, stored, rows = slice(start, start + count), self.stored, self.rows
        if rows is None:
            stored = tuple(t[part] for t in stored)
        return CachedTokens(stored, self.lengths[part], self.rotary, None if rows is None else rows[part])

    def first(self, count: int) -> CachedTokens:
        """Returns the same without the slots from ``count`` on, if there are any: no sequence has as many tokens."""
        if count >= self.slots:
            return self
        return CachedTokens(tuple(t[:, :count] for t in self.stored), self.lengths, self.rotary, self.rows)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Returns the position in every slot, int64 [B, slots] (0 where empty), and which hold one, bool [B, slots]."""
        slot = torch.arange(self.slots, device=self.lengths.device)[None]
        last = self.lengths.long()[:, None] - 1
        positions = last - (last - slot) % self.slots
        return positions.clamp_min(0), positions >= 0
