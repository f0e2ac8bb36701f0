"""What a smaller cache costs in quality: students recovered by the recipe, beside dense caches in fewer bits.

A cell is a mix of what the bytes are spent on, a target ratio, and the tokens of the end-to-end stage:

    rank+bits      ranks and bits of every layer, as the recipe's budget allows
    rank           ranks alone, at 16 bits
    dense-int8     the original with its cache in 8 bits, in its global layers or in all; likewise int4, int3

One calibration and one set of sensitivities serve all budgets, one layer-wise stage all end-to-end stages of a budget;
each of these has its own full schedule. distill_tokens=0 is the student before any recovery. A row is written to
out= as soon as it is measured, and the same command goes on with what is missing; beside that file lie two plots.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpa_train.benchmarks.journal import Allowance, Journal, free_memory
from tpa_train.benchmarks.measuring import MeasuredSettings, Measurements, check_sizes
from tpa_train.benchmarks.quality_plots import write_plots
from tpa_train.benchmarks.students import Start, compose_settings, measure_all, open_session, solve
from tpa_train.errors import UserError, nearest
from tpa_train.evaluation.multiple_choice import Question, read_questions
from tpa_train.evaluation.report import table
from tpa_train.evaluation.suites import cache_report
from tpa_train.launch import say
from tpa_train.peers import dense_peers
from tpa_train.pipeline import Measured, StageCost, check_against_model, timed
from tpa_train.settings import RunSettings
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA

BUDGETS = {"rank+bits": (), "rank": ("budget.bits=16",)}  # mix -> options of train.py
DENSE = ("dense-int8", "dense-int4", "dense-int3")
MIXES = (*BUDGETS, *DENSE)
TEACHER = "teacher"
CELL = ("mix", "layers", "target_ratio", "distill_tokens")
FREE = ("mixes", "ratios", "rank_ratios", "distill_tokens", "minutes")  # which cells, not how they are measured


@dataclass
class QualitySettings(MeasuredSettings):
    """Options of ``benchmark.py quality``."""

    mixes: list[str] = field(
        default_factory=lambda: list(MIXES), metadata={"help": f"what bytes are spent on, out of {', '.join(MIXES)}"}
    )
    ratios: list[float] = field(
        default_factory=lambda: [3.0, 4.0, 6.0, 8.0], metadata={"help": "cache ratios of rank+bits"}
    )
    rank_ratios: list[float] = field(
        default_factory=lambda: [2.0, 3.0, 4.0], metadata={"help": "cache ratios of rank alone"}
    )
    distill_tokens: list[int] = field(
        default_factory=lambda: [0, 14_680_064],
        metadata={"help": "tokens of the end-to-end stage, one student each; 0: before any recovery"},
    )
    layerwise_tokens: int = field(default=1_638_400, metadata={"help": "tokens of the layer-wise stage before it"})
    mcq: list[str] = field(
        default_factory=list, metadata={"help": "a multiple-choice file, as suite.path of evaluate.py"}
    )
    mcq_limit: int | None = field(default=None, metadata={"help": "use only the first so many questions of each"})
    position_tokens: int = field(
        default=131_072, metadata={"help": "tokens of valid on which perplexity by position is measured; 0: it is not"}
    )
    position_context: int = field(default=32_768, metadata={"help": "tokens of their rows"})


@dataclass(frozen=True)
class Cell:
    """One student to measure; the fields are the row's."""

    mix: str
    layers: str | None = None  # of a dense cache: which are stored in fewer bits
    target_ratio: float | None = None  # of a budget
    distill_tokens: int = 0

    @property
    def name(self) -> str:
        ratio = "" if self.target_ratio is None else f" ÷{self.target_ratio:g}, {self.distill_tokens:,} tokens"
        return self.mix + (f", {self.layers}" if self.layers else "") + ratio


def plan(settings: QualitySettings) -> list[Cell]:
    """Returns the cells in the order in which they are measured: those of one budget together, few tokens first."""
    cells = []
    for mix in dict.fromkeys(settings.mixes):
        if mix in DENSE:
            cells += [Cell(mix, layers) for layers in ("global", "all")]
            continue
        for ratio in dict.fromkeys(settings.rank_ratios if mix == "rank" else settings.ratios):
            cells += [Cell(mix, None, ratio, tokens) for tokens in sorted(set(settings.distill_tokens))]
    return cells


