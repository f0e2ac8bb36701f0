"""The teacher cache: the loss of a live teacher, and refusal of everything that is not this run's teacher and text."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import weights

from tpa_train.distillation import teacher_cache
from tpa_train.distillation.losses import linear_kl
from tpa_train.distillation.teacher_cache import MANIFEST, TeacherCache, weights_fingerprint
from tpa_train.distillation.topk_loss import top_log_probabilities, topk_kl
from tpa_train.errors import UserError
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.launch import main

CONTEXT, ROWS, V = 12, 7, 40
IDENTITY = {
    "teacher": "a", "precision": "float32", "tokenizer": "b", "data": "c", "join_documents": False, "context": CONTEXT,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3Config(
        vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
        sliding_window=6,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def dataset() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    documents = torch.tensor([0] * 5 + [1] * (CONTEXT - 5))
    return [
        {"token_ids": torch.randint(0, V, (CONTEXT,), generator=generator), "document_ids": documents}
        for _ in range(ROWS)
    ]


def fill(cache: TeacherCache, teacher, dataset, rows) -> TeacherCache:
    cache.fill(teacher, dataset, rows, 2, nullcontext)
    return cache


def cached_loss(cache: TeacherCache, student, head, rows: list[int], pick: slice):
    stored = {name: tensor.flatten(0, 1) for name, tensor in cache.read(torch.tensor(rows), pick).items()}
    if cache.mode == "hidden":
        return linear_kl(student, stored["hidden"], head)[0]
    return topk_kl(student, head, **stored)[0]


def losses(teacher, dataset, cache: TeacherCache, rows: list[int], pick: slice):
    """Returns loss and gradient by a live teacher and by the cache, for one student."""
    ids, documents = (torch.stack([dataset[r][k] for r in rows]) for k in ("token_ids", "document_ids"))
    torch.manual_seed(2)
    noise = 0.1 * torch.randn(len(rows), CONTEXT, 16)
    hidden = teacher.hidden_states(ids, documents)
    found = []
    for live in (True, False):
        student = (hidden + noise).requires_grad_()
        picked = student[:, pick].flatten(0, 1)
        if live:
            loss = linear_kl(picked, hidden[:, pick].flatten(0, 1), teacher.head_weight)[0]
        else:
            loss = cached_loss(cache, picked, teacher.head_weight, rows, pick)
        loss.backward()
        found.append((loss.detach(), student.grad))
    return found


@pytest.mark.parametrize("mode", ["hidden", "topk"])
def test_loss_and_gradient_are_those_of_a_live_teacher(teacher, dataset, tmp_path, mode):
    cache = fill(TeacherCache(tmp_path, mode, torch.float32, IDENTITY, V), teacher, dataset, [4, 1, 6, 1])
    reopened = TeacherCache(tmp_path, mode, torch.float32, IDENTITY, V)
    for pick in (slice(None), slice(1, None, 4)):
        for c in (cache, reopened):
            (live, live_grad), (loss, grad) = losses(teacher, dataset, c, [1, 4], pick)
            assert live > 1e-3
            torch.testing.assert_close(loss, live, rtol=2e-5, atol=1e-7)
            torch.testing.assert_close(grad, live_grad, rtol=1e-4, atol=1e-6)
    if mode == "hidden":  # in the batches that it was filled in: to the bit
        (live, live_grad), (loss, grad) = losses(teacher, dataset, cache, [4, 1], slice(None))
        assert torch.equal(loss, live) and torch.equal(grad, live_grad)


def test_float32_states_lose_nothing_and_bfloat16_ones_little_of_a_large_divergence(teacher, dataset, tmp_path):
    head = teacher.head_weight.bfloat16()
    ids, documents = (torch.stack([dataset[r][k] for r in (0, 1)]) for k in ("token_ids", "document_ids"))
    hidden = teacher.hidden_states(ids, documents).flatten(0, 1)
    student = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    live = linear_kl(student, hidden, head)[0]
    for dtype, tolerance in ((torch.float32, 0.0), (torch.bfloat16, 0.05)):
        cache = fill(TeacherCache(tmp_path / str(dtype), "hidden", dtype, IDENTITY), teacher, dataset, [0, 1])
        loss = cached_loss(cache, student, head, [0, 1], slice(None))
        torch.testing.assert_close(loss, live, rtol=tolerance, atol=0)


@settings(deadline=None, max_examples=25)
@given(k=st.integers(1, V), scale=st.floats(0.1, 30), seed=st.integers(0, 99))
def test_topk_is_the_kl_of_merged_classes(k, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    head, student, teacher = normal(V, 6), normal(5, 6), scale * normal(5, V)
    student.requires_grad_()
    loss, per_token = topk_kl(student, head, *top_log_probabilities(teacher, k))
    loss.backward()

    free = student.detach().clone().requires_grad_()
    q, p = (free @ head.T).softmax(-1), teacher.softmax(-1)
    top = teacher.topk(k).indices
    merged = []
    for x in (p, q):
        rest = x.scatter(-1, top, 0.0).sum(-1, keepdim=True)
        merged.append(torch.cat([x.gather(-1, top), rest] if k < V else [x.gather(-1, top)], -1))
    expected = torch.where(merged[0] > 0, merged[0] * (merged[0].log() - merged[1].log()), 0.0).sum(-1)
    expected.mean().backward()
    torch.testing.assert_close(per_token, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(student.grad, free.grad, rtol=1e-7, atol=1e-9)
    full = (p * (p.clamp_min(1e-300).log() - q.log())).sum(-1)
    assert (per_token <= full + 1e-9).all()


def test_equal_models_have_no_loss_and_no_gradient(teacher):
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    student = hidden.clone().requires_grad_()
    kept = top_log_probabilities(hidden @ teacher.head_weight.T, 3)
    loss, _ = topk_kl(student, teacher.head_weight, *kept)
    loss.backward()
    assert abs(loss) < 1e-6 and student.grad.abs().max() < 1e-6


def test_a_half_filled_cache_goes_on(teacher, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 2 * CONTEXT * 16 * 4)  # two rows a shard
    rows = [5, 0, 3, 1, 2]
    whole = fill(TeacherCache(tmp_path / "whole", "hidden", torch.float32, IDENTITY), teacher, dataset, rows)
    half = fill(TeacherCache(tmp_path / "half", "hidden", torch.float32, IDENTITY), teacher, dataset, rows[:2])
    before = (tmp_path / "half" / "rows-00000.safetensors").stat().st_mtime_ns
    again = TeacherCache(tmp_path / "half", "hidden", torch.float32, IDENTITY)
    assert again.missing(rows) == rows[2:]
    fill(again, teacher, dataset, rows)
    assert (tmp_path / "half" / "rows-00000.safetensors").stat().st_mtime_ns == before
    for row in rows:
        assert torch.equal(again.read(torch.tensor([row]))["hidden"], whole.read(torch.tensor([row]))["hidden"])
    with pytest.raises(UserError, match="lacks row 6"):
        half.read(torch.tensor([6]))


@pytest.mark.parametrize(
    ("key", "words"),
    [("teacher", "teacher's weights"), ("data", "the text"), ("context", "trainer.context"), ("tokenizer", "tokenizer"),
     ("precision", "trainer.precision"), ("join_documents", "join_documents")],
)  # fmt: skip
def test_a_stale_cache_is_refused_and_says_why(teacher, dataset, tmp_path, key, words):
    fill(TeacherCache(tmp_path, "hidden", torch.float32, IDENTITY), teacher, dataset, [0])
    with pytest.raises(UserError, match=words):
        TeacherCache(tmp_path, "hidden", torch.float32, {**IDENTITY, key: "other"})


def test_other_modes_and_damaged_files_are_refused(teacher, dataset, tmp_path):
    folder = tmp_path / "cache"
    fill(TeacherCache(folder, "topk", torch.float32, IDENTITY, 4), teacher, dataset, [0, 1])
    for arguments, words in ((("hidden", torch.float32, IDENTITY), "teacher.cache"),
                             (("topk", torch.float32, IDENTITY, 5), "teacher.top_k"),
                             (("topk", torch.float16, IDENTITY, 4), "teacher.dtype")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            TeacherCache(folder, *arguments)
    shard = folder / "rows-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(UserError, match="damaged"):
        TeacherCache(folder, "topk", torch.float32, IDENTITY, 4)
    shard.write_bytes(content)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        TeacherCache(folder, "topk", torch.float32, IDENTITY, 4)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="no teacher cache"):
        TeacherCache(folder, "topk", torch.float32, IDENTITY, 4)


def test_the_fingerprint_sees_every_weight(teacher):
    before = weights_fingerprint(teacher)
    for parameter in teacher.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        assert weights_fingerprint(teacher) != before
        with torch.no_grad():
            parameter.view(-1)[-1] -= 1


# --------------------------------------------------------------------------------------------------------- whole runs


def run(tiny, folder: Path, *options: str) -> Path:
    assert main(["recipe=distill", *tiny.options, "recipe.distill.hidden_weight=0", "recipe.layerwise.tokens=0",
                 "evaluation.copy=[]", f"run_dir={folder}", *options]) == 0  # fmt: skip
    return folder


def test_runs_with_a_cache_match_the_run_without(tiny, tmp_path):
    plain = run(tiny, tmp_path / "plain")
    hidden = run(tiny, tmp_path / "hidden", "teacher.cache=hidden")
    cached = ["teacher.cache=topk", f"teacher.folder={tmp_path / 'shared'}", "teacher.top_k=16"]
    topk = run(tiny, tmp_path / "topk", *cached)
    assert (hidden / "teacher_cache" / MANIFEST).is_file()
    kl = {}
    for name, folder in (("plain", plain), ("hidden", hidden), ("topk", topk)):
        kl[name] = json.loads((folder / "report.json").read_text())["stages"][-1]["kl"]
    assert kl["hidden"] == pytest.approx(kl["plain"], rel=1e-3)
    assert kl["topk"] == pytest.approx(kl["plain"], rel=0.2)
    assert weights(topk) != weights(plain)
    with pytest.raises(UserError, match="trainer.context"):
        run(tiny, tmp_path / "other", *cached, "trainer.context=32", "trainer.batch_size=4")


def test_contradictions_are_refused(tiny, tmp_path):
    options = ["recipe=distill", *tiny.options, f"run_dir={tmp_path / 'run'}"]
    for more, words in (
        (["teacher.cache=hidden"], "hidden_weight=0.1"),
        (["teacher.cache=hiden"], "did you mean 'hidden'"),
        (["teacher.cache=topk", "teacher.top_k=0", "recipe.distill.hidden_weight=0"], "at least 1"),
        (["teacher.cache=topk", "teacher.top_k=999999", "recipe.distill.hidden_weight=0"], "vocabulary"),
    ):
        with pytest.raises(UserError, match=words):
            main([*options, *more])
    assert not (tmp_path / "run").exists()
