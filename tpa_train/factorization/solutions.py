"""Factors of every form for calibrated layers: one door from a specification to the tensors that fill it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.factorization.calibration import Calibration
from tpa_train.factorization.contextual_factorization import _init_contextual_factorization
from tpa_train.factorization.joint import JointBasis, JointProblem
from tpa_train.factorization.latent import Basis, key_basis, latent_key_factors, latent_value_factors, value_basis
from tpa_train.factorization.rounded_keys import RoundingCosts
from tpa_train.factorization.stacked import ActivationSample, HeadMoments, key_moments, value_moments
from tpa_train.factorization.tucker_factorization import InputMoments, TuckerMoments, _factorize_and_set_weights
from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec

CONTEXTUAL = ("contextual", "constant_a", "constant_b")


@dataclass
class Bases:
    """Directions of the keys and values of every calibrated layer, and what other forms are solved from."""

    keys: dict[int, Basis]
    values: dict[int, Basis]
    calibration: Calibration | None = None
    balances: dict[int, float] = field(default_factory=dict)  # λ of the joint latent, by layer; 1 where not measured
    _solved: dict[tuple, object] = field(default_factory=dict)  # fits and decompositions that are asked for repeatedly

    @classmethod
    def of(cls, model: Gemma3ForCausalLM, calibration: Calibration) -> Bases:
        """Solves for the latent directions of every calibrated layer."""
        layers = calibration.layers
        return cls(
            {i: key_basis(m, calibration.tokens) for i, m in layers.items()},
            {i: value_basis(model.layers[i].self_attn, m) for i, m in layers.items()},
            calibration,
        )

    def part(self, layer: int, kind: str) -> Basis:
        """Returns the directions of a layer's keys ("k") or values ("v")."""
        return (self.keys if kind == "k" else self.values)[layer]

    def joint(self, attention: Attention, layer: int) -> JointBasis:
        """Returns the joint latent's directions of a layer, at its balance."""
        balance = self.balances.get(layer, 1.0)
        key = ("joint", layer, balance)
        if key not in self._solved:
            calibration = self.calibrated("joint")
            problem = self._solved.get(("problem", layer))
            if problem is None:
                problem = JointProblem.of(attention, calibration.layers[layer], calibration.tokens)
                self._solved["problem", layer] = problem
            self._solved[key] = JointBasis.solve(problem, attention.config.num_kv_heads, balance)
        return self._solved[key]

    def rounding(self, attention: Attention, layer: int) -> RoundingCosts:
        """Returns what rounding a layer's rotated keys costs, group by group."""
        key = ("rounding", layer)
        if key not in self._solved:
            self._solved[key] = RoundingCosts.of(attention, self.calibrated("rounded keys").layers[layer])
        return self._solved[key]

    def head_moments(self, attention: Attention, layer: int, kind: str) -> HeadMoments:
        """Returns the moments of all heads' keys or values together."""
        return head_moments(attention, self.calibrated("a form that heads share"), layer, kind)

    def contextual(self, attention: Attention, layer: int, kind: str, form: str, rank: int) -> dict[str, Tensor]:
        """Returns the factors of a contextual form; the fit is done once."""
        key = (form, layer, kind, rank)
        if key not in self._solved:
            constant = {"contextual": None, "constant_a": "a", "constant_b": "b"}[form]
            sample = ActivationSample.of(self.calibrated(form).layers[layer])
            moments = self.head_moments(attention, layer, kind)
            self._solved[key] = _init_contextual_factorization(
                attention, kind, rank, moments, sample if constant is None else None, constant=constant
            )
        return self._solved[key]

    def calibrated(self, what: str) -> Calibration:
        """Returns the calibration.

        Raises:
            UserError: there is none, and ``what`` is solved from it.
        """
        if self.calibration is None:
            raise UserError(f"{what} is solved from calibrated moments; calibrate the model first.")
        return self.calibration


def head_moments(attention: Attention, calibration: Calibration, layer: int, kind: str) -> HeadMoments:
    """Returns the calibrated moments of all heads' keys ("k") or values ("v") of a layer together.

    Raises:
        UserError: the layer was not calibrated.
    """
    if layer not in calibration.layers:
        raise UserError(f"layer {layer} is to be converted, but calibration covers {sorted(calibration.layers)} only.")
    moments = calibration.layers[layer]
    return key_moments(moments, calibration.tokens) if kind == "k" else value_moments(attention, moments)


def tucker_moments(attention: Attention, calibration: Calibration, layer: int) -> TuckerMoments:
    """Returns what a Tucker form of a calibrated layer is solved from; raises as ``head_moments``."""
    keys, values = (head_moments(attention, calibration, layer, kind) for kind in "kv")
    return TuckerMoments(keys, values, InputMoments.of_sample(ActivationSample.of(calibration.layers[layer]).x))


def contextual_moments(
    model: Gemma3ForCausalLM, calibration: Calibration, layers: Iterable[int]
) -> tuple[dict[int, dict[str, HeadMoments]], dict[int, ActivationSample]]:
    """Returns what contextual keys and values are solved from, and fitted on, by layer; raises as ``head_moments``."""
    moments = {i: {k: head_moments(model.layers[i].self_attn, calibration, i, k) for k in "kv"} for i in layers}
    return moments, {i: ActivationSample.of(calibration.layers[i]) for i in moments}


def layer_factors(model: Gemma3ForCausalLM, bases: Bases, layer: int, spec: LayerSpec) -> dict[str, Tensor]:
    """Returns one layer's factors by full state-dict name, float64."""
    with torch.autocast("cpu", enabled=False):  # a caller that measures in bfloat16 must not round the solver's work
        factors = _attention_factors(model, bases, layer, spec)
    return {f"layers.{layer}.self_attn.{name}": tensor for name, tensor in factors.items()}


def _attention_factors(model: Gemma3ForCausalLM, bases: Bases, layer: int, spec: LayerSpec) -> dict[str, Tensor]:
    attention = model.layers[layer].self_attn
    factors: dict[str, Tensor] = {}
    if spec.form_k == "joint":
        factors |= bases.joint(attention, layer).factors(attention, spec.rank_k)
    if spec.form_k == "latent":
        factors |= latent_key_factors(attention, bases.keys[layer], spec.rank_k)
    if spec.form_v == "latent":
        factors |= latent_value_factors(attention, bases.values[layer], spec.rank_v)
    for kind, form, rank in (("k", spec.form_k, spec.rank_k), ("v", spec.form_v, spec.rank_v)):
        if form in CONTEXTUAL:
            factors |= bases.contextual(attention, layer, kind, form, rank)
    if "tucker" in (spec.form_k, spec.form_v, spec.form_q, spec.form_o):
        factors |= tucker_factors(model, bases, layer, spec)
    return factors


def tucker_factors(model: Gemma3ForCausalLM, bases: Bases, layer: int, spec: LayerSpec) -> dict[str, Tensor]:
    """Returns the Tucker factors of one layer by their names in the attention, solved from calibrated moments."""
    attention = model.layers[layer].self_attn
    moments = tucker_moments(attention, bases.calibrated("a Tucker form"), layer)
    factors, _ = _factorize_and_set_weights(model, layer, spec, moments=moments)
    return {name.removeprefix(f"layers.{layer}.self_attn."): tensor for name, tensor in factors.items()}


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
