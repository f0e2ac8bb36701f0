"""The distillation loss: time, memory and gradient error, beside float32 loops and Liger's kernel.

What is timed is the loss and its gradient with respect to the student's hidden states, the head frozen and shared. The
gradient error is relative (L2) to float64 on the first tokens; ``grad_error_dense`` is that of ``dense_float32``, which
computes the same in float32 throughout. Other rows: ``dense_autocast`` keeps half precision logits, as a training loop
under autocast does; ``liger`` is Liger-Kernel's FusedLinearJSD, where that package is installed.

``dtype`` is that of hidden states and head; ``mixed`` has float32 hidden states and a bfloat16 head, as training here.
``case`` is how far the student is from the teacher: far 1 nat or so, near a thousandth.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpa_train.benchmarks.sizes import check_positive
from tpa_train.cli import choose_device
from tpa_train.distillation.divergence import KINDS, Divergence
from tpa_train.distillation.losses import linear_divergence
from tpa_train.errors import UserError, nearest

DTYPES = {  # hidden states, head
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
}
CASES = {"far": 0.3, "near": 0.01}  # size of the student's change in its hidden states
LOGIT_STD = 5.0  # over the vocabulary; few words carry most of the probability, as in language
DENSE_CHUNK = 1024  # tokens of the loops' logits
TIMED_SECONDS = 0.3  # after which nothing is repeated

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # student, teacher, head -> loss, gradient


@dataclass
class LossSettings:
    """Options of ``benchmark.py loss``."""

    tokens: list[int] = field(default_factory=lambda: [4096, 16384, 65536], metadata={"help": "sizes of a batch"})
    vocab: int = field(default=262_144, metadata={"help": "words"})
    hidden_size: int = field(default=640, metadata={"help": "of the hidden states (270M: 640, 4B: 2560)"})
    dtypes: list[str] = field(
        default_factory=lambda: list(DTYPES), metadata={"help": "out of bfloat16, mixed, float32"}
    )
    repeats: int = field(default=5, metadata={"help": "timed runs, of which the median counts; fewer if they are slow"})
    checked: int = field(default=64, metadata={"help": "tokens whose gradient is compared with float64"})
    seed: int = field(default=0, metadata={"help": "decides head and hidden states"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; null: an accelerator if there is one"})


def run(settings: LossSettings) -> list[dict[str, Any]]:
    """Returns one row for each implementation, divergence, precision, case and number of tokens.

    Raises:
        UserError: an option is out of range.
    """
    check_positive(settings, "vocab", "hidden_size", "repeats", "checked")
    if not settings.tokens or min(settings.tokens) < 1:
        raise UserError(f"tokens={settings.tokens} must be a list of positive numbers, such as [4096,16384].")
    for name in settings.dtypes:
        if name not in DTYPES:
            raise UserError(f"dtypes: '{name}' is unknown{nearest(name, DTYPES)}")
    device, rows, warm = choose_device(settings.device), [], set()
    middle = sorted(settings.tokens)[(len(settings.tokens) - 1) // 2]
    for dtype in settings.dtypes:
        for case in CASES:
            student, teacher, head = inputs(settings, dtype, case, device)
            for tokens in sorted(settings.tokens):
                for kind in KINDS if tokens == middle and dtype == settings.dtypes[0] else KINDS[:1]:
                    first = student[:tokens], teacher[:tokens], head
                    rows += measure(settings, Divergence(kind), dtype, case, first, warm)
    if importlib.util.find_spec("liger_kernel") is None:
        rows.append({"name": "liger", "note": "not measured: liger-kernel is not installed"})
    elif device.type != "cuda":
        rows.append({"name": "liger", "note": "not measured: its kernel needs CUDA"})
    return rows


def inputs(settings: LossSettings, dtype: str, case: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns student's and teacher's hidden states [N, D] and the head [V, D], N as many as the largest size.

    The head's rows have a common part, as embeddings do: it cancels in the loss, not in the logits' rounding.
    """
    generator = torch.Generator(device).manual_seed(settings.seed)
    hidden_type, head_type = DTYPES[dtype]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    d = settings.hidden_size
    head = (randn(settings.vocab, d) + 0.5 * randn(d)) * (LOGIT_STD * d**-0.5)
    teacher = randn(max(settings.tokens), d)
    student = teacher + CASES[case] * randn(*teacher.shape)
    return student.to(hidden_type), teacher.to(hidden_type), head.to(head_type)


