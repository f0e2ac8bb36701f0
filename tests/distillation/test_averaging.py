"""The average of the weights: its values, its end in the student, and resumption."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_runs import send_signal_at

from tpa_train.distillation.averaging import WeightAverage
from tpa_train.distillation.end_to_end import EndToEndModule
from tpa_train.errors import UserError
from tpa_train.launch import main


@given(st.floats(0.05, 0.999), st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_the_average_is_that_of_the_formula(decay, values):
    average, expected = WeightAverage(decay), values[0]
    for n, value in enumerate(values):
        average.update({"w": torch.tensor([value], dtype=torch.float64)})
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    assert average.tensors["w"].item() == pytest.approx(expected, abs=1e-9)
    assert min(values) - 1e-9 <= average.tensors["w"].item() <= max(values) + 1e-9
    weight = torch.zeros(1, dtype=torch.float64)
    average.copy_to({"w": weight})
    assert weight.equal(average.tensors["w"])


def _steps(monkeypatch):
    """Every step's weights of the end-to-end stage, by reference to a list."""
    seen = []
    own = EndToEndModule.optimizer_step

    def watched(self, *args, **kwargs):
        own(self, *args, **kwargs)
        seen.append({name: t.clone() for name, t in self.trained_tensors().items()})

    monkeypatch.setattr(EndToEndModule, "optimizer_step", watched)
    return seen


def _options(tiny, *more):
    return ["recipe=distill", *tiny.options, "recipe.layerwise.tokens=0", "recipe.distill.lr_original=1e-3",
            "evaluation.copy=[]", "evaluation.sample_tokens=0", *more]  # fmt: skip


def test_the_student_ends_with_the_average_and_resumes_exactly(tiny, tmp_path, monkeypatch):
    """Accumulated batches make one step; a run that was stopped ends with the same bytes."""
    options = _options(tiny, "recipe.distill.ema=0.7", "trainer.accumulate=2")
    with monkeypatch.context() as patch:
        seen = _steps(patch)
        assert main([*options, f"run_dir={tmp_path / 'whole'}"]) == 0
    assert len(seen) == 4
    expected = WeightAverage(0.7)
    for weights in seen:
        expected.update(weights)
    found = load_file(tmp_path / "whole" / "state" / "distilled.safetensors")
    assert found.keys() == expected.tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.tensors.items())
    assert any(not torch.equal(found[name], seen[-1][name]) for name in found)
    run = tmp_path / "stopped"
    for step, told in ((1, options), (3, ["resume=true"])):  # inside, and after the last step
        with monkeypatch.context() as patch:
            send_signal_at(patch, "distilled", step)
            assert main([*told, f"run_dir={run}"]) == 143
    assert main([f"run_dir={run}", "resume=true"]) == 0
    again = load_file(run / "state" / "distilled.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decays_that_make_no_average(tiny, tmp_path, decay):
    with pytest.raises(UserError, match="recipe.distill.ema="):
        main(_options(tiny, f"recipe.distill.ema={decay}", f"run_dir={tmp_path / 'run'}"))
