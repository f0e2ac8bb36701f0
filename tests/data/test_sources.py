from __future__ import annotations

import gzip
import json
import lzma
import sys
import types

import pytest

from tpa_train.data.settings import DataSettings
from tpa_train.data.sources import EXTENSIONS, Hub, PythonDocs, TextFiles, make_source, split_module
from tpa_train.errors import UserError

DOCS = ["first document\nwith two lines", "zweites Dokument: größer", "third"]


def write(path, documents=DOCS, key="text"):
    """Writes documents in the format that the file's name asks for (plain text: joined)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": list(range(len(documents))), key: documents}), path)
        return path
    text = "".join(json.dumps({key: d}) + "\n" for d in documents) if ".jsonl" in name else "\n\n".join(documents)
    opener = gzip.open if name.endswith(".gz") else lzma.open if name.endswith(".xz") else open
    with opener(path, "wb") as file:
        file.write(text.encode())
    return path


def fails(path, *words, **options):
    with pytest.raises(UserError) as caught:
        list(TextFiles(path, **options))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_every_extension(tmp_path, suffix):
    source = TextFiles(write(tmp_path / f"corpus{suffix}"))
    expected = ["\n\n".join(DOCS)] if ".txt" in suffix or ".md" in suffix else DOCS
    assert list(source) == expected
    assert list(source) == expected  # a source can be read again
    assert source.progress() == 1.0


def test_folder_glob_and_list_are_sorted_and_distinct(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt.gz", ".hidden.txt", ".git/d.txt", "image.png"):
        write(tmp_path / name, [name])
    assert list(TextFiles(tmp_path)) == ["a.md", "b.txt", "sub/c.txt.gz"]
    assert list(TextFiles(str(tmp_path / "*.txt"))) == ["b.txt"]
    assert list(TextFiles(str(tmp_path / "**" / "*.txt*"))) == ["b.txt", "sub/c.txt.gz"]
    assert list(TextFiles([tmp_path / "b.txt", tmp_path])) == ["b.txt", "a.md", "sub/c.txt.gz"]
    write(tmp_path / "odd[1].txt", ["brackets"])  # an existing name wins over the glob it also is
    assert list(TextFiles(tmp_path / "odd[1].txt")) == ["brackets"]


def test_long_plain_text_is_cut_at_paragraphs(tmp_path):
    paragraphs = [f"paragraph {i} " + "x" * 400 for i in range(1000)]
    pieces = list(TextFiles(write(tmp_path / "book.txt", paragraphs), split_chars=10_000))
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)
    assert all(5_000 <= len(p) <= 15_500 for p in pieces)
    one_line = "é" * 300_000  # no place to cut at, and two bytes a character
    assert "".join(TextFiles(write(tmp_path / "line.txt", [one_line]))) == one_line


def test_byte_order_mark_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b'{"text": "one"}\r\n\n{"text": ""}\n{"text": null}\n{"text": "two"}'
    )
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree\r\nfour")
    assert list(TextFiles(tmp_path)) == ["one", "two", "three\nfour"]


def test_path_mistakes(tmp_path):
    write(tmp_path / "corpus.txt")
    fails(tmp_path / "corpsu.txt", "data.path", "does not exist", "did you mean 'corpus.txt'")
    fails(tmp_path / "nowhere" / "x", "does not exist")
    fails(tmp_path / "*.jsonl", "no file", ".jsonl")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no file")
    fails([], "empty list")
    fails(write(tmp_path / "table.csv"), "unknown extension", ".parquet")
    fails(write(tmp_path / "table.jsnl"), "did you mean '.jsonl'")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_and_odd_fields(tmp_path, suffix):
    file = write(tmp_path / f"a{suffix}", key="content")
    fails(file, "text", "data.text_key", "content")
    fails(file, "did you mean 'content'", text_key="contents")
    assert list(TextFiles(file, text_key="content")) == DOCS
    fails(write(tmp_path / f"b{suffix}", [1, 2]), "holds a int, not text", "1 of")


def test_broken_lines_are_numbered(tmp_path):
    good = json.dumps({"text": "fine"}).encode()
    for broken, word in ((b'{"text": "cut', "not JSON"), (b'["text"]', "a list"), (b'{"text": "\xff"}', "not UTF-8")):
        (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, good, broken]))
        fails(tmp_path / "a.jsonl", "line 3", word, "a.jsonl")


def test_damaged_files(tmp_path):
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    fails(tmp_path / "latin.txt", "not UTF-8", "0xf6", "iconv")
    for suffix in (".txt.gz", ".txt.xz"):
        whole = write(tmp_path / f"whole{suffix}", [str(i) for i in range(9999)]).read_bytes()
        for cut in (whole[: len(whole) // 2], b"not compressed at all"):
            (tmp_path / f"cut{suffix}").write_bytes(cut)
            fails(tmp_path / f"cut{suffix}", "not a complete", suffix[-3:])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 no more")
    fails(tmp_path / "cut.parquet", "parquet")


def test_python_docs_are_deterministic_and_mixed():
    first, again = iter(PythonDocs(0)), iter(PythonDocs(0))
    documents = [next(first) for _ in range(60)]
    assert documents == [next(again) for _ in range(60)]
    assert documents != [d for d, _ in zip(PythonDocs(1), range(60), strict=False)]
    code = sum(len(d) for d in documents if "import " in d and "def " in d)
    assert 0.2 < code / sum(map(len, documents)) < 0.8
    assert all(documents)


def test_python_docs_import_nothing(tmp_path):
    (tmp_path / "bad.py").write_text('"""Docs."""\nraise SystemExit\n')
    (tmp_path / "worse.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xf6'\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text("unseen = 1")
    documents = list(PythonDocs(0, stdlib=tmp_path))
    assert "bad\n\nDocs." in documents and "raise SystemExit" in documents
    assert any("ö" in d for d in documents) and not any("unseen" in d for d in documents)


def test_docstrings_leave_the_source(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Top."""\nclass A:\n    """About A."""\n\n    def f(self, x=1):\n        """Does f."""\n        return x\n'
    )
    docs, source = split_module("m", path)
    assert docs == "m\n\nTop.\n\n\nm.A\n\nAbout A.\n\n\nm.A.f(self, x=1)\n\nDoes f."
    assert source == "class A:\n\n    def f(self, x=1):\n        return x"


