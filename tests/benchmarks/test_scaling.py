"""The scaling benchmark: options, one process's row, and what becomes of processes that fail."""

from __future__ import annotations

import json

import pytest
import torch

from tpa_train.benchmarks import command, scaling
from tpa_train.benchmarks.scaling import OUT_OF_MEMORY, ScalingSettings, measure, meta_models, run
from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES

TINY = dict(model="tiny", context=32, steps=2, warmup=1, device="cpu")


@pytest.mark.parametrize("argv,message", [
    (["model=4c"], "did you mean '4b'"), (["strategies=fsdp"], "strategies=fsdp is unknown; did you mean 'fsdp2'"),
    (["devices=0"], "devices=0 must be at least 1"), (["steps=0"], "steps=0"), (["context=1"], "context=1 must be 2"),
    (["context=65536"], "2 to 32768"), (["scope=everything"], "scope=everything"),
])  # fmt: skip
def test_mistakes_are_named(argv, message):
    with pytest.raises(UserError, match=message):
        command.main(["scaling", "device=cpu", *argv])


@pytest.mark.parametrize("recomputed", [None, True])
def test_one_process(recomputed):
    row = measure(ScalingSettings(**TINY, activation_checkpointing=recomputed, precision="float32"), "single")
    assert (row["strategy"], row["devices"], row["rows"], row["dtype"]) == ("single", 1, 1, "float32")
    assert row["activation_checkpointing"] is bool(recomputed)
    assert row["tokens_per_s"] == pytest.approx(32 / row["seconds_per_step"]) and len(row["peak_gib"]) == 1


def test_rows_are_measured_by_processes_of_their_own(monkeypatch):
    started = []

    def launch(argv, processes):
        task = json.loads(argv[-1])
        started.append((task["strategy"], processes))
        if task["strategy"] == "ddp":
            return OUT_OF_MEMORY
        speed = 100.0 if task["strategy"] == "single" else 180.0
        with open(task["out"], "w") as file:
            json.dump({"strategy": task["strategy"], "tokens_per_s": speed}, file)
        return 0

    monkeypatch.setattr(scaling, "launch", launch)
    rows = run(ScalingSettings(**TINY, devices=4))
    assert started == [("single", 1), ("ddp", 4), ("fsdp2", 4)]
    assert [row.get("speedup") for row in rows] == [1.0, None, 1.8] and rows[1]["result"] == "out of memory"
    monkeypatch.setattr(scaling, "launch", lambda *_: 9)
    with pytest.raises(UserError, match="measure single ended with status 9"):
        run(ScalingSettings(**TINY))


def test_models_take_no_memory_before_they_are_sharded():
    teacher, student = meta_models(SIZES["27b"], torch.bfloat16)
    assert all(p.is_meta for model in (teacher, student) for p in model.parameters())
    assert student.converted_layers == [i for i in range(62) if SIZES["27b"].is_global(i)]
    assert student.embed_tokens.weight is teacher.embed_tokens.weight
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
