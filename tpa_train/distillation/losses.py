"""Distillation losses that never hold [tokens, vocabulary] logits, and the normalised errors of the layer-wise stage.

``linear_divergence`` compares the next-token distributions of two output heads, a few tokens at a time
(``divergence.py`` says what the divergences are). Its gradient is analytic: with g_t the gradient of token t's loss
with respect to the student's logits (p_S − p_T for the forward KL at temperature 1) and c_t = w_t / Σw,

    dL/dh_t = c_t · g_t W,        dL/dW = Σ_t c_t · g_t h_Sᵀ,

so one pass computes loss and gradient and nothing of vocabulary size is kept for the backward pass. On CUDA, half
precision heads go through the Triton kernels of ``divergence_kernel.py``; everything else is plain PyTorch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from tpa_train.distillation.divergence import Divergence, divergence_and_gradient
from tpa_train.gemma3.layers import accumulation_dtype

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # of one chunk's logits in the accumulation type
# Of the logits that are compared at a time: several tensors of that size live at once, and on a CPU large ones come as
# new pages from the system every time.
COMPARED_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


def chunk_tokens(
    vocab_size: int, device: torch.device, dtype: torch.dtype, budgets: Mapping[str, int] | None = None
) -> int:
    """Returns how many tokens' logits are held at a time on ``device``; ``budgets``: in place of ``CHUNK_BYTES``."""
    budgets = CHUNK_BYTES if budgets is None else budgets
    budget = budgets.get(device.type, budgets["cpu"])
    return max(1, budget // (vocab_size * accumulation_dtype(dtype).itemsize))


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns hidden [N, D] × weight [V, D]ᵀ in float32 (or wider), from operands in the weight's own dtype."""
    hidden = hidden.to(weight.dtype)
    wide = accumulation_dtype(weight.dtype)
    if hidden.is_cuda and weight.dtype != wide:  # half precision operands, float32 result: one kernel
        return torch.mm(hidden, weight.T, out_dtype=wide)
    return torch.mm(hidden, weight.T).to(wide)


class ChunkedDivergence(Protocol):
    """Losses and gradients of a few tokens at a time: ``TorchDivergence``, or ``TritonDivergence`` on CUDA."""

    step: int  # tokens of a chunk

    def __call__(self, part: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Returns the losses [n] of the tokens ``part``, and the gradient of each with respect to its logits [n, V].

        The gradient may be scaled, is overwritten by the next call, and is read by the methods below only.
        """

    def times_head(self, gradient: Tensor) -> Tensor:
        """Returns gradient × student head [n, D]."""

    def add_times_hidden(self, gradient: Tensor, part: slice, weights: Tensor, total: Tensor) -> None:
        """Adds gradientᵀ × (weights ⊙ student's hidden states) to ``total`` [V, D]."""


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Returns whether both are the same numbers in memory (of DTensors: whether their shards are)."""
    a, b = (t.to_local() if hasattr(t, "to_local") else t for t in (a, b))
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


class TorchDivergence:
    """``ChunkedDivergence`` in plain PyTorch, with products in the heads' own dtypes."""

    def __init__(
        self, student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor,
        labels: Tensor | None, divergence: Divergence,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.labels, self.divergence = student, teacher, labels, divergence
        self.student_head, self.teacher_head = student_head, teacher_head
        self.shared = same_tensor(student_head, teacher_head)
        self.wide = torch.promote_types(accumulation_dtype(student_head.dtype), accumulation_dtype(teacher_head.dtype))
        self.step = chunk_tokens(student_head.shape[0], student.device, self.wide)
        self.compared = chunk_tokens(student_head.shape[0], student.device, self.wide, COMPARED_BYTES)

    def __call__(self, part: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        student, teacher, t = self.student[part], self.teacher[part], self.divergence.temperature
        x = head_logits(teacher, self.teacher_head).to(self.wide).div_(t)
        if self.shared:  # the difference of large logits would lose the digits that a small one has
            y = head_logits(student.to(self.wide) - teacher.to(self.wide), self.student_head).to(self.wide).div_(t)
        else:
            y = head_logits(student, self.student_head).to(self.wide).div_(t).sub_(x)
        labels = None if self.labels is None else self.labels[part]
        losses = y.new_empty(len(y))
        for first in range(0, len(y), self.compared):
            rows = slice(first, first + self.compared)
            own = None if labels is None else labels[rows]
            losses[rows], gradient = divergence_and_gradient(x[rows], y[rows], self.divergence, own, with_gradient)
            if gradient is not None:
                y[rows] = gradient
        return losses, y if with_gradient else None

    def times_head(self, gradient: Tensor) -> Tensor:
        return gradient.to(self.student_head.dtype) @ self.student_head

    def add_times_hidden(self, gradient: Tensor, part: slice, weights: Tensor, total: Tensor) -> None:
        dtype = self.student_head.dtype
        total += gradient.to(dtype).T @ (self.student[part].to(self.wide) * weights[:, None]).to(dtype)


def _chunked(
    student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor, labels, divergence, exact: bool
) -> ChunkedDivergence:
    """Returns what computes the chunks on this device and in this precision."""
    wide = torch.promote_types(student_head.dtype, teacher_head.dtype).itemsize > 4
    if student.is_cuda and not wide and importlib.util.find_spec("triton") is not None:
        from tpa_train.distillation.divergence_kernel import TritonDivergence

        return TritonDivergence(student, teacher, student_head, teacher_head, labels, divergence, exact)
    return TorchDivergence(student, teacher, student_head, teacher_head, labels, divergence)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, student_head, teacher_head, weights, labels, divergence, exact):
        needs_hidden, needs_head = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        chunked = _chunked(student, teacher, student_head, teacher_head, labels, divergence, exact)
        grad_hidden = torch.empty_like(student, dtype=weights.dtype) if needs_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=weights.dtype) if needs_head else None
        per_token = torch.empty_like(weights)
        for start in range(0, student.shape[0], chunked.step):
            part = slice(start, start + chunked.step)
            per_token[part], gradient = chunked(part, needs_hidden or needs_head)
            if needs_hidden:
                torch.mul(chunked.times_head(gradient), weights[part, None], out=grad_hidden[part])
            if needs_head:
                chunked.add_times_hidden(gradient, part, weights[part], grad_head)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = student.dtype, student_head.dtype
        ctx.mark_non_differentiable(per_token)
        return (per_token * weights).sum(), per_token

    @staticmethod
    def backward(ctx, grad_loss, _):
        hidden, head = ctx.saved_tensors
        hidden = None if hidden is None else (hidden * grad_loss).to(ctx.dtypes[0])
        head = None if head is None else (head * grad_loss).to(ctx.dtypes[1])
        return hidden, None, head, None, None, None, None, None


def _gathered(head: Tensor) -> Tensor:
    """Returns a head that FSDP2 has sharded as one local tensor; its gradient goes back to the shards."""
    return head.full_tensor() if hasattr(head, "full_tensor") else head


def linear_divergence(
    student: Tensor,
    teacher: Tensor,
    student_head: Tensor,
    teacher_head: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    divergence: Divergence = Divergence(),  # noqa: B008 (frozen)
    labels: Tensor | None = None,
    normaliser: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """A divergence of two output heads over the full vocabulary: Σ_t w_t·loss_t / Σ_t w_t.

    Where both heads are one tensor, the logits' difference is computed from the difference of the hidden states, which
    keeps its digits when student and teacher nearly agree.

    Args:
        student: final hidden states [N, D].
        teacher: final hidden states [N, D]; no gradient.
        student_head, teacher_head: output matrices [V, D]; the same one when left out. A DTensor is gathered: the loss
            needs whole rows of logits.
        weights: of each token [N], float or bool; equal when left out.
        divergence: what is computed; the forward KL at temperature 1 when left out.
        labels: the right tokens, int [N], where ``divergence.ce_weight`` > 0; a negative one has no cross-entropy.
        normaliser: what to divide by in place of Σ w of these tokens, a number or a scalar tensor: the sum over all
            ranks and accumulated batches makes every token count alike. DDP and FSDP average gradients over ranks, so
            multiply the loss by their number then.

    Returns:
        The loss, a scalar in float32 (float64 for float64 heads), and the unweighted loss of every token [N], detached.

    Raises:
        ValueError: cross-entropy without labels.
    """
    teacher_head = student_head if teacher_head is None else teacher_head
    if divergence.ce_weight > 0 and labels is None:
        raise ValueError("a divergence with ce_weight > 0 needs labels")
    shared = same_tensor(student_head, teacher_head)
    student_head = _gathered(student_head)
    teacher_head = (student_head if shared else _gathered(teacher_head)).detach()
    wide = accumulation_dtype(student_head.dtype)
    weights = torch.ones(student.shape[0], device=student.device) if weights is None else weights
    weights = weights.to(wide)
    normaliser = weights.sum() if normaliser is None else torch.as_tensor(normaliser, dtype=wide, device=student.device)
    weights = weights / normaliser.clamp_min(torch.finfo(wide).tiny)
    # Under autocast hidden states come from half precision products: digits beyond float16's are noise by then.
    exact = not torch.is_autocast_enabled(student.device.type)
    with torch.autocast(student.device.type, enabled=False):
        return _LinearDivergence.apply(
            student, teacher.detach(), student_head, teacher_head, weights, labels, divergence, exact
        )


def linear_kl(
    student: Tensor,
    teacher: Tensor,
    student_head: Tensor,
    teacher_head: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) over the full vocabulary, averaged over tokens: ``linear_divergence`` without options."""
    return linear_divergence(student, teacher, student_head, teacher_head, weights)


def normalised_error(output: Tensor, target: Tensor, root: Tensor | None = None) -> Tensor:
    """Returns Σ‖M^½(output − target)‖² / Σ‖M^½ target‖², a scalar in float32 or wider; 1 is as bad as predicting zero.

    Args:
        output, target: [..., D].
        root: M^½ [D, D], symmetric; the identity when left out.
    """
    wide = accumulation_dtype(target.dtype)
    target = target.to(wide)
    difference = output.to(wide) - target
    if root is not None:
        with torch.autocast(target.device.type, enabled=False):
            # In the output's own precision: the difference is taken, and squares are summed, in the wide one.
            root = root.to(output.dtype)
            difference, target = ((t.to(output.dtype) @ root).to(wide) for t in (difference, target))
    return difference.square().sum() / target.square().sum().clamp_min(torch.finfo(wide).tiny)
