"""Recording what goes into and comes out of chosen modules during a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from tpa_train.gemma3.attention import AttentionContext
from tpa_train.gemma3.model import Gemma3ForCausalLM


@dataclass
class AttentionRecord:
    """One layer's attention in one forward pass: input [B, L, D] (normalised), output [B, L, D] and the context."""

    input: Tensor
    output: Tensor
    context: AttentionContext


@contextmanager
def capture_attention(model: Gemma3ForCausalLM, layers: list[int]) -> Iterator[dict[int, AttentionRecord]]:
    """Fills the yielded dict with an ``AttentionRecord`` per layer while ``model`` runs inside the context."""
    records: dict[int, AttentionRecord] = {}

    def hook(index: int):
        def record(_module, args: tuple, output: Tensor) -> None:
            records[index] = AttentionRecord(args[0], output, args[1])

        return record

    handles = [model.layers[i].self_attn.register_forward_hook(hook(i)) for i in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
