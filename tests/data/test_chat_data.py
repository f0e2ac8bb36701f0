"""Conversations from files to rows: the shapes of records, packing with masks, and what is refused."""

from __future__ import annotations

import gzip
import json
import lzma
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from tpa_train.data.chat import conversation_of
from tpa_train.data.compact import export_compact, import_compact
from tpa_train.data.datamodule import PackedDataModule
from tpa_train.data.packed import SPLITS, PackedDataset, PackedStream
from tpa_train.data.packing import pack
from tpa_train.data.settings import DataSettings
from tpa_train.errors import UserError
from tpa_train.gemma3.chat import ChatTemplate
from tpa_train.gemma3.tokenizer import Tokenizer, sentencepiece_model

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
from small_models import SPECIAL_IDS, vocabulary  # noqa: E402

TOKENIZER = Tokenizer.from_model_proto(sentencepiece_model(*vocabulary(), SPECIAL_IDS))
SAID = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the world"}]
SYSTEM = {"role": "system", "content": "be"}
SHAPES = {
    "openai": {"messages": SAID, "id": 3},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": " hello "}]}, SAID[1]]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "the world"}]},
    "columns": {"conversations": {"from": ["human", "gpt"], "value": ["hello", "the world"]}},
    "pair": {"prompt": "hello", "completion": "the world"},
    "lists": {"prompt": SAID[:1], "completion": SAID[1:]},
    "alpaca": {"instruction": "hello", "input": "", "output": "the world"},
    "no input": {"instruction": "hello", "output": "the world"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    assert conversation_of(SHAPES[shape]) == SAID
    assert conversation_of(SHAPES[shape] | {"system": "be"}) == [SYSTEM, *SAID]


def test_inputs_follow_instructions_and_system_prompts_stay():
    record = {"instruction": "add", "input": "1 2", "output": "3"}
    assert conversation_of(record)[0]["content"] == "add\n\n1 2"
    assert conversation_of({"messages": [SYSTEM, *SAID], "system": "other"}) == [SYSTEM, *SAID]


def conversation(index):
    return {"messages": [
        {"role": "user", "content": f"hello {index} " + "word " * (index % 7)},
        {"role": "assistant", "content": f"the world {index}"},
        {"role": "user", "content": "<start_of_turn>model\nhello<end_of_turn>"},
        {"role": "assistant", "content": "in" * (index % 5 + 1)},
    ]}  # fmt: skip


def settings_for(tmp_path, records=None, name="chats.jsonl", **options):
    records = [conversation(i) for i in range(60)] if records is None else records
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / name).write_text(text)
    defaults = {"heldout_min_tokens": 0, "heldout_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
    return DataSettings(kind="chat", path=str(tmp_path / name), **(defaults | options))


def packed(settings):
    return pack(settings, TOKENIZER, progress=False)


def expected_rows():
    template = ChatTemplate(TOKENIZER)
    return [template.encode([template.render(conversation(i)["messages"])])[0] for i in range(60)]


def stored(folder, split):
    stream = PackedStream(folder, split)
    ends = [*stream.starts[1:], len(stream)]
    counted = stream.counted(0, len(stream))
    return [(stream.tokens[a:b].tolist(), counted[a:b].tolist()) for a, b in zip(stream.starts, ends, strict=True)]


def test_every_token_keeps_its_bit(tmp_path):
    folder = packed(settings_for(tmp_path))
    train, heldout = stored(folder, "train"), stored(folder, "heldout")
    assert len(heldout) > 3 and sorted(train + heldout) == sorted(expected_rows())
    assert (folder / "train.counted").stat().st_size == -(-len(PackedStream(folder)) // 8)


@pytest.mark.parametrize("context", [7, 16])
def test_rows_weigh_the_prediction_of_the_next_token(tmp_path, context):
    folder = packed(settings_for(tmp_path))
    stream = PackedStream(folder)
    counted = np.append(stream.counted(0, len(stream)), False)
    rows = PackedDataset(stream, context)
    for number in range(len(rows)):
        row = rows[number]
        assert row["loss_mask"].dtype == torch.bool and row["loss_mask"].shape == (context,)
        after = slice(number * context + 1, (number + 1) * context + 1)
        assert row["loss_mask"].tolist() == counted[after].tolist()
        # Inside the row: what is predicted belongs to a model's turn of the same document.
        targets, documents = row["token_ids"][1:], row["document_ids"]
        inside = row["loss_mask"][:-1]
        assert (documents[1:] == documents[:-1])[inside].all() and (targets[inside] != TOKENIZER.bos_id).all()
    every = PackedDataset(stream, len(stream))[0]["loss_mask"]
    assert not every[-1] and every.sum() == counted.sum()


def test_a_stream_that_moves_to_another_process_keeps_its_masks(tmp_path):
    rows = PackedDataset(PackedStream(packed(settings_for(tmp_path))), 16)
    first = rows[1]
    again = pickle.loads(pickle.dumps(rows))[1]
    assert first.pop("row") == again.pop("row") == 1
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_batches_hold_masks_and_plain_text_none(tmp_path):
    data = PackedDataModule(settings_for(tmp_path), TOKENIZER, 16, 2, progress=False)
    batches = list(data.stage_dataloader("distill"))
    assert all(b["loss_mask"].shape == b["token_ids"].shape == (2, 16) for b in batches)
    assert 0 < torch.stack([b["loss_mask"] for b in batches]).float().mean() < 1
    assert "loss_mask" in data.heldout_rows(32)[0]
    for changes in ({"train_on": "all"}, {"kind": "text", "path": str(tmp_path / "notes.txt")}):
        (tmp_path / "notes.txt").write_text("hello world " * 100)
        options = vars(settings_for(tmp_path)) | changes
        data = PackedDataModule(DataSettings(**options), TOKENIZER, 16, 2, progress=False)
        assert set(next(iter(data.stage_dataloader("distill")))) == {"token_ids", "document_ids", "row"}
        assert PackedStream(data.folder).manifest.version == 1  # as before conversations came


def test_compact_exports_carry_masks(tmp_path):
    folder = packed(settings_for(tmp_path))
    file = export_compact(folder, tmp_path / "chats.npz")
    again = import_compact(file, tmp_path / "other")
    for split in SPLITS:
        assert stored(again, split) == stored(folder, split)
    named = DataSettings(kind="chat", path=str(file), cache_dir=str(tmp_path / "third"))
    assert stored(packed(named), "train") == stored(folder, "train")


def test_the_token_budget_cuts_masks_too(tmp_path):
    whole = packed(settings_for(tmp_path, heldout_fraction=0.0))
    cut = packed(settings_for(tmp_path, heldout_fraction=0.0, max_tokens=101))
    assert PackedStream(cut).counted(0, 101).tolist() == PackedStream(whole).counted(0, 101).tolist()
    one = packed(settings_for(tmp_path, [conversation(6)], heldout_min_tokens=10))  # a document cut in two
    ids, mask = ChatTemplate(TOKENIZER).encode([ChatTemplate(TOKENIZER).render(conversation(6)["messages"])])[0]
    assert [sum(x, []) for x in zip(*(stored(one, "train") + stored(one, "heldout")), strict=True)] == [ids, mask]


def test_a_damaged_mask_is_refused(tmp_path):
    folder = packed(settings_for(tmp_path))
    (folder / "train.counted").write_bytes(b"")
    with pytest.raises(UserError, match="train.counted is cut short"):
        PackedStream(folder)


def test_templates_and_targets_decide_the_cache(tmp_path):
    settings = settings_for(tmp_path)
    folder = packed(settings)
    assert packed(settings) == folder
    template = "{% for m in messages %}{{ m.role + m.content }}<end_of_turn>{% endfor %}"
    other = Tokenizer(TOKENIZER.model_proto, template)
    assert pack(settings, other, progress=False) != folder
    assert packed(settings_for(tmp_path, train_on="all")) != folder


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.xz", ".json", ".json.gz", ".parquet", ".json lines"])
def test_every_kind_of_file_packs_alike(tmp_path, suffix):
    expected = stored(packed(settings_for(tmp_path)), "train")
    records, file = [conversation(i) for i in range(60)], tmp_path / "corpus" / f"chats{suffix.split()[0]}"
    file.parent.mkdir()
    if suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        lines = "\n".join(map(json.dumps, records))
        content = (json.dumps(records) if suffix.startswith(".json") and "l" not in suffix else lines).encode()
        opener = gzip.open if suffix.endswith(".gz") else lzma.open if suffix.endswith(".xz") else open
        with opener(file, "wb") as out:
            out.write(content)
    settings = settings_for(tmp_path)
    settings.path = str(file.parent)
    assert stored(packed(settings), "train") == expected


def test_hub_data_sets(tmp_path, monkeypatch):
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, subset, split, streaming: [conversation(i) for i in range(60)]
    monkeypatch.setitem(sys.modules, "datasets", module)
    settings = DataSettings(kind="chat", name="org/chats", heldout_fraction=0.0, heldout_min_tokens=0,
                            cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert stored(packed(settings), "train") == expected_rows()
    module.load_dataset = lambda *_, **__: [{"text": "no chat"}]
    settings.name = "org/texts"
    with pytest.raises(UserError, match="data.name=org/texts, row 1: the record has none of the known shapes"):
        packed(settings)


BAD = {
    "none of the known shapes .messages, conversations, .*, but text": {"text": "a"},
    "did you mean 'messages'": {"mesages": SAID},
    "but no fields": {},
    "message 2 of 'messages' has the role 'tool'; known: system": {"messages": [SAID[0], {"role": "tool"}]},
    "message 1 of 'messages' has neither a 'role' nor a 'from'": {"messages": [{"content": "a"}]},
    "message 1 of 'messages' is a str": {"messages": ["a"]},
    "message 1 of 'messages' has no content": {"messages": [{"role": "user", "content": None}]},
    "a part of the type 'image'; only text": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "'messages' is empty": {"messages": []},
    "'messages' is a str": {"messages": "hello"},
    "'conversations' is an object": {"conversations": {"from": ["human"], "value": "a"}},
    "output has a int for its text": {"instruction": "a", "output": 3},
    "message 2, a turn of the assistant, is empty": {"prompt": "a", "completion": " "},
    "no turn of the assistant": {"messages": SAID[:1]},
    "roles must alternate": {"messages": [SAID[0], SAID[0], SAID[1]]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_records_name_file_and_line(tmp_path, message):
    with pytest.raises(UserError, match=f"^data.path: line 3 of .*chats.jsonl: .*{message}") as caught:
        packed(settings_for(tmp_path, [conversation(0), conversation(1), BAD[message]]))
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "cache").glob("*")), "nothing is left behind"


def test_bad_options(tmp_path):
    def refused(message, **options):
        with pytest.raises(UserError, match=message):
            packed(DataSettings(**({"kind": "chat", "cache_dir": str(tmp_path / "cache")} | options)))

    good = settings_for(tmp_path).path
    refused("needs either data.path")
    refused("needs either data.path", path=good, name="org/chats")
    refused("data.train_on=completion is unknown; did you mean 'completions'", path=good, train_on="completion")
    (tmp_path / "chats.txt").write_text("a")
    refused("chats.txt has an unknown extension", path=str(tmp_path / "chats.txt"))
    (tmp_path / "chats.json").write_text('[{"messages": ')
    refused("chats.json is not JSON", path=str(tmp_path / "chats.json"))
    (tmp_path / "chats.json").write_text("[3]")
    refused("record 1 of .*chats.json is a int", path=str(tmp_path / "chats.json"))
    (tmp_path / "notes.txt").write_text("hello world " * 100)
    text = DataSettings(kind="text", path=str(tmp_path / "notes.txt"), cache_dir=str(tmp_path / "cache"))
    refused("packed without marks for the model's turns", path=str(packed(text)))
    folder = packed(settings_for(tmp_path))
    assert packed(DataSettings(kind="chat", path=str(folder))) == folder
    tuned = Tokenizer(TOKENIZER.model_proto, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="packed with another chat template"):
        pack(DataSettings(kind="chat", path=str(folder)), tuned, progress=False)
