"""Iterators over documents: the running Python's own texts, local files, the Hugging Face hub.

A source yields one string per document, in the same order every time, and describes itself for the cache of packed
data (`packing.py`). It reads lazily: packing stops at the token budget, so most of a large corpus is never opened.
"""

from __future__ import annotations

import ast
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import sysconfig
import tokenize
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tpa_train.data.settings import KINDS, DataSettings
from tpa_train.errors import UserError, nearest

PLAIN = (".txt", ".md")
EXTENSIONS = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz", ".txt.xz", ".md.xz", ".jsonl.xz", ".parquet")
# Generated tables, tests and demos: long runs of numbers or of near-copies teach nothing.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data",
    "turtledemo", "lib2to3", "lib-dynload",
}  # fmt: skip


class Source(ABC):
    """Documents in a fixed order."""

    @abstractmethod
    def describe(self) -> dict:
        """JSON-able settings and state of the content: equal descriptions must mean equal documents."""

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """Yields non-empty documents."""

    def progress(self) -> float | None:
        """Share of the content read so far, or None when unknown."""
        return None


def make_source(settings: DataSettings) -> Source:
    """Returns the source that ``settings`` name.

    Raises:
        UserError: ``data.kind`` is unknown, or an option that it needs is missing, or one is given that it ignores.
    """
    for option, kind in (("path", "text"), ("name", "hub")):
        if settings.kind in KINDS and settings.kind not in (kind, "image_text") and getattr(settings, option):
            raise UserError(f"data.{option} is only read with data.kind={kind}; set that, or remove data.{option}.")
    if settings.kind == "image_text":
        raise UserError("data.kind=image_text is images with text, which only scripts/train.py reads; use text here.")
    if settings.kind == "python_docs":
        return PythonDocs(settings.seed)
    if settings.kind == "text":
        if not settings.path:
            raise UserError("data.kind=text needs data.path: a file, a folder, a glob or a list of them.")
        return TextFiles(settings.path, settings.text_key, settings.split_chars)
    if settings.kind == "hub":
        if not settings.name:
            raise UserError("data.kind=hub needs data.name, such as data.name=HuggingFaceFW/fineweb-edu.")
        return Hub(settings.name, settings.subset, settings.split, settings.text_key)
    raise UserError(f"data.kind={settings.kind} is unknown{nearest(settings.kind, KINDS)}")


# ---------------------------------------------------------------------------------------------------- python_docs


class PythonDocs(Source):
    """Manual pages, docstrings and sources that every Python installation carries.

    Every module gives two documents: its docstrings as prose, and its source without them (so that no text is in
    both, which would leak held-out text into training). Nothing is imported: docstrings come from the syntax tree.
    Prose and code alternate by characters until the prose ends, so any token budget sees both.
    """

    def __init__(self, seed: int = 0, stdlib: str | Path | None = None) -> None:
        self.seed = seed
        self.stdlib = Path(stdlib or sysconfig.get_path("stdlib"))
        self._done, self._total = 0, 0

    def describe(self) -> dict:
        return {"kind": "python_docs", "python": sys.version, "seed": self.seed, "stdlib": str(self.stdlib)}

    def progress(self) -> float | None:
        return self._done / self._total if self._total else None

    def __iter__(self) -> Iterator[str]:
        modules = sorted((self._order(name), name, path) for name, path in self._modules())
        prose, code = deque(self._manual()), deque[str]()
        self._total = sum(map(len, prose)) + sum(path.stat().st_size for _, _, path in modules)
        sent = {id(prose): 0, id(code): 0}  # characters yielded of each kind
        # Modules are parsed only as the documents are asked for: the kind that is behind waits for the next module.
        for _, name, path in modules:
            docs, source = split_module(name, path)
            prose.extend([docs] if docs else [])
            code.extend([source] if source else [])
            while behind := prose if sent[id(prose)] <= sent[id(code)] else code:
                document = behind.popleft()
                sent[id(behind)] += len(document)
                self._done = sum(sent.values())
                yield document
        for document in (*prose, *code):
            self._done += len(document)
            yield document

    def _order(self, name: str) -> str:
        return hashlib.sha256(f"{self.seed}:{name}".encode()).hexdigest()

    def _manual(self) -> list[str]:
        """The language reference's topics (`help('IMPORTS')` and so on), shuffled by hash."""
        try:
            from pydoc_data.topics import topics
        except ImportError:  # some distributions ship Python without it
            return []
        return [topics[k].strip() for k in sorted(topics, key=self._order) if topics[k].strip()]

    def _modules(self) -> Iterator[tuple[str, Path]]:
        for folder, subfolders, files in os.walk(self.stdlib):
            subfolders[:] = sorted(s for s in subfolders if s not in SKIPPED_FOLDERS)
            for file in sorted(files):
                if file.endswith(".py") and not file.startswith("test_"):
                    path = Path(folder, file)
                    name = ".".join(path.relative_to(self.stdlib).with_suffix("").parts)
                    yield name.removesuffix(".__init__"), path


