"""The Triton kernels against the definition: on the GPU if there is one, else in Triton's interpreter."""

import importlib.util

import pytest
import torch
from dense_divergences import dense, relative_error

from tpa_train.distillation.divergence import KINDS, Divergence
from tpa_train.distillation.losses import TorchDivergence

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (the test extra has it for Linux on x86-64)", allow_module_level=True)
CUDA = torch.cuda.is_available()

from tpa_train.distillation import divergence_kernel  # noqa: E402
from tpa_train.distillation.divergence_kernel import TritonDivergence, _halves, half_of_head, scaled_half  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about values that are not selected
N, D, V = 21, 24, 101
DEVICE = "cuda" if CUDA else "cpu"
CASES = [(1.0, 0.0), (2.0, 0.3), (0.7, 1.0)]  # temperature, weight of the cross-entropy


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in each direction, the last of them partly empty; the interpreter is slow on large ones."""
    sizes = {"TILE_M": 16, "TILE_N": 32, "TILE_K": 16, "ROWS": 16, "TILES": 2, "GRADIENT_ROWS": 16}
    for name, value in sizes.items():
        monkeypatch.setattr(divergence_kernel, name, value)
    monkeypatch.setattr(divergence_kernel, "ENCODE_OPTIONS", {"num_warps": 4, "num_stages": 2})


def _random(dtypes, shared, step=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    hidden_type, head_type = dtypes
    teacher, head = randn(N, D), 0.5 * randn(V, D)
    student, student_head = teacher + step * randn(N, D), head + 0.5 * step * randn(V, D)
    labels = torch.randint(-1, V, (N,), generator=generator)
    student, teacher, labels = (t.to(DEVICE) for t in (student.to(hidden_type), teacher.to(hidden_type), labels))
    head = head.to(DEVICE, head_type)
    return student, teacher, head if shared else student_head.to(DEVICE, head_type), head, labels


def _run(tensors, divergence, chunk=N):
    """Losses [N] and the gradients of Σ w·loss for the hidden states and for the student's head."""
    student, teacher, student_head, teacher_head, labels = tensors
    chunked = TritonDivergence(student, teacher, student_head, teacher_head, labels, divergence)
    weights = torch.linspace(0, 1, N, device=DEVICE)
    losses, hidden, head = [], [], torch.zeros(V, D, device=DEVICE)
    for start in range(0, N, chunk):
        part = slice(start, start + chunk)
        loss, gradient = chunked(part, True)
        losses.append(loss)
        hidden.append(chunked.times_head(gradient) * weights[part, None])
        chunked.add_times_hidden(gradient, part, weights[part], head)
    return torch.cat(losses), torch.cat(hidden), head


def _exact(tensors, divergence):
    *tensors, labels = tensors
    student, teacher, student_head, teacher_head = (t.double().clone() for t in tensors)
    loss = dense(student.requires_grad_(), teacher, student_head.requires_grad_(), teacher_head, divergence, labels)
    weights = torch.linspace(0, 1, N, device=DEVICE, dtype=torch.float64)
    return loss.detach(), *torch.autograd.grad((loss * weights).sum(), (student, student_head))


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature,ce_weight", CASES)
@pytest.mark.parametrize("dtypes,shared", [((BF16, BF16), True), ((F32, BF16), False), ((F32, F32), True)])
def test_equals_the_definition(kind, temperature, ce_weight, dtypes, shared):
    divergence, tensors = Divergence(kind, 0.3, temperature, ce_weight), _random(dtypes, shared)
    exact = _exact(tensors, divergence)
    bounds = (2e-5, 2e-5, 2e-5) if dtypes[1] == F32 else (2e-3, 3e-3, 3e-3)
    for ours, theirs, bound in zip(_run(tensors, divergence), exact, bounds, strict=True):
        assert relative_error(ours, theirs) < bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1e-3, 0.1, 3.0])
