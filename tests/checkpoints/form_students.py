"""A small random student that meets every form and width, for the exports."""

from __future__ import annotations

import torch
from small_models import TINY

from tpa_train.gemma3.config import Gemma3Config
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec

# One item a layer of TINY: local layers 0 to 4 and 6, global 5.
LINEAR = [
    LayerSpec("latent", 12, "latent", 20, bits_k=8, bits_v=(4,)),
    LayerSpec("joint", 70, "joint", 70, bits_k=(8, 4, 2)),
    LayerSpec("constant_a", 1, "constant_a", 1, bits_k=6),
    LayerSpec("constant_b", 9, "constant_b", 16, bits_k=3, bits_v=16),
    LayerSpec("tucker", 16, "tucker", 16, 4, form_q="tucker", rank_q=16, form_o="tucker", heads_k=1, heads_v=1,
              hidden=40, shared_features=True),
    LayerSpec("joint", 40, "joint", 40, bits_k=(16, 8), cached_norm=True),
    LayerSpec("dense", 32, "dense", 32, 8),
]  # fmt: skip
OTHERS = [
    LayerSpec("contextual", 2, "contextual", 1, bits_k=8, form_q="contextual", rank_q=3),
    LayerSpec("tucker", 16, "dense", 32, form_o="tucker", rank_o=20, heads_k=2),
    LayerSpec("tucker", 16, "tucker", 12, 4),
    LayerSpec(rank_k=32, rank_v=32),
    LayerSpec("latent", 8, "contextual", 2, bits_v=4),
    LayerSpec("contextual", 1, "latent", 16, bits_k=4),
    LayerSpec("constant_a", 2, "tucker", 10, heads_v=1),
]


def random_student(
    specs: list[LayerSpec], config: Gemma3Config = TINY, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Gemma3ForMultimodalLMwithTPA:
    """Every parameter random, centers, biases and norms among them."""
    generator = torch.Generator().manual_seed(seed)
    student = Gemma3ForMultimodalLMwithTPA(config, specs)
    with torch.no_grad():
        for name, p in student.named_parameters():
            small = name.endswith(("norm.weight", "center", "bias")) and p.dim() < 3
            scale = 0.3 if small else p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return student.to(dtype).eval()
