"""The Python API does what the command line does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ROOT, weights, write_model

import tpa_train
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA


def test_the_api_reaches_the_weights_of_the_command_line(tiny, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = tpa_train.load_pretrained(tiny.model)
    original = {name: p.clone() for name, p in teacher.named_parameters()}
    student = tpa_train.factorize(teacher, *tiny.training_options)
    for name, factor in load_file(finished / "state" / "factors.safetensors").items():
        if name.startswith("output_metric."):
            assert torch.equal(factor, student.output_metrics[int(name.rpartition(".")[2])]), name
        else:
            assert torch.equal(factor, dict(student.named_parameters())[name]), name
    assert tpa_train.distill(teacher, student, "recipe=distill", *tiny.training_options) is student
    assert os.listdir(tmp_path) == [], "nothing but what export is asked for"
    folder = tpa_train.export(student, tmp_path / "out")
    assert (folder / "model.safetensors").read_bytes() == weights(finished)
    for name, p in teacher.named_parameters():
        assert torch.equal(p, original[name]), f"the teacher's {name} changed"
    loaded = Gemma3ForMultimodalLMwithTPA.from_pretrained(folder)
    assert loaded.generate("the hello", max_tokens=3) == student.generate("the hello", max_tokens=3)
    assert "Gemma Terms" in (folder / "README.md").read_text()


def test_layerwise_only(tiny):
    teacher = tpa_train.load_pretrained(tiny.model)
    student = tpa_train.factorize(teacher, *tiny.training_options)
    before = student.layers[5].self_attn.keys.up.clone()
    tpa_train.distill(teacher, student, "recipe=layerwise", *tiny.training_options)
    assert not torch.equal(before, student.layers[5].self_attn.keys.up)
    shared = student.layers[5].self_attn.q_proj.weight
    assert shared.data_ptr() == teacher.layers[5].self_attn.q_proj.weight.data_ptr()


def test_dense_keys_are_rounded_trained_beside_and_exported(tiny, tmp_path):
    """Keys keep their weights and are cached rotated, in fewer bits; values become latents. Training sees the bits."""
    options = [*tiny.training_options, "budget.forms=[dense]", "budget.cache_ratio=3", "budget.bits=[8,4]"]
    teacher = tpa_train.load_pretrained(tiny.model)
    student = tpa_train.factorize(teacher, *options)
    forms = {(s.form_k, s.form_v) for s in student.specs}
    assert ("dense", "latent") in forms and forms <= {("dense", "latent"), ("dense", "dense")}
    assert any(s.bits_k != 16 for s in student.specs)
    before = {name: p.clone() for name, p in student.named_parameters() if ".keys." in name}
    tpa_train.distill(teacher, student, "recipe=layerwise", *options)
    assert before and all(torch.equal(dict(student.named_parameters())[name], p) for name, p in before.items())
    student.eval()
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        rounded = student(tokens)
        loaded = Gemma3ForMultimodalLMwithTPA.from_pretrained(tpa_train.export(student, tmp_path / "out"))
        assert loaded.specs == student.specs
        torch.testing.assert_close(loaded(tokens), rounded, rtol=1e-5, atol=1e-5)
        for layer in student.converted_layers:
            student.layers[layer].self_attn.as_cached = lambda entries: entries
        exact = student(tokens)
        assert not torch.allclose(exact, rounded, atol=1e-4)


@pytest.mark.parametrize(
    "option,message",
    [
        ("budget.cache_ratio=500", "cannot be met"),
        ("budget.ratio=4", "did you mean 'budget.cache_ratio'"),
        ("run_dir=runs/x", "option of scripts/train.py only"),
        ("evaluation.tokens=5", "option of scripts/train.py only"),
        ("data.path=missing.txt", "missing.txt"),
    ],
)
def test_mistakes(option, message, tiny):
    with pytest.raises(tpa_train.UserError, match=message):
        tpa_train.factorize(tpa_train.load_pretrained(tiny.model), *tiny.training_options, option)


def test_a_teacher_without_tokenizer(tiny, tmp_path):
    teacher = tpa_train.load_pretrained(write_model(tmp_path / "bare", tokenizer=False))
    with pytest.raises(tpa_train.UserError, match="the model has no tokenizer"):
        tpa_train.factorize(teacher, *tiny.training_options)


def test_import_is_quick_and_names_are_found():
    code = "import sys, tpa_train; assert 'torch' not in sys.modules and 'distill' in dir(tpa_train)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'destill'"):
        tpa_train.destill  # noqa: B018
