"""Several runs by one command, ``scripts/train.py --multirun``, and what they say together: the frontier.

A sweep's folder::

    sweep.json                        what was asked for
    <option=value,…>/                 one run each, as ``tpa_train.launch`` makes it
    peers.json                        measured results of models that no run made
    frontier.json  .md  .png          quality against cache bytes
"""

from __future__ import annotations

import gc
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tpa_train.errors import UserError
from tpa_train.evaluation.atomic import write_text
from tpa_train.evaluation.frontier import Frontier, frontier_row, write_frontier
from tpa_train.factorization.allocation import Budget
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.interrupts import Interrupted, InterruptHandler
from tpa_train.launch import Run, make_evaluator, say
from tpa_train.peers import frontier_peers
from tpa_train.pipeline import Measured, Session, check_against_model, model_path
from tpa_train.recipes import compose, load_settings
from tpa_train.runs import default_folder
from tpa_train.settings import RunSettings
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs
from tpa_train.trainers import choose_machine

# (session of the first job, the jobs' budgets) -> (name, mix, model or all-dense specifications) of each peer
Peers = Callable[[Session, list[Budget]], Iterable[tuple[str, str, Gemma3ForMultimodalLMwithTPA | list[LayerSpec]]]]

RATIO = ("budget.cache_ratio", "budget")  # what a frontier runs along; other swept options make mixes of their own
LONGEST_NAME = 120  # characters of a job's folder


@dataclass(frozen=True)
class Job:
    """One run of the sweep."""

    name: str  # of its folder
    swept: Mapping[str, str]  # option -> its value here
    options: tuple[str, ...]  # of an ordinary run, without run_dir

    def mix(self, stage: str) -> str:
        others = [f"{key}={value}" for key, value in self.swept.items() if key not in RATIO]
        return ", ".join(["ours", "one-shot" if stage == "factorized" else "recovered", *others])


# ------------------------------------------------------------------------------------------------------------ planning


