"""How keys and values are written into the cache and read back, one small module per form.

A form is built for one layer and one of K, V; the two are chosen separately. Keys: QK-norm is part of ``write`` and
RoPE of ``write`` (dense) or ``read`` (latent), so both stay exact. Values: the output projection belongs to the form,
because latent values are never expanded: U_v is folded into W_O.

Latent form (DESIGN §3): K_t[g] = U_g c_t[g] with c_t[g] = A_g x. With the Gram matrix of U, rms(K)² = cᵀ(UᵀU)c/d + ε,
so the cache holds ĉ = c/rms and nothing else: G·r numbers. Every latent is cached relative to a constant ``center``: a
group of numbers around zero spans less, so a quantized cache rounds it less, at no cost in bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpa_train.gemma3.attention import RotaryTable
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import Linear, RMSNorm, accumulation_dtype, apply_rotary


class DenseKeys(nn.Module):
    """The original keys: rotated, normalised, G·d numbers a token."""

    form = "dense"

    def __init__(self, config: Gemma3Config, rank: int = 0) -> None:
        super().__init__()
        self.shape = (config.num_kv_heads, config.head_dim)
        self.rank = config.head_dim
        self.proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def write(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        """Returns the cache entry [B, L, G, d] of tokens ``x`` [B, L, D]."""
        k = self.proj(x).unflatten(-1, self.shape)
        return apply_rotary(self.norm(k), rotary).to(k.dtype)

    def read(self, entry: Tensor, rotary: RotaryTable) -> Tensor:
        """Returns keys [B, S, G, d]."""
        return entry


class LatentKeys(nn.Module):
    """Keys as U_g A_g x: rank-r latents are cached and keys rebuilt (and rotated) when read."""

    form = "latent"

    def __init__(self, config: Gemma3Config, rank: int) -> None:
        super().__init__()
        self.rank, self.head_dim = rank, config.head_dim
        self.shape = (config.num_kv_heads, rank)
        self.down = Linear(config.hidden_size, config.num_kv_heads * rank)  # A
        self.up = nn.Parameter(torch.empty(config.num_kv_heads, config.head_dim, rank))  # U
        self.center = nn.Parameter(torch.zeros(config.num_kv_heads, rank))
        self.norm = RMSNorm(config.head_dim, config.rms_norm_eps)  # only its weight and ε are used

    def write(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        """Returns ĉ = c / rms(U c) less the center, [B, L, G, r]."""
        c = self.down(x).unflatten(-1, self.shape)
        dtype = accumulation_dtype(c.dtype)
        with torch.autocast(x.device.type, enabled=False):  # a norm in bf16 would cost the keys three digits
            up = self.up.to(dtype)
            gram = torch.einsum("gdr,gds->grs", up, up)
            wide = c.to(dtype)
            square = (torch.einsum("blgr,grs->blgs", wide, gram) * wide).sum(-1, keepdim=True)
            entry = wide * torch.rsqrt(square / self.head_dim + self.norm.eps) - self.center.to(dtype)
        return entry.to(c.dtype)

    def read(self, entry: Tensor, rotary: RotaryTable) -> Tensor:
        """Returns RoPE((1+w) ⊙ U ĉ), [B, S, G, d]."""
        up = ((1.0 + self.norm.weight)[None, :, None] * self.up).to(entry.dtype)
        entry = (entry + self.center).to(entry.dtype)
        keys = torch.einsum("bsgr,gdr->bsgd", entry, up)
        return apply_rotary(keys.to(accumulation_dtype(keys.dtype)), rotary).to(entry.dtype)


class DenseValues(nn.Module):
    """The original values, G·d numbers a token, and the original output projection."""

    form = "dense"

    def __init__(self, config: Gemma3Config, rank: int = 0) -> None:
        super().__init__()
        self.rank = config.head_dim
        self.shape = (config.num_kv_heads, config.head_dim)
        self.proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size)

    def write(self, x: Tensor) -> Tensor:
        """Returns the cache entry [B, L, G, d]; attention runs on it as it is."""
        return self.proj(x).unflatten(-1, self.shape)

    def output(self, heads: Tensor) -> Tensor:
        """Projects [B, L, H, d] to [B, L, D]."""
        return self.out(heads.flatten(-2))


class LatentValues(nn.Module):
    """Values as latents A_g x: attention runs on G·r numbers a token and U_v is folded into the output projection.

    Attention weights sum to one, so a constant value is a constant of the layer's output: ``bias`` [D] gives back the
    center, and what of the mean value the latents cannot carry.
    """

    form = "latent"

    def __init__(self, config: Gemma3Config, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.shape = (config.num_kv_heads, rank)
        self.down = Linear(config.hidden_size, config.num_kv_heads * rank)  # A
        self.out = Linear(config.num_heads * rank, config.hidden_size)  # W_O^h U_v, per query head
        self.center = nn.Parameter(torch.zeros(config.num_kv_heads, rank))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def write(self, x: Tensor) -> Tensor:
        """Returns the latents less the center, [B, L, G, r]."""
        c = self.down(x).unflatten(-1, self.shape)
        return (c - self.center).to(c.dtype)

    def output(self, heads: Tensor) -> Tensor:
        """Projects [B, L, H, r] to [B, L, D]."""
        out = self.out(heads.flatten(-2))
        return out + self.bias.to(out.dtype)


KEY_FORMS = {form.form: form for form in (DenseKeys, LatentKeys)}
VALUE_FORMS = {form.form: form for form in (DenseValues, LatentValues)}
