"""How far a student's next-token distribution is from the teacher's: what the options mean, and the plain PyTorch form.

With p_T = softmax(z_T / T), p_S = softmax(z_S / T) and M = β p_T + (1 − β) p_S, a token's loss is

    forward_kl   KL(p_T ‖ p_S)                                                        covers all that the teacher does
    reverse_kl   KL(p_S ‖ p_T)                                                        keeps to what the teacher does
    jsd          β KL(p_T ‖ M) + (1 − β) KL(p_S ‖ M)    (Agarwal et al. 2024, eq. 1)  bounded, in between

times T², which keeps the gradient's size (Hinton et al. 2015, §2.1); with ``ce_weight`` w it becomes
(1 − w)·T²·divergence + w·cross-entropy at temperature 1.

Everything is written in x = z_T / T and y = (z_S − z_T) / T. Where student and teacher nearly agree, y is small and
known to full relative precision; Δ = logsumexp(x + y) − logsumexp(x) = log(1 + Σ p_T (e^y − 1)) keeps that precision,
and log p_S − log p_T = y − Δ. Equal models have y = 0, hence a loss and a gradient of exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tpa_train.errors import UserError, nearest

KINDS = ("forward_kl", "reverse_kl", "jsd")
NEAR = 0.5  # |e^Δ − 1| below which log1p is the more precise way to Δ
LARGEST_RATIO = 80.0  # nats; beyond it e^ratio overflows float32, and weighs nothing in a JSD


class DivergenceOptions(Protocol):
    """The options as a recipe spells them (``settings.DistillSettings``)."""

    divergence: str
    jsd_beta: float
    temperature: float
    ce_weight: float


@dataclass(frozen=True)
class Divergence:
    """What a token's loss is.

    Args:
        kind: forward_kl, reverse_kl or jsd.
        beta: weight of the teacher in the JSD's mixture, between 0 and 1.
        temperature: T, by which both models' logits are divided.
        ce_weight: weight of the cross-entropy with the labels, from 0 to 1.

    Raises:
        UserError: a value is out of range; the message names the recipe's option.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"divergence={self.kind} is unknown{nearest(self.kind, KINDS)}")
        if not 0 < self.beta < 1:
            raise UserError(
                f"jsd_beta={self.beta} must lie between 0 and 1; divergence=forward_kl and reverse_kl are its ends."
            )
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be a positive number; 1 leaves logits as they are.")
        if not 0 <= self.ce_weight <= 1:
            raise UserError(f"ce_weight={self.ce_weight} must lie between 0 (no cross-entropy) and 1 (nothing else).")

    @classmethod
    def of(cls, options: DivergenceOptions) -> Divergence:
        """Returns the divergence that a recipe's options describe."""
        return cls(options.divergence, options.jsd_beta, options.temperature, options.ce_weight)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def divergence_and_gradient(
    x: Tensor, y: Tensor, divergence: Divergence, labels: Tensor | None = None, with_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Returns each token's loss [N] and, if asked, its gradient with respect to the student's logits z_S [N, V].

    Args:
        x: the teacher's logits over the temperature, z_T / T [N, V]; float32 or wider.
        y: (z_S − z_T) / T [N, V].
        divergence: what to compute.
        labels: of the cross-entropy, int [N]; negative ones have none.
    """
    t, beta, ce_weight = divergence.temperature, divergence.beta, divergence.ce_weight
    log_teacher = x.log_softmax(-1)
    p_teacher = log_teacher.exp()
    change = _dot(p_teacher, y.expm1())
    ratio = y - change.log1p()  # log p_S − log p_T
    log_student = log_teacher + ratio
    near = change.abs() < NEAR  # false for NaN
    if not bool(near.all()):
        direct = (x + y).log_softmax(-1)
        ratio = torch.where(near, ratio, direct - log_teacher)
        log_student = torch.where(near, log_student, direct)
    p_student = log_student.exp() if with_gradient or divergence.kind != "forward_kl" else None
    gradient = None
    if divergence.kind == "forward_kl":
        loss = -_dot(p_teacher, ratio)
        if with_gradient:
            gradient = torch.where(ratio.abs() < 1, p_teacher * ratio.expm1(), p_student - p_teacher)
    elif divergence.kind == "reverse_kl":
        loss = _dot(p_student, ratio)
        if with_gradient:
            gradient = p_student * (ratio - loss)
    else:
        student_to_m = -(beta * (-ratio).clamp(max=LARGEST_RATIO).expm1()).log1p()  # log(p_S / M)
        teacher_to_m = -((1 - beta) * ratio.clamp(max=LARGEST_RATIO).expm1()).log1p()  # log(p_T / M)
        center = _dot(p_student, student_to_m)
        loss = beta * _dot(p_teacher, teacher_to_m) + (1 - beta) * center
        if with_gradient:
            gradient = (1 - beta) * p_student * (student_to_m - center)
    loss = loss.squeeze(-1) * t**2
    gradient = gradient if gradient is None or t == 1 else gradient * t
    if ce_weight == 0:
        return loss, gradient
    # At temperature 1, whatever the divergence's is.
    log_hard = ((x + y) * t).log_softmax(-1)
    labelled, at = labels >= 0, labels.clamp(min=0)[:, None]
    hard = torch.where(labelled, -log_hard.gather(-1, at).squeeze(-1), 0.0)
    loss = (1 - ce_weight) * loss + ce_weight * hard
    if with_gradient:
        one_hot = torch.zeros_like(log_hard).scatter_(-1, at, 1.0)
        hard = torch.where(labelled[:, None], log_hard.exp() - one_hot, 0.0)
        gradient = (1 - ce_weight) * gradient + ce_weight * hard
    return loss, gradient
