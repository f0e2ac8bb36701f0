"""Two processes train as one does that accumulates two batches: gradients, weights, checkpoints; and fail together."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from training_process import CASES, STOP, Watched, rows, train

from tpa_train.distributed.launching import launch


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(what both processes found, their folder, exit status, what they wrote to stderr)."""
    folder = tmp_path_factory.mktemp("together")
    script = Path(__file__).with_name("training_process.py")
    with open(folder / "stderr", "w") as said:
        saved = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            status = launch([sys.executable, str(script), str(folder)], 2)
        finally:
            os.dup2(saved, 2)
    said = (folder / "stderr").read_text()
    assert (folder / "0.pt").exists(), said
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(2)], folder, status, said


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {case: train(case, "single", folder) for case in CASES}, folder


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_weights_are_those_of_one_process(together, alone, case, strategy):
    expected = alone[0][case]
    assert sum(name.startswith("gradient.") for name in expected) > 5
    for found in together[0]:
        close(found[f"{case} {strategy}"], expected)


def without_gradients(found):
    return {name: tensor for name, tensor in found.items() if not name.startswith("gradient.")}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_checkpoints_are_the_same_for_every_strategy(together, alone, strategy):
    whole = without_gradients(alone[0]["attention"])
    close(together[0][0][f"resumed {strategy}"], whole)
    ours, single = (
        torch.load(folder / f"attention-{name}.ckpt", weights_only=True)
        for folder, name in ((together[1], strategy), (alone[1], "single"))
    )
    assert ours["global_step"] == single["global_step"] == STOP
    close(ours["state_dict"], single["state_dict"])
    for state, expected in zip(*(c["optimizer_states"][0]["state"].values() for c in (ours, single)), strict=True):
        close(state, expected)


def test_a_masked_step_is_the_mean_over_its_counted_tokens(tmp_path, alone, monkeypatch):
    """Σ n·g / Σ n, with g the gradient of each batch's own mean."""
    gradients, counts = [], []
    monkeypatch.setattr(Watched, "_weighted", lambda self, loss: loss)
    for i in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("training_process.rows", lambda config, masked, i=i: [rows(config, masked)[i]] * 6)
            found = train("masked", "single", tmp_path)
        gradients.append({n: g for n, g in found.items() if n.startswith("gradient.")})
        counts.append(5 + 3 * i)
    for name in gradients[0]:
        expected = sum(n * g[name] for n, g in zip(counts, gradients, strict=True)) / sum(counts)
        torch.testing.assert_close(alone[0]["masked"][name], expected, rtol=1e-7, atol=1e-12)


def test_the_benchmark_trains_in_shards_that_nobody_held_whole(together):
    rows_ = [json.loads((together[1] / f"{i}.json").read_text()) for i in range(2)]
    for row in rows_:
        assert (row["strategy"], row["model"], row["devices"], row["rows"]) == ("fsdp2", "tiny-random", 2, 2)
        assert row["tokens_per_s"] == pytest.approx(2 * 32 / row["seconds_per_step"])
    assert len(rows_[0]["peak_gib"]) == 2 and rows_[0]["peak_gib"] == rows_[1]["peak_gib"]


def test_one_sentence_and_no_hang_when_one_process_fails(together):
    _, _, status, said = together
    assert status == 2
    assert [line for line in said.splitlines() if line.startswith("error:")] == [
        "error: the second process found a mistake."
    ]
    assert "Traceback" not in said
