"""The vision side of checkpoints: names, sizes and preprocessing, of Hugging Face folders and gemma_pytorch files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tpa_train.checkpoints.files import read_json
from tpa_train.errors import UserError
from tpa_train.gemma3.vision_config import VisionConfig

# transformers has written the tower with and without "vision_model.", and everything with and without "model."
_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.*)")
_PROJECTOR = re.compile(r"(?:model\.)?(multi_modal_projector\..*)")
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
# config.json's keys and ours; what a folder leaves out takes SiglipVisionConfig's defaults, not So400m's
_SIZES = {
    "image_size": ("image_size", 224), "patch_size": ("patch_size", 16), "hidden_size": ("hidden_size", 768),
    "intermediate_size": ("intermediate_size", 3072), "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 12),
}  # fmt: skip
_IDS = {
    "mm_tokens_per_image": ("tokens_per_image", 256), "image_token_index": ("image_token_id", 262_144),
    "boi_token_index": ("start_token_id", 255_999), "eoi_token_index": ("end_token_id", 256_000),
}  # fmt: skip
# gemma_pytorch's names (gemma/siglip_vision/siglip_vision_model.py, gemma/gemma3_model.py) and ours, in this order
_GEMMA_PYTORCH = (
    (r"siglip_vision_model\.(patch_embedding|position_embedding)\.", r"vision.vision_tower.embeddings.\1."),
    (r"siglip_vision_model\.encoder_blocks\.(\d+)\.self_attn\.o_proj\.",
     r"vision.vision_tower.encoder.layers.\1.self_attn.out_proj."),
    (r"siglip_vision_model\.encoder_blocks\.", "vision.vision_tower.encoder.layers."),
    (r"siglip_vision_model\.final_norm\.", "vision.vision_tower.post_layernorm."),
    (r"mm_soft_embedding_norm\.", "vision.multi_modal_projector.mm_soft_emb_norm."),
    (r"mm_input_projection\.weight$", "vision.multi_modal_projector.mm_input_projection_weight"),
)  # fmt: skip
PROJECTION = "vision.multi_modal_projector.mm_input_projection_weight"
HEAD_DIM = 72  # of SigLIP So400m, where a file has shapes only


def vision_name(name: str) -> str | None:
    """Returns our name of a Hugging Face weight, or None if it is not the vision side's."""
    if match := _TOWER.fullmatch(name):
        return f"vision.vision_tower.{match[1]}"
    match = _PROJECTOR.fullmatch(name)
    return f"vision.{match[1]}" if match else None


def read_vision(folder: Path, raw: Mapping[str, Any]) -> VisionConfig:
    """Returns the vision side's sizes, token ids and preprocessing of a Hugging Face folder.

    Args:
        folder: holds ``preprocessor_config.json`` (or ``processor_config.json``); without, Gemma 3's own values are
            taken.
        raw: the content of its ``config.json``.

    Raises:
        UserError: the activation or the preprocessing is one that Gemma 3 does not have.
    """
    vision = raw.get("vision_config") or {}
    activation = vision.get("hidden_act") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise UserError(f"{folder / 'config.json'}: the vision activation is '{activation}', not 'gelu_pytorch_tanh'.")
    values = {ours: int(vision.get(key) or default) for key, (ours, default) in _SIZES.items()}
    values |= {ours: int(raw.get(key) or default) for key, (ours, default) in _IDS.items()}
    eps = vision.get("layer_norm_eps")
    return VisionConfig(**values, **_preprocessing(folder, values), layer_norm_eps=1e-6 if eps is None else float(eps))


def _preprocessing(folder: Path, values: Mapping[str, int]) -> dict[str, Any]:
    path = next((folder / name for name in _PREPROCESSORS if (folder / name).exists()), None)
    if path is None:
        return {}
    settings = read_json(path)
    settings = settings.get("image_processor") or settings  # a processor's file has the image's part inside
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if settings.get(key) is False:
            raise UserError(f"{path}: {key} is off, which no Gemma 3 does; it is not supported.")
    size = settings.get("size") or {}
    sides = {size.get("height", values["image_size"]), size.get("width", values["image_size"])}
    if sides != {values["image_size"]}:
        raise UserError(f"{path}: size={size} is not the {values['image_size']} pixels of the vision tower.")
    found = {key: settings.get(key) for key in ("image_mean", "image_std", "rescale_factor", "resample")}
    return {key: value for key, value in found.items() if value is not None}


def gemma_pytorch_name(name: str) -> str | None:
    """Returns our name of a gemma_pytorch weight, or None if it is not the vision side's."""
    for theirs, ours in _GEMMA_PYTORCH:
        if re.match(theirs, name):
            return re.sub(theirs, ours, name, count=1)
    return None


def infer_vision(path: Path, stored: Mapping[str, Tensor]) -> VisionConfig:
    """Returns the sizes whose shapes a gemma_pytorch file's vision weights have.

    Raises:
        UserError: a weight is missing.
    """
    prefix = "siglip_vision_model."
    blocks = [int(m[1]) for name in stored if (m := re.match(rf"{prefix}encoder_blocks\.(\d+)\.", name))]
    try:
        width, _, patch, _ = stored[f"{prefix}patch_embedding.weight"].shape
        positions = stored[f"{prefix}position_embedding.weight"].shape[0]
        feed_forward = stored[f"{prefix}encoder_blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"{path}: weight {error.args[0]} is missing from the file.") from error
    side = round(positions**0.5)
    return VisionConfig(
        image_size=side * patch, patch_size=patch, hidden_size=width, intermediate_size=feed_forward,
        num_layers=1 + max(blocks), num_heads=max(1, width // HEAD_DIM), tokens_per_image=(side // 4) ** 2,
    )  # fmt: skip
