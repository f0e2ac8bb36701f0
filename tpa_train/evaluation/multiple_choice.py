"""Multiple-choice accuracy: the answer whose tokens the model finds likeliest, given the question.

A file is JSON lines in either of two shapes, and may carry a ``task`` that results are split by:

    {"context": "The sky is", "choices": ["blue", "green"], "label": 0}
    {"contexts": ["… because Ann", "… because Eve"], "continuation": "was late.", "label": 1}

In the second shape (Winogrande's) the same words are scored after each context, so no answer is favoured for being
likely by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tpa_train.data.records import json_lines
from tpa_train.errors import UserError
from tpa_train.evaluation.metrics import score_tokens

BATCH_TOKENS = 8192  # padded tokens of a forward pass


@dataclass(frozen=True)
class Question:
    """One question: a text before each answer, the answers, and which is right."""

    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    label: int
    task: str = ""


@dataclass
class ChoiceResult:
    """Accuracy on one file. ``acc_norm`` divides each answer's log-likelihood by its characters first."""

    questions: int
    accuracy: float
    acc_norm: float
    stderr: float  # of the accuracy, √(p(1 − p)/n)
    chance: float  # accuracy of guessing
    by_task: dict[str, float] = field(default_factory=dict)
    choices: list[int] = field(default_factory=list)  # the answer chosen, by question

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "choices"}


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """Reads a multiple-choice file.

    Args:
        path: JSON lines, UTF-8.
        limit: take only the first so many questions.

    Raises:
        UserError: the file is missing or empty, or a line is not a question; the sentence has the line's number.
    """
    path = Path(path).expanduser()
    questions: list[Question] = []
    try:
        with path.open("rb") as lines:
            for where, row in islice(json_lines(lines, lambda number: f"{path}, line {number}"), limit):
                questions.append(_parse(row, where))
    except OSError as error:
        raise UserError(f"cannot read the suite {path}: {error.strerror}.") from error
    if not questions:
        raise UserError(f"the suite {path} has no questions.")
    return questions


def _parse(row: dict[str, Any], where: str) -> Question:
    if "contexts" in row or "continuation" in row:
        contexts = _texts(row.get("contexts"), "contexts", where)
        continuation = row.get("continuation")
        if not isinstance(continuation, str) or not continuation.strip():
            raise UserError(f"{where}: 'continuation' must be a text, beside 'contexts'.")
        answers = (continuation,) * len(contexts)
    else:
        answers = _texts(row.get("choices"), "choices", where)
        if not all(a.strip() for a in answers):
            raise UserError(f"{where}: a choice is empty.")
        if not isinstance(row.get("context", ""), str):
            raise UserError(f"{where}: 'context' must be a text.")
        contexts = (row.get("context", ""),) * len(answers)
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(answers):
        raise UserError(f"{where}: 'label' must be a number from 0 to {len(answers) - 1}, not {label!r}.")
    return Question(contexts, answers, label, str(row.get("task") or ""))


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) for v in value):
        raise UserError(f"{where}: '{key}' must be a list of at least two texts.")
    return tuple(value)


def encode_answer(tokenizer: Any, context: str, answer: str) -> tuple[list[int], int]:
    """Returns the tokens of ``context`` + ``answer`` after BOS, and where the answer's tokens begin.

    The two are tokenised as one text, as the model would meet them, with a space between unless there is one. Where a
    token spans the border it counts as the answer's.
    """
    if not context:
        return tokenizer.encode(answer), 1
    joined = context + answer if context[-1].isspace() or answer[:1].isspace() else f"{context} {answer}"
    before, tokens = tokenizer.encode(context), tokenizer.encode(joined)
    begin = 0
    while begin < min(len(before), len(tokens) - 1) and before[begin] == tokens[begin]:
        begin += 1
    return tokens, max(begin, 1)


