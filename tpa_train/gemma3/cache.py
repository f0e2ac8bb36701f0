"""The key/value cache: preallocated, ring buffers in local layers, and counted in bytes that were really allocated.

It stores whatever a layer's ``Attention.pack`` returns, so one cache serves the dense model and every TPA form. Here
all sequences have the same length; ``tpa_train.serving.slots`` keeps sequences of different lengths in the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.attention import Attention, RotaryTable, attend, attend_last, fuses, sdpa
from tpa_train.gemma3.config import Gemma3Config, LayerKind
from tpa_train.gemma3.images import ImageBlocks
from tpa_train.gemma3.layers import rotary_table

if TYPE_CHECKING:
    from tpa_train.gemma3.model import Gemma3ForCausalLM

Buffers = list[tuple[Tensor, ...]]  # of each layer, one [rows, slots, ...] per item of ``Attention.storage``


def allocate_buffers(
    model: Gemma3ForCausalLM, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> Buffers:
    """Returns zeros for ``rows`` sequences of at most ``capacity`` tokens; position p lies in slot p modulo the slots.

    A global layer has ``capacity`` slots, a local one as many as its window, if that is less.
    """
    return [
        tuple(
            torch.zeros(rows, model.config.cached_tokens(index, capacity), *shape, dtype=own or dtype, device=device)
            for shape, own in layer.self_attn.storage()
        )
        for index, layer in enumerate(model.layers)
    ]


def buffer_bytes(buffers: Buffers) -> int:
    """Returns the bytes of every buffer as allocated."""
    return sum(t.numel() * t.element_size() for tensors in buffers for t in tensors)


def rotary_tables(config: Gemma3Config, capacity: int, device: torch.device) -> dict[LayerKind, RotaryTable]:
    """Returns cos and sin of the positions below ``capacity`` for each kind of layer, [capacity, 1, d/2]."""
    positions = torch.arange(capacity, device=device)
    return {kind: rotary_table(config, kind, positions) for kind in set(config.layer_kinds)}


@dataclass
class CacheView:
    """What one layer may look at after its new tokens went in."""

    stored: tuple[Tensor, ...]  # what ``Attention.pack`` gave for S tokens, each [B, S, ...]
    slots: Tensor  # int [S], positions of those tokens, in order
    rotary: RotaryTable  # of those tokens


class KVCache:
    """Cache for ``batch`` sequences of one length, at most ``capacity`` tokens.

    Args:
        model: the dense or TPA model whose layers will write here.
        batch, capacity: sequences and tokens to make room for.
        dtype: of the stored numbers, where a layer does not quantize them.
        device: where to allocate; ``meta`` to count bytes without memory.

    Raises:
        UserError: more tokens are written than ``capacity``.
    """

    def __init__(
        self,
        model: Gemma3ForCausalLM,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        device = torch.device(device) if device is not None else model.embed_tokens.weight.device
        tables = {} if device.type == "meta" else rotary_tables(model.config, capacity, device)
        self._hold(model.config, allocate_buffers(model, batch, capacity, dtype, device), tables, capacity)

    @classmethod
    def over(
        cls, config: Gemma3Config, buffers: Buffers, tables: dict[LayerKind, RotaryTable], capacity: int
    ) -> KVCache:
        """Returns an empty cache in buffers that exist, in the layout of ``allocate_buffers``."""
        cache = cls.__new__(cls)
        cache._hold(config, buffers, tables, capacity)
        return cache

    def _hold(self, config: Gemma3Config, buffers: Buffers, tables: dict, capacity: int) -> None:
        self.config, self.capacity, self.length = config, capacity, 0
        self.buffers, self._tables = buffers, tables

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer as allocated."""
        return buffer_bytes(self.buffers)

    def positions(self, count: int) -> Tensor:
        """Returns RoPE positions int [1, count] of the next ``count`` tokens.

        Raises:
            UserError: the tokens do not fit.
        """
        if self.length + count > self.capacity:
            raise UserError(
                f"the cache holds {self.capacity} tokens but {self.length + count} are needed; shorten the prompt or "
                "raise the context."
            )
        device = self.buffers[0][0].device
        return torch.arange(self.length, self.length + count, device=device)[None]

    def attend(
        self, attention: Attention, queries: Tensor, entries: tuple[Tensor, ...], images: ImageBlocks | None = None
    ) -> Tensor:
        """Stores the new tokens' entries and attends over all that the layer holds: [B, n, H, d] -> [B, n, H, e].

        ``advance`` must be called once all layers of a forward pass have attended.
        """
        scale, count = attention.config.scale, queries.shape[1]
        if count == 1:
            return self._attend_one(attention, queries, entries)
        view = self._update(attention.layer, attention.pack(entries))
        k, v = attention.read(attention.unpack(view.stored, queries.dtype), view.rotary)
        if self.length == 0:  # the prompt's first chunk: the cheap causal path applies
            return attend(queries, k, v, scale, attention.window, images=images)
        if images is None and fuses(queries):
            return attend_last(queries, k, v, scale, attention.window)
        mask = self._mask(count, view.slots, attention.window)
        if images is not None:  # the new tokens are the last of those seen
            new = mask[..., -count:] | images.future
            mask = torch.cat((mask[..., :-count].expand(*new.shape[:3], -1), new), dim=-1)
        return sdpa(queries, k, v, scale, mask)

    def _attend_one(self, attention: Attention, queries: Tensor, entries: tuple[Tensor, ...]) -> Tensor:
        """As ``attend``, of one token a sequence: it sees every entry, since a ring holds no older than the window."""
        from tpa_train.tpa.decode import CachedTokens, attend_new  # its forms are built on this package

        buffers = self.buffers[attention.layer]

        def store(packed: tuple[Tensor, ...]) -> None:
            for buffer, new in zip(buffers, packed, strict=True):
                buffer[:, self.length % buffer.shape[1]] = new[:, 0].to(buffer.dtype)

        lengths = torch.full((len(queries),), self.length + 1, dtype=torch.int32, device=queries.device)
        cached = CachedTokens(buffers, lengths, self._tables[attention.kind])
        return attend_new(attention, queries[:, 0], entries, cached, store, self.length + 1)[:, None]

    def advance(self, count: int) -> None:
        self.length += count

    def _update(self, layer: int, packed: tuple[Tensor, ...]) -> CacheView:
        """Stores several tokens' ``packed`` tensors [B, n, ...] of ``layer`` and returns what their queries may see."""
        count = packed[0].shape[1]
        start, stop = self.length, self.length + count
        device = packed[0].device
        merged, slots = [], None
        for buffer, new in zip(self.buffers[layer], packed, strict=True):
            size = buffer.shape[1]
            new = new.to(buffer.dtype)
            if stop <= size:  # nothing is overwritten yet
                buffer[:, start:stop] = new
                merged.append(buffer[:, :stop])
                slots = torch.arange(stop, device=device)
            else:  # a chunk still needs the W - 1 tokens before it, so join before writing
                kept = torch.arange(max(0, start - size), start, device=device)
                with torch.autocast(device.type, enabled=False):  # on a CPU it refuses float16, the type of scales
                    merged.append(torch.cat((buffer[:, kept % size], new), dim=1))
                slots = torch.cat((kept, torch.arange(start, stop, device=device)))
                last = torch.arange(max(start, stop - size), stop, device=device)
                buffer[:, last % size] = new[:, last - start]
        cos, sin = self._tables[self.config.layer_kinds[layer]]
        return CacheView(tuple(merged), slots, (cos[slots], sin[slots]))

    def _mask(self, count: int, slots: Tensor, window: int | None) -> Tensor:
        """Returns which of the tokens in ``slots`` the ``count`` new ones see, bool [1, 1, count, S]."""
        queries = torch.arange(self.length, self.length + count, device=slots.device)[:, None]
        mask = (slots[None] <= queries) & (slots[None] >= 0)
        if window is not None:
            mask = mask & (slots[None] > queries - window)
        return mask[None, None]
