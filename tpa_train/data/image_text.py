"""Images with text as training rows, for multimodal models.

An example is a text and its images. It becomes a document: its ids with T image tokens for every image (as
``gemma3.processing`` places them). Documents are packed whole, one after the other; where the next one does not fit,
the row's rest is filled with the *text alone* of the examples that follow, as documents of their own. So nothing is
padding, no image is cut in two, and a model that learns from such rows also keeps being measured and trained on text.

Images are read when their row is: a row costs the memory of its images, a data set that of its ids.

    L context · T image tokens of an image · S image size · n images of a row
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from tpa_train.data.datamodule import PackedDataModule
from tpa_train.data.packed import temporary_folder, texts_twice
from tpa_train.data.packing import choose_heldout, default_cache_dir
from tpa_train.data.records import FileRecords, HubRows
from tpa_train.data.rows import IMAGES
from tpa_train.data.settings import DataSettings
from tpa_train.data.sources import field_of
from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.processing import ImageProcessor, crop_boxes, open_image, pieces_around, place_images
from tpa_train.gemma3.vision_config import VisionConfig

log = logging.getLogger(__name__)

EXAMPLES = "examples.jsonl"  # of a data set that was fetched into the cache


@dataclass(frozen=True)
class Example:
    """A text with its images."""

    text: str
    images: tuple[Path, ...]
    where: str  # for messages


@dataclass(frozen=True)
class Document:
    """An example's ids, and how many views (the image and its crops) each of its images is shown in."""

    ids: np.ndarray  # int32 [tokens], BOS first
    views: tuple[tuple[Path, int], ...]
    text_ids: np.ndarray  # int32, of the text alone, BOS first
    hash: int
    files: str = ""  # what tells its images' content apart without reading it: their sizes and times of change


@dataclass(frozen=True)
class Row:
    ids: np.ndarray  # int32 [L]
    document_ids: np.ndarray  # int32 [L]
    views: tuple[tuple[Path, int], ...]


