"""Which options of the recovery recipe matter: variants of it, all from one factorized student, at equal tokens.

A variant is a name and options of train.py that differ from the base (the recipe with options=). Built-in ones come in
groups, each of which varies one thing; variants="NAME: OPTION=VALUE OPTION=VALUE" adds others. The budget is solved
once, and variants that share their layer-wise stage share its result. A row is written to out= as soon as it is
measured, and the same command goes on with what is missing. The table is sorted by KL; the seeds show the noise.
"""

from __future__ import annotations

import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpa_train.benchmarks.journal import Allowance, Journal, free_memory
from tpa_train.benchmarks.measuring import MeasuredSettings, Measurements, check_sizes
from tpa_train.benchmarks.students import Start, compose_settings, open_session, solve
from tpa_train.benchmarks.variants import BASE, GROUPS, Variant, built_in
from tpa_train.errors import UserError, nearest
from tpa_train.evaluation.report import table
from tpa_train.launch import say
from tpa_train.pipeline import StageCost, check_against_model
from tpa_train.settings import RunSettings

CELL = ("variant", "options")
FREE = ("groups", "variants", "solved", "minutes")  # which variants, not how they are measured
START = Variant("before recovery", "")


@dataclass
class RecoverySettings(MeasuredSettings):
    """Options of ``benchmark.py recovery``."""

    groups: list[str] = field(
        default_factory=lambda: list(GROUPS), metadata={"help": f"built-in variants, out of {', '.join(GROUPS)}; none"}
    )
    variants: list[str] = field(
        default_factory=list,
        metadata={"help": "one more, as variants='slow: recipe.distill.lr_original=1e-5 trainer.accumulate=2'"},
    )
    cache_ratio: float = field(default=4.0, metadata={"help": "of the budget that all start from"})
    layerwise_tokens: int = field(default=1_638_400, metadata={"help": "tokens of the base's layer-wise stage"})
    distill_tokens: int = field(default=3_276_800, metadata={"help": "tokens of the end-to-end stage"})
    solved: str | None = field(
        default=None, metadata={"help": "a .safetensors file that keeps the factorized student for a later start"}
    )
    copy: list[int] = field(
        default_factory=lambda: [3500, 8000], metadata={"help": "distances of the copy test, in tokens"}
    )


def run(settings: RecoverySettings, journal: Journal) -> list[dict[str, Any]]:
    """Measures the variants that the journal has no row of; returns all of its rows.

    Raises:
        UserError: an option, a file or the model is at fault. What is wrong with one variant only shows in its row.
    """
    check_sizes(settings, "distill_tokens")
    variants = plan(settings)
    composed = {variant: _compose(settings, variant) for variant in variants}  # a typo in the last must not cost hours
    todo = [v for v in (START, *variants) if not journal.done(**_cell(v))]
    say(f"{len(todo)} of {1 + len(variants)} students are left to measure")
    if todo:
        with tempfile.TemporaryDirectory() as folder:
            _Bench(settings, journal, Path(folder)).measure(todo, composed)
    return journal.rows


def plan(settings: RecoverySettings) -> list[Variant]:
    """Returns the base, the variants of the chosen groups, and the user's.

    Raises:
        UserError: a group is unknown, or a variant is not of the form "NAME: OPTION=VALUE …".
    """
    groups = [group for group in settings.groups if group != "none"]
    for group in groups:
        if group not in GROUPS:
            raise UserError(f"groups={group} is unknown{nearest(group, (*GROUPS, 'none'))}")
    found = [BASE, *built_in(_compose(settings, BASE), groups), *map(parse_variant, settings.variants)]
    names = [variant.name for variant in (START, *found)]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"variants: the name '{repeated}' is taken; choose another.")
    return found


def parse_variant(text: str) -> Variant:
    """Reads "NAME: OPTION=VALUE OPTION=VALUE"; values with spaces are quoted as in a shell.

    Raises:
        UserError: it is not of that form.
    """
    match = re.match(r"\s*([^:=]+?)\s*:\s+(.*\S)\s*$", text, re.DOTALL)
    try:
        options = tuple(shlex.split(match[2])) if match else ()
    except ValueError:
        options = ()
    if not options or not all("=" in option for option in options):
        raise UserError(f"variants='{text}': expected a name, a colon and options, as 'slow: recipe.distill.clip=0.5'.")
    return Variant(match[1], "own", options)


def _compose(settings: RecoverySettings, variant: Variant) -> RunSettings:
    return compose_settings(
        settings, f"budget.cache_ratio={settings.cache_ratio}", f"recipe.layerwise.tokens={settings.layerwise_tokens}",
        f"recipe.distill.tokens={settings.distill_tokens}", *variant.options,
    )  # fmt: skip


def _cell(variant: Variant) -> dict[str, Any]:
    return {"variant": variant.name, "options": list(variant.options)}


