"""Contextual tensor products from the original's weights: a closed form, a short fit, and the conversion of a model.

Constant-A, K_t[g] ≈ Σ_r A[r, g] b_r(x), and constant-B, K_t[g] ≈ U c_g(x), are the same problem on either mode of the
stacked heads [G, d]: one mode gets a constant basis, and what it multiplies is linear in the token. Given the basis S,
the best linear map is the projection P = (SᵀMS)⁻¹SᵀM in the metric M, whatever the data; given the map, S is a least
squares problem. With one metric for all heads this is solved by the eigenvectors of the head mode (the averaged
moments); in general the two alternate from there. The contextual form starts at a₀ = R·A and W_A = 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.factorization.contextual_fit import TokenTargets, fit_contextual
from tpa_train.factorization.latent import output_heads, symmetric_power
from tpa_train.factorization.stacked import ActivationSample, HeadMoments
from tpa_train.factorization.token_oracle import best_token_factors
from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.entries import Bits
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, converted_attention
from tpa_train.tpa.spec import LayerSpec, dense_specs

SWEEPS = 100  # of the alternation
IMPROVEMENT = 1e-6  # relative; the alternation stops below it
METRIC_FLOOR = 1e-11  # of the metric's norm; a direction that never mattered must still have a length
SOLVER_STEPS = 20  # of conjugate gradients a sweep; one suffices where the metric is separable
PREFIX = {"k": "keys.", "v": "values.", "q": "query_form."}
PROJECTION = {"k": "k_proj", "v": "v_proj", "q": "q_proj"}


@dataclass
class ContextualDecomposition:
    """K_t[g] ≈ Σ_r a[r, g] b_r, with one of the two constant and the other linear in the token x; float64."""

    a: Tensor  # [R, G], or [R, G, D] (a = W x) where B is constant
    b: Tensor  # [R, d, D] (b = W x), or [R, d] where B is constant
    lost: Tensor  # [G, d], what the factors do not carry of the moments' mean
    error: float  # E δ·M·δ relative to E k·M·k


@torch.no_grad()
def contextual_tensor_decomposition(
    weight: Tensor, moments: HeadMoments | None, rank: int, constant: str | None = None
) -> ContextualDecomposition:
    """Returns the closed form of the contextual form, or of its constant-A or constant-B special case.

    Args:
        weight: W_K, W_V or W_Q [G, d, D].
        moments: of these heads; those of the weights when None.
        rank: R, at most G (with a constant B at most d); there the factors are the original exactly.
        constant: "a", "b" or None; None starts where the best constant A is.

    Raises:
        UserError: the rank or ``constant`` is out of range.
    """
    if constant not in (None, "a", "b"):
        raise UserError(f"constant='{constant}' must be 'a', 'b' or left out.")
    weight = weight.detach().double().cpu()
    groups, width, _ = weight.shape
    _check_rank("rank", rank, groups, width, constant)
    lost = torch.zeros(groups, width, dtype=torch.float64)
    if rank == (width if constant == "b" else groups):  # every vector of the mode is its own factor
        eye = torch.eye(rank, dtype=torch.float64)
        if constant == "b":
            return ContextualDecomposition(weight.transpose(0, 1).contiguous(), eye, lost, 0.0)
        return ContextualDecomposition(eye, weight.clone(), lost, 0.0)
    moments = moments or HeadMoments.of_weights(weight)
    second, metric, mean = moments.second.double(), moments.metric.double(), moments.mean.double()
    if constant == "b":
        u, maps, error = _constant_mode(second.permute(1, 0, 3, 2), metric.permute(1, 0, 3, 2), rank)
        kept = torch.einsum("dr,rgeh,he->gd", u, maps, mean)
        latents = torch.einsum("rgeh,hex->rgx", maps, weight)
        return ContextualDecomposition(latents, u.mT.contiguous(), mean - kept, error)
    a, maps, error = _constant_mode(second, metric, rank)
    kept = torch.einsum("gr,rdhe,he->gd", a, maps, mean)
    features = torch.einsum("rdhe,hex->rdx", maps, weight)
    return ContextualDecomposition(a.mT.contiguous(), features, mean - kept, error)


def _check_rank(option: str, rank: int, groups: int, width: int, constant: str | None) -> None:
    full, what = (width, "head_dim") if constant == "b" else (groups, "the number of heads")
    if not 1 <= rank <= full:
        raise UserError(f"{option}={rank} must lie between 1 and {what}, {full}: there it is exact already.")


# --------------------------------------------------------------------------------------------------------- alternation


def _constant_mode(second: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Solves k[i] ≈ Σ_r S[i, r] y_r for k [m, n], S constant and y_r = P_r·k in R^n.

    Args:
        second: E k kᵀ [m, n, m, n].
        metric: M [m, n, m, n].
        rank: R < m.

    Returns:
        S [m, R] with orthonormal columns, P [R, n, m, n], and the error relative to E k·M·k.
    """
    size, width = metric.shape[:2]
    flat = (size * width, size * width)
    second, metric = second.contiguous(), metric.contiguous()
    eye = torch.eye(flat[0], dtype=metric.dtype)
    floor = (METRIC_FLOOR * torch.linalg.matrix_norm(metric.view(flat))).clamp_min(torch.finfo(metric.dtype).tiny)
    metric = (metric.view(flat) + floor * eye).view_as(metric)
    total = float((metric * second).sum())
    shared = _eigen_start(second, metric, rank)
    best, best_error = None, float("inf")
    for _ in range(SWEEPS):
        projected = torch.einsum("ir,iajb->rajb", shared, metric)  # SᵀM
        gram = torch.einsum("rajb,js->rasb", projected, shared).reshape(rank * width, -1)
        maps = torch.linalg.solve(gram, projected.reshape(rank * width, -1))
        cross = second.view(flat) @ maps.mT  # E k yᵀ [mn, Rn]
        error = total - float((projected.reshape(rank * width, -1) * cross.mT).sum())
        enough = error > best_error * (1.0 - IMPROVEMENT) or error <= 1e-14 * total
        if error < best_error:
            best, best_error = (shared, maps), error
        if enough:
            break
        moments_y = (maps @ cross).view(rank, width, rank, width)
        shared = _basis_given_maps(metric, cross.view(size, width, rank, width), moments_y, shared)
        shared = torch.linalg.qr(shared).Q  # the scale between S and y is free
    shared, maps = best
    rest = eye - torch.einsum("ir,rak->iak", shared, maps.view(rank, width, -1)).reshape(flat)
    error = float((metric.view(flat) @ rest * (rest @ second.view(flat))).sum())  # no cancellation near zero
    return shared, maps.view(rank, width, size, width), max(error, 0.0) / max(total, torch.finfo(metric.dtype).tiny)


