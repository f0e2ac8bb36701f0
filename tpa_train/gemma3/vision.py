"""Gemma 3's vision side: a SigLIP tower, pooled to the soft tokens that take the image tokens' places in the text.

Sizes: Gemma 3 technical report (arXiv:2503.19786), §2.1: SigLIP So400m at 896 × 896, the same for 4B, 12B and 27B.
State names are Hugging Face's. The weights keep the type they are stored in and are cast as they are used, so that a
folder exported in another precision still holds the original's bytes; they are never trained.

Shapes: N images · S image size · P patch size · p² = (S/P)² patches · E vision width · T soft tokens of an image · D
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_train.errors import UserError
from tpa_train.gemma3.layers import RMSNorm
from tpa_train.gemma3.vision_config import VisionConfig

IMAGES_PER_PASS = 8  # of the tower: bounds its activations (4096 patches an image)


class Linear(nn.Linear):
    """Linear layer with bias in the input's type, whatever type its weight is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Layer norm in the input's type, whatever type its weight is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Embeddings(nn.Module):
    """Patches and their positions: [N, 3, S, S] -> [N, p², E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, patch, stride=patch)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        conv, dtype = self.patch_embedding, pixels.dtype
        x = F.conv2d(pixels, conv.weight.to(dtype), conv.bias.to(dtype), stride=conv.stride)
        return x.flatten(2).transpose(1, 2) + self.position_embedding.weight.to(dtype)


class SelfAttention(nn.Module):
    """Attention of all patches on all patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.register_module(name, Linear(config.hidden_size, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipTower(nn.Module):
    """SigLIP without its pooling head (arXiv:2303.15343): [N, 3, S, S] -> [N, p², E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class Projector(nn.Module):
    """Average pooling to √T × √T, RMSNorm, projection: [N, p², E] -> [N, T, D]."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.patches = config.image_size // config.patch_size
        self.pool = self.patches // int(config.tokens_per_image**0.5)
        self.mm_soft_emb_norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        # [E, D], as Hugging Face stores it: transposed against a linear layer's.
        self.mm_input_projection_weight = nn.Parameter(torch.zeros(config.hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).unflatten(2, (self.patches, self.patches))
        pooled = F.avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)
        normed = self.mm_soft_emb_norm(pooled).to(x.dtype)
        return normed @ self.mm_input_projection_weight.to(x.dtype)


class VisionModel(nn.Module):
    """``vision(pixels [N, 3, S, S], dtype) -> soft tokens [N, T, D]``; frozen."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = SiglipTower(config)
        self.multi_modal_projector = Projector(config, hidden_size)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Returns pixel values, float32 [N, 3, S, S], of bytes uint8 [N, 3, S, S], by ``pixel_table``."""
        table = pixel_table(self.config).to(pixels.device)
        return torch.stack([row[channel.long()] for row, channel in zip(table, pixels.unbind(1), strict=True)], dim=1)

    @torch.no_grad()
    def forward(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the soft tokens [N, T, D] in ``dtype``, which is also computed in.

        Args:
            pixels: bytes uint8, or pixel values as ``ImageProcessor.pixel_values`` gives them, [N, 3, S, S].

        Raises:
            UserError: the images are not of the tower's size.
        """
        size = self.config.image_size
        if pixels.shape[1:] != (3, size, size):
            raise UserError(f"images must be [N, 3, {size}, {size}], not {list(pixels.shape)}; use the ImageProcessor.")
        weight = self.multi_modal_projector.mm_input_projection_weight
        made = [torch.empty(0, self.config.tokens_per_image, weight.shape[1], dtype=dtype, device=weight.device)]
        with torch.autocast(weight.device.type, enabled=False):
            for part in pixels.split(IMAGES_PER_PASS) if len(pixels) else ():
                part = part.to(weight.device)
                part = self.normalise(part) if part.dtype == torch.uint8 else part
                made.append(self.multi_modal_projector(self.vision_tower(part.to(dtype))))
        return torch.cat(made)


def pixel_table(config: VisionConfig) -> Tensor:
    """Returns the pixel value of every byte in every channel, float32 [3, 256].

    Rounded to float32 between rescaling and normalising, as transformers' image processor does: equal to the last bit.
    """
    rescaled = (torch.arange(256, dtype=torch.float64) * config.rescale_factor).to(torch.float32)
    mean, std = (torch.tensor(x, dtype=torch.float32)[:, None] for x in (config.image_mean, config.image_std))
    return (rescaled - mean) / std
