"""Dense, latent and joint latent keys and values.

Latent form: K_t[g] = U_g c_t[g] with c_t[g] = A_g x. With the Gram matrix of U, rms(K)² = cᵀ(UᵀU)c/d + ε,
so the cache holds ĉ = c/rms and nothing else: G·r numbers. Every latent is cached relative to a constant ``center``: a
group of numbers around zero spans less, so a quantized cache rounds it less, at no cost in bytes.

Joint latent (the shape of MLA, arXiv:2405.04434, eq. 9-11): one latent c = A x for keys and values of all
heads. It is cached as it is, since values need it without the keys' norm: keys divide by their rms when rebuilt, or are
multiplied by 1/rms that is cached beside it (r + G numbers). That is computed from the latent as the cache gives it
back, so that keys from rounded latents have the norm that QK-norm wants, but for the rounding of 1/rms to 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpa_train.gemma3.attention import RotaryTable
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import Linear, RMSNorm, accumulation_dtype, apply_rotary


class DenseKeys(nn.Module):
    """The original keys: rotated, normalised, G·d numbers a token."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.shape = (config.num_kv_heads, config.head_dim)
        self.proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def write(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, ...]:
        """Returns the cache entry [B, L, G, d] of tokens ``x`` [B, L, D]."""
        k = self.proj(x).unflatten(-1, self.shape)
        return (apply_rotary(self.norm(k), rotary).to(k.dtype),)

    def read(self, entries: tuple[Tensor, ...], rotary: RotaryTable) -> Tensor:
        """Returns keys [B, S, G, d]."""
        return entries[0]


