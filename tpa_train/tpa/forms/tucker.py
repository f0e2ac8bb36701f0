"""Tucker queries, keys, values and output projection, with factor matrices that a layer's parts share.

TensorLLM (arXiv:2501.15674, §3) stacks the heads of a layer and decomposes them with shared factors; here

    K_t[g] = Σ_h' U_head[g, h'] U_feat c_t[h'],    c_t[h'] = core[h'] (U_hiddenᵀ x_t)

with core [r_h, r₂, r₁], U_hidden [D, r₁], U_feat [d, r₂], U_head [G, r_h]. A mode left whole has no factor at all. The
core activations c are what is cached, and nothing is ever multiplied out: U_feat and U_head are applied when keys are
read, and U_feat of values is folded into what follows them.

U_hidden and, with ``LayerSpec.shared_features``, U_feat live once a layer, in ``TuckerShared``. The parts reach it by a
reference that PyTorch does not register, so a state dict holds every tensor once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_train.errors import UserError
from tpa_train.gemma3.attention import RotaryTable
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import Linear, RMSNorm, accumulation_dtype, apply_rotary
from tpa_train.tpa.forms.latent import BiasedOutput, DenseValues
from tpa_train.tpa.spec import LayerSpec


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x Wᵀ for ``x`` [..., n] and ``weight`` [m, n], in the weight's precision as ``Linear`` has it."""
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    return F.linear(x, weight)


def tucker_kinds(spec: LayerSpec) -> tuple[str, ...]:
    """Returns the Tucker parts of a layer, of "q", "k", "v" and "o"."""
    return tuple(kind for kind in "qkvo" if getattr(spec, f"form_{kind}") == "tucker")


def features_of(spec: LayerSpec, kind: str) -> str:
    """Returns whose U_feat a part uses: "shared" or a kind. An output projection of Tucker values reads latents."""
    if spec.shared_features:
        return "shared"
    return "v" if kind == "o" and spec.form_v == "tucker" else kind


def rank_of(spec: LayerSpec, kind: str) -> int:
    """Returns r₂ of a part; the output projection of Tucker values has theirs."""
    return spec.rank_v if kind == "o" and spec.form_v == "tucker" else getattr(spec, f"rank_{kind}")


def check_tucker(config: Gemma3Config, spec: LayerSpec) -> None:
    """Refuses ranks that the modes do not have and parts that do not fit together.

    Raises:
        UserError: see the message.
    """
    kinds, width = tucker_kinds(spec), config.head_dim
    if not kinds:
        if spec.hidden or spec.shared_features:
            raise UserError("hidden and shared_features are Tucker's: give one of form_q/k/v/o the form 'tucker'.")
        return
    if spec.form_o == "tucker" and spec.form_v not in ("tucker", "dense"):
        raise UserError(f"form_o='tucker' needs form_v 'tucker' or 'dense', not '{spec.form_v}'.")
    ranks = {f"rank_{kind}": rank_of(spec, kind) for kind in kinds if kind != "o" or spec.form_v == "dense"}
    for name, rank in ranks.items():
        if not 1 <= rank <= width:
            raise UserError(f"{name}={rank} must lie between 1 and head_dim, {width}, for the form 'tucker'.")
    if spec.shared_features and len(set(ranks.values())) > 1:
        given = ", ".join(f"{name}={rank}" for name, rank in ranks.items())
        raise UserError(f"shared_features is one U_feat for all Tucker parts; set equal ranks instead of {given}.")
    for kind in "kv":
        heads = getattr(spec, f"heads_{kind}")
        if heads and kind not in kinds:
            raise UserError(f"heads_{kind}={heads} is Tucker's: give form_{kind} the form 'tucker' or leave it at 0.")
        if not 0 <= heads <= config.num_kv_heads:
            raise UserError(f"heads_{kind}={heads} must lie between 0 (whole) and the {config.num_kv_heads} KV heads.")
    if not 0 <= spec.hidden <= config.hidden_size:
        raise UserError(f"hidden={spec.hidden} must lie between 0 (whole) and the hidden size, {config.hidden_size}.")