def split_module(name: str, path: Path) -> tuple[str, str]:
    """Returns (docstrings under their qualified names, source without docstrings) of a module file.

    A file that this Python cannot parse gives two empty strings.
    """
    try:
        with tokenize.open(path) as file:  # honours the file's coding line
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError, OSError):
        return "", ""
    docs: list[str] = []
    removed: set[int] = set()  # 0-based line numbers

    def visit(node: ast.AST, qualified: str) -> None:
        text = ast.get_docstring(node)
        if text:
            docs.append(f"{qualified}\n\n{text}")
            expr = node.body[0]
            if len(node.body) > 1 or isinstance(node, ast.Module):  # a lone docstring is the body: stays
                removed.update(range(expr.lineno - 1, expr.end_lineno))
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                signature = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                visit(child, f"{qualified.split('(')[0]}.{child.name}{signature}")

    visit(tree, name)
    kept = "".join(line for i, line in enumerate(source.splitlines(keepends=True)) if i not in removed)
    return "\n\n\n".join(docs), kept.strip()


# ------------------------------------------------------------------------------------------------------------ text


class TextFiles(Source):
    """Local files, in sorted order; see `DataSettings.path`."""

    def __init__(self, path: Any, text_key: str = "text", split_chars: int = 100_000) -> None:
        if split_chars < 1:
            raise UserError(f"data.split_chars={split_chars} must be at least 1.")
        self.text_key = text_key
        self.split_chars = split_chars
        self.files = find_files(path)
        sizes = [f.stat().st_size for f in self.files]
        self._before = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._read = 0

    def describe(self) -> dict:
        files = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in self.files]
        return {"kind": "text", "files": files, "text_key": self.text_key, "split_chars": self.split_chars}

    def progress(self) -> float | None:
        return self._read / self._before[-1] if self._before[-1] else None

    def __iter__(self) -> Iterator[str]:
        for file, before in zip(self.files, self._before[:-1], strict=True):
            suffix = extension(file)
            try:
                if suffix == ".parquet":
                    yield from self._parquet(file, before)
                    continue
                with open(file, "rb") as raw, _decompressed(raw, suffix) as data:
                    reader = self._jsonl if ".jsonl" in suffix else self._plain
                    for document in reader(file, data):
                        self._read = before + raw.tell()  # of the file on disk, compressed or not
                        yield document
            except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as e:
                raise UserError(f"data.path: {file} is not a complete {suffix[-3:]} file ({e}); copy it again.") from e
            except OSError as e:
                raise UserError(f"data.path: {file} cannot be read ({e.strerror or e}).") from e

    def _plain(self, file: Path, data: BinaryIO) -> Iterator[str]:
        text, buffer = io.TextIOWrapper(data, encoding="utf-8-sig"), ""
        try:
            while chunk := text.read(65_536):
                buffer += chunk
                while len(buffer) >= 2 * self.split_chars:
                    end = _paragraph_end(buffer, self.split_chars)
                    if piece := buffer[:end].strip():
                        yield piece
                    buffer = buffer[end:]
        except UnicodeDecodeError as e:
            raise UserError(
                f"data.path: {file} is not UTF-8 (byte {e.object[e.start]:#04x} within its first "
                f"{text.buffer.tell():,} bytes); convert it, for example with iconv -t UTF-8."
            ) from e
        # What is left may hold up to two pieces' worth: cut once more, so that no piece is far above the others.
        if len(buffer) > 1.5 * self.split_chars:
            end = _paragraph_end(buffer, len(buffer) // 2)
            pieces = [buffer[:end], buffer[end:]]
        else:
            pieces = [buffer]
        yield from (p.strip() for p in pieces if p.strip())

    def _jsonl(self, file: Path, data: BinaryIO) -> Iterator[str]:
        for where, row in _objects(file, data, self.text_key):
            if document := field_of(row, self.text_key, where):
                yield document

    def _parquet(self, file: Path, before: int) -> Iterator[str]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as e:
            raise UserError(f"data.path: reading {file} needs pyarrow; install it with pip install pyarrow.") from e
        try:
            table = pq.ParquetFile(file)
            keys = table.schema_arrow.names
            if self.text_key not in keys:
                field_of(dict.fromkeys(keys), self.text_key, f"data.path: {file}")
            rows = 0
            for batch in table.iter_batches(batch_size=256, columns=[self.text_key]):
                for document in batch.column(0).to_pylist():
                    rows += 1
                    where = f"data.path: row {rows} of {file}"
                    if document := field_of({self.text_key: document}, self.text_key, where):
                        size = self._before[self.files.index(file) + 1] - before
                        self._read = before + size * rows // max(1, table.metadata.num_rows)
                        yield document
        except pa.ArrowException as e:
            raise UserError(f"data.path: {file} is not a readable parquet file ({_first_line(e)}).") from e


def find_files(path: Any) -> list[Path]:
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
            if not extension(root):
                raise UserError(
                    f"data.path: {root} has an unknown extension{nearest(''.join(root.suffixes[-2:]), EXTENSIONS)}; "
                    f"readable: {' '.join(EXTENSIONS)}"
                )
            matches = [root]
        elif root.is_dir():
            inside = (p for p in root.rglob("*") if not any(s.startswith(".") for s in p.relative_to(root).parts))
            matches = [p for p in inside if p.is_file() and extension(p)]
        elif any(c in entry for c in "*?["):
            matches = [Path(p) for p in glob.glob(entry, recursive=True) if os.path.isfile(p) and extension(Path(p))]
        else:
            siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
            hint = nearest(root.name, siblings) if siblings else ""
            raise UserError(f"data.path: {entry} does not exist{hint if 'mean' in hint else '; check the path.'}")
        if not matches:
            raise UserError(f"data.path: no file in {entry} ends in one of {' '.join(EXTENSIONS)}.")
        found.update(dict.fromkeys(sorted(matches)))
    if not found:
        raise UserError("data.path is an empty list; name at least one file, folder or glob.")
    return list(found)


def jsonl_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """Yields every line of a .jsonl file as (what to call it in messages, object).

    Raises:
        UserError: the file cannot be read, or a line is not an object.
    """
    try:
        with open(file, "rb") as data:
            yield from _objects(file, data, "text")
    except OSError as e:
        raise UserError(f"data.path: {file} cannot be read ({e.strerror or e}).") from e


def _objects(file: Path, data: BinaryIO, key: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(data, start=1):
        where = f"data.path: line {number} of {file}"
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
            raise UserError(f"{where} is a {type(row).__name__}, not an object with a '{key}' field.")
        yield where, row


def extension(path: Path) -> str:
    """Returns which of EXTENSIONS the file's name ends in, or an empty string."""
    name = path.name.lower()
    return max((e for e in EXTENSIONS if name.endswith(e)), key=len, default="")


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix.endswith(".gz"):
        return gzip.open(raw)
    return lzma.open(raw) if suffix.endswith(".xz") else raw


def _paragraph_end(text: str, target: int) -> int:
    """Returns where to cut ``text`` at ``target`` characters or a little later, best at a blank line."""
    for mark in ("\n\n", "\n", " "):
        at = text.find(mark, target, target + target // 2)
        if at >= 0:
            return at + len(mark)
    return target


def field_of(row: dict, key: str, where: str) -> str:
    """Returns the text in ``row[key]``, empty for null.

    Raises:
        UserError: there is no such field, or it holds something other than text.
    """
    if key not in row:
        raise UserError(f"{where} has no '{key}' field (data.text_key){nearest(key, row)}")
    if row[key] is not None and not isinstance(row[key], str):
        raise UserError(f"{where}: field '{key}' (data.text_key) holds a {type(row[key]).__name__}, not text.")
    return row[key] or ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ------------------------------------------------------------------------------------------------------------- hub


class Hub(Source):
    """A Hugging Face data set, streamed; nothing but the rows read is downloaded."""

    def __init__(self, name: str, subset: str | None, split: str, text_key: str) -> None:
        self.name, self.subset, self.split, self.text_key = name, subset, split, text_key

    def describe(self) -> dict:
        # The hub's revision is left out on purpose: asking for it would need the network on every cached start.
        return {"kind": "hub", "name": self.name, "subset": self.subset, "split": self.split, "text_key": self.text_key}

    def __iter__(self) -> Iterator[str]:
        for where, row in hub_rows(self.name, self.subset, self.split):
            if document := field_of(row, self.text_key, where):
                yield document


def hub_rows(name: str, subset: str | None, split: str) -> Iterator[tuple[str, dict]]:
    """Yields a data set's rows, streamed, as (what to call the row in messages, row).

    Raises:
        UserError: the library is missing, the data set is unknown, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as e:
        raise UserError("data.name= needs the datasets library; install it with pip install datasets.") from e
    where = f"data.name={name}" + (f" (data.subset={subset})" if subset else "")
    try:
        rows = iter(datasets.load_dataset(name, subset, split=split, streaming=True))
    except ValueError as e:  # unknown subset or split: the library's message lists the valid ones
        raise UserError(f"{where}, data.split={split}: {' '.join(str(e).split())}") from e
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
        yield f"{where}, row {number},", row


def _unreachable(where: str, error: BaseException) -> str:
    return (
        f"{where} cannot be read from the Hugging Face hub ({type(error).__name__}: {_first_line(error)}); check the "
        f"name and the network, or use data.kind=text with files or data.kind=python_docs, which needs neither."
    )
