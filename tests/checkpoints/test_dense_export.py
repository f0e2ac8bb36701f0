"""Factors multiplied out: a stock Gemma 3 that computes what the student does with nothing rounded."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from form_students import LINEAR, random_student
from small_models import TINY

from tpa_train.checkpoints import load_pretrained
from tpa_train.checkpoints.dense_export import export_dense
from tpa_train.errors import UserError
from tpa_train.tpa.spec import LayerSpec, dense_specs

IDS = torch.randint(4, TINY.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
# Besides those of LINEAR: queries and output of Tucker alone, heads mixed at once, nothing shared.
MORE = [
    LayerSpec("tucker", 16, "dense", 32, form_o="tucker", rank_o=20, heads_k=2),
    LayerSpec("dense", 32, "tucker", 12, heads_v=2, form_q="tucker", rank_q=24),
    LayerSpec("latent", 32, "constant_a", 2),
    LayerSpec("constant_a", 2, "latent", 8),
    LayerSpec("tucker", 16, "tucker", 16, hidden=30, form_o="tucker"),
    LayerSpec("constant_b", 9, "dense", 32),
    LayerSpec(rank_k=32, rank_v=32),
]


def unrounded(specs):
    return random_student([dataclasses.replace(s, bits_k=16, bits_v=16) for s in specs])


@torch.no_grad()
@pytest.mark.parametrize("specs", [LINEAR, MORE], ids=["linear", "more"])
def test_transformers_stock_model_computes_what_the_student_does(tmp_path, specs):
    transformers = pytest.importorskip("transformers")
    student = unrounded(specs)
    model = transformers.AutoModelForCausalLM.from_pretrained(export_dense(student, tmp_path / "out")).eval()
    assert type(model).__name__ == "Gemma3ForCausalLM" and model.config.attention_bias
    torch.testing.assert_close(model(IDS).logits, student(IDS), rtol=0, atol=1e-4)


@torch.no_grad()
def test_without_a_constant_there_is_no_bias_and_the_toolkit_loads_it(tmp_path):
    student = unrounded(LINEAR)
    for name, p in student.named_parameters():
        if name.endswith(("values.center", "keys.center", "bias")) and not name.endswith("a_bias"):
            p.zero_()
    folder = export_dense(student, tmp_path / "out", shard_bytes=100_000)
    assert json.loads((folder / "config.json").read_text())["attention_bias"] is False
    torch.testing.assert_close(load_pretrained(folder)(IDS), student(IDS), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("moved", [0.0, 3e-5])
def test_a_center_that_its_bias_gives_back_needs_no_bias(moved, tmp_path):
    """As factorization leaves full ranks: the constant cancels but for its rounding. Training moves it, by little of
    large biases: that is more than rounding."""
    specs = dense_specs(TINY)
    specs[5] = LayerSpec("latent", 16, "latent", 16)
    student = random_student(specs)
    values = student.layers[5].self_attn.values
    values.center *= 300 if moved else 1
    center = values.center.repeat_interleave(2, 0).flatten()
    values.bias.copy_(values.out.weight @ center * (1 + moved))
    folder = export_dense(student, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["attention_bias"] is bool(moved)
    if moved:
        transformers = pytest.importorskip("transformers")
        found = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    else:
        found = load_pretrained(folder)(IDS)
    torch.testing.assert_close(found, student(IDS), rtol=0, atol=1e-4)


@torch.no_grad()
def test_bfloat16(tmp_path):
    specs = dense_specs(TINY)
    specs[5] = LayerSpec("joint", 40, "joint", 40, bits_k=(8, 4))
    student = random_student(specs, dtype=torch.bfloat16)
    student.layers[5].self_attn.values.bias.zero_()
    student.layers[5].self_attn.keys.center.zero_()
    dense = load_pretrained(export_dense(student, tmp_path / "out"), dtype=torch.bfloat16)
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    a, b = (m(IDS).float().log_softmax(-1) for m in (student, dense))
    assert (a.exp() * (a - b)).sum(-1).mean() < 0.05


@pytest.mark.parametrize(
    "spec,message",
    [
        (LayerSpec("contextual", 1, "latent", 8), "layer 5 has keys in the contextual form"),
        (LayerSpec("latent", 8, "contextual", 1), "layer 5 has values in the contextual form"),
        (LayerSpec("latent", 8, "latent", 8, form_q="contextual", rank_q=2), "layer 5 has queries in the contextual"),
        (LayerSpec("latent", 8, "latent", 40), "rank 40, wider than a head of 32"),
    ],
)
def test_what_a_dense_model_cannot_hold_is_refused(tmp_path, spec, message):
    specs = dense_specs(TINY)
    specs[5] = spec
    with pytest.raises(UserError, match=message):
        export_dense(random_student(specs), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_wrong_tensor_is_found_out(tmp_path, monkeypatch):
    import tpa_train.checkpoints.dense_export as module

    right = module.dense_attention
    monkeypatch.setattr(module, "dense_attention", lambda a: right(a) | {"k_norm.weight": right(a)["q_norm.weight"]})
    with pytest.raises(UserError, match="the dense attention of layer 0 is .* off the student's"):
        export_dense(unrounded(LINEAR), tmp_path / "out")
    assert not list(tmp_path.iterdir())
