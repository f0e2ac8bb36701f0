"""Tucker factors of attention weights: heads stacked into tensors, decomposed with factor matrices that they share.

TensorLLM (arXiv:2501.15674, §3.1) stacks a layer's heads as 4-way tensors (hidden, head_dim, kind, head) and takes
their Tucker decomposition with shared factors. With grouped-query attention {Q, O} have H heads and {K, V} have G; with
one core a head the kind and head modes stay whole, so the same decomposition is that of all heads of all kinds in one
row, [heads, d, D]. A kind whose head mode is factored (U_head) or whose U_feat is its own couples to the others through
the factors that remain shared only.

Without data the error is the plain one of the weights: tensorly's ``partial_tucker``, followed by the same sweeps over
kinds that are coupled. With data it is Σ_p w_p tr(L_p (W_p − Ŵ_p) S_p (W_p − Ŵ_p)ᵀ), L the metric of an error in the
heads and S the second moment of what comes in. Where heads have one metric, whitening turns it into the
plain problem. In general they have not: then alternating least squares goes on from the whitened solution of their
average metric. Every step is an exact minimum, or conjugate gradients on a quadratic, so the error never rises; and
the plain solution is the start where it is the better one, so the error is never above that.

Shape letters: N heads of a kind (H or G), d head_dim, D hidden size, r₁, r₂, r_h the ranks of hidden, feature and head
mode, X the hidden mode or whatever stands for it. Everything in float64 on the CPU, one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.factorization.latent import symmetric_power
from tpa_train.factorization.stacked import HeadMoments
from tpa_train.factorization.tucker_ranks import adaptive_rank_selection as adaptive_rank_selection
from tpa_train.factorization.tucker_ranks import rank_for_error
from tpa_train.factorization.tucker_solver import (
    Part,
    leading_vectors,
    plain_solution,
    refine,
    rotate_features,
    whitened_solution,
)
from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.entries import Bits
from tpa_train.tpa.forms.tucker import check_tucker, features_of, rank_of, tucker_kinds
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs

MULTIPLE = 8  # of ranks that are chosen here: kernels want aligned rows


@dataclass
class InputMoments:
    """Second moment [D, D] and mean [D] of a layer's attention input; float64. A truncated hidden mode needs them."""

    second: Tensor
    mean: Tensor

    @classmethod
    def of_sample(cls, x: Tensor, weight: Tensor | None = None) -> InputMoments:
        """Returns the moments of tokens ``x`` [T, D], weighted by ``weight`` [T] if given."""
        x = x.detach().double().cpu()
        weight = torch.ones(x.shape[0], dtype=x.dtype) if weight is None else weight.detach().double().cpu()
        weight = weight / weight.sum()
        return cls((x * weight[:, None]).mT @ x, weight @ x)


@dataclass
class TuckerMoments:
    """What calibration says about one layer. What is missing is taken as white input and a plain squared error."""

    keys: HeadMoments | None = None
    values: HeadMoments | None = None
    inputs: InputMoments | None = None

    @property
    def empty(self) -> bool:
        return self.keys is None and self.values is None and self.inputs is None


@dataclass
class TuckerFactors:
    """Factors of one layer: Ŵ_p[n] = Σ_h U_head[n, h] U_feat core[h] U_hiddenᵀ, [d, D]; of O it is the transpose."""

    hidden: Tensor | None  # [D, r₁]
    features: dict[str, Tensor]  # by ``features_of``, [d, r₂]
    heads: dict[str, Tensor]  # by kind, [G, r_h], where factored
    cores: dict[str, Tensor]  # by kind, [r_h or N, r₂, r₁ or D]
    feature_names: dict[str, str]  # of every kind, the key in ``features``
    down: dict[str, Tensor] = field(default_factory=dict)  # core = down W, [r_h r₂, N d], with a whole hidden mode
    errors: list[float] = field(default_factory=list)  # relative error in the metric, before and after every sweep
    relative_error: float = 0.0  # ‖W − Ŵ‖ / ‖W‖ in the metric (kinds count equally with data)
    plain_error: float = 0.0  # of the weights alone

    def reconstruct(self, kind: str) -> Tensor:
        """Returns Ŵ of a kind, [N, d, D]."""
        core = self.cores[kind] if self.hidden is None else self.cores[kind] @ self.hidden.mT
        core = torch.einsum("nh,hrx->nrx", self.heads[kind], core) if kind in self.heads else core
        return self.features[self.feature_names[kind]] @ core


