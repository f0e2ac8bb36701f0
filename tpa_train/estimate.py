"""``dry_run=true``: what a run will take, before any weight is read and without writing anything.

Parameters and cache bytes are exact; memory is counted on tensors without data (``tpa_train.memory_trace``), in forms
that the budget is likely to choose; time is operations over a measured rate, and rough.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tpa_train.checkpoints import open_checkpoint
from tpa_train.checkpoints.weights import parameter_shapes
from tpa_train.checks import check_settings
from tpa_train.distillation.layerwise import LayerwiseModule
from tpa_train.distillation.modules import SCOPES
from tpa_train.factorization.allocation import Budget, layers_to_convert, plan_probes
from tpa_train.factorization.calibration import LayerMoments
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import MLP, RMSNorm
from tpa_train.machine_memory import UNKNOWN, free_bytes, host_memory
from tpa_train.memory_trace import StageTrace, TracedEndToEnd, TracedModels, tracing
from tpa_train.pipeline import budget_of, check_against_model, model_path, steps_of
from tpa_train.settings import RunSettings
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs
from tpa_train.trainers import Machine, choose_machine

GIB = 2**30
STEP = 128  # tokens; advice is rounded down to multiples of it
SPARE = 0.05  # of the memory: allocators round up and leave gaps
HEAP = 1.35  # resident bytes over live ones for activations on a CPU: gaps in the heap, measured on the 270M
LIKELY_BITS = 4  # below this the allocator seldom goes for most of a layer's numbers
EFFICIENCY = 0.7  # of a feed-forward block's rate that whole models reach: attention and losses are slower


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a run; bytes and seconds. The parts of ``peak`` add up to it."""

    name: str
    trained: int  # parameters
    tokens: int
    process: int  # what Python and its libraries take of the host's memory; 0 on an accelerator
    weights: int  # models, copies that learn, moments of the calibration
    optimizer: int
    activations: int
    logits: int
    seconds: float

    @property
    def peak(self) -> int:
        return self.process + self.weights + self.optimizer + self.activations + self.logits

    def share_within(self, room: int) -> float:
        """Returns the share of its batch's tokens with which the stage takes ``room`` bytes; chunks do not shrink."""
        return (room - self.peak + self.activations) / max(1, self.activations)


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    model: str
    parameters: int
    dense_cache: int  # bytes of one sequence at budget.context
    target_cache: int
    stages: tuple[StageEstimate, ...]
    memory: int  # bytes that the run may take on its device
    device: str
    assumed: str  # forms
    advice: tuple[str, ...]  # what to lower, and to what; empty if everything fits

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak <= usable(self.memory)

    def describe(self) -> str:
        """Returns what a person reads."""
        lines = [
            f"  model       {self.model}: {self.parameters / 1e6:,.1f}M parameters",
            f"  cache       {self.dense_cache:,} bytes a sequence, to become at most {self.target_cache:,}",
            f"  assumed     {self.assumed}; the budget's own choice is made when layers have been measured",
            f"  device      {self.device}, {self.memory / GIB:.1f} GiB for this run",
            "",
            f"  {'stage':<14}{'tokens':>12}{'trained':>10}{'weights':>9}{'optimizer':>11}{'activations':>13}"
            f"{'logits':>8}{'peak':>7} GiB   time (estimate)",
        ]
        for s in self.stages:
            lines.append(
                f"  {s.name:<14}{s.tokens:>12,}{s.trained / 1e6:>9,.1f}M{s.weights / GIB:>9.2f}"
                f"{s.optimizer / GIB:>11.2f}{s.activations / GIB:>13.2f}{s.logits / GIB:>8.2f}{s.peak / GIB:>7.2f}"
                f"       {_duration(s.seconds)}"
            )
        if self.stages[0].process:
            lines.append(f"  (peaks include {self.stages[0].process / GIB:.2f} GiB of Python and its libraries)")
        verdict = "fits" if self.fits else "does not fit"
        total = _duration(sum(s.seconds for s in self.stages))
        lines += ["", f"  peak {self.peak / GIB:.2f} GiB of {self.memory / GIB:.1f} GiB: {verdict}; about {total}"]
        return "\n".join([*lines, *(f"  {line}" for line in self.advice)])


