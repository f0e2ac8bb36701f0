"""The two stages: zero for a perfect student, progress for an imperfect one, and checkpoints without the teacher."""

import copy
import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from dense_divergences import dense
from random_models import random_model, small_config, student_of, tokens
from torch.utils.data import DataLoader

from tpa_train.distillation.divergence import Divergence
from tpa_train.distillation.end_to_end import EndToEndModule, next_tokens
from tpa_train.distillation.layerwise import LayerwiseModule
from tpa_train.distillation.modules import OptimizerSettings, schedule, trainable_names
from tpa_train.errors import UserError
from tpa_train.gemma3 import attention

CONVERTED = [2, 4, 5]


@pytest.fixture(params=[1, 4], ids=["G1", "G4"])
def teacher(request):
    return random_model(small_config(num_kv_heads=request.param))


def _batch(config, documents=False):
    ids = tokens(config, 2, 30)
    batch = {"token_ids": ids}
    if documents:
        batch["document_ids"] = (torch.arange(30)[None].expand(2, -1) >= torch.tensor([[9], [20]])).long()
    return batch


def _module(stage, teacher, student, scope="all", steps=4, **options):
    settings = OptimizerSettings()
    if stage == "layerwise":
        errors = dict.fromkeys(student.converted_layers, 1.0)
        return LayerwiseModule(teacher, student, settings, total_steps=steps, initial_errors=errors, **options)
    return EndToEndModule(teacher, student, settings, scope, total_steps=steps, **options)


STAGES = ["layerwise", "distilled"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("documents", [False, True])
def test_a_perfect_student_has_no_loss_and_no_gradient(teacher, stage, documents):
    """Full-rank latents in a badly scaled basis: the teacher, up to rounding."""
    student = student_of(teacher, {i: (8, 8) for i in CONVERTED})
    module = _module(stage, teacher, student)
    loss, _ = module.losses(_batch(teacher.config, documents))
    loss.backward()
    assert abs(loss.item()) < 1e-12
    gradients = [student.get_parameter(n).grad for n in module.trained]
    assert gradients and all(g is None or g.abs().max() < 1e-9 for g in gradients)


@pytest.mark.parametrize("stage", STAGES)
def test_an_imperfect_student_has_both(teacher, stage):
    """The test above must not pass for a loss that is always zero."""
    student = student_of(teacher, {i: (4, 3) for i in CONVERTED})
    module = _module(stage, teacher, student)
    loss, metrics = module.losses(_batch(teacher.config))
    loss.backward()
    assert loss.item() > 1e-2 and all(
        float(v) > 0 for n, v in metrics.items() if "/layer_" not in n or int(n.split("_")[-1]) >= min(CONVERTED)
    )
    for name in module.trained:
        gradient = student.get_parameter(name).grad
        assert gradient is not None and gradient.abs().max() > 1e-7, name


def test_the_kl_is_that_of_the_whole_models(teacher):
    """The shared forward below the first converted layer changes nothing."""
    student, batch = student_of(teacher, {i: (4, 3) for i in CONVERTED}), _batch(teacher.config, documents=True)
    _, metrics = _module("distilled", teacher, student, "above").losses(batch)
    p, q = (m(batch["token_ids"], batch["document_ids"]).log_softmax(-1) for m in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(metrics["kl"], expected.detach(), rtol=1e-10, atol=0)


def test_batches_of_whole_rows_look_like_others_where_kernels_take_documents(monkeypatch):
    """A pass that is compiled for batches of documents meets no other shape."""
    monkeypatch.setattr(attention, "varlen_attn", lambda: None)
    whole, parts = torch.zeros(2, 6, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1, 2], [0] * 6])

    def sent(ids: torch.Tensor, device: str) -> dict[str, torch.Tensor]:
        module = SimpleNamespace(device=torch.device(device))
        return EndToEndModule.on_before_batch_transfer(module, {"document_ids": ids}, 0)

    one, several = sent(whole, "cuda"), sent(parts, "cuda")
    assert one["cu_seqlens"].shape == several["cu_seqlens"].shape and one.keys() == several.keys()
    assert one["cu_seqlens"][:3].tolist() == [0, 6, 12] and several["cu_seqlens"][:5].tolist() == [0, 2, 5, 6, 12]
    assert not sent(whole, "cpu") and sent(parts, "cpu")["cu_seqlens"].tolist() == [0, 2, 5, 6, 12]


