"""Choosing the next token of every sequence of a batch, each by its own rules.

A sequence's choice depends on its own logits, seed and step alone, never on who else is in the batch: a counter-based
generator gives one uniform number a sequence and step, and the token is where the cumulative probability passes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.layers import accumulation_dtype

_WORD = (1 << 64) - 1
BLOCK = 1 << 26  # logits that tokens are chosen from at a time: the sequences of a batch share the room that takes
_BITS = 40  # of a uniform number: the product with a sum of probabilities stays below that sum in float64


@dataclass(frozen=True)
class Sampling:
    """How one sequence chooses its tokens; greedy as it stands.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keeps the k likeliest tokens (and those as likely as the last of them).
        top_p: keeps the fewest tokens that have so much probability together (nucleus sampling, arXiv:1904.09751).
        min_p: keeps tokens at least so likely as this share of the likeliest one's probability (arXiv:2407.01082).
        repetition_penalty: divides the positive logits of tokens that the prompt or the answer has already, and
            multiplies the negative ones (CTRL, arXiv:1909.05858, §4.1); 1 does nothing.
        seed: of the choices; one seed and prompt give one answer.

    Raises:
        UserError: a number is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature:g} must not be negative.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p:g} must lie above 0 and be at most 1.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p:g} must lie between 0 and 1.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty={self.repetition_penalty:g} must be positive; 1 does nothing.")

    def seeded(self, seed: int) -> Sampling:
        """Returns the same rules with another seed."""
        return dataclasses.replace(self, seed=seed)


def random_seed() -> int:
    """Returns a seed from PyTorch's own generator, so that ``torch.manual_seed`` governs it."""
    return int(torch.randint(0, 2**62, ()))


def uniform(seed: int, step: int) -> float:
    """Returns a number in [0, 1) for one step of a sequence: splitmix64 (Steele et al., OOPSLA 2014) of seed and step.

    Seeds are mixed before the step is added: neighbouring seeds would otherwise share a sequence, shifted.
    """
    return (_mix((_mix(seed & _WORD) + step) & _WORD) >> (64 - _BITS)) / (1 << _BITS)


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _WORD
    return z ^ (z >> 31)


def sample(logits: Tensor, rules: Sequence[Sampling], steps: Sequence[int], seen: Tensor | None = None) -> Tensor:
    """Returns the next token of every sequence, int64 [B].

    Args:
        logits: [B, V].
        rules: of each sequence.
        steps: how many tokens each has written.
        seen: bool [B, V], tokens that each has in its prompt or answer; needed where there is a repetition penalty.
    """
    size = rows_at_once(logits.shape[-1])
    if len(logits) <= size:
        return _sample(logits, rules, steps, seen)
    parts = [slice(start, start + size) for start in range(0, len(logits), size)]
    return torch.cat([_sample(logits[p], rules[p], steps[p], None if seen is None else seen[p]) for p in parts])


def rows_at_once(words: int) -> int:
    """Returns how many sequences choose among ``words`` tokens at a time."""
    return max(1, BLOCK // words)


def _sample(logits: Tensor, rules: Sequence[Sampling], steps: Sequence[int], seen: Tensor | None) -> Tensor:
    penalties = [r.repetition_penalty for r in rules]
    if any(p != 1 for p in penalties):
        penalty = _column(penalties, logits)
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    token = logits.argmax(-1)
    drawn = [i for i, r in enumerate(rules) if r.temperature > 0]
    if not drawn:
        return token
    rules, places = [rules[i] for i in drawn], on_device(drawn, logits.device)
    x = logits if len(drawn) == len(logits) else logits[places]
    x = x.to(accumulation_dtype(x.dtype))
    x = restrict(x / _column([r.temperature for r in rules], x), rules)
    # In float64: at the far end of 262,144 float32 sums the unlikely tokens would drown.
    cumulative = x.double().softmax(-1).cumsum(-1)
    draws = [uniform(r.seed, steps[i]) for r, i in zip(rules, drawn, strict=True)]
    goal = on_device(draws, logits.device, torch.float64)[:, None] * cumulative[:, -1:]
    # The first token whose cumulative probability lies above the goal, so never one of probability 0.
    return token.index_put((places,), torch.searchsorted(cumulative, goal, right=True).squeeze(-1))


def restrict(x: Tensor, rules: Sequence[Sampling]) -> Tensor:
    """Returns ``x`` [B, V], logits over the temperature, with -inf at what top_k, top_p and min_p leave out."""
    top_k = [i for i, r in enumerate(rules) if r.top_k is not None and r.top_k < x.shape[-1]]
    if top_k:
        rows, counts = on_device(top_k, x.device), [rules[i].top_k for i in top_k]
        best = x[rows].topk(max(counts)).values
        last = best.gather(1, on_device(counts, x.device)[:, None] - 1)
        x = x.index_put((rows,), x[rows].masked_fill(x[rows] < last, -torch.inf))
    top_p = [i for i, r in enumerate(rules) if r.top_p is not None and r.top_p < 1]
    if top_p:
        rows = on_device(top_p, x.device)
        ordered, order = x[rows].sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        beyond = before >= _column([rules[i].top_p for i in top_p], x)
        beyond[:, 0] = False  # the likeliest token always stays
        x = x.index_put((rows,), x[rows].masked_fill(beyond.scatter(1, order, beyond), -torch.inf))
    if any(r.min_p for r in rules):
        share = _column([r.min_p or 0.0 for r in rules], x)
        x = x.masked_fill(x < x.amax(-1, keepdim=True) + share.log(), -torch.inf)
    return x


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Returns ``values`` as [B, 1], in float32 or wider."""
    return on_device(values, like.device, accumulation_dtype(like.dtype))[:, None]


def on_device(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns ``values`` on ``device`` without waiting for what it is doing."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


class SeenTokens:
    """Which tokens each row of the cache has in its prompt or answer; takes memory once a request asks for it."""

    def __init__(self, rows: int, words: int, device: torch.device) -> None:
        self.shape, self.device = (rows, words), device
        self._seen: Tensor | None = None

    def begin(self, row: int, rule: Sampling, prompt: Sequence[int]) -> None:
        """Notes the prompt of a sequence that begins in ``row``."""
        if rule.repetition_penalty == 1:
            return
        if self._seen is None:
            self._seen = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        self._seen[row] = False
        known = [token for token in set(prompt) if token < self.shape[1]]
        self._seen[row, on_device(known, self.device)] = True

    def of(self, rows: Sequence[int], rules: Sequence[Sampling]) -> Tensor | None:
        """Returns what ``sample`` needs of these rows: bool [B, V], or None where nobody is penalized."""
        if all(r.repetition_penalty == 1 for r in rules):
            return None
        return self._seen[on_device(rows, self.device)]

    def add(self, rows: Sequence[int], rules: Sequence[Sampling], tokens: Tensor) -> None:
        """Notes one new token a row, int64 [B]."""
        if any(r.repetition_penalty != 1 for r in rules):
            self._seen[on_device(rows, self.device), tokens] = True
