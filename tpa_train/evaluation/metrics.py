"""How far a student is from its teacher, token by token, without ever holding [B, L, V] scores.

The scores of a chunk of tokens are formed one block of the vocabulary after the other and folded into running
maxima and sums (the online softmax of arXiv:1805.02867), so the result is exact and memory is that of one block.
On a CPU the small blocks also stay in the cache, which makes float32 about as fast as bfloat16.

Shape suffixes: N scored tokens, D hidden size, V vocabulary, B rows, L tokens per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from tpa_train.errors import UserError

# (tokens, vocabulary entries) of one block of scores. Teacher's and student's together take 32 MB on a CPU and 1 GB
# on an accelerator; a CPU block is meant to fit its last-level cache.
CPU_BLOCK = (512, 8192)
CPU_HALF_BLOCK = (128, 262_144)  # bfloat16 matmuls on a CPU want wide matrices: twice as fast, 268 MB
ACCELERATOR_BLOCK = (4096, 32_768)
FIRST_BIN = 64  # tokens; shorter contexts are one bin of "by position"


@dataclass
class TokenComparison:
    """Teacher beside student on N tokens; every field is [N], float64 unless said."""

    teacher_nll: Tensor  # −log p_teacher(target), nats
    student_nll: Tensor
    kl: Tensor  # KL(teacher ‖ student) of the whole next-token distribution, nats
    agree: Tensor  # bool: both rank the same token first


class _OnlineSoftmax:
    """Running log-sum-exp, best token and target score of one model, over blocks of the vocabulary."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        self.maximum = torch.full(targets.shape, -torch.inf, dtype=torch.float64, device=targets.device)
        self.total = torch.zeros_like(self.maximum)  # Σ exp(score − maximum)
        self.target_score = torch.full_like(self.maximum, -torch.inf)
        self.best = torch.zeros_like(targets)

    def read(self, scores: Tensor, start: int) -> Tensor:
        """Takes in maxima and targets of ``scores`` [N, block]; returns the factor that the old sums shrink by, [N]."""
        inside = (self.targets >= start) & (self.targets < start + scores.shape[1])
        column = (self.targets - start).clamp(0, scores.shape[1] - 1)
        found = scores.gather(1, column[:, None])[:, 0].to(torch.float64)
        self.target_score = torch.where(inside, found, self.target_score)
        block_max, block_best = scores.max(dim=-1)
        block_max = block_max.to(torch.float64)
        # Strictly greater: the first of equal scores wins, as argmax over the whole row would have it.
        self.best = torch.where(block_max > self.maximum, block_best + start, self.best)
        # A NaN must not be skipped by the comparison above's sibling: maximum() propagates it.
        new = torch.maximum(self.maximum, block_max)
        factor = (self.maximum - new).exp()
        self.maximum = new
        return factor

    def exponentiate_(self, scores: Tensor, factor: Tensor) -> Tensor:
        """Turns ``scores`` in place into exp(score − maximum), adds their sum, and returns them."""
        scores.sub_(self.maximum.to(scores.dtype)[:, None]).exp_()
        self.total = self.total * factor + scores.sum(dim=-1).to(torch.float64)
        return scores

    @property
    def log_total(self) -> Tensor:
        return self.maximum + self.total.log()

    @property
    def nll(self) -> Tensor:
        return self.log_total - self.target_score


def _block_size(device: torch.device, dtype: torch.dtype, block: tuple[int, int] | None) -> tuple[int, int]:
    if block is not None:
        return block
    if device.type != "cpu":
        return ACCELERATOR_BLOCK
    return CPU_HALF_BLOCK if dtype.itemsize < 4 else CPU_BLOCK


def _full(weight: Tensor) -> Tensor:
    """Gathers a sharded parameter; a plain tensor is returned as it is."""
    gather = getattr(weight, "full_tensor", None)
    return (gather() if gather is not None else weight).detach()


