"""LoRA adapters in the folders that ``peft`` writes, merged into a checkpoint's weights as they are read.

    LoRA    W' = W + s·B·A                          A [r, in], B [out, r], s = α/r            arXiv:2106.09685
    rsLoRA  the same with s = α/√r                                                            arXiv:2312.03732
    DoRA    W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖      m [out]; the norm is that of each row     arXiv:2402.09353

The folder's two files are small and their format is stable, so they are read here and ``peft`` is only what the tests
compare with. Whatever an adapter asks for and is not merged exactly is refused by its name in adapter_config.json.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpa_train.checkpoints.files import read_json
from tpa_train.checkpoints.huggingface import read_chat_template, text_name
from tpa_train.checkpoints.weights import Checkpoint, Weight, vocabulary_rows
from tpa_train.errors import UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_ROOT = "base_model.model."
# Options that are read here, and those that say how the adapter was made or trained but not what it computes.
_KNOWN = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "ensure_weight_tying", "base_model_name_or_path", "modules_to_save", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "task_type", "inference_mode", "auto_mapping", "revision",
    "peft_version", "runtime_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    # Of transposed layers (GPT-2's Conv1D) only: peft itself resets it for the linear layers that Gemma consists of.
    "fan_in_fan_out",
    # Which biases were trained: Gemma 3 has none. If the file has any after all, their names are refused.
    "bias",
}  # fmt: skip
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, …) also change the base weights, unless they were converted.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_PARTS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude", ".lora_embedding_A": "A", ".lora_embedding_B": "B",
}  # fmt: skip


def merge_adapter(checkpoint: Checkpoint, folder: str | Path) -> Checkpoint:
    """Returns ``checkpoint`` with the adapter in ``folder`` merged into its weights, each when it is read.

    Weights are added in float32 (or wider) and then rounded to the dtype that is asked for. A chat template in the
    folder takes the place of the checkpoint's.

    Args:
        checkpoint: the model that the adapter was trained on, in any format.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``, written by peft for transformers'
            Gemma3ForCausalLM or Gemma3ForConditionalGeneration (of which the language model's part is merged).

    Raises:
        UserError: a file is missing or damaged, the adapter is of another kind or another model, an option is not
            supported, or it holds NaN or infinity.
    """
    folder = Path(folder).expanduser()
    config = _read_config(folder)
    lora, full, vision = _place(folder, _read_tensors(folder))
    weights = dict(checkpoint.weights)
    for module, parts in lora.items():
        name = f"{module}.weight"
        if name in (EMBEDDING, HEAD):
            raise UserError(
                f"model.adapter: {folder} adapts {module}, but Gemma 3's embedding and output head are one matrix."
            )
        if name not in weights:
            raise UserError(
                f"model.adapter: {folder} adapts {module}, which {checkpoint.source.path} does not have; is it an "
                "adapter of another model?"
            )
        weights[name] = _adapted(folder, config, module, weights[name], parts)
    _replace(folder, checkpoint, weights, full, bool(config.get("ensure_weight_tying")))
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    base = config.get("base_model_name_or_path")
    source = dataclasses.replace(
        checkpoint.source, adapter=folder, skipped=(*checkpoint.source.skipped, *vision),
        description=f"{checkpoint.source.description}, {kind} adapter {folder.name}"
        + (f" (trained on {base})" if base else "") + " merged",
    )  # fmt: skip
    tokenizer, template = checkpoint.tokenizer, read_chat_template(folder)
    if tokenizer is not None and template is not None:
        tokenizer.chat_template = template
    return dataclasses.replace(checkpoint, source=source, weights=weights, tokenizer=tokenizer)


def adapter_bytes(folder: str | Path) -> int:
    """Returns the size of an adapter's tensors, none of which is read.

    Raises:
        UserError: a file is missing, or the adapter is of another kind.
    """
    folder = Path(folder).expanduser()
    _read_config(folder)
    return _tensor_file(folder).stat().st_size


def _read_config(folder: Path) -> dict[str, Any]:
    """Returns adapter_config.json, every option of which has been checked."""
    if not folder.is_dir():
        raise UserError(f"model.adapter: there is no folder {folder}; name the one that peft's save_pretrained wrote.")
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"model.adapter: {folder} is no adapter: there is no readable {CONFIG} in it.")
    try:
        config = read_json(path)
    except UserError as error:
        raise UserError(f"model.adapter: {error}") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"model.adapter: {path} describes a '{kind}' adapter; only LORA is supported.")
    for key, value in config.items():
        if value and key not in _KNOWN:
            raise UserError(f"model.adapter: {path} sets {key}, which cannot be merged; merge it with peft yourself.")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise UserError(
            f"model.adapter: {path} has init_lora_weights={config['init_lora_weights']}, which also changes the base "
            "model's weights; save it with peft's path_initial_model_for_weight_conversion first."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"model.adapter: {path} has a {key} that is no object of names and numbers.")
    return config


def _tensor_file(folder: Path) -> Path:
    path = folder / TENSORS
    if not path.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is not read: save the adapter as safetensors" if pickled else ""
        raise UserError(f"model.adapter: {path} is missing{hint}.")
    return path


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = _tensor_file(folder)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.adapter: {path} is damaged or cut short ({error}).") from error
    if not tensors:
        raise UserError(f"model.adapter: {path} is empty.")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"model.adapter: {path}: {name} is stored as {tensor.dtype}, not as floats.")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"model.adapter: {path}: {name} holds NaN or infinite values.")
    return tensors


def _place(
    folder: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """Sorts the tensors: low-rank parts by our module, whole weights by our name, and those of the vision tower."""
    lora: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    vision: list[str] = []
    for stored, tensor in tensors.items():
        name = text_name(stored.removeprefix(_ROOT).replace(".base_layer.", "."))
        if name == "":
            vision.append(stored)
            continue
        suffix = next((s for s in _PARTS if name is not None and name.endswith(s)), None)
        if name is not None and suffix is not None:
            lora.setdefault(name.removesuffix(suffix), {})[_PARTS[suffix]] = tensor
        elif name is not None and name.endswith(".weight") and ".lora_" not in name:
            full[name] = tensor
        else:
            raise UserError(f"model.adapter: {folder} holds {stored}, which has no place in a Gemma 3 text model.")
    if not lora and not full:
        raise UserError(f"model.adapter: {folder} adapts the vision tower only, which the text model leaves out.")
    return lora, full, vision


def _adapted(
    folder: Path, config: Mapping[str, Any], module: str, base: Weight, parts: Mapping[str, Tensor]
) -> Weight:
    """Returns ``base`` [out, in] with the low-rank parts of ``module`` merged when it is read."""
    wanted = {"A", "B"} | ({"magnitude"} if config.get("use_dora") else set())
    if set(parts) != wanted:
        odd = sorted(set(parts) ^ wanted)[0]
        what = "lora_magnitude_vector" if odd == "magnitude" else f"lora_{odd}"
        fault = "is missing" if odd in wanted else f"is there, though {CONFIG} does not ask for it"
        raise UserError(f"model.adapter: {folder}: {what} of {module} {fault}.")
    down, up, magnitude = parts["A"], parts["B"], parts.get("magnitude")
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, (int, float))):
        raise UserError(f"model.adapter: {folder}: {module} has rank {rank!r} and alpha {alpha!r} in {CONFIG}.")
    if len(base.shape) != 2:
        raise UserError(f"model.adapter: {folder} adapts {module}, which is no matrix.")
    rows, columns = base.shape
    for what, tensor, shape in (("A", down, (rank, columns)), ("B", up, (rows, rank))):
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"model.adapter: {folder}: lora_{what} of {module} has shape {list(tensor.shape)}, but a weight of "
                f"{list(base.shape)} at rank {rank} wants {list(shape)}; is it an adapter of another model?"
            )
    if magnitude is not None and magnitude.numel() != rows:
        raise UserError(f"model.adapter: {folder}: lora_magnitude_vector of {module} has not {rows} entries.")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def read(dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        merged = base.read(wide).addmm_(up.to(wide), down.to(wide), alpha=scaling)
        if magnitude is not None:
            merged *= (magnitude.to(wide).flatten() / merged.norm(dim=1))[:, None]
        return merged.to(dtype)

    return Weight(base.shape, read, f"{base.stored_as} with the adapter's part")


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that the module's name ends in, as peft has it (utils.get_pattern_key)."""
    names = [f"{prefix}{module}" for prefix in ("model.", "model.language_model.", "language_model.model.")]
    for pattern, value in (patterns or {}).items():
        try:
            found = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        except re.error as error:
            raise UserError(f"model.adapter: '{pattern}' in {CONFIG} is not a regular expression ({error}).") from error
        if found:
            return value
    return default


def _replace(
    folder: Path, checkpoint: Checkpoint, weights: dict[str, Weight], full: Mapping[str, Tensor], tied: bool
) -> None:
    """Puts weights that were trained whole (modules_to_save) in place of the checkpoint's."""
    matrices = [full[name] for name in (EMBEDDING, HEAD) if name in full]
    if len(matrices) == 1 and not tied:  # the other one is still the checkpoint's
        matrices.append(weights[EMBEDDING].read(matrices[0].dtype))
    matrices = [matrix[: vocabulary_rows(matrix.shape[0])] for matrix in matrices]
    if any(a.shape == matrices[0].shape and not torch.equal(a, matrices[0]) for a in matrices[1:]):
        raise UserError(
            f"model.adapter: {folder} makes the embedding and the output head differ, but Gemma 3's are one matrix."
        )
    for name, tensor in full.items():
        if name == HEAD:
            name = EMBEDDING
        if name not in weights:
            raise UserError(f"model.adapter: {folder} holds {name}, which {checkpoint.source.path} does not have.")
        if name == EMBEDDING:
            tensor = tensor[: vocabulary_rows(tensor.shape[0])]
        base = weights[name]
        if tuple(tensor.shape) != base.shape:
            raise UserError(
                f"model.adapter: {folder}: {name} has shape {list(tensor.shape)}, the model's is {list(base.shape)}; "
                "is it an adapter of another model?"
            )
        weights[name] = Weight(base.shape, _reader(tensor), f"{name} of {folder}")


def _reader(tensor: Tensor) -> Any:
    return lambda dtype: tensor.to(dtype, copy=True)
