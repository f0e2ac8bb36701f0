"""A small multimodal Gemma 3 in a folder that transformers wrote, and pictures to show it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.gemma3.tokenizer import USER_DEFINED, Tokenizer, sentencepiece_model
from tpa_train.gemma3.vision_config import VisionConfig

sys.path.append(str(Path(__file__).parent / "checkpoints"))
from small_models import SPECIAL_IDS, vocabulary  # noqa: E402

SIZE, T = 56, 4  # pixels and soft tokens of an image: 4 × 4 patches, pooled by 2
IMAGE_ID, START_ID, END_ID = 390, 388, 389


def transformers_model(
    seed: int = 0, tokens: int = T, dtype: torch.dtype = torch.float32, image_id: int = IMAGE_ID, **changes
):
    """Random weights; real layer pattern, 4 KV heads, window 8, a vision tower of 2 layers."""
    import transformers

    text = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "head_dim": 32,
        "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 20, "sliding_window": 8,
        "max_position_embeddings": 512, "pad_token_id": 0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **changes,
    }  # fmt: skip
    vision = {
        "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIZE, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=tokens, image_token_index=image_id,
        boi_token_index=START_ID, eoi_token_index=END_ID,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.to(dtype).eval()


def image_tokenizer() -> Tokenizer:
    """The small vocabulary with Gemma's pieces around images."""
    pieces, scores, types = vocabulary()
    while len(pieces) < START_ID:
        pieces, scores, types = [*pieces, f"<unused{len(pieces)}>"], [*scores, -1000.0], [*types, USER_DEFINED]
    pieces += ["<start_of_image>", "<end_of_image>"]
    return Tokenizer.from_model_proto(
        sentencepiece_model(pieces, [*scores, -1000.0, -1000.0], [*types, USER_DEFINED, USER_DEFINED], SPECIAL_IDS)
    )


def write_multimodal(folder: Path, **options) -> Path:
    """Writes ``transformers_model`` with tokenizer and preprocessing."""
    model = transformers_model(**options)
    model.save_pretrained(folder)
    image_processor(SIZE).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(image_tokenizer().model_proto)
    return folder


def image_processor(size: int, **options):
    """transformers' Gemma 3 image processor that works on Pillow images."""
    try:
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil as Processor
    except ImportError:  # transformers 4
        from transformers import Gemma3ImageProcessor as Processor
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": size, "width": size}}
    return Processor(**values, **options)


def picture(seed: int = 0, width: int = 70, height: int = 45, mode: str = "RGB") -> Image.Image:
    """Noise over a slope: resizing it wrongly shows."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 160, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    values = slope + rng.integers(0, 36, (height, width, 4))
    values[..., 3] = rng.integers(0, 256, (height, width))
    return Image.fromarray(values.astype(np.uint8), "RGBA").convert(mode)


VISION = VisionConfig(
    image_size=SIZE, patch_size=14, hidden_size=24, intermediate_size=20, num_layers=2, num_heads=4,
    tokens_per_image=T, image_token_id=90, start_token_id=91, end_token_id=92,
)  # fmt: skip


def random_multimodal(config: Gemma3Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> Gemma3ForCausalLM:
    """Random weights of a config with a vision side."""
    model = Gemma3ForCausalLM(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if p.ndim == 1 or name.endswith("norm.weight") else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale)
    return model.eval()
