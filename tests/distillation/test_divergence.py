"""Every divergence against its definition in float64; zeros, weights, cross-entropy, sharded heads, precision."""

import math

import pytest
import torch
import torch.distributed as dist
from dense_divergences import dense, relative_error
from hypothesis import given
from hypothesis import strategies as st

from tpa_train.distillation import losses
from tpa_train.distillation.divergence import KINDS, Divergence, divergence_and_gradient
from tpa_train.distillation.losses import linear_divergence
from tpa_train.errors import UserError

N, D, V = 23, 12, 101
CASES = [
    Divergence(kind, beta, temperature, ce_weight)
    for kind in KINDS
    for beta, temperature, ce_weight in ((0.5, 1.0, 0.0), (0.2, 2.0, 0.0), (0.9, 0.7, 0.3), (0.5, 1.0, 1.0))
]
ids = [f"{d.kind}-{d.beta}-T{d.temperature}-ce{d.ce_weight}" for d in CASES]


@pytest.fixture(params=[3, 10**6], ids=["three", "all"])
def chunk(request, monkeypatch):
    """Tokens a chunk; 23 is no multiple of 3."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": request.param * V * 8})


def _random(dtype=torch.float64, seed=0, step=1.0):
    """Student, teacher, both heads; the students are ``step`` away from the teachers."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher, head = randn(N, D), randn(V, D)
    tensors = teacher + step * randn(N, D), teacher, head + step * randn(V, D), head
    return tuple(t.to(dtype) for t in tensors)


def _labels(seed=0):
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed))
    labels[::4] = -1
    return labels


@pytest.mark.parametrize("divergence", CASES, ids=ids)
@pytest.mark.parametrize("head", ["shared", "own", "trained"])
def test_equals_the_definition(chunk, divergence, head):
    student, teacher, student_head, teacher_head = _random()
    if head == "shared":
        student_head = teacher_head
    labels, weights = _labels(), torch.rand(N, dtype=torch.float64)
    weights[5] = 0
    leaves = [student.requires_grad_()] + [student_head.requires_grad_()] * (head == "trained")
    loss, per_token = linear_divergence(
        student, teacher, student_head, teacher_head, weights, divergence=divergence, labels=labels
    )
    exact = dense(student, teacher, student_head, teacher_head.detach(), divergence, labels)
    torch.testing.assert_close(per_token, exact.detach(), rtol=1e-11, atol=1e-12)
    exact = (exact * weights).sum() / weights.sum()
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * exact, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_head", [False, True])
def test_equal_models_are_exactly_zero(chunk, kind, dtype, own_head):
    _, hidden, _, head = _random(dtype)
    student, student_head = hidden.clone().requires_grad_(), (head.clone() if own_head else head).requires_grad_()
    divergence = Divergence(kind, temperature=1.7)
    loss, per_token = linear_divergence(student, hidden, student_head, head, divergence=divergence)
    loss.backward()
    assert loss == 0 and not per_token.any() and not student.grad.any() and not student_head.grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1e-4, 1e-2, 1.0])
def test_float32_gradients_are_as_exact_as_the_dense_ones(kind, step):
    """Where student and teacher nearly agree, far more exact: their logits' difference keeps its digits."""
    divergence, errors = Divergence(kind), {"ours": [], "dense": []}
    for seed in range(4):
        student, teacher, _, head = _random(torch.float32, seed, step)
        head = 3 * head + 5
        student.requires_grad_()
        values = {
            "ours": linear_divergence(student, teacher, head, divergence=divergence)[0],
            "dense": dense(student, teacher, head, head, divergence, dtype=torch.float32).mean(),
        }
        (exact,) = torch.autograd.grad(dense(student, teacher, head, head, divergence).mean(), student)
        for name, value in values.items():
            errors[name].append(relative_error(torch.autograd.grad(value, student)[0], exact.double()))
    assert max(errors["ours"]) <= 1.5 * max(errors["dense"])
    if step == 1e-4:
        assert max(errors["ours"]) < 0.05 * max(errors["dense"])


