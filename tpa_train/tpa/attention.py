"""Attention whose keys and values are each in a form of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_train.gemma3.attention import Attention, RotaryTable
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.tpa.forms import KEY_FORMS, VALUE_FORMS
from tpa_train.tpa.quantization import decode, encode, fake_quantize, stored_shapes
from tpa_train.tpa.spec import LayerSpec


class FactorizedAttention(Attention):
    """Gemma 3 attention with ``keys`` and ``values`` forms; queries stay dense (they are never cached)."""

    def __init__(self, config: Gemma3Config, layer: int, spec: LayerSpec) -> None:
        self.spec = spec  # before the base class builds the projections
        super().__init__(config, layer)

    def _build_key_value(self) -> None:
        self.keys = KEY_FORMS[self.spec.form_k](self.config, self.spec.rank_k)
        self.values = VALUE_FORMS[self.spec.form_v](self.config, self.spec.rank_v)

    @property
    def form_k(self) -> str:
        return self.spec.form_k

    @property
    def form_v(self) -> str:
        return self.spec.form_v

    @property
    def rank_k(self) -> int:
        return self.keys.rank

    @property
    def rank_v(self) -> int:
        return self.values.rank

    def write(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, Tensor]:
        return self.keys.write(x, rotary), self.values.write(x)

    def as_cached(self, entries: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return tuple(fake_quantize(t, self.spec.bits) for t in entries)

    def storage(self) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        bits, shapes = self.spec.bits, (self.keys.shape, self.values.shape)
        if bits == 16:
            return [(shape, None) for shape in shapes]
        quantized = []
        for groups, count in shapes:
            codes, scales = stored_shapes(count, bits)
            quantized += [((groups, *codes), torch.uint8), ((groups, *scales), torch.float16)]
        return quantized

    def pack(self, entries: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if self.spec.bits == 16:
            return entries
        return tuple(t for entry in entries for t in encode(entry, self.spec.bits))

    def unpack(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        bits = self.spec.bits
        if bits == 16:
            return super().unpack(stored, dtype)
        counts = self.keys.shape[-1], self.values.shape[-1]
        return tuple(decode(*stored[2 * i : 2 * i + 2], bits, counts[i], dtype) for i in range(2))

    def read(self, k_entry: Tensor, v_entry: Tensor, rotary: RotaryTable) -> tuple[Tensor, Tensor]:
        return self.keys.read(k_entry, rotary), v_entry

    def output(self, heads: Tensor) -> Tensor:
        return self.values.output(heads)
