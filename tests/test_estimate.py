"""dry_run=true: nothing is read or written, and the peak that it announces is the one that a run measures."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from tiny_runs import ROOT, files, write_model, write_text_file

from tpa_train import estimate as estimates
from tpa_train.checkpoints import huggingface, open_checkpoint
from tpa_train.checkpoints.weights import Weight
from tpa_train.errors import UserError
from tpa_train.estimate import GIB, estimate
from tpa_train.launch import main
from tpa_train.memory_trace import TracedModels, tracing
from tpa_train.recipes import compose
from tpa_train.tpa.spec import cache_bytes, dense_specs
from tpa_train.trainers import choose_machine


@pytest.fixture(scope="module")
def composed(tiny):
    return compose(["recipe=distill", *tiny.options])


@pytest.fixture(scope="module")
def expected(composed):
    return estimate(composed)


def test_nothing_is_read_or_written(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(huggingface, "_weight", lambda path, name, shape: Weight(shape, refuse, name))
    monkeypatch.chdir(tmp_path)
    before = files(tiny.model.parent)
    assert main(["recipe=factorize", *tiny.options, "dry_run=true", f"run_dir={tmp_path / 'run'}"]) == 0
    assert not list(tmp_path.iterdir()) and files(tiny.model.parent) == before
    assert "time (estimate)" in capsys.readouterr().out


def test_every_stage_is_described(expected):
    said = expected.describe()
    for word in ("calibration", "sensitivities", "layerwise", "distill", "evaluation", "GiB: fits"):
        assert word in said


def test_counts_are_exact_where_they_can_be(expected, tiny, composed):
    checkpoint = open_checkpoint(tiny.model)
    assert expected.parameters == sum(torch.Size(w.shape).numel() for w in checkpoint.weights.values())
    assert expected.dense_cache == cache_bytes(checkpoint.config, dense_specs(checkpoint.config), 512)
    assert expected.target_cache == int(expected.dense_cache / 5)
    distill = next(s for s in expected.stages if s.name == "distill")
    assert 0 < distill.trained < expected.parameters
    assert distill.optimizer >= 12 * distill.trained  # two moments and a gradient in float32
    assert distill.tokens == composed.recipe.distill.tokens
    assert expected.peak == max(s.peak for s in expected.stages) and expected.fits and not expected.advice


def test_stages_that_do_not_run_are_left_out(composed):
    recipe = dataclasses.replace(composed.recipe, stages=["factorize"])
    names = [s.name for s in estimate(dataclasses.replace(composed, recipe=recipe)).stages]
    assert names == ["calibration", "sensitivities", "evaluation"]


@pytest.fixture(scope="module")
def large(composed, tiny):
    """An estimator of batches of 16 rows, and its end-to-end stage."""
    trainer = dataclasses.replace(composed.trainer, batch_size=16, context=256)
    distill = dataclasses.replace(composed.recipe.distill, scope="all")
    recipe = dataclasses.replace(composed.recipe, distill=distill)
    settings = dataclasses.replace(composed, trainer=trainer, recipe=recipe)
    config = open_checkpoint(tiny.model).config
    estimator = estimates.Estimator(settings, choose_machine(trainer), config, process=300 << 20)
    (stage,) = estimator.stages(settings, only="distill")
    return estimator, stage


def test_a_smaller_batch_is_computed_and_fits(large):
    estimator, stage = large
    room = stage.peak - stage.activations // 2
    (line,) = estimator.advise(stage, -int(-room // (1 - estimates.SPARE)))
    rows = int(line.split("trainer.batch_size=")[1].split(" ")[0])
    assert rows == 8 and "trainer.accumulate=2" in line and "trainer.context=128" in line
    trainer = dataclasses.replace(estimator.settings.trainer, batch_size=rows)
    (smaller,) = estimator.stages(dataclasses.replace(estimator.settings, trainer=trainer), only="distill")
    assert smaller.peak == pytest.approx(room, rel=0.02)


def test_what_no_batch_can_cure_is_said(large, monkeypatch):
    estimator, stage = large
    (line,) = estimator.advise(dataclasses.replace(stage, name="layerwise"), 10 << 20)
    assert "do not shrink" in line
    light = dataclasses.replace(stage, weights=0, optimizer=0)
    monkeypatch.setattr(estimator, "stages", lambda settings, only: (light,))
    memory = int((light.peak + 2) / (1 - estimates.SPARE))
    (line,) = estimator.advise(dataclasses.replace(stage, weights=1 << 40), memory)
    assert "recipe.distill.scope=above (" in line


def test_long_texts_and_sensitivities_have_options_of_their_own(large):
    estimator, stage = large
    parts = {"weights": 0, "optimizer": 0, "activations": GIB, "logits": GIB}
    sensitivities = dataclasses.replace(stage, name="sensitivities", tokens=1024, **parts)
    (line,) = estimator.advise(sensitivities, int((sensitivities.process + GIB) / (1 - estimates.SPARE)) + 1)
    assert "sensitivity_tokens=512" in line
    (line,) = estimator.advise(dataclasses.replace(stage, name="evaluation", activations=0), 1 << 20)
    assert "do not shrink" in line


def test_the_status_says_whether_it_fits(tiny, large, monkeypatch):
    monkeypatch.setattr(estimates, "free_memory", lambda *_: 1 << 20)
    monkeypatch.setattr(estimates.Estimator, "stages", lambda *_: (dataclasses.replace(large[1], name="layerwise"),))
    assert main(["recipe=factorize", *tiny.options, "dry_run=true"]) == 1


def test_bad_settings_are_refused_as_in_a_run(tiny):
    for options, words in (
        (["budget.cache_ratio=900"], "cannot be met"),
        (["model.path=/nowhere"], "no checkpoint"),
        (["--multirun", "data.num_workers=0,1"], "dry_run=true"),
    ):
        with pytest.raises(UserError, match=words):
            main(["recipe=factorize", *tiny.options, "dry_run=true", *options])


def test_tracing_counts_live_storages():
    with tracing() as live:
        a = torch.empty(1000, dtype=torch.float32)
        view, b = a[10:], a + 1
        assert live.now == 8000 and view.shape == (990,)
        del b
        assert live.now == 4000 and live.peak == 8000
        live.mark()
        c = a.view(10, 100) @ a.view(100, 10)
        assert live.flops == 2 * 10 * 100 * 10 and live.now == 4000 + 4 * c.numel()


def test_traced_models_are_as_large_as_real_ones(composed, tiny):
    config = open_checkpoint(tiny.model).config
    machine = choose_machine(composed.trainer)
    with tracing() as live:
        models = TracedModels(config, dense_specs(config), torch.bfloat16, machine.device, live, machine.autocast)
        parameters = sum(p.numel() for p in models.teacher.parameters())
        assert live.now == 2 * parameters


MEASURE = """
import json, sys
from tpa_train.estimate import Estimator, process_memory
from tpa_train.launch import main
from tpa_train.recipes import compose
process = process_memory()
assert main(sys.argv[1:]) == 0
# Not getrusage: that remembers the process which this one was forked from.
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
peak = int(status['VmHWM'].split()[0]) * 1024
from tpa_train.checkpoints import open_checkpoint
from tpa_train.trainers import choose_machine
settings = compose(sys.argv[1:])
config = open_checkpoint(settings.model.path).config
(expected,) = Estimator(settings, choose_machine(settings.trainer), config, process).stages(settings, only="distill")
print(json.dumps({"process": process, "measured": peak, "expected": expected.peak}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident sets are read from /proc")
def test_announced_peak_is_within_15_percent_of_the_measured_one(tiny, tmp_path):
    """Activations as large as the process is by itself, on a model whose weights are next to nothing."""
    options = [
        "recipe=distill", *tiny.options, f"data.path={write_text_file(tmp_path / 'text.txt', 200_000)}",
        f"data.cache_dir={tmp_path / 'cache'}", "trainer.context=512", "trainer.batch_size=32",
        "recipe.calibration.tokens=4096", "recipe.layerwise.tokens=0", "recipe.distill.tokens=32768",
        "recipe.distill.scope=all", "evaluation.copy=[]", "evaluation.sample_tokens=0", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    made = subprocess.run([sys.executable, "-c", MEASURE, *options], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    found = json.loads(made.stdout.splitlines()[-1])
    assert found["measured"] - found["process"] > 0.35 * GIB, found
    assert found["expected"] == pytest.approx(found["measured"], rel=0.15), found


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        main(["recipe=factorize", f"model.path={folder}", "dry_run=true", "budget.context=512"])
