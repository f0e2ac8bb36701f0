"""Where documents and conversations come from: local files in sorted order, and data sets of the Hugging Face hub.

Both give records (JSON objects, rows of tables) with the place they stand at, for messages about what is wrong there.
"""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tpa_train.errors import UserError, nearest

Record = tuple[str, dict[str, Any]]
"""(where it stands, such as "data.path: line 3 of chats.jsonl"; the record)"""


class Records(Protocol):
    """Records in a fixed order."""

    def describe(self) -> dict: ...

    def progress(self) -> float | None: ...

    def __iter__(self) -> Iterator[Record]: ...


class LocalFiles:
    """Files named by a path, folder, glob or list, read one after the other.

    Raises:
        UserError: nothing matches, or a file named outright has an extension nobody reads.
    """

    def __init__(self, path: Any, extensions: Sequence[str]) -> None:
        self.extensions = extensions
        self.files = find_files(path, extensions)
        self._sizes = {file: file.stat().st_size for file in self.files}
        self._done, self._raw = 0, None

    def describe(self) -> list:
        """Returns what tells the files' content apart without reading them."""
        return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in self.files]

    def progress(self) -> float | None:
        """Share of the bytes on disk read so far."""
        total = sum(self._sizes.values())
        inside = self._raw.tell() if self._raw is not None else 0
        return (self._done + inside) / total if total else None

    @contextmanager
    def open(self, file: Path) -> Iterator[BinaryIO]:
        """Opens one of the files, decompressed; whatever is wrong with reading it becomes a ``UserError``."""
        suffix = extension(file, self.extensions)
        self._done = sum(self._sizes[f] for f in self.files[: self.files.index(file)])
        try:
            with open(file, "rb") as raw, _decompressed(raw, suffix) as data:
                self._raw = raw
                yield data
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as e:
            raise UserError(f"data.path: {file} is not a complete {suffix[-3:]} file ({e}); copy it again.") from e
        except OSError as e:
            raise UserError(f"data.path: {file} cannot be read ({e.strerror or e}).") from e
        finally:
            self._raw = None
        self._done += self._sizes[file]

    def records(self, file: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
        """Yields the records of a .jsonl, .json or .parquet file; of a table only ``columns``, where it has them."""
        suffix = extension(file, self.extensions)
        if suffix == ".parquet":
            yield from self._parquet(file, columns)
            return
        with self.open(file) as data:
            if ".jsonl" in suffix:
                yield from json_lines(data, _line_of(file))
            else:
                yield from _json(file, data)

    def _parquet(self, file: Path, columns: Sequence[str] | None) -> Iterator[Record]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as e:
            raise UserError(f"data.path: reading {file} needs pyarrow; install it with pip install pyarrow.") from e
        try:
            with self.open(file):  # pyarrow reads the file itself, but progress and errors are as for the others
                done, self._raw = self._done, None
                table, row = pq.ParquetFile(file), 0
                names = table.schema_arrow.names
                wanted = [name for name in columns or () if name in names] or names
                for batch in table.iter_batches(batch_size=256, columns=wanted):
                    for values in batch.to_pylist():
                        row += 1
                        yield f"data.path: row {row} of {file}", values
                        self._done = done + self._sizes[file] * row // table.metadata.num_rows
                self._done = done
        except pa.ArrowException as e:
            raise UserError(f"data.path: {file} is not a readable parquet file ({_first_line(e)}).") from e


class FileRecords:
    """All records of local files; see ``LocalFiles``."""

    def __init__(self, path: Any, extensions: Sequence[str]) -> None:
        self.local = LocalFiles(path, extensions)

    def describe(self) -> dict:
        return {"files": self.local.describe()}

    def progress(self) -> float | None:
        return self.local.progress()

    def __iter__(self) -> Iterator[Record]:
        for file in self.local.files:
            yield from self.local.records(file)


def json_lines(lines: Iterable[bytes], place: Callable[[int], str]) -> Iterator[Record]:
    """Yields the objects of a JSON-lines file; ``place`` says for people where the so-many-th line stands.

    Raises:
        UserError: a line is not UTF-8, not JSON or not an object.
    """
    for number, line in enumerate(lines, start=1):
        where = place(number)
        try:
            line = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{where} is not UTF-8 ({e.reason}); convert it, e.g. with iconv -t UTF-8.") from e
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{where} is not JSON ({e.msg} at column {e.colno}); mend or remove it.") from e
        if not isinstance(row, dict):
            raise UserError(f"{where} is a {type(row).__name__}, not an object with named fields.")
        yield where, row


def _line_of(file: Path) -> Callable[[int], str]:
    return lambda number: f"data.path: line {number} of {file}"


def _json(file: Path, data: BinaryIO) -> Iterator[Record]:
    """Yields the objects of a .json file: a list of them, a single one, or one a line as in .jsonl."""
    content = data.read()
    try:
        whole = json.loads(content)
    except ValueError as e:
        if content.lstrip().startswith(b"["):
            raise UserError(f"data.path: {file} is not JSON ({_first_line(e)}); mend it.") from e
        yield from json_lines(content.splitlines(), _line_of(file))
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        where = f"data.path: record {number} of {file}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is a {type(row).__name__}, not an object with named fields.")
        yield where, row


