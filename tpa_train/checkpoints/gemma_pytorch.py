"""Google's ``gemma_pytorch`` checkpoints: one ``.ckpt`` with ``model_state_dict``, projections fused into qkv_proj.

Names and layout: github.com/google/gemma_pytorch, gemma/model.py and gemma/gemma3_model.py. The text-only 1B calls its
embedding ``embedder``, the multimodal sizes ``text_token_embedder``. The file carries no configuration, so it is found
by shape among the published sizes.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tpa_train.checkpoints.vision import PROJECTION, gemma_pytorch_name, infer_vision
from tpa_train.checkpoints.weights import Checkpoint, Source, Weight, vocabulary_rows
from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES, Gemma3Config
from tpa_train.gemma3.tokenizer import Tokenizer

_EMBEDDINGS = ("text_token_embedder.weight", "embedder.weight")
_RENAMED = {"self_attn.query_norm": "self_attn.q_norm", "self_attn.key_norm": "self_attn.k_norm"}
_FUSED = "self_attn.qkv_proj"
# RoPE tables and position numbers, computed anew
_BUFFERS = ("local_freqs_cis", "global_freqs_cis", "freqs_cis", "siglip_vision_model.position_ids")
_SCALER = ".weight_scaler"  # int8 files: one scale per output row


def open_gemma_pytorch(path: Path) -> Checkpoint:
    """Opens a ``.ckpt`` file; ``tokenizer.model`` is taken from beside it if it is there.

    Raises:
        UserError: the file is damaged, holds code or something else than Gemma 3 weights, or has the shapes of no
            published size.
    """
    state = _load(path)
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    stored = {name: t for name, t in tensors.items() if not name.endswith(_SCALER) and name not in _BUFFERS}
    embedding_name = next((name for name in _EMBEDDINGS if name in stored), None)
    if embedding_name is None:
        raise UserError(f"{path} has neither of {' and '.join(_EMBEDDINGS)}: it is not a gemma_pytorch checkpoint.")
    config = infer_config(path, stored, embedding_name)
    if any(gemma_pytorch_name(name) for name in stored):
        config = dataclasses.replace(config, vision=infer_vision(path, stored))

    weights, unknown, quantized = {}, [], False
    for name, tensor in stored.items():
        scale = tensors.get(name.removesuffix(".weight") + _SCALER)
        if not tensor.is_floating_point() and scale is None:
            raise UserError(f"{path}: weight {name} is stored as {tensor.dtype} without a weight_scaler.")
        quantized |= scale is not None
        placed = _place(name, tensor, scale, config, embedding_name)
        weights.update(placed)
        if not placed:
            unknown.append(name)
    detail = "int8 (dequantized)" if quantized else str(stored[embedding_name].dtype).removeprefix("torch.")
    tokenizer = path.parent / "tokenizer.model"
    return Checkpoint(
        source=Source(path, "gemma_pytorch", f"gemma_pytorch checkpoint, {detail}", quantized),
        config=config,
        weights=weights,
        tokenizer=Tokenizer.from_file(tokenizer) if tokenizer.exists() else None,
        unknown=tuple(unknown),
    )


def infer_config(path: Path, stored: Mapping[str, Tensor], embedding_name: str) -> Gemma3Config:
    """Returns the published size whose shapes these are: layers, D, H, G, d and the feed-forward width.

    H and G follow from o_proj [D, H·d] and qkv_proj [(H + 2G)·d, D], d from query_norm [d].

    Raises:
        UserError: a weight of the first layer is missing, or no size matches.
    """
    vocabulary, hidden = stored[embedding_name].shape
    layers = 1 + max((int(m[1]) for name in stored if (m := re.match(r"model\.layers\.(\d+)\.", name))), default=-1)
    try:
        head_dim = stored["model.layers.0.self_attn.query_norm.weight"].shape[0]
        heads = stored["model.layers.0.self_attn.o_proj.weight"].shape[1] // head_dim
        groups = (stored["model.layers.0.self_attn.qkv_proj.weight"].shape[0] // head_dim - heads) // 2
        feed_forward = stored["model.layers.0.mlp.gate_proj.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"{path}: weight {error.args[0]} is missing from the file.") from error
    found = (layers, hidden, heads, groups, head_dim, feed_forward)
    for size in SIZES.values():
        if found == (
            size.num_layers, size.hidden_size, size.num_heads, size.num_kv_heads, size.head_dim, size.intermediate_size
        ):  # fmt: skip
            return dataclasses.replace(size, vocab_size=vocabulary_rows(vocabulary))
    raise UserError(
        f"{path} matches no published Gemma 3 size: {layers} layers, hidden size {hidden}, {heads} query and {groups} "
        f"key/value heads of {head_dim}, feed-forward {feed_forward}."
    )


def _load(path: Path) -> Mapping[str, Tensor]:
    try:
        # weights_only: nothing in the file gets to run. mmap: tensors stay on disk until each is copied.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it holds more than tensors, and that could run code.") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged, cut short, or not a PyTorch checkpoint.") from error
    state = content.get("model_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"{path} has no 'model_state_dict': it is not a gemma_pytorch checkpoint.")
    return state


def _place(
    name: str, tensor: Tensor, scale: Tensor | None, config: Gemma3Config, embedding_name: str
) -> dict[str, Weight]:
    """Returns our name(s) for one stored tensor: three for the fused projection, none if it has no place."""
    if name == embedding_name:
        return {"embed_tokens.weight": _weight(name, tensor, scale).rows(config.vocab_size)}
    vision = gemma_pytorch_name(name)
    if vision is not None:
        weight = _weight(name, tensor, scale)
        return {vision: weight.transposed() if vision == PROJECTION else weight}
    if not name.startswith("model.") or not name.endswith(".weight"):
        return {}
    part = name.removeprefix("model.").removesuffix(".weight")
    if not part.endswith(_FUSED):
        for theirs, ours in _RENAMED.items():
            part = part.replace(theirs, ours)
        return {f"{part}.weight": _weight(name, tensor, scale)}
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if tensor.shape[0] != query + 2 * key:  # the shape check of the parts will say so, by this weight's name
        return {part.replace("qkv_proj", "q_proj") + ".weight": _weight(name, tensor, scale)} | {
            part.replace("qkv_proj", p) + ".weight": _weight(name, tensor[:0], None) for p in ("k_proj", "v_proj")
        }
    placed, start = {}, 0
    for projection, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        stop = start + rows
        rows_scale = None if scale is None else scale[start:stop]
        placed[f"{part.replace('qkv_proj', projection)}.weight"] = _weight(name, tensor[start:stop], rows_scale)
        start = stop
    return placed


def _weight(name: str, tensor: Tensor, scale: Tensor | None) -> Weight:
    def read(dtype: torch.dtype | None) -> Tensor:
        if scale is None:
            return tensor.clone() if dtype is None else tensor.to(dtype, copy=True)
        return (tensor.to(torch.float32) * scale.to(torch.float32)[:, None]).to(dtype or torch.float32)

    return Weight(tuple(tensor.shape), read, name)
