"""The report's plots, as PNG files. Colours are the Okabe-Ito set, which colour-blind readers can tell apart."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.patches
import numpy as np

from tpa_train.evaluation.atomic import replacing
from tpa_train.evaluation.suites import StageResult

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator  # noqa: E402

BLUE, ORANGE, GREEN, RED, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#6E6E6E"
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}
Curve = tuple[Sequence[float], Sequence[float]]  # steps, losses


def plot_quality(path: str | Path, stages: Sequence[StageResult]) -> Path:
    """KL, perplexity and copy accuracy of each stage, the teacher as a line.

    Args:
        path: PNG to write.
        stages: in order; one named "teacher" gives the lines.
    """
    students = [s for s in stages if s.name != "teacher"]
    teacher = next((s for s in stages if s.name == "teacher"), None)
    names = [s.name for s in students]
    copies = sorted({c for s in students for c in s.copy_accuracy}, key=int)
    with plt.rc_context(STYLE):
        panels = 3 if copies else 2
        figure, axes = plt.subplots(1, panels, figsize=(3.4 * panels, 3.2), layout="constrained")
        _labelled_bars(axes[0], names, [s.kl for s in students], BLUE, "{:.3g}")
        axes[0].set_title("KL(teacher ‖ student), nats")

        _labelled_bars(axes[1], names, [s.perplexity for s in students], ORANGE, "{:.4g}")
        axes[1].set_title("Perplexity")
        reference = teacher.perplexity if teacher else students[0].teacher_perplexity if students else math.nan
        if math.isfinite(reference):
            axes[1].axhline(reference, color=GREY, linestyle="--", linewidth=1.2, label=f"teacher {reference:.4g}")
            _room_above(axes[1])
            axes[1].legend(loc="upper right")
        if copies:
            width = 0.8 / len(copies)
            shades = [matplotlib.colors.to_hex(c) for c in plt.cm.viridis(np.linspace(0.75, 0.15, len(copies)))]
            for index, distance in enumerate(copies):
                x = np.arange(len(students)) + (index - (len(copies) - 1) / 2) * width
                values = [s.copy_accuracy.get(distance, math.nan) for s in students]
                bars = axes[2].bar(x, values, width * 0.9, color=shades[index], label=f"{int(distance):,} tokens apart")
                if len(copies) * len(students) <= 9:
                    axes[2].bar_label(bars, fmt="%.2f", padding=1, fontsize=7)
                if teacher and distance in teacher.copy_accuracy:
                    line = "teacher" if index == 0 else None
                    axes[2].hlines(
                        [teacher.copy_accuracy[distance]] * len(x), x - width / 2, x + width / 2, colors=GREY,
                        linestyles="--", linewidth=1.2, label=line,
                    )  # fmt: skip
            axes[2].set_xticks(range(len(students)), names)
            axes[2].set_ylim(0, 1.05)
            axes[2].set_title("Copy accuracy")
            # Below the bars, or it would hide the tallest of them.
            axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=7.5)
        for axis in axes[:2]:
            _room_above(axis)
        return _save(figure, path)


def plot_losses(path: str | Path, curves: Mapping[str, Curve]) -> Path:
    """Training loss of each stage, raw and smoothed, on a log axis.

    Args:
        path: PNG to write.
        curves: stage -> (steps, losses); values that are not positive and finite are left out.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(curves), figsize=(max(4.6, 4.2 * len(curves)), 3.2), layout="constrained", squeeze=False
        )
        colors = (BLUE, GREEN, ORANGE) * len(curves)
        for axis, (name, (steps, values)), color in zip(axes[0], curves.items(), colors, strict=False):
            steps, values = np.asarray(steps, float), np.asarray(values, float)
            keep = np.isfinite(values) & (values > 0)
            steps, values = steps[keep], values[keep]
            axis.plot(steps, values, color=color, alpha=0.28, linewidth=0.8)
            if len(values) > 10:
                axis.plot(steps, _smooth(values), color=color, linewidth=1.8)
            axis.set_yscale("log")
            _plain_log_axis(axis.yaxis, values)
            axis.set_title(f"Loss, {name}")
            axis.set_xlabel("step")
        return _save(figure, path)