def split_values(text: str) -> list[str]:
    """Splits at the commas that stand outside of quotes and brackets: ``[1,2]`` is one value, ``2,3`` are two."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not values[-1].strip():  # an apostrophe inside a text is no quote
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            values.append("")
            continue
        values[-1] += character
    return [value.strip() for value in values]


def plan(options: Iterable[str]) -> list[Job]:
    """Returns the jobs that the options ask for: every combination of the comma lists' values, the last varying first.

    Args:
        options: ``key=value`` strings, without run_dir and resume.

    Raises:
        UserError: a comma list has an empty or a repeated value, or its option is given twice.
    """
    options = [_plain(option) for option in options]
    keys = [option.partition("=")[0] for option in options]
    swept: dict[str, list[str]] = {}
    for key, option in zip(keys, options, strict=True):
        values = split_values(option.partition("=")[2])
        if len(values) == 1:
            continue
        if "" in values:
            raise UserError(f"{option} has an empty value between its commas; leave the comma out.")
        repeated = next((v for i, v in enumerate(values) if v in values[:i]), None)
        if repeated is not None:
            raise UserError(f"{option} names {repeated} twice; name each value once.")
        if keys.count(key) > 1:
            raise UserError(f"{key} is given twice, once with several values; give it once.")
        swept[key] = values
    jobs: list[Job] = []
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        own = (f"{k}={chosen[k]}" if k in chosen else option for k, option in zip(keys, options, strict=True))
        jobs.append(Job(_folder_name(chosen, [job.name for job in jobs]), chosen, tuple(own)))
    return jobs


def _plain(option: str) -> str:
    """Returns ``option`` without the signs that people put before a key."""
    key, separator, value = option.partition("=")
    return key.lstrip("-+") + separator + value


def _folder_name(chosen: Mapping[str, str], taken: list[str]) -> str:
    """Returns "key=value,key=value" in characters that every file system takes, numbered where that is not unique."""
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(f"{key}={value}" for key, value in chosen.items())) or "run"
    if len(name) <= LONGEST_NAME and name not in taken:
        return name
    return f"{name[:LONGEST_NAME]}-{len(taken)}"


# ------------------------------------------------------------------------------------------------------------- running


class Sweep:
    """The jobs of one command in their folder.

    Args:
        argv: the command line without ``--multirun``.
        peers: makes models to be measured beside the jobs' own (``tpa_train.peers``); none if None.

    Raises:
        UserError: an option or the folder is at fault; nothing has been written.
    """

    def __init__(self, argv: list[str], peers: Peers | None = None) -> None:
        own = {"run_dir": "", "resume": "false"}
        options = []
        for argument in map(_plain, argv):
            key, _, value = argument.partition("=")
            if key in own:
                own[key] = value
            else:
                options.append(argument)
        self.resume = yaml.safe_load(own["resume"])
        if not isinstance(self.resume, bool):
            raise UserError(f"resume={own['resume']}: expected true or false.")
        self.peers = peers
        self._teacher: tuple[Any, Gemma3ForCausalLM] | None = None  # what tells it apart, and the model
        self._measured: tuple[Any, Measured] | None = None  # likewise: calibration and sensitivities
        self.folder = Path(own["run_dir"])
        self.options = self._stored_options(own["run_dir"], options) if self.resume else options
        self.jobs = plan(self.options)
        # Everything is composed before anything runs: a typo in the last job must not cost the first ones.
        self._settings = [self._settings_of(job) for job in self.jobs]
        if any(settings.dry_run for settings in self._settings):
            raise UserError("dry_run=true speaks of one run; leave --multirun and the further values out.")
        if not own["run_dir"]:
            self.folder = _default_folder(self._settings[0])
        for job, settings in zip(self.jobs, self._settings, strict=True):
            settings.run_dir = str(self.folder / job.name)
        if not self.resume:
            _check_unused(self.folder)

    def _stored_options(self, run_dir: str, options: list[str]) -> list[str]:
        """Returns what the sweep was started with; ``options`` may repeat it."""
        if not run_dir:
            raise UserError("resume=true needs run_dir=: which sweep is to go on?")
        path = self.folder / "sweep.json"
        if not path.is_file():
            single = (self.folder / "run.yaml").is_file()
            hint = "it holds a single run: leave --multirun out." if single else "leave resume out to start one."
            raise UserError(f"resume=true, but there is no sweep in {run_dir}; {hint}")
        stored = _read_json(path, "start a new sweep")["options"]
        for option in options:
            if option not in stored:
                key = option.partition("=")[0]
                theirs = next((o for o in stored if o.partition("=")[0] == key), "not given")
                raise UserError(f"resume=true: {option} contradicts the interrupted sweep, where it is {theirs}; "
                                "leave it out.")  # fmt: skip
        return stored

    def _settings_of(self, job: Job) -> RunSettings:
        """Returns the settings of a job: those it was started with, if it was."""
        if not (self.resume and (self.folder / job.name / "run.yaml").exists()):
            return compose(list(job.options))
        settings = load_settings(self.folder / job.name)
        settings.resume = True
        return settings

    def execute(self) -> Path:
        """Runs what is left to do, measures the peers and returns the path of frontier.md.

        Raises:
            Interrupted: a signal came; whatever is finished is saved, and the job under way as in a single run.
            UserError: see the message.
        """
        with InterruptHandler().installed():
            pending = [job for job in self.jobs if not self._finished(job)]
            if pending:
                self._refuse_early(pending)
            for number, job in enumerate(self.jobs, 1):
                done = job not in pending
                say(f"\njob {number} of {len(self.jobs)}: {job.name}" + (" is finished" if done else ""))
                if not done:
                    self._run(job)
            path = self._write()
            if self._measure_peers():
                path = self._write()
            say(f"\nfrontier  {path}")
            return path

    def how_to_go_on(self) -> str:
        """Returns what to tell somebody whose sweep was stopped."""
        if not (self.folder / "sweep.json").exists():
            return "nothing had been written yet."
        return f"go on with: {self._command('run_dir=' + str(self.folder), 'resume=true')}"

    def _command(self, *options: str) -> str:
        return shlex.join(["python", "scripts/train.py", "--multirun", *options])

    def _finished(self, job: Job) -> bool:
        return (self.folder / job.name / "report.json").exists()  # the last thing that a run writes

    def _refuse_early(self, pending: list[Job]) -> None:
        """Checks every job against the first one's model, and the first one's text; only then makes the folder."""
        first = self._make_run(pending[0])
        for job in pending:
            run = self._make_run(job)
            if _model_key(run.settings) != _model_key(first.settings):
                continue  # another model is not loaded for a check alone
            with _named(job):
                check_against_model(run.settings, self._teacher_for(first.session).config)
        with _named(pending[0]):
            first.session.data  # noqa: B018 - packs the text; empty data is refused here
        if not self.resume:
            content = {"options": self.options, "jobs": [job.name for job in self.jobs]}
            write_text(self.folder / "sweep.json", json.dumps(content, indent=1) + "\n")

    def _make_run(self, job: Job) -> Run:
        settings = self._settings[self.jobs.index(job)]
        command = shlex.join(["python", "scripts/train.py", *job.options, f"run_dir={self.folder / job.name}"])
        with _named(job):
            run = Run(settings, command, self._loaded(settings))
            run.session.measured = self._measured_for(settings)
            return run

    def _measured_for(self, settings: RunSettings) -> Measured | None:
        """Returns the calibration of an earlier job that this one would only repeat."""
        if self._measured is None or self._measured[0] != _calibration_key(settings):
            return None
        return self._measured[1]

    def _loaded(self, settings: RunSettings) -> Gemma3ForCausalLM | None:
        """Returns the teacher of these settings if it is the one at hand."""
        return self._teacher[1] if self._teacher is not None and self._teacher[0] == _model_key(settings) else None

    def _teacher_for(self, session: Session) -> Gemma3ForCausalLM:
        """Returns the session's teacher, loading it unless an earlier job did."""
        key = _model_key(session.settings)
        if self._teacher is None or self._teacher[0] != key:
            self._teacher = None  # room for the next one
            say(f"loading {model_path(session.settings)}")
            self._teacher = (key, session.teacher)
        return self._teacher[1]

    def _run(self, job: Job) -> None:
        run = self._make_run(job)
        with _named(job):
            self._teacher_for(run.session)
            run.execute()
        if run.session.measured is not None:
            self._measured = (_calibration_key(run.settings), run.session.measured)
        del run
        gc.collect()  # Lightning's modules and trainers hold each other, and the job's optimizer with them

    # --------------------------------------------------------------------------------------------------------- results

    def _job_rows(self) -> list[dict[str, Any]]:
        """Returns the rows of every job: its one-shot stage and its last."""
        rows = []
        for job in self.jobs:
            report = self._report(job)
            cache = report["cache"]
            stages = [stage for stage in report["stages"] if stage["name"] != "teacher"]
            for stage in stages[:1] + stages[1:][-1:]:
                name = stage["name"]
                rows.append(
                    frontier_row(job.name, job.mix(name), name, cache["tpa_bytes"], cache["dense_bytes"], stage)
                )
        return rows

    def _report(self, job: Job) -> dict[str, Any]:
        return _read_json(self.folder / job.name / "report.json")

    def _unlike(self) -> list[str]:
        """Returns in what the jobs differ so that no peer can be measured as all of them were."""
        parts = {
            "model": lambda s: s.model, "data": lambda s: s.data, "evaluation": lambda s: s.evaluation,
            "trainer.precision": lambda s: s.trainer.precision, "budget.context": lambda s: s.budget.context,
        }  # fmt: skip
        return [name for name, part in parts.items() if any(part(s) != part(self._settings[0]) for s in self._settings)]

    def _write(self) -> Path:
        reports = [self._report(job) for job in self.jobs]
        contexts = {report["cache"]["context"] for report in reports}
        dense = {report["cache"]["dense_bytes"] for report in reports}
        teacher = reports[0]["stages"][0]
        notes = []
        if self._unlike():
            notes = [f"The runs differ in {', '.join(self._unlike())}: compare only what was measured alike. Nothing "
                     "else was measured beside them."]  # fmt: skip
        frontier = Frontier(
            model=reports[0]["model"],
            rows=self._job_rows() + self._recorded_peers()["rows"],
            teacher=teacher,
            context=contexts.pop() if len(contexts) == 1 else None,
            dense_bytes=dense.pop() if len(dense) == 1 else None,
            evaluated_tokens=teacher["evaluated_tokens"],
            command=self._command(*self.options),
            notes=notes,
        )
        return write_frontier(self.folder, frontier)

    def _recorded_peers(self) -> dict[str, Any]:
        path = self.folder / "peers.json"
        return _read_json(path) if path.exists() else {"rows": [], "complete": False}

    def _measure_peers(self) -> bool:
        """Measures what ``peers`` makes, as the first job was measured, and records each; True if there are any."""
        recorded = self._recorded_peers()
        wanted = self.peers is not None and self._settings[0].peers
        if not wanted or recorded["complete"] or self._unlike():
            return bool(recorded["rows"])
        sessions = [Session(s, self.folder / "logs", self._loaded(s)) for s in self._settings]
        sessions[0].measured = self._measured_for(sessions[0].settings)
        session, budgets = sessions[0], list(dict.fromkeys(s.budget for s in sessions))
        teacher, context = self._teacher_for(session), session.budget.context
        dense = cache_bytes(teacher.config, dense_specs(teacher.config), context)
        say("\nmeasuring other ways to spend the same bytes")
        with _named("peers"):
            evaluator = make_evaluator(session)
            for name, mix, model in self.peers(session, budgets):
                if any((row["name"], row["mix"]) == (name, mix) for row in recorded["rows"]):
                    continue
                if not isinstance(model, Gemma3ForMultimodalLMwithTPA):
                    model = Gemma3ForMultimodalLMwithTPA.from_dense(teacher, model, {})
                result = evaluator.evaluate(model.to(session.machine.device), name)
                row = frontier_row(name, mix, "factorized", model.cache_bytes(context), dense, result.to_dict())
                recorded["rows"].append(row)
                self._record_peers(recorded)
                say(f"{mix}: {name}  ÷{row['cache_ratio']:.2f}  perplexity {result.perplexity:.3f}  KL {result.kl:.4f}")
        self._record_peers(recorded | {"complete": True})
        return bool(recorded["rows"])

    def _record_peers(self, recorded: Mapping[str, Any]) -> None:
        write_text(self.folder / "peers.json", json.dumps(recorded, indent=1, allow_nan=False) + "\n")