@dataclass
class LayerReport:
    """What the factorization of one layer cost and saved, counted from the modules that were built."""

    layer: int
    relative_error: float  # in the metric of the data, where given
    plain_error: float
    parameters_before: int
    parameters_after: int
    cache_bytes_before: int  # of one token, in a 16-bit cache
    cache_bytes_after: int
    shareable_parameters: int = 0  # of those after: factors equal in all layers (``share_across_layers``)

    @property
    def parameter_compression(self) -> float:
        return self.parameters_before / self.parameters_after

    @property
    def cache_compression(self) -> float:
        return self.cache_bytes_before / self.cache_bytes_after


def attention_weights(attention: Attention, kinds: tuple[str, ...] = ("q", "k", "v", "o")) -> dict[str, Tensor]:
    """Returns a dense layer's weights by kind as [N, d, D], float64; "o" transposed (W_O^hᵀ)."""
    width = attention.config.head_dim
    weights = {}
    for kind in kinds:
        weight = getattr(attention, f"{kind}_proj").weight.detach().double().cpu()
        weights[kind] = (weight.mT if kind == "o" else weight).unflatten(0, (-1, width))
    return weights


def _build_parts(weights: dict[str, Tensor], spec: LayerSpec, moments: TuckerMoments, hidden: int) -> list[Part]:
    of_heads, inputs = {"k": moments.keys, "v": moments.values}, moments.inputs
    if hidden and inputs is None and any(of_heads.values()):
        raise UserError(
            f"hidden={spec.hidden} truncates the layer's input, whose errors only the input's own moments can weigh: "
            "give TuckerMoments.inputs too, or leave hidden at 0."
        )
    parts = []
    for kind in tucker_kinds(spec):
        weight, head_moments = weights[kind], of_heads.get(kind)
        heads = getattr(spec, f"heads_{kind}") if kind in "kv" else 0
        part = dict(kind=kind, features=features_of(spec, kind), rank=rank_of(spec, kind), head_rank=heads)
        size, tensor, inner = weight.shape[0] * weight.shape[1], weight, None
        metric = None if head_moments is None else head_moments.metric.reshape(size, size)
        if kind != "o" and inputs is not None:
            inner = inputs.second - torch.outer(inputs.mean, inputs.mean) if kind == "v" else inputs.second
        if not hidden:  # only W S Wᵀ counts, and any root of it stands for the weights
            second = None if head_moments is None else head_moments.second.reshape(size, size)
            if second is None and inner is not None:
                flat = weight.flatten(0, 1)
                second = flat @ inner @ flat.mT
            tensor = tensor if second is None else symmetric_power(second, 0.5).view(*weight.shape[:2], size)
            inner = None
        parts.append(part | dict(tensor=tensor, metric=metric, inner=inner))
    depth = max(part["tensor"].shape[-1] for part in parts)
    for part in parts:  # zero columns change nothing, and tensors stack
        part["tensor"] = F.pad(part["tensor"], (0, depth - part["tensor"].shape[-1]))
    parts = [Part(**part) for part in parts]
    if not moments.empty:  # kinds have units of their own then
        for part in parts:
            part.scale = 1.0 / max(part.size, torch.finfo(torch.float64).tiny)
    return parts