class LatentKeys(nn.Module):
    """Keys as U_g A_g x: rank-r latents are cached and keys rebuilt (and rotated) when read."""

    def __init__(self, config: Gemma3Config, rank: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.shape = (config.num_kv_heads, rank)
        self.down = Linear(config.hidden_size, config.num_kv_heads * rank)  # A
        self.up = nn.Parameter(torch.empty(config.num_kv_heads, config.head_dim, rank))  # U
        self.center = nn.Parameter(torch.zeros(config.num_kv_heads, rank))
        self.norm = RMSNorm(config.head_dim, config.rms_norm_eps)  # only its weight and ε are used

    def write(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, ...]:
        """Returns ĉ = c / rms(U c) less the center, [B, L, G, r]."""
        c = self.down(x).unflatten(-1, self.shape)
        dtype = accumulation_dtype(c.dtype)
        with torch.autocast(x.device.type, enabled=False):  # a norm in bf16 would cost the keys three digits
            up = self.up.to(dtype)
            gram = torch.einsum("gdr,gds->grs", up, up)
            wide = c.to(dtype)
            square = (torch.einsum("blgr,grs->blgs", wide, gram) * wide).sum(-1, keepdim=True)
            entry = wide * torch.rsqrt(square / self.head_dim + self.norm.eps) - self.center.to(dtype)
        return (entry.to(c.dtype),)

    def read(self, entries: tuple[Tensor, ...], rotary: RotaryTable) -> Tensor:
        """Returns RoPE((1+w) ⊙ U ĉ), [B, S, G, d]."""
        entry, wide = entries[0], accumulation_dtype(self.up.dtype)
        up = ((1.0 + self.norm.weight.to(wide))[None, :, None] * self.up.to(wide)).to(entry.dtype)
        entry = (entry + self.center).to(entry.dtype)
        keys = torch.einsum("bsgr,gdr->bsgd", entry, up)
        return apply_rotary(keys.to(accumulation_dtype(keys.dtype)), rotary).to(entry.dtype)


class DenseValues(nn.Module):
    """The original values, G·d numbers a token, and the original output projection."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.shape = (config.num_kv_heads, config.head_dim)
        self.proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size)

    def write(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the cache entry [B, L, G, d]; attention runs on it as it is."""
        return (self.proj(x).unflatten(-1, self.shape),)

    def read(self, entries: tuple[Tensor, ...], key_entries: tuple[Tensor, ...]) -> Tensor:
        """Returns values [B, S, G, d]."""
        return entries[0]

    def output(self, heads: Tensor) -> Tensor:
        """Projects [B, L, H, d] to [B, L, D]."""
        return self.out(heads.flatten(-2))


class BiasedOutput(nn.Module):
    """Values whose output projection ``out`` is followed by a ``bias`` [D], which gives back a constant value.

    Attention weights sum to one, so a constant value is a constant of the layer's output.
    """

    def output(self, heads: Tensor) -> Tensor:
        """Projects attention results [B, L, H, e] to [B, L, D]."""
        out = self.out(heads.flatten(-2))
        return out + self.bias.to(out.dtype)


class LatentValues(BiasedOutput):
    """Values as latents A_g x: attention runs on G·r numbers a token and U_v is folded into the output projection.

    The bias gives back the center, and what of the mean value the latents cannot carry.
    """

    def __init__(self, config: Gemma3Config, rank: int) -> None:
        super().__init__()
        self.shape = (config.num_kv_heads, rank)
        self.down = Linear(config.hidden_size, config.num_kv_heads * rank)  # A
        self.out = Linear(config.num_heads * rank, config.hidden_size)  # W_O^h U_v, per query head
        self.center = nn.Parameter(torch.zeros(config.num_kv_heads, rank))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def write(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the latents less the center, [B, L, G, r]."""
        c = self.down(x).unflatten(-1, self.shape)
        return ((c - self.center).to(c.dtype),)

    def read(self, entries: tuple[Tensor, ...], key_entries: tuple[Tensor, ...]) -> Tensor:
        """Returns the latents [B, S, G, r]: attention runs on them as they are."""
        return entries[0]


class JointKeys(nn.Module):
    """Keys of all heads from the latent that values share: K[g] = U_g c, normalised and rotated when read."""

    def __init__(self, config: Gemma3Config, rank: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.down = Linear(config.hidden_size, rank)  # A, of keys and values
        self.up = nn.Parameter(torch.empty(config.num_kv_heads, config.head_dim, rank))  # U_k
        self.center = nn.Parameter(torch.zeros(rank))
        self.norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def write(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, ...]:
        """Returns the latent less the center, [B, L, 1, r]."""
        c = self.down(x)
        return ((c - self.center).to(c.dtype)[..., None, :],)

    def inverse_norms(self, latent: Tensor) -> Tensor:
        """Returns 1/rms(K[g]) [B, L, 1, G] of latents [B, L, 1, r], less the center, as they are once cached."""
        dtype = accumulation_dtype(latent.dtype)
        with torch.autocast(latent.device.type, enabled=False):  # a norm in bf16 would cost the keys three digits
            wide = latent[..., 0, :].to(dtype) + self.center.to(dtype)
            square = torch.einsum("blr,gdr->blgd", wide, self.up.to(dtype)).square().mean(-1)
            inverse = torch.rsqrt(square + self.norm.eps)
        return inverse.to(latent.dtype)[..., None, :]

    def read(self, entries: tuple[Tensor, ...], rotary: RotaryTable) -> Tensor:
        """Returns RoPE(norm(U c)), [B, S, G, d]; 1/rms is the second of ``entries``, if there is one."""
        latent = entries[0][..., 0, :]
        latent = (latent + self.center).to(latent.dtype)
        keys = torch.einsum("bsr,gdr->bsgd", latent, self.up.to(latent.dtype))
        if len(entries) == 1:
            keys = self.norm(keys)
        else:
            wide = accumulation_dtype(keys.dtype)
            keys = keys.to(wide) * entries[1].to(wide).mT * (1.0 + self.norm.weight.to(wide))
        return apply_rotary(keys, rotary).to(latent.dtype)


class JointValues(BiasedOutput):
    """Values from the keys' latent: V[g] = U_v[g] c, projected by the original W_O.

    U_v is not folded into W_O: that would make H·r·D weights out of G·d·r, and a joint latent is often wider than d.
    """

    def __init__(self, config: Gemma3Config, rank: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.num_kv_heads, config.head_dim, rank))  # U_v
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size)
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def write(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns nothing: the keys cache the latent."""
        return ()

    def read(self, entries: tuple[Tensor, ...], key_entries: tuple[Tensor, ...]) -> Tensor:
        """Returns values [B, S, G, d] around their mean, which is in the bias."""
        latent = key_entries[0][..., 0, :]
        return torch.einsum("bsr,gdr->bsgd", latent, self.up.to(latent.dtype))