def _check_unused(folder: Path) -> None:
    """Raises UserError if there is something in the folder already."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir={folder} is a file; name a folder.")
    if folder.exists() and any(folder.iterdir()):
        hint = "add resume=true to go on with it, or " if (folder / "sweep.json").exists() else ""
        raise UserError(f"run_dir={folder} already exists and is not empty; {hint}choose another run_dir.")


def _default_folder(settings: RunSettings) -> Path:
    """Returns ``runs/<model>-<recipe>-sweep-<time>``."""
    run = default_folder(settings)
    name, day, clock = run.name.rsplit("-", 2)
    return run.with_name(f"{name}-sweep-{day}-{clock}")


def _model_key(settings: RunSettings) -> tuple:
    """What must be equal for two jobs to share a loaded teacher."""
    machine = choose_machine(settings.trainer)
    return str(model_path(settings)), settings.model.adapter, machine.device, machine.dtype


def _calibration_key(settings: RunSettings) -> tuple:
    """What must be equal for two jobs to share calibration and sensitivities."""
    trainer = settings.trainer
    return (
        *_model_key(settings), repr(settings.data), repr(settings.recipe.calibration), settings.seed, trainer.context,
        trainer.batch_size,
    )  # fmt: skip


@contextmanager
def _named(job: Job | str):
    """Says in a UserError's message which job it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{job if isinstance(job, str) else job.name}: {error}") from error


def _read_json(path: Path, fix: str = "delete it to make it anew") -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {fix}.") from error
    return content


def main(argv: list[str]) -> int:
    """Runs ``scripts/train.py --multirun``; ``argv`` is the rest of its command line. Returns the exit status.

    Raises:
        UserError: an option, a file or the model is at fault.
    """
    sweep = Sweep(argv, frontier_peers)
    try:
        sweep.execute()
    except Interrupted as stop:
        say(f"\nstopped by {stop}; {sweep.how_to_go_on()}")
        return stop.status
    return 0
