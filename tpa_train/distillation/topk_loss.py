"""KL divergence from a teacher of whom only the most likely tokens are known: k classes and one for all the rest.

N tokens · D hidden size · V vocabulary · k kept classes
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_train.distillation.losses import chunk_tokens, head_logits
from tpa_train.gemma3.layers import accumulation_dtype


def top_log_probabilities(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what ``topk_kl`` needs of a teacher's ``logits`` [N, V].

    Returns:
        classes int64 [N, k], their log-probabilities [N, k], and the log of the remaining probability [N] (−inf for
        k = V).
    """
    log_total = logits.logsumexp(-1, keepdim=True)
    values, classes = logits.topk(k, dim=-1)
    # The rest is summed itself: 1 − Σ p would be all cancellation where the teacher is sure.
    rest = logits.scatter(-1, classes, -torch.inf).logsumexp(-1)
    return classes, values - log_total, rest - log_total[:, 0]


def _xlogy_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns p (log p − log q), 0 where p = 0."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)


class _TopKKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, head, classes, log_p, log_tail, weights):
        wide = accumulation_dtype(head.dtype)
        grad = torch.zeros_like(student, dtype=wide) if ctx.needs_input_grad[0] else None
        per_token = []
        for start in range(0, student.shape[0], chunk_tokens(head.shape[0], student.device, head.dtype)):
            part = slice(start, start + chunk_tokens(head.shape[0], student.device, head.dtype))
            logits = head_logits(student[part], head)
            index, p, tail = classes[part].long(), log_p[part].to(wide), log_tail[part].to(wide)
            log_total = logits.logsumexp(-1, keepdim=True)
            q = logits.gather(-1, index) - log_total
            logits.scatter_(-1, index, -torch.inf)
            rest = logits.logsumexp(-1) - log_total[:, 0]
            per_token.append(_xlogy_ratio(p, q).sum(-1) + _xlogy_ratio(tail, rest))
            if grad is not None:
                share = torch.where(rest > -torch.inf, 1.0 - (tail - rest).exp(), 0.0)
                difference = (logits - log_total).exp_() * share[:, None]
                difference.scatter_(-1, index, q.exp() - p.exp())
                grad[part] = (difference * weights[part, None]).to(head.dtype) @ head
        kl = torch.cat(per_token)
        ctx.save_for_backward(grad)
        ctx.dtype = student.dtype
        ctx.mark_non_differentiable(kl)
        return (kl * weights).sum(), kl

    @staticmethod
    def backward(ctx, grad_loss, _):
        (grad,) = ctx.saved_tensors
        return None if grad is None else (grad * grad_loss).to(ctx.dtype), None, None, None, None, None


def topk_kl(
    student: Tensor,
    head: Tensor,
    classes: Tensor,
    log_probabilities: Tensor,
    log_tail: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) over the teacher's k most likely classes and one class for all others, mean over tokens:

        Σ_{i in top k} p_i log(p_i / q_i) + p₀ log(p₀ / q₀),   p₀ = 1 − Σ p_i,   q₀ = 1 − Σ q_i,

    with q = softmax(W h) over the full vocabulary. Merging classes can only lower a divergence, so it is a lower bound
    of the full KL, and equal to it for k = V. Its gradient is analytic: ∂/∂z_j = q_j − p_j in the top k, and
    q_j (1 − p₀ / q₀) elsewhere; the student is taught how much probability the others share, not how.

    Args:
        student: final hidden states [N, D].
        head: W [V, D]; gets no gradient.
        classes: int [N, k], different in a row.
        log_probabilities: log p_i [N, k].
        log_tail: log p₀ [N]; −inf where nothing is left.
        weights: of each token [N], float or bool, normalised here; equal when left out.

    Returns:
        The loss, a scalar in float32 (float64 for a float64 head), and every token's divergence [N], detached.
    """
    wide = accumulation_dtype(head.dtype)
    weights = torch.ones(student.shape[0], device=student.device) if weights is None else weights
    weights = weights.to(wide) / weights.to(wide).sum().clamp_min(torch.finfo(wide).tiny)
    with torch.autocast(student.device.type, enabled=False):
        return _TopKKL.apply(student, head.detach(), classes, log_probabilities, log_tail, weights)
