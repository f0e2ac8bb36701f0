"""Whole models decoding at tiny sizes: every engine's row, the largest batch, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from random_models import random_model, small_config, student_of, tokens

from tpa_train.benchmarks import command, decode_model
from tpa_train.benchmarks.decode_model import DecodeModelSettings, ratio_spec
from tpa_train.benchmarks.static_decoding import StaticDecoder
from tpa_train.checkpoints.export import export_model
from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES

TINY = ["shape=4b", "contexts=[24]", "steps=2", "warmup=1", "dtype=float32", "device=cpu", "compile=false"]


@pytest.fixture
def config(monkeypatch):
    config = small_config(num_kv_heads=4, vocab_size=300)
    monkeypatch.setitem(SIZES, "4b", config)
    return config


def test_a_row_for_every_engine(config, tmp_path, capsys):
    out = tmp_path / "rows.json"
    argv = ["decode_model", *TINY, "batches=[0,2]", "max_batch=3", "ratios=[2.0,50.0]", "forms=latent", "forms=joint"]
    command.main([*argv, f"out={out}"])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * (1 + 2 * 2 + 1) and not any("error" in row for row in rows)
    for row in rows:
        if row["ratio"] == 50:
            assert "no" in row["na"] and "50 times smaller" in row["na"]
            continue
        assert row["batch"] == row["asked_batch"] or (row["asked_batch"], row["batch"]) == (0, 3)
        assert row["tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["ms_per_step"])
        # Five layers of 8 tokens and one of 24, 64 numbers of 4 bytes each.
        original = row["batch"] * 64 * 64 * 4 / 2**30
        assert row["cache_gib"] * row["cache_ratio"] == pytest.approx(original)
        assert row["cache_ratio"] >= 2 if row["engine"] == "ours-tpa" else row["cache_ratio"] == pytest.approx(1)
    said = capsys.readouterr().out
    assert "times the tokens a second of" in said and "joint, 2× at 24 tokens: 3 sequences" in said
    # What has a row is not measured again.
    command.main([*argv, f"out={out}"])
    assert json.loads(out.read_text())["rows"] == rows


def test_ranks_of_a_ratio():
    """A token of the 4B caches 4096 bytes a layer; at 4 bits every 32 numbers take 20, and four norms 8."""
    c = SIZES["4b"]
    assert ratio_spec(c, "latent", 4, 4).rank_k == 200 and ratio_spec(c, "joint", 8, 4).rank_k == 800
    for form in decode_model.FORMS:
        spec = ratio_spec(c, form, 8, 4)
        assert 4096 / spec.bytes_per_token(c) >= 8 and spec.form_k == form
    with pytest.raises(UserError, match="no contextual layer at 16 bits is 8 times smaller"):
        ratio_spec(c, "contextual", 8, 16)


@torch.no_grad()
def test_transformers_decodes_what_our_model_does(config):
    """From an empty cache, token after token: the static cache is used as it is meant to be."""
    settings = DecodeModelSettings(shape="4b", dtype="float32", device="cpu")
    model = decode_model._dense_model(settings, torch.device("cpu"))
    decoding = StaticDecoder(model, compile=False).decoding(2, 24, 12)
    for layer in decoding.cache.layers:
        layer.reset()
    ids = tokens(config, 2, 9)
    decoding.position.zero_()
    for place in range(9):
        decoding.tokens = ids[:, place : place + 1]
        decoding.step()
        assert torch.equal(decoding.tokens[:, 0], model(ids[:, : place + 1])[:, -1].argmax(-1))


@pytest.mark.parametrize("wrong,message", [
    ("engines=vllm", "engines=vllm"), ("forms=latnt", "did you mean 'latent'"), ("shape=5b", "shape=5b"),
    ("contexts=[3]", "no room for 4 steps"), ("batches=[-1]", "batches: -1"), ("ratios=[1.0]", "above 1"),
    ("steps=0", "steps=0"),
])  # fmt: skip
def test_options_are_checked_first(config, wrong, message):
    with pytest.raises(UserError, match=message):
        command.main(["decode_model", *TINY, wrong])


@pytest.fixture
def exported(config, tmp_path):
    model = random_model(config, dtype=torch.float32)
    student = student_of(model, {i: (4, 8) for i in (2, 5)})
    return export_model(student, tmp_path / "export")


def test_an_exported_model_decodes_beside_the_original(config, exported, tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.json"
    argv = ["decode_model", *TINY, "engines=ours-dense", "engines=ours-tpa", "batches=[2]", f"out={out}"]
    command.main([*argv, f"export={exported}"])
    dense, row = json.loads(out.read_text())["rows"]
    assert (row["form"], row["ratio"]) == ("export", None) and "latent 4" in row["layers"]
    # Layer 2 keeps 8 of 24 tokens, layer 5 all of them; of four heads' 16 numbers 12 are left.
    assert row["cache_ratio"] == pytest.approx(64 / (64 - (8 + 24) / 4)) and dense["cache_ratio"] == 1
    assert f"export, {row['cache_ratio']:.3g}× at 24 tokens: 2 sequences" in capsys.readouterr().out
    monkeypatch.setitem(SIZES, "4b", small_config(num_kv_heads=2, vocab_size=300))
    command.main([*argv[:-1], f"out={tmp_path / 'other.json'}", f"export={exported}"])
    rows = json.loads((tmp_path / "other.json").read_text())["rows"]
    assert "was not made from a model of the sizes" in rows[1]["na"]