def _factorize_mha_weights_with_shared_factors(
    weights: Attention | dict[str, Tensor],
    ranks: LayerSpec,
    moments: TuckerMoments | None = None,
    fixed: dict[str, Tensor] | None = None,
) -> TuckerFactors:
    """Decomposes the Tucker kinds of one layer with shared factors.

    Args:
        weights: a dense layer, or its weights by kind: "q" [H, d, D], "k" and "v" [G, d, D], "o" [H, d, D] (W_O^hᵀ).
        ranks: forms and ranks; kinds whose form is not "tucker" take no part.
        moments: of the calibration; without, the error is that of the weights.
        fixed: factors with orthonormal columns that are given and stay: "hidden" or names of features.

    Raises:
        UserError: a kind has no weights, or a truncated hidden mode comes with moments of heads but none of the input.
    """
    kinds, fixed = tucker_kinds(ranks), fixed or {}
    weights = attention_weights(weights, kinds) if isinstance(weights, Attention) else weights
    missing = [kind for kind in kinds if kind not in weights]
    if missing or not kinds:
        raise UserError(f"ranks give the form 'tucker' to {list(kinds)}, but the weights are of {sorted(weights)}.")
    weights = {kind: weights[kind].detach().double().cpu() for kind in kinds}
    depth = next(iter(weights.values())).shape[-1]
    hidden = ranks.hidden if ranks.hidden < depth else 0  # r₁ = D is the whole mode: an identity
    moments = moments or TuckerMoments()
    plain = _build_parts(weights, ranks, TuckerMoments(), hidden)
    state = plain_solution(plain, weights, hidden, fixed)
    parts, errors = plain, []
    if not moments.empty:
        parts = _build_parts(weights, ranks, moments, hidden)
        state = min(state, whitened_solution(parts, hidden, fixed), key=lambda s: s.total(parts))
        errors = refine(parts, state, fixed)
    for name in state.features:
        if name not in fixed:
            rotate_features(parts, state, name)

    energy = sum(p.scale * p.size for p in parts)
    cores = {p.kind: state.core(p) for p in parts}
    down = {}
    if not hidden:  # back from roots to weights
        cores = {p.kind: state.latents(p, weights[p.kind]) for p in parts}
        for part in parts:
            if part.kind in "kv":
                count, width = part.tensor.shape[:2]
                units = torch.eye(count * width, dtype=torch.float64).view(count, width, -1)
                down[part.kind] = state.latents(part, units).flatten(0, 1)
    factors = TuckerFactors(
        hidden=torch.eye(depth, dtype=torch.float64) if ranks.hidden == depth else state.hidden,
        features=state.features,
        heads={p.kind: state.heads[p.kind] for p in parts if p.head_rank},
        cores=cores,
        feature_names={p.kind: p.features for p in parts},
        down=down,
        errors=[(e / energy) ** 0.5 for e in errors],
        relative_error=(state.total(parts) / energy) ** 0.5,
    )
    lost = sum(float((weights[kind] - factors.reconstruct(kind)).square().sum()) for kind in kinds)
    factors.plain_error = (lost / sum(float(w.square().sum()) for w in weights.values())) ** 0.5
    return factors


