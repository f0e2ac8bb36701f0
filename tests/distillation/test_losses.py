"""The chunked linear + KL: exact zeros, exact values, exact gradients, and no logits of the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from random_models import LargestTensor

from tpa_train.distillation import losses
from tpa_train.distillation.losses import chunk_tokens, linear_kl, normalised_error

N, D, V = 23, 12, 101


@pytest.fixture(params=[(1, 1), (4, 3), (10**6, 5)], ids=["one", "four", "all"])
def chunk(request, monkeypatch):
    """Tokens a chunk, of which some are compared at a time; 23 is a multiple of neither."""
    for name, tokens in zip(("CHUNK_BYTES", "COMPARED_BYTES"), request.param, strict=True):
        monkeypatch.setattr(losses, name, {"cpu": tokens * V * 8})
        assert chunk_tokens(V, torch.device("cpu"), torch.float64, getattr(losses, name)) == tokens
    return request.param[0]


def _random(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return randn(N, D), randn(N, D), randn(V, D), randn(V, D)


def _dense(student, teacher, student_head, teacher_head, weights=None):
    kl = F.kl_div(
        (student @ student_head.T).log_softmax(-1), (teacher @ teacher_head.T).log_softmax(-1),
        log_target=True, reduction="none",
    ).sum(-1)  # fmt: skip
    return (kl.mean() if weights is None else (kl * weights).sum() / weights.sum()), kl


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_head", [False, True])
def test_student_equal_to_teacher_is_exactly_zero(chunk, dtype, own_head):
    hidden, _, head, _ = _random(dtype)
    student, student_head = hidden.clone().requires_grad_(), head.clone().requires_grad_(own_head)
    loss, kl = linear_kl(student, hidden, student_head, head)
    assert loss.item() == 0 and torch.equal(kl, torch.zeros_like(kl))
    loss.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))
    if own_head:
        assert torch.equal(student_head.grad, torch.zeros_like(head))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_equals_the_dense_loss_and_its_gradients(chunk, weighted, trainable_head):
    student, teacher, student_head, teacher_head = _random()
    weights = torch.rand(N, dtype=torch.float64) if weighted else None
    if weighted:
        weights[3] = 0
    leaves = [student.requires_grad_()] + [student_head.requires_grad_()] * trainable_head
    loss, kl = linear_kl(student, teacher, student_head, teacher_head, weights)
    expected, expected_kl = _dense(student, teacher, student_head, teacher_head, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(kl, expected_kl.detach(), rtol=1e-11, atol=1e-13)
    assert not kl.requires_grad and kl.min() > 0
    # An outer factor shows that the incoming gradient is not forgotten.
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_only_the_head_learns(chunk):
    student, teacher, student_head, teacher_head = _random()
    student_head.requires_grad_()
    (ours,) = torch.autograd.grad(linear_kl(student, teacher, student_head, teacher_head)[0], student_head)
    (theirs,) = torch.autograd.grad(_dense(student, teacher, student_head, teacher_head)[0], student_head)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_one_shared_head_is_the_default(chunk):
    student, teacher, head, _ = _random()
    assert torch.equal(linear_kl(student, teacher, head)[0], linear_kl(student, teacher, head, head)[0])


def test_weights_are_normalised(chunk):
    student, teacher, head, _ = _random()
    weights = torch.rand(N, dtype=torch.float64)
    a, b = (linear_kl(student, teacher, head, weights=w)[0] for w in (weights, 7 * weights))
    torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        linear_kl(student, teacher, head)[0], linear_kl(student, teacher, head, weights=torch.ones(N))[0]
    )


def test_zero_weights_give_zero_not_nan(chunk):
    student, teacher, head, _ = _random()
    assert linear_kl(student.requires_grad_(), teacher, head, weights=torch.zeros(N))[0] == 0


def test_gradcheck(chunk):
    student, teacher, student_head, teacher_head = _random()
    weights = torch.rand(3, dtype=torch.float64)
    inputs = (student[:3].clone().requires_grad_(), student_head[:9].clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda s, w: linear_kl(s, teacher[:3], w, teacher_head[:9], weights)[0], inputs)


def test_no_gradient_reaches_the_teacher(chunk):
    student, teacher, student_head, teacher_head = (t.requires_grad_() for t in _random())
    linear_kl(student, teacher, student_head, teacher_head)[0].backward()
    assert teacher.grad is None and teacher_head.grad is None and student.grad is not None


def test_half_precision_heads_give_a_float32_loss(chunk):
    student, teacher, head, _ = _random(torch.bfloat16)
    student = (0.2 * student.float()).requires_grad_()
    loss, kl = linear_kl(student, 0.2 * teacher.float(), head)
    assert loss.dtype == kl.dtype == torch.float32
    expected, _ = _dense(student.double(), 0.2 * teacher.double(), head.double(), head.double())
    torch.testing.assert_close(loss.double(), expected, rtol=0.02, atol=0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == torch.float32
    (theirs,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient.double(), theirs.double(), rtol=0, atol=0.05 * float(theirs.abs().max()))


@pytest.mark.parametrize("trainable_head", [False, True])
def test_no_tensor_of_tokens_times_vocabulary(monkeypatch, trainable_head):
    """64 chunks: nothing is larger than one chunk's logits or the head itself."""
    n, d, v = 512, 4, 1000
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": 8 * v * 4})
    student = torch.randn(n, d, requires_grad=True)
    teacher, head = torch.randn(n, d), torch.randn(v, d, requires_grad=trainable_head)
    with LargestTensor() as watch:
        linear_kl(student, teacher, head)[0].backward()
    assert student.grad is not None and watch.numel == 8 * v < n * v / 50
    with LargestTensor() as watch:
        _dense(student, teacher, head, head)[0].backward()
    assert watch.numel >= n * v  # what the assertion above would catch


def test_the_chunk_follows_the_budget():
    assert chunk_tokens(262_144, torch.device("cpu"), torch.bfloat16) == (128 << 20) // (262_144 * 4)
    assert chunk_tokens(10**12, torch.device("cpu"), torch.float32) == 1


def test_normalised_error():
    target = torch.tensor([[3.0, 4.0]])
    assert normalised_error(target, target) == 0
    assert normalised_error(torch.zeros(1, 2), target) == 1
    assert normalised_error(target + torch.tensor([[1.0, 2.0]]), target) == pytest.approx(5 / 25)
    assert normalised_error(torch.zeros(1, 2), torch.zeros(1, 2)) == 0
    assert normalised_error(target.bfloat16(), target.bfloat16()).dtype == torch.float32
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: normalised_error(x, torch.ones(3, 4, dtype=torch.float64)), x)