def run(settings: QualitySettings, journal: Journal) -> list[dict[str, Any]]:
    """Measures the cells that the journal has no row of; returns all of its rows, the teacher's first.

    Raises:
        UserError: an option, a file or the model is at fault. What is wrong with one cell goes into its row.
    """
    questions = _check(settings)
    todo = [cell for cell in plan(settings) if not journal.done(**vars(cell))]
    say(f"{len(todo)} of {len(plan(settings))} students are left to measure")
    if todo:
        with tempfile.TemporaryDirectory() as folder:
            _Bench(settings, journal, Path(folder), questions).measure(todo)
    if journal.path is not None:
        write_plots(journal.path, journal.rows)
    return journal.rows


def _check(settings: QualitySettings) -> dict[str, list[Question]]:
    """Refuses options that cannot work, before anything is loaded; returns the questions by set."""
    check_sizes(settings, "position_context")
    for mix in settings.mixes:
        if mix not in MIXES:
            raise UserError(f"mixes={mix} is unknown{nearest(mix, MIXES)}")
    for name in ("ratios", "rank_ratios"):
        if any(not ratio > 1 for ratio in getattr(settings, name)):
            raise UserError(f"{name}={getattr(settings, name)}: a cache ratio must be above 1.")
    for name, values in (("distill_tokens", settings.distill_tokens), ("layerwise_tokens", [settings.layerwise_tokens]),
                         ("position_tokens", [settings.position_tokens])):  # fmt: skip
        if any(value < 0 for value in values):
            raise UserError(f"{name}={getattr(settings, name)} must not be negative.")
    questions = {Path(path).stem: read_questions(path, settings.mcq_limit) for path in settings.mcq}
    if len(questions) < len(settings.mcq):
        raise UserError("mcq= names two files of the same name; rename one.")
    return questions


class _Bench:
    """Teacher, texts, calibration, and the budget that was solved last."""

    def __init__(
        self, settings: QualitySettings, journal: Journal, folder: Path, questions: dict[str, list[Question]]
    ) -> None:
        self.settings, self.journal, self.folder = settings, journal, folder
        self.allowance = Allowance(settings.minutes)
        self.session = open_session(self._compose(), folder)
        check_against_model(self.session.settings, self.session.config)
        self.session.data  # noqa: B018 - empty training text is refused here
        self.measurements = Measurements(
            self.session, settings, questions, settings.position_tokens, settings.position_context
        )
        self.measured: Measured | None = None
        self._solved: tuple[Any, Start, dict[str, float]] | None = None  # mix and ratio; the student; seconds
        self._layerwise: tuple[Any, Start, StageCost] | None = None  # likewise, after the layer-wise stage

    def _compose(self, *options: str) -> RunSettings:
        return compose_settings(self.settings, f"recipe.layerwise.tokens={self.settings.layerwise_tokens}", *options)

    def measure(self, todo: Sequence[Cell]) -> None:
        """Measures the cells, one after another, until the allowance is spent."""
        teacher = Cell(TEACHER)
        if not self.journal.done(**vars(teacher)):
            self._add(teacher, None, {})
        if any(cell.mix in BUDGETS for cell in todo):
            self.measured = measure_all(self.session)
        for number, cell in enumerate(todo):
            if number and not self.allowance.fits(cell.distill_tokens):
                say(f"minutes={self.settings.minutes:g} are spent; {len(todo) - number} students are left, which the "
                    "same command goes on with")  # fmt: skip
                break
            begin = time.perf_counter()
            try:
                student, costs = self._dense(cell) if cell.mix in DENSE else self._recovered(cell)
                self._add(cell, student, costs)
            except Exception as error:  # noqa: BLE001 - one student's failure must not cost the others
                self.journal.add_error(error, **vars(cell))
                say(f"{cell.name}: {self.journal.rows[-1]['error']}")
                continue
            finally:
                student = None
                free_memory()
            self.allowance.learn(
                time.perf_counter() - begin, costs.get("distill_seconds", 0.0), cell.distill_tokens
            )

    def _dense(self, cell: Cell) -> tuple[Gemma3ForMultimodalLMwithTPA, dict[str, float]]:
        """Returns the original with the cache of its global layers, or of all, in fewer bits."""
        wanted = f"{cell.mix.replace('-', ' ')}, {cell.layers}"
        specs = next(specs for _, mix, specs in dense_peers(self.session.config) if mix == wanted)
        return Gemma3ForMultimodalLMwithTPA.from_dense(self.session.teacher, specs, {}), {}

    def _recovered(self, cell: Cell) -> tuple[Gemma3ForMultimodalLMwithTPA, dict[str, float]]:
        """Returns the student of a budget after its recovery, and what that took."""
        budget = (*BUDGETS[cell.mix], f"budget.cache_ratio={cell.target_ratio}")
        session = open_session(
            self._compose(*budget, f"recipe.distill.tokens={cell.distill_tokens}"), self.folder, self.session.teacher,
            self.measured,
        )  # fmt: skip
        if self._solved is None or self._solved[0] != budget:
            start, seconds, _ = timed(session.machine, lambda: solve(session))
            self._solved = budget, start, {"conversion_seconds": seconds}
        _, start, costs = self._solved
        costs = costs | {
            "calibration_seconds": self.measured.cost.seconds, "sensitivity_seconds": self.measured.probing_seconds
        }
        if cell.distill_tokens == 0:
            return start.student(session.teacher), costs
        if self._layerwise is None or self._layerwise[0] != budget:
            start, _, cost = start.recover(session, "layerwise")
            self._layerwise = budget, start, cost
        _, start, layerwise = self._layerwise
        _, student, distill = start.recover(session, "distill")
        return student, costs | {
            "layerwise_seconds": layerwise.seconds, "distill_seconds": distill.seconds,
            "tokens": layerwise.tokens + distill.tokens, "peak_gib": max(layerwise.peak_gib, distill.peak_gib),
        }  # fmt: skip

    def _add(self, cell: Cell, student: Gemma3ForMultimodalLMwithTPA | None, costs: dict[str, float]) -> None:
        """Measures the student, writes its row and says what matters of it."""
        teacher, context = self.session.teacher, self.session.settings.budget.context
        report = cache_report(teacher, student or teacher, context)
        making = {name: value for name, value in costs.items() if name.endswith("_seconds")}
        begin = time.perf_counter()
        row = vars(cell) | {
            "cache_ratio": report.ratio, "cache_bytes": report.tpa_bytes, "dense_bytes": report.dense_bytes,
            "cache_context": report.context, "tokens": 0, "minutes": sum(making.values()) / 60,
        } | costs | self.measurements.measure(student, cell.name)  # fmt: skip
        row["evaluation_seconds"] = time.perf_counter() - begin
        specs = [] if student is None else student.specs
        row["specs"] = {str(i): spec.describe() for i, spec in enumerate(specs) if spec.converted}
        self.journal.add(row)
        say(
            f"{cell.name}: cache ÷{row['cache_ratio']:.2f}  KL {row['kl']:.4f}  top-1 {row['top1']:.4f}  "
            f"perplexity ×{row['valid8k_ppl_ratio']:.4f}  {row['minutes']:.1f} min, "
            f"measured in {row['evaluation_seconds']:.0f} s"
        )


