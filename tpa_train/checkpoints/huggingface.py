"""Hugging Face folders: ``config.json`` beside ``model.safetensors``, whole or sharded, text-only or multimodal.

Understands what transformers 4.50 to 5.x write: ``rope_theta``/``rope_scaling`` or ``rope_parameters``,
``sliding_window_pattern`` or ``layer_types``, and the places where text and vision weights have lived.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpa_train.checkpoints.files import read_json
from tpa_train.checkpoints.vision import read_vision, vision_name
from tpa_train.checkpoints.weights import Checkpoint, Source, Weight, naming, vocabulary_rows
from tpa_train.errors import UserError
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.tokenizer import Tokenizer

# Longest first: "model." is a prefix of "model.language_model.".
_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
_MODEL_TYPES = ("gemma3_text", "gemma3")

# Values that transformers' Gemma3TextConfig takes for keys that config.json leaves out, as the released 4B's does.
_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# Options that would change the mathematics; Gemma 3 leaves them all off.
_MUST_BE_OFF = ("attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


def open_huggingface(folder: Path) -> Checkpoint:
    """Opens a folder written by ``save_pretrained`` or downloaded from a model hub.

    Raises:
        UserError: a file is missing, damaged or of another model family, or an option is set that Gemma 3 lacks.
    """
    raw = read_json(folder / "config.json")
    text = _text_config(folder, raw)
    stored = _stored_tensors(folder)
    weights, skipped, unknown, heads = {}, [], [], []
    for stored_as, weight in stored.items():
        name, vision = text_name(stored_as), vision_name(stored_as)
        if vision is not None and not vision.startswith("vision.vision_tower.head."):
            weights[vision] = weight
        elif name is None:
            unknown.append(stored_as)
        elif name == "":
            skipped.append(stored_as)  # SigLIP's pooling, which Gemma 3 does without
        elif name == "lm_head.weight":
            heads.append(weight)
        else:
            weights[name] = weight
    embedding = weights.get("embed_tokens.weight")
    if embedding is None:
        raise UserError(f"{folder}: weight embed_tokens.weight is missing from the file.")
    for head in heads:
        _check_tied(folder, head, embedding)
    vocabulary = vocabulary_rows(embedding.shape[0])
    weights["embed_tokens.weight"] = embedding.rows(vocabulary)
    with naming(folder / "config.json"):
        config = read_config(folder / "config.json", text, vocabulary)
        if any(name.startswith("vision.") for name in weights):
            config = dataclasses.replace(config, vision=read_vision(folder, raw))
    multimodal = ", multimodal" if config.vision is not None else ""
    return Checkpoint(
        source=Source(folder, "huggingface", f"Hugging Face safetensors{multimodal}", False, tuple(skipped)),
        config=config,
        weights=weights,
        tokenizer=_tokenizer(folder),
        unknown=tuple(unknown),
    )


def text_name(stored: str) -> str | None:
    """Returns our name of a tensor, "lm_head.weight" for the head, "" in the vision part, None if it has no place."""
    if vision_name(stored) is not None:
        return ""
    head = next((head for head in _HEADS if stored.startswith(head.removesuffix("weight"))), None)
    if head is not None:
        return "lm_head." + stored.removeprefix(head.removesuffix("weight"))
    prefix = next((p for p in _PREFIXES if stored.startswith(p)), None)
    return None if prefix is None else stored.removeprefix(prefix)


def read_config(path: Path, text: dict[str, Any], vocabulary: int) -> Gemma3Config:
    """Builds the configuration from the text part of a ``config.json``.

    Args:
        path: named in error messages.
        text: the text configuration's keys and values.
        vocabulary: rows of the embedding that are kept.

    Raises:
        UserError: an option is set that Gemma 3 does not have.
        ValueError, TypeError, KeyError: a value is of the wrong type or missing (``naming`` turns these around).
    """
    for key in _MUST_BE_OFF:
        if text.get(key):
            raise UserError(f"{path}: {key} is set, which no Gemma 3 model uses; it is not supported.")
    activation = text.get("hidden_activation") or text.get("hidden_act") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise UserError(f"{path}: the activation is '{activation}', but Gemma 3's is 'gelu_pytorch_tanh'.")

    def get(key: str) -> Any:
        value = text.get(key)
        return _DEFAULTS[key] if value is None else value

    theta, local_theta, factor = _rope(path, text)
    layers = int(get("num_hidden_layers"))
    return Gemma3Config(
        vocab_size=vocabulary,
        hidden_size=int(get("hidden_size")),
        num_layers=layers,
        num_heads=int(get("num_attention_heads")),
        num_kv_heads=int(get("num_key_value_heads")),
        head_dim=int(get("head_dim")),
        intermediate_size=int(get("intermediate_size")),
        sliding_window=int(get("sliding_window")),
        query_pre_attn_scalar=float(get("query_pre_attn_scalar")),
        rope_theta=theta,
        rope_local_theta=local_theta,
        rope_scaling_factor=factor,
        rms_norm_eps=float(get("rms_norm_eps")),
        max_context=int(get("max_position_embeddings")),
        layer_kinds=_layer_kinds(path, text, layers),
    )


def huggingface_config(config: Gemma3Config, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    """Returns ``config.json``'s content, with RoPE in both spellings that transformers has used (4.50 to 5.x)."""
    factor = config.rope_scaling_factor
    scaling = {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    names = {"local": "sliding_attention", "global": "full_attention"}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "query_pre_attn_scalar": int(config.query_pre_attn_scalar),  # transformers refuses 64.0
        "sliding_window": config.sliding_window,
        "layer_types": [names[kind] for kind in config.layer_kinds],
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_theta,
        "rope_scaling": None if factor == 1.0 else scaling,
        "rope_parameters": {
            "full_attention": scaling | {"rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_local_theta},
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
        "pad_token_id": 0 if tokenizer is None else tokenizer.pad_id,
        "bos_token_id": 2 if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": 1 if tokenizer is None else tokenizer.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _text_config(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    model_type = raw.get("model_type", "unnamed")
    if model_type not in _MODEL_TYPES:
        raise UserError(f"{folder} holds a '{model_type}' model, not Gemma 3 ({' or '.join(_MODEL_TYPES)}).")
    text = raw.get("text_config", raw) if model_type == "gemma3" else raw
    if raw.get("quantization_config") or text.get("quantization_config"):
        raise UserError(f"{folder}: its weights are quantized; load the original, or a GGUF file of it.")
    return text


def _rope(path: Path, text: dict[str, Any]) -> tuple[float, float, float]:
    """Returns (global base, local base, global scaling factor) from either spelling of the configuration."""
    parameters = text.get("rope_parameters") or {}
    if "full_attention" in parameters or "sliding_attention" in parameters:
        full, sliding = parameters.get("full_attention") or {}, parameters.get("sliding_attention") or {}
    else:
        full, sliding = parameters, {}
    full = {**full, **(text.get("rope_scaling") or {})}
    theta = full.get("rope_theta", text.get("rope_theta")) or 1_000_000.0
    local_theta = sliding.get("rope_theta", text.get("rope_local_base_freq")) or 10_000.0
    kind = full.get("rope_type", full.get("type", "default"))
    if kind not in ("default", "linear") or sliding.get("rope_type", "default") != "default":
        raise UserError(f"{path}: RoPE scaling must be 'linear' on global layers and none on local ones, as Gemma 3's.")
    return float(theta), float(local_theta), float(full["factor"]) if kind == "linear" else 1.0


def _layer_kinds(path: Path, text: dict[str, Any], layers: int) -> tuple:
    names = {"sliding_attention": "local", "full_attention": "global"}
    if text.get("layer_types"):
        try:
            return tuple(names[kind] for kind in text["layer_types"])
        except KeyError as error:
            raise UserError(f"{path}: layer_types has {error}, not one of {', '.join(names)}.") from error
    period = int(text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 6)
    return tuple("global" if (i + 1) % period == 0 else "local" for i in range(layers))


def _stored_tensors(folder: Path) -> dict[str, Weight]:
    """Lists every tensor of the folder's safetensors files, by its stored name."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif index.exists():
        files = sorted({folder / Path(name).name for name in read_json(index).get("weight_map", {}).values()})
    else:
        hint = " (only a LoRA adapter: name it as model.adapter)" * (folder / "adapter_config.json").exists()
        raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json{hint}.")
    stored = {}
    for path in files:
        if not path.exists():
            raise UserError(f"{path} is missing, though {index.name} names it.")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    stored[name] = _weight(path, name, tuple(file.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged, cut short, or not a safetensors file ({error}).") from error
    return stored


def _weight(path: Path, name: str, shape: tuple[int, ...]) -> Weight:
    def read(dtype: torch.dtype | None) -> Tensor:
        # Opened anew for each tensor: the file is mapped into memory, and what a mapping has touched counts as this
        # process's memory until it is closed. The copy also frees the model from later changes of the file.
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
            if not tensor.is_floating_point():
                raise UserError(f"{path}: weight {name} is stored as {tensor.dtype}, not as floating-point numbers.")
            return tensor.clone() if dtype is None else tensor.to(dtype, copy=True)

    return Weight(shape, read, name)


def _check_tied(folder: Path, head: Weight, embedding: Weight) -> None:
    """Refuses a separate output head: Gemma 3's is the embedding, and so is ours."""
    same = head.shape == embedding.shape
    if not (same and torch.equal(head.read(torch.bfloat16), embedding.read(torch.bfloat16))):
        raise UserError(f"{folder}: {head.stored_as} differs from the embedding; an untied output head is unsupported.")


def _tokenizer(folder: Path) -> Tokenizer | None:
    """Reads ``tokenizer.model`` and the chat template; without the former, returns None."""
    path = folder / "tokenizer.model"
    return Tokenizer.from_file(path, read_chat_template(folder)) if path.exists() else None


def read_chat_template(folder: Path) -> str | None:
    """Returns the chat template of a folder that transformers wrote, or None.

    It stands in a file of its own, in the processor's ``chat_template.json`` (multimodal models), or in
    ``tokenizer_config.json``, there also as a list of named ones, of which "default" is the one to chat with.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}.") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template") if (folder / name).exists() else None
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None
