"""The folder that ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` loads, with the small cache.

    config.json, generation_config.json             with what each layer caches and the shapes of its factors
    configuration_gemma3_tpa.py, modeling_gemma3_tpa.py
                                                    from ``checkpoints.remote_code``: they need transformers only
    model.safetensors                               or several, and an index
    tokenizer.json, tokenizer.model, tokenizer_config.json, chat_template.jinja
    README.md                                       model card

Text only: of a multimodal model, the text side.
"""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpa_train.checkpoints import remote_code
from tpa_train.checkpoints.export import (
    VISION,
    check_batch,
    check_finite,
    check_free,
    compare_logits,
    new_folder,
    stored_type,
    write_card,
)
from tpa_train.checkpoints.files import write_json
from tpa_train.checkpoints.huggingface import huggingface_config
from tpa_train.checkpoints.shards import SHARD_BYTES, StoredWeights, nbytes, write_weights
from tpa_train.checkpoints.tokenizer_files import write_tokenizer
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.entries import Entry
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, layer_of
from tpa_train.tpa.generation import stop_ids

FILES = ("configuration_gemma3_tpa.py", "modeling_gemma3_tpa.py")
PARTS = ("shared", "query_form", "keys", "values", "output_form")  # of a converted attention; the rest is the stock's
MODEL_TYPE = "gemma3_tpa"
PREFIX = "model."  # of every name


def export_transformers(
    student: Gemma3ForMultimodalLMwithTPA,
    out: str | Path,
    dtype: str = "auto",
    card: str = "",
    check_ids: Tensor | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the folder of ``student`` for transformers, and compares the weights that it holds with the student's.

    Args:
        student: the converted model; a vision side is left out.
        out: folder to make; must not exist or be empty.
        dtype: "float32", "bfloat16", or "auto": float32 if any weight is held in it (transformers loads one type).
        card: text of README.md.
        check_ids: int [1, L], the text on which logits are compared.
        shard_bytes: of a file.

    Returns:
        The folder.

    Raises:
        UserError: the folder is in use, a weight is not finite, or what was written computes something else.
    """
    out = Path(out)
    stored = storage_dtype(student, dtype)
    check_free(out)
    parameters = {n: p for n, p in student.named_parameters() if not n.startswith(VISION)}
    check_finite(parameters)
    names = {name: PREFIX + stored_name(student, name) for name in parameters}
    ours = {theirs: name for name, theirs in names.items()}
    with new_folder(out) as partial:
        write_json(partial / "config.json", transformers_config(student, stored))
        write_generation(student, partial)
        for name in FILES:
            text = resources.files(remote_code).joinpath(name).read_text(encoding="utf-8")
            (partial / name).write_text(text, encoding="utf-8")
        sizes = {names[name]: nbytes(parameter, stored) for name, parameter in parameters.items()}
        write_weights(partial, sizes, lambda name: as_stored(parameters[ours[name]], stored), shard_bytes)
        write_card(partial, card)
        weights = StoredWeights.of(partial)
        compare_logits(
            student, dataclasses.replace(student.config, vision=None), student.specs,
            lambda name: weights.read(names[name]), check_batch(student, check_ids), exact=dtype != "bfloat16",
        )  # fmt: skip
    return out


def storage_dtype(student: Gemma3ForMultimodalLMwithTPA, dtype: str) -> torch.dtype:
    """Returns the one type of a folder's weights.

    Raises:
        UserError: ``dtype`` is none of "auto", "float32" and "bfloat16".
    """
    held = {parameter.dtype for parameter in student.parameters()}
    return stored_type(dtype) or (torch.bfloat16 if held == {torch.bfloat16} else torch.float32)


def as_stored(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return parameter.detach().to(device="cpu", dtype=dtype).contiguous()


def write_generation(student: Gemma3ForMultimodalLMwithTPA, folder: Path) -> None:
    """Writes the tokenizer's files and which ids end a text, where the student has a tokenizer."""
    tokenizer = student.tokenizer
    if tokenizer is not None:
        ends = sorted(stop_ids(student))
        ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
        write_json(folder / "generation_config.json", ids)
        write_tokenizer(tokenizer, folder, student.config.max_context)


def stored_name(student: Gemma3ForMultimodalLMwithTPA, name: str) -> str:
    """Returns the name of a parameter in the modelling file, where factors are tensors and not modules."""
    layer = layer_of(name)
    part = name.split(".")[3] if layer is not None and ".self_attn." in name else ""
    converted = part in PARTS and student.specs[layer].converted
    return name.removesuffix(".weight") if converted else name


def transformers_config(student: Gemma3ForMultimodalLMwithTPA, dtype: torch.dtype) -> dict[str, Any]:
    """Returns ``config.json``'s content, what the modelling file needs to build every layer among it."""
    config = student.config
    return huggingface_config(config, student.tokenizer, dtype) | {
        "architectures": ["Gemma3TPAForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_gemma3_tpa.Gemma3TPAConfig",
            "AutoModelForCausalLM": "modeling_gemma3_tpa.Gemma3TPAForCausalLM",
        },
        "tpa_rope": {
            "full_attention": [config.rope_theta, config.rope_scaling_factor],
            "sliding_attention": [config.rope_local_theta, 1.0],
        },
        "tpa_layers": [_layer_plan(student, index) for index in range(config.num_layers)],
    }


def _layer_plan(student: Gemma3ForMultimodalLMwithTPA, index: int) -> dict[str, Any] | None:
    attention, spec = student.layers[index].self_attn, student.specs[index]
    if not isinstance(attention, FactorizedAttention):
        return None
    shapes: dict[str, dict[str, list[int]]] = {}
    for name, parameter in attention.named_parameters():
        part, _, rest = name.partition(".")
        if part in PARTS:
            shapes.setdefault(part, {})[rest.removesuffix(".weight")] = list(parameter.shape)
    return {
        "forms": {"q": spec.form_q, "k": spec.form_k, "v": spec.form_v, "o": spec.form_o},
        "shapes": shapes,
        "key_entries": [_layout(entry) for entry in spec.key_entries(student.config)],
        "value_entries": [_layout(entry) for entry in spec.value_entries(student.config)],
    }


def _layout(entry: Entry) -> list[Any]:
    return [entry.rows, entry.count, [[run.start, run.start + run.count, run.bits] for run in entry.runs]]