def _eigen_start(second: Tensor, metric: Tensor, rank: int) -> Tensor:
    """Returns the top eigenvectors [m, R] of the mode's moment under the average metric: optimal if it is one."""
    average = torch.einsum("iaib->ab", metric) / metric.shape[0]
    values = torch.einsum("ab,iajb->ij", average, second)
    vectors = torch.linalg.eigh(0.5 * (values + values.mT)).eigenvectors.flip(-1)[:, :rank]
    # An eigenvector's sign is arbitrary; fix it so that two machines agree.
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def _basis_given_maps(metric: Tensor, cross: Tensor, moments_y: Tensor, start: Tensor) -> Tensor:
    """Minimises E (k − S y)·M·(k − S y) over S [m, R] by conjugate gradients from ``start``: never worse than it.

    The normal equations have (m·R)² numbers, too many for a constant B; the preconditioner is their separable part,
    M ≈ M₁ ⊗ M₂ / tr M.
    """
    trace = torch.einsum("iaia->", metric)
    first, second = torch.einsum("iaja->ij", metric), torch.einsum("iaib->ab", metric) / trace
    left = symmetric_power(first, -1.0)
    right = symmetric_power(torch.einsum("ab,rasb->rs", second, moments_y), -1.0)

    def normal(s: Tensor) -> Tensor:
        return torch.einsum("iabs,sbra->ir", torch.einsum("iajb,js->iabs", metric, s), moments_y)

    residual = torch.einsum("iajb,jbra->ir", metric, cross) - normal(start)
    target = 1e-13 * float(torch.einsum("iajb,jbra->ir", metric, cross).norm())
    s, step = start, torch.zeros_like(start)
    previous = 1.0
    for _ in range(SOLVER_STEPS):
        direction = left @ residual @ right
        size = float((residual * direction).sum())
        if float(residual.norm()) <= target or size <= 0.0:
            break
        step = direction + (size / previous) * step
        image = normal(step)
        curvature = float((step * image).sum())
        if curvature <= 0.0:
            break
        s, residual = s + (size / curvature) * step, residual - (size / curvature) * image
        previous = size
    return s


