"""Rows in which a part of the text comes again: practice in looking further back than a sliding window.

What compression of the global layers breaks first is copying from far back, and ordinary text seldom asks for it. The
repeated part is the row's own text, so nothing but the training text is needed.

    L context · n tokens of the part
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tpa_train.data.packed import PackedDataset

SHORTEST = 8  # tokens of a part that is worth repeating
SHARES = (16, 4)  # a part takes from 1/16 to 1/4 of its document


class CopyRows(Dataset):
    """``PackedDataset`` with a part of the text repeated, over what stood there, in a share of the rows.

    A repeated token lies more than ``window`` tokens after its original and in the same document. Which rows, parts and
    places are chosen depends on the seed and the row's number alone. Rows whose documents are too short stay as they
    are.

    Args:
        rows: the packed rows.
        share: of the rows, from 0 to 1.
        window: tokens that a sliding-window layer sees, the current one included.
        seed: decides everything.
    """

    def __init__(self, rows: PackedDataset, share: float, window: int, seed: int) -> None:
        self.rows, self.share, self.window, self.seed = rows, share, window, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        item = self.rows[row]
        generator = np.random.default_rng((self.seed, row % len(self)))
        if generator.random() < self.share:
            repeat_part(
                item["token_ids"], item["document_ids"], self.window, self.rows.stream.manifest.bos_id, generator
            )
        return item


def repeat_part(
    token_ids: Tensor, document_ids: Tensor, window: int, bos_id: int, generator: np.random.Generator
) -> tuple[int, int, int] | None:
    """Repeats a part of the row's longest document later in it, in place.

    Args:
        token_ids: int [L]; document_ids: int [L], ascending.
        window: the copy begins more than this after the part.
        bos_id: a part ends before the next one: inside a copy it would mark the place.
        generator: draws length, distance and place.

    Returns:
        (begin of the part, begin of its copy, n), or None where the document is too short.
    """
    ids, counts = torch.unique_consecutive(document_ids, return_counts=True)
    longest = int(counts.argmax())
    begin, end = int(counts[:longest].sum()) + 1, int(counts[: longest + 1].sum())  # its BOS is left alone
    room = end - begin
    low, high = max(SHORTEST, room // SHARES[0]), room // SHARES[1]
    if high < low:
        return None
    n = int(generator.integers(low, high + 1))
    nearest, farthest = max(window + 1, n), room - n  # the copy does not overlap the part
    if farthest < nearest:
        return None
    distance = int(generator.integers(nearest, farthest + 1))
    source = begin + int(generator.integers(0, room - n - distance + 1))
    marks = (token_ids[source : source + n] == bos_id).nonzero()
    n = int(marks[0]) if len(marks) else n
    if n < SHORTEST:
        return None
    token_ids[source + distance : source + distance + n] = token_ids[source : source + n].clone()
    return source, source + distance, n
