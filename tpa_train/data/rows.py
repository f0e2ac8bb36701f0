"""Rows to batches: what the loaders, the stages and the evaluation share.

    B rows · L tokens of a row · N images of a batch · S image size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import default_collate

from tpa_train.gemma3.images import NO_IMAGE, image_blocks
from tpa_train.gemma3.vision_config import VisionConfig

IMAGES = "images"  # uint8 [n, 3, S, S] of a row, n its own


def collate_rows(rows: Sequence[Mapping[str, Tensor | int]]) -> dict[str, Tensor]:
    """Returns the rows as one batch: everything stacked to [B, …], images one after the other, [N, 3, S, S]."""
    batch = default_collate([{name: item for name, item in row.items() if name != IMAGES} for row in rows])
    return batch | ({IMAGES: torch.cat([row[IMAGES] for row in rows])} if IMAGES in rows[0] else {})


def shortened(batch: Mapping[str, Tensor], length: int, vision: VisionConfig | None = None) -> dict[str, Tensor]:
    """Returns the first ``length`` tokens of every row, or somewhat fewer: an image is never cut in two.

    Args:
        batch: as from ``collate_rows``.
        length: at least 1.
        vision: of the model; None where there can be no images.
    """
    ids = batch["token_ids"]
    whole = ids.shape[1]
    if length >= whole:
        return dict(batch)
    keep = None
    if vision is not None and IMAGES in batch:
        blocks = image_blocks(ids, vision.image_token_id)

        def inside(at: int) -> bool:
            return bool(((blocks[:, at - 1] == blocks[:, at]) & (blocks[:, at] != NO_IMAGE)).any())

        while length > 1 and inside(length):
            length -= 1
        counts, kept = blocks.amax(1) + 1, blocks[:, :length].amax(1) + 1
        first = counts.cumsum(0) - counts
        keep = [int(f) + n for f, k in zip(first, kept, strict=True) for n in range(int(k))]
    short = {n: t[:, :length] if t.dim() > 1 else t for n, t in batch.items() if n != IMAGES}
    if IMAGES in batch:
        short[IMAGES] = batch[IMAGES] if keep is None else batch[IMAGES][keep]
    return short
