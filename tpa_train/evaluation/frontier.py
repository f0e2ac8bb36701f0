"""The frontier of a sweep: quality against cache bytes, as frontier.json, frontier.md and frontier.png.

A row is one measured model::

    name, mix            which model; rows of one mix make one line of the plot
    bytes, cache_ratio   of one sequence's cache, and how many times smaller that is than the original's
    stage, tokens        the stage after which it was measured, and the tokens that stage took
    perplexity, teacher_perplexity, kl, top1, copy_accuracy     as in ``suites.StageResult``
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpa_train.evaluation.atomic import write_text
from tpa_train.evaluation.plots import plot_frontier
from tpa_train.evaluation.report import _bytes, _count, _percent, _ratio, json_safe, table, versions

_MEASURED = ("perplexity", "teacher_perplexity", "kl", "top1", "copy_accuracy", "tokens")


def frontier_row(
    name: str, mix: str, stage: str, cache_bytes: int, dense_bytes: int, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a row; ``measured`` is a ``StageResult.to_dict()``, or what report.json keeps of it."""
    row = {"name": name, "mix": mix, "cache_ratio": dense_bytes / cache_bytes, "bytes": cache_bytes}
    return json_safe(row | {key: measured[key] for key in _MEASURED} | {"stage": stage})


@dataclass
class Frontier:
    """What a frontier shows."""

    model: str  # name or path of the original
    rows: Sequence[Mapping[str, Any]]  # of ``frontier_row``, in any order
    teacher: Mapping[str, Any]  # its own measurements
    context: int | None = None  # tokens at which bytes are counted; None: they differ
    dense_bytes: int | None = None  # of the original's cache there
    evaluated_tokens: int | None = None  # held-out tokens
    command: str = ""
    notes: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        self.rows = sorted(self.rows, key=lambda row: (row["bytes"], row["mix"], row["name"]))

    def caption(self) -> str:
        """Returns one line on what everything was measured against and on."""
        parts = [f"teacher's perplexity {_number(self.teacher.get('perplexity'), '.4g')}"]
        parts += [f"{self.evaluated_tokens:,} held-out tokens"] if self.evaluated_tokens else []
        return ", ".join(parts)


def write_frontier(folder: str | Path, frontier: Frontier) -> Path:
    """Writes frontier.png, frontier.md and last frontier.json.

    Returns:
        the path of frontier.md.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    drawn = any((row["kl"] or 0.0) > 0 for row in frontier.rows)
    if drawn:
        plot_frontier(
            folder / "frontier.png", frontier.rows, frontier.dense_bytes, frontier.context, frontier.caption()
        )
    write_text(folder / "frontier.md", render_frontier(frontier, "frontier.png" if drawn else None))
    content = {
        "model": frontier.model, "context": frontier.context, "dense_bytes": frontier.dense_bytes,
        "teacher": dict(frontier.teacher), "evaluated_tokens": frontier.evaluated_tokens, "rows": list(frontier.rows),
        "notes": list(frontier.notes), "command": frontier.command, "versions": versions(),
    }  # fmt: skip
    write_text(folder / "frontier.json", json.dumps(json_safe(content), indent=1, allow_nan=False) + "\n")
    return folder / "frontier.md"


def render_frontier(frontier: Frontier, picture: str | None = None) -> str:
    """Returns frontier.md; ``picture`` is the plot's path relative to it."""
    about = ["KL(teacher ‖ student) in nats a token", "tokens: what the stage itself took"]
    where = "one sequence's cache" + (f" at {frontier.context:,} tokens" if frontier.context else "")
    dense = f" (the original's: {_bytes(frontier.dense_bytes)})" if frontier.dense_bytes else ""
    parts = [
        f"# {frontier.model}: quality against cache bytes",
        f"Sorted by the bytes of {where}{dense}; {frontier.caption()}. {'; '.join(about)}.",
        frontier_table(frontier.rows),
        *([f"![Quality against cache bytes]({picture})"] if picture else []),
        *frontier.notes,
        *([f"```\n{frontier.command}\n```"] if frontier.command else []),
    ]
    return "\n\n".join(parts) + "\n"


def frontier_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the Markdown table of the rows, in their order."""
    distances = sorted({d for row in rows for d in row["copy_accuracy"]}, key=int)
    head = ["model", "mix", "cache", "×", "KL", "perplexity", "× teacher", "top-1",
            *(f"copy {int(d):,}" for d in distances), "stage", "tokens"]  # fmt: skip
    lines = []
    for row in rows:
        perplexity, teacher = (_finite(row[key]) for key in ("perplexity", "teacher_perplexity"))
        lines.append(
            [
                row["name"], row["mix"], _bytes(row["bytes"]), f"{row['cache_ratio']:.2f}", _number(row["kl"], ".4f"),
                _number(row["perplexity"], ".4g"), _ratio(perplexity, teacher), _percent(_finite(row["top1"])),
                *(_percent(_finite(row["copy_accuracy"].get(d))) for d in distances), row["stage"],
                _count(row["tokens"]),
            ]
        )  # fmt: skip
    return table(head, lines)


def _finite(value: float | None) -> float:
    """NaN for what JSON could not hold."""
    return math.nan if value is None else value


def _number(value: float | None, form: str) -> str:
    return format(value, form) if math.isfinite(_finite(value)) else "–"
