"""The evaluator on tiny models: teacher against itself, documents, copying, cache bytes, several processes."""

import contextlib
import types

import pytest
import torch
import torch.nn.functional as F
from evaluation_models import CONFIG, dense_model, rows, tpa_model

from tpa_train.errors import UserError
from tpa_train.evaluation import suites
from tpa_train.evaluation.suites import Evaluator, cache_report, greedy_samples, layer_rows


def _copy_texts(count=2, copied=20, seed=3):
    text = torch.randint(4, 260, (count, copied), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.full((count, 1), 2), text, text], dim=1)


def test_only_counted_positions_are_scored(teacher, student):
    generator = torch.Generator().manual_seed(5)
    masked = [row | {"loss_mask": torch.rand(len(row["token_ids"]), generator=generator) < 0.3} for row in rows()]
    nll, kl, agree = [], [], []
    for row in masked:
        token_ids, document_ids = row["token_ids"][None], row["document_ids"][None]
        log_t = teacher(token_ids, document_ids).log_softmax(-1)[0, :-1]
        log_s = student(token_ids, document_ids).log_softmax(-1)[0, :-1]
        counted = row["loss_mask"][:-1] & (document_ids[0, 1:] == document_ids[0, :-1])
        nll.append(F.nll_loss(log_s, token_ids[0, 1:], reduction="none")[counted])
        kl.append(F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)[counted])
        agree.append((log_s.argmax(-1) == log_t.argmax(-1))[counted])
    for batch_size in (1, 2):
        evaluator = Evaluator(teacher, masked, batch_size=batch_size, head_dtype=torch.float64, progress=False)
        result = evaluator.evaluate(student, "factorized")
        assert result.perplexity == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-9)
        assert result.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-9)
        assert result.top1 == pytest.approx(torch.cat(agree).double().mean().item())
        assert result.evaluated_tokens == len(torch.cat(kl)) < 3 * 38 and result.masked
    nothing = [row | {"loss_mask": torch.zeros_like(row["loss_mask"])} for row in masked]
    with pytest.raises(UserError, match="no turn of the model"):
        Evaluator(teacher, nothing, progress=False).evaluate(student, "factorized")


@pytest.fixture(scope="module")
def teacher():
    return dense_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def student(teacher):
    return tpa_model(teacher)


def test_teacher_against_itself(teacher):
    result = Evaluator(teacher, rows(), {20: _copy_texts()}, progress=False).evaluate(None, "teacher")
    assert (result.kl, result.top1) == (0.0, 1.0)
    assert result.perplexity == result.teacher_perplexity
    assert set(result.copy_accuracy) == {"20"}


def test_equals_the_dense_computation(teacher, student):
    nll, teacher_nll, kl, agree = [], [], [], []
    for row in rows():
        token_ids, document_ids = row["token_ids"][None], row["document_ids"][None]
        log_t = teacher(token_ids, document_ids).log_softmax(-1)[0, :-1]
        log_s = student(token_ids, document_ids).log_softmax(-1)[0, :-1]
        same = document_ids[0, 1:] == document_ids[0, :-1]
        targets = token_ids[0, 1:]
        nll.append(F.nll_loss(log_s, targets, reduction="none")[same])
        teacher_nll.append(F.nll_loss(log_t, targets, reduction="none")[same])
        kl.append(F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)[same])
        agree.append((log_s.argmax(-1) == log_t.argmax(-1))[same])
    for batch_size in (1, 2):
        evaluator = Evaluator(teacher, rows(), batch_size=batch_size, head_dtype=torch.float64, progress=False)
        result = evaluator.evaluate(student, "factorized", tokens=7, seconds=2.0)
        assert result.perplexity == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-9)
        assert result.teacher_perplexity == pytest.approx(torch.cat(teacher_nll).mean().exp().item(), rel=1e-9)
        assert result.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-9) and result.kl > 0.01
        assert result.top1 == pytest.approx(torch.cat(agree).double().mean().item())
        assert (result.evaluated_tokens, result.tokens, result.seconds) == (3 * 38, 7, 2.0)
        assert sum(b["tokens"] for b in result.by_position) == 3 * 38


def test_the_teacher_runs_once(teacher, student, monkeypatch):
    evaluator = Evaluator(teacher, rows(), progress=False)
    evaluator.evaluate(None, "teacher")
    monkeypatch.setattr(teacher, "hidden_states", None)
    assert evaluator.evaluate(student, "factorized").kl > 0


def test_training_mode_and_autocast_are_the_callers(teacher, student):
    entered = []

    @contextlib.contextmanager
    def autocast():
        entered.append(True)
        yield

    student.train()
    Evaluator(teacher, rows(1), autocast=autocast, progress=False).evaluate(student, "x")
    assert student.training and not teacher.training and len(entered) == 2
    student.eval()


