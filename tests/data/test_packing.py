from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from stub_tokenizer import StubTokenizer

from tpa_train.data import packing
from tpa_train.data.compact import export_compact, import_compact
from tpa_train.data.packed import MANIFEST, SPLITS, PackedDataset, PackedStream, read_manifest
from tpa_train.data.packing import choose_heldout, default_cache_dir, pack
from tpa_train.data.settings import DataSettings
from tpa_train.errors import UserError


def documents(count, seed=0):
    rng = np.random.default_rng(seed)
    words = ["Tensor", "product", "of", "a", "key", "and", "Value", "by", "rank"]
    return [f"Document {i} " + " ".join(rng.choice(words, int(rng.integers(1, 40)))) for i in range(count)]


def settings_for(tmp_path, texts, **options):
    """Writes ``texts`` as the corpus and returns settings that pack it below ``tmp_path``."""
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    options = {"heldout_min_tokens": 0, "heldout_fraction": 0.1, "cache_dir": str(tmp_path / "cache")} | options
    return DataSettings(kind="text", path=str(tmp_path / "corpus.jsonl"), **options)


def texts_of(folder, split):
    """Decodes every document of a split."""
    stream = PackedStream(folder, split)
    ends = [*stream.starts[1:], len(stream)]
    return [StubTokenizer().decode(stream.tokens[a:b].tolist()) for a, b in zip(stream.starts, ends, strict=True)]


def test_documents_survive_packing_and_splits_are_disjoint(tmp_path):
    texts = documents(300)
    folder = pack(settings_for(tmp_path, texts), StubTokenizer(), progress=False)
    train, heldout = texts_of(folder, "train"), texts_of(folder, "heldout")
    assert sorted(train + heldout) == sorted(texts) and 10 < len(heldout) < 60
    assert [t for t in texts if t in set(train)] == train  # order kept
    for split in SPLITS:
        stream = PackedStream(folder, split)
        assert (stream.tokens[stream.starts] == 2).all() and (stream.tokens == 2).sum() == len(stream.starts)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [MANIFEST, *(f"{s}.{k}" for s in SPLITS for k in ("tokens", "starts"))]
    )


def test_rows(tmp_path):
    texts = ["ab", "cdefgh", "i", "jklmnopqrstuvwxyz"]  # 3, 7, 2 and 18 tokens: boundaries at 0, 3, 10, 12; 30 in all
    folder = pack(settings_for(tmp_path, texts, heldout_fraction=0.0), StubTokenizer(), progress=False)
    rows = PackedDataset.from_folder(folder, context=4)
    assert len(rows) == 7  # 28 of 30 tokens
    ids = [rows[i]["document_ids"].tolist() for i in range(7)]
    assert ids == [[0, 0, 0, 1], [0] * 4, [0, 0, 1, 1], [0] * 4, [0] * 4, [0] * 4, [0] * 4]
    expected = PackedStream(folder).tokens[:28].astype("int64")
    expected[::4] = 2  # every row begins with BOS, in the place of its first token
    assert torch.cat([row["token_ids"] for row in rows]).tolist() == expected.tolist()
    assert rows[0]["token_ids"].dtype == torch.int64 and rows[0]["document_ids"].dtype == torch.int32
    assert torch.equal(rows[-1]["token_ids"], rows[6]["token_ids"])
    with pytest.raises(IndexError):
        rows[7]
    joined = PackedDataset.from_folder(folder, context=30, join_documents=True)
    assert len(joined) == 1 and joined[0]["document_ids"].tolist() == [0] * 30
    whole = PackedDataset.from_folder(folder, context=30)[0]["document_ids"].tolist()
    assert whole == [0] * 3 + [1] * 7 + [2] * 2 + [3] * 18
    with pytest.raises(UserError, match="30 tokens, less than one row of 31"):
        PackedDataset.from_folder(folder, context=31)


def test_rows_pickle_without_their_tokens(tmp_path):
    folder = pack(settings_for(tmp_path, documents(200), heldout_fraction=0.0), StubTokenizer(), progress=False)
    rows = PackedDataset.from_folder(folder, context=16)
    expected = rows[3]["token_ids"]
    data = pickle.dumps(rows)
    assert len(data) < 2_000
    assert torch.equal(pickle.loads(data)[3]["token_ids"], expected)


def test_token_budget_stops_tokenising(tmp_path, caplog):
    texts = documents(5_000)
    tokenizer = StubTokenizer()
    with caplog.at_level(logging.INFO):
        folder = pack(settings_for(tmp_path, texts, max_tokens=2_001), tokenizer, progress=False)
    assert sum(read_manifest(folder).tokens.values()) == 2_001
    assert tokenizer.texts <= packing.BATCH_DOCUMENTS
    assert "data.max_tokens=2001" in caplog.text and "tokens/s" in caplog.text and "documents" in caplog.text