def fake_datasets(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub(monkeypatch):
    def load(name, subset, split, streaming):
        assert (name, subset, split, streaming) == ("org/set", "en", "train", True)
        return [{"text": d, "url": ""} for d in DOCS]

    fake_datasets(monkeypatch, load)
    source = make_source(DataSettings(kind="hub", name="org/set", subset="en"))
    assert list(source) == DOCS
    with pytest.raises(UserError, match="row 1, has no 'txt' field .data.text_key.; did you mean 'text'"):
        list(Hub("org/set", "en", "train", "txt"))


def test_hub_mistakes(monkeypatch):
    def raising(error):
        def load(*_, **__):
            raise error

        return load

    def breaking(*_, **__):
        yield {"text": "one"}
        raise ConnectionError("reset\nmore")

    hub = Hub("org/set", None, "trian", "text")
    fake_datasets(monkeypatch, raising(ConnectionError("no route")))
    with pytest.raises(UserError, match="data.name=org/set cannot be read .*no route.*data.kind=text"):
        list(hub)
    fake_datasets(monkeypatch, raising(ValueError("Bad split: trian.\nAvailable splits: ['train']")))
    with pytest.raises(UserError, match=r"data.split=trian: Bad split: trian. Available splits: \['train'\]"):
        list(hub)
    fake_datasets(monkeypatch, breaking)
    with pytest.raises(UserError, match="row 2 cannot be read"):
        list(hub)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(hub)


def test_kinds():
    with pytest.raises(UserError, match="data.kind=txt is unknown; did you mean 'text'"):
        make_source(DataSettings(kind="txt"))
    with pytest.raises(UserError, match="data.path is only read with data.kind=text"):
        make_source(DataSettings(path="corpus.txt"))
    with pytest.raises(UserError, match="data.name is only read with data.kind=hub"):
        make_source(DataSettings(kind="text", path="corpus.txt", name="org/set"))
    with pytest.raises(UserError, match="needs data.path"):
        make_source(DataSettings(kind="text"))
    with pytest.raises(UserError, match="needs data.name"):
        make_source(DataSettings(kind="hub"))
