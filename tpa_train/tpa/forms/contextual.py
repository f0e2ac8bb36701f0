"""Contextual tensor products: queries, keys and values as sums of R outer products whose factors depend on the token.

T6 (arXiv:2501.06425, eq. 3.2-3.4): K_t = (1/R) Σ_r a_r(x) ⊗ b_r(x) with a(x) = W_A x + a₀ in R^{R×G} and
b(x) = W_B x in R^{R×d}. The bias a₀ is what makes the linear original representable: W_A = 0 is the constant-A form.
QK-norm and RoPE are linear maps of a token once its rms is known, so they fold in exactly when it is written: the norm
into a, 1 + w and the rotation into b. With a constant B the form is a latent with one U for all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpa_train.gemma3.attention import RotaryTable
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import Linear, RMSNorm, accumulation_dtype, apply_rotary
from tpa_train.tpa.forms.latent import BiasedOutput, LatentKeys, LatentValues


class _Contextual(nn.Module):
    """The factors a(x) and b(x) of ``heads`` heads; without W_A where A is constant."""

    def __init__(self, config: Gemma3Config, heads: int, rank: int, constant: bool = False) -> None:
        super().__init__()
        self.rank, self.head_dim = rank, config.head_dim
        self.a = None if constant else Linear(config.hidden_size, rank * heads)  # W_A
        self.a_bias = nn.Parameter(torch.empty(rank, heads))  # a₀
        self.b = Linear(config.hidden_size, rank * config.head_dim)  # W_B

    def scaled_a(self, x: Tensor) -> Tensor:
        """Returns a(x)/R, [B, L, R, heads] (or [R, heads] where A is constant), in float32 or wider."""
        dtype = accumulation_dtype(self.a_bias.dtype)
        a = self.a_bias.to(dtype)
        if self.a is not None:
            a = self.a(x).unflatten(-1, self.a_bias.shape).to(dtype) + a
        return a / self.rank

    def features(self, x: Tensor) -> Tensor:
        """Returns b(x), [B, L, R, d]."""
        return self.b(x).unflatten(-1, (self.rank, self.head_dim))


class ContextualKeys(_Contextual):
    """Keys (1/R) Σ_r a_r(x) ⊗ b_r(x): R(G + d) numbers a token, normalised and rotated when written."""

    def __init__(self, config: Gemma3Config, rank: int, constant: bool = False) -> None:
        super().__init__(config, config.num_kv_heads, rank, constant)
        self.norm = RMSNorm(config.head_dim, config.rms_norm_eps)  # only its weight and ε are used

    def write(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, ...]:
        """Returns a' = a/(R·rms(K[g])) [B, L, R, G] and b' = RoPE((1+w) ⊙ b) [B, L, R, d]."""
        inverse, a, b = self._factors(x, rotary)
        return (a * inverse).to(b.dtype), b

    def read(self, entries: tuple[Tensor, ...], rotary: RotaryTable) -> Tensor:
        """Returns Σ_r a'_r ⊗ b'_r, [B, S, G, d]."""
        a, b = entries
        return torch.einsum("bsrg,bsrd->bsgd", a, b)

    def _factors(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, Tensor, Tensor]:
        """Returns 1/rms(K[g]) [B, L, 1, G], a/R [B, L, R, G] (or [R, G]) and b' [B, L, R, d]."""
        a, b = self.scaled_a(x), self.features(x)
        with torch.autocast(x.device.type, enabled=False):  # a norm in bf16 would cost the keys three digits
            wide = b.to(a.dtype)
            # ‖K[g]‖² = a_gᵀ (B Bᵀ) a_g: the R × R Gram matrix is smaller than the expanded keys.
            gram = torch.einsum("blrd,blsd->blrs", wide, wide)
            square = (gram @ a * a).sum(-2, keepdim=True).clamp_min(0)  # cancellation may leave less than nothing
            inverse = torch.rsqrt(square / self.head_dim + self.norm.eps)
            rotated = apply_rotary(wide * (1.0 + self.norm.weight.to(wide.dtype)), rotary)
        return inverse, a, rotated.to(b.dtype)


class ConstantAKeys(ContextualKeys):
    """Keys whose A is the same for every token: b' and the norm of every head are cached, R·d + G numbers."""

    def __init__(self, config: Gemma3Config, rank: int) -> None:
        super().__init__(config, rank, constant=True)

    def write(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, ...]:
        """Returns b' [B, L, R, d] and 1/rms(K[g]) [B, L, 1, G]."""
        inverse, _, b = self._factors(x, rotary)
        return b, inverse.to(b.dtype)

    def read(self, entries: tuple[Tensor, ...], rotary: RotaryTable) -> Tensor:
        """Returns (Σ_r A_r ⊗ b'_r)/(R·rms), [B, S, G, d]."""
        b, inverse = entries
        keys = torch.einsum("rg,bsrd->bsgd", (self.a_bias / self.rank).to(b.dtype), b)
        return keys * inverse.transpose(-2, -1)


class ContextualValues(_Contextual, BiasedOutput):
    """Values (1/R) Σ_r a_r(x) ⊗ b_r(x), R(G + d) numbers a token, and the original output projection.

    ``bias`` [D] gives the layer's output what the factors cannot carry of the mean value (see ``LatentValues``).
    """

    def __init__(self, config: Gemma3Config, rank: int, constant: bool = False) -> None:
        super().__init__(config, config.num_kv_heads, rank, constant)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size)
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def write(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns a/R [B, L, R, G] and b [B, L, R, d]."""
        b = self.features(x)
        return self.scaled_a(x).to(b.dtype), b

    def read(self, entries: tuple[Tensor, ...], key_entries: tuple[Tensor, ...]) -> Tensor:
        """Returns values [B, S, G, d]."""
        a, b = entries
        return torch.einsum("bsrg,bsrd->bsgd", a, b)


class ConstantAValues(ContextualValues):
    """Values whose A is the same for every token: only b is cached, R·d numbers."""

    def __init__(self, config: Gemma3Config, rank: int) -> None:
        super().__init__(config, rank, constant=True)

    def write(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns b [B, L, R, d]."""
        return (self.features(x),)

    def read(self, entries: tuple[Tensor, ...], key_entries: tuple[Tensor, ...]) -> Tensor:
        """Returns values [B, S, G, d]."""
        b = entries[0]
        return torch.einsum("rg,bsrd->bsgd", (self.a_bias / self.rank).to(b.dtype), b)


class ConstantBKeys(LatentKeys):
    """Latent keys whose U [1, d, R] serves all heads: B is constant, a_g(x) is the latent."""

    def __init__(self, config: Gemma3Config, rank: int) -> None:
        super().__init__(config, rank)
        self.up = nn.Parameter(torch.empty(1, config.head_dim, rank))


class ConstantBValues(LatentValues):
    """Latent values whose U serves all heads; it is folded into ``out``, so the parameters are a latent's."""


class ContextualQueries(_Contextual):
    """Queries (1/R) Σ_r a_r(x) ⊗ b_r(x) of all H heads; nothing of them is cached."""

    def __init__(self, config: Gemma3Config, rank: int) -> None:
        super().__init__(config, config.num_heads, rank)

    def forward(self, x: Tensor) -> Tensor:
        """Returns raw queries [B, L, H, d]; norm and RoPE are the attention's."""
        a, b = self.scaled_a(x), self.features(x)
        return torch.einsum("blrh,blrd->blhd", a.to(b.dtype), b)
