"""Images with text as rows: whole images, no padding, every stage its own rows, data sets fetched once."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multimodal_models import VISION, picture

from tpa_train.data.image_text import Document, ImageTextDataModule, ImageTextDataset, cut, fetch, pack_rows
from tpa_train.data.rows import collate_rows, shortened
from tpa_train.data.settings import DataSettings
from tpa_train.errors import UserError
from tpa_train.gemma3.images import image_blocks
from tpa_train.gemma3.processing import ImageProcessor

IMAGE, T = VISION.image_token_id, VISION.tokens_per_image


class CharacterTokenizer:
    """One id a character."""

    bos_id, vocab_size, fingerprint = 2, 200, "characters"

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [2] * bos + [100 + ord(c) % 90 for c in text]


def document(number: int, *parts: int | None) -> Document:
    """Text of so many tokens, an image at None."""
    ids, views = [2], []
    for part in parts:
        if part is None:
            ids += [91, *[IMAGE] * T, 92]
            views.append((f"{number}-{len(views)}", 1))
        else:
            ids += [100 + number % 90] * part
    text = [i for i in ids if i not in (91, 92, IMAGE)]
    return Document(np.array(ids, np.int32), tuple(views), np.array(text, np.int32), number)


PARTS = st.lists(st.one_of(st.integers(1, 12), st.none()), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(made=st.lists(PARTS, min_size=1, max_size=8), context=st.integers(10, 40))
def test_rows_hold_whole_images_and_no_padding(made, context):
    documents = [document(n, *parts) for n, parts in enumerate(made)]
    rows = pack_rows(documents, context, VISION)
    shown = [view for row in rows for view in row.views]
    for row in rows:
        blocks = image_blocks(torch.from_numpy(row.ids)[None].long(), IMAGE)[0]
        assert len(row.ids) == context and int((blocks >= 0).sum()) == T * len(row.views)
        sizes = [int((blocks == n).sum()) for n in range(int(blocks.max()) + 1)]
        assert set(sizes) <= {T}
        starts = np.flatnonzero(np.diff(row.document_ids, prepend=-1))
        assert (row.ids[starts] == 2).all()  # every document begins with BOS
        assert (np.diff(row.document_ids) >= 0).all()
    fitting = [view for d in documents for view in cut(d, context, VISION)[1]]
    assert shown == fitting  # every image of every document that fits, once and in order


def test_batches_carry_the_images_of_their_rows(tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        picture(seed).save(tmp_path / f"{name}.png")
    documents = [
        Document(d.ids, tuple((tmp_path / f"{n}.png", 1) for n in names), d.text_ids, d.hash)
        for d, names in ((document(0, 3, None, None), "ab"), (document(1, 25), ""), (document(2, None, 9), "c"))
    ]
    rows = ImageTextDataset(documents, 26, VISION)
    batch = collate_rows([rows[i] for i in range(3)])
    expected = torch.cat([ImageProcessor(VISION).views(tmp_path / f"{n}.png") for n in "abc"])
    assert torch.equal(batch["images"], expected) and batch["token_ids"].shape == (3, 26)
    joined = ImageTextDataset(documents, 26, VISION, join_documents=True)
    assert not joined[0]["document_ids"].any() and rows[0]["document_ids"].any()
    short = shortened(batch, 12, VISION)  # inside the first row's second image
    assert short["token_ids"].shape == (3, 11) and torch.equal(short["images"], expected[[0, 2]])
    assert shortened(batch, 30, VISION).keys() == batch.keys()
    assert shortened({"token_ids": batch["token_ids"]}, 5)["token_ids"].shape == (3, 5)


def write_pairs(folder, count: int = 12):
    lines = []
    for i in range(count):
        picture(i, 300 if i % 2 else 40, 700 if i % 2 else 50).save(folder / f"{i}.png")
        lines.append(json.dumps({"picture": f"{i}.png", "caption": f"picture {i} <start_of_image> of something"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def module(path, context: int = 64, **options) -> ImageTextDataModule:
    given = DataSettings(
        kind="image_text", path=str(path), image_key="picture", text_key="caption", heldout_min_tokens=1, **options
    )
    return ImageTextDataModule(given, CharacterTokenizer(), context, 2, stage_rows={"calibration": 2}, vision=VISION)


def test_stages_have_rows_of_their_own_and_some_text_is_held_out(tmp_path):
    data = module(write_pairs(tmp_path))
    data.setup()
    calibration, distill = data.rows_of("calibration"), data.rows_of("distill")
    assert len(calibration) == 2 and not set(calibration) & set(distill)
    batch = next(iter(data.calibration_dataloader()))
    assert batch["token_ids"].shape == (2, 64) and batch["images"].dtype == torch.uint8
    assert len(batch["images"]) * T == int((batch["token_ids"] == IMAGE).sum()) > 0
    heldout = data.heldout_rows(64)[0]
    trained = {tuple(data.train_dataset[i]["token_ids"].tolist()) for i in range(len(data.train_dataset))}
    assert tuple(heldout["token_ids"].tolist()) not in trained
    copies = data.copy_texts(5, 2)
    assert copies.shape == (2, 11) and torch.equal(copies[:, 1:6], copies[:, 6:]) and not (copies == IMAGE).any()
    with pytest.raises(UserError, match="do not fit the .* text tokens held out"):
        data.copy_texts(100_000, 1)
    again = module(tmp_path / "pairs.jsonl")
    assert again.state_dict() == data.state_dict()
    assert module(tmp_path / "pairs.jsonl", max_tokens=200).state_dict()["data"] != data.state_dict()["data"]
    picture(77, 40, 50).save(tmp_path / "0.png")  # of the same size, but another picture
    assert module(tmp_path / "pairs.jsonl").state_dict()["data"] != data.state_dict()["data"]


def test_pan_and_scan_shows_long_images_in_crops(tmp_path):
    path = write_pairs(tmp_path)
    plain, crops = (module(path, 200, pan_and_scan=on).train_dataset for on in (False, True))
    count = [sum(len(d[i]["images"]) for i in range(len(d))) for d in (plain, crops)]
    assert count[1] > count[0]
    for row in (crops[i] for i in range(len(crops))):
        assert len(row["images"]) * T == int((row["token_ids"] == IMAGE).sum())


def test_a_named_data_set_is_fetched_once(tmp_path, monkeypatch):
    picture(0).save(tmp_path / "0.png")
    loads = []

    def load_dataset(name, subset, split, streaming):
        loads.append((name, subset, split, streaming))
        for i in range(8):
            image = picture(i) if i % 2 else {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}
            yield {"picture": [image] if i % 3 else image, "caption": f"text {i}"}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    options = dict(path=None, name="org/set", cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        data = module(tmp_path)
        data.settings = DataSettings(**{**vars(data.settings), **options})
        data.setup()
    assert loads == [("org/set", None, "train", True)]
    documents = [d for part in data._documents.values() for d in part]
    assert len(documents) == 8 and all(len(d.views) == 1 for d in documents)
    row = data.train_dataset[0]
    assert len(row["images"]) * T == int((row["token_ids"] == IMAGE).sum()) > 0
    data = module(tmp_path)
    data.settings = DataSettings(**{**vars(data.settings), **options, "image_key": "pictur", "subset": "x"})
    with pytest.raises(UserError, match=r"no 'pictur' field \(data.image_key\); did you mean 'picture'"):
        data.setup()


def test_two_processes_that_fetch_at_once_end_with_one_folder(tmp_path, monkeypatch):
    settings = DataSettings(kind="image_text", name="org/set", cache_dir=str(tmp_path))
    faster = []

    def load_dataset(*_, **__):
        if not faster:
            faster.append(None)
            faster.append(fetch(settings))  # the other one, while this one reads
        yield {"image": picture(0), "text": "a text"}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert fetch(settings) == faster[1] and [path.name for path in tmp_path.iterdir()] == [faster[1].name]
    assert (faster[1] / "examples.jsonl").is_file() and len(list(faster[1].iterdir())) == 2


def test_too_little(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"picture": None, "caption": "alone"}) + "\n")
    with pytest.raises(UserError, match="found 1 examples; it needs two"):
        module(tmp_path / "pairs.jsonl").setup()
    with pytest.raises(UserError, match="reads one .jsonl file"):
        module(tmp_path).setup()
    with pytest.raises(UserError, match="does not exist"):
        module(tmp_path / "none.jsonl").setup()