def find_files(path: Any, extensions: Sequence[str]) -> list[Path]:
    """Expands files, folders (searched recursively) and globs, one or a list, to sorted distinct files.

    Raises:
        UserError: nothing matches, or a file named outright has an extension nobody reads.
    """
    entries = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    found: dict[Path, None] = {}
    for entry in entries:
        entry = os.path.expanduser(str(entry))
        root = Path(entry)
        if root.is_file():
            if not extension(root, extensions):
                raise UserError(
                    f"data.path: {root} has an unknown extension{nearest(''.join(root.suffixes[-2:]), extensions)}; "
                    f"readable: {' '.join(extensions)}"
                )
            matches = [root]
        elif root.is_dir():
            inside = (p for p in root.rglob("*") if not any(s.startswith(".") for s in p.relative_to(root).parts))
            matches = [p for p in inside if p.is_file() and extension(p, extensions)]
        elif any(c in entry for c in "*?["):
            inside = (Path(p) for p in glob.glob(entry, recursive=True))
            matches = [p for p in inside if p.is_file() and extension(p, extensions)]
        else:
            siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
            hint = nearest(root.name, siblings) if siblings else ""
            raise UserError(f"data.path: {entry} does not exist{hint if 'mean' in hint else '; check the path.'}")
        if not matches:
            raise UserError(f"data.path: no file in {entry} ends in one of {' '.join(extensions)}.")
        found.update(dict.fromkeys(sorted(matches)))
    if not found:
        raise UserError("data.path is an empty list; name at least one file, folder or glob.")
    return list(found)


def extension(path: Path, extensions: Sequence[str]) -> str:
    """Returns which of ``extensions`` the file's name ends in, or an empty string."""
    name = path.name.lower()
    return max((e for e in extensions if name.endswith(e)), key=len, default="")


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix.endswith(".gz"):
        return gzip.open(raw)
    return lzma.open(raw) if suffix.endswith(".xz") else raw


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class HubRows:
    """Rows of a Hugging Face data set, streamed; nothing but the rows read is downloaded."""

    def __init__(self, name: str, subset: str | None, split: str) -> None:
        self.name, self.subset, self.split = name, subset, split

    def describe(self) -> dict:
        # The hub's revision is left out on purpose: asking for it would need the network on every cached start.
        return {"name": self.name, "subset": self.subset, "split": self.split}

    def progress(self) -> None:
        """Unknown: a streamed data set does not say how long it is."""

    def __iter__(self) -> Iterator[Record]:
        try:
            import datasets
        except ImportError as e:
            raise UserError("data.name needs the datasets library; install it with pip install datasets.") from e
        where = f"data.name={self.name}" + (f" (data.subset={self.subset})" if self.subset else "")
        try:
            rows = iter(datasets.load_dataset(self.name, self.subset, split=self.split, streaming=True))
        except ValueError as e:  # unknown subset or split: the library's message lists the valid ones
            raise UserError(f"{where}, data.split={self.split}: {' '.join(str(e).split())}") from e
        except Exception as e:  # the library's network errors come from half a dozen packages
            raise UserError(_unreachable(where, e)) from e
        number = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as e:
                raise UserError(_unreachable(f"{where}, row {number + 1}", e)) from e
            number += 1
            yield f"{where}, row {number}", row


def _unreachable(where: str, error: BaseException) -> str:
    return (
        f"{where} cannot be read from the Hugging Face hub ({type(error).__name__}: {_first_line(error)}); check the "
        f"name and the network, or use data.kind=text with files or data.kind=python_docs, which needs neither."
    )
