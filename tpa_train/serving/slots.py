"""The cache of a running engine: rows of sequences whose lengths differ, in buffers that never move or grow.

A row is one sequence. A prompt goes into its row chunk by chunk (``SlotCache.row``), or short ones into several rows at
once (``SlotCache.prompts``); afterwards all rows that decode take
one token each, at once (``SlotCache.step``). Both write where the other reads: position p of a row lies in slot p
modulo the layer's slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpa_train.gemma3.attention import Attention, Documents, attend
from tpa_train.gemma3.cache import KVCache, allocate_buffers, buffer_bytes, rotary_tables
from tpa_train.gemma3.images import ImageBlocks
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.decode import CachedTokens, attend_new


class SlotCache:
    """Room for ``rows`` sequences of at most ``capacity`` tokens each.

    Who has which row, and how long it is, is the caller's to know: the engine keeps it on the host, where it decides.

    Args:
        model: the dense or TPA model whose layers will write here.
        rows, capacity: sequences and tokens to make room for.
        dtype: of the stored numbers, where a layer does not quantize them; the weights' own when left out.
        device: where to allocate; the weights' own when left out.
    """

    def __init__(
        self,
        model: Gemma3ForCausalLM,
        rows: int,
        capacity: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        weight = model.head_weight
        self.config, self.rows, self.capacity = model.config, rows, capacity
        self.device = weight.device if device is None else torch.device(device)
        with torch.inference_mode(False):  # inference tensors could not be written to outside of that mode
            self.buffers = allocate_buffers(model, rows, capacity, dtype or weight.dtype, self.device)
            self.tables = rotary_tables(model.config, capacity, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer as allocated."""
        return buffer_bytes(self.buffers)

    def row(self, row: int) -> KVCache:
        """Returns row ``row`` as an empty cache of one sequence, for its prompt; it writes into these buffers."""
        buffers = [tuple(t[row : row + 1] for t in tensors) for tensors in self.buffers]
        return KVCache.over(self.config, buffers, self.tables, self.capacity)

    def step(
        self, rows: Tensor, starts: Tensor, active: Tensor, in_order: bool = False, longest: int | None = None
    ) -> DecodeStep:
        """Returns what one forward pass over one new token a sequence takes as its ``cache``.

        Args:
            rows: int64 [B], the row of each sequence, all different.
            starts: int64 [B], tokens that it holds already: the new one's position.
            active: int64 [B], 1, or 0 where nothing decodes. Such a sequence must name a row that does not decode
                either, and the tokens it holds: what is written there is overwritten by the row's next token, and in
                a ring takes the place of one that has left the window.
            in_order: the rows are 0, 1, …, which spares copies.
            longest: the longest of the sequences, the new token included, where the host knows it: reading no further
                spares time where a cache is read as a whole.
        """
        lengths = ((starts + 1) * active).to(torch.int32)
        return DecodeStep(self, rows, starts, lengths, in_order, longest)

    def prompts(self, rows: Sequence[int], lengths: Sequence[int]) -> PackedPrompts:
        """Returns the ``cache`` of one forward pass over several whole prompts in a row, each into an empty row."""
        return PackedPrompts(self, list(rows), list(lengths))


class PackedPrompts:
    """Whole prompts as documents of one sequence of tokens (a ``gemma3.attention.Cache``).

    Short prompts cost a forward pass each otherwise, and a GPU reads a thousand tokens about as fast as ten.
    """

    def __init__(self, cache: SlotCache, rows: list[int], lengths: list[int]) -> None:
        self.cache, self.rows, self.lengths = cache, rows, lengths
        ends = [0, *itertools.accumulate(lengths)]
        ids = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))[None].to(cache.device)
        edges = torch.tensor(ends, dtype=torch.int32, device=cache.device)
        self.starts, self.documents = ends[:-1], Documents(ids, edges)
        self.order = torch.cat([torch.arange(n) for n in lengths]).to(cache.device)
        self._places: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def positions(self, count: int) -> Tensor:
        """Returns every token's position in its own prompt, [1, count]."""
        assert count == sum(self.lengths)
        return self.order[None]

    def attend(
        self, attention: Attention, queries: Tensor, entries: tuple[Tensor, ...], images: ImageBlocks | None = None
    ) -> Tensor:
        """Stores what is left of each prompt in its row and attends inside of each: [1, L, H, d] -> [1, L, H, e]."""
        buffers = self.cache.buffers[attention.layer]
        packed = tuple(t.to(b.dtype) for t, b in zip(attention.pack(entries), buffers, strict=True))
        tokens, rows, slots = self._kept(buffers[0].shape[1])
        for buffer, new in zip(buffers, packed, strict=True):
            buffer[rows, slots] = new[0, tokens]
        rotary = tuple(t[self.order][None] for t in self.cache.tables[attention.kind])
        k, v = attention.read(attention.unpack(packed, queries.dtype), rotary)
        return attend(queries, k, v, attention.config.scale, attention.window, self.documents)

    def advance(self, count: int) -> None:
        """Nothing: lengths are the caller's."""

    def _kept(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns which tokens stay in ``size`` slots, and their rows and slots: the last ones of each prompt."""
        if size not in self._places:
            places = [
                (start + p, row, p % size)
                for start, row, n in zip(self.starts, self.rows, self.lengths, strict=True)
                for p in range(max(0, n - size), n)
            ]
            self._places[size] = torch.tensor(places).to(self.cache.device, non_blocking=True).unbind(1)
        return self._places[size]


@dataclass
class DecodeStep:
    """One new token for each of B sequences (a ``gemma3.attention.Cache``)."""

    cache: SlotCache
    rows: Tensor
    starts: Tensor
    lengths: Tensor  # int32 [B], the new token counted; 0 where idle
    in_order: bool = False
    longest: int | None = None

    def positions(self, count: int) -> Tensor:
        """Returns the new tokens' positions, [B, 1]."""
        assert count == 1, "a step takes one token a sequence"
        return self.starts[:, None]

    def attend(
        self, attention: Attention, queries: Tensor, entries: tuple[Tensor, ...], images: ImageBlocks | None = None
    ) -> Tensor:
        """Scatters the entries [B, 1, ...] into their rows and attends: [B, 1, H, d] -> [B, 1, H, e]."""
        buffers = self.cache.buffers[attention.layer]

        def store(packed: tuple[Tensor, ...]) -> None:
            for buffer, new in zip(buffers, packed, strict=True):
                buffer[self.rows, self.starts % buffer.shape[1]] = new[:, 0].to(buffer.dtype)

        rows = None if self.in_order else self.rows
        cached = CachedTokens(buffers, self.lengths, self.cache.tables[attention.kind], rows)
        return attend_new(attention, queries[:, 0], entries, cached, store, self.longest)[:, None]

    def advance(self, count: int) -> None:
        """Nothing: lengths are the caller's."""