class _Bench:
    """Teacher, texts, the factorized student, and where the layer-wise stages took it."""

    def __init__(self, settings: RecoverySettings, journal: Journal, folder: Path) -> None:
        self.settings, self.journal, self.folder = settings, journal, folder
        self.allowance = Allowance(settings.minutes)
        self.session = open_session(_compose(settings, BASE), folder)
        check_against_model(self.session.settings, self.session.config)
        self.measurements = Measurements(self.session, settings)
        self.start = self._solve()
        self._layerwise: dict[str, tuple[Start, StageCost]] = {}

    def _solve(self) -> Start:
        """Returns the factorized student that all variants start from; the same one in every start with ``solved``."""
        if self.settings.solved is None:
            return solve(self.session)
        path, s = Path(self.settings.solved).expanduser(), self.session.settings
        made_by = repr((s.model, s.data, s.budget, s.recipe.calibration, s.seed, s.trainer.context))
        if not path.exists():
            start = solve(self.session)
            start.save(path, made_by)
        return Start.load(path, made_by, self.session.machine.device)

    def measure(self, todo: Sequence[Variant], composed: Mapping[Variant, RunSettings]) -> None:
        """Measures the variants, one after another, until the allowance is spent."""
        for number, variant in enumerate(todo):
            tokens = 0 if variant == START else composed[variant].recipe.distill.tokens
            if number and not self.allowance.fits(tokens):
                say(f"minutes={self.settings.minutes:g} are spent; {len(todo) - number} students are left, which the "
                    "same command goes on with")  # fmt: skip
                break
            begin, costs = time.perf_counter(), {}
            try:
                if variant == START:
                    student = self.start.student(self.session.teacher)
                else:
                    student, costs = self._recovered(composed[variant])
                self._add(variant, student, costs)
            except Exception as error:  # noqa: BLE001 - one variant's failure must not cost the others
                self.journal.add_error(error, **_cell(variant), group=variant.group)
                say(f"{variant.name}: {self.journal.rows[-1]['error']}")
                continue
            finally:
                student = None
                free_memory()
            self.allowance.learn(time.perf_counter() - begin, costs.get("distill_seconds", 0.0), tokens)

    def _recovered(self, settings: RunSettings) -> tuple[Any, dict[str, Any]]:
        """Returns the student after both stages of ``settings``, and what they took."""
        session = open_session(settings, self.folder, self.session.teacher)
        check_against_model(settings, session.config)
        same = repr((settings.recipe.layerwise, settings.trainer, settings.data, settings.seed))
        if same not in self._layerwise:
            start, _, cost = self.start.recover(session, "layerwise")
            self._layerwise[same] = start, cost
        start, layerwise = self._layerwise[same]
        _, student, distill = start.recover(session, "distill")
        return student, {
            "layerwise_tokens": layerwise.tokens, "distill_tokens": distill.tokens,
            "layerwise_seconds": layerwise.seconds, "distill_seconds": distill.seconds,
            "seconds": layerwise.seconds + distill.seconds,
            "peak_gib": max(layerwise.peak_gib, distill.peak_gib),
        }  # fmt: skip

    def _add(self, variant: Variant, student: Any, costs: dict[str, Any]) -> None:
        """Measures the student, writes its row and says what matters of it."""
        row = _cell(variant) | {"group": variant.group} | costs | self.measurements.measure(student, variant.name)
        self.journal.add(row)
        copied = "  ".join(f"copy {c} {share:.3f}" for c, share in row["copy_accuracy"].items())
        say(f"{variant.name}: KL {row['kl']:.4f}  top-1 {row['top1']:.4f}  {copied}  {row.get('seconds', 0):.0f} s")


# -------------------------------------------------------------------------------------------------------------- results


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the Markdown table, best KL first, each KL beside the base's, and what went wrong below it."""
    measured = sorted((r for r in rows if "error" not in r), key=lambda r: (r["kl"] is None, r["kl"]))
    base = next((row for row in measured if row["variant"] == BASE.name), None)
    distances = list(dict.fromkeys(d for row in measured for d in row["copy_accuracy"]))
    copies = [f"copy {int(d):,}" for d in distances]
    head = ["variant", "options", "KL 8K", "to base", "KL WikiText-2", "top-1", *copies, "seconds"]
    lines = []
    for row in measured:
        options = " ".join(f"`{option}`" for option in row["options"])
        own, theirs = row["kl"], None if base is None else base["kl"]
        apart = f"{100 * (own / theirs - 1):+.1f} %" if own is not None and theirs else "–"
        lines.append(
            [
                row["variant"], options, _number(own, ".4f"), "" if row is base else apart,
                _number(row.get("kl_wikitext2"), ".4f"), _number(row["top1"], ".2%"),
                *(_number(row["copy_accuracy"].get(d), ".1%") for d in distances), _number(row.get("seconds"), ".0f"),
            ]
        )  # fmt: skip
    failed = [f"{row['variant']} ({' '.join(row['options'])}): {row['error']}" for row in rows if "error" in row]
    return "\n\n".join([table(head, lines), *failed])


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