def test_cache_hit_and_invalidation(tmp_path):
    settings = settings_for(tmp_path, documents(50))
    first = StubTokenizer()
    folder = pack(settings, first, progress=False)
    again = StubTokenizer()
    assert pack(settings, again, progress=False) == folder and again.texts == 0
    for changed in (
        dict(max_tokens=100), dict(heldout_fraction=0.2), dict(heldout_min_tokens=10), dict(split_chars=5),
    ):  # fmt: skip
        assert pack(DataSettings(**(vars(settings) | changed)), StubTokenizer(), progress=False) != folder
    for kept in (dict(seed=3), dict(join_documents=True), dict(num_workers=2)):
        assert pack(DataSettings(**(vars(settings) | kept)), StubTokenizer(), progress=False) == folder
    assert pack(settings, StubTokenizer("cd" * 32), progress=False) != folder
    settings_for(tmp_path, documents(51))  # the file changes
    assert pack(settings, StubTokenizer(), progress=False) != folder


def test_damaged_cache_is_packed_again(tmp_path):
    settings = settings_for(tmp_path, documents(50))
    folder = pack(settings, StubTokenizer(), progress=False)
    whole = (folder / "train.tokens").read_bytes()
    (folder / "train.tokens").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="cut short"):
        PackedStream(folder)
    assert pack(settings, StubTokenizer(), progress=False) == folder
    assert (folder / "train.tokens").read_bytes() == whole


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TPA_TRAIN_CACHE", str(tmp_path / "elsewhere"))
    assert default_cache_dir() == tmp_path / "elsewhere"
    assert pack(settings_for(tmp_path, documents(9), cache_dir=None), StubTokenizer(), False).parent.name == "elsewhere"
    monkeypatch.delenv("TPA_TRAIN_CACHE")
    assert default_cache_dir().parts[-3:] == (".cache", "tpa_train", "packed")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache_dir"):
        pack(settings_for(tmp_path, documents(9), cache_dir=str(tmp_path / "file")), StubTokenizer(), False)


def test_heldout_documents_are_the_same_whatever_else_is_there(tmp_path):
    texts = documents(400)
    few = set(texts_of(pack(settings_for(tmp_path, texts[:200]), StubTokenizer(), False), "heldout"))
    many = set(texts_of(pack(settings_for(tmp_path, texts[::-1]), StubTokenizer(), False), "heldout"))
    assert few and few == many & set(texts[:200])


def test_choose_heldout():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 1_000, dtype=np.uint64)
    lengths = rng.integers(1, 100, 1_000)
    by_fraction = choose_heldout(hashes, lengths, 0.02, 0)
    assert 5 < by_fraction.sum() < 40
    by_minimum = choose_heldout(hashes, lengths, 0.02, 5_000)
    assert (by_minimum | ~by_fraction).all()  # the minimum only adds
    assert 5_000 <= lengths[by_minimum].sum() < 5_200
    capped = choose_heldout(hashes, lengths, 0.02, 10**9)
    assert abs(lengths[capped].sum() - lengths.sum() / 4) < 100
    assert not choose_heldout(hashes, lengths, 0.0, 0).any()
    assert choose_heldout(hashes[:1], lengths[:1], 0.02, 100) is None
    copies = choose_heldout(np.repeat(hashes[:10], 5), np.full(50, 7), 0.0, 8)
    assert copies.sum() == 5  # all copies of one text, or none


def test_names_of_control_pieces_are_text_unless_asked_for(tmp_path):
    class Parsing(StubTokenizer):
        def encode_batch(self, texts, bos=True, control=True):
            return super().encode_batch([t.replace("<eos>", "e") if control else t for t in texts], bos)

    lengths, texts = [], ["a <eos> b"] * 9
    for asked in (False, True):
        settings = settings_for(tmp_path, texts, control_names=asked, heldout_fraction=0.0, heldout_min_tokens=0)
        lengths.append(len(PackedStream(pack(settings, Parsing(), False))))
    assert lengths == [9 * 10, 9 * 6] and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("texts", [["a" * 999], ["d" * 700, "x" * 298]])  # the long one has the lower hash