def test_next_tokens_stay_in_their_document():
    ids, documents = torch.arange(10).view(2, 5), torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]])
    assert next_tokens({"token_ids": ids, "document_ids": documents}).tolist() == [[1, -1, 3, -1, -1], [6, 7, 8, 9, -1]]
    assert next_tokens({"token_ids": ids}).tolist() == [[1, 2, 3, 4, -1], [6, 7, 8, 9, -1]]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("divergence", [Divergence(), Divergence("jsd", 0.3, 2.0, 0.4), Divergence("reverse_kl")])
def test_masked_positions_do_not_count(teacher, divergence, every):
    """The loss is that of the whole models' logits, weighted by the batch's mask."""
    student, batch = student_of(teacher, {i: (4, 3) for i in CONVERTED}), _batch(teacher.config, documents=True)
    batch["loss_mask"] = torch.rand(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch["loss_mask"][:, :12] = 0
    module = _module("distilled", teacher, student, hidden_weight=0.0, kl_every=every, divergence=divergence)
    loss, metrics = module.losses(batch)
    assert list(metrics) == ["kl" if divergence == Divergence() else "output_loss"]
    hidden = [m.hidden_states(batch["token_ids"], batch["document_ids"])[:, ::every] for m in (student, teacher)]
    labels, weights = (t[:, ::every].flatten() for t in (next_tokens(batch), batch["loss_mask"]))
    each = dense(*(h.flatten(0, 1) for h in hidden), student.head_weight, teacher.head_weight, divergence, labels)
    torch.testing.assert_close(loss, (each * weights).sum() / weights.sum(), rtol=1e-10, atol=0)
    batch["loss_mask"] = batch["loss_mask"] > 0.5
    weights = batch["loss_mask"][:, ::every].flatten()
    torch.testing.assert_close(module.losses(batch)[0], each[weights].mean(), rtol=1e-10, atol=0)


def test_layerwise_losses_are_independent(teacher):
    """Spoiling one layer's factors leaves the other layers' losses as they are: all get the teacher's input."""
    student, batch = student_of(teacher, {i: (4, 3) for i in CONVERTED}), _batch(teacher.config)
    module = _module("layerwise", teacher, student)
    before = {k: float(v) for k, v in module.losses(batch)[1].items()}
    assert len(before) == len(CONVERTED)
    with torch.no_grad():
        student.layers[2].self_attn.keys.down.weight.mul_(-2)
        student.layers[2].self_attn.values.down.weight.mul_(-2)
    changed = {k: float(v) for k, v in module.losses(batch)[1].items()}
    assert [k for k in before if before[k] != changed[k]] == [k for k in before if k.endswith("2")]


def _fit(module, batch, steps, folder):
    loader = DataLoader([{k: v[0] for k, v in batch.items()}] * 64, batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("stage,scope", [("layerwise", "factors"), ("distilled", "factors"), ("distilled", "all")])
def test_training_moves_what_learns_and_nothing_else(teacher, stage, scope, tmp_path):
    student, batch = student_of(teacher, {i: (4, 3) for i in CONVERTED}), _batch(teacher.config)
    module = _module(stage, teacher, student, scope, steps=8)
    originals = copy.deepcopy(dict(teacher.named_parameters()))
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    first = module.losses(batch)[0].item()
    trainer = _fit(module, batch, 8, tmp_path)
    for name, p in teacher.named_parameters():
        assert torch.equal(p, originals[name]) and p.grad is None, name
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(module.trained)
    assert module.losses(batch)[0].item() < first
    # The checkpoint: exactly what learns, under the student's names.
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert set(saved) == {f"student.{n}" for n in module.trained}
    for name in module.trained:
        assert torch.equal(saved[f"student.{name}"], student.get_parameter(name))
    # A fresh module takes it back to the same place.
    other_student = student_of(teacher, {i: (4, 3) for i in CONVERTED}, seed=9)
    other = _module(stage, teacher, other_student, scope, steps=8)
    checkpoint = torch.load(path, weights_only=False)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"], strict=False)
    for name in module.trained:
        assert torch.equal(other_student.get_parameter(name), student.get_parameter(name))


def test_the_loss_of_one_stage_refuses_the_others_checkpoint(teacher):
    student = student_of(teacher, {5: (4, 3)})
    checkpoint = {}
    layerwise = _module("layerwise", teacher, student)
    checkpoint["state_dict"] = layerwise.state_dict()
    layerwise.on_save_checkpoint(checkpoint)
    layerwise.on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="does not belong to this distilled stage"):
        _module("distilled", teacher, student, "factors").on_load_checkpoint(checkpoint)
    checkpoint["state_dict"].pop(next(iter(checkpoint["state_dict"])))
    with pytest.raises(UserError, match="first difference: 'student.layers.5"):
        layerwise.on_load_checkpoint(checkpoint)


def test_half_precision_models_learn_in_float32(teacher):
    teacher = teacher.bfloat16()
    student = student_of(teacher, {5: (4, 3)})
    module = _module("distilled", teacher, student, "all")
    assert {t.dtype for t in module.trained_tensors().values()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


def test_scopes(teacher):
    student = student_of(teacher, {i: (4, 3) for i in CONVERTED})
    everything = [n for n, _ in student.named_parameters()]
    factors = {n for n in student.factor_names() if not n.endswith(".center")}
    names = {scope: set(trainable_names(student, scope)) for scope in ("factors", "attention", "above", "all")}
    assert names["factors"] == factors and len(factors) == 3 * 5
    assert names["factors"] < names["attention"] < names["above"] < names["all"]
    assert names["attention"] == {
        n for n in everything
        if any(n.startswith(f"layers.{i}.self_attn.") for i in CONVERTED) and not n.endswith(".center")
    }  # fmt: skip
    assert not any(n.startswith(("layers.0.", "layers.1.", "embed")) for n in names["above"])
    assert {"norm.weight", "layers.3.mlp.up_proj.weight"} <= names["above"]
    assert names["all"] == {n for n in everything if n != "embed_tokens.weight" and not n.endswith(".center")}
    with pytest.raises(UserError, match="unknown training scope 'factor'.*did you mean 'factors'"):
        trainable_names(student, "factor")


@pytest.mark.parametrize("total", [10, 1000])
def test_schedule(total):
    settings = OptimizerSettings(warmup=0.1, final_lr=0.05)
    rates = [schedule(step, total, settings) for step in range(total + 1)]
    warmup = max(1, round(0.1 * total))
    assert rates[0] == pytest.approx(1 / warmup) and rates[warmup - 1] == 1
    assert rates[total] == pytest.approx(0.05) and schedule(10 * total, total, settings) == pytest.approx(0.05)
    assert all(0 < r <= 1 for r in rates)
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if total == 1000:
        assert rates[550] == pytest.approx(0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 2)), abs=1e-6)


def test_close_students_learn_at_lower_rates(teacher):
    """A quarter of the KL halves the rates; beyond the full-rate KL nothing grows."""
    student = student_of(teacher, {i: (4, 3) for i in CONVERTED})
    rates = {kl: _module("distilled", teacher, student, initial_kl=kl).learning_rates() for kl in (0.3, 0.075, 5.0)}
    assert rates[0.3] == rates[5.0] and set(rates[0.3].values()) == {3e-3, 1e-4}
    for name, rate in rates[0.075].items():
        assert rate == pytest.approx(rates[0.3][name] / 2)