def _scores(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns ``hidden`` [N, D] · ``weight`` [block, D]ᵀ in float32 (or wider), both already in the head's dtype."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    if hidden.is_cuda:
        try:  # half inputs, float32 accumulation *and* result; torch ≥ 2.8 on CUDA
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        except (TypeError, RuntimeError, NotImplementedError):
            pass
    return (hidden @ weight.T).float()  # the result was rounded to half precision on the way


def score_tokens(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    head_dtype: torch.dtype = torch.float32,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """One model's negative log-likelihood and best guess at each token.

    Args:
        hidden: [N, D] final normalised hidden states.
        head: [V, D] output matrix.
        targets: int [N], the tokens that came next.
        head_dtype: what the matmul's inputs are cast to; scores are float32 or wider. With a half type on a CPU the
            scores themselves are rounded to it, an error of up to 0.06 at scores near 20.
        block: (tokens, vocabulary entries) at a time.

    Returns:
        nll float64 [N] in nats, and the highest-scoring token int [N].
    """
    head = _full(head)
    step_n, step_v = _block_size(hidden.device, head_dtype, block)
    parts = []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for first in range(0, hidden.shape[0], step_n):
            part = hidden[first : first + step_n].to(head_dtype)
            state = _OnlineSoftmax(targets[first : first + step_n])
            for start in range(0, head.shape[0], step_v):
                scores = _scores(part, head[start : start + step_v].to(head_dtype))
                state.exponentiate_(scores, state.read(scores, start))
            parts.append((state.nll, state.best))
    if not parts:
        return torch.zeros(0, dtype=torch.float64, device=hidden.device), targets
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def compare_tokens(
    teacher_hidden: Tensor,
    student_hidden: Tensor,
    teacher_head: Tensor,
    student_head: Tensor,
    targets: Tensor,
    head_dtype: torch.dtype = torch.float32,
    block: tuple[int, int] | None = None,
) -> Iterator[tuple[slice, TokenComparison]]:
    """Compares two models chunk by chunk; equal inputs give a KL of exactly 0.

    Args:
        teacher_hidden, student_hidden: [N, D] final normalised hidden states (their D may differ).
        teacher_head, student_head: [V, D] output matrices over the same vocabulary.
        targets: int [N].
        head_dtype, block: as in ``score_tokens``.

    Yields:
        the slice of the N tokens, and their ``TokenComparison``.

    Raises:
        UserError: the vocabularies differ in size.
    """
    same_head = teacher_head is student_head
    teacher_head = _full(teacher_head)
    student_head = teacher_head if same_head else _full(student_head)
    if teacher_head.shape[0] != student_head.shape[0]:
        raise UserError(
            f"teacher and student cannot be compared: their vocabularies have {teacher_head.shape[0]} and "
            f"{student_head.shape[0]} tokens."
        )
    # Tied weights of two model objects share memory: cast the block once for both.
    same_head = same_head or (
        teacher_head.data_ptr() == student_head.data_ptr() and teacher_head.shape == student_head.shape
    )
    step_n, step_v = _block_size(teacher_hidden.device, head_dtype, block)
    for first in range(0, targets.shape[0], step_n):
        # Autocast and grad mode are left at every yield, so that the caller's own settings hold there.
        part = slice(first, min(first + step_n, targets.shape[0]))
        with torch.no_grad(), torch.autocast(teacher_hidden.device.type, enabled=False):
            result = _compare_chunk(
                teacher_hidden[part].to(head_dtype), student_hidden[part].to(head_dtype),
                teacher_head, None if same_head else student_head, targets[part], head_dtype, step_v,
            )  # fmt: skip
        yield part, result


def _compare_chunk(
    teacher_hidden: Tensor,
    student_hidden: Tensor,
    teacher_head: Tensor,
    student_head: Tensor | None,
    targets: Tensor,
    head_dtype: torch.dtype,
    step_v: int,
) -> TokenComparison:
    teacher, student = _OnlineSoftmax(targets), _OnlineSoftmax(targets)
    # Σ_v exp(t_v − max)·(t_v − s_v): divided by the teacher's sum it is E_teacher[t − s], and
    # KL = E_teacher[t − s] + log Σ exp s − log Σ exp t.
    gap = torch.zeros_like(teacher.total)
    for start in range(0, teacher_head.shape[0], step_v):
        weight = teacher_head[start : start + step_v].to(head_dtype)
        t = _scores(teacher_hidden, weight)
        if student_head is not None:
            weight = student_head[start : start + step_v].to(head_dtype)
        s = _scores(student_hidden, weight)
        teacher_factor, student_factor = teacher.read(t, start), student.read(s, start)
        difference = t - s
        probability = teacher.exponentiate_(t, teacher_factor)
        gap = gap * teacher_factor + torch.linalg.vecdot(probability, difference).to(torch.float64)
        student.exponentiate_(s, student_factor)
    # Maxima and sums are subtracted pairwise, so that equal models cancel without rounding.
    kl = gap / teacher.total + (student.maximum - teacher.maximum) + (student.total.log() - teacher.total.log())
    return TokenComparison(teacher.nll, student.nll, kl, teacher.best == student.best)


def next_token_mask(
    token_ids: Tensor, document_ids: Tensor | None = None, loss_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which predictions count, and how much context each of them had.

    Position i predicts token i + 1. A document's first token is not scored: the one before it belongs to another
    document. Tokens with a negative document id are padding.

    Args:
        token_ids: int [B, L]; document_ids: int [B, L], constant inside a document, or None for one per row.
        loss_mask: bool [B, L], whether the prediction made at a position counts (rows of conversations); None: all do.

    Returns:
        scored bool [B, L − 1], and seen int [B, L − 1]: tokens of its own document that the prediction could use (≥ 1).
    """
    batch, length = token_ids.shape
    index = torch.arange(length, device=token_ids.device).expand(batch, length)
    counted = torch.ones_like(token_ids, dtype=torch.bool) if loss_mask is None else loss_mask
    if document_ids is None:
        return counted[:, :-1], index[:, :-1] + 1
    scored = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    start_index = torch.where(starts, index, 0).cummax(dim=1).values
    return scored & counted[:, :-1], (index - start_index + 1)[:, :-1]


def position_edges(context: int) -> list[int]:
    """Returns upper edges (inclusive, in tokens of context seen) of log-spaced bins: 64, 128, … up to ``context``."""
    edge = FIRST_BIN
    while edge > 1 and edge * 8 > context:  # short contexts still deserve a few bins
        edge //= 2
    edges = []
    while edge < context:
        edges.append(edge)
        edge *= 2
    return [*edges, context]


class QualityMetric(Metric):
    """Running means of NLL, KL and top-1 agreement, in all and by position, reduced over ranks by ``compute``.

    One metric with summed states rather than several ``MeanMetric``: the bins need vectors, one synchronisation is
    cheaper than nine, and ``MeanMetric(nan_strategy="disable")`` ignores weights while its other strategies drop
    the very NaNs that a broken student must show. Sums are float64.

    Args:
        context: the longest context, in tokens; it sets the bins.
    """

    full_state_update = False
    STATES = ("count", "teacher_nll", "student_nll", "kl", "agree")

    def __init__(self, context: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.edges = position_edges(context)
        for name in self.STATES:
            self.add_state(name, torch.zeros(len(self.edges), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, comparison: TokenComparison, seen: Tensor) -> None:
        """Adds N tokens; ``seen`` int [N] is the context each had (``next_token_mask``)."""
        edges = torch.tensor(self.edges, device=seen.device)
        bins = torch.bucketize(seen, edges).clamp_max(len(self.edges) - 1)
        values = {"count": torch.ones_like(comparison.kl)}
        values |= {name: getattr(comparison, name).to(torch.float64) for name in self.STATES[1:]}
        for name, value in values.items():
            setattr(self, name, getattr(self, name).index_add(0, bins, value))

    def compute(self) -> dict:
        """Returns ``tokens``, ``nll``, ``teacher_nll``, ``kl``, ``top1``, the perplexities, and ``by_position``.

        Raises:
            UserError: nothing was scored.
        """
        sums = {name: getattr(self, name) for name in self.STATES}
        total = {name: value.sum().item() for name, value in sums.items()}
        count = total["count"]
        if not count:
            raise UserError(
                "the evaluation text has no token to score: every document is shorter than two tokens, or no turn of "
                "the model is among them."
            )
        by_position, below = [], 0
        for index, edge in enumerate(self.edges):
            tokens = sums["count"][index].item()
            if tokens:
                nll, teacher, kl, top1 = (
                    sums[name][index].item() / tokens for name in ("student_nll", "teacher_nll", "kl", "agree")
                )
                by_position.append(
                    {
                        "from": below + 1, "to": edge, "tokens": int(tokens), "nll": nll, "teacher_nll": teacher,
                        "perplexity": perplexity(nll), "teacher_perplexity": perplexity(teacher), "kl": kl,
                        "top1": top1,
                    }
                )  # fmt: skip
            below = edge
        nll, teacher = total["student_nll"] / count, total["teacher_nll"] / count
        return {
            "tokens": int(count),
            "nll": nll,
            "teacher_nll": teacher,
            "perplexity": perplexity(nll),
            "teacher_perplexity": perplexity(teacher),
            "kl": total["kl"] / count,
            "top1": total["agree"] / count,
            "by_position": by_position,
        }


class AccuracyMetric(Metric):
    """Fraction of right answers, reduced over ranks."""

    full_state_update = False

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for name in ("right", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, right: Tensor) -> None:
        """Adds answers, bool [N]."""
        self.right = self.right + right.sum()
        self.count = self.count + right.numel()

    def compute(self) -> float:
        return (self.right / self.count).item() if self.count else math.nan


def perplexity(nll: float) -> float:
    """Returns e^nll, or infinity where that overflows."""
    return math.exp(nll) if nll < 700 else math.inf if nll == nll else math.nan