def test_bfloat16_gradients_are_as_exact_as_the_dense_float32_ones(kind, step):
    """Both come back in bfloat16, as autograd's gradients of bfloat16 hidden states do."""
    divergence = Divergence(kind)
    tensors = _random((BF16, BF16), True, step)
    student, teacher, head, _, _ = tensors
    exact = _exact(tensors, divergence)[1]
    leaf = student.clone().requires_grad_()
    loss = dense(leaf, teacher, head, head, divergence, dtype=torch.float32)
    (theirs,) = torch.autograd.grad((loss * torch.linspace(0, 1, N, device=DEVICE)).sum(), leaf)
    assert relative_error(_run(tensors, divergence)[1].to(BF16), exact) <= 1.5 * relative_error(theirs, exact)


@pytest.mark.parametrize("shared", [True, False])
def test_float32_hidden_states_keep_their_digits(shared, monkeypatch):
    """Large logits, where float16 hidden states alone cost a few parts in a thousand."""
    divergence, (student, teacher, student_head, teacher_head, labels) = Divergence(), _random((F32, BF16), shared, 0.1)
    tensors = student, teacher, 4 * student_head, 4 * teacher_head, labels
    if shared:
        tensors = student, teacher, tensors[3], tensors[3], labels
    exact, errors = _exact(tensors, divergence)[1], []
    for lost in (divergence_kernel.lost_half, lambda tensor, half, unit: torch.zeros_like(half)):
        monkeypatch.setattr(divergence_kernel, "lost_half", lost)
        errors.append(relative_error(_run(tensors, divergence)[1], exact))
    assert errors[0] < 4e-4 and errors[0] < 0.5 * errors[1], errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, BF16), (F32, F32)])
def test_equal_models_are_exactly_zero(kind, dtypes):
    _, teacher, _, head, labels = _random(dtypes, True)
    for student_head in (head, head.clone()):
        found = _run((teacher.clone(), teacher, student_head, head, labels), Divergence(kind, temperature=1.7))
        assert not any(t.any() for t in found)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32)])
def test_chunks_change_nothing(dtypes):
    divergence, tensors = Divergence("jsd", 0.3, 2.0, 0.2), _random(dtypes, False)
    whole = _run(tensors, divergence)
    for ours, theirs in zip(_run(tensors, divergence, 8), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_models_hundreds_of_nats_apart(kind):
    """As the plain PyTorch form, which has its own test: finite, with the same values."""
    tensors = _random((F32, F32), False, 40.0)
    divergence = Divergence(kind)
    loss, gradient = TorchDivergence(*tensors, divergence)(slice(0, N), True)
    chunked = TritonDivergence(*tensors, divergence)
    ours, our_gradient = chunked(slice(0, N), True)
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(our_gradient, gradient, rtol=0, atol=2e-3)
    assert loss.max() > (0.5 if kind == "jsd" else 5)
    coded = TritonDivergence(*(t.bfloat16() for t in tensors[:4]), None, divergence)
    assert all(t.isfinite().all() for t in coded(slice(0, N), True))


def test_half_of_a_frozen_head_is_kept_until_it_changes():
    head, others = torch.randn(4, 3), len(_halves)
    first = half_of_head(head)
    assert half_of_head(head)[0] is first[0] and torch.equal(first[0], scaled_half(head)[0])
    head.mul_(3.0)
    changed = half_of_head(head)
    assert changed[0] is not first[0] and all(map(torch.equal, changed, scaled_half(head)))
    learning = torch.nn.Parameter(head)
    with torch.no_grad():  # as inside of an autograd function
        assert half_of_head(learning)[0] is not half_of_head(learning)[0]
    del head, learning
    assert len(_halves) == others


def test_scaled_half():
    """A power of two, so bfloat16 numbers survive exactly, and rows of zeros stay zero."""
    tensor = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    tensor *= torch.tensor([[1e-9], [1], [1e9], [3], [0]])
    for dim in (-1, None):
        half, unit = scaled_half(tensor.bfloat16(), dim)
        rows = slice(None) if dim is not None else [2]
        assert half.isfinite().all() and torch.equal((half.float() * unit)[rows], tensor.bfloat16().float()[rows])
