"""The inference (and student) model: Gemma 3 whose attention layers are each dense or factorized.

It is the original model with some attention modules swapped, so that teacher and student run the same code and share
every parameter that was not converted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpa_train.errors import UserError
from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs

# Where a converted layer's parameters come from in the dense model, when they are not factors.
_FROM_DENSE = {
    "keys.proj.": "k_proj.",
    "keys.norm.": "k_norm.",
    "values.proj.": "v_proj.",
}
# Forms of values that are expanded, and projected by W_O itself.
KEEPS_OUTPUT = ("dense", "joint", "contextual", "constant_a")
_FACTORS = (".keys.", ".values.", ".query_form.", ".output_form.", ".shared.")


def dense_name(name: str, spec: LayerSpec | None) -> str | None:
    """Returns the dense model's name of a student parameter, or None if it is a factor of its own."""
    if ".self_attn." not in name or spec is None or not spec.converted:
        return name
    for ours, theirs in _FROM_DENSE.items():
        if ours in name:
            return name.replace(ours, theirs)
    if ".values.out." in name and spec.form_v in KEEPS_OUTPUT:
        return name.replace("values.out.", "o_proj.")
    return None if any(part in name for part in _FACTORS) else name


def layer_of(name: str) -> int | None:
    """Returns the layer index in a state-dict name, or None outside the layers."""
    return int(name.split(".")[1]) if name.startswith("layers.") else None


class Gemma3ForMultimodalLMwithTPA(Gemma3ForCausalLM):
    """Gemma 3 in TPA form: ``model(token_ids [B, L]) -> logits [B, L, V]``.

    Args:
        config: the original architecture.
        specs: one ``LayerSpec`` a layer; all dense when left out.

    Raises:
        UserError: the number of specifications is not the number of layers.
    """

    def __init__(self, config: Gemma3Config, specs: list[LayerSpec] | None = None) -> None:
        specs = list(specs) if specs is not None else dense_specs(config)
        if len(specs) != config.num_layers:
            raise UserError(f"{len(specs)} layer specifications were given for {config.num_layers} layers.")
        self.specs = specs  # before the base class builds the layers
        super().__init__(config)
        # F^½ [D, D] of converted layers' attention outputs, where calibrated: what layer-wise recovery measures with.
        self.output_metrics: dict[int, Tensor] = {}

    def _build_attention(self, index: int) -> Attention:
        spec = self.specs[index]
        return FactorizedAttention(self.config, index, spec) if spec.converted else Attention(self.config, index)

    @property
    def converted_layers(self) -> list[int]:
        return [index for index, spec in enumerate(self.specs) if spec.converted]

    def cache_bytes(self, context: int) -> int:
        """Returns the bytes one sequence's cache takes at ``context`` tokens, by the formula of DESIGN §2."""
        return cache_bytes(self.config, self.specs, context)

    def factor_names(self) -> list[str]:
        """Returns the names of the parameters that conversion introduced."""
        return [n for n, _ in self.named_parameters() if self._dense_name(n) is None]

    def _dense_name(self, name: str) -> str | None:
        layer = layer_of(name)
        return dense_name(name, None if layer is None else self.specs[layer])

    @classmethod
    def from_dense(
        cls, dense: Gemma3ForCausalLM, specs: list[LayerSpec], factors: dict[str, Tensor]
    ) -> Gemma3ForMultimodalLMwithTPA:
        """Returns a student that *shares* every unconverted parameter with ``dense``.

        Args:
            dense: the original model.
            specs: one a layer.
            factors: tensors by state-dict name, for every name in ``factor_names()``.

        Raises:
            UserError: a factor is missing or has the wrong shape.
        """
        with torch.device("meta"):
            student = cls(dense.config, specs)
        originals = dict(dense.named_parameters())
        for name, parameter in list(student.named_parameters()):
            source = student._dense_name(name)
            if source is not None:
                set_parameter(student, name, originals[source])
                continue
            if name not in factors:
                raise UserError(f"no factor was given for '{name}'.")
            if factors[name].shape != parameter.shape:
                raise UserError(f"'{name}' has shape {tuple(factors[name].shape)}, not {tuple(parameter.shape)}.")
            set_parameter(student, name, nn.Parameter(factors[name].detach().clone(), requires_grad=False))
        student.tokenizer, student.source = dense.tokenizer, dense.source
        return student.train(dense.training)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Gemma3ForMultimodalLMwithTPA:
        """Loads an exported folder.

        Args:
            path: folder written by ``tpa_train.checkpoints.export``.
            dtype: of the weights; float32 on the CPU and bfloat16 elsewhere when left out.
            device: where the weights go.

        Raises:
            UserError: the folder is not a complete export that this version can read.
        """
        from tpa_train.checkpoints.export import load_export  # the adapters know the model, not the other way round

        return load_export(path, dtype=dtype, device=device)

    def load_weights(self, path: str | Path) -> None:
        """Fills an all-dense model from any checkpoint that ``load_pretrained`` reads.

        Raises:
            UserError: the checkpoint is unreadable, of other sizes, or this model is already converted.
        """
        from tpa_train.checkpoints import load_pretrained

        if self.converted_layers:
            raise UserError("load_weights fills a model that is not converted yet; use from_pretrained for an export.")
        dense = load_pretrained(path, dtype=self.embed_tokens.weight.dtype)
        if dense.config != self.config:
            raise UserError(f"{path} holds a model of other sizes than this one was built with.")
        for name, parameter in dense.named_parameters():
            set_parameter(self, name, parameter)
        self.tokenizer, self.source = dense.tokenizer, dense.source

    def generate(self, prompts: list[str] | str, max_tokens: int = 128, **options: Any) -> list[str]:
        """Continues each prompt with the factored cache; options as in ``tpa_train.tpa.generation.generate``."""
        from tpa_train.tpa.generation import generate

        return generate(self, prompts, max_tokens=max_tokens, **options)


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts ``parameter`` itself (shared, not copied) under the dotted ``name`` of ``module``."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    assert leaf in owner._parameters, name
    owner._parameters[leaf] = parameter