@pytest.mark.parametrize("kind", KINDS)
def test_models_hundreds_of_nats_apart(kind):
    """No overflow, and still the definition's values: float32 against float64."""
    generator = torch.Generator().manual_seed(0)
    x, change = (100 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    change += 300  # a shift that the softmax does not see
    x, change = x.float().double(), change.float().double()
    divergence = Divergence(kind)
    (loss, gradient), (exact, exact_gradient) = (
        divergence_and_gradient(x.to(dtype), change.to(dtype), divergence) for dtype in (torch.float32, torch.float64)
    )
    eye = torch.eye(V, dtype=torch.float64)
    torch.testing.assert_close(exact, dense(x + change, x, eye, eye, divergence), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=1e-3)


@given(st.integers(0, 2**16), st.floats(0.05, 0.95), st.floats(0.01, 10.0))
def test_what_holds_of_every_jsd(seed, beta, step):
    """Not negative, at most the entropy of the mixture's two parts, and the same after swapping models and weights."""
    student, teacher, _, head = _random(seed=seed, step=step)
    _, one = linear_divergence(student, teacher, head, divergence=Divergence("jsd", beta))
    _, other = linear_divergence(teacher, student, head, divergence=Divergence("jsd", 1 - beta))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert one.min() > -1e-13
    assert one.max() <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-12


def test_a_small_beta_is_a_forward_kl_and_a_large_one_a_reverse_kl():
    student, teacher, _, head = _random(step=0.3)
    for kind, beta in (("forward_kl", 1e-6), ("reverse_kl", 1 - 1e-6)):
        _, kl = linear_divergence(student, teacher, head, divergence=Divergence(kind))
        _, jsd = linear_divergence(student, teacher, head, divergence=Divergence("jsd", beta))
        torch.testing.assert_close(jsd / min(beta, 1 - beta), kl, rtol=1e-3, atol=1e-6)


def test_the_normaliser_makes_all_tokens_of_several_batches_count_alike():
    student, teacher, _, head = _random()
    mask = torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.5
    student.requires_grad_()
    whole, _ = linear_divergence(student, teacher, head, weights=mask)
    parts = [
        linear_divergence(student[part], teacher[part], head, weights=mask[part], normaliser=mask.sum())[0]
        for part in (slice(0, 5), slice(5, None))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-13, atol=0)
    (ours,), (theirs,) = torch.autograd.grad(sum(parts), student), torch.autograd.grad(whole, student)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    assert not theirs[~mask].any() and theirs[mask].any()
    _, per_token = linear_divergence(student, teacher, head)
    torch.testing.assert_close(whole, per_token[mask].mean().detach(), rtol=1e-13, atol=0, check_dtype=False)


def test_cross_entropy_needs_labels():
    student, teacher, _, head = _random()
    with pytest.raises(ValueError, match="needs labels"):
        linear_divergence(student, teacher, head, divergence=Divergence(ce_weight=0.5))


@pytest.mark.parametrize("options,message", [
    ({"kind": "forward_kll"}, "divergence=forward_kll is unknown; did you mean 'forward_kl'"),
    ({"beta": 0.0}, "jsd_beta=0.0 must lie between 0 and 1"), ({"beta": 1.0}, "jsd_beta=1.0"),
    ({"temperature": 0.0}, "temperature=0.0 must be a positive number"), ({"temperature": math.inf}, "temperature=inf"),
    ({"temperature": math.nan}, "temperature=nan"), ({"ce_weight": 1.5}, "ce_weight=1.5 must lie between 0"),
])  # fmt: skip
def test_values_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        Divergence(**options)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("trained", [False, True])
def test_a_sharded_head_is_gathered(mesh, trained):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    student, teacher, student_head, teacher_head = _random()
    leaves = [student.requires_grad_()] + [student_head.requires_grad_()] * trained
    expected, _ = linear_divergence(student, teacher, student_head, teacher_head)
    sharded = distribute_tensor(student_head.detach(), mesh, [Shard(0)]).requires_grad_(trained)
    ours, _ = linear_divergence(student, teacher, sharded, distribute_tensor(teacher_head, mesh, [Shard(0)]))
    assert torch.equal(ours, expected)
    theirs = torch.autograd.grad(expected, leaves)
    ours = torch.autograd.grad(ours, [student] + [sharded] * trained)
    assert torch.equal(ours[0], theirs[0])
    if trained:
        assert isinstance(ours[1], DTensor) and torch.equal(ours[1].full_tensor(), theirs[1])
    # One head for both, as with tied frozen embeddings: the difference of the hidden states is used.
    head = distribute_tensor(teacher_head, mesh, [Shard(0)])
    assert linear_divergence(teacher, teacher, head, head)[0] == 0