# -------------------------------------------------------------------------------------------------------------- errors


@torch.no_grad()
def per_token_error(
    weight: Tensor,
    sample: ActivationSample,
    moments: HeadMoments | None,
    rank: int,
    kind: str = "k",
    factors: Sequence[dict[str, Tensor]] = (),
) -> float:
    """Returns the oracle's error: the best rank-R matrix [G, d] of every token, chosen with the token in hand.

    Found by alternating least squares in the metric of ``contextual_error``, which the result compares with: it bounds
    what contextual factors of that rank can reach, up to local minima, and is never above the error of ``factors``.

    Args:
        weight: W_K, W_V or W_Q [G, d, D].
        sample: the layer's tokens.
        moments: whose metric counts; a plain squared error when None.
        rank: R.
        kind: "k", "v" or "q".
        factors: contextual or constant-A factors of this rank to start from as well.

    Raises:
        UserError: ``factors`` have another rank.
    """
    if rank >= min(weight.shape[:2]):
        return 0.0  # no matrix [G, d] has a higher rank
    starts = [_token_factors(f, sample, kind) for f in factors]
    for a, _ in starts:
        if a.shape[1] != rank:
            raise UserError(f"factors have rank {a.shape[1]}, but the oracle's is rank={rank}; give those of one rank.")
    return best_token_factors(TokenTargets(weight, sample, moments, kind), rank, starts)[1]


@torch.no_grad()
def contextual_error(
    weight: Tensor, factors: dict[str, Tensor], sample: ActivationSample, moments: HeadMoments | None, kind: str = "k"
) -> float:
    """Returns what contextual (or constant-A) factors lose on ``sample``: Σ w δ·M·δ relative to Σ w k·M·k.

    Keys and queries are divided by the token's rms over all heads; values are taken around their mean, which the
    output's bias gives back.

    Args:
        weight: of the original [G, d, D].
        factors: as ``_init_contextual_factorization`` names them.
        sample: the layer's tokens.
        moments: whose metric counts; a plain squared error when None.
        kind: "k", "v" or "q".
    """
    a, b = _token_factors(factors, sample, kind)
    return TokenTargets(weight, sample, moments, kind).error(a.mT @ b)


def _token_factors(factors: dict[str, Tensor], sample: ActivationSample, kind: str) -> tuple[Tensor, Tensor]:
    """Returns a(x) / R [T, R, G] and b(x) [T, R, d] of the sample's tokens."""
    prefix = PREFIX[kind]
    x, a_bias = sample.x.double(), factors[prefix + "a_bias"].double()
    rank = a_bias.shape[0]
    a = a_bias.expand(len(x), -1, -1)
    if prefix + "a.weight" in factors:
        a = a + (x @ factors[prefix + "a.weight"].double().mT).view_as(a)
    return a / rank, (x @ factors[prefix + "b.weight"].double().mT).unflatten(-1, (rank, -1))


# ---------------------------------------------------------------------------------------------------------- conversion