def plot_ranks(path: str | Path, layers: Sequence[Mapping[str, Any]]) -> Path:
    """Rank of K and V by layer; global layers are shaded, dense ones pale.

    Args:
        path: PNG to write.
        layers: rows of ``layer_rows``.
    """
    index = np.array([row["index"] for row in layers])
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(max(5.5, 0.3 * len(layers) + 1.5), 3.2), layout="constrained")
        _shade_global(axis, layers)
        for offset, which, color in ((-0.2, "k", BLUE), (0.2, "v", ORANGE)):
            ranks = [row[f"rank_{which}"] for row in layers]
            dense = [row[f"form_{which}"] == "dense" for row in layers]
            bars = axis.bar(index + offset, ranks, 0.38, color=color)
            for bar, is_dense, rank, row in zip(bars, dense, ranks, layers, strict=True):
                if is_dense:
                    bar.set_alpha(0.25)
                bits = f" · {row['bits']} bit" if row["bits"] != 16 else ""
                if bits or not is_dense:
                    axis.annotate(
                        f"{rank}{bits}", (bar.get_x() + bar.get_width() / 2, rank), ha="center", va="bottom",
                        fontsize=7, rotation=90, xytext=(0, 2), textcoords="offset points",
                    )  # fmt: skip
        axis.margins(y=0.18 if any(row["bits"] != 16 for row in layers) else 0.05)
        axis.set_title("Rank per KV head, by layer")
        axis.set_xlabel("layer (shaded: global; pale: left dense, at head size)")
        every = 1 if len(index) <= 40 else 2
        axis.set_xticks(index[::every], [str(i) for i in index[::every]])
        axis.set_xlim(index.min() - 0.7, index.max() + 0.7)
        # Patches of their own: the first bars may be pale ones.
        handles = [matplotlib.patches.Patch(color=color, label=name) for name, color in (("K", BLUE), ("V", ORANGE))]
        axis.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
        return _save(figure, path)


def plot_layer_errors(
    path: str | Path,
    layers: Sequence[int],
    before: Sequence[float],
    after: Sequence[float] | None = None,
    kinds: Sequence[str] | None = None,
) -> Path:
    """Error of each converted layer's attention output, before and after the layer-wise stage.

    Args:
        path: PNG to write.
        layers: indices of the converted layers.
        before, after: error energy over the teacher's output energy in the metric of ``layer_errors``, by layer.
        kinds: "global" or "local" of each; named under the axis.
    """
    x = np.arange(len(layers))
    labels = [f"{i}\n{k}" for i, k in zip(layers, kinds, strict=True)] if kinds else [str(i) for i in layers]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(max(4.4, 0.5 * len(layers) + 2), 3.2), layout="constrained")
        wide = 0.38 if after is not None else 0.6
        shift = wide / 2 if after is not None else 0
        groups = [axis.bar(x - shift, before, wide, color=SKY, label="factorized")]
        if after is not None:
            groups.append(axis.bar(x + shift, after, wide, color=BLUE, label="after the layer-wise stage"))
        if len(layers) <= 10:
            for bars in groups:
                axis.bar_label(bars, fmt="%.2g", padding=2, fontsize=7)
        axis.set_xticks(x, labels)
        axis.set_title("Attention output error, as it reaches the model's output")
        axis.set_xlabel("layer, each given the teacher's input")
        _room_above(axis, 0.35)  # two lines of legend fit over the tallest bar
        axis.legend(loc="upper left")
        return _save(figure, path)