class TuckerShared(nn.Module):
    """Factors of one layer that several Tucker parts use: ``hidden`` [D, r₁] and ``features`` [d, r₂], where there."""

    def __init__(self, config: Gemma3Config, spec: LayerSpec) -> None:
        super().__init__()
        self.core_width = spec.hidden or config.hidden_size
        self.hidden = nn.Parameter(torch.empty(config.hidden_size, spec.hidden)) if spec.hidden else None
        # Values fold U_feat into what follows them, so that it is a parameter only where another part reads it.
        users = [kind for kind in tucker_kinds(spec) if kind in "qk" or (kind == "o" and spec.form_v == "dense")]
        shape = (config.head_dim, rank_of(spec, users[0])) if spec.shared_features and users else None
        self.features = nn.Parameter(torch.empty(shape)) if shape else None

    def inputs(self, x: Tensor) -> Tensor:
        """Returns U_hiddenᵀ x, [B, L, r₁], of tokens ``x`` [B, L, D]; ``x`` itself where the mode is whole."""
        return x if self.hidden is None else project(x, self.hidden.mT)

    def outputs(self, y: Tensor) -> Tensor:
        """Returns U_hidden y, [B, L, D], of ``y`` [B, L, r₁]."""
        return y if self.hidden is None else project(y, self.hidden)


def build_shared(config: Gemma3Config, spec: LayerSpec) -> TuckerShared | None:
    """Returns what the layer's Tucker parts share, or None without such parts.

    Raises:
        UserError: the specification has Tucker ranks that do not fit (``check_tucker``).
    """
    check_tucker(config, spec)
    return TuckerShared(config, spec) if tucker_kinds(spec) else None


class _TuckerPart(nn.Module):
    """Core and U_feat of one kind; ``heads`` is U_head [G, r_h], or None with the head mode whole."""

    def __init__(
        self, config: Gemma3Config, spec: LayerSpec, kind: str, shared: TuckerShared, heads: int, head_rank: int = 0
    ) -> None:
        super().__init__()
        self._shared = (shared,)  # a tuple keeps the reference out of the module tree
        rank, rows = rank_of(spec, kind), head_rank or heads
        self.core = nn.Parameter(torch.empty(rows, rank, shared.core_width))
        own = features_of(spec, kind) == kind and kind != "v"  # values fold theirs into what follows
        self.features = nn.Parameter(torch.empty(config.head_dim, rank)) if own else None
        self.heads = nn.Parameter(torch.empty(heads, head_rank)) if head_rank else None
        self.mixes_when_read = 0 < head_rank < heads  # with r_h = G mixed latents are no more numbers, so mix at once

    @property
    def shared(self) -> TuckerShared:
        return self._shared[0]

    @property
    def u_feat(self) -> Tensor:
        """U_feat [d, r₂], the part's own or the layer's."""
        return self.shared.features if self.features is None else self.features

    def latents(self, x: Tensor) -> Tensor:
        """Returns core activations [B, L, rows, r₂] of tokens ``x`` [B, L, D], mixed already where r_h = G."""
        c = project(self.shared.inputs(x), self.core.flatten(0, 1)).unflatten(-1, self.core.shape[:2])
        return c if self.heads is None or self.mixes_when_read else self.mix(c)

    def mix(self, c: Tensor) -> Tensor:
        """Applies U_head to [B, S, r_h, r₂], which gives [B, S, G, r₂]."""
        return torch.einsum("bshr,gh->bsgr", c, self.heads.to(c.dtype))


