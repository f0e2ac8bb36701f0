"""The packed format: memory-mapped token streams on disk, and fixed-length rows cut from them.

A packed folder holds, for the splits `train` and `heldout`, a flat stream of tokens (`<split>.tokens`, little-endian
uint32 [N]) and the offset where each document's BOS stands (`<split>.starts`, int64 [documents]), plus `manifest.json`.
Conversations add one bit a token (`<split>.counted`, uint8 [⌈N/8⌉], lowest bit first): whether the token counts as
something to predict. Folders with that plane have format version 2, the others version 1.
It is written under a temporary name and renamed when complete, so a folder with a manifest is a whole one.

    L context · N tokens of a split
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from tpa_train.errors import UserError

FORMAT = "tpa_train.packed"
# Part of every cache key: raise them when the layout or the choice of held-out documents changes.
VERSION, MASKED_VERSION = 1, 2  # without and with the plane of counted tokens
SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
TOKEN, START, BITS = np.dtype("<u4"), np.dtype("<i8"), np.dtype("u1")


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`."""

    fingerprint: str  # of everything that decided the content
    tokenizer: str  # the tokenizer's fingerprint
    vocab_size: int
    bos_id: int
    tokens: dict[str, int]  # by split
    documents: dict[str, int]  # by split
    source: dict  # what the source said of itself, for the curious
    format: str = FORMAT
    version: int = VERSION

    @property
    def masked(self) -> bool:
        """Whether every token has a bit that says whether it counts."""
        return self.version == MASKED_VERSION

    def files(self, split: str) -> dict[str, tuple[np.dtype, int]]:
        """Returns the files of ``split``, by their extension: type and number of entries."""
        tokens = self.tokens[split]
        files = {"tokens": (TOKEN, tokens), "starts": (START, self.documents[split])}
        return files | ({"counted": (BITS, -(-tokens // 8))} if self.masked else {})


class PackedStream:
    """One split of a packed folder, memory-mapped on first use (and again in each loader process)."""

    def __init__(self, folder: str | Path, split: str = "train", tokenizer_fingerprint: str | None = None) -> None:
        """Opens ``split`` of ``folder``.

        Raises:
            UserError: the folder is not a whole packed one, or was packed with another tokenizer.
        """
        assert split in SPLITS, split
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        if tokenizer_fingerprint not in (None, self.manifest.tokenizer):
            raise UserError(
                f"{self.folder} was packed with another tokenizer ({self.manifest.tokenizer[:12]}, the model has "
                f"{tokenizer_fingerprint[:12]}); pack the text again with this model's tokenizer, or name its files "
                f"in data.path."
            )
        self._maps: dict[str, np.ndarray] = {}

    @property
    def tokens(self) -> np.ndarray:
        """uint32 [N]."""
        return self._map("tokens")

    @property
    def starts(self) -> np.ndarray:
        """Offsets of the documents' first tokens, ascending from 0, int64 [documents]."""
        return self._map("starts")

    @property
    def counted_bits(self) -> np.ndarray:
        """Whether each token counts, eight to a byte, uint8 [⌈N/8⌉]; only where ``manifest.masked``."""
        return self._map("counted")

    def counted(self, begin: int, end: int) -> np.ndarray:
        """Returns whether the tokens from ``begin`` to ``end`` count, bool [end - begin]; none beyond the last does."""
        first = begin // 8
        bits = np.unpackbits(self.counted_bits[first : -(-end // 8)], bitorder="little")[begin - 8 * first :]
        counted = np.zeros(end - begin, bool)
        counted[: min(end, len(self)) - begin] = bits[: min(end, len(self)) - begin]
        return counted

    def _map(self, kind: str) -> np.ndarray:
        if kind not in self._maps:
            dtype, length = self.manifest.files(self.split)[kind]
            path = self.folder / f"{self.split}.{kind}"
            # An empty file cannot be mapped.
            self._maps[kind] = np.memmap(path, dtype, mode="r", shape=(length,)) if length else np.empty(0, dtype)
        return self._maps[kind]

    def __len__(self) -> int:
        return self.manifest.tokens[self.split]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # a pickled memmap would carry all its bytes


def is_packed(path: str | Path) -> bool:
    """Whether ``path`` is a packed folder or a compact export of one."""
    path = Path(path)
    return (path / MANIFEST).is_file() or (path.suffix == ".npz" and path.is_file())


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a packed folder's manifest.

    Raises:
        UserError: it is missing, of another version, or the files beside it are not the size that it says.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text())
        if values["format"] != FORMAT or values["version"] not in (VERSION, MASKED_VERSION):
            raise UserError(f"{folder} is of another packing version; pack it again (delete it if it is in the cache).")
        manifest = Manifest(**values)
        for split in SPLITS:
            for kind, (dtype, length) in manifest.files(split).items():
                if (folder / f"{split}.{kind}").stat().st_size != dtype.itemsize * length:
                    raise UserError(f"{folder}: {split}.{kind} is cut short; delete the folder and pack it again.")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise UserError(f"{folder} is not a complete packed folder ({e}); pack it again.") from e
    return manifest


class PackedDataset(Dataset):
    """Rows of ``context`` tokens cut one after the other from a packed stream; a last partial row is dropped.

    An item is ``{"token_ids": int64 [L], "document_ids": int32 [L], "row": int}``, the last its number.
    ``document_ids`` number the documents inside the row (0, 1, 2, ...): attention does not cross them. A row that
    begins inside a document numbers that one 0.

    Rows of conversations also have ``"loss_mask"``, bool [L]: whether the prediction that is made *at* a position, of
    the token after it, counts. It is True at position i if token i + 1 of the stream is one that the model would write
    itself (its turns and the pieces that end them). So it goes with ``logits[i]`` and ``token_ids[i + 1]``; the last
    position's is that of the stream's next token, which begins the next row. Rows of plain text have no such key: all
    their positions count.

    Every row begins with BOS, which takes the place of its first token: Gemma has never seen a text without one (on
    WikiText-2 its perplexity doubles).
    """

    def __init__(self, stream: PackedStream, context: int, join_documents: bool = False) -> None:
        """Cuts ``stream``.

        Args:
            stream: one split of a packed folder.
            context: L, tokens of a row.
            join_documents: number everything 0, so that a row is one text.

        Raises:
            UserError: the stream does not fill one row.
        """
        if context < 1:
            raise UserError(f"the context must be at least 1 token, not {context}.")
        if len(stream) < context:
            what = "held-out data (data.heldout_min_tokens)" if stream.split == "heldout" else "training data"
            raise UserError(
                f"the {what} has {len(stream):,} tokens, less than one row of {context:,}; use more text "
                f"(data.max_tokens, data.path) or a shorter context."
            )
        self.stream, self.context, self.join_documents = stream, context, join_documents

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        context: int,
        split: str = "train",
        join_documents: bool = False,
        tokenizer_fingerprint: str | None = None,
    ) -> PackedDataset:
        """Opens rows of a packed folder; see `PackedStream` and `PackedDataset`."""
        return cls(PackedStream(folder, split, tokenizer_fingerprint), context, join_documents)

    def __len__(self) -> int:
        return len(self.stream) // self.context

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        begin = row % len(self) * self.context
        token_ids = self.stream.tokens[begin : begin + self.context].astype(np.int64)
        token_ids[0] = self.stream.manifest.bos_id
        document_ids = np.zeros(self.context, np.int32)
        if not self.join_documents:
            first, last = np.searchsorted(self.stream.starts, [begin + 1, begin + self.context])
            document_ids[self.stream.starts[first:last] - begin] = 1
            document_ids = document_ids.cumsum(dtype=np.int32)
        item = {
            "token_ids": torch.from_numpy(token_ids), "document_ids": torch.from_numpy(document_ids),
            "row": row % len(self),
        }  # fmt: skip
        if self.stream.manifest.masked:
            item["loss_mask"] = torch.from_numpy(self.stream.counted(begin + 1, begin + 1 + self.context))
        return item


def tokens_without_bos(stream: PackedStream) -> torch.Tensor:
    """Returns the stream's tokens, int64 [T], less its BOS ids: inside a copied text they would mark positions."""
    tokens = np.asarray(stream.tokens)
    return torch.from_numpy(tokens[tokens != stream.manifest.bos_id].astype(np.int64))


def texts_twice(tokens: torch.Tensor, bos_id: int, distance: int, count: int) -> torch.Tensor:
    """Returns ``count`` copy texts, int64 [count, 1 + 2C]: BOS, then the same C = ``distance`` tokens twice.

    Args:
        tokens: int64 [T] with T ≥ C; the texts start at evenly spaced places and overlap where T is short.
        bos_id, distance, count: as above.
    """
    room = len(tokens) - distance
    begins = [i * room // max(1, count - 1) for i in range(count)]
    text = torch.stack([tokens[b : b + distance] for b in begins])  # [count, C]
    return torch.cat([torch.full((count, 1), bos_id), text, text], dim=1)


class temporary_folder:
    """A folder beside ``final`` that becomes ``final`` when the block succeeds and disappears when it fails.

    ``marker``: the file that every whole folder has. Where another process was faster, its folder is as good.

    A killed process leaves it behind under its temporary name, which nothing reads; the next pack into the same cache
    sweeps such leftovers once they are a day old.
    """

    def __init__(self, final: Path, marker: str = MANIFEST) -> None:
        self.final, self.marker = final, marker
        self.path = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"

    def __enter__(self) -> Path:
        try:
            self.path.mkdir(parents=True)
        except OSError as e:
            raise UserError(
                f"data.cache_dir: {self.final.parent} cannot be written ({e.strerror}); set data.cache_dir or "
                f"TPA_TRAIN_CACHE to a folder that can."
            ) from e
        for old in self.final.parent.glob(".*.tmp"):
            if time.time() - old.stat().st_mtime > 86_400:
                shutil.rmtree(old, ignore_errors=True)
        return self.path

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            try:
                self.path.rename(self.final)
            except OSError:
                if not (self.final / self.marker).is_file():
                    raise
        shutil.rmtree(self.path, ignore_errors=True)
