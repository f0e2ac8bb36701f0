"""Interrupted runs go on and end with the same weights, bit for bit, as a run that nobody disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ROOT, STEPS, files, send_signal_at, weights

from tpa_train import launch
from tpa_train.checkpoints.command import export_run
from tpa_train.errors import UserError
from tpa_train.launch import main


def resume(run) -> int:
    return main([f"run_dir={run}", "resume=true"])


@pytest.mark.parametrize(
    "stage,step", [("layerwise", 0), ("layerwise", STEPS - 1), ("distilled", 4), ("distilled", STEPS - 1)]
)
def test_sigterm_in_a_recovery_stage(stage, step, finished, tiny, tmp_path, monkeypatch, capfd):
    run = tmp_path / "a run"
    with monkeypatch.context() as patch:
        send_signal_at(patch, stage, step)
        assert main([*tiny.options, f"run_dir={run}"]) == 143
    said = capfd.readouterr()
    assert "SIGTERM: stopping after this step and saving" in said.err
    assert f"go on with: python scripts/train.py run_dir='{run}' resume=true" in said.out
    assert not (run / "export").exists() and not (run / "report.json").exists()
    assert resume(run) == 0
    assert weights(run) == weights(finished)
    assert (run / "report.md").exists() and not files(run / "checkpoints")


def test_interrupted_twice_in_one_stage_and_again_in_the_next(finished, tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for stage, step, signum in (("layerwise", 2, signal.SIGINT), ("layerwise", 5, signal.SIGTERM),
                                ("distilled", 3, signal.SIGTERM), ("distilled", 4, signal.SIGINT)):  # fmt: skip
        with monkeypatch.context() as patch:
            send_signal_at(patch, stage, step, signum)
            options = [f"run_dir={run}", "resume=true"] if run.exists() else [*tiny.options, f"run_dir={run}"]
            assert main(options) == 128 + signum
    assert resume(run) == 0
    assert weights(run) == weights(finished)
    assert resume(run) == 0, "resuming a finished run changes nothing"
    assert weights(run) == weights(finished)


@pytest.mark.parametrize("minutes", [0.0, 5.0])  # with a checkpoint after every step, and with none at all
def test_a_second_signal_stops_at_once(minutes, finished, tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_signal_at(patch, "distilled", 4, signal.SIGINT, times=2)
        assert main([*tiny.options, f"run_dir={run}", f"trainer.checkpoint_minutes={minutes}"]) == 130
    assert files(run / "checkpoints") == ({"distill.ckpt", "distill.best.ckpt"} if minutes == 0 else set())
    assert resume(run) == 0
    assert weights(run) == weights(finished)


@pytest.mark.parametrize("where", ["factorize_model", "measure_layer_errors", "export_model", "write_report"])
def test_a_signal_outside_of_training(where, finished, tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal must stop it")

    with monkeypatch.context() as patch:
        patch.setattr(launch, where, stop)
        assert main([*tiny.options, f"run_dir={run}"]) == 143
    assert resume(run) == 0
    assert weights(run) == weights(finished)


def test_a_signal_before_anything_is_written(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "check_against_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*tiny.options, f"run_dir={tmp_path / 'run'}"]) == 143
    assert "nothing had been written" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_handlers_are_put_back(finished, tiny, tmp_path, monkeypatch):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    send_signal_at(monkeypatch, "layerwise", 1)
    main([*tiny.options, f"run_dir={tmp_path / 'run'}"])
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_checkpoints_hold_only_what_learns(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    send_signal_at(monkeypatch, "layerwise", 1)
    main([*tiny.options, f"run_dir={run}"])
    checkpoint = torch.load(run / "checkpoints" / "layerwise.ckpt", weights_only=True)["state_dict"]
    assert checkpoint and all(".keys." in name or ".values." in name for name in checkpoint)
    assert not [name for name in checkpoint if name.endswith(".center") or ".norm." in name]
    original = sum(t.numel() for t in load_file(tiny.model / "model.safetensors").values())
    assert sum(t.numel() for t in checkpoint.values()) < original / 3


def test_export_of_an_interrupted_run(finished, tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    send_signal_at(monkeypatch, "distilled", 3)
    main([*tiny.options, f"run_dir={run}"])
    stage, folder = export_run(run, tmp_path / "export")
    assert stage == "layerwise"
    ours = load_file(folder / "model.safetensors")
    for name, tensor in load_file(finished / "state" / "layerwise.safetensors").items():
        assert tensor.equal(ours[name])
    with pytest.raises(UserError, match="'distilled' is not finished; finished: factorized, layerwise"):
        export_run(run, tmp_path / "other", stage="distilled")


def test_a_damaged_state_is_named(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "state" / "layerwise.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="layerwise.safetensors is damaged"):
        resume(run)
    path.unlink()
    (run / "progress.json").write_text("{")
    with pytest.raises(UserError, match="progress.json is damaged"):
        resume(run)
    (run / "run.yaml").write_text("recipe: 3")
    with pytest.raises(UserError, match="run.yaml is damaged"):
        resume(run)


def test_a_damaged_checkpoint_is_named(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_signal_at(patch, "layerwise", 1)
        main([*tiny.options, f"run_dir={run}"])
    path = run / "checkpoints" / "layerwise.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="layerwise.ckpt is damaged"):
        resume(run)


def test_options_of_the_stored_run_may_be_repeated_but_not_contradicted(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_signal_at(patch, "layerwise", 1)
        main(["recipe=distill", *tiny.options, f"run_dir={run}"])
    for option in ("budget.cache_ratio=4", "budget=ratio8", "recipe=factorize", "data=python_docs", "seed=1",
                   "recipe.distill.tokens=99", "trainer.batch_size=1"):  # fmt: skip
        with pytest.raises(UserError, match=f"{option} contradicts the interrupted run"):
            main([f"run_dir={run}", "resume=true", option])
    assert main(["recipe=distill", *tiny.options, f"run_dir={run}", "resume=true"]) == 0


def test_a_real_process(finished, tiny, tmp_path):
    """SIGTERM from outside, as a scheduler or ``kill`` sends it."""
    run = tmp_path / "run"
    options = ["trainer.checkpoint_minutes=0"]  # one after every step: when the first is there, training is under way
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen([sys.executable, ROOT / "scripts" / "train.py", *tiny.options, *options,
                                    f"run_dir={run}"], stdout=said, stderr=said)  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not (run / "checkpoints" / "layerwise.ckpt").exists():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        finally:
            process.kill()
    assert f"go on with: python scripts/train.py run_dir={run} resume=true" in (tmp_path / "said").read_text()
    assert resume(run) == 0
    assert weights(run) == weights(finished)
