"""Gemma 3 architecture as data: one frozen dataclass and the five published text sizes.

Sizes: Gemma 3 technical report (arXiv:2503.19786), table 1, and the released checkpoints' configurations.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tpa_train.errors import UserError, check_keys
from tpa_train.gemma3.vision_config import VisionConfig

LayerKind = Literal["local", "global"]
LAYERS_PER_GLOBAL = 6  # five sliding-window layers, then one global layer


def layer_pattern(num_layers: int, period: int = LAYERS_PER_GLOBAL) -> tuple[LayerKind, ...]:
    """Returns the kind of every layer: each ``period``-th one is global, the others see a sliding window."""
    return tuple("global" if (i + 1) % period == 0 else "local" for i in range(num_layers))


@dataclass(frozen=True)
class Gemma3Config:
    """A Gemma 3 model: its text side and, in multimodal ones, its vision side.

    Defaults are those of the 270M; all counts are per layer unless said.
    """

    vocab_size: int = 262_144
    hidden_size: int = 640  # D
    num_layers: int = 18
    num_heads: int = 4  # H, query heads
    num_kv_heads: int = 1  # G, key/value heads
    head_dim: int = 256  # d
    intermediate_size: int = 2048
    sliding_window: int = 512  # W: a local query sees itself and the W - 1 tokens before it
    query_pre_attn_scalar: float = 256.0  # scores are scaled by its inverse square root
    rope_theta: float = 1_000_000.0  # global layers
    rope_local_theta: float = 10_000.0  # local layers
    rope_scaling_factor: float = 1.0  # linear position scaling of the global layers (8 from 4B up)
    rms_norm_eps: float = 1e-6
    max_context: int = 32_768  # tokens the pretrained model was trained to handle
    layer_kinds: tuple[LayerKind, ...] = ()  # filled from the pattern when left empty
    vision: VisionConfig | None = None  # None: text only (``SIZES`` describe the text side; a checkpoint adds this)

    def __post_init__(self) -> None:
        if not self.layer_kinds:
            object.__setattr__(self, "layer_kinds", layer_pattern(self.num_layers))
        object.__setattr__(self, "layer_kinds", tuple(self.layer_kinds))
        if len(self.layer_kinds) != self.num_layers:
            raise UserError(f"layer_kinds names {len(self.layer_kinds)} layers but num_layers is {self.num_layers}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}).")
        if self.head_dim % 2:
            raise UserError(f"head_dim ({self.head_dim}) must be even: RoPE rotates its two halves.")

    @property
    def scale(self) -> float:
        """Attention score scale, 1/√query_pre_attn_scalar."""
        return self.query_pre_attn_scalar**-0.5

    def is_global(self, layer: int) -> bool:
        return self.layer_kinds[layer] == "global"

    def cached_tokens(self, layer: int, context: int) -> int:
        """Tokens that ``layer`` keeps in its cache at ``context`` tokens: L if global, min(L, W) if local."""
        return context if self.is_global(layer) else min(context, self.sliding_window)

    def to_dict(self) -> dict:
        """Returns plain values for JSON; a text-only model has no key ``vision``."""
        values = {**dataclasses.asdict(self), "layer_kinds": list(self.layer_kinds)}
        return {k: v for k, v in values.items() if k != "vision" or v is not None}

    @classmethod
    def from_dict(cls, values: dict) -> Gemma3Config:
        """Builds a config from ``to_dict``'s output.

        Raises:
            UserError: a key is unknown.
        """
        check_keys(values, cls, "Gemma 3 config")
        values = dict(values)
        if values.get("vision") is not None:
            values["vision"] = VisionConfig.from_dict(values["vision"])
        return cls(**{k: tuple(v) if k == "layer_kinds" else v for k, v in values.items()})


SIZES: dict[str, Gemma3Config] = {
    "270m": Gemma3Config(),
    "1b": Gemma3Config(hidden_size=1152, num_layers=26, intermediate_size=6912),
    "4b": Gemma3Config(
        hidden_size=2560, num_layers=34, num_heads=8, num_kv_heads=4, intermediate_size=10_240,
        sliding_window=1024, rope_scaling_factor=8.0, max_context=131_072,
    ),
    "12b": Gemma3Config(
        hidden_size=3840, num_layers=48, num_heads=16, num_kv_heads=8, intermediate_size=15_360,
        sliding_window=1024, rope_scaling_factor=8.0, max_context=131_072,
    ),
    "27b": Gemma3Config(
        hidden_size=5376, num_layers=62, num_heads=32, num_kv_heads=16, head_dim=128, intermediate_size=21_504,
        sliding_window=1024, query_pre_attn_scalar=168.0, rope_scaling_factor=8.0, max_context=131_072,
    ),
}  # fmt: skip