def measure(
    settings: LossSettings, divergence: Divergence, dtype: str, case: str,
    tensors: tuple[Tensor, Tensor, Tensor], warm: set[tuple[str, str, str]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yields a row for each implementation that can compute this; ``warm`` says which of them have run before."""
    student, teacher, head = tensors
    tokens, checked = student.shape[0], min(settings.checked, student.shape[0])
    first = student[:checked], teacher[:checked], head
    exact = dense_loss(divergence, torch.float64, tokens)(*(t.double() for t in first))[1]

    def error(gradient: Tensor) -> float:
        return float((gradient[:checked].double() - exact).norm() / exact.norm())

    dense_error = error(dense_loss(divergence, torch.float32, tokens)(*first)[1])
    implementations: dict[str, Loss] = {
        "ours": our_loss(divergence),
        "dense_float32": dense_loss(divergence, torch.float32, tokens),
        "dense_autocast": dense_loss(divergence, None, tokens),
    }
    if dtype == "float32":
        del implementations["dense_autocast"]  # the same thing
    if dtype != "mixed" and student.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        implementations["liger"] = liger_loss(divergence)
    for name, function in implementations.items():
        row = {"name": name, "divergence": divergence.kind, "dtype": dtype, "case": case, "tokens": tokens}
        try:
            work = functools.partial(function, student, teacher, head)
            if (name, divergence.kind, dtype) not in warm:  # compiles
                work()
                warm.add((name, divergence.kind, dtype))
            (loss, gradient), milliseconds, peak = timed(work, settings.repeats, head.device)
        except torch.OutOfMemoryError:
            yield row | {"note": "out of memory"}
            continue
        yield row | {
            "ms": milliseconds, "peak_gib": peak, "loss": float(loss),
            "grad_error": error(gradient), "grad_error_dense": dense_error,
        }  # fmt: skip


def our_loss(divergence: Divergence) -> Loss:
    def loss(student: Tensor, teacher: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        student = student.detach().requires_grad_()
        value, _ = linear_divergence(student, teacher, head, divergence=divergence)
        return value.detach(), torch.autograd.grad(value, student)[0]

    return loss


def dense_loss(divergence: Divergence, wide: torch.dtype | None, tokens: int) -> Loss:
    """Returns a loop over chunks of tokens that leaves everything to autograd.

    Args:
        divergence: what to compute, at temperature 1.
        wide: in which the logits are computed; those of None are computed in half precision and used in float32.
        tokens: by which the sum over tokens is divided.
    """

    def logits(hidden: Tensor, head: Tensor) -> Tensor:
        return (hidden.to(head.dtype) @ head.T).float() if wide is None else hidden.to(wide) @ head.T

    def loss(student: Tensor, teacher: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        head = head if wide is None else head.to(wide)
        gradient, total = torch.empty_like(student), 0.0
        for start in range(0, student.shape[0], DENSE_CHUNK):
            part = slice(start, start + DENSE_CHUNK)
            leaf = student[part].detach().requires_grad_()
            log_s, log_t = logits(leaf, head).log_softmax(-1), logits(teacher[part], head).log_softmax(-1)
            if divergence.kind == "forward_kl":
                value = (log_t.exp() * (log_t - log_s)).sum()
            elif divergence.kind == "reverse_kl":
                value = (log_s.exp() * (log_s - log_t)).sum()
            else:
                beta = divergence.beta
                log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
                value = beta * (log_t.exp() * (log_t - log_m)).sum()
                value = value + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum()
            (gradient[part],) = torch.autograd.grad(value / tokens, leaf)
            total = total + value.detach() / tokens
        return total, gradient

    return loss


def liger_loss(divergence: Divergence) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD

    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": divergence.beta}
    fused = LigerFusedLinearJSD(jsd_beta=betas[divergence.kind])

    def loss(student: Tensor, teacher: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        student = student.detach().requires_grad_()
        value = fused(student, head, teacher, head, None)
        return value.detach(), torch.autograd.grad(value, student)[0]

    return loss


def timed(work: Callable[[], Any], repeats: int, device: torch.device) -> tuple[Any, float, float | None]:
    """Returns the result, the median time in milliseconds, and (on CUDA) the memory beyond the inputs in GiB."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times, result = [], None
    while len(times) < repeats and sum(times) < TIMED_SECONDS:
        result = None
        start = time.perf_counter()
        result = work()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    return result, 1000 * statistics.median(times), peak
