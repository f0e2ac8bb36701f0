"""One run of ``scripts/train.py``: stages in order, measured after each, recorded so that a stopped run goes on."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tpa_train.checkpoints.export import export_model
from tpa_train.data.rows import collate_rows, shortened
from tpa_train.distributed.launching import joined, launch, must_launch, one_voice
from tpa_train.distributed.processes import from_first, is_first, world_size
from tpa_train.errors import UserError
from tpa_train.evaluation.report import model_card, write_report
from tpa_train.evaluation.suites import Evaluator, greedy_samples
from tpa_train.factorization.sensitivity import Probe
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.interrupts import Interrupted, InterruptHandler, SaveAndStop
from tpa_train.pipeline import Measured, Session, StageCost, check_against_model, factorize_model, model_path
from tpa_train.recovery import measure_layer_errors, recover
from tpa_train.results import (
    REPORTED_AS,
    load_factorized,
    load_stage,
    make_report,
    recorded_results,
    save_factorized,
)
from tpa_train.runs import RunFolder, default_folder
from tpa_train.settings import RunSettings
from tpa_train.teacher import open_teacher_cache
from tpa_train.texts import check_batch
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import cache_bytes, dense_specs
from tpa_train.trainers import make_loggers, release_memory

_PROCESS = "from tpa_train.cli import run_main; from tpa_train.launch import main; run_main(main)"
SAMPLE_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "A dictionary in Python maps",
)


class Run:
    """A run in its folder. With several processes each has one; the first one's writes and speaks.

    Args:
        settings: checked here before anything is written.
        command: as the user typed it; goes into the report.
        loaded: the teacher, where a sweep has it already.

    Raises:
        UserError: the settings, the folder or the model are at fault.
    """

    def __init__(self, settings: RunSettings, command: str, loaded: Gemma3ForCausalLM | None = None) -> None:
        path = Path(settings.run_dir) if settings.run_dir else from_first(lambda: default_folder(settings))
        settings.run_dir = str(path)
        self.settings, self.command = settings, command
        self.folder = from_first(lambda: RunFolder(path, settings.resume))
        self.session = Session(settings, path / "logs", loaded)
        # What "auto" came to is stored: a run that goes on elsewhere, or is exported, computes as it began.
        settings.trainer.precision = "bf16" if self.session.machine.dtype == torch.bfloat16 else "float32"
        self.handler = InterruptHandler()
        self.student: Gemma3ForMultimodalLMwithTPA | None = None
        self.results = recorded_results(self.folder)

    def execute(self) -> Path:
        """Runs what is left to do and returns the path of report.md.

        Raises:
            Interrupted: a signal came; everything finished is saved, and training up to the last step.
            UserError: see the message.
        """
        with self.handler.installed():
            self._load()
            self._measure("teacher", None, StageCost(0, 0.0, 0.0))
            self._factorize()
            for stage in self.settings.recipe.stages[1:]:
                if self.session.steps(stage) > 0:
                    self._recover(stage)
            return self._finish()

    def how_to_go_on(self) -> str:
        """Returns what to tell somebody whose run was stopped."""
        if not self.folder.started:
            return "nothing had been written yet."
        return f"go on with: python scripts/train.py run_dir={shlex.quote(str(self.folder.path))} resume=true"

    # ---------------------------------------------------------------------------------------------------- preparation

    def _load(self) -> None:
        """Reads the model, checks everything against it, and only then creates the folder."""
        start = time.perf_counter()
        if self.session.loaded is None:
            say(f"loading {model_path(self.settings)}")
        teacher = self.session.teacher
        check_against_model(self.settings, teacher.config)
        say(f"  {teacher.source.description}, loaded in {time.perf_counter() - start:.1f} s")
        self.session.data  # noqa: B018 - packs the text; empty data is refused here
        open_teacher_cache(self.session, fill=False)  # a stale one is refused here
        self._evaluator = make_evaluator(self.session)
        self.folder.start(self.settings, self.command)
        if is_first():
            say(self.banner())

    def banner(self) -> str:
        """Returns what will run, on what, and for how many tokens."""
        s, config = self.settings, self.session.config
        dense = cache_bytes(config, dense_specs(config), s.budget.context)
        widths = "/".join(map(str, self.session.budget.bits))
        lines = [
            "",
            f"  recipe      {s.recipe.name}: {' → '.join(s.recipe.stages)} → export",
            f"  model       {s.model.path or s.model.name}: {config.num_layers} layers "
            f"({config.layer_kinds.count('global')} global), D {config.hidden_size}, "
            f"{config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}",
            f"  cache       {dense / 2**20:.1f} MiB a sequence at {s.budget.context:,} tokens → at most "
            f"{dense / s.budget.cache_ratio / 2**20:.1f} MiB (÷{s.budget.cache_ratio:g}, {widths} bits)",
            f"  machine     {self.session.machine.describe()}",
            f"  training    {self._plan()}",
            f"  evaluation  {s.evaluation.tokens:,} held-out tokens at {s.evaluation.context:,}, copy "
            f"{', '.join(map(str, s.evaluation.copy)) or 'none'}, after every stage",
            f"  time        {self._expected_time()}",
            f"  run folder  {self.folder.path}",
            "",
        ]
        return "\n".join(lines)

    def _plan(self) -> str:
        context, batch = self.settings.trainer.context, self.settings.trainer.batch_size
        stages = [
            f"{stage} {getattr(self.settings.recipe, stage).tokens:,} tokens in {self.session.steps(stage)} steps"
            for stage in self.settings.recipe.stages[1:]
        ]
        return f"{'; '.join(stages) or 'none'} (rows of {context} × {batch})"

    def _expected_time(self) -> str:
        """A rough estimate from one measured forward pass of the layers on this machine."""
        session, recipe = self.session, self.settings.recipe
        model = session.teacher
        batch = shortened(collate_rows([session.data.train_dataset[0]]), 1024, session.config.vision)
        batch = {name: tensor.to(session.machine.device) for name, tensor in batch.items()}
        with torch.no_grad(), session.machine.autocast():
            for _ in range(2):  # the first one warms up
                start = time.perf_counter()
                model.run_layers(*model.begin(batch))
                if session.machine.device.type == "cuda":
                    torch.cuda.synchronize()
        per_token = (time.perf_counter() - start) / batch["token_ids"].shape[1]
        body = sum(p.numel() for n, p in model.named_parameters() if n.startswith("layers."))
        head = model.head_weight.numel() / body  # the head's cost beside the layers'
        evaluation = self.settings.evaluation
        measured = evaluation.tokens * (1 + 4 * head) + evaluation.copy_count * sum(
            2 * c + (evaluation.copy_tokens or c) * head for c in evaluation.copy
        )
        layerwise = recipe.layerwise.tokens if "layerwise" in recipe.stages else 0
        distill = recipe.distill.tokens if "distill" in recipe.stages else 0
        work = (
            (1 + len(recipe.stages)) * measured
            + recipe.calibration.tokens * 2
            + 6 * recipe.calibration.sensitivity_tokens
            + 1.3 * layerwise
            + distill * (3.5 + 4 * head / recipe.distill.kl_every)
        )
        minutes = per_token * work / 60
        minutes /= world_size()
        rounded = max(1, round(minutes))
        return f"about {rounded} minute{'s' * (rounded > 1)}, judged by one forward pass"

    # --------------------------------------------------------------------------------------------------------- stages

    def _done(self, name: str) -> bool:
        return any(result.name == name for result in self.results)

    def _measure(self, name: str, student: Any, cost: StageCost) -> None:
        """Evaluates a finished stage and records it; a stage that was recorded before is not measured again."""
        if self._done(name):
            return
        result = self._evaluator.evaluate(student, name, cost.tokens, round(cost.seconds, 2))
        release_memory()
        self.results.append(result)
        costs = self.folder.progress.get("costs", {})
        costs[name] = {
            "tokens": cost.tokens, "seconds": cost.seconds, "tokens_per_second": cost.tokens_per_second,
            "peak_gib": cost.peak_gib,
        }  # fmt: skip
        self.folder.record(stages=[r.to_dict() for r in self.results], costs=costs)
        copies = ", ".join(f"{c}: {a:.3f}" for c, a in result.copy_accuracy.items())
        say(
            f"{name:>10}  perplexity {result.perplexity:.3f} (teacher {result.teacher_perplexity:.3f})  "
            f"KL {result.kl:.4f}  top-1 {result.top1:.4f}" + (f"  copy {copies}" if copies else "")
            + (f"  image tokens: KL {images['kl']:.4f}" if (images := result.image_tokens) else "")
        )

    def _factorize(self) -> None:
        self.student = load_factorized(self.folder, self.session.teacher)
        if self.student is not None:
            cost = StageCost(**self.folder.progress["factorize_cost"])
        else:
            self.student, cost, allocation = self._convert()
            save_factorized(self.folder, self.student, allocation=allocation, factorize_cost=vars(cost))
        say(self._rank_line())
        self._measure("factorized", self.student, cost)

    def _convert(self) -> tuple[Gemma3ForMultimodalLMwithTPA, StageCost, dict[str, float]]:
        """Factorizes; sensitivities are recorded as soon as they are measured, and taken from there after a stop."""
        progress = self.folder.progress
        known = {Probe.parse(text): kl for text, kl in progress.get("sensitivities", {}).items()}
        balances = {int(layer): balance for layer, balance in progress.get("balances", {}).items()}

        def record(measured: Measured) -> None:
            found = {str(probe): kl for probe, kl in measured.sensitivities.items()}
            self.folder.record(sensitivities=found, balances=measured.bases.balances)

        student, cost, measured, allocation = factorize_model(self.session, known, balances, record)
        if self.session.loaded is None:  # no sweep goes on with it, and moments of large models take gigabytes
            self.session.measured = None
        seconds = {"calibration": measured.cost.seconds, "sensitivities": measured.probing_seconds}
        seconds["factorization"] = max(0.0, cost.seconds - sum(seconds.values()))
        earlier = allocation["first"]
        was = f" ({earlier:.4f} before layers were measured)" if earlier > allocation["measured"] else ""
        say(
            f"calibrated in {seconds['calibration']:.0f} s, {len(measured.sensitivities)} sensitivities measured in "
            f"{seconds['sensitivities']:.0f} s, allocated and factorized in {seconds['factorization']:.0f} s; KL on "
            f"the sensitivity text {allocation['measured']:.4f}{was}, expected {allocation['expected']:.4f}"
        )
        return student, cost, allocation | {"seconds": seconds}

    def _rank_line(self) -> str:
        lines = [f"  {i:>3}  {spec.describe()}" for i, spec in enumerate(self.student.specs) if spec.converted]
        return "\n".join(["layers converted (form rank @ bits of its groups)", *lines])

    def _recover(self, stage: str) -> None:
        if load_stage(self.folder, self.student, stage):
            cost = StageCost(**self.folder.progress[f"{stage}_cost"])
        else:
            cost = self._train(stage)
        errors = self.folder.progress.get("layer_errors", {})
        if stage == "layerwise" and "after" not in errors:
            after = measure_layer_errors(self.session, self.student)
            self.folder.record(layer_errors=errors | {"after": list(after.values())})
        self._measure(REPORTED_AS[stage], self.student, cost)

    def _train(self, stage: str) -> StageCost:
        checkpoint = self.folder.checkpoint(stage)
        resumed = checkpoint if self.folder.has(checkpoint) else None
        if stage == "layerwise" and resumed is None:
            before = measure_layer_errors(self.session, self.student)
            self.folder.record(layer_errors={"layers": list(before), "before": list(before.values())})
        if stage == "distill":
            open_teacher_cache(self.session)  # filled here, where a signal may stop it at once
        best = self.folder.best_checkpoint(stage)
        stop = SaveAndStop(checkpoint, self.handler, self.settings.trainer.checkpoint_minutes, best)
        with self.handler.deferred():
            module, cost = recover(
                self.session, self.student, stage, resumed,
                make_loggers(self.settings.logger, self.folder.path / "logs", stage, asdict(self.settings)), [stop],
            )  # fmt: skip
            finished = module.global_step >= self.session.steps(stage)
            spent = self.folder.progress.get(f"{stage}_spent", 0.0) + cost.seconds
            self.folder.record(**{f"{stage}_spent": spent})
            if finished:
                cost = StageCost(cost.tokens, spent, cost.peak_gib)
                self.folder.record(**{f"{stage}_cost": vars(cost)})
                self.folder.save_tensors(REPORTED_AS[stage], module.trained_tensors())
                self.folder.drop_checkpoints(stage)
        return cost

    # ------------------------------------------------------------------------------------------------------------ end

    def _finish(self) -> Path:
        from_first(self._write_results)
        return self.folder.path / "report.md"

    def _write_results(self) -> None:
        """Writes samples, report and export, on the first process alone: the others would do the same again."""
        progress, s = self.folder.progress, self.settings
        if "samples" not in progress and s.evaluation.sample_tokens > 0:
            samples = greedy_samples(
                self.session.teacher, self.student, SAMPLE_PROMPTS, s.evaluation.sample_tokens,
                self.session.machine.autocast, chat=s.data.kind == "chat",
            )  # fmt: skip
            self.folder.record(samples=samples)
        report = make_report(
            self.folder, s, self.session.teacher, self.student, self.results, self.command,
            self.session.machine.describe(),
        )  # fmt: skip
        release_memory()  # the export reads itself back for a check
        export = self.folder.path / "export"
        if not export.exists():
            export_model(
                self.student, export, s.export.dtype, model_card(report), str(model_path(s).resolve()),
                check_ids=check_batch(self.session),
            )  # fmt: skip
        written = write_report(self.folder.path, report)
        say(f"\nreport  {written}\nexport  {export}")


def make_evaluator(session: Session) -> Evaluator:
    """Returns what measures every student of the session alike."""
    s, data = session.settings.evaluation, session.data
    rows = data.heldout_rows(s.tokens, s.context)
    copies = {c: data.copy_texts(c, s.copy_count) for c in s.copy}
    return Evaluator(session.teacher, rows, copies, autocast=session.machine.autocast, max_copy_tokens=s.copy_tokens)


def say(text: str) -> None:
    """Prints, on the first process."""
    if is_first():
        print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``scripts/train.py``; returns the exit status.

    Raises:
        UserError: an option, a file or the model is at fault.
    """
    from tpa_train.recipes import MULTIRUN, compose, help_text

    argv = sys.argv[1:] if argv is None else argv
    if any(a in ("--help", "-h", "help") for a in argv):
        print(help_text())
        return 0
    with one_voice():
        if any(a in MULTIRUN for a in argv):
            from tpa_train.sweep import main as sweep  # it runs what is defined here

            return sweep([a for a in argv if a not in MULTIRUN])
        settings = compose(argv)
        if settings.dry_run:
            from tpa_train.estimate import estimate  # brings the compiler's machinery in

            expected = estimate(settings)
            say(expected.describe())
            return 0 if expected.fits else 1
        if must_launch(settings.trainer):
            return launch([sys.executable, "-c", _PROCESS, *argv], settings.trainer.devices)
        run = None
        try:
            with joined(settings.trainer.accelerator != "cpu" and torch.cuda.is_available()):
                run = Run(settings, "python scripts/train.py " + shlex.join(argv))
                run.execute()
        except Interrupted as stop:
            say(f"\nstopped by {stop}; {run.how_to_go_on()}")
            return stop.status
    return 0


__all__ = ["Run", "main", "UserError"]
