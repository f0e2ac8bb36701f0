"""The pictures of ``benchmark.py quality``: quality against cache bytes, and perplexity by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpa_train.evaluation.plots import plot_frontier, plot_positions
from tpa_train.evaluation.suites import StageResult

SHOWN = 6  # curves of perplexity by position that can still be told apart


def write_plots(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Writes ``<name>.png`` and ``<name>-positions.png`` beside the JSON file ``path``; returns what there was to draw.

    Args:
        path: of the benchmark's file.
        rows: of ``quality``; those that failed are left out.
    """
    rows = [row for row in rows if "error" not in row]
    students, written = [row for row in rows if row["mix"] != "teacher"], []
    points = frontier_points(students)
    if any((point["kl"] or 0) > 0 for point in points):
        first = students[0]
        caption = f"{first['valid_tokens']:,} held-out tokens in rows of {first['valid_context']:,}"
        picture = path.with_suffix(".png")
        written.append(plot_frontier(picture, points, first["dense_bytes"], first["cache_context"], caption))
    stages = position_curves(rows)
    if stages:
        written.append(plot_positions(path.with_name(f"{path.stem}-positions.png"), stages))
    return written


def frontier_points(students: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns points of ``plot_frontier``: a line a mix and number of training tokens, dense caches as marks."""
    points = []
    for row in students:
        if row["mix"].startswith("dense"):
            mix = f"{row['mix'].replace('-', ' ')}, {row['layers']}"
            name = f"{row['mix'].removeprefix('dense-')}, {row['layers']}"
        else:
            trained = f"{row['tokens'] / 1e6:.1f}M tokens" if row["tokens"] else "one-shot"
            mix, name = f"ours, {row['mix']}, {trained}", f"÷{row['cache_ratio']:.2f}"
        points.append({"name": name, "mix": mix, "bytes": row["cache_bytes"], "kl": row["kl"]})
    return points


def position_curves(rows: Sequence[Mapping[str, Any]]) -> list[StageResult]:
    """Returns the teacher's curve and those of at most ``SHOWN`` students: the longest trained one of each budget."""
    longest: dict[tuple, Mapping[str, Any]] = {}
    for row in rows:
        if not row.get("perplexity_by_position"):
            continue
        budget = (row["mix"], row["layers"], row["target_ratio"])
        if budget not in longest or longest[budget]["tokens"] <= row["tokens"]:
            longest[budget] = row
    students = [row for row in longest.values() if row["mix"] != "teacher"]
    # The toolkit's own first; of dense caches only those as small.
    students.sort(key=lambda row: (row["mix"].startswith("dense"), row["mix"] != "rank+bits", row["cache_ratio"]))
    curves = [row for row in longest.values() if row["mix"] == "teacher"] + students[:SHOWN]
    return [StageResult(_label(row), by_position=row["perplexity_by_position"]) for row in curves]


def _label(row: Mapping[str, Any]) -> str:
    if row["mix"] == "teacher":
        return "teacher"
    return f"{row['mix']}{', ' + row['layers'] if row['layers'] else ''} ÷{row['cache_ratio']:.2f}"