def estimate(settings: RunSettings) -> Estimate:
    """Returns what a run with ``settings`` will take; reads configurations and file headers only.

    Raises:
        UserError: the settings or the checkpoint are at fault, as in a real run.
    """
    machine = choose_machine(settings.trainer)
    check_settings(settings)
    process = process_memory() if machine.device.type == "cpu" else 0  # before the tracer's own libraries are loaded
    path = model_path(settings)
    config = open_checkpoint(path).config
    process = max(process, process_memory()) if process else 0
    check_against_model(settings, config)
    return Estimator(settings, machine, config, process).estimate(path)


def usable(memory: int) -> int:
    return int(memory * (1 - SPARE))


class Estimator:
    """Traces the stages of one run.

    Args:
        settings: of the run.
        machine: where it runs.
        config: of the model.
        process: bytes of host memory that the process takes by itself; 0 on an accelerator.
    """

    def __init__(self, settings: RunSettings, machine: Machine, config: Gemma3Config, process: int) -> None:
        # Images are few among the tokens, and their tower has no part in training: the text side decides.
        self.settings, self.machine, self.process = settings, machine, process
        self.config = replace(config, vision=None)
        self.budget = budget_of(settings, config)
        self.specs = likely_specs(config, self.budget)
        self.rate = block_rate(machine, config) * EFFICIENCY

    def estimate(self, path: Path) -> Estimate:
        config, context = self.config, self.settings.budget.context
        stages = self.stages(self.settings)
        parameters = sum(math.prod(shape) for shape in parameter_shapes(config).values())
        memory = free_memory(self.machine, self.process)
        return Estimate(
            path.name, parameters, cache_bytes(config, dense_specs(config), context), self.budget.bytes(config),
            stages, memory, self.machine.describe(), next(s for s in self.specs if s.converted).describe(),
            tuple(line for stage in stages if stage.peak > usable(memory) for line in self.advise(stage, memory)),
        )  # fmt: skip

    def stages(self, settings: RunSettings, only: str | None = None) -> tuple[StageEstimate, ...]:
        """Traces every stage of ``settings`` that runs, or the one named ``only``."""
        made: dict[str, Callable[[TracedModels], StageEstimate]] = {
            "calibration": self._calibration, "sensitivities": self._sensitivities,
        }  # fmt: skip
        for name, stage in (("layerwise", self._layerwise), ("distill", self._distill)):
            if name in settings.recipe.stages and getattr(settings.recipe, name).tokens > 0:
                made[name] = stage
        made["evaluation"] = self._evaluation
        found, before = [], self.settings
        self.settings = settings
        for name, stage in made.items():
            if only in (None, name):
                with tracing() as live:
                    models = TracedModels(
                        self.config, self.specs, self.machine.dtype, self.machine.device, live, self.machine.autocast
                    )
                    found.append(stage(models))
                    del models
        self.settings = before
        return tuple(found)

    def _made(self, name: str, trace: StageTrace, tokens: int, flops: float) -> StageEstimate:
        activations = round(trace.activations * (HEAP if self.machine.device.type == "cpu" else 1))
        return StageEstimate(
            name, trace.trained, tokens, self.process, trace.weights, trace.optimizer, activations, trace.logits,
            flops / self.rate,
        )  # fmt: skip

    def _calibration(self, models: TracedModels) -> StageEstimate:
        t, tokens = self.settings.trainer, self.settings.recipe.calibration.tokens
        rows = -(-tokens // t.context)
        trace = models.calibration(layers_to_convert(self.config, self.budget), min(rows, t.batch_size), t.context)
        return self._made("calibration", trace, rows * t.context, trace.flops * rows / min(rows, t.batch_size))

    def _sensitivities(self, models: TracedModels) -> StageEstimate:
        """By formula: the residual stream behind every layer, and the logits that all probes are compared with."""
        tokens, c = self.settings.recipe.calibration.sensitivity_tokens, self.config
        layers = layers_to_convert(c, self.budget)
        trace = models.evaluation(1, tokens, 1)
        scored = max(1, tokens // 4)
        chunk = min(scored * c.vocab_size * 4, 2**30 if self.machine.device.type == "cuda" else 2**27)
        kept = (c.num_layers + 1) * tokens * c.hidden_size * 4
        probes = len(plan_probes(c, self.budget, layers))
        if "joint" in self.budget.forms:  # their balance is measured first
            probes += 2 * len(layers) + 3 * sum(c.is_global(i) for i in layers)
        logits = scored * c.vocab_size * 4 + 4 * chunk
        if self.machine.device.type == "cpu":  # moments, bases and the problems of joint latents, in float64
            kept += 3 * moment_bytes(c) * len(layers)
        forward = trace.flops / 2 + 2 * scored * c.vocab_size * c.hidden_size  # the layers above the probed one
        return StageEstimate(
            "sensitivities", 0, tokens, self.process, trace.weights, 0, kept + trace.activations, logits,
            probes * forward / self.rate,
        )  # fmt: skip

    def _layerwise(self, models: TracedModels) -> StageEstimate:
        errors = dict.fromkeys(range(self.config.num_layers), 1.0)
        settings = self.settings.recipe.layerwise
        return self._recovery(models, "layerwise", lambda s: LayerwiseModule(models.teacher, s, settings, 1, errors))

    def _distill(self, models: TracedModels) -> StageEstimate:
        d = self.settings.recipe.distill
        return self._recovery(
            models, "distill",
            lambda s: TracedEndToEnd(
                models.teacher, s, d, d.scope, 1, hidden_weight=d.hidden_weight, hidden_until=d.hidden_until,
                kl_every=d.kl_every,
            ),
        )  # fmt: skip

    def _recovery(self, models: TracedModels, name: str, make: Callable) -> StageEstimate:
        t = self.settings.trainer
        trace = models.training(make, t.batch_size, t.context, t.accumulate)
        batches = steps_of(self.settings, name) * t.accumulate
        return self._made(name, trace, batches * t.batch_size * t.context, trace.flops * batches)

    def _evaluation(self, models: TracedModels) -> StageEstimate:
        """The longest text decides over the memory: a row, or a copy text."""
        e, c = self.settings.evaluation, self.config
        longest = max(e.context, 2 * max(e.copy, default=0) + 1)
        trace = models.evaluation(1, longest, min(longest, 4096))
        rows = max(1, e.tokens // e.context) * e.context
        copies = e.copy_count * sum(2 * d + 1 for d in e.copy)
        scored = 2 * rows + e.copy_count * sum(min(d, e.copy_tokens or d) for d in e.copy)
        body = 2 * (trace.flops / longest / 2)  # one forward of the student, and one of the teacher at the first time
        head = 2 * c.vocab_size * c.hidden_size
        runs = 1 + sum(s in self.settings.recipe.stages for s in ("factorize", "layerwise", "distill"))
        return self._made("evaluation", trace, runs * (rows + copies), runs * ((rows + copies) * body + scored * head))

    # --------------------------------------------------------------------------------------------------------- advice

    def advise(self, stage: StageEstimate, memory: int) -> list[str]:
        """Returns sentences on what lets ``stage`` fit into ``memory``, and to what."""
        room, e = usable(memory), self.settings.evaluation
        options: list[str] = []
        if stage.name == "sensitivities":
            per_token = (stage.activations + stage.logits) / stage.tokens
            tokens = int((room - stage.process - stage.weights) / per_token) // STEP * STEP
            options += [f"recipe.calibration.sensitivity_tokens={tokens}"] * (tokens >= STEP)
        elif stage.name == "evaluation":
            longest = max(e.context, 2 * max(e.copy, default=0) + 1)
            tokens = int(longest * stage.share_within(room)) // STEP * STEP
            if tokens >= STEP:
                options = [f"evaluation.context={min(e.context, tokens)}"]
                options[0] += f" and evaluation.copy to distances below {tokens // 2}" * (longest > tokens)
        else:
            options = self._smaller_batches(stage, room)
            if stage.name == "distill":
                options += self._smaller_scope(room, alone=not options)
        fixed = (stage.peak - stage.activations) / GIB
        needs = f"{stage.name} needs {stage.peak / GIB:.1f} GiB, {room / GIB:.1f} GiB are usable"
        if options:
            return [f"{needs}: set {', or '.join(options)}"]
        return [
            f"{needs}, and {fixed:.1f} GiB do not shrink with the batch: take a larger device or a smaller model"
            + ", or trainer.precision=bf16" * (self.machine.dtype == torch.float32)
        ]

    def _smaller_batches(self, stage: StageEstimate, room: int) -> list[str]:
        """Returns the largest batch and the longest rows with which ``stage`` fits."""
        t, share = self.settings.trainer, stage.share_within(room)
        rows, tokens = int(t.batch_size * share), int(t.context * t.batch_size * share) // STEP * STEP
        if rows >= 1:
            kept = math.ceil(t.accumulate * t.batch_size / rows)
            shorter = int(t.context * share) // STEP * STEP
            return [
                f"trainer.batch_size={rows} (trainer.accumulate={kept} keeps the step's size)",
                *[f"trainer.context={shorter}"] * (shorter >= STEP),
            ]
        one_row = "trainer.batch_size=1 and " * (t.batch_size > 1)
        return [f"{one_row}trainer.context={tokens}"] if tokens >= STEP else []

    def _smaller_scope(self, room: int, alone: bool) -> list[str]:
        """Returns the largest smaller ``recipe.distill.scope`` that fits, with a smaller batch if nothing else does."""
        now = SCOPES.index(self.settings.recipe.distill.scope)
        for scope in reversed(SCOPES[:now]):
            distill = replace(self.settings.recipe.distill, scope=scope)
            settings = replace(self.settings, recipe=replace(self.settings.recipe, distill=distill))
            (stage,) = self.stages(settings, only="distill")
            if stage.peak <= room:
                return [f"recipe.distill.scope={scope} ({stage.peak / GIB:.1f} GiB)"]
            if alone and (batches := self._smaller_batches(stage, room)):
                return [f"recipe.distill.scope={scope} with {batches[0]}"]
        return []


def moment_bytes(config: Gemma3Config) -> int:
    """Returns the bytes of one layer's moments."""
    return sum(t.numel() * t.element_size() for t in LayerMoments.zeros(config, "meta").tensors().values())


def likely_specs(config: Gemma3Config, budget: Budget) -> list[LayerSpec]:
    """Returns uniform forms that spend the budget: the allowed width nearest to ``LIKELY_BITS``, the largest rank."""
    layers = layers_to_convert(config, budget)
    likely = min(budget.bits, key=lambda width: (abs(width - LIKELY_BITS), width))
    form = "latent" if "latent" in budget.forms else "joint"
    widest = config.head_dim if form == "latent" else 2 * config.num_kv_heads * config.head_dim
    for bits in sorted({likely, min(budget.bits)}, reverse=True):
        for rank in range(widest // budget.multiple * budget.multiple, 0, -budget.multiple):
            specs = dense_specs(config)
            for layer in layers:
                specs[layer] = LayerSpec(form, rank, form, rank, bits)
            if cache_bytes(config, specs, budget.context) <= budget.bytes(config):
                return specs
    return specs  # the smallest rank; mixed widths will have to do better


def block_rate(machine: Machine, config: Gemma3Config) -> float:
    """Returns the operations a second of one feed-forward block with its norm on this device (a median of five)."""
    tokens = 1024 if machine.device.type == "cpu" else 8192
    with torch.random.fork_rng(devices=[]), torch.device(machine.device), torch.no_grad(), machine.autocast():
        block = torch.nn.Sequential(RMSNorm(config.hidden_size, config.rms_norm_eps), MLP(config)).to(machine.dtype)
        x, taken = torch.ones(tokens, config.hidden_size), []
        for _ in range(6):  # the first one warms up
            start = time.perf_counter()
            block(x)
            if machine.device.type == "cuda":
                torch.cuda.synchronize(machine.device)
            taken.append(time.perf_counter() - start)
    return 2 * tokens * 3 * config.hidden_size * config.intermediate_size / statistics.median(taken[1:])


def process_memory() -> int:
    """Returns the resident bytes of this process; 0 where the system does not say."""
    return host_memory("/proc/self/status", "VmRSS") or 0


def free_memory(machine: Machine, process: int) -> int:
    """Returns the bytes that a run may take: free ones, and what this process has of them already."""
    if machine.device.type == "cuda":
        return torch.cuda.mem_get_info(machine.device)[0] + torch.cuda.memory_reserved(machine.device)
    return min(free_bytes(machine.device) + process, UNKNOWN)


def _duration(seconds: float) -> str:
    for unit, size, limit in (("s", 1, 90), ("min", 60, 5400)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
