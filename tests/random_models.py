"""Small random models, exact full-rank factors for them, and a watch on the size of every tensor that is built."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tpa_train.gemma3.config import SIZES, Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs


def small_config(**changes) -> Gemma3Config:
    """Six layers (the last is global), a window of 8, and every constant away from its neutral value."""
    values = dict(
        vocab_size=97, hidden_size=24, num_layers=6, num_heads=4, num_kv_heads=1, head_dim=8, intermediate_size=32,
        sliding_window=8, query_pre_attn_scalar=5.0, rope_scaling_factor=8.0, rope_theta=10_000.0,
        rope_local_theta=100.0, max_context=4096,
    )  # fmt: skip
    return Gemma3Config(**(values | changes))


def head_shapes(size):
    """The size's attention on a narrow model of one local and one global layer, window shorter than the text."""
    c = SIZES[size]
    return small_config(
        num_layers=2, layer_kinds=("local", "global"), hidden_size=32, num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, query_pre_attn_scalar=c.query_pre_attn_scalar,
        rope_scaling_factor=c.rope_scaling_factor, rope_theta=c.rope_theta, rope_local_theta=c.rope_local_theta,
    )  # fmt: skip


def random_model(config: Gemma3Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> Gemma3ForCausalLM:
    """Random weights, norms included: zeros would hide a forgotten 1 + w."""
    generator = torch.Generator().manual_seed(seed)
    model = Gemma3ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if name.endswith("norm.weight") else p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale)
    return model.eval()


def tokens(config: Gemma3Config, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def specs_of(config: Gemma3Config, forms: dict[int, tuple], bits: int = 16) -> list[LayerSpec]:
    """``forms``: layer -> (rank of K or 0 for dense, rank of V or 0 for dense)."""
    specs = dense_specs(config)
    for layer, (rank_k, rank_v) in forms.items():
        d = config.head_dim
        specs[layer] = LayerSpec(
            "latent" if rank_k else "dense", rank_k or d, "latent" if rank_v else "dense", rank_v or d, bits
        )
    return specs


def factors_for(model: Gemma3ForCausalLM, specs: list[LayerSpec], seed: int = 1) -> dict[str, Tensor]:
    """Factors in a random, badly scaled basis with random centers: exact where the rank is head_dim, else truncated.

    From the formulas alone: K = U A x, V = U A x, U_v folded into W_O, the center given back by the bias. A joint
    latent is exact where its rank is 2·G·d.
    """
    config = model.config
    g, d, h = config.num_kv_heads, config.head_dim, config.num_heads
    generator = torch.Generator().manual_seed(seed)
    dtype = model.embed_tokens.weight.dtype
    factors: dict[str, Tensor] = {}

    def randn(*shape) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for index, spec in enumerate(specs):
        attention, prefix = model.layers[index].self_attn, f"layers.{index}.self_attn."
        if spec.form_k == "joint":
            n, rank = 2 * g * d, spec.rank_k
            turn, scale = torch.linalg.qr(randn(n, n)).Q, 1.0 + randn(n).abs()
            weight = torch.cat((attention.k_proj.weight, attention.v_proj.weight)).detach().double()
            center, (up_k, up_v) = 0.3 * randn(rank), (turn * scale)[:, :rank].unflatten(0, (2, g, d))
            out = attention.o_proj.weight.detach().double().unflatten(1, (g, h // g, d))
            factors[prefix + "keys.down.weight"] = ((turn / scale).mT @ weight)[:rank]
            factors[prefix + "keys.up"], factors[prefix + "values.up"] = up_k, up_v
            factors[prefix + "keys.center"] = center
            factors[prefix + "values.bias"] = torch.einsum("oghd,gdr,r->o", out, up_v, center)
        if spec.form_k == "latent":
            basis = torch.linalg.qr(randn(g, d, d)).Q * (1.0 + randn(g, 1, d).abs())
            weight = attention.k_proj.weight.detach().double().unflatten(0, (g, d))
            factors[prefix + "keys.up"] = basis[:, :, : spec.rank_k]
            factors[prefix + "keys.down.weight"] = (basis.inverse() @ weight)[:, : spec.rank_k].flatten(0, 1)
            factors[prefix + "keys.center"] = 0.3 * randn(g, spec.rank_k)
        if spec.form_v == "latent":
            basis = torch.linalg.qr(randn(g, d, d)).Q * (1.0 + randn(g, 1, d).abs())
            up = basis[:, :, : spec.rank_v]
            weight = attention.v_proj.weight.detach().double().unflatten(0, (g, d))
            out = attention.o_proj.weight.detach().double().unflatten(1, (g, h // g, d))  # [D, G, H/G, d]
            center = 0.3 * randn(g, spec.rank_v)
            factors[prefix + "values.down.weight"] = (basis.inverse() @ weight)[:, : spec.rank_v].flatten(0, 1)
            factors[prefix + "values.out.weight"] = torch.einsum("oghd,gdr->oghr", out, up).flatten(1)
            factors[prefix + "values.center"] = center
            factors[prefix + "values.bias"] = torch.einsum("oghd,gdr,gr->o", out, up, center)
    return {name: t.to(dtype).contiguous() for name, t in factors.items()}


def student_of(
    model: Gemma3ForCausalLM, forms: dict[int, tuple], bits: int = 16, seed: int = 1
) -> Gemma3ForMultimodalLMwithTPA:
    specs = specs_of(model.config, forms, bits)
    return Gemma3ForMultimodalLMwithTPA.from_dense(model, specs, factors_for(model, specs, seed))


def naive_attention(q: Tensor, k: Tensor, scale: float, window: int | None = None, ids: Tensor | None = None) -> Tensor:
    """Attention probabilities [B, H, L, L] of q [B, L, H, d] and k [B, L, G, d], by the definition."""
    heads, length = q.shape[2], q.shape[1]
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    t, s = torch.arange(length)[:, None], torch.arange(length)[None]
    allowed = s <= t
    if window is not None:
        allowed = allowed & (t - s < window)
    allowed = allowed[None, None]
    if ids is not None:
        allowed = allowed & (ids[:, None, :, None] == ids[:, None, None, :])
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)


class LargestTensor(TorchDispatchMode):
    """Records how many numbers the largest tensor holds that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


class ByteTokenizer:
    """One id a byte after four control ids, modulo the small vocabulary."""

    pad_id, eos_id, bos_id = 0, 1, 2

    def __init__(self, eos_id: int = 1, end_of_turn_id: int | None = None) -> None:
        self.eos_id, self.end_of_turn_id = eos_id, end_of_turn_id

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [self.bos_id] * bos + [4 + b % 90 for b in text.encode()]

    def piece_text(self, index: int) -> str:
        return f" {index}"

    def byte_value(self, index: int) -> None:
        return None