class TuckerQueries(_TuckerPart):
    """Queries U_feat core[h] U_hiddenᵀ x of H heads; the head mode is whole."""

    def __init__(self, config: Gemma3Config, spec: LayerSpec, shared: TuckerShared) -> None:
        super().__init__(config, spec, "q", shared, config.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Returns raw queries [B, L, H, d] of tokens ``x`` [B, L, D]."""
        return project(self.latents(x), self.u_feat)


class TuckerKeys(_TuckerPart):
    """Keys that are cached as core activations.

    With r_h = G every head has latents of its own, cached divided by their key's rms as in ``LatentKeys``.
    With r_h < G heads share latents but not norms: the cache holds c/ρ and ρ/rms(K[g]) for every g, ρ² the mean square
    over all heads. (Their product is c/rms; dividing both by ρ keeps a token's size out of what is quantized.)
    """

    def __init__(self, config: Gemma3Config, spec: LayerSpec, shared: TuckerShared) -> None:
        super().__init__(config, spec, "k", shared, config.num_kv_heads, spec.heads_k)
        self.head_dim = config.head_dim
        self.center = nn.Parameter(torch.zeros(self.core.shape[:2]))  # subtracted from what is cached, see ``latent``
        self.norm = RMSNorm(config.head_dim, config.rms_norm_eps)  # only its weight and ε are used

    def write(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, ...]:
        """Returns ĉ [B, L, G, r₂], or c/ρ [B, L, r_h, r₂] and the heads' norms [B, L, 1, G]; less the center."""
        c = self.latents(x)
        dtype = accumulation_dtype(c.dtype)
        with torch.autocast(x.device.type, enabled=False):  # a norm in bf16 would cost the keys three digits
            wide, up = c.to(dtype), self.u_feat.to(dtype)
            heads = self.mix(wide) if self.mixes_when_read else wide
            mean_square = ((heads @ (up.mT @ up)) * heads).sum(-1, keepdim=True) / self.head_dim + self.norm.eps
            inverse = torch.rsqrt(mean_square)  # [B, L, G, 1]
            if not self.mixes_when_read:
                return ((wide * inverse - self.center.to(dtype)).to(c.dtype),)
            size = mean_square.mean(-2, keepdim=True).sqrt()  # ρ
            entry, norms = wide / size - self.center.to(dtype), (inverse * size).mT
        return entry.to(c.dtype), norms.to(c.dtype)

    def read(self, entries: tuple[Tensor, ...], rotary: RotaryTable) -> Tensor:
        """Returns RoPE((1+w) ⊙ U_feat ĉ), [B, S, G, d]."""
        dtype, wide = entries[0].dtype, accumulation_dtype(self.u_feat.dtype)
        latent = (entries[0] + self.center).to(dtype)
        if self.mixes_when_read:
            latent = (self.mix(latent) * entries[1].mT).to(dtype)
        up = ((1.0 + self.norm.weight.to(wide))[:, None] * self.u_feat.to(wide)).to(dtype)
        keys = F.linear(latent, up)
        return apply_rotary(keys.to(accumulation_dtype(keys.dtype)), rotary).to(dtype)


class TuckerValues(_TuckerPart, BiasedOutput):
    """Values as core activations: attention runs on r₂ numbers a head, and what follows has U_feat folded in.

    ``out`` [D, H·r₂] is W_O^h U_feat unless the output projection is Tucker's too. ``bias`` [D] gives back the center
    and what of the mean value the latents cannot carry, as in ``LatentValues``; it belongs to the projection.
    """

    def __init__(self, config: Gemma3Config, spec: LayerSpec, shared: TuckerShared) -> None:
        super().__init__(config, spec, "v", shared, config.num_kv_heads, spec.heads_v)
        self.center = nn.Parameter(torch.zeros(self.core.shape[:2]))
        if spec.form_o == "dense":
            self.out = Linear(config.num_heads * spec.rank_v, config.hidden_size)
            self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def write(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the core activations less the center, [B, L, r_h, r₂]."""
        c = self.latents(x)
        return ((c - self.center).to(c.dtype),)

    def read(self, entries: tuple[Tensor, ...], key_entries: tuple[Tensor, ...]) -> Tensor:
        """Returns latents of every KV head, [B, S, G, r₂]."""
        return self.mix(entries[0]) if self.mixes_when_read else entries[0]


class UnprojectedValues(DenseValues):
    """The original values before a Tucker output projection."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__(config)
        self.out = None


class TuckerOutput(_TuckerPart):
    """The output projection U_hidden Σ_h core[h]ᵀ z_h of attention results z_h, plus a bias.

    z_h are latents of Tucker values (their U_feat is in the core), or U_featᵀ v of dense ones. The core has the layout
    of the other parts, [H, r₂, r₁].
    """

    def __init__(self, config: Gemma3Config, spec: LayerSpec, shared: TuckerShared) -> None:
        super().__init__(config, spec, "o", shared, config.num_heads)
        self.dense_values = spec.form_v == "dense"
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, heads: Tensor) -> Tensor:
        """Projects [B, L, H, r₂], or [B, L, H, d] of dense values, to [B, L, D]."""
        z = project(heads, self.u_feat.mT) if self.dense_values else heads
        out = self.shared.outputs(project(z.flatten(-2), self.core.flatten(0, 1).mT))
        return out + self.bias.to(out.dtype)
