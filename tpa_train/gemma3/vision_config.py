"""Gemma 3's vision side as data: the published sizes share one (technical report, arXiv:2503.19786, §2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from tpa_train.errors import UserError, check_keys


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP's sizes, the tokens that stand for images, and the checkpoint's preprocessing."""

    image_size: int = 896  # S
    patch_size: int = 14  # P
    hidden_size: int = 1152  # E
    intermediate_size: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    layer_norm_eps: float = 1e-6
    tokens_per_image: int = 256  # T
    image_token_id: int = 262_144  # stands where a soft token goes; lies beyond the text vocabulary
    start_token_id: int = 255_999  # <start_of_image>
    end_token_id: int = 256_000  # <end_of_image>
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = 2  # Pillow's number of the filter: bilinear

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        side, tokens = self.image_size // self.patch_size, int(self.tokens_per_image**0.5)
        if tokens < 1 or tokens**2 != self.tokens_per_image or side % tokens or self.image_size % self.patch_size:
            raise UserError(
                f"{self.tokens_per_image} soft tokens cannot be pooled from an image of {self.image_size} pixels in "
                f"patches of {self.patch_size}."
            )
        if self.hidden_size % self.num_heads:
            raise UserError(f"the vision width ({self.hidden_size}) must be a multiple of its {self.num_heads} heads.")

    @classmethod
    def from_dict(cls, values: dict) -> VisionConfig:
        """Builds a config from ``dataclasses.asdict``'s output.

        Raises:
            UserError: a key is unknown.
        """
        check_keys(values, cls, "vision config")
        return cls(**values)
