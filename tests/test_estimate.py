"""dry_run=true: nothing is read or written, and the peak that it announces is the one that a run measures."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from multimodal_models import VISION
from tiny_runs import TINY, files, run_options, write_model, write_text_file

from tpa_train import estimate as estimates
from tpa_train.benchmarks.sizes import GIB, host_peak_gib, reset_host_peak
from tpa_train.checkpoints import huggingface, open_checkpoint
from tpa_train.checkpoints.weights import Weight
from tpa_train.errors import UserError
from tpa_train.estimate import Estimator, estimate
from tpa_train.launch import main
from tpa_train.memory_trace import StageTrace, TracedModels, tracing
from tpa_train.pipeline import Session, factorize_model
from tpa_train.recipes import compose
from tpa_train.recovery import recover
from tpa_train.stage_costs import COMPILED, moment_bytes, parameters_of
from tpa_train.tpa.spec import cache_bytes, dense_specs
from tpa_train.trainers import choose_machine, host_memory, trim_heap


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """As the run's fixture, of two layers: traces take as long as a model has operations."""
    folder = tmp_path_factory.mktemp("two")
    config = dataclasses.replace(TINY, num_layers=2, layer_kinds=("local", "global"))
    model, text = write_model(folder / "model", config=config), write_text_file(folder / "text.txt", 200_000)
    return SimpleNamespace(model=model, options=run_options(model, text, folder / "cache"))


def settings_of(tiny, *more: str):
    return compose(["recipe=distill", *tiny.options, *more])


@pytest.fixture(scope="module")
def composed(tiny):
    return settings_of(tiny)


def estimator_of(settings, config=None) -> Estimator:
    config = config or open_checkpoint(settings.model.path).config
    return Estimator(settings, choose_machine(settings.trainer), config, process=300 << 20)


def distill_of(settings) -> estimates.StageEstimate:
    (stage,) = estimator_of(settings).stages(settings, only="distill")
    return stage


@pytest.fixture(scope="module")
def dry_run(tiny, tmp_path_factory):
    """What a dry run estimates, what it prints, and whether files changed; reading a weight fails."""

    def refuse(*_):
        raise AssertionError("a weight was read")

    made, said, here, before = [], io.StringIO(), tmp_path_factory.mktemp("here"), files(tiny.model.parent)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(huggingface, "_weight", lambda path, name, shape: Weight(shape, refuse, name))
        patch.setattr(estimates, "estimate", lambda settings: made.append(estimate(settings)) or made[0])
        patch.chdir(here)
        assert main(["recipe=distill", *tiny.options, "dry_run=true", f"run_dir={here / 'run'}"]) == 0
    return made[0], said.getvalue(), not list(here.iterdir()) and files(tiny.model.parent) == before


@pytest.fixture(scope="module")
def expected(dry_run):
    return dry_run[0]


@pytest.fixture(scope="module")
def plain(expected):
    """The end-to-end stage without options."""
    return next(stage for stage in expected.stages if stage.name == "distill")


def test_nothing_is_read_or_written(dry_run):
    expected, said, unchanged = dry_run
    assert unchanged and said == expected.describe() + "\n" and "time (estimate)" in said


def test_every_stage_is_described(expected):
    said = expected.describe()
    for word in ("calibration", "sensitivities", "layerwise", "a step of distill: 128 tokens in", "evaluation", "fits"):
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


@pytest.fixture(scope="module")
def large(tiny):
    """An estimator of batches of 16 rows, and its end-to-end stage."""
    settings = settings_of(tiny, "trainer.batch_size=16", "trainer.context=256", "recipe.distill.scope=all")
    estimator = estimator_of(settings)
    (stage,) = estimator.stages(settings, only="distill")
    return estimator, stage