class ImageTextDataset(Dataset):
    """Rows ``{"token_ids": int64 [L], "document_ids": int32 [L], "images": uint8 [n, 3, S, S]}`` of documents, and
    the row's number as ``"row"``.

    Args:
        documents: in order; at least one.
        context: L.
        vision: of the model.
        join_documents: number everything 0.
        pan_and_scan: as the documents were made with.

    Raises:
        UserError: a row does not hold one image.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        context: int,
        vision: VisionConfig,
        join_documents: bool = False,
        pan_and_scan: bool = False,
    ) -> None:
        least = vision.tokens_per_image + 6  # BOS, start, end, and the line ends around them
        if context < least and any(d.views for d in documents):
            raise UserError(f"a row of {context} tokens cannot hold an image; it takes at least {least} (context=).")
        self.context, self.join_documents, self.pan_and_scan = context, join_documents, pan_and_scan
        self.processor = ImageProcessor(vision)
        self.rows = pack_rows(documents, context, vision)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        size = self.processor.config.image_size
        views = [self.processor.views(path, self.pan_and_scan)[:count] for path, count in row.views]
        documents = np.zeros_like(row.document_ids) if self.join_documents else row.document_ids
        return {
            "token_ids": torch.from_numpy(row.ids.astype(np.int64)),
            "document_ids": torch.from_numpy(documents.copy()),
            "row": index,
            IMAGES: torch.cat([torch.empty(0, 3, size, size, dtype=torch.uint8), *views]),
        }


def pack_rows(documents: Sequence[Document], context: int, vision: VisionConfig) -> list[Row]:
    """Returns rows of ``context`` tokens; see the module's text. Longer documents are cut at the row's end."""
    rows: list[Row] = []
    parts: list[np.ndarray] = []
    views: list[tuple[Path, int]] = []

    def room() -> int:
        return context - sum(map(len, parts))

    def close(following: int) -> None:
        number = following
        while room() > 0:
            parts.append(documents[number % len(documents)].text_ids[: room()])
            number += 1
        ids = np.concatenate(parts)
        numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts])
        rows.append(Row(ids, numbers, tuple(views)))
        parts.clear()
        views.clear()

    for number, document in enumerate(documents):
        if parts and len(document.ids) > room():
            close(number)
        ids, shown = cut(document, context, vision)
        parts.append(ids)
        views.extend(shown)
        if room() == 0:
            close(number + 1)
    if parts:
        close(len(documents))
    return rows


def cut(document: Document, length: int, vision: VisionConfig) -> tuple[np.ndarray, tuple[tuple[Path, int], ...]]:
    """Returns at most ``length`` ids of a document, and the images whose tokens are all among them."""
    ids = document.ids
    if len(ids) <= length:
        return ids, document.views
    inside = ids == vision.image_token_id
    if inside[length - 1] and inside[length]:
        length = int(np.flatnonzero(~inside[:length])[-1])  # before its <start_of_image>
    left, kept = int(inside[:length].sum()) // vision.tokens_per_image, []
    for path, count in document.views:
        if min(count, left):
            kept.append((path, min(count, left)))
        left -= min(count, left)
    return ids[:length], tuple(kept)


class ImageTextDataModule(PackedDataModule):
    """Batches ``{"token_ids": [B, L], "document_ids": [B, L], "images": uint8 [N, 3, S, S]}`` for the stages of a run.

    Everything else is as in ``PackedDataModule``; copy texts are of the text alone.
    """

    def __init__(self, *args: Any, vision: VisionConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vision = vision
        self._documents: dict[str, list[Document]] | None = None

    def prepare_data(self) -> None:
        """Fetches a named data set into the cache, once; local files are read where they are."""
        if not self.settings.path and not self.settings.name:
            raise UserError("data=image_text needs data.path (a .jsonl file) or data.name (a data set).")
        if self.settings.path and self.settings.name:
            raise UserError("data.path and data.name are both given; data=image_text reads one of them.")
        if self.settings.name:
            self.folder = fetch(self.settings)

    def setup(self, stage: str | None = None) -> None:
        if self._documents is not None:
            return
        self.prepare_data()
        path = self.folder / EXAMPLES if self.folder is not None else self.settings.path
        keys = ("image", "text") if self.folder is not None else (self.settings.image_key, self.settings.text_key)
        documents = list(self._encoded(read_examples(path, *keys)))
        self._documents = split(documents, self.settings)
        self._train = self._rows("train", self.context, self.settings.join_documents)

    def _encoded(self, examples: Iterator[Example]) -> Iterator[Document]:
        """Yields documents until the token budget is spent; a broken or missing image is found here."""
        total, budget = 0, self.settings.max_tokens
        for example in examples:
            sizes = [open_image(path, decode=False).size for path in example.images]
            crops = [len(crop_boxes(*size)) if self.settings.pan_and_scan else 0 for size in sizes]
            pieces = pieces_around(example.text, len(sizes), example.where)
            ids = np.asarray(place_images(self.tokenizer, self.vision, pieces, crops), np.int32)
            text_ids = np.asarray(self.tokenizer.encode("".join(pieces)), np.int32)
            key = "\0".join([example.text, *map(str, example.images)])
            digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
            views = tuple(zip(example.images, (1 + n for n in crops), strict=True))
            yield Document(ids, views, text_ids, int.from_bytes(digest[:8], "big"), self._files(example.images))
            total += len(ids)
            if budget is not None and total >= budget:
                log.info("the token budget is reached (data.max_tokens=%s); examples after it are not used", budget)
                return

    def _files(self, paths: Sequence[Path]) -> str:
        if self.folder is not None:  # a fetched image is named by its content
            return ""
        return json.dumps([[(found := path.stat()).st_size, found.st_mtime_ns] for path in paths])

    @property
    def fingerprint(self) -> str:
        self.setup()
        digest = hashlib.sha256()
        for name in sorted(self._documents):
            for document in self._documents[name]:
                digest.update(document.hash.to_bytes(8, "big") + document.ids.tobytes() + document.files.encode())
        return digest.hexdigest()

    def _rows(self, part: str, context: int, join: bool) -> ImageTextDataset:
        self.setup()
        return ImageTextDataset(self._documents[part], context, self.vision, join, self.settings.pan_and_scan)

    def heldout_rows(self, num_tokens: int, context: int | None = None, join_documents: bool | None = None) -> Dataset:
        join = self.settings.join_documents if join_documents is None else join_documents
        rows = self._rows("heldout", context or self.context, join)
        count = min(len(rows), max(1, num_tokens // rows.context))
        return Subset(rows, [i * len(rows) // count for i in range(count)])

    def copy_texts(self, distance: int, count: int) -> Tensor:
        self.setup()
        text = np.concatenate([document.text_ids[1:] for document in self._documents["heldout"]]).astype(np.int64)
        if distance < 1 or count < 1 or len(text) - distance < count - 1:
            raise UserError(
                f"{count} copy texts of {distance:,} tokens do not fit the {len(text):,} text tokens held out; hold "
                "out more (data.heldout_min_tokens) or copy shorter texts (evaluation.copy)."
            )
        return texts_twice(torch.from_numpy(text), self.tokenizer.bos_id, distance, count)


def split(documents: list[Document], settings: DataSettings) -> dict[str, list[Document]]:
    """Deals documents to ``train`` and ``heldout``, by a hash of their content as text is (``choose_heldout``).

    Raises:
        UserError: there are fewer than two.
    """
    if len(documents) < 2:
        raise UserError(f"data=image_text found {len(documents)} examples; it needs two, one of them held out.")
    hashes = np.array([d.hash for d in documents], np.uint64)
    lengths = np.array([len(d.ids) for d in documents], np.int64)
    chosen = choose_heldout(hashes, lengths, settings.heldout_fraction, settings.heldout_min_tokens)
    if chosen is None or chosen.all() or not chosen.any():  # too few to go by hash: the last quarter
        chosen = np.arange(len(documents)) >= len(documents) - max(1, len(documents) // 4)
    parts = {"train": ~chosen, "heldout": chosen}
    return {name: [d for d, own in zip(documents, mask, strict=True) if own] for name, mask in parts.items()}


def read_examples(path: Any, image_key: str, text_key: str) -> Iterator[Example]:
    """Yields the examples of a .jsonl file; images are named from its folder.

    Raises:
        UserError: the file is missing or damaged, or a line lacks a field.
    """
    if not isinstance(path, (str, Path)) or Path(path).suffix != ".jsonl":
        raise UserError(f"data.path={path}: data=image_text reads one .jsonl file, with an image and a text a line.")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"data.path: {file} does not exist; check the path.")
    for where, row in FileRecords(file, (".jsonl",)):
        text = field_of(row, text_key, where)
        if image_key not in row:
            raise UserError(f"{where} has no '{image_key}' field (data.image_key){nearest(image_key, row)}")
        names = row[image_key]
        names = [] if names is None else [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}: field '{image_key}' (data.image_key) must name an image file or a list of them.")
        yield Example(text, tuple(file.parent / Path(name).expanduser() for name in names), where)


def fetch(settings: DataSettings) -> Path:
    """Returns the cache folder of the data set ``settings.name``: its examples and images, as local files.

    Raises:
        UserError: the data set cannot be read, or a row lacks a field.
    """
    key = {
        "name": settings.name, "subset": settings.subset, "split": settings.split, "image": settings.image_key,
        "text": settings.text_key, "tokens": settings.max_tokens,
    }  # fmt: skip
    cache = Path(settings.cache_dir).expanduser() if settings.cache_dir else default_cache_dir()
    folder = cache / f"images-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}"
    if (folder / EXAMPLES).is_file():
        return folder
    with temporary_folder(folder, EXAMPLES) as temporary:
        # Fewer tokens are counted than a text has, so that the rows suffice for the budget whatever the tokenizer.
        lines, spent = [], 0
        for where, row in HubRows(settings.name, settings.subset, settings.split):
            text = field_of(row, settings.text_key, where)
            if settings.image_key not in row:
                hint = nearest(settings.image_key, row)
                raise UserError(f"{where} has no '{settings.image_key}' field (data.image_key){hint}")
            value = row[settings.image_key]
            values = [] if value is None else value if isinstance(value, list) else [value]
            names = [save_image(temporary, v, where) for v in values]
            lines.append(json.dumps({"image": names, "text": text}, ensure_ascii=False))
            spent += len(text) // 8 + 256 * len(names)
            if settings.max_tokens is not None and spent >= settings.max_tokens:
                break
        (temporary / EXAMPLES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def save_image(folder: Path, value: Any, where: str) -> str:
    """Writes one image of a data set, as ``datasets`` hands it out, and returns its file's name."""
    if isinstance(value, dict) and value.get("bytes"):
        content = value["bytes"]
    elif hasattr(value, "save"):  # decoded by the library
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        content = buffer.getvalue()
    else:
        raise UserError(f"{where}: data.image_key holds a {type(value).__name__}, not an image.")
    name = f"{hashlib.sha256(content).hexdigest()[:24]}.image"  # Pillow goes by the content
    (folder / name).write_bytes(content)
    return name
