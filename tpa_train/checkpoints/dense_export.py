"""A stock Gemma 3 checkpoint with the student's factors multiplied out: loads everywhere, and caches what the original
does.

Every form but the contextual is linear in the token, so this is exact but for the rounding of cached numbers, which is
gone. Values narrower than a head are filled up with zero columns that W_O does not read; centers of keys cancel. What
the values' centers and biases leave is a constant of the layer's output, which only ``o_proj.bias`` can hold: the
folder has ``attention_bias`` then, as transformers' Gemma 3 understands, and zeros for the other biases.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_train.checkpoints.export import VISION, check_finite, check_free, new_folder
from tpa_train.checkpoints.huggingface import huggingface_config
from tpa_train.checkpoints.shards import SHARD_BYTES, StoredWeights, nbytes, write_weights
from tpa_train.checkpoints.transformers_export import PREFIX, as_stored, storage_dtype, write_generation, write_json
from tpa_train.errors import UserError
from tpa_train.gemma3.attention import Attention, AttentionContext, attend
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.forms.tucker import project
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, layer_of, set_parameter

BIAS = "o_proj.bias"
NO_BIAS = 5e-7  # of the biases' size: what is left of a constant below this is their rounding to float32
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of an attention's output, root mean square


def export_dense(
    student: Gemma3ForMultimodalLMwithTPA,
    out: str | Path,
    dtype: str = "auto",
    card: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a Hugging Face folder of a stock ``Gemma3ForCausalLM``, and compares every converted attention with it.

    Args:
        student: the converted model; a vision side is left out.
        out: folder to make; must not exist or be empty.
        dtype: "float32", "bfloat16", or "auto": float32 if any weight is held in it.
        card: text of README.md.
        shard_bytes: of a file.

    Returns:
        The folder.

    Raises:
        UserError: a form is not linear in the token or too wide for a head, the folder is in use, a weight is not
            finite, or what was written computes something else.
    """
    out = Path(out)
    stored = storage_dtype(student, dtype)
    check_free(out)
    check_linear(student)
    parameters = {n: p for n, p in student.named_parameters() if not n.startswith(VISION)}
    check_finite(parameters)

    @lru_cache(maxsize=1)  # tensors are read in the order of the layers
    def attention(layer: int) -> dict[str, Tensor]:
        return dense_attention(student.layers[layer].self_attn)

    biased = any(has_bias(attention(layer)) for layer in student.converted_layers)
    shapes = dense_shapes(student, biased)

    def read(name: str) -> Tensor:
        own = name.removeprefix(PREFIX)
        prefix, _, part = own.partition(".self_attn.")
        if part and layer_of(own) in student.converted_layers:
            return as_stored(attention(layer_of(own)).get(part, torch.zeros(shapes[name])), stored)
        return as_stored(parameters[own] if own in parameters else torch.zeros(shapes[name]), stored)

    with new_folder(out) as partial:
        config = huggingface_config(student.config, student.tokenizer, stored)
        write_json(partial / "config.json", config | {"attention_bias": biased})
        write_generation(student, partial)
        sizes = {name: nbytes(torch.empty(shape, device="meta"), stored) for name, shape in shapes.items()}
        write_weights(partial, sizes, read, shard_bytes)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        weights = StoredWeights.of(partial)
        for layer in student.converted_layers:
            _compare(student, layer, weights, TOLERANCE[stored])
    return out


def check_linear(student: Gemma3ForMultimodalLMwithTPA) -> None:
    """Refuses layers that no dense attention of the original's sizes equals.

    Raises:
        UserError: see the message.
    """
    for layer in student.converted_layers:
        spec = student.specs[layer]
        for kind, name in (("q", "queries"), ("k", "keys"), ("v", "values")):
            if getattr(spec, f"form_{kind}") == "contextual":
                raise UserError(
                    f"layer {layer} has {name} in the contextual form, a product of two functions of the token, which "
                    "a dense checkpoint cannot hold; export with format=hf or format=native."
                )
        if spec.form_v in ("latent", "constant_b") and spec.rank_v > student.config.head_dim:
            raise UserError(
                f"layer {layer} has latent values of rank {spec.rank_v}, wider than a head of "
                f"{student.config.head_dim}; export with format=hf or format=native."
            )