def _layer_factors(
    attention: Attention, spec: LayerSpec, found: TuckerFactors, moments: TuckerMoments
) -> dict[str, Tensor]:
    """Returns the parameters of ``FactorizedAttention`` by name, without a prefix, float64."""
    config, kinds = attention.config, tucker_kinds(spec)
    repeats = config.num_heads // config.num_kv_heads
    weights = attention_weights(attention, ("v", "o"))
    mean = _value_mean(weights["v"], spec, moments)
    modules = {"q": "query_form", "k": "keys", "v": "values", "o": "output_form"}
    named: dict[str, Tensor] = {}
    if spec.hidden:
        named["shared.hidden"] = found.hidden
    for kind in kinds:
        core, features = found.cores[kind], found.features[found.feature_names[kind]]
        if kind == "o" and spec.form_v == "tucker":  # it reads latents: W_Oᵀ's features are theirs, U_featᵀ W_Oᵀ
            core = features.mT @ features @ core
        elif kind != "v":
            name = "shared.features" if spec.shared_features else f"{modules[kind]}.features"
            named[name] = features
        named[f"{modules[kind]}.core"] = core
        if kind in found.heads:
            named[f"{modules[kind]}.heads"] = found.heads[kind]
    if "k" in kinds:
        keys = None if moments.keys is None else moments.keys.mean
        named["keys.center"] = _latent_mean(found, "k", keys, None)
    if "v" in kinds:
        named["values.center"] = _latent_mean(found, "v", mean, moments.inputs)
        if spec.form_o == "dense":
            out = torch.einsum("hdo,dr->ohr", weights["o"], found.features[found.feature_names["v"]])
            named["values.out.weight"] = out.flatten(1)
    # Latents are read without their center, so the layer's output owes the whole mean; dense values carry theirs, and
    # it owes what the factors of W_O lose of it.
    if "v" in kinds or "o" in kinds:
        owed = weights["o"] if "v" in kinds else weights["o"] - found.reconstruct("o")
        bias = torch.einsum("hdo,hd->o", owed, mean.repeat_interleave(repeats, 0))
        named["output_form.bias" if "o" in kinds else "values.bias"] = bias
    return named


def _value_mean(weight: Tensor, spec: LayerSpec, moments: TuckerMoments) -> Tensor:
    """Returns the mean value [G, d]; zero where no calibration knows it."""
    truncated = 0 < spec.hidden < weight.shape[-1]  # then latents' mean is known through that of the input only
    if moments.inputs is not None and (truncated or moments.values is None):
        return weight @ moments.inputs.mean
    return torch.zeros(weight.shape[:2], dtype=torch.float64) if moments.values is None else moments.values.mean


def _latent_mean(found: TuckerFactors, kind: str, mean: Tensor | None, inputs: InputMoments | None) -> Tensor:
    """Returns the mean of what a kind caches, [r_h or G, r₂], given that of its vectors [G, d]; zero if unknown."""
    core, down = found.cores[kind], found.down.get(kind)
    if mean is not None and down is not None:
        return (down @ mean.flatten()).view(core.shape[:2])  # with r_h = G, U_head is the identity
    if kind == "v" and inputs is not None:
        return core @ (found.hidden.mT @ inputs.mean)
    return torch.zeros(core.shape[:2], dtype=torch.float64)


def _factorize_and_set_weights(
    model: Gemma3ForCausalLM,
    layer: int,
    spec: LayerSpec,
    moments: TuckerMoments | None = None,
    fixed: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], LayerReport]:
    """Factorizes one layer.

    Args:
        model: the dense model; it is not changed.
        layer: index.
        spec: forms and ranks of the layer. Parts in forms other than Tucker's are left to their own solvers.
        moments: of the calibration; without, the error is that of the weights.
        fixed: orthonormal factors that are given, by "hidden" or the name of the features.

    Returns:
        The Tucker parts' factors by full state-dict name, for ``Gemma3ForMultimodalLMwithTPA.from_dense``, in float32
        or wider; and what they cost and save, counted from modules that are built for it.

    Raises:
        UserError: the ranks do not fit the model, or the layer is converted already.
    """
    config = model.config
    check_tucker(config, spec)
    if not tucker_kinds(spec):
        raise UserError(f"layer {layer} has no Tucker part; give one of form_q/k/v/o the form 'tucker'.")
    attention = model.layers[layer].self_attn
    if isinstance(attention, FactorizedAttention):
        raise UserError(f"layer {layer} is converted already; factorize the original model.")
    moments = moments or TuckerMoments()
    found = _factorize_mha_weights_with_shared_factors(attention, spec, moments, fixed)
    weight = model.embed_tokens.weight
    factors = {
        f"layers.{layer}.self_attn.{name}": tensor.to(weight.device, accumulation_dtype(weight.dtype)).contiguous()
        for name, tensor in _layer_factors(attention, spec, found, moments).items()
    }
    with torch.device("meta"):
        built = FactorizedAttention(config, layer, spec)
    report = LayerReport(
        layer=layer,
        relative_error=found.relative_error,
        plain_error=found.plain_error,
        parameters_before=sum(p.numel() for p in attention.parameters()),
        parameters_after=sum(p.numel() for p in built.parameters()),
        cache_bytes_before=_token_bytes(attention),
        cache_bytes_after=_token_bytes(built),
    )
    if fixed:
        named = {name.rpartition("self_attn.")[2]: t.numel() for name, t in factors.items()}
        report.shareable_parameters = sum(n for name, n in named.items() if name.endswith((".hidden", ".features")))
    return factors, report


