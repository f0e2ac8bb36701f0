"""Distillation losses that never hold [tokens, vocabulary] logits, and the normalised errors of the layer-wise stage.

``linear_kl`` is KL(teacher ‖ student) of two tied heads, computed a few tokens at a time. Its gradient is analytic,

    dL/dh = w_t / Σw · (softmax(W h_S) − softmax(W h_T))ᵀ W,   dL/dW = Σ_t w_t / Σw · (p_S − p_T) h_Sᵀ,

so one pass computes loss and gradient and nothing of vocabulary size is kept for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_train.gemma3.layers import accumulation_dtype

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # of one chunk's logits in the accumulation type


def chunk_tokens(vocab_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Returns how many tokens' logits are held at a time on ``device``."""
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    return max(1, budget // (vocab_size * accumulation_dtype(dtype).itemsize))


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns hidden [N, D] × weight [V, D]ᵀ in float32 (or wider), from operands in the weight's own dtype."""
    hidden = hidden.to(weight.dtype)
    wide = accumulation_dtype(weight.dtype)
    if hidden.is_cuda and weight.dtype != wide:  # half precision operands, float32 result: one kernel
        return torch.mm(hidden, weight.T, out_dtype=wide)
    return torch.mm(hidden, weight.T).to(wide)


def _kl_and_difference(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Returns KL(teacher ‖ student) per token [N] and p_S − p_T [N, V] from logits [N, V]."""
    student = torch.log_softmax(student, -1)
    teacher = torch.log_softmax(teacher, -1)
    p_teacher = teacher.exp()
    kl = (p_teacher * (teacher - student)).sum(-1)
    return kl, student.exp() - p_teacher


_compiled: dict[str, object] = {}


def _chunk_function(device: torch.device):
    """The pointwise part of a chunk; fused by the compiler on CUDA, where it is bound by memory traffic."""
    if device.type != "cuda":
        return _kl_and_difference
    if "cuda" not in _compiled:
        _compiled["cuda"] = torch.compile(_kl_and_difference, dynamic=True)
    return _compiled["cuda"]


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, student_head, teacher_head, weights):
        wide = accumulation_dtype(student_head.dtype)
        step = chunk_tokens(student_head.shape[0], student.device, student_head.dtype)
        function = _chunk_function(student.device)
        needs_hidden, needs_head = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_hidden = torch.zeros_like(student, dtype=wide) if needs_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=wide) if needs_head else None
        per_token = []
        for start in range(0, student.shape[0], step):
            part = slice(start, start + step)
            kl, difference = function(
                head_logits(student[part], student_head), head_logits(teacher[part], teacher_head)
            )
            per_token.append(kl)
            if needs_hidden or needs_head:
                difference = (difference * weights[part, None]).to(student_head.dtype)
            if needs_hidden:
                grad_hidden[part] = difference @ student_head
            if needs_head:
                grad_head += difference.T @ student[part].to(difference.dtype)
        kl = torch.cat(per_token)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = student.dtype, student_head.dtype
        ctx.mark_non_differentiable(kl)
        return (kl * weights).sum(), kl

    @staticmethod
    def backward(ctx, grad_loss, _):
        hidden, head = ctx.saved_tensors
        hidden = None if hidden is None else (hidden * grad_loss).to(ctx.dtypes[0])
        head = None if head is None else (head * grad_loss).to(ctx.dtypes[1])
        return hidden, None, head, None, None


def linear_kl(
    student: Tensor,
    teacher: Tensor,
    student_head: Tensor,
    teacher_head: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) over the full vocabulary, averaged over tokens.

    Args:
        student: final hidden states [N, D].
        teacher: final hidden states [N, D]; no gradient.
        student_head, teacher_head: output matrices [V, D]; the same one when left out.
        weights: of each token [N], normalised here; equal when left out.

    Returns:
        The loss, a scalar in float32 (float64 for float64 heads), and the unweighted KL of every token [N], detached.
    """
    teacher_head = student_head if teacher_head is None else teacher_head
    wide = accumulation_dtype(student_head.dtype)
    count = student.shape[0]
    if weights is None:
        weights = torch.full((count,), 1.0 / count, dtype=wide, device=student.device)
    else:
        weights = weights.to(wide) / weights.to(wide).sum().clamp_min(torch.finfo(wide).tiny)
    with torch.autocast(student.device.type, enabled=False):
        return _LinearKL.apply(student, teacher.detach(), student_head, teacher_head.detach(), weights)


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
