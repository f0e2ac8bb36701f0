"""The divergences as their definitions say, in float64, with everything left to autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpa_train.distillation.divergence import Divergence


def dense(
    student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor, divergence: Divergence,
    labels: Tensor | None = None, dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """Returns each token's loss [N]; arguments as of ``linear_divergence``."""
    z_s, z_t = (h.to(dtype) @ w.to(dtype).T for h, w in ((student, student_head), (teacher, teacher_head)))
    t, beta = divergence.temperature, divergence.beta
    log_s, log_t = (z_s / t).log_softmax(-1), (z_t / t).log_softmax(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    if divergence.kind == "forward_kl":
        loss = (p_t * (log_t - log_s)).sum(-1)
    elif divergence.kind == "reverse_kl":
        loss = (p_s * (log_s - log_t)).sum(-1)
    else:
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
        loss = beta * (p_t * (log_t - log_m)).sum(-1) + (1 - beta) * (p_s * (log_s - log_m)).sum(-1)
    loss = loss * t**2
    if divergence.ce_weight > 0:
        hard = -z_s.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
        loss = (1 - divergence.ce_weight) * loss + divergence.ce_weight * torch.where(labels >= 0, hard, 0.0)
    return loss


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())