def _token_bytes(attention: Attention) -> int:
    """Returns the bytes that one token takes in a cache as ``KVCache`` allocates it, at 16 bits where not quantized."""
    shapes = attention.storage()
    return sum(torch.Size(shape).numel() * (own or torch.bfloat16).itemsize for shape, own in shapes)


def tucker_spec(
    config: Gemma3Config,
    rank: int | dict[str, int],
    *,
    hidden: int = 0,
    heads: int = 0,
    kinds: tuple[str, ...] = ("k", "v"),
    shared_features: bool = True,
    bits: Bits = 16,
) -> LayerSpec:
    """Returns the specification of a layer whose ``kinds`` are Tucker's and whose other parts are dense.

    Args:
        config: the model's sizes.
        rank: r₂, of all kinds or by kind.
        hidden, heads: r₁ and r_h (of keys and values); 0 leaves the mode whole.
        kinds: of "q", "k", "v", "o".
        shared_features: whether the kinds share one U_feat.
        bits: of the cached numbers.

    Raises:
        UserError: an unknown kind, a kind without rank, or ranks that the model does not have.
    """
    for kind in kinds:
        if kind not in ("q", "k", "v", "o"):
            raise UserError(f"unknown kind '{kind}' in kinds; valid: q, k, v, o.")
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(kinds, rank)
    values: dict = {"rank_k": config.head_dim, "rank_v": config.head_dim, "bits_k": bits}
    for kind in kinds:
        if kind not in ranks and (kind, "v" in kinds) != ("o", True):
            raise UserError(f"rank has no entry for kind '{kind}'; give one number or one a kind.")
        values |= {f"form_{kind}": "tucker", f"rank_{kind}": ranks.get(kind, 0)}
        if kind in "kv":
            values[f"heads_{kind}"] = heads
    spec = LayerSpec(**values, hidden=hidden, shared_features=shared_features)
    check_tucker(config, spec)
    return spec


