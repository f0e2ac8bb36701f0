"""Streaming metrics against dense float64 computations."""

import math

import pytest
import torch
import torch.nn.functional as F

from tpa_train.errors import UserError
from tpa_train.evaluation.metrics import (
    QualityMetric,
    TokenComparison,
    compare_tokens,
    next_token_mask,
    position_edges,
    score_tokens,
)

N, D, V = 37, 12, 101


def _random(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden_t = torch.randn(N, D, generator=generator, dtype=dtype)
    hidden_s = hidden_t + 0.3 * torch.randn(N, D, generator=generator, dtype=dtype)
    head_t = torch.randn(V, D, generator=generator, dtype=dtype)
    head_s = head_t + 0.1 * torch.randn(V, D, generator=generator, dtype=dtype)
    return hidden_t, hidden_s, head_t, head_s, torch.randint(V, (N,), generator=generator)


def _joined(comparisons) -> TokenComparison:
    parts = [c for _, c in comparisons]
    return TokenComparison(*(torch.cat([getattr(p, f) for p in parts]) for f in TokenComparison.__dataclass_fields__))


@pytest.mark.parametrize("block", [(5, 7), (64, 101), (37, 50), (1, 1)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_the_dense_computation(block, dtype, tolerance):
    hidden_t, hidden_s, head_t, head_s, targets = _random()
    log_t, log_s = (hidden_t @ head_t.T).log_softmax(-1), (hidden_s @ head_s.T).log_softmax(-1)
    result = _joined(compare_tokens(hidden_t, hidden_s, head_t, head_s, targets, dtype, block))
    expected_kl = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(result.kl, expected_kl, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        result.teacher_nll, F.nll_loss(log_t, targets, reduction="none"), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        result.student_nll, F.nll_loss(log_s, targets, reduction="none"), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(result.agree, log_t.argmax(-1) == log_s.argmax(-1))
    nll, best = score_tokens(hidden_s, head_s, targets, dtype, block)
    torch.testing.assert_close(nll, result.student_nll, rtol=1e-6, atol=1e-6)
    assert torch.equal(best, log_s.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_against_itself_is_exactly_zero(dtype):
    hidden, _, head, _, targets = _random(dtype=torch.float32)
    result = _joined(compare_tokens(hidden, hidden.clone(), head, head.clone(), targets, dtype, (8, 16)))
    assert torch.equal(result.kl, torch.zeros(N, dtype=torch.float64)) and bool(result.agree.all())
    assert torch.equal(result.teacher_nll, result.student_nll)


def test_large_scores_do_not_overflow():
    hidden_t, hidden_s, head_t, head_s, targets = _random(dtype=torch.float32)
    result = _joined(compare_tokens(hidden_t * 300, hidden_s * 300, head_t, head_s, targets, block=(8, 16)))
    assert all(torch.isfinite(getattr(result, f)).all() for f in ("kl", "teacher_nll", "student_nll"))
    log_t = (hidden_t.double() * 300 @ head_t.double().T).log_softmax(-1)
    log_s = (hidden_s.double() * 300 @ head_s.double().T).log_softmax(-1)
    expected = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(result.kl, expected, rtol=1e-4, atol=1e-2)


def test_equal_scores_choose_the_first_token():
    hidden, head = torch.ones(3, 2), torch.ones(10, 2)
    _, best = score_tokens(hidden, head, torch.zeros(3, dtype=torch.long), block=(2, 3))
    assert best.tolist() == [0, 0, 0]


def test_autocast_does_not_reach_the_head():
    hidden_t, hidden_s, head_t, head_s, targets = _random(dtype=torch.float32)
    plain = _joined(compare_tokens(hidden_t, hidden_s, head_t, head_s, targets))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_joined(compare_tokens(hidden_t, hidden_s, head_t, head_s, targets)).kl, plain.kl)


def test_nan_is_not_hidden():
    hidden_t, hidden_s, head_t, head_s, targets = _random(dtype=torch.float32)
    hidden_s[3] = torch.nan
    metric = QualityMetric(8)
    for part, comparison in compare_tokens(hidden_t, hidden_s, head_t, head_s, targets):
        metric.update(comparison, torch.ones(N, dtype=torch.long)[part])
    measured = metric.compute()
    assert math.isnan(measured["kl"]) and math.isnan(measured["perplexity"])
    assert math.isfinite(measured["teacher_perplexity"])


def test_vocabularies_must_agree():
    hidden_t, hidden_s, head_t, head_s, targets = _random()
    with pytest.raises(UserError, match="101 and 100"):
        next(compare_tokens(hidden_t, hidden_s, head_t, head_s[:-1], targets))


def test_the_next_documents_first_token_is_not_scored():
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1]])
    scored, seen = next_token_mask(torch.zeros_like(document_ids), document_ids)
    assert scored.tolist() == [[True, True, False, True, False, False, False]]
    assert seen[scored].tolist() == [1, 2, 1]
    scored, seen = next_token_mask(torch.zeros(2, 4, dtype=torch.long))
    assert bool(scored.all()) and seen.tolist() == [[1, 2, 3]] * 2


def test_positions_fall_into_log_spaced_bins():
    assert position_edges(8192) == [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert position_edges(1000)[-2:] == [512, 1000]
    metric = QualityMetric(4)  # edges 1, 2, 4
    assert metric.edges == [1, 2, 4]
    value = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    metric.update(TokenComparison(value, 2 * value, value / 10, value > 2), torch.tensor([1, 2, 3, 4]))
    measured = metric.compute()
    assert [(b["from"], b["to"], b["tokens"]) for b in measured["by_position"]] == [(1, 1, 1), (2, 2, 1), (3, 4, 2)]
    assert measured["by_position"][2]["teacher_nll"] == 4 and measured["by_position"][2]["nll"] == 8
    assert measured["tokens"] == 4 and measured["top1"] == 0.5
    assert measured["kl"] == pytest.approx(0.275) and measured["perplexity"] == pytest.approx(math.exp(5.5))


def test_nothing_scored_is_an_error():
    with pytest.raises(UserError, match="no token to score"), pytest.warns(UserWarning, match="before the ``update``"):
        QualityMetric(8).compute()
