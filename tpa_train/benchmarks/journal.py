"""Rows of a long benchmark, on disk as soon as they are measured, and the time that it may take.

A cell is one thing to measure: a student, a variant. Its row, or the error that kept it from having one, is written
before the next cell begins. A benchmark that is started again with the same file goes on with the cells that have no
row yet; those that failed are tried again.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tpa_train.benchmarks.record import write_record
from tpa_train.errors import UserError
from tpa_train.evaluation.report import json_safe


class Journal:
    """The rows of one benchmark.

    Args:
        path: JSON file of an earlier start, or to be made; None keeps the rows in memory.
        make_record: rows -> what the file holds (``record.make_record``).
        cell: names of the row's fields that tell cells apart.
        free: options that may differ from the earlier start's: they say what is measured, not how.

    Raises:
        UserError: the file is damaged, or was made with other options.
    """

    def __init__(
        self,
        path: str | Path | None,
        make_record: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        cell: Sequence[str],
        free: Sequence[str] = (),
    ) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.make_record, self.cell, self.free = make_record, tuple(cell), tuple(free)
        self.rows: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            self.rows = self._read()

    def _read(self) -> list[dict[str, Any]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            rows, theirs = list(content["rows"]), dict(content["settings"])
            if not all(isinstance(row, dict) and set(self.cell) <= set(row) for row in rows):
                raise ValueError("its rows are another benchmark's")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"out={self.path} cannot be gone on with ({error}); name another file.") from error
        ours = json_safe(self.make_record([])["settings"])
        for name in [n for n in ours if n in theirs and n not in self.free]:
            if ours[name] != theirs[name]:
                raise UserError(
                    f"out={self.path} was measured with {name}={theirs[name]}, not {ours[name]}; give that or name "
                    "another file."
                )
        return rows

    def key(self, row: Mapping[str, Any]) -> tuple:
        return tuple(row[name] for name in self.cell)

    def done(self, **cell: Any) -> bool:
        """Whether the cell has been measured; one that failed has not."""
        return any(self.key(row) == self.key(cell) and "error" not in row for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Puts the row in the place of the cell's earlier one, or last, and writes the file."""
        row = json_safe(dict(row))
        keys = [self.key(other) for other in self.rows]
        if self.key(row) in keys:
            self.rows[keys.index(self.key(row))] = row
        else:
            self.rows.append(row)
        if self.path is not None:
            write_record(self.path, self.make_record(self.rows))

    def add_error(self, error: Exception, **cell: Any) -> None:
        """Records that the cell failed, and frees what it had left behind."""
        lines = str(error).splitlines()
        self.add(cell | {"error": f"{type(error).__name__}: {lines[0] if lines else ''}".strip(" :")})
        forget(error)
        free_memory()


def forget(error: BaseException | None) -> None:
    """Lets go of the frames of an error and of those behind it: they hold tensors of what failed, whole caches even."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__, error = None, error.__cause__ or error.__context__


def free_memory() -> None:
    """Collects what nothing refers to: Lightning's modules and trainers hold each other, and optimizers with them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Allowance:
    """Wall-clock time that a benchmark may take: cells that would not fit are not begun.

    What a cell takes is judged by the last one: its time besides training, and its training time per token.

    Args:
        minutes: from now; None: as long as it takes.
        clock: seconds that only grow.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        if minutes is not None and not minutes > 0:
            raise UserError(f"minutes={minutes:g} must be positive, or null for as long as it takes.")
        self.clock = clock
        self.deadline = None if minutes is None else clock() + 60 * minutes
        self.besides, self.per_token = 0.0, 0.0  # seconds

    def fits(self, tokens: int) -> bool:
        """Whether a cell that trains on ``tokens`` would end in time; the first one is always begun."""
        needed = self.besides + self.per_token * tokens
        return self.deadline is None or self.clock() + needed <= self.deadline

    def learn(self, seconds: float, training_seconds: float, tokens: int) -> None:
        """Takes note of a finished cell: all of its time, and what of it was training on ``tokens``."""
        self.besides = max(0.0, seconds - training_seconds)
        if tokens > 0:
            self.per_token = training_seconds / tokens
