"""Attention whose queries, keys and values are each in a form of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tpa_train.gemma3.attention import Attention, RotaryTable
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.tpa.entries import Entry, StoredShape
from tpa_train.tpa.forms import build_keys, build_output, build_queries, build_shared, build_values
from tpa_train.tpa.spec import LayerSpec

Entries = tuple[Tensor, ...]


class FactorizedAttention(Attention):
    """Gemma 3 attention in the forms of ``spec``: ``keys`` and ``values``, and ``query_form`` unless queries are dense.

    ``shared`` holds the factors that Tucker parts have in common, ``output_form`` a Tucker output projection.
    """

    def __init__(self, config: Gemma3Config, layer: int, spec: LayerSpec) -> None:
        self.spec = spec  # before the base class builds the projections
        super().__init__(config, layer)
        key_entries, value_entries = spec.key_entries(config), spec.value_entries(config)
        self.entries = key_entries + value_entries
        self.num_key_entries = len(key_entries)
        # Buffers on the CPU even where parameters are built without storage; not part of a checkpoint.
        for index, entry in enumerate(self.entries):
            self.register_buffer(f"levels_{index}", entry.levels("cpu"), persistent=False)

    def _build_query(self) -> None:
        self.shared = build_shared(self.config, self.spec)  # first: every Tucker part refers to it
        if self.spec.form_q == "dense":
            super()._build_query()
        else:
            self.query_form = build_queries(self.config, self.spec, self.shared)

    def raw_queries(self, x: Tensor) -> Tensor:
        return super().raw_queries(x) if self.spec.form_q == "dense" else self.query_form(x)

    def _build_key_value(self) -> None:
        self.keys = build_keys(self.config, self.spec, self.shared)
        self.values = build_values(self.config, self.spec, self.shared)
        self.output_form = build_output(self.config, self.spec, self.shared)

    def write(self, x: Tensor, rotary: RotaryTable) -> Entries:
        return (*self.keys.write(x, rotary), *self.values.write(x))

    def as_cached(self, entries: Entries) -> Entries:
        rounded = tuple(entry.rounded(t, levels) for entry, t, levels in self._with_levels(entries))
        return (*rounded, self.keys.inverse_norms(rounded[0])) if self.spec.cached_norm else rounded

    def storage(self) -> list[StoredShape]:
        return [shape for entry in self.entries for shape in entry.storage()]

    def pack(self, entries: Entries) -> Entries:
        if self.spec.cached_norm:
            stored, rounded = self.entries[0].pack_rounded(entries[0], self.levels_0)
            return (*stored, self.keys.inverse_norms(rounded))
        return tuple(s for entry, t, levels in self._with_levels(entries) for s in entry.pack(t, levels))

    def _with_levels(self, entries: Entries) -> Iterator[tuple[Entry, Tensor, Tensor]]:
        """Yields of every entry that ``write`` returns its layout, itself, and ``Entry.levels`` where the layer is."""
        written = self.entries[: len(self.entries) - self.spec.cached_norm]
        for index, (entry, t) in enumerate(zip(written, entries, strict=True)):
            yield entry, t, getattr(self, f"levels_{index}")

    def unpack(self, stored: Entries, dtype: torch.dtype) -> Entries:
        unpacked, start = [], 0
        for entry in self.entries:
            stop = start + len(entry.storage())
            unpacked.append(entry.unpack(stored[start:stop], dtype))
            start = stop
        return tuple(unpacked)

    def read(self, entries: Entries, rotary: RotaryTable) -> tuple[Tensor, Tensor]:
        keys, values = entries[: self.num_key_entries], entries[self.num_key_entries :]
        return self.keys.read(keys, rotary), self.values.read(values, keys)

    def output(self, heads: Tensor) -> Tensor:
        return self.values.output(heads) if self.output_form is None else self.output_form(heads)