def _init_contextual_factorization(
    attention: Attention,
    kind: str,
    rank: int,
    moments: HeadMoments | None = None,
    sample: ActivationSample | None = None,
    steps: int = 200,
    constant: str | None = None,
) -> dict[str, Tensor]:
    """Returns the factors of one layer's keys, values or queries by their names in the module, float64.

    The closed form; with a sample and R < G a short fit of W_A, W_B and a₀ after it, which is kept only if it helps.

    Args:
        attention: the original layer.
        kind: "k", "v" or "q" (its heads are the H query heads).
        rank: R.
        moments: those of the weights when None.
        sample: tokens to fit on; none is made for a constant A or B.
        steps: of the fit.
        constant: "a", "b" (keys and values only) or None.

    Raises:
        UserError: the rank or ``constant`` is out of range.
    """
    heads = attention.config.num_heads if kind == "q" else attention.config.num_kv_heads
    weight = getattr(attention, PROJECTION[kind]).weight.detach().double().cpu().unflatten(0, (heads, -1))
    _check_rank(f"rank_{kind}", rank, heads, attention.config.head_dim, constant)
    if constant and kind == "q":
        raise UserError("queries have no form with a constant A or B: they are never cached; use rank_q alone.")
    found, prefix = contextual_tensor_decomposition(weight, moments, rank, constant), PREFIX[kind]
    mean = torch.zeros_like(found.lost) if moments is None else moments.mean.double()
    if constant == "b":
        down = found.a.transpose(0, 1)  # [G, R, D]
        factors = {
            "down.weight": down.flatten(0, 1),
            # U's columns are orthonormal, so this is the latent of the mean.
            "center": (mean - found.lost) @ found.b.mT,
        }
        if kind == "k":
            factors["up"] = found.b.mT[None]
        else:
            out = torch.einsum("ghod,rd->oghr", output_heads(attention), found.b)
            factors |= {"out.weight": out.flatten(1), "bias": _through_output(attention, mean)}
        return {prefix + name: t.contiguous() for name, t in factors.items()}
    a_bias, b, lost = rank * found.a, found.b, found.lost
    a = torch.zeros(*a_bias.shape, weight.shape[-1], dtype=torch.float64)
    if constant is None and sample is not None and rank < heads and steps > 0:
        fitted = fit_contextual(TokenTargets(weight, sample, moments, kind), a_bias, b, steps)
        if fitted is not None:
            a, a_bias, b, lost = fitted
    factors = {"a_bias": a_bias, "b.weight": b.flatten(0, 1)}
    if constant is None:
        factors["a.weight"] = a.flatten(0, 1)
    if kind == "v":
        factors["bias"] = _through_output(attention, lost)
    return {prefix + name: t.contiguous() for name, t in factors.items()}