# -------------------------------------------------------------------------------------------------------------- results


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as a Markdown table, and what went wrong below it."""
    measured, failed = [r for r in rows if "error" not in r], [r for r in rows if "error" in r]
    distances = list(dict.fromkeys(d for row in measured for d in row["copy_accuracy"]))
    head = ["mix", "cache", "tokens", "minutes", "KL 8K", "KL WikiText-2", "top-1", "ppl 8K", "ppl WikiText-2",
            *(f"copy {int(d):,}" for d in distances), "multiple choice"]  # fmt: skip
    lines = []
    for row in measured:
        stored = f" ({row['layers']})" if row["layers"] else ""
        lines.append(
            [
                row["mix"] + stored, f"÷{row['cache_ratio']:.2f}", f"{row['tokens'] / 1e6:.1f}M",
                f"{row['minutes']:.1f}", _cell(row, "kl", ".4f"), _cell(row, "kl_wikitext2", ".4f"),
                _cell(row, "top1", ".1%"), _cell(row, "valid8k_ppl_ratio", ".4f", "×"),
                _cell(row, "wikitext2_ppl_ratio", ".4f", "×"),
                *(_cell(row["copy_accuracy"], d, ".1%") for d in distances),
                _points(row),
            ]
        )  # fmt: skip
    return "\n\n".join([table(head, lines), *(f"{Cell(*map(row.get, CELL)).name}: {row['error']}" for row in failed)])


def _cell(row: Mapping[str, Any], key: str, form: str, before: str = "") -> str:
    value = row.get(key)
    return "–" if value is None else before + format(value, form)


def _points(row: Mapping[str, Any]) -> str:
    if row.get("mcq_delta_points") is None:
        return "–"
    return f"{row['mcq_delta_points']:+.2f} ± {row['mcq_stderr_points']:.2f}"
