"""The training benchmark on a tiny model: both sides run, and what is timed is what train.py runs."""

from __future__ import annotations

import pytest
import torch
from random_models import tokens
from tiny_runs import write_text_file

from tpa_train.benchmarks.train import TrainBenchmark, low_rank, render, run, to_transformers
from tpa_train.checkpoints import load_pretrained
from tpa_train.errors import UserError


@pytest.fixture
def settings(tiny, tmp_path):
    text = write_text_file(tmp_path / "text.md")
    return TrainBenchmark(
        model=str(tiny.model), data=str(text), context=32, tokens=128, batch_size=2, micro_batches=[1, 3, 4], steps=2,
        warmup=1, layerwise_tokens=96, cache_ratio=2.5, calibration_tokens=256,
        options=["trainer.precision=float32", "budget.context=512", f"data.cache_dir={tmp_path}"],
    )  # fmt: skip


def test_rows_of_both_sides(settings):
    rows = run(settings)
    assert [(r["name"], r["rows_at_a_time"]) for r in rows] == [
        ("ours, layer-wise", 3), ("ours", 2), ("transformers", 1), ("transformers", 4),
    ]  # fmt: skip
    for row in rows:
        assert row["steps"] == 2
        assert row["tokens_per_s"] == pytest.approx(2 * row["tokens_per_step"] / row["seconds"])
        assert row["tokens_per_step"] == (96 if "layer-wise" in row["name"] else 128)
    assert "times as many tokens a second" in render(rows)


@torch.no_grad()
def test_the_plain_models_compute_what_ours_do(tiny):
    ours = load_pretrained(tiny.model)
    ids = tokens(ours.config, 2, 40)
    theirs = to_transformers(ours, torch.float32).eval()
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-4)
    assert not torch.allclose(low_rank(theirs, ours)(ids).logits, ours(ids), atol=1e-2)


@pytest.mark.parametrize("changed,message", [({"tokens": 100}, "batch_size"), ({"stages": ["factorize"]}, "stages")])
def test_sizes_that_do_not_fit_are_refused(settings, changed, message):
    for name, value in changed.items():
        setattr(settings, name, value)
    with pytest.raises(UserError, match=message):
        run(settings)
