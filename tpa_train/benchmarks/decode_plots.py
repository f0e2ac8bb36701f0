"""The picture of ``benchmark.py decode``: how much faster a step is against how much smaller the cache is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from tpa_train.benchmarks.quality_plots import COLORS
from tpa_train.evaluation.plots import GREY, STYLE, _plain_log_axis, _save, plt

MARKS = "os^Dv"  # one a shape


def plot_speedups(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Speed-up against bytes ratio, a colour for each form and width and a mark for each shape.

    Args:
        path: PNG to write.
        rows: of ``decode``, with a speed-up each; without any nothing is drawn.
    """
    if not rows:
        return None
    forms = list(dict.fromkeys((row["form"], row["bits"]) for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    colors = {form: COLORS[i % len(COLORS)] for i, form in enumerate(forms)}
    marks = {shape: MARKS[i % len(MARKS)] for i, shape in enumerate(shapes)}
    with plt.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure, axis = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
        ratios = [row["bytes_ratio"] for row in rows]
        ends = [min(ratios) / 1.1, max(ratios) * 1.1]
        for slope, style in ((1.0, "--"), (0.6, ":")):
            axis.plot(ends, [slope * end for end in ends], color=GREY, linestyle=style, linewidth=1.2)
        for row in rows:
            axis.plot(
                row["bytes_ratio"], row["speedup"], linestyle="none", marker=marks[row["shape"]], ms=5, alpha=0.8,
                color=colors[row["form"], row["bits"]],
            )  # fmt: skip
        for scale, axes, values in (
            (axis.set_xscale, axis.xaxis, ratios), (axis.set_yscale, axis.yaxis, [row["speedup"] for row in rows]),
        ):  # fmt: skip
            scale("log")
            _plain_log_axis(axes, values)
        handles = [
            Line2D([], [], color=color, marker="o", linestyle="none", label=f"{form}, {bits} bits")
            for (form, bits), color in colors.items()
        ]
        handles += [Line2D([], [], color="black", marker=mark, linestyle="none", label=s) for s, mark in marks.items()]
        handles += [Line2D([], [], color=GREY, linestyle="--", label="as much as the bytes"),
                    Line2D([], [], color=GREY, linestyle=":", label="0.6 of that")]  # fmt: skip
        axis.set_title("Decoding attention: speed-up over the fastest dense kernel")
        axis.set_xlabel("times smaller cache")
        axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _save(figure, path)
