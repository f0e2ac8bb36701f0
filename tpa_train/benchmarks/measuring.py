"""What the quality benchmarks measure of a student, beside its teacher: on texts, copies and multiple choice.

The texts are the benchmark's own (``valid=``, ``wikitext2=``): all of a file is held-out, whatever split a packed one
has, and documents inside a row see each other, so that long context is really used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from tpa_train.benchmarks.sizes import check_positive
from tpa_train.data.packed import SPLITS, PackedDataset, PackedStream, texts_twice, tokens_without_bos
from tpa_train.data.packing import TokenizerLike, pack
from tpa_train.data.settings import DataSettings
from tpa_train.errors import UserError
from tpa_train.evaluation.multiple_choice import ChoiceResult, Question, score_questions
from tpa_train.evaluation.suites import Evaluator, StageResult
from tpa_train.pipeline import Session


@dataclass
class MeasuredSettings:
    """Options that the quality benchmarks share: model, training text, and held-out texts."""

    train: str = field(metadata={"help": "text to calibrate and recover on, as data.path of train.py"})
    valid: str = field(metadata={"help": "held-out text, all of which may be used: a file of text or a packed .npz"})
    model: str | None = field(default=None, metadata={"help": "a checkpoint; null: the packaged Gemma 3 270M"})
    wikitext2: str | None = field(
        default=None, metadata={"help": "WikiText-2, as valid; null: it is not measured, its numbers stay empty"}
    )
    texts: list[str] = field(
        default_factory=list,
        metadata={"help": "more held-out texts, each measured as WikiText-2 is and called by its file's name"},
    )
    options: list[str] = field(
        default_factory=list, metadata={"help": "an option of train.py for all, as options=trainer.compile=false"}
    )
    valid_tokens: int = field(default=131_072, metadata={"help": "tokens of valid that are measured"})
    valid_context: int = field(default=8192, metadata={"help": "tokens of a row of valid"})
    wikitext2_tokens: int = field(default=131_072, metadata={"help": "tokens of WikiText-2 that are measured"})
    wikitext2_context: int = field(default=4096, metadata={"help": "tokens of a row of WikiText-2"})
    copy: list[int] = field(
        default_factory=lambda: [1000, 3500, 8000, 15_000], metadata={"help": "distances of the copy test, in tokens"}
    )
    copy_count: int = field(default=4, metadata={"help": "copy texts of each distance"})
    seed: int = field(default=0, metadata={"help": "of calibration, data order and training"})
    minutes: float | None = field(
        default=None, metadata={"help": "begin no student that would not be measured in so many; null: all of them"}
    )


def check_sizes(settings: MeasuredSettings, *more: str) -> None:
    """Raises UserError if a size that the settings name is not positive."""
    names = ("valid_tokens", "valid_context", "wikitext2_tokens", "wikitext2_context", "copy_count", *more)
    check_positive(settings, *names)
    options = [("valid", settings.valid), ("wikitext2", settings.wikitext2), *(("texts", p) for p in settings.texts)]
    for name, path in options:
        if path is not None and not Path(path).expanduser().exists():
            raise UserError(f"{name}={path}: there is no such file.")
    texts_of(settings)


def texts_of(settings: MeasuredSettings) -> dict[str, str]:
    """Returns the held-out texts beside ``valid`` by the name that they have in a row.

    Raises:
        UserError: two have the same name.
    """
    named = {} if settings.wikitext2 is None else {"wikitext2": settings.wikitext2}
    for path in settings.texts:
        name = Path(path).name.partition(".")[0]
        if name in named or name == "valid8k":
            raise UserError(f"texts={path}: there is another text of that name; rename the file.")
        named[name] = path
    return named


def open_text(path: str, tokenizer: TokenizerLike, cache_dir: str | None = None) -> list[PackedStream]:
    """Returns the streams that together hold all of a text, packing it if need be.

    Raises:
        UserError: the text is missing, empty or packed with another tokenizer.
    """
    settings = DataSettings(
        kind="text", path=path, heldout_fraction=0.0, heldout_min_tokens=0, max_tokens=None, cache_dir=cache_dir
    )
    folder = pack(settings, tokenizer, progress=False)
    streams = [PackedStream(folder, split, tokenizer.fingerprint) for split in SPLITS]
    return [stream for stream in streams if len(stream)]


def rows_of(streams: Sequence[PackedStream], context: int, tokens: int, name: str) -> Subset:
    """Returns rows of ``context`` tokens worth ``tokens`` (at least one row), spread evenly over the streams.

    Raises:
        UserError: no stream fills a row; ``name`` is the option to change.
    """
    longest = max(map(len, streams), default=0)
    if longest < context:
        raise UserError(f"{name}={context}: the text has no more than {longest:,} tokens in a piece; use fewer.")
    every = ConcatDataset([PackedDataset(s, context, join_documents=True) for s in streams if len(s) >= context])
    count = min(len(every), max(1, tokens // context))
    return Subset(every, [i * len(every) // count for i in range(count)])


def copies_of(streams: Sequence[PackedStream], distance: int, count: int) -> Tensor:
    """Returns ``count`` texts of ``distance`` tokens, each twice: int64 [count, 1 + 2C] (``packed.texts_twice``).

    Raises:
        UserError: the text is too short.
    """
    tokens = torch.cat([tokens_without_bos(stream) for stream in streams])
    if distance < 1 or len(tokens) - distance < count - 1:
        raise UserError(f"copy={distance}: the text has {len(tokens):,} tokens, too few; copy less.")
    return texts_twice(tokens, streams[0].manifest.bos_id, distance, count)


class Measurements:
    """Everything that is measured of a student; the teacher is measured once, when this is made.

    Args:
        session: its teacher, tokenizer and machine.
        settings: the texts.
        questions: multiple-choice sets by name.
        position_tokens, position_context: tokens and length of the rows on which perplexity by position is measured;
            none with 0 tokens.

    Raises:
        UserError: a text is too short.
    """

    def __init__(
        self,
        session: Session,
        settings: MeasuredSettings,
        questions: dict[str, list[Question]] | None = None,
        position_tokens: int = 0,
        position_context: int = 32_768,
    ) -> None:
        self.session, self.settings, self.questions = session, settings, questions or {}
        tokenizer, cache = session.teacher.tokenizer, session.settings.data.cache_dir
        valid = open_text(settings.valid, tokenizer, cache)
        copies = {c: copies_of(valid, c, settings.copy_count) for c in settings.copy}
        rows = rows_of(valid, settings.valid_context, settings.valid_tokens, "valid_context")
        self._valid = self._evaluator(rows, copies)
        self._positions = None
        self._texts = {
            name: self._evaluator(
                rows_of(
                    open_text(path, tokenizer, cache), settings.wikitext2_context, settings.wikitext2_tokens,
                    "wikitext2_context",
                )
            )
            for name, path in texts_of(settings).items()
        }  # fmt: skip
        if position_tokens > 0:
            self._positions = self._evaluator(rows_of(valid, position_context, position_tokens, "position_context"))
        self._teacher_valid = self._valid.evaluate(None, "teacher")
        self._teacher_choices = self._answer(session.teacher)

    def _evaluator(self, rows: Subset, copies: dict[int, Tensor] | None = None) -> Evaluator:
        return Evaluator(
            self.session.teacher, rows, copies or {}, autocast=self.session.machine.autocast, progress=False,
            max_copy_tokens=self.session.settings.evaluation.copy_tokens,
        )  # fmt: skip

    def _answer(self, model: Any) -> dict[str, ChoiceResult]:
        autocast = self.session.machine.autocast
        return {
            name: score_questions(model, questions, autocast=autocast, name=name, progress=False)
            for name, questions in self.questions.items()
        }

    def measure(self, student: Any | None, name: str = "student") -> dict[str, Any]:
        """Returns the student's row, or the teacher's where there is none; KL in nats a token, ratios to the teacher.

        ``kl``, ``top1`` and ``copy_accuracy`` are of ``valid``, the others of the text that they name.
        """
        own, settings = self._teacher_valid, self.settings
        valid = own if student is None else self._valid.evaluate(student, name)
        row = {
            "kl": valid.kl, "top1": valid.top1,
            "valid8k_ppl_ratio": valid.perplexity / valid.teacher_perplexity, "valid8k_ppl": valid.perplexity,
            "teacher_valid8k_ppl": valid.teacher_perplexity, "valid_context": settings.valid_context,
            "valid_tokens": valid.evaluated_tokens, "copy_accuracy": valid.copy_accuracy,
            "teacher_copy_accuracy": own.copy_accuracy,
        }  # fmt: skip
        for text, evaluator in self._texts.items():
            row |= _text(text, evaluator.evaluate(student, name), settings.wikitext2_context)
        if self.questions:
            answers = self._teacher_choices if student is None else self._answer(student)
            row |= _multiple_choice(self.questions, self._teacher_choices, answers)
        if self._positions is not None:
            keys = ("from", "to", "tokens", "perplexity", "teacher_perplexity", "kl")
            bins = self._positions.evaluate(student, name).by_position
            row["perplexity_by_position"] = [{key: part[key] for key in keys} for part in bins]
        return row


def _text(name: str, result: StageResult, context: int) -> dict[str, Any]:
    return {
        f"kl_{name}": result.kl, f"top1_{name}": result.top1,
        f"{name}_ppl_ratio": result.perplexity / result.teacher_perplexity, f"{name}_ppl": result.perplexity,
        f"teacher_{name}_ppl": result.teacher_perplexity, f"{name}_context": context,
        f"{name}_tokens": result.evaluated_tokens,
    }  # fmt: skip


def _multiple_choice(
    questions: dict[str, list[Question]], teacher: dict[str, ChoiceResult], student: dict[str, ChoiceResult]
) -> dict[str, Any]:
    """Differences in percentage points by set, and their mean over the sets with the standard error of paired answers.

    Both answer the same questions, so the error is that of the difference of each question's two marks.
    """
    points, variance = {}, 0.0
    for name, asked in questions.items():
        pairs = zip(asked, teacher[name].choices, student[name].choices, strict=True)
        gains = torch.tensor([float(s == q.label) - float(t == q.label) for q, t, s in pairs], dtype=torch.float64)
        points[name] = 100 * float(gains.mean())
        variance += float(gains.var(correction=0)) / len(gains)
    return {
        "mcq_delta_points": sum(points.values()) / len(points),
        "mcq_stderr_points": 100 * variance**0.5 / len(points),
        "mcq_delta_points_by_set": points,
        "mcq_accuracy": {name: result.accuracy for name, result in student.items()},
        "teacher_mcq_accuracy": {name: result.accuracy for name, result in teacher.items()},
    }
