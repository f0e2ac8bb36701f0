"""A packed folder as one small file, to carry a corpus to another machine.

The file is an ordinary `.npz` without pickles, readable by `numpy.load`. Token ids are split in a low plane of 16 bits
and a high plane of 8, and LZMA then needs about 9 bits a token (24M tokens of English: 28 MB; zlib: 34 MB).
Conversations carry the bits of their loss mask in one more plane.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import os
import uuid
import zipfile
from pathlib import Path

import numpy as np

from tpa_train.data.packed import (
    BITS,
    FORMAT,
    MANIFEST,
    MASKED_VERSION,
    SPLITS,
    START,
    TOKEN,
    VERSION,
    PackedStream,
    read_manifest,
    temporary_folder,
)  # fmt: skip
from tpa_train.errors import UserError


def export_compact(folder: str | Path, file: str | Path) -> Path:
    """Writes the packed ``folder`` as the single compressed ``file`` (.npz); takes about 3 s per million tokens.

    Raises:
        UserError: the folder is not a whole packed one, or the file's name does not end in .npz.
    """
    file = Path(file)
    if file.suffix != ".npz":
        raise UserError(f"a compact export is a .npz file; rename {file} to {file.with_suffix('.npz').name}.")
    manifest = read_manifest(Path(folder))
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as archive:

            def write(name: str, array: np.ndarray) -> None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

            write("manifest", np.frombuffer(json.dumps(dataclasses.asdict(manifest)).encode(), np.uint8))
            for split in SPLITS:
                stream = PackedStream(folder, split)
                tokens = np.asarray(stream.tokens)
                assert not len(tokens) or tokens.max() < 1 << 24, "token ids above 24 bits"
                write(f"{split}_low", (tokens & 0xFFFF).astype("<u2"))
                write(f"{split}_high", (tokens >> 16).astype(np.uint8))
                write(f"{split}_lengths", np.diff(stream.starts, append=len(tokens)).astype(TOKEN))
                if manifest.masked:
                    write(f"{split}_counted", np.asarray(stream.counted_bits))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def import_compact(file: str | Path, cache_dir: str | Path) -> Path:
    """Unpacks ``file`` once below ``cache_dir`` and returns the packed folder.

    Raises:
        UserError: the file is not a compact export, or is damaged.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            text = archive["manifest"].tobytes()
            manifest = json.loads(text)
            if manifest["format"] != FORMAT or manifest["version"] not in (VERSION, MASKED_VERSION):
                raise UserError(f"data.path: {file} is of another packing version; export it again.")
            folder = Path(cache_dir) / f"imported-{hashlib.sha256(text).hexdigest()[:24]}"
            if (folder / MANIFEST).is_file():
                return folder
            with temporary_folder(folder) as temporary:
                for split in SPLITS:
                    tokens = archive[f"{split}_low"].astype(TOKEN)
                    tokens |= archive[f"{split}_high"].astype(TOKEN) << TOKEN.type(16)
                    tokens.tofile(temporary / f"{split}.tokens")
                    lengths = archive[f"{split}_lengths"].astype(START)
                    (np.cumsum(lengths) - lengths).astype(START).tofile(temporary / f"{split}.starts")
                    if manifest["version"] == MASKED_VERSION:
                        archive[f"{split}_counted"].astype(BITS).tofile(temporary / f"{split}.counted")
                (temporary / MANIFEST).write_bytes(text)
                read_manifest(temporary)  # the sizes must be those that the manifest says
            return folder
    except UserError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, lzma.LZMAError) as e:
        raise UserError(f"data.path: {file} is not a complete compact export ({e}); copy or export it again.") from e