def paying_rank(config: Gemma3Config) -> int:
    """Returns the largest R whose cache is smaller than the original's, R(G + d) < G·d; 1 where none is (G = 1)."""
    groups, width = config.num_kv_heads, config.head_dim
    return max(1, -(-groups * width // (groups + width)) - 1)


def _through_output(attention: Attention, values: Tensor) -> Tensor:
    """Returns what constant values [G, d] add to the layer's output, [D]: attention weights sum to one."""
    return torch.einsum("ghod,gd->o", output_heads(attention), values)


def _layer_spec(
    config: Gemma3Config,
    ranks: dict[str, int | None],
    constants: dict[str, str | None],
    bits_k: Bits,
    bits_v: Bits | None,
) -> LayerSpec:
    """Returns the specification of a converted layer; a part without a rank stays dense."""
    if all(rank is None for rank in ranks.values()):
        raise UserError("nothing would be converted: give at least one of rank_q, rank_k and rank_v.")
    forms: dict[str, str | int] = {}
    for kind, rank in ranks.items():
        constant = constants.get(kind)
        if constant not in (None, "a", "b"):
            raise UserError(f"constant_{kind}='{constant}' must be 'a', 'b' or left out.")
        if rank is not None:
            forms[f"form_{kind}"] = f"constant_{constant}" if constant else "contextual"
            forms[f"rank_{kind}"] = rank
        elif kind != "q":
            forms[f"rank_{kind}"] = config.head_dim
    spec = LayerSpec(**forms, bits_k=bits_k, bits_v=bits_v)
    for kind, entries in (("k", spec.key_entries(config)), ("v", spec.value_entries(config))):
        numbers, dense = sum(e.rows * e.count for e in entries), config.num_kv_heads * config.head_dim
        if ranks[kind] is not None and numbers >= dense and constants.get(kind) != "b":
            why = (
                "with one KV head a token's matrix is a single vector, and an outer product of rank 1 already holds it"
                if config.num_kv_heads == 1
                else "the form pays only while R(G + d) < G·d"
            )
            warnings.warn(
                f"rank_{kind}={ranks[kind]} caches {numbers} numbers a token, the original {dense}: {why}; "
                f"{'use the latent form' if config.num_kv_heads == 1 else 'lower the rank'}.",
                stacklevel=3,
            )
    return spec


def _layer_factors(
    attention: Attention,
    spec: LayerSpec,
    moments: dict[str, HeadMoments] | None,
    sample: ActivationSample | None,
    steps: int,
) -> dict[str, Tensor]:
    """Returns all factors of one layer in the precision they train in, on the layer's device."""
    if isinstance(attention, FactorizedAttention):
        raise UserError(f"layer {attention.layer} is factorized already; convert the original model.")
    factors: dict[str, Tensor] = {}
    for kind in "qkv":
        form = getattr(spec, f"form_{kind}")
        if form != "dense":
            constant = form.removeprefix("constant_") if form.startswith("constant_") else None
            factors |= _init_contextual_factorization(
                attention, kind, getattr(spec, f"rank_{kind}"), (moments or {}).get(kind), sample, steps, constant
            )
    weight = attention.q_proj.weight
    return {n: t.to(device=weight.device, dtype=accumulation_dtype(weight.dtype)) for n, t in factors.items()}


def convert_from_standard_weights(
    attention: Attention,
    rank_q: int | None = None,
    rank_k: int | None = None,
    rank_v: int | None = None,
    *,
    constant_k: str | None = None,
    constant_v: str | None = None,
    moments: dict[str, HeadMoments] | None = None,
    sample: ActivationSample | None = None,
    steps: int = 200,
    bits_k: Bits = 16,
    bits_v: Bits | None = None,
) -> FactorizedAttention:
    """Returns one layer in contextual form; parameters that are not factors are those of ``attention`` itself.

    Args:
        attention: the original layer.
        rank_q: R of the queries, at most H; None leaves them dense.
        rank_k: R of the keys, at most G (a constant B: head_dim).
        rank_v: R of the values.
        constant_k: "a" or "b" makes that factor of the keys the same for all tokens.
        constant_v: the same for values.
        moments: by kind, "q", "k" and "v"; those of the weights where left out.
        sample: tokens to fit W_A and W_B on.
        steps: of that fit.
        bits_k: widths of the cached numbers.
        bits_v: of the values; ``bits_k`` when None.

    Raises:
        UserError: an option is out of range, or the layer is factorized already.
    """
    ranks, constants = {"q": rank_q, "k": rank_k, "v": rank_v}, {"k": constant_k, "v": constant_v}
    spec = _layer_spec(attention.config, ranks, constants, bits_k, bits_v)
    factors = _layer_factors(attention, spec, moments, sample, steps)
    return converted_attention(attention, spec, factors)


def apply_contextual_tensor_decomposition(
    model: Gemma3ForCausalLM,
    rank_q: int | None = None,
    rank_k: int | None = None,
    rank_v: int | None = None,
    layers: list[int] | None = None,
    *,
    constant_k: str | None = None,
    constant_v: str | None = None,
    moments: dict[int, dict[str, HeadMoments]] | None = None,
    samples: dict[int, ActivationSample] | None = None,
    steps: int = 200,
    bits_k: Bits = 16,
    bits_v: Bits | None = None,
) -> Gemma3ForMultimodalLMwithTPA:
    """Returns a model whose ``layers`` (all when None) are in contextual form; the rest is shared with ``model``.

    ``moments`` and ``samples`` are by layer; every other option is that of ``convert_from_standard_weights``.

    Raises:
        UserError: an option is out of range, a layer does not exist, or the model is factorized already.
    """
    config = model.config
    ranks, constants = {"q": rank_q, "k": rank_k, "v": rank_v}, {"k": constant_k, "v": constant_v}
    spec = _layer_spec(config, ranks, constants, bits_k, bits_v)
    specs, factors = dense_specs(config), {}
    for layer in range(config.num_layers) if layers is None else layers:
        if not 0 <= layer < config.num_layers:
            raise UserError(f"layers names layer {layer}, but the model has layers 0 to {config.num_layers - 1}.")
        specs[layer] = spec
        found = _layer_factors(
            model.layers[layer].self_attn, spec, (moments or {}).get(layer), (samples or {}).get(layer), steps
        )
        factors |= {f"layers.{layer}.self_attn.{name}": tensor for name, tensor in found.items()}
    return Gemma3ForMultimodalLMwithTPA.from_dense(model, specs, factors)
