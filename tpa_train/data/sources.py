"""Iterators over documents: the running Python's own texts, local files, the Hugging Face hub, conversations.

A source yields one document (a text, or a rendered conversation) at a time, in the same order every time, and describes
itself for the cache of packed data (`packing.py`). It reads lazily: packing stops at the token budget, so most of a
large corpus is never opened.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import sys
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tpa_train.data.chat import conversation_of
from tpa_train.data.records import FileRecords, HubRows, LocalFiles, Records, extension
from tpa_train.data.settings import KINDS, TRAIN_ON, DataSettings
from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.chat import ChatTemplate, Conversation
from tpa_train.gemma3.tokenizer import Tokenizer

PLAIN = (".txt", ".md")
EXTENSIONS = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz", ".txt.xz", ".md.xz", ".jsonl.xz", ".parquet")
CHAT_EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.xz", ".json.xz", ".parquet")
# Generated tables, tests and demos: long runs of numbers or of near-copies teach nothing.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data",
    "turtledemo", "lib2to3", "lib-dynload",
}  # fmt: skip


class Source(ABC):
    """Documents in a fixed order."""

    control_names = False  # whether names of control pieces in a document become these pieces

    @abstractmethod
    def describe(self) -> dict:
        """JSON-able settings and state of the content: equal descriptions must mean equal documents."""

    @abstractmethod
    def __iter__(self) -> Iterator[str | Conversation]:
        """Yields non-empty documents."""

    def progress(self) -> float | None:
        """Share of the content read so far, or None when unknown."""
        return None

    def encode(self, documents: list, tokenizer: Any) -> tuple[list[list[int]], list[list[bool]] | None]:
        """Returns the ids of documents, BOS first, and for each id whether the loss counts it (None: all do)."""
        return tokenizer.encode_batch(documents, bos=True, control=self.control_names), None


def make_source(settings: DataSettings, tokenizer: Tokenizer | None = None) -> Source:
    """Returns the source that ``settings`` name; conversations are rendered with the ``tokenizer``'s template.

    Raises:
        UserError: ``data.kind`` is unknown, or an option that it needs is missing, or one is given that it ignores.
    """
    for option, kind in (("path", "text"), ("name", "hub")):
        if settings.kind in KINDS and settings.kind not in (kind, "chat", "image_text") and getattr(settings, option):
            raise UserError(f"data.{option} is only read with data.kind={kind}; set that, or remove data.{option}.")
    if settings.kind == "image_text":
        raise UserError("data.kind=image_text is images with text, which only scripts/train.py reads; use text here.")
    if settings.kind == "python_docs":
        return PythonDocs(settings.seed)
    if settings.kind == "text":
        if not settings.path:
            raise UserError("data.kind=text needs data.path: a file, a folder, a glob or a list of them.")
        return TextFiles(settings.path, settings.text_key, settings.split_chars, settings.control_names)
    if settings.kind == "hub":
        if not settings.name:
            raise UserError("data.kind=hub needs data.name, such as data.name=HuggingFaceFW/fineweb-edu.")
        return Hub(settings.name, settings.subset, settings.split, settings.text_key, settings.control_names)
    if settings.kind == "chat":
        return Chat(chat_records(settings), ChatTemplate(tokenizer), settings.train_on)
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

    def __init__(
        self, path: Any, text_key: str = "text", split_chars: int = 100_000, control_names: bool = False
    ) -> None:
        if split_chars < 1:
            raise UserError(f"data.split_chars={split_chars} must be at least 1.")
        self.text_key = text_key
        self.split_chars, self.control_names = split_chars, control_names
        self.local = LocalFiles(path, EXTENSIONS)

    def describe(self) -> dict:
        files = self.local.describe()
        return {"kind": "text", "files": files, "text_key": self.text_key, "split_chars": self.split_chars}

    def progress(self) -> float | None:
        return self.local.progress()

    def __iter__(self) -> Iterator[str]:
        for file in self.local.files:
            if extension(file, EXTENSIONS).startswith(PLAIN):
                with self.local.open(file) as data:
                    yield from self._plain(file, data)
                continue
            for where, row in self.local.records(file, [self.text_key]):
                if document := field_of(row, self.text_key, where):
                    yield document

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


# ------------------------------------------------------------------------------------------------------------- hub


class Hub(Source):
    """A Hugging Face data set, streamed; nothing but the rows read is downloaded."""

    def __init__(self, name: str, subset: str | None, split: str, text_key: str, control_names: bool = False) -> None:
        self.rows, self.text_key, self.control_names = HubRows(name, subset, split), text_key, control_names

    def describe(self) -> dict:
        return {"kind": "hub", **self.rows.describe(), "text_key": self.text_key}

    def __iter__(self) -> Iterator[str]:
        for where, row in self.rows:
            if document := field_of(row, self.text_key, f"{where},"):
                yield document


# ------------------------------------------------------------------------------------------------------------ chat


class Chat(Source):
    """Conversations, rendered with a chat template.

    Args:
        records: in any shape that ``chat.conversation_of`` knows.
        template: of the model that is trained.
        train_on: "completions" counts what the model would write, "all" everything.
    """

    def __init__(self, records: Records, template: ChatTemplate, train_on: str = "completions") -> None:
        if train_on not in TRAIN_ON:
            raise UserError(f"data.train_on={train_on} is unknown{nearest(train_on, TRAIN_ON)}")
        self.records, self.template, self.train_on = records, template, train_on

    def describe(self) -> dict:
        return {
            "kind": "chat", **self.records.describe(), "train_on": self.train_on,
            "template": template_name(self.template.tokenizer),
        }  # fmt: skip

    def progress(self) -> float | None:
        return self.records.progress()

    def __iter__(self) -> Iterator[Conversation]:
        for where, record in self.records:
            try:
                messages = conversation_of(record)
                if not any(m["role"] == "assistant" for m in messages):
                    raise UserError("the conversation has no turn of the assistant to learn from.")
                yield self.template.render(messages)
            except UserError as e:
                raise UserError(f"{where}: {e}") from e

    def encode(self, documents: list, tokenizer: Any) -> tuple[list[list[int]], list[list[bool]] | None]:
        ids, masks = zip(*self.template.encode(documents), strict=True)
        return list(ids), list(masks) if self.train_on == "completions" else None


def template_name(tokenizer: Tokenizer) -> str:
    """Returns the text of the tokenizer's chat template, or "gemma3" for the built-in one."""
    return tokenizer.chat_template or "gemma3"


def chat_records(settings: DataSettings) -> Records:
    """Returns the records that ``data.kind=chat`` names.

    Raises:
        UserError: neither or both of ``data.path`` and ``data.name`` are given, or there are no such files.
    """
    if bool(settings.path) == bool(settings.name):
        raise UserError("data.kind=chat needs either data.path (.jsonl, .json, .parquet) or data.name, a hub data set.")
    if settings.path:
        return FileRecords(settings.path, CHAT_EXTENSIONS)
    return HubRows(settings.name, settings.subset, settings.split)
