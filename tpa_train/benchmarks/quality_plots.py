"""The pictures of ``benchmark.py quality``: quality against cache bytes, and perplexity by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullLocator

from tpa_train.evaluation.plots import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    SKY,
    STYLE,
    _plain_log_axis,
    _save,
    plot_frontier,
    plt,
)

COLORS = (BLUE, SKY, GREEN, ORANGE, RED, "#CC79A7")  # one a curve; more could not be told apart


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
    curves = position_curves(rows)
    if curves:
        written.append(plot_position_ratios(path.with_name(f"{path.stem}-positions.png"), curves))
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


def position_curves(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows whose curves are drawn: of each budget the longest trained one, the toolkit's own first."""
    longest: dict[tuple, Mapping[str, Any]] = {}
    for row in rows:
        budget = (row["mix"], row["layers"], row["target_ratio"])
        if row["mix"] == "teacher" or not row.get("perplexity_by_position"):
            continue
        if budget not in longest or longest[budget]["tokens"] <= row["tokens"]:
            longest[budget] = row
    order = sorted(longest.values(), key=lambda r: (r["mix"].startswith("dense"), r["mix"], r["cache_ratio"]))
    # rank+bits before rank: the order of the alphabet is the other one.
    return sorted(order, key=lambda r: r["mix"] != "rank+bits")[: len(COLORS)]


def plot_position_ratios(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Perplexity of the teacher by context available, and below it each student's as a multiple of it.

    Args:
        path: PNG to write.
        rows: of students measured on the same text (``position_curves``).
    """
    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(
            2, 1, figsize=(6.4, 4.6), layout="constrained", sharex=True, height_ratios=(2, 3)
        )
        bins = rows[0]["perplexity_by_position"]
        edges, teacher = [b["to"] for b in bins], [b["teacher_perplexity"] for b in bins]
        above.plot(edges, teacher, color="black", linestyle="--", marker="o", ms=3, linewidth=1.4)
        above.set_yscale("log")
        _plain_log_axis(above.yaxis, teacher)
        above.set_title("Perplexity of the teacher by context available")
        for row, color in zip(rows, COLORS, strict=False):
            values = [b["perplexity"] / b["teacher_perplexity"] for b in row["perplexity_by_position"]]
            below.plot(edges, values, color=color, marker="o", ms=3, linewidth=1.6, label=_label(row))
        below.axhline(1.0, color="black", linestyle="--", linewidth=1.0)
        below.set_title("Perplexity of the students, as a multiple of it")
        below.set_xscale("log", base=2)
        below.set_xticks(edges, [f"{edge:,}" for edge in edges], rotation=45, fontsize=8)
        below.xaxis.set_minor_locator(NullLocator())
        below.set_xlabel("tokens of context (upper edge of the bin)")
        below.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _save(figure, path)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['mix']}{', ' + row['layers'] if row['layers'] else ''} ÷{row['cache_ratio']:.2f}"
