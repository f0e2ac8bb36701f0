"""Weights in safetensors files: written one file's worth at a time, read one tensor at a time.

Either ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with ``model.safetensors.index.json`` (Hugging
Face's layout), so that neither side needs memory for more than a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tpa_train.checkpoints.files import read_json
from tpa_train.errors import UserError

SHARD_BYTES = 5 * 10**9  # of a file, as Hugging Face's
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_weights(
    folder: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor], limit: int = SHARD_BYTES
) -> None:
    """Writes tensors in the order of ``sizes``.

    Args:
        folder: to write into.
        sizes: bytes of every tensor as ``read`` returns it, by name.
        read: returns a tensor, contiguous and on the CPU.
        limit: bytes of a file (a larger tensor has its own).
    """
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    count, placed = len(shards), {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        save_file({name: read(name) for name in names}, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class StoredWeights:
    """What a folder's files hold, by name."""

    files: Mapping[str, Path]

    @classmethod
    def of(cls, folder: Path) -> StoredWeights:
        """Opens the weights in ``folder``.

        Raises:
            UserError: there are none, a file is missing, or one is damaged.
        """
        index = folder / INDEX
        paths = [folder / SINGLE]
        if not paths[0].is_file() and index.is_file():
            weight_map = read_json(index).get("weight_map", {})
            paths = sorted({folder / Path(name).name for name in weight_map.values()})
        files = {}
        for path in paths:
            if not path.is_file():
                raise UserError(f"{folder} is incomplete: there is no {path.name} in it.")
            with _damage_named(path), safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        return cls(files)

    def read(self, name: str) -> Tensor:
        """Returns the tensor ``name``, in memory of its own.

        Raises:
            UserError: its file is damaged.
        """
        path = self.files[name]
        # Opened anew each time: what a mapping has touched counts as this process's memory until it is closed.
        with _damage_named(path), safe_open(path, framework="pt") as file:
            return file.get_tensor(name).clone()


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns what a damaged file sets off into a UserError that names it."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or truncated ({error}).") from error


def nbytes(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """Returns the bytes that ``tensor`` takes in ``dtype`` (None: its own)."""
    return tensor.numel() * (dtype or tensor.dtype).itemsize

