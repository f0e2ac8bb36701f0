"""Tokenises documents once and packs them into a cached folder (`packed.py` says how it is laid out).

Held-out documents are chosen by a hash of their text, so they are the same ones in every run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from tpa_train.data.compact import import_compact
from tpa_train.data.packed import (
    BITS,
    FORMAT,
    MANIFEST,
    MASKED_VERSION,
    SPLITS,
    START,
    TOKEN,
    VERSION,
    Manifest,
    PackedDataset,
    PackedStream,
    is_packed,
    read_manifest,
    temporary_folder,
)  # fmt: skip
from tpa_train.data.settings import DataSettings
from tpa_train.data.sources import Source, make_source, template_name
from tpa_train.errors import UserError
from tpa_train.gemma3.chat import Conversation

__all__ = ["PackedDataset", "PackedStream", "choose_heldout", "default_cache_dir", "pack"]

log = logging.getLogger(__name__)

BATCH_DOCUMENTS, BATCH_CHARS = 64, 1_000_000  # one tokeniser call: enough to keep its threads busy, and no more


class TokenizerLike(Protocol):
    """What packing needs of a tokenizer."""

    vocab_size: int
    bos_id: int
    fingerprint: str

    def encode_batch(self, texts: list[str], bos: bool = True, control: bool = True) -> list[list[int]]: ...


def default_cache_dir() -> Path:
    return Path(os.environ.get("TPA_TRAIN_CACHE") or "~/.cache/tpa_train/packed").expanduser()


def pack(settings: DataSettings, tokenizer: TokenizerLike, progress: bool = True) -> Path:
    """Returns the folder of packed data that ``settings`` ask for, tokenising only what is not cached.

    Args:
        settings: the source, the token budget and what to hold out.
        tokenizer: the model's tokenizer.
        progress: show a progress line with the time left.

    Raises:
        UserError: the source is empty or unreadable, or was packed with another tokenizer.
    """
    if settings.max_tokens is not None and settings.max_tokens < 1:
        raise UserError(f"data.max_tokens={settings.max_tokens} must be positive, or null to pack everything.")
    if not 0 <= settings.heldout_fraction < 1:
        raise UserError(f"data.heldout_fraction={settings.heldout_fraction} must be at least 0 and below 1.")
    cache = Path(settings.cache_dir).expanduser() if settings.cache_dir else default_cache_dir()
    if settings.kind in ("text", "chat") and isinstance(settings.path, (str, os.PathLike)):
        path = Path(settings.path).expanduser()
        if is_packed(path):
            folder = import_compact(path, cache) if path.is_file() else path
            packed = PackedStream(folder, tokenizer_fingerprint=tokenizer.fingerprint)  # checks
            if settings.kind == "chat":
                _check_packed_chat(path, packed.manifest, settings, tokenizer)
            return folder
    source = make_source(settings, tokenizer)
    key = {
        "format": [FORMAT, VERSION],
        "source": source.describe(),
        "tokenizer": tokenizer.fingerprint,
        "budget": [settings.max_tokens, settings.heldout_fraction, settings.heldout_min_tokens],
        "control_names": source.control_names,
    }
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache / fingerprint[:32]
    if (folder / MANIFEST).is_file():
        try:
            manifest = read_manifest(folder)
            log.info("packed data from the cache: %s (%s)", folder, _counts(manifest))
            return folder
        except UserError as e:  # nobody named this folder: replace it
            log.warning("%s", e)
            shutil.rmtree(folder, ignore_errors=True)
    with temporary_folder(folder) as temporary:
        began = time.monotonic()
        hashes, lengths = _tokenise(source, tokenizer, settings.max_tokens, temporary, progress)
        if not len(lengths):
            named = [f"data.{key}={value}" for key in ("path", "name") if (value := getattr(settings, key))]
            named.append(f"data.kind={settings.kind}")
            raise UserError(f"{named[0]} holds no text; point it at non-empty documents.")
        manifest = _split(temporary, hashes, lengths, settings, fingerprint, tokenizer, key["source"])
        seconds = time.monotonic() - began
        log.info(
            "packed %s in %.1f s (%s tokens/s) into %s",
            _counts(manifest), seconds, f"{sum(manifest.tokens.values()) / max(seconds, 1e-9):,.0f}", folder,
        )  # fmt: skip
    return folder


def _check_packed_chat(path: Path, manifest: Manifest, settings: DataSettings, tokenizer: TokenizerLike) -> None:
    """Refuses data packed earlier that is not the conversations that the settings ask for."""
    if settings.train_on == "completions" and not manifest.masked:
        raise UserError(
            f"data.path: {path} was packed without marks for the model's turns; pack its conversations again, or use "
            "data.train_on=all."
        )
    if manifest.source.get("template") not in (None, template_name(tokenizer)):
        raise UserError(f"data.path: {path} was packed with another chat template; pack its conversations again.")


def _counts(manifest: Manifest) -> str:
    return ", ".join(f"{s}: {manifest.documents[s]:,} documents, {manifest.tokens[s]:,} tokens" for s in SPLITS)


def _tokenise(
    source: Source, tokenizer: TokenizerLike, max_tokens: int | None, folder: Path, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Appends documents' tokens to ``all.tokens`` until the source or the budget ends.

    Where the loss does not count all tokens, a byte for each says so in ``all.counted``.

    Returns:
        text hashes (uint64 [documents]) and token counts (int64 [documents]); the last document may be cut short.
    """
    hashes: list[int] = []
    lengths: list[int] = []
    total = 0
    bar = tqdm(
        total=100.0, desc="tokenising", disable=not progress, leave=False, delay=1,
        mininterval=0.3 if sys.stderr.isatty() else 10.0,  # a log file gets a line now and then
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left{postfix}",
    )  # fmt: skip
    with bar, open(folder / "all.tokens", "wb") as file, open(folder / "all.counted", "wb") as counted:
        for batch in _batches(source):
            encoded, masks = source.encode(batch, tokenizer)
            for document, ids, mask in zip(batch, encoded, masks or [None] * len(batch), strict=True):
                ids = np.asarray(ids[: max_tokens - total] if max_tokens else ids, TOKEN)
                if not len(ids):
                    break
                file.write(ids.tobytes())
                if mask is not None:
                    counted.write(np.asarray(mask[: len(ids)], BITS).tobytes())
                text = getattr(document, "text", document)
                hashes.append(int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big"))
                lengths.append(len(ids))
                total += len(ids)
            done = max(source.progress() or 0.0, total / max_tokens if max_tokens else 0.0)
            bar.update(max(0.0, 100.0 * min(1.0, done) - bar.n))
            bar.set_postfix_str(f"{total / 1e6:.1f}M tokens", refresh=False)
            if max_tokens and total >= max_tokens:
                log.info("the token budget is reached (data.max_tokens=%s); text after it is not used", max_tokens)
                break
    return np.array(hashes, np.uint64), np.array(lengths, np.int64)


def _batches(source: Iterable[str | Conversation]) -> Iterator[list]:
    batch: list[str | Conversation] = []
    chars = 0
    for document in source:
        batch.append(document)
        chars += len(getattr(document, "text", document))
        if len(batch) >= BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def choose_heldout(hashes: np.ndarray, lengths: np.ndarray, fraction: float, min_tokens: int) -> np.ndarray | None:
    """Chooses held-out documents by their text's hash.

    All documents whose hash lies in the lowest ``fraction`` of the range are held out, whatever else the data holds;
    where they have fewer than ``min_tokens`` (or a quarter of all, if that is less) the next hashes join them.
    Copies of a text share its hash, so they never straddle the splits.

    Args:
        hashes: uint64 [documents].
        lengths: tokens per document, int64 [documents].

    Returns:
        bool [documents], or None where whole documents cannot do it: they would take more than half of the tokens.
    """
    total = int(lengths.sum())
    order = np.argsort(hashes, kind="stable")
    needed = min(min_tokens, total // 4) if fraction or min_tokens else 0
    count = int(np.searchsorted(np.cumsum(lengths[order]), needed)) + 1 if needed else 0
    limit = max(int(fraction * 2**64) - 1, int(hashes[order[count - 1]]) if count else -1)
    chosen = hashes <= np.uint64(limit) if limit >= 0 else np.zeros(len(hashes), bool)
    return None if lengths[chosen].sum() > total // 2 else chosen


def _split(
    folder: Path,
    hashes: np.ndarray,
    lengths: np.ndarray,
    settings: DataSettings,
    fingerprint: str,
    tokenizer: TokenizerLike,
    described: dict,
) -> Manifest:
    """Deals the tokens in ``all.tokens`` (and ``all.counted``) to the two splits and writes the manifest, last."""
    total = int(lengths.sum())
    planes = {"tokens": np.memmap(folder / "all.tokens", TOKEN, mode="r", shape=(total,))}
    if masked := (folder / "all.counted").stat().st_size > 0:
        planes["counted"] = np.memmap(folder / "all.counted", BITS, mode="r", shape=(total,))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(START)
    heldout = choose_heldout(hashes, lengths, settings.heldout_fraction, settings.heldout_min_tokens)
    if heldout is None:
        # One or a few long documents: their end is held out instead, where a document may begin in its middle.
        share = max(int(settings.heldout_fraction * total), min(settings.heldout_min_tokens, total // 4))
        cut = total - min(share, total // 2)
        log.warning("too few documents to hold whole ones out: the last %s tokens are held out", f"{total - cut:,}")
        in_heldout = starts[starts > cut]
        parts = {
            "train": ([(0, cut)], starts[starts < cut]),
            "heldout": ([(cut, total)], np.concatenate([[cut], in_heldout]) - cut if cut < total else in_heldout),
        }
    else:
        parts = {}
        for split, chosen in (("train", ~heldout), ("heldout", heldout)):
            spans = list(zip(starts[chosen], (starts + lengths)[chosen], strict=True))
            parts[split] = spans, np.concatenate([[0], np.cumsum(lengths[chosen])[:-1]])[: chosen.sum()]
    counts = {}
    for split, (spans, offsets) in parts.items():
        for kind, plane in planes.items():
            _write_plane(folder / f"{split}.{kind}", plane, spans)
        offsets.astype(START).tofile(folder / f"{split}.starts")
        counts[split] = (int(sum(end - begin for begin, end in spans)), len(offsets))
    wanted = settings.heldout_min_tokens
    if counts["heldout"][0] < wanted:
        log.warning(
            "only %s tokens are held out, fewer than data.heldout_min_tokens=%s: the data is small",
            f"{counts['heldout'][0]:,}", f"{wanted:,}",
        )  # fmt: skip
    del planes, plane
    for kind in ("tokens", "counted"):
        (folder / f"all.{kind}").unlink()
    manifest = Manifest(
        fingerprint=fingerprint, tokenizer=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id, tokens={s: n for s, (n, _) in counts.items()},
        documents={s: n for s, (_, n) in counts.items()}, source=described,
        version=MASKED_VERSION if masked else VERSION,
    )  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))
    return manifest


def _write_plane(path: Path, plane: np.ndarray, spans: list[tuple[int, int]]) -> None:
    """Writes the tokens of ``spans`` one after the other, or their bits packed eight to a byte."""
    with open(path, "wb") as file:
        if plane.dtype == TOKEN:
            for begin, end in spans:
                file.write(plane[begin:end].tobytes())
        elif spans:
            bits = np.concatenate([plane[begin:end] for begin, end in spans])
            file.write(np.packbits(bits, bitorder="little").tobytes())
