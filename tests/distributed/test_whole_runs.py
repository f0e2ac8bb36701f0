"""``scripts/train.py`` on two processes, stopped and gone on with: one folder, and the single process's report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from safetensors.torch import load_file
from tiny_runs import ROOT, files

from tpa_train.errors import UserError
from tpa_train.launch import main

ONE = ["trainer.batch_size=1", "trainer.accumulate=2"]
TWO = ["trainer.batch_size=1", "trainer.devices=2"]


def report(run) -> dict:
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("single") / "run"
    assert main([*tiny.options, *ONE, f"run_dir={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """A run of two processes that SIGTERM stopped while the whole model learned."""
    run = tmp_path_factory.mktemp("stopped") / "run"

    def stop():
        deadline = time.monotonic() + 90
        while not (run / "checkpoints" / "distill.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert main([*tiny.options, *TWO, "trainer.checkpoint_minutes=0", f"run_dir={run}"]) == 143
    return run


def same_results(run, expected):
    ours, theirs = report(run), report(expected)
    assert [stage["name"] for stage in ours["stages"]] == [stage["name"] for stage in theirs["stages"]]
    for stage, other in zip(ours["stages"], theirs["stages"], strict=True):
        for key in ("perplexity", "kl", "top1", "copy_accuracy", "evaluated_tokens", "tokens"):
            assert stage[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), (stage["name"], key)
    assert ours["layers"] == theirs["layers"]
    weights, others = (load_file(folder / "export" / "model.safetensors") for folder in (run, expected))
    for name, tensor in others.items():
        scale = tensor.abs().max().clamp_min(1e-6)
        assert ((weights[name] - tensor).abs().max() / scale) < 1e-3, name


def test_a_stopped_run_left_what_it_needs(stopped):
    assert {"distill.ckpt", "distill.best.ckpt"} == files(stopped / "checkpoints")
    assert not (stopped / "export").exists()


def test_one_process_goes_on_with_a_run_of_two(stopped, single, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for options in (["trainer.devices=1"], ["trainer.batch_size=2"], ["trainer.accumulate=3", "trainer.devices=1"]):
        with pytest.raises(UserError, match=f"{options[0]}.* contradicts the interrupted run, where an optimizer step "
                                            "takes 2 rows"):  # fmt: skip
            main([f"run_dir={run}", "resume=true", *options])
    assert main([f"run_dir={run}", "resume=true", "trainer.devices=1", "trainer.accumulate=2"]) == 0
    same_results(run, single)
    assert not files(run / "checkpoints")


def test_torchrun_goes_on_in_shards(stopped, single, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(ROOT / "scripts" / "train.py"), f"run_dir={run}", "resume=true", "trainer.strategy=fsdp2",
               "trainer.activation_checkpointing=true"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 devices, fsdp2") == 1 and done.stdout.count("export  ") == 1  # one of them speaks
    same_results(run, single)