def scores_and_greedy(
    model: Any,
    encoded: Sequence[tuple[list[int], int]],
    head_dtype: torch.dtype = torch.float32,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    batch_tokens: int = BATCH_TOKENS,
    bar: tqdm | None = None,
) -> tuple[list[float], list[bool]]:
    """Returns Σ log p(answer token | everything before it) of each text, in nats, and whether each is the greedy one.

    Args:
        model: dense or converted model.
        encoded: (tokens, where the answer begins) each; a text beyond the model's context loses its first tokens.
        head_dtype, autocast: as in ``Evaluator``.
        batch_tokens: padded tokens of a forward pass.
        bar: progress bar, advanced by one a text.
    """
    device, limit = model.head_weight.device, model.config.max_context
    scores, greedy = [0.0] * len(encoded), [True] * len(encoded)
    # Long texts first: neighbours are about equally long, and memory peaks in the first batch, not the last.
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    while order:
        longest = min(len(encoded[order[0]][0]), limit)
        batch, order = order[: max(1, batch_tokens // longest)], order[max(1, batch_tokens // longest) :]
        # Padding comes after the text: causal attention keeps it out of sight, and its scores are never asked for.
        token_ids = torch.zeros(len(batch), longest, dtype=torch.long)
        rows, positions, owners = [], [], []
        for row, index in enumerate(batch):
            tokens, begin = encoded[index]
            cut = max(0, len(tokens) - limit)
            tokens, begin = [tokens[0], *tokens[cut + 1 :]] if cut else tokens, max(begin - cut, 1)
            token_ids[row, : len(tokens)] = torch.tensor(tokens)
            rows += [row] * (len(tokens) - begin)
            owners += [index] * (len(tokens) - begin)
            positions += range(begin, len(tokens))
        token_ids = token_ids.to(device)
        row_index, position = torch.tensor(rows, device=device), torch.tensor(positions, device=device)
        with torch.no_grad():
            with autocast():
                hidden = model.hidden_states(token_ids)
            targets = token_ids[row_index, position]
            nll, best = score_tokens(hidden[row_index, position - 1], model.head_weight, targets, head_dtype)
        for index, value, hit in zip(owners, nll.tolist(), (best == targets).tolist(), strict=True):
            scores[index] -= value
            greedy[index] &= hit
        if bar is not None:
            bar.update(len(batch))
    return scores, greedy


def score_questions(
    model: Any,
    questions: Sequence[Question],
    head_dtype: torch.dtype = torch.float32,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    name: str = "questions",
    progress: bool = True,
) -> ChoiceResult:
    """Answers every question.

    Args:
        model: dense or converted model with a tokenizer.
        questions: from ``read_questions``.
        head_dtype, autocast: as in ``Evaluator``.
        name: for the progress bar.
        progress: show it.

    Raises:
        UserError: there are no questions, or the model has no tokenizer.
    """
    if not questions:
        raise UserError("there are no questions to score.")
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer; multiple choice needs tokenizer.model beside its weights.")
    encoded = [
        encode_answer(model.tokenizer, context, answer)
        for question in questions
        for context, answer in zip(question.contexts, question.answers, strict=True)
    ]
    training = model.training
    model.eval()
    try:
        with tqdm(total=len(encoded), desc=name, unit="answer", leave=False, disable=not progress) as bar:
            scores, _ = scores_and_greedy(model, encoded, head_dtype, autocast, bar=bar)
    finally:
        model.train(training)
    chosen, right, right_norm, by_task, first = [], 0, 0, defaultdict(list), 0
    for question in questions:
        mine = scores[first : first + len(question.answers)]
        first += len(question.answers)
        normalised = [score / len(answer) for score, answer in zip(mine, question.answers, strict=True)]
        chosen.append(_best(mine))
        right += chosen[-1] == question.label
        right_norm += _best(normalised) == question.label
        by_task[question.task].append(chosen[-1] == question.label)
    count = len(questions)
    accuracy = right / count
    return ChoiceResult(
        questions=count,
        accuracy=accuracy,
        acc_norm=right_norm / count,
        stderr=(accuracy * (1 - accuracy) / count) ** 0.5,
        chance=sum(1 / len(q.answers) for q in questions) / count,
        by_task={task: sum(v) / len(v) for task, v in sorted(by_task.items())} if set(by_task) != {""} else {},
        choices=chosen,
    )


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
