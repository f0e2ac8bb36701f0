"""How much the model's output suffers when keys or values of one layer are truncated: measured, one at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from tpa_train.distillation.losses import linear_kl
from tpa_train.factorization.latent import Basis, latent_key_factors, latent_value_factors
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs

Part = tuple[int, str]  # (layer, "k" or "v")


@dataclass
class Bases:
    """Directions of the keys and values of every calibrated layer."""

    keys: dict[int, Basis]
    values: dict[int, Basis]

    def tail(self, part: Part, rank: int) -> float:
        layer, kind = part
        return (self.keys if kind == "k" else self.values)[layer].tail(rank)


def layer_factors(model: Gemma3ForCausalLM, bases: Bases, layer: int, spec: LayerSpec) -> dict[str, Tensor]:
    """Returns one layer's factors by full state-dict name, float64."""
    attention = model.layers[layer].self_attn
    factors: dict[str, Tensor] = {}
    if spec.form_k == "latent":
        factors |= latent_key_factors(attention, bases.keys[layer], spec.rank_k)
    if spec.form_v == "latent":
        factors |= latent_value_factors(attention, bases.values[layer], spec.rank_v)
    return {f"layers.{layer}.self_attn.{name}": tensor for name, tensor in factors.items()}


def build_student(model: Gemma3ForCausalLM, bases: Bases, specs: list[LayerSpec]) -> Gemma3ForMultimodalLMwithTPA:
    """Returns a model in which the layers follow ``specs`` and everything else is shared with ``model``.

    Factors are float32 (or wider), since they are about to be trained, on the model's device.
    """
    weight = model.embed_tokens.weight
    dtype = accumulation_dtype(weight.dtype)
    factors: dict[str, Tensor] = {}
    for layer, spec in enumerate(specs):
        if spec.converted:
            factors |= layer_factors(model, bases, layer, spec)
    factors = {name: t.to(device=weight.device, dtype=dtype) for name, t in factors.items()}
    return Gemma3ForMultimodalLMwithTPA.from_dense(model, specs, factors)


@torch.no_grad()
def measure_sensitivity(
    model: Gemma3ForCausalLM, bases: Bases, parts: list[Part], rank: int, token_ids: Tensor, every: int = 4
) -> dict[Part, float]:
    """Returns the output KL (nats a token) when only one part is truncated to ``rank``.

    The forward of the layers before the truncated one is computed once and reused.

    Args:
        model: the dense model.
        bases: directions of all layers in ``parts``.
        parts: what to truncate.
        rank: to which rank.
        token_ids: text [B, L].
        every: the KL is taken at every so-many-th position; the head costs more than the layers.
    """
    context = model.context(token_ids)
    residuals = [model.embed(token_ids)]
    for index in range(model.config.num_layers):
        residuals.append(model.run_layers(residuals[-1], context, index, index + 1))
    pick = slice(every - 1, None, every)

    def final(residual: Tensor) -> Tensor:
        return model.norm(residual)[:, pick].flatten(0, 1)

    teacher = final(residuals[-1])
    result: dict[Part, float] = {}
    for layer, kind in tqdm(parts, desc="measuring sensitivities", unit="part", leave=False):
        specs = dense_specs(model.config)
        full = model.config.head_dim
        specs[layer] = (
            LayerSpec("latent", rank, "dense", full) if kind == "k" else LayerSpec("dense", full, "latent", rank)
        )
        student = build_student(model, bases, specs)
        hidden = final(student.run_layers(residuals[layer], context, layer))
        result[layer, kind] = float(linear_kl(hidden, teacher, model.head_weight)[0])
    return result
