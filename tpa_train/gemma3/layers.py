"""Gemma 3's small pieces: RMSNorm, linear layers over a float32 residual stream, the gated MLP and RoPE.

Shape suffixes used in this package: B batch, L tokens, S cached tokens, D hidden size, H query heads, G key/value
heads, d head_dim, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_train.gemma3.config import Gemma3Config, LayerKind


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float32 for half precisions, else ``dtype``: what norms, RoPE and the residual stream compute in."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Has ``module`` compute on ``device`` inside the block, with copies in place of its parameters; not to train.

    The parameters themselves stay where they are, so that other models may share them.
    """
    kept = [(part, name, p) for part in module.modules() for name, p in part._parameters.items() if p is not None]
    try:
        for part, name, parameter in kept:
            copy = parameter.detach().to(device, non_blocking=True)
            part._parameters[name] = nn.Parameter(copy, requires_grad=False)
        yield
    finally:
        for part, name, parameter in kept:
            part._parameters[name] = parameter


class Linear(nn.Linear):
    """Bias-free linear layer that takes the float32 residual stream whatever precision its weight is stored in."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast the cast is autocast's business (the weights may be float32 masters).
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.weight.dtype)
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) ⊙ (1 + w), computed in float32 (or wider); the weight is stored as w, as Gemma's checkpoints do."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(accumulation_dtype(x.dtype))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight.to(x.dtype))


class MLP(nn.Module):
    """Gated feed-forward: W_down(gelu_tanh(W_gate x) ⊙ W_up x)."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def rope_frequencies(config: Gemma3Config, kind: LayerKind, device: torch.device | None = None) -> Tensor:
    """Returns the d/2 rotation speeds in radians per token, float32 (RoFormer, arXiv:2104.09864, eq. 15).

    Global layers use the large base and the linear position scaling; local layers the small base, unscaled.
    """
    base = config.rope_theta if kind == "global" else config.rope_local_theta
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    speeds = 1.0 / (base**exponent)
    return speeds / config.rope_scaling_factor if kind == "global" else speeds


def rotary_table(config: Gemma3Config, kind: LayerKind, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, each ``positions.shape + [1, d/2]`` (the 1 broadcasts over heads), float32."""
    angles = positions.to(torch.float32)[..., None, None] * rope_frequencies(config, kind, positions.device)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the half-split pairs (i, i + d/2) of ``x`` [..., L, heads, d] by ``table``, in x's own dtype or wider."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