@torch.no_grad()
def dense_attention(attention: FactorizedAttention) -> dict[str, Tensor]:
    """Returns the float64 tensors of the stock attention that equals ``attention`` with nothing rounded.

    Names are a dense attention's, and ``o_proj.bias`` [D], zero where it is less than NO_BIAS of the biases that it
    is what is left of.
    """
    config, spec = attention.config, attention.spec
    attention = copy.deepcopy(attention).to("cpu", torch.float64)
    groups, width = config.num_kv_heads, config.head_dim
    repeats = config.num_heads // groups
    tokens = torch.eye(config.hidden_size, dtype=torch.float64)[None]

    def values(x: Tensor) -> Tensor:  # [1, L, G, e], less the center
        joint = attention.keys.write(x, None) if spec.form_k == "joint" else ()
        return attention.values.read(attention.values.write(x), joint)

    constant = values(tokens[:, :1] * 0)[0, 0]  # [G, e]
    v = values(tokens)[0] - constant  # [D, G, e]
    heads = torch.eye(config.num_heads * v.shape[-1], dtype=torch.float64).unflatten(-1, (config.num_heads, -1))[None]
    bias = attention.output(heads[:, :1] * 0)[0, 0]
    out = (attention.output(heads)[0] - bias).unflatten(0, (config.num_heads, -1))  # [H, e, D]
    # Attention weights sum to one, so a constant value is a constant of the output.
    left = bias + torch.einsum("hed,he->d", out, constant.repeat_interleave(repeats, 0))
    left = left if float(left.abs().max()) > NO_BIAS * float(bias.abs().max()) else torch.zeros_like(left)
    missing = width - v.shape[-1]
    queries = attention.raw_queries(tokens)[0].flatten(1).mT
    return {
        "q_proj.weight": queries,
        "k_proj.weight": _raw_keys(attention).flatten(0, 1),
        "v_proj.weight": F.pad(v, (0, missing)).flatten(1).mT,
        "o_proj.weight": F.pad(out, (0, 0, 0, missing)).flatten(0, 1).mT,
        "q_norm.weight": attention.q_norm.weight.detach(),
        "k_norm.weight": attention.keys.norm.weight.detach(),
        BIAS: left,
    }


def has_bias(tensors: Mapping[str, Tensor]) -> bool:
    return bool(tensors[BIAS].any())


def _raw_keys(attention: FactorizedAttention) -> Tensor:
    """Returns W_K [G, d, D] of the keys before norm and RoPE; the norm divides out whatever the cache holds."""
    keys, config = attention.keys, attention.config
    groups, width = config.num_kv_heads, config.head_dim
    match attention.spec.form_k:
        case "dense":
            return keys.proj.weight.unflatten(0, (groups, width))
        case "latent" | "constant_b":
            return keys.up @ keys.down.weight.unflatten(0, (groups, -1))
        case "joint":
            return keys.up @ keys.down.weight
        case "constant_a":
            return torch.einsum("rg,rdx->gdx", keys.a_bias / keys.rank, keys.b.weight.unflatten(0, (-1, width)))
        case "tucker":
            c = keys.latents(torch.eye(config.hidden_size, dtype=torch.float64)[None])
            heads = keys.mix(c) if keys.mixes_when_read else c
            return project(heads, keys.u_feat)[0].permute(1, 2, 0)
    raise NotImplementedError(attention.spec.form_k)


def dense_shapes(student: Gemma3ForMultimodalLMwithTPA, biased: bool) -> dict[str, torch.Size]:
    """Returns the shape of every stored tensor of the dense checkpoint, by its name there, in order."""
    with torch.device("meta"):
        dense = Gemma3ForMultimodalLMwithTPA(student.config)
    shapes = {n: p.shape for n, p in dense.named_parameters() if not n.startswith(VISION)}
    if biased:
        for name in [n for n in shapes if ".self_attn." in n and n.endswith("_proj.weight")]:
            shapes[name.removesuffix("weight") + "bias"] = shapes[name][:1]
        shapes = dict(sorted(shapes.items(), key=lambda item: -1 if layer_of(item[0]) is None else layer_of(item[0])))
    return {PREFIX + name: shape for name, shape in shapes.items()}


@torch.no_grad()
def _compare(student: Gemma3ForMultimodalLMwithTPA, layer: int, weights: StoredWeights, tolerance: float) -> None:
    """Raises UserError unless the stored attention of ``layer`` computes what the student's does, unrounded."""
    config = student.config
    prefix = f"{PREFIX}layers.{layer}.self_attn."
    ours = copy.deepcopy(student.layers[layer].self_attn).to("cpu", torch.float64)
    with torch.device("meta"):
        theirs = Attention(config, layer)
    for name in dict(theirs.named_parameters()):
        set_parameter(theirs, name, nn.Parameter(weights.read(prefix + name).double(), requires_grad=False))
    generator = torch.Generator().manual_seed(layer)
    x = torch.randn(1, 24, config.hidden_size, generator=generator, dtype=torch.float64)
    expected, found = _attended(config, ours, x), _attended(config, theirs, x)
    if prefix + BIAS in weights.files:
        found = found + weights.read(prefix + BIAS).double()
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if not error <= tolerance:
        raise UserError(f"the dense attention of layer {layer} is {error:.2g} off the student's; nothing was exported.")


def _attended(config: Gemma3Config, attention: Attention, x: Tensor) -> Tensor:
    """Returns the attention's output on ``x`` [1, L, D], with nothing rounded for a cache."""
    context = AttentionContext(config, torch.arange(x.shape[1])[None])
    rotary = context.rotary[attention.kind]
    keys, values = attention.read(attention.write(x, rotary), rotary)
    return attention.output(attend(attention.queries(x, rotary), keys, values, config.scale, attention.window))
