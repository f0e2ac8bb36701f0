"""Decoding with whole models on a CPU, at tiny sizes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from tpa_train.benchmarks import command, decode_steps
from tpa_train.benchmarks.decode_steps import DecodeStepSettings, filled_cache, open_models
from tpa_train.checkpoints.export import export_model
from tpa_train.errors import UserError
from tpa_train.tpa.spec import cache_bytes, dense_specs

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
from form_students import LINEAR, random_student  # noqa: E402
from small_models import TINY  # noqa: E402


@pytest.mark.parametrize("fill,export", [("random", True), ("prefill", False)])
def test_tiny_run(fill, export, tiny, tmp_path, capsys):
    out, argv = tmp_path / "steps.json", [f"model={tiny.model}", "context=20", "batch=2", "tokens=3", f"fill={fill}"]
    if export:
        folder = export_model(random_student(LINEAR, dtype=torch.bfloat16), tmp_path / "export")
        argv.append(f"export={folder}")
    command.main(["decode_cpu", *argv, "dtype=bfloat16", f"out={out}"])
    assert "converted: K " in capsys.readouterr().out
    original, converted = json.loads(out.read_text())["rows"]
    assert [original["name"], converted["name"]] == ["original", "converted"]
    # Room for 20 tokens, one to warm up, three that are timed and one whose memory is counted.
    specs = LINEAR if export else _joint(TINY, 8)
    for row, layers in ((original, dense_specs(TINY)), (converted, specs)):
        assert row["cache_bytes"] == 2 * cache_bytes(TINY, layers, 25)
        assert row["ms_per_token"] >= row["fastest_ms"] > 0 and row["fill"] == fill and row["dtype"] == "bfloat16"
        assert row["step_bytes"] > 2 * TINY.vocab_size * 2  # the logits alone
    assert original["converted_layers"] == 0 and converted["converted_layers"] == (7 if export else 1)
    assert converted["speedup"] == pytest.approx(original["ms_per_token"] / converted["ms_per_token"])
    assert converted["bytes_ratio"] == pytest.approx(original["cache_bytes"] / converted["cache_bytes"])


def _joint(config, bits):
    layers = dense_specs(config)
    layers[5] = decode_steps.form_spec("joint", config, bits)
    return layers


def test_random_entries_stand_where_prefilled_ones_do(tiny):
    """Both fills leave a cache of the same length, no slot of which is empty, windows full."""
    settings = {fill: DecodeStepSettings(model=str(tiny.model), context=20, tokens=1, fill=fill)
                for fill in ("random", "prefill")}  # fmt: skip
    models = open_models(settings["random"])
    assert models["converted"].embed_tokens.weight is models["original"].embed_tokens.weight
    for model in models.values():
        random, prefill = (filled_cache(model, s) for s in settings.values())
        assert random.length == prefill.length == 20
        for a, b in zip(random.buffers, prefill.buffers, strict=True):
            for x, y in zip(a, b, strict=True):
                held = min(20, x.shape[1])
                assert x.shape == y.shape and x.dtype == y.dtype
                assert all(t[:, :held].flatten(2).float().abs().sum(-1).min() > 0 for t in (x, y))


@pytest.mark.parametrize("argv,message", [
    (["context=0"], "context=0 must be at least 1"), (["bits=5"], "cache bits must be one of"),
    (["form=joynt"], "did you mean 'joint'"), (["fill=zeros"], "fill=zeros is not a choice"),
    (["context=510"], "exceed the model's 512 tokens"), (["tokens=0"], "tokens=0"),
])  # fmt: skip
def test_mistakes_are_named(argv, message, tiny, monkeypatch):
    monkeypatch.setattr(decode_steps, "filled_cache", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UserError, match=message):
        command.main(["decode_cpu", f"model={tiny.model}", *argv])


def test_another_models_export(monkeypatch):
    monkeypatch.setattr(decode_steps, "open_model", lambda path, *_: random_student(
        dense_specs(TINY), TINY if path == "a" else dataclasses.replace(TINY, sliding_window=16)
    ))  # fmt: skip
    with pytest.raises(UserError, match="export=b was not made from a model of the sizes of a"):
        open_models(DecodeStepSettings(model="a", export="b"))