def _spec_for_error(
    attention: Attention, spec: LayerSpec, moments: TuckerMoments | None, max_error: float
) -> LayerSpec:
    """Returns ``spec`` with the smallest ranks r₂ of one layer whose truncation alone stays within ``max_error``.

    Chosen by the spectrum of the feature mode in the average metric of the heads and kinds that share a U_feat.
    """
    if isinstance(attention, FactorizedAttention):
        return spec  # refused by what factorizes it
    width = attention.config.head_dim
    parts = _build_parts(attention_weights(attention, tucker_kinds(spec)), spec, moments or TuckerMoments(), 0)
    ranks = {}
    for name in {part.features for part in parts}:
        users = [part for part in parts if part.features == name]
        root = symmetric_power(sum(part.scale * part.head_metric() for part in users), 0.5)
        gram = sum(part.scale * torch.einsum("ndx,nex->de", part.tensor, part.tensor) for part in users)
        energies = torch.linalg.eigvalsh(root @ gram @ root).flip(0).clamp_min(0)
        rank = min(width, -(-rank_for_error(energies, max_error) // MULTIPLE) * MULTIPLE)
        ranks |= {f"rank_{part.kind}": rank for part in users if part.kind != "o" or spec.form_v == "dense"}
    return replace(spec, **ranks)


def _factors_across_layers(model: Gemma3ForCausalLM, layers: list[int], spec: LayerSpec) -> dict[str, Tensor]:
    """Returns U_hidden and U_feat for all ``layers`` together: leading vectors of their modes (HOSVD), plain metric.

    The Gram matrices are summed layer by layer, so that no two layers are in memory at once.
    """
    grams: dict[str, Tensor] = {}
    for layer in layers:
        for kind, weight in attention_weights(model.layers[layer].self_attn, tucker_kinds(spec)).items():
            flat, name = weight.flatten(0, 1), features_of(spec, kind)
            grams[name] = grams.get(name, 0) + torch.einsum("ndx,nex->de", weight, weight)
            if 0 < spec.hidden < weight.shape[-1]:
                grams["hidden"] = grams.get("hidden", 0) + flat.mT @ flat
    ranks = {features_of(spec, kind): rank_of(spec, kind) for kind in tucker_kinds(spec)} | {"hidden": spec.hidden}
    return {name: leading_vectors(gram, ranks[name]) for name, gram in grams.items()}


def factorize_all_layers_with_shared_factors(
    model: Gemma3ForCausalLM,
    rank: int | dict[str, int] | None = None,
    *,
    max_error: float = 0.01,
    hidden: int = 0,
    heads: int = 0,
    layers: list[int] | None = None,
    kinds: tuple[str, ...] = ("k", "v"),
    shared_features: bool = True,
    bits: Bits = 16,
    share_across_layers: bool = False,
    moments: dict[int, TuckerMoments] | None = None,
) -> tuple[Gemma3ForMultimodalLMwithTPA, list[LayerReport]]:
    """Returns a model whose ``layers`` are in Tucker form and which shares everything else with ``model``; and reports.

    Args:
        model: the dense model; it is not changed.
        rank, hidden, heads, kinds, shared_features, bits: as of ``tucker_spec``. Without a rank every layer has its
            own: the smallest multiples of 8 that lose at most ``max_error``.
        max_error: ‖W − Ŵ‖ / ‖W‖ that truncating the feature mode may cost, in the metric of the moments. It is the
            average metric of what shares a U_feat: a bound where they have one metric, else a guide.
        layers: which layers; all if left out.
        share_across_layers: one U_hidden and U_feat for all these layers. Every layer still stores its own copy, and
            is counted with it; ``LayerReport.shareable_parameters`` says how much of it is the same in all layers.
        moments: of the calibration, by layer; without, the error is that of the weights.

    Raises:
        UserError: a layer that the model does not have, an error out of range, or as ``tucker_spec``.
    """
    if rank is None and not 0 <= max_error < 1:
        raise UserError(f"max_error={max_error} must be at least 0 and below 1.")
    config, moments = model.config, moments or {}
    layers = list(range(config.num_layers)) if layers is None else sorted(set(layers))
    outside = [layer for layer in layers if not 0 <= layer < config.num_layers]
    if outside or not layers:
        raise UserError(f"layers={layers} must name some of the model's layers, 0 to {config.num_layers - 1}.")
    ranks = config.head_dim if rank is None else rank
    spec = tucker_spec(
        config, ranks, hidden=hidden, heads=heads, kinds=kinds, shared_features=shared_features, bits=bits
    )
    if rank is None and share_across_layers:
        raise UserError("share_across_layers is one U_feat for all layers: give a rank.")
    fixed = _factors_across_layers(model, layers, spec) if share_across_layers else None
    specs, factors, reports = dense_specs(config), {}, []
    for layer in layers:
        attention = model.layers[layer].self_attn
        specs[layer] = spec if rank is not None else _spec_for_error(attention, spec, moments.get(layer), max_error)
        found, report = _factorize_and_set_weights(model, layer, specs[layer], moments.get(layer), fixed)
        factors |= found
        reports.append(report)
    return Gemma3ForMultimodalLMwithTPA.from_dense(model, specs, factors), reports