def test_a_smaller_batch_is_computed_and_fits(large, monkeypatch):
    estimator, stage = large
    for other in ("_recomputed", "_smaller_scope"):
        monkeypatch.setattr(estimator, other, lambda *_, **__: [])
    room = stage.peak - stage.activations // 2
    (line,) = estimator.advise(stage, -int(-room // (1 - estimates.SPARE)))
    rows = int(line.split("trainer.batch_size=")[1].split(" ")[0])
    assert rows == 8 and "trainer.accumulate=2" in line and "trainer.context=128" in line
    trainer = dataclasses.replace(estimator.settings.trainer, batch_size=rows)
    (smaller,) = estimator.stages(dataclasses.replace(estimator.settings, trainer=trainer), only="distill")
    assert smaller.peak == pytest.approx(room, rel=0.02)


def test_compiled_passes_keep_less_on_a_gpu(tiny):
    kept = []
    # Of 128 tokens a step; a stage of fewer than 500 steps is not compiled.
    for compiled, steps in (("false", 500), ("true", 500), ("true", 499)):
        options = f"trainer.compile={compiled}", f"recipe.distill.tokens={128 * steps}"
        estimator = estimator_of(settings_of(tiny, *options))
        (on_cpu,) = estimator.stages(estimator.settings, only="distill")
        estimator.on_cpu = False
        (stage,) = estimator.stages(estimator.settings, only="distill")
        assert stage.steps == steps
        kept.append((on_cpu.activations, stage.activations, stage.weights + stage.optimizer + stage.logits))
    assert kept[0][0] == kept[1][0] and kept[0][2] == kept[1][2] and kept[0] == kept[2]
    assert kept[1][1] == pytest.approx(COMPILED * kept[0][1], rel=1e-3)


def test_what_no_batch_can_cure_is_said(large, monkeypatch):
    estimator, stage = large
    (line,) = estimator.advise(dataclasses.replace(stage, name="layerwise"), 10 << 20)
    assert "do not shrink" in line
    light = dataclasses.replace(stage, weights=0, optimizer=0)
    monkeypatch.setattr(estimator, "stages", lambda settings, only: (light,))
    memory = int((light.peak + 2) / (1 - estimates.SPARE))
    (line,) = estimator.advise(dataclasses.replace(stage, weights=1 << 40), memory)
    assert "recipe.distill.scope=above (" in line and "trainer.activation_checkpointing=true (" in line


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


@pytest.fixture(scope="module")
def factorized(tiny, tmp_path_factory):
    """A session of steps whose activations outweigh the noise of a process's memory, and its student."""
    rows = ["trainer.context=512", "trainer.batch_size=32", "recipe.distill.tokens=16384", "recipe.distill.scope=all"]
    session = Session(settings_of(tiny, *rows), tmp_path_factory.mktemp("logs"))
    return session, factorize_model(session)[0]


@pytest.mark.skipif(host_memory("/proc/self/status", "VmHWM") is None, reason="resident sets are read from /proc")
@pytest.mark.parametrize("options", [
    {}, {"trainer": {"activation_checkpointing": True}, "distill": {"ema": 0.9, "hidden_weight": 0.0},
         "teacher": {"cache": "hidden"}},
])  # fmt: skip
def test_announced_peak_is_within_15_percent_of_the_measured_one(factorized, tmp_path, options):
    session, student = factorized
    settings = session.settings
    trainer = dataclasses.replace(settings.trainer, **options.get("trainer", {}))
    distill = dataclasses.replace(settings.recipe.distill, **options.get("distill", {}))
    session.settings = dataclasses.replace(
        settings, trainer=trainer, recipe=dataclasses.replace(settings.recipe, distill=distill),
        teacher=dataclasses.replace(settings.teacher, folder=str(tmp_path / "kept"), **options.get("teacher", {})),
    )  # fmt: skip
    trim_heap()
    before = host_memory("/proc/self/status", "VmRSS")
    expected = Estimator(session.settings, session.machine, session.config, before)
    (stage,) = expected.stages(session.settings, only="distill")
    trim_heap()
    reset_host_peak()
    recover(session, student, "distill")
    measured = host_peak_gib() * GIB
    session.settings = settings
    assert measured - before > 0.2 * GIB, (before / GIB, measured / GIB)
    assert stage.peak == pytest.approx(measured, rel=0.15), (before / GIB, measured / GIB)


def test_several_devices_share_tokens_and_shards(tiny, monkeypatch):
    """Of four devices each holds everything (ddp), or a quarter of what is cut (fsdp2), until all is made whole."""
    one = distill_of(settings_of(tiny, "trainer.accumulate=4"))
    ddp = distill_of(settings_of(tiny, "trainer.devices=4", "trainer.strategy=ddp"))
    assert (ddp.tokens, ddp.steps) == (one.tokens, one.steps)
    assert (ddp.weights, ddp.optimizer, ddp.activations) == (one.weights, one.optimizer, one.activations)
    settings = settings_of(tiny, "trainer.devices=4", "trainer.strategy=fsdp2", "recipe.distill.scope=all")
    settings.trainer.batch_size = 64
    estimator, traces, own = estimator_of(settings), [], TracedModels.training
    monkeypatch.setattr(TracedModels, "training", lambda *given: traces.append(own(*given)) or traces[-1])
    (sharded,) = estimator.stages(settings, only="distill")
    settings.trainer.strategy = "ddp"
    whole = distill_of(settings)
    layer = whole.trained / 2
    assert sharded.optimizer == pytest.approx(12 * whole.trained / 4 + 8 * layer, rel=0.02)
    d, heads = TINY.hidden_size, 2 * (TINY.num_heads + TINY.num_kv_heads) * TINY.head_dim
    unit = 4 * d * (heads + 3 * TINY.intermediate_size)  # three layers are whole in a step, and the head
    assert sharded.weights == pytest.approx(whole.weights / 4 + 4 * TINY.vocab_size * d + 3 * unit, rel=0.05)
    assert (sharded.steps, sharded.tokens) == (whole.steps, whole.tokens)
    assert sharded.activations == pytest.approx(whole.activations, rel=0.2)
    # At the stage's end: beside the shards both models, or, as all of this one learns, what is saved of it.
    assert traces[0].ending == pytest.approx(whole.weights / 4 + 3 * whole.trained + 12 * whole.trained, rel=0.05)
    ended = estimator._made(None, "distill", StageTrace(1, 10, 20, 5, 40, 0, ending=100), 1, 0.0, (1, 64))
    assert (ended.weights, ended.optimizer, ended.activations, ended.logits) == (80, 20, 0, 0)
    assert any("made whole" in note for note in estimator._notes())
    said = estimates.Estimate("m", 1, 2, 1, (sharded,), 1 << 40, "d", "f", (), estimator._notes(), 4).describe()
    assert f"a step of distill: {64 * 64 * 4:,} tokens on 4 devices in" in said and "GiB a device: fits" in said


def test_what_options_cost(tiny, plain):
    """Each by what it keeps: averages, the teacher's hidden states, layers in the host's memory."""
    cached = settings_of(tiny, "recipe.distill.hidden_weight=0", "teacher.cache=hidden", "recipe.distill.ema=0.9")
    stages = {s.name: s for s in (distill_of(cached), *estimator_of(cached).stages(cached, only="teacher cache"))}
    assert stages["distill"].optimizer - plain.optimizer == 4 * plain.trained
    assert stages["teacher cache"].tokens == plain.tokens
    assert estimator_of(cached).cached_bytes() == plain.tokens * TINY.hidden_size * 4
    lent = settings_of(tiny, "trainer.offload=true")
    estimator = estimator_of(lent)
    estimator.on_cpu = False  # the layers of this machine's "device" wait in another memory
    stages = {s.name: s for name in ("calibration", "evaluation") for s in estimator.stages(lent, only=name)}
    layer = (parameters_of(estimator.config) - TINY.vocab_size * TINY.hidden_size - TINY.hidden_size) // 2 * 4
    inputs = 3 * 512 * TINY.hidden_size * 4
    assert stages["calibration"].host == 2 * layer + inputs + 2 * moment_bytes(estimator.config)
    assert stages["evaluation"].host == 2 * layer
    estimator.on_cpu = True
    (together,) = estimator.stages(lent, only="evaluation")
    assert together.weights - stages["evaluation"].weights == layer
    assert any("copying layers" in note for note in estimator._notes())


def test_images_and_adapters_are_counted(tiny, plain, tmp_path):
    settings = settings_of(tiny)
    config = dataclasses.replace(open_checkpoint(tiny.model).config, vision=VISION)
    text, images = (estimator_of(settings, config) for _ in range(2))
    settings.data.kind, with_images = "text", dataclasses.replace(settings.data, kind="image_text")
    own = parameters_of(config) - parameters_of(text.config)
    (seen,) = text.stages(settings, only="distill")
    assert seen.weights - plain.weights == 2 * own > 0
    images.settings = dataclasses.replace(settings, data=with_images)
    (shown,) = images.stages(images.settings, only="distill")
    assert shown.seconds / images.rate**-1 > seen.seconds / text.rate**-1
    assert "3 images a row" in " ".join(images._notes()) and "none in the data" in " ".join(text._notes())
    folder = Path(tmp_path / "adapter")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    settings.model.adapter = str(folder)
    with pytest.raises(UserError, match="adapter_model.safetensors is missing"):
        text._notes()
    (folder / "adapter_model.safetensors").touch()
    os.truncate(folder / "adapter_model.safetensors", 1 << 29)  # a hole
    assert "model.adapter: merged while the model is read, 0.50 GiB then" in " ".join(text._notes())


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        main(["recipe=factorize", f"model.path={folder}", "dry_run=true", "budget.context=512"])