def plot_positions(path: str | Path, stages: Sequence[StageResult]) -> Path:
    """Perplexity against the tokens of context that a prediction could use, teacher and every stage.

    Args:
        path: PNG to write.
        stages: in order; the teacher's curve comes from the stage of that name, or from beside the first student.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
        students = [s for s in stages if s.name != "teacher" and s.by_position]
        source = next((s for s in stages if s.by_position), None)
        edges = [b["to"] for b in source.by_position] if source else []
        if source:
            values = [b["teacher_perplexity"] for b in source.by_position]
            axis.plot(edges, values, color="black", linestyle="--", linewidth=1.4, marker="o", ms=3, label="teacher")
        for stage, color in zip(students, (SKY, BLUE, GREEN, ORANGE) * 3, strict=False):
            axis.plot(
                [b["to"] for b in stage.by_position], [b["perplexity"] for b in stage.by_position],
                color=color, marker="o", ms=3, linewidth=1.6, label=stage.name,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks(edges, [f"{e:,}" for e in edges], rotation=45, fontsize=8)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_yscale("log")
        shown = [b[k] for s in stages for b in s.by_position for k in ("perplexity", "teacher_perplexity")]
        _plain_log_axis(axis.yaxis, shown)
        axis.set_title("Perplexity by context available")
        axis.set_xlabel("tokens of context (upper edge of the bin)")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _save(figure, path)


def plot_frontier(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    dense_bytes: int | None = None,
    context: int | None = None,
    caption: str = "",
) -> Path:
    """KL against cache bytes, both on log axes: a line per mix, single points and "dense …" mixes as marks with names.

    Args:
        path: PNG to write.
        rows: of ``evaluation.frontier``; those whose KL a log axis cannot show are left out.
        dense_bytes: of the original's cache; ticks then name the ratio below the bytes.
        context: tokens at which bytes are counted.
        caption: small print under the axis.
    """
    rows = [row for row in rows if row["kl"] is not None and math.isfinite(row["kl"]) and row["kl"] > 0]
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: r["bytes"]):
        lines.setdefault(row["mix"], []).append(row)
    marked = {mix: len(points) == 1 or mix.startswith("dense") for mix, points in lines.items()}
    # Lines before marks, the toolkit's own first, better ones before worse ones.
    order = sorted(lines, key=lambda m: (marked[m], not m.startswith("ours"), min(r["kl"] for r in lines[m])))
    with plt.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure, axis = plt.subplots(figsize=(7.4, 4.4), layout="constrained")
        # The last three: Okabe and Ito's purple, a grey and a brown. After them dashes tell lines apart.
        colors = [BLUE, SKY, ORANGE, GREEN, RED, "#CC79A7", "#777777", "#8c564b"]
        styles = itertools.product(("-", "--", ":"), colors)
        marks = itertools.cycle("sD^vPX*p")
        for mix in order:
            points = lines[mix]
            x, y = [r["bytes"] for r in points], [r["kl"] for r in points]
            if not marked[mix]:
                wide = 2.2 if mix.startswith("ours") else 1.4
                dashes, color = next(styles)
                axis.plot(x, y, color=color, linestyle=dashes, marker="o", ms=4, linewidth=wide, label=mix)
                continue
            axis.plot(x, y, color="black", linestyle="none", marker=next(marks), ms=6, label=mix)
            for row in points:
                text = axis.annotate(row["name"], (row["bytes"], row["kl"]), fontsize=7.5, xytext=(7, -8),
                                     textcoords="offset points")  # fmt: skip
                text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable over lines
        axis.set_xscale("log")
        axis.set_yscale("log")
        _plain_log_axis(axis.yaxis, [row["kl"] for row in rows])
        _byte_ticks(axis, [row["bytes"] for row in rows], dense_bytes)
        axis.set_title("KL(teacher ‖ student), nats, against cache bytes")
        where = "cache of one sequence" + (f" at {context:,} tokens" if context else "")
        below = "; below: times smaller than the original's" if dense_bytes else ""
        axis.set_xlabel(where + below + (f"\n{caption}" if caption else ""))
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _save(figure, path)


def _byte_ticks(axis: Any, sizes: Sequence[int], dense_bytes: int | None) -> None:
    """Ticks at round ratios to the original (bytes over ratio), or at round powers of two of bytes."""
    low, high = min(sizes) / 1.15, max(sizes) * 1.3  # names stand to the right of their marks
    if dense_bytes:
        ratios = [r for r in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if low <= dense_bytes / r <= high]
        ticks = [dense_bytes / r for r in ratios] or [math.sqrt(low * high)]
        labels = [f"{_short_bytes(t)}\n{dense_bytes / t:.3g}×" for t in ticks]
    else:
        ticks = [2.0**e for e in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
        ticks = ticks or [math.sqrt(low * high)]
        labels = [_short_bytes(t) for t in ticks]
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, labels)
    axis.xaxis.set_minor_locator(NullLocator())


def _short_bytes(count: float) -> str:
    unit, size = next(((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if count >= s), ("B", 1))
    return f"{count / size:.3g} {unit}"


def read_losses(path: str | Path, column: str | None = None) -> Curve | None:
    """Reads a loss curve from the ``metrics.csv`` of Lightning's CSVLogger.

    Args:
        path: the file.
        column: its loss column; if None the first of "train/loss", "train_loss", "loss", else the first whose name
            has "loss" in it.

    Returns:
        (steps, losses), or None if the file or the column does not exist: a missing plot must not fail a report.
    """
    path = Path(path)
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    names = list(rows[0]) if rows else []
    wanted = [column] if column else ["train/loss", "train_loss", "loss", *(n for n in names if n and "loss" in n)]
    column = next((name for name in wanted if name in names), None)
    if column is None:
        return None
    points = [(float(r.get("step") or i), float(r[column])) for i, r in enumerate(rows) if r.get(column)]
    return ([p[0] for p in points], [p[1] for p in points]) if points else None


def _labelled_bars(axis: Any, names: Sequence[str], values: Sequence[float], color: str, form: str) -> None:
    """Bars with their values on top; one that is not finite has no height, and its label says what it is."""
    bars = axis.bar(names, [v if math.isfinite(v) else 0.0 for v in values], color=color, width=0.6)
    axis.bar_label(bars, [form.format(v) for v in values], padding=2)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred geometric mean over about a twentieth of the curve: a log axis shows ratios."""
    half = max(2, len(values) // 40)
    logs = np.pad(np.log(values), half, mode="edge")
    window = 2 * half + 1
    return np.exp(np.convolve(logs, np.ones(window) / window, mode="valid"))


def _plain_log_axis(axis: Any, values: Sequence[float]) -> None:
    """Round ticks with plain numbers: an axis shorter than a decade would otherwise have one label."""
    finite = [v for v in values if math.isfinite(v) and v > 0]
    spread = max(finite) / min(finite) if finite else 1.0
    if spread > 4:
        steps = (1, 2, 5)
    elif spread > 1.6:
        steps = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    else:
        steps = tuple(i / 10 for i in range(10, 100, 2 if spread > 1.2 else 1))
    axis.set_major_locator(LogLocator(10, subs=steps, numticks=12))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))


def _shade_global(axis: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    for row in layers:
        if row["kind"] == "global":
            axis.axvspan(row["index"] - 0.5, row["index"] + 0.5, color="#F0F0F0", linewidth=0, zorder=0)


def _room_above(axis: Any, share: float = 0.18) -> None:
    """Leaves room over the bars for their labels and the legend."""
    low, high = axis.dataLim.y0, axis.dataLim.y1
    if math.isfinite(high) and high > 0:
        axis.set_ylim(min(0.0, low), high * (1 + share))


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
    return path
