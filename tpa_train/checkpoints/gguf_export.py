"""A stock Gemma 3 in one GGUF file (llama.cpp), the student's factors multiplied out as in ``dense_export``.

llama.cpp's Gemma 3 has no bias in the output projection, but reads one of the values (``attn_v.bias``). Attention
weights sum to one, so a constant value is a constant of the output: exactly where the output projection reaches the
constant that the student's layer adds, or where values leave a direction of a head free. Where neither holds, the
least direction of a head's values gives way, and the written file must still be as good as the student.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, RopeScalingType
from gguf.constants import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from tpa_train.checkpoints import open_checkpoint
from tpa_train.checkpoints.dense_export import BIAS, check_linear, dense_attention, dense_shapes
from tpa_train.checkpoints.export import VISION, check_batch, check_finite, compare_logits
from tpa_train.checkpoints.gguf import ARCHITECTURE, VALUE_BIAS, score_scalar, stored_name
from tpa_train.checkpoints.tokenizer_files import read_pieces
from tpa_train.checkpoints.transformers_export import PREFIX, storage_dtype
from tpa_train.checkpoints.weights import Checkpoint
from tpa_train.errors import UserError
from tpa_train.evaluation.atomic import replacing
from tpa_train.gemma3.config import Gemma3Config, layer_pattern
from tpa_train.gemma3.tokenizer import CONTROL, CONTROL_NAMES, TURN_NAMES, UNUSED, USER_DEFINED, Tokenizer
from tpa_train.tpa.constants import constant_of_values
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, layer_of
from tpa_train.tpa.spec import dense_specs

TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
MET = 1e-4  # of a constant or a direction: less of it is missing from nothing that can be measured
FAINT = 1e-6  # of the output projection: the same of a constant. 3e-5 of a bias that the 270M had changed its logits by
# 0.003, since the norm after attention enlarges some numbers
DESCRIPTION = (
    "Converted to Tensor Product Attention and multiplied out again: the converted model's quality but for the "
    "rounding of its cached numbers, and a cache as large as the original's."
)
TERMS = "https://ai.google.dev/gemma/terms"
# What the converter of llama.cpp types as control, besides what SentencePiece does.
_LOOKS_SPECIAL = re.compile("|".join(map(re.escape, (*CONTROL_NAMES, *TURN_NAMES))) + r"|<unused\d+>")


def export_gguf(
    student: Gemma3ForMultimodalLMwithTPA, out: str | Path, dtype: str = "auto", check_ids: Tensor | None = None
) -> Path:
    """Writes ``student`` as a GGUF file of the architecture ``gemma3``, reads it back and compares the logits.

    Args:
        student: the converted model; a vision side is left out.
        out: file to make, named .gguf; must not exist.
        dtype: of the matrices: "float32", "float16", "bfloat16", or "auto": float32 if any weight is held in it.
            Norms and biases are float32, as llama.cpp has them.
        check_ids: int [1, L], the text on which logits are compared.

    Returns:
        The file.

    Raises:
        UserError: a form is not linear in the token or too wide for a head, the file exists or is not named .gguf, a
            weight is not finite, or what was written computes something else.
    """
    out = Path(out)
    stored = torch.float16 if dtype == "float16" else storage_dtype(student, dtype)
    check_free_file(out)
    check_linear(student)
    parameters = {n: p.detach() for n, p in student.named_parameters() if not n.startswith(VISION)}
    check_finite(parameters)
    config = dataclasses.replace(student.config, vision=None)
    # llama.cpp derives the scale of the scores from the sizes; another one goes into the norm of the queries.
    scores = (score_scalar(config.hidden_size, config.num_heads, config.num_layers, config.head_dim)
              / config.query_pre_attn_scalar) ** 0.5  # fmt: skip

    @lru_cache(maxsize=1)  # tensors are read in the order of the layers
    def attention(layer: int) -> dict[str, Tensor]:
        reach = float((1.0 + parameters[f"layers.{layer}.input_layernorm.weight"].double()).square().mean().sqrt())
        tensors, exact = with_value_bias(dense_attention(student.layers[layer].self_attn), config, reach)
        inexact.update([] if exact else [layer])
        return tensors

    inexact: set[int] = set()
    biased = [layer for layer in student.converted_layers if VALUE_BIAS in attention(layer)]

    def read(name: str) -> Tensor:
        prefix, _, part = name.partition(".self_attn.")
        converted = part and layer_of(name) in student.converted_layers
        tensor = attention(layer_of(name))[part] if converted else parameters[name]
        if not name.endswith("norm.weight"):
            return tensor
        return (1.0 + tensor.double()) * (scores if name.endswith("q_norm.weight") else 1.0)

    shapes = {name.removeprefix(PREFIX): shape for name, shape in dense_shapes(student, False).items()}
    for layer in biased:
        shapes[f"layers.{layer}.self_attn.{VALUE_BIAS}"] = torch.Size([config.num_kv_heads * config.head_dim])
    with replacing(out, out.suffix) as partial:
        writer = GGUFWriter(partial, ARCHITECTURE)
        _add_description(writer, out.stem, stored)
        _add_architecture(writer, config)
        if student.tokenizer is not None:
            _add_tokenizer(writer, student.tokenizer, config.vocab_size)
        _write_tensors(writer, shapes, read, stored)
        exact = stored == torch.float32 and not inexact
        try:
            compare_file(student, open_checkpoint(partial), exact, check_ids)
        except UserError as error:
            if not inexact:
                raise
            raise UserError(
                f"attention in layers {sorted(inexact)} adds constants that a GGUF file of Gemma 3 cannot hold, and "
                "the nearest it can hold is too far from the student; export with format=dense, hf or native."
            ) from error
    return out


def with_value_bias(
    tensors: Mapping[str, Tensor], config: Gemma3Config, reach: float = 1.0
) -> tuple[dict[str, Tensor], bool]:
    """Returns a dense attention whose output constant, if any, is a bias of its values, and whether that is exact.

    Args:
        tensors: as ``dense_export.dense_attention`` returns them.
        config: the architecture: G KV heads of d, H query heads, hidden size D.
        reach: rms of the attention's inputs.

    Returns:
        The tensors without ``o_proj.bias``, and ``v_proj.bias`` [G·d] where there is a constant; False where the
        constant is not quite met, or the least direction of the values had to make room for it.
    """
    tensors = dict(tensors)
    constant = tensors.pop(BIAS)
    if not constant.any():
        return tensors, True
    groups, width = config.num_kv_heads, config.head_dim
    bias, summed = constant_of_values(tensors["o_proj.weight"], constant, groups, width)
    missed = float((constant - summed @ bias).norm())
    if missed <= max(MET * float(constant.norm()), FAINT * float(summed.norm())):
        return tensors | {VALUE_BIAS: bias}, True

    # A head's values V [d, D] and what its query heads make of them, O [(H/G)·D, d], in the coordinates of the SVD of
    # O V: the last one is free, or carries least.
    out = tensors["o_proj.weight"].unflatten(1, (groups, -1, width))  # [D, G, H/G, d]
    values = tensors["v_proj.weight"].unflatten(0, (groups, width))
    turned = []
    for g in range(groups):
        q_out, r_out = torch.linalg.qr(out[:, g].flatten(0, 1))
        q_in, r_in = torch.linalg.qr(values[g].mT)
        u, s, vh = torch.linalg.svd(r_out @ r_in.mT)
        turned.append((q_out @ u, s, vh @ q_in.mT))
    least = min(range(groups), key=lambda g: float(turned[g][1][-1]))
    left, s, right = turned[least]
    if float(s[-1]) * reach >= missed:  # giving up that direction would cost more than what the bias misses
        return tensors | {VALUE_BIAS: bias}, False
    kept = s.sqrt() * (torch.arange(width) < width - 1)
    size = float(s.mean().sqrt())  # a column like the others, for whoever quantizes the file
    heads = (left * kept).unflatten(0, (config.hidden_size, -1))  # [D, H/G, d]
    heads[:, 0, -1] = constant / size
    out, values, bias = out.clone(), values.clone(), torch.zeros_like(bias)
    out[:, least], values[least], bias[least * width + width - 1] = heads, kept[:, None] * right, size
    tensors |= {"o_proj.weight": out.flatten(1), "v_proj.weight": values.flatten(0, 1), VALUE_BIAS: bias}
    return tensors, float(s[-1]) <= MET * float(s[0])


def compare_file(
    student: Gemma3ForMultimodalLMwithTPA, written: Checkpoint, exact: bool, check_ids: Tensor | None = None
) -> None:
    """Compares the file with what ``student`` computes where nothing is rounded for a cache.

    Raises:
        UserError: see ``export.verify_export``.
    """
    specs = [dataclasses.replace(spec, bits_k=16, bits_v=16) if spec.converted else spec for spec in student.specs]
    compare_logits(
        student, written.config, written.specs or dense_specs(written.config),
        lambda name: written.weights[name].read(torch.float32), check_batch(student, check_ids), exact, specs,
    )  # fmt: skip


def check_free_file(out: Path) -> None:
    """Raises UserError unless ``out`` is the name of a new .gguf file."""
    if out.suffix.lower() != ".gguf":
        raise UserError(f"out={out}: format=gguf writes one file; give it a name that ends in .gguf.")
    if out.exists():
        raise UserError(f"out={out} already exists; choose another name.")


def _add_description(writer: GGUFWriter, name: str, dtype: torch.dtype) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(DESCRIPTION)
    writer.add_license("gemma")
    writer.add_license_link(TERMS)
    writer.add_tags(["gemma3", "gemma", "text-generation"])
    writer.add_file_type(TYPES[dtype][1])


def _add_architecture(writer: GGUFWriter, config: Gemma3Config) -> None:
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    if config.layer_kinds != layer_pattern(config.num_layers):  # which is what a file without it means
        writer.add_sliding_window_pattern([kind == "local" for kind in config.layer_kinds])
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_freq_base_swa(config.rope_local_theta)
    if config.rope_scaling_factor != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling_factor)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, rows: int) -> None:
    """Writes the vocabulary as llama.cpp's converter does: what looks special is control, user-defined pieces have
    spaces for '▁', and rows of the embedding without a piece are unused ones."""
    entries = list(read_pieces(tokenizer.model_proto))
    entries += [(f"[PAD{index}]", -1000.0, UNUSED) for index in range(len(entries), rows)]
    pieces, scores, kinds = [], [], []
    for piece, score, kind in entries:
        if _LOOKS_SPECIAL.fullmatch(piece):
            kind = CONTROL
        pieces.append(piece.replace("▁", " ") if kind == USER_DEFINED else piece)
        scores.append(score)
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
        if tokenizer.end_of_turn_id is not None:
            writer.add_eot_token_id(tokenizer.end_of_turn_id)


def _write_tensors(
    writer: GGUFWriter, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    """Writes header, metadata and tensors, one tensor in memory at a time."""
    kinds = {name: dtype if len(shape) > 1 else torch.float32 for name, shape in shapes.items()}
    for name, shape in shapes.items():
        size = kinds[name].itemsize
        as_bytes = (*shape[:-1], shape[-1] * size)
        writer.add_tensor_info(
            stored_name(name), as_bytes, np.dtype(np.uint8), shape.numel() * size, TYPES[kinds[name]][0]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in shapes:
        tensor: Any = read(name).to(device="cpu", dtype=kinds[name]).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"'{name}' is too large for float16; export with dtype=bfloat16.")
        writer.write_tensor_data(tensor.view(torch.uint8).numpy())
    writer.close()