class _Copier:
    """Predicts what followed the same token earlier in the row, except tokens in ``wrong``."""

    def __init__(self, wrong=()):
        self.head_weight, self.training, self.wrong = torch.eye(300), False, set(wrong)
        self.config = CONFIG

    def eval(self):
        return self

    def train(self, mode):
        return self

    def hidden_states(self, token_ids, document_ids=None):
        guess = torch.zeros_like(token_ids)
        for row, ids in enumerate(token_ids.tolist()):
            follows = {}
            for i, token in enumerate(ids):
                guess[row, i] = 0 if token in self.wrong else follows.get(token, 0)
                if i:
                    follows[ids[i - 1]] = token
                    guess[row, i] = 0 if token in self.wrong else follows.get(token, 0)
        return F.one_hot(guess, 300).float()


def test_copy_accuracy_of_a_known_copier():
    text = torch.arange(10, 50)
    copy = torch.cat([torch.tensor([2]), text, text])[None]
    # Everything is found but the copy's first token, which nothing announced.
    exact = Evaluator(_Copier(), rows(1), {40: copy}, progress=False).evaluate(None, "teacher")
    assert exact.copy_accuracy == {"40": 39 / 40}
    wrong = Evaluator(_Copier(), rows(1), {"40": copy}, progress=False).evaluate(_Copier([10, 11, 12, 13]), "student")
    assert wrong.copy_accuracy == {"40": 35 / 40}
    few = Evaluator(_Copier(), rows(1), {40: copy}, max_copy_tokens=10, progress=False).evaluate(None, "teacher")
    assert few.copy_accuracy == {"40": 1.0}


def test_bad_text_is_refused(teacher):
    with pytest.raises(UserError, match="no held-out text"):
        Evaluator(teacher, [])
    with pytest.raises(UserError, match="copy text 20"):
        Evaluator(teacher, rows(), {20: _copy_texts()[:, :-1]})


def test_processes_share_the_rows_and_stay_in_step(monkeypatch):
    ran = []
    for rank in range(2):
        monkeypatch.setattr(suites, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(suites, "world_size", lambda: 2)
        ran.append(list(suites._shard(["a", "b", "c"])))
    assert ran == [[("a", True), ("c", True)], [("b", True), ("a", False)]]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("context", [5, 100])
def test_cache_bytes(teacher, bits, context):
    student = tpa_model(teacher, bits)
    report = cache_report(teacher, student, context)
    dense = 2 * 2 * 16 * 2  # K and V, G, d, bytes
    local = min(context, 8)
    tpa = {16: 2 * (8 + 6) * 2, 8: 2 * (8 + 4 + 6 + 4), 4: 2 * (4 + 4 + 3 + 4)}[bits]
    assert report.dense_bytes == dense * (5 * local + context)
    assert report.tpa_bytes == 5 * dense * local + tpa * context == student.cache_bytes(context)
    assert report.ratio == report.dense_bytes / report.tpa_bytes and report.allocated


def test_large_caches_are_counted_without_memory(teacher, student):
    report = cache_report(teacher, student, 50_000_000)
    assert not report.allocated and report.dense_bytes > 2**30


def test_layer_rows(student, teacher):
    table = layer_rows(student)
    assert table[5] == {
        "index": 5, "kind": "global", "form_k": "latent", "rank_k": 8, "form_v": "latent", "rank_v": 6, "bits": 16,
        "bits_k": 16, "bits_v": 16, "bytes_per_token": 56,
    }  # fmt: skip
    assert table[0] == layer_rows(teacher)[0]
    assert (table[0]["form_k"], table[0]["rank_k"], table[0]["bytes_per_token"]) == ("dense", 16, 128)


def test_samples(teacher, student):
    samples = greedy_samples(teacher, student, ["Hello", "A longer prompt"], max_tokens=4)
    assert [s["prompt"] for s in samples] == ["Hello", "A longer prompt"]
    assert all(isinstance(s["teacher"], str) and isinstance(s["student"], str) for s in samples)
    same = greedy_samples(teacher, teacher, ["Hello"], max_tokens=4)[0]
    assert same["teacher"] == same["student"]


def test_a_model_without_tokenizer_cannot_be_sampled(student):
    with pytest.raises(UserError, match="tokenizer"):
        greedy_samples(types.SimpleNamespace(**{
            "tokenizer": None, "training": False, "eval": lambda: None, "train": lambda mode: None,
            "head_weight": student.head_weight,
        }), student, ["x"])  # fmt: skip
