"""Layers of every form with random factors, and caches of them that hold sequences of different lengths."""

from __future__ import annotations

import torch
from random_models import small_config
from torch import Tensor

from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.layers import rotary_table
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.decode import CachedTokens
from tpa_train.tpa.spec import LayerSpec

GLOBAL, LOCAL = 1, 0  # layers of the config below; the window is 24, head_dim 40
S = LayerSpec
# For two KV heads. Ranks that fill no block of a matrix product, and every width.
FORMS = {
    "dense": None,
    "dense 8+4, 3+16": S("dense", 40, "dense", 40, (8, 4), (3, 16)),
    "latent": S("latent", 35, "latent", 17),
    "latent 6+16, 2+3": S("latent", 35, "latent", 33, (6, 16), (2, 3)),
    "joint": S("joint", 49, "joint", 49),
    "joint 8+6+4": S("joint", 70, "joint", 70, (8, 6, 4)),
    "joint 8+16, norms": S("joint", 35, "joint", 35, (8, 16), cached_norm=True),
    "contextual": S("contextual", 2, "contextual", 1),
    "contextual, R = 5": S("contextual", 5, "latent", 9, 8),
    "constant A": S("constant_a", 2, "constant_a", 1, 4),
    "constant B, contextual": S("constant_b", 9, "contextual", 2),
    "dense, constant A": S("dense", 40, "constant_a", 2),
    "tucker": S("tucker", 20, "tucker", 17, heads_k=1, heads_v=1),
    "tucker, whole": S("tucker", 20, "tucker", 17, 3),
    "dense, tucker": S("dense", 40, "tucker", 17, heads_v=1),
}


def layer(groups: int, spec: LayerSpec | None, local: bool = False, seed: int = 0, **changes) -> Attention:
    """Attention of two query heads a KV head, float64, every parameter away from its neutral value."""
    values = dict(
        num_layers=2, layer_kinds=("local", "global"), num_heads=2 * groups, num_kv_heads=groups, head_dim=40,
        sliding_window=24,
    )  # fmt: skip
    config = small_config(**(values | changes))
    index = LOCAL if local else GLOBAL
    attention = Attention(config, index) if spec is None else FactorizedAttention(config, index, spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in attention.to(torch.float64).named_parameters():
            scale = 0.3 if name.endswith(("norm.weight", "center")) else p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale)
            if name.endswith("a_bias"):
                p.add_(1.0)
    return attention.eval().requires_grad_(False)


def filled(
    attention: Attention, lengths: list[int], capacity: int, dtype: torch.dtype, rows: list[int] | None = None
) -> tuple[Tensor, CachedTokens, Tensor]:
    """Returns queries [B, H, d] of each sequence's last token in ``dtype``, what its layer has cached, and its inputs.

    Slots without a token hold 10 (codes: 255; cached norms: 0.01), rows that no sequence has as well. (Not more:
    cuDNN's attention hides keys by a finite number, which scores of 1e5 exceed.)
    """
    config = attention.config
    slots = config.cached_tokens(attention.layer, capacity)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(lengths), capacity, config.hidden_size, generator=generator, dtype=torch.float64)
    table = rotary_table(config, attention.kind, torch.arange(capacity))
    rotary = tuple(t.double() for t in table)
    packed = attention.pack(attention.write(x, rotary))
    queries = attention.queries(x, rotary)
    count = len(lengths) if rows is None else max(rows) + 2
    stored = []
    norms = getattr(attention, "spec", None) is not None and attention.spec.cached_norm
    for number, t in enumerate(packed, start=1):
        kind = dtype if t.dtype == torch.float64 else t.dtype
        empty = 255 if kind == torch.uint8 else 0.01 if norms and number == len(packed) else 10.0
        buffer = torch.full((count, slots, *t.shape[2:]), empty, dtype=kind)
        for i, length in enumerate(lengths):
            for position in range(max(0, length - slots), length):
                buffer[i if rows is None else rows[i], position % slots] = t[i, position].to(kind)
        stored.append(buffer)
    last = torch.tensor(lengths).sub(1).clamp_min(0)
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    cached = CachedTokens(tuple(stored), torch.tensor(lengths, dtype=torch.int32), table, rows)
    return queries[torch.arange(len(lengths)), last].to(dtype), cached, x


def moved(cached: CachedTokens, device: str, dtype: torch.dtype | None = None) -> CachedTokens:
    """The same cache on a device; what floats in it (but scales) in ``dtype``, where one is given."""
    stored = (t.to(dtype) if dtype and t.is_floating_point() and t.dim() == 4 else t for t in cached.stored)
    rotary = (t.to(device, dtype) if dtype == torch.float64 else t.to(device) for t in cached.rotary)
    rows = None if cached.rows is None else cached.rows.to(device)
    return CachedTokens(tuple(t.to(device) for t in stored), cached.lengths.to(device), tuple(rotary), rows)