def test_few_long_documents_give_their_end(tmp_path, texts, caplog):
    folder = pack(settings_for(tmp_path, texts, heldout_min_tokens=300), StubTokenizer(), False)
    manifest = read_manifest(folder)
    assert manifest.tokens == {"train": 750, "heldout": 250}
    for split in SPLITS:
        assert PackedStream(folder, split).starts[0] == 0
    every = np.concatenate([PackedStream(folder, s).tokens for s in SPLITS])
    assert every.tolist() == [i for ids in StubTokenizer().encode_batch(texts) for i in ids]
    assert "the last 250 tokens are held out" in caplog.text


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"data.path=.*corpus.jsonl holds no text"):
        pack(settings_for(tmp_path, ["", ""]), StubTokenizer(), False)
    with pytest.raises(UserError, match="data.max_tokens=0"):
        pack(settings_for(tmp_path, ["x"], max_tokens=0), StubTokenizer(), False)
    with pytest.raises(UserError, match="data.heldout_fraction=1.5"):
        pack(settings_for(tmp_path, ["x"], heldout_fraction=1.5), StubTokenizer(), False)
    assert not list((tmp_path / "cache").iterdir())  # nothing left by the failures


def test_a_killed_pack_leaves_nothing_usable(tmp_path):
    settings = settings_for(tmp_path, documents(500))
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = {sys.path!r}
        from stub_tokenizer import StubTokenizer
        from tpa_train.data.packing import pack
        from tpa_train.data.settings import DataSettings

        class Dying(StubTokenizer):
            def encode_batch(self, texts, bos=True, control=True):
                if self.texts > 200:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().encode_batch(texts, bos, control)

        pack(DataSettings(**{vars(settings)!r}), Dying(), progress=False)
    """)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.endswith(".tmp") and not (left / MANIFEST).exists()
    with pytest.raises(UserError, match="not a complete packed folder"):
        PackedDataset.from_folder(left, context=8)
    folder = pack(settings, StubTokenizer(), progress=False)
    assert left.exists()  # it might be another process at work
    os.utime(left, (0, 0))
    pack(DataSettings(**(vars(settings) | {"max_tokens": 99})), StubTokenizer(), progress=False)
    assert not left.exists() and read_manifest(folder)


def test_two_processes_may_pack_the_same(tmp_path):
    settings = settings_for(tmp_path, documents(50))

    class Slow(StubTokenizer):
        def encode_batch(self, texts, bos=True, control=True):
            pack(settings, StubTokenizer(), progress=False)  # the other process is quicker
            return super().encode_batch(texts, bos, control)

    folder = pack(settings, Slow(), progress=False)
    assert read_manifest(folder) and [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]


def test_packed_data_as_a_source(tmp_path):
    settings = settings_for(tmp_path, documents(100))
    folder = pack(settings, StubTokenizer(), progress=False)
    file = export_compact(folder, tmp_path / "corpus.npz")
    assert [p.name for p in tmp_path.iterdir() if "npz" in p.name] == ["corpus.npz"]
    for path in (folder, file):
        carried = DataSettings(kind="text", path=str(path), cache_dir=str(tmp_path / "other"))
        tokenizer = StubTokenizer()
        opened = pack(carried, tokenizer, progress=False)
        assert tokenizer.texts == 0 and pack(carried, tokenizer, progress=False) == opened
        for split in SPLITS:
            assert np.array_equal(PackedStream(opened, split).tokens, PackedStream(folder, split).tokens)
            assert np.array_equal(PackedStream(opened, split).starts, PackedStream(folder, split).starts)
        assert PackedStream(opened).tokens.max() > 1 << 16
        with pytest.raises(UserError, match="another tokenizer"):
            pack(carried, StubTokenizer("cd" * 32), progress=False)


def test_damaged_compact_exports(tmp_path):
    folder = pack(settings_for(tmp_path, documents(100), heldout_fraction=0.0), StubTokenizer(), progress=False)
    with pytest.raises(UserError, match="rename"):
        export_compact(folder, tmp_path / "corpus.zip")
    whole = export_compact(folder, tmp_path / "corpus.npz").read_bytes()
    half = len(whole) // 2
    for data in (whole[:half], whole[:half] + b"\0" * 40 + whole[half + 40 :], b"nothing", b""):
        (tmp_path / "bad.npz").write_bytes(data)
        with pytest.raises(UserError, match="not a complete compact export"):
            import_compact(tmp_path / "bad.npz", tmp_path / "other")
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").iterdir())
    np.savez(tmp_path / "foreign.npz", x=np.arange(3))
    with pytest.raises(UserError, match="not a complete compact export"):
        import_compact(tmp_path / "foreign.npz", tmp_path / "other")


def test_progress_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packing, "tqdm", lambda **k: _tqdm(**(k | {"delay": 0, "mininterval": 0})))
    from tqdm import tqdm as _tqdm

    pack(settings_for(tmp_path, documents(300), max_tokens=None), StubTokenizer())
    assert "tokenising" in (line := capsys.readouterr().err) and "left" in line and "M tokens" in line
