"""The key/value cache: preallocated, ring buffers in local layers, and counted in bytes that were really allocated.

It stores whatever a layer's ``Attention.pack`` returns, so one cache serves the dense model and every TPA form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.attention import RotaryTable
from tpa_train.gemma3.layers import rotary_table

if TYPE_CHECKING:
    from tpa_train.gemma3.model import Gemma3ForCausalLM
    from tpa_train.tpa.decode.cached import CachedTokens


@dataclass
class CacheView:
    """What one layer may look at after its new tokens went in."""

    stored: tuple[Tensor, ...]  # what ``Attention.pack`` gave for S tokens, each [B, S, ...], in no particular order
    rotary: RotaryTable  # of those tokens
    mask: Tensor | None  # bool [B or 1, 1, L, S], True where allowed; None when every query sees every entry
    whole_sequence: bool  # the S tokens are exactly the new tokens, in order, and nothing is padded


class KVCache:
    """Cache for ``batch`` sequences of at most ``capacity`` tokens.

    Prompts of different lengths are padded on the left; ``padding`` int [B] says by how much, and positions and masks
    follow from it.

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
        padding: Tensor | None = None,
    ) -> None:
        config = model.config
        self.config, self.capacity, self.length = config, capacity, 0
        self.padding = padding if padding is not None and bool((padding > 0).any()) else None
        self.buffers: list[tuple[Tensor, ...]] = []
        device = torch.device(device) if device is not None else model.embed_tokens.weight.device
        for index, layer in enumerate(model.layers):
            slots = config.cached_tokens(index, capacity)
            self.buffers.append(
                tuple(
                    torch.zeros(batch, slots, *shape, dtype=own or dtype, device=device)
                    for shape, own in layer.self_attn.storage()
                )
            )
        if device.type != "meta":
            positions = torch.arange(capacity, device=device)
            self._tables = {kind: rotary_table(config, kind, positions) for kind in set(config.layer_kinds)}

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer as allocated."""
        return sum(t.numel() * t.element_size() for tensors in self.buffers for t in tensors)

    def positions(self, count: int) -> Tensor:
        """Returns RoPE positions int [B or 1, count] of the next ``count`` tokens; padding tokens get 0.

        Raises:
            UserError: the tokens do not fit.
        """
        if self.length + count > self.capacity:
            raise UserError(
                f"the cache holds {self.capacity} tokens but {self.length + count} are needed; shorten the prompt or "
                "raise the context."
            )
        device = self.buffers[0][0].device
        slots = torch.arange(self.length, self.length + count, device=device)[None]
        return slots if self.padding is None else (slots - self.padding[:, None]).clamp_min(0)

    def update(self, layer: int, packed: tuple[Tensor, ...]) -> CacheView:
        """Stores the new tokens' ``packed`` tensors [B, n, ...] of ``layer`` and returns what its queries may see.

        ``advance`` must be called once all layers of a forward pass have been updated.
        """
        count = packed[0].shape[1]
        start, stop = self.length, self.length + count
        window = None if self.config.is_global(layer) else self.config.sliding_window
        device = packed[0].device
        merged, slots = [], None
        for buffer, new in zip(self.buffers[layer], packed, strict=True):
            size = buffer.shape[1]
            new = new.to(buffer.dtype)
            if stop <= size:  # nothing is overwritten yet
                buffer[:, start:stop] = new
                merged.append(buffer[:, :stop])
                slots = torch.arange(stop, device=device)
            elif count == 1:  # ring: the token that falls out of the window makes room
                buffer[:, start % size] = new[:, 0]
                merged.append(buffer)
                ring = torch.arange(size, device=device)
                slots = start - (start - ring) % size
            else:  # a chunk still needs the W - 1 tokens before it, so join before writing
                kept = torch.arange(max(0, start - size), start, device=device)
                with torch.autocast(device.type, enabled=False):  # on a CPU it refuses float16, the type of scales
                    merged.append(torch.cat((buffer[:, kept % size], new), dim=1))
                slots = torch.cat((kept, torch.arange(start, stop, device=device)))
                last = torch.arange(max(start, stop - size), stop, device=device)
                buffer[:, last % size] = new[:, last - start]
        return CacheView(
            stored=tuple(merged),
            rotary=self._rotary(layer, slots),
            mask=self._mask(start, stop, slots, window),
            whole_sequence=start == 0 and self.padding is None,
        )

    def append(self, layer: int, packed: tuple[Tensor, ...]) -> CachedTokens:
        """Stores one new token a sequence, as ``update`` does, and returns all that the layer has cached.

        Only for sequences without padding.
        """
        from tpa_train.tpa.decode.cached import CachedTokens

        buffers = self.buffers[layer]
        for buffer, new in zip(buffers, packed, strict=True):
            buffer[:, self.length % buffer.shape[1]] = new[:, 0]
        lengths = torch.full((len(buffers[0]),), self.length + 1, dtype=torch.int32, device=buffers[0].device)
        return CachedTokens(buffers, lengths, self._tables[self.config.layer_kinds[layer]])

    def advance(self, count: int) -> None:
        self.length += count

    def reorder(self, rows: Tensor) -> None:
        """Keeps the sequences ``rows`` (int [B']), in that order: finished ones leave, beams are copied."""
        self.buffers = [tuple(t[rows] for t in tensors) for tensors in self.buffers]
        self.padding = self.padding[rows] if self.padding is not None else None

    def _rotary(self, layer: int, slots: Tensor) -> RotaryTable:
        cos, sin = self._tables[self.config.layer_kinds[layer]]
        if self.padding is None:
            return cos[slots], sin[slots]
        positions = (slots[None] - self.padding[:, None]).clamp_min(0)
        return cos[positions], sin[positions]

    def _mask(self, start: int, stop: int, slots: Tensor, window: int | None) -> Tensor | None:
        if stop - start == 1 and self.padding is None:
            # One query: every entry is in its past, and a ring holds nothing older than the window.
            return None
        queries = torch.arange(start, stop, device=slots.device)[:, None]
        mask = (slots[None] <= queries) & (slots[None] >= 0)
        if window is not None:
            mask = mask & (slots[None] > queries - window)
        mask = mask[None, None]
        if self.padding is not None:
            real = slots[None] >= self.padding[:, None]
            # A padding query sees itself, so that no row of the softmax is empty.
            own = slots[None] == queries
            mask = (mask & real[:, None, None, :]) | own[None, None]
        return mask
