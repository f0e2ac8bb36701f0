"""The inference (and student) model: Gemma 3 whose attention layers are each dense or factorized.

It is the original model with some attention modules swapped, so that teacher and student run the same code and share
every parameter that was not converted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.config import SIZES, Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs

if TYPE_CHECKING:
    from tpa_train.factorization.calibration import Calibration
    from tpa_train.factorization.stacked import ActivationSample, HeadMoments
    from tpa_train.factorization.tucker_factorization import LayerReport, TuckerMoments

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

        model = Gemma3ForMultimodalLMwithTPA("270m")
        model.load_weights()
        model.factorize_all_layers_with_shared_factors()
        model.generate(["The capital of France is"], max_tokens=32)

    Args:
        config: the original architecture, or the name of a published size (a key of ``gemma3.config.SIZES``).
        specs: one ``LayerSpec`` a layer; all dense when left out.

    Raises:
        UserError: an unknown size, or the number of specifications is not the number of layers.
    """

    def __init__(self, config: Gemma3Config | str, specs: list[LayerSpec] | None = None) -> None:
        if isinstance(config, str):
            if config.lower() not in SIZES:
                raise UserError(f"there is no Gemma 3 of size '{config}'{nearest(config.lower(), SIZES)}")
            config = SIZES[config.lower()]
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
        """Returns the bytes one sequence's cache takes at ``context`` tokens, by ``spec.cache_bytes``."""
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
            UserError: a factor is missing or has the wrong shape, or ``dense`` is converted already.
        """
        if isinstance(dense, cls):
            dense.check_dense()
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
        for module in student.modules():  # the constants of the forms; everything else is where it belongs
            for name, constant in module._buffers.items():
                module._buffers[name] = constant.to(dense.embed_tokens.weight.device)
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

    def check_dense(self) -> None:
        """Raises UserError if a layer is converted."""
        if self.converted_layers:
            raise UserError(
                f"layers {self.converted_layers} of this model are converted already; start from the original "
                "(load_weights into a new model), or load an export with from_pretrained."
            )

    def load_weights(self, path: str | Path | None = None) -> None:
        """Fills this model, all dense, from a checkpoint, in the dtype and on the device of its embedding.

        A multimodal checkpoint's vision side comes along, whether or not this model was built with one.

        Args:
            path: a GGUF file, a Hugging Face folder, or a gemma_pytorch ``.ckpt``; the packaged 270M when left out.

        Raises:
            UserError: the checkpoint is unreadable, of other sizes, or this model is already converted.
        """
        from tpa_train.checkpoints import find_default, open_checkpoint
        from tpa_train.checkpoints.weights import build_model

        self.check_dense()
        path = find_default() if path is None else path
        checkpoint = open_checkpoint(path)
        ours, theirs = self.config.to_dict(), checkpoint.config.to_dict()
        different = [key for key in ours if key != "vision" and theirs.get(key) != ours[key]]
        other = [f"{key}={theirs[key]}, not {ours[key]}" for key in different]
        if other:
            raise UserError(f"{path} holds a model of other sizes than this one was built with: {'; '.join(other)}.")
        weight = self.embed_tokens.weight
        dense = build_model(checkpoint, weight.dtype, "cpu" if weight.is_meta else weight.device)
        self.config, self.vision = dense.config, dense.vision
        for name, parameter in dense.named_parameters():
            set_parameter(self, name, parameter)
        self.tokenizer, self.source = dense.tokenizer, dense.source

    def factorize_all_layers_with_shared_factors(
        self,
        rank: int | dict[str, int] | None = None,
        *,
        shared_features: bool = False,
        calibration: Calibration | None = None,
        moments: dict[int, TuckerMoments] | None = None,
        **options: Any,
    ) -> list[LayerReport]:
        """Converts this model to the Tucker form, in place (``factorization.tucker_factorization``; TensorLLM).

        The bare call gives every layer the ranks that lose 1 % in its metric (``max_error``), with moments from text
        that the model writes itself (``factorization.own_text``). On the 270M that makes the cache at 32K tokens 1.39
        times smaller for a KL of .14 (top-1 .80), in a minute on one core; at 5 % it is 1.93 times for .82. For
        smaller ranks give a ``calibration`` on text of your own, and recover afterwards.

        Args:
            rank: r₂, of all kinds or by kind; chosen for each layer by ``max_error`` when left out.
            shared_features: whether keys and values have one U_feat; heads always share it. On the 270M at rank 192
                one for both cost a KL of .57, one for each .25.
            calibration: of the layers, on text; the model's own text when left out.
            moments: by layer, in place of a calibration; ``{}`` takes the weights alone, which only full ranks survive.
            options: of the function of this name: max_error, layers, hidden, heads, kinds, bits, share_across_layers.

        Returns:
            What each layer lost and saved.

        Raises:
            UserError: an option is out of range, a layer has no moments, or this model is converted already.
        """
        from tpa_train.factorization.own_text import calibrate_on_own_text
        from tpa_train.factorization.solutions import tucker_moments
        from tpa_train.factorization.tucker_factorization import factorize_all_layers_with_shared_factors

        self.check_dense()
        if moments is None:
            layers = self._named_layers(options.get("layers"))
            calibration = calibration or calibrate_on_own_text(self, layers)
            moments = {i: tucker_moments(self.layers[i].self_attn, calibration, i) for i in layers}
        student, reports = factorize_all_layers_with_shared_factors(
            self, rank, shared_features=shared_features, moments=moments, **options
        )
        self._become(student)
        return reports

    def apply_contextual_tensor_decomposition(
        self,
        rank_q: int | None = None,
        rank_k: int | None = None,
        rank_v: int | None = None,
        layers: list[int] | None = None,
        *,
        calibration: Calibration | None = None,
        moments: dict[int, dict[str, HeadMoments]] | None = None,
        samples: dict[int, ActivationSample] | None = None,
        **options: Any,
    ) -> None:
        """Converts this model to the contextual form (T6), in place (``factorization.contextual_factorization``).

        The bare call takes the largest rank of keys and values whose cache is smaller than the original's: R(G + d) <
        G·d, that is 3 of 4 for the 4B, 7 of 8 for the 12B, 14 of 16 for the 27B. With one KV head (270M, 1B) there is
        none: R = 1 is the original exactly, in a larger cache, and a warning says so.

        Args:
            rank_q: R of the queries, at most H; None leaves them dense.
            rank_k, rank_v: R of keys and values, at most G; None leaves them dense, unless all three are None.
            layers: which; all when None.
            calibration: of the layers, on text; the model's own text when left out (not used at full rank).
            moments, samples: by layer, in place of a calibration.
            options: of the function of this name: constant_k, constant_v, steps, bits_k, bits_v.

        Raises:
            UserError: an option is out of range, a layer has no moments, or this model is converted already.
        """
        from tpa_train.factorization.contextual_factorization import apply_contextual_tensor_decomposition, paying_rank
        from tpa_train.factorization.own_text import calibrate_on_own_text
        from tpa_train.factorization.solutions import contextual_moments

        self.check_dense()
        if rank_q is rank_k is rank_v is None:
            rank_k = rank_v = paying_rank(self.config)
        groups = self.config.num_kv_heads
        truncated = not {rank_k, rank_v} <= {None, groups} or {"constant_k", "constant_v"} & options.keys()
        if moments is None and samples is None and (truncated or calibration is not None):
            indices = self._named_layers(layers)
            calibration = calibration or calibrate_on_own_text(self, indices)
            moments, samples = contextual_moments(self, calibration, indices)
        student = apply_contextual_tensor_decomposition(
            self, rank_q, rank_k, rank_v, layers, moments=moments, samples=samples, **options
        )
        self._become(student)

    def _named_layers(self, layers: list[int] | None) -> list[int]:
        """Returns the layers that exist, of those named; all when None. The factorizations refuse the others."""
        return [i for i in range(self.config.num_layers) if layers is None or i in layers]

    def _become(self, student: Gemma3ForMultimodalLMwithTPA) -> None:
        """Takes over the layers of a model that was converted from this one and shares the rest with it.

        Factors, which are solved in float32, take the type of the other weights: this model is to run, not to train.
        """
        for layer in student.converted_layers:
            self.layers[layer].self_attn = student.layers[layer].self_attn.to(self.embed_tokens.weight.dtype)
        self.specs = student.specs

    def generate(self, prompts: list[Any] | str, max_tokens: int = 128, **options: Any) -> list[str]:
        """Continues each prompt with the factored cache; options as in ``tpa_train.tpa.generation.generate``."""
        from tpa_train.tpa.generation import generate

        return generate(self, prompts, max_tokens=max_tokens, **options)


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts ``parameter`` itself (shared, not copied) under the dotted ``name`` of ``module``."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    assert leaf in owner._parameters, name
    owner._parameters[leaf] = parameter


def converted_attention(attention: Attention, spec: LayerSpec, factors: dict[str, Tensor]) -> FactorizedAttention:
    """Returns a dense layer's attention in the forms of ``spec``; what is no factor is shared with ``attention``.

    ``factors``: tensors by their name in the attention.
    """
    with torch.device("meta"):
        converted = FactorizedAttention(attention.config, attention.layer, spec)
    originals = dict(attention.named_parameters())
    for name, _ in list(converted.named_parameters()):
        source = dense_name(f".self_attn.{name}", spec)
        own = nn.Parameter(factors[name].detach(), requires_grad=False) if source is None else None
        set_parameter(converted, name, originals[source.removeprefix(".self_attn.")] if own is None else own)
    device = next(iter(originals.values())).device
    converted._buffers = {name: constant.to(device) for name, constant in converted._buffers.items()}
    return converted.train(attention.training)
