"""``dry_run=true``: what a run will take, before any weight is read and without writing anything.

Parameters and cache bytes are exact; memory is counted on tensors without data (``tpa_train.memory_trace``), in forms
that the budget is likely to choose; time is operations over a measured rate, and rough. With several devices memory is
that of each, tokens are those of all. What is not counted is said (``Estimate.notes``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tpa_train.checkpoints import open_checkpoint
from tpa_train.checkpoints.adapter import adapter_bytes
from tpa_train.checks import check_settings
from tpa_train.distillation.modules import SCOPES
from tpa_train.distributed.launching import resolve_devices
from tpa_train.machine_memory import UNKNOWN, free_bytes, host_memory
from tpa_train.pipeline import check_against_model, model_path
from tpa_train.settings import RunSettings
from tpa_train.stage_costs import StageCosts, StageEstimate, parameters_of
from tpa_train.tpa.spec import cache_bytes, dense_specs
from tpa_train.trainers import Machine, choose_machine

GIB = 2**30
STEP = 128  # tokens; advice is rounded down to multiples of it
SPARE = 0.05  # of the memory: allocators round up and leave gaps


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    model: str
    parameters: int
    dense_cache: int  # bytes of one sequence at budget.context
    target_cache: int
    stages: tuple[StageEstimate, ...]
    memory: int  # bytes that the run may take on each of its devices
    device: str
    assumed: str  # forms
    advice: tuple[str, ...]  # what to lower, and to what; empty if everything fits
    notes: tuple[str, ...] = ()  # what is counted how, or not at all
    devices: int = 1
    host_memory: int = 2**63 - 1

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    @property
    def host(self) -> int:
        return max(stage.host for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak <= usable(self.memory) and self.host <= usable(self.host_memory)

    def describe(self) -> str:
        """Returns what a person reads."""
        lines = [
            f"  model       {self.model}: {self.parameters / 1e6:,.1f}M parameters",
            f"  cache       {self.dense_cache:,} bytes a sequence, to become at most {self.target_cache:,}",
            f"  assumed     {self.assumed}; the budget's own choice is made when layers have been measured",
            f"  device      {self.device}, {self.memory / GIB:.1f} GiB for this run{' on each' * (self.devices > 1)}",
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
        for s in self.stages:
            if s.steps:
                each = f"{s.tokens // s.steps:,} tokens" + f" on {self.devices} devices" * (self.devices > 1)
                lines.append(f"  a step of {s.name}: {each} in about {s.seconds / s.steps:.2g} s; {s.steps:,} steps")
        if self.host:
            lines.append(f"  host memory {self.host / GIB:.2f} GiB of {self.host_memory / GIB:.1f} GiB")
        lines += [f"  {note}" for note in self.notes]
        verdict = "fits" if self.fits else "does not fit"
        total = _duration(sum(s.seconds for s in self.stages))
        where = f"{self.memory / GIB:.1f} GiB{' a device' * (self.devices > 1)}"
        lines += ["", f"  peak {self.peak / GIB:.2f} GiB of {where}: {verdict}; about {total}"]
        return "\n".join([*lines, *(f"  {line}" for line in self.advice)])


def estimate(settings: RunSettings) -> Estimate:
    """Returns what a run with ``settings`` will take; reads configurations and file headers only.

    Raises:
        UserError: the settings or the checkpoint are at fault, as in a real run.
    """
    machine = choose_machine(settings.trainer)
    check_settings(settings)
    resolve_devices(settings.trainer)
    process = process_memory() if machine.device.type == "cpu" else 0  # before the tracer's own libraries are loaded
    path = model_path(settings)
    config = open_checkpoint(path).config
    process = max(process, process_memory()) if process else 0
    check_against_model(settings, config)
    return Estimator(settings, machine, config, process).estimate(path)


def usable(memory: int) -> int:
    return int(memory * (1 - SPARE))


class Estimator(StageCosts):
    """The costs of a run's stages, with what to say of them and what to change where they do not fit."""

    def estimate(self, path: Path) -> Estimate:
        config, context = self.config, self.settings.budget.context
        notes = self._notes()  # a missing adapter is refused here
        stages = self.stages(self.settings)
        parameters = parameters_of(config) + self.vision_bytes // 2
        memory = free_memory(self.machine, self.process)
        if self.on_cpu:
            memory //= self.settings.trainer.devices
        machine = self.machine.describe(self.devices)
        return Estimate(
            path.name, parameters, cache_bytes(config, dense_specs(config), context), self.budget.bytes(config),
            stages, memory, machine, next(s for s in self.specs if s.converted).describe(),
            tuple(line for stage in stages if stage.peak > usable(memory) for line in self.advise(stage, memory)),
            notes, self.devices, host_memory("/proc/meminfo", "MemAvailable") or 2**63 - 1,
        )  # fmt: skip

    def _notes(self) -> tuple[str, ...]:
        """Returns sentences on what the settings ask for that the table cannot show."""
        s, said = self.settings, []
        if self.devices > 1:
            said.append("what devices tell each other takes time that is not counted")
        if self.sharded and "distill" in s.recipe.stages:
            said.append("fsdp2: both models are made whole on every device when distill ends; its peak includes that")
        if s.teacher.cache != "none" and "distill" in s.recipe.stages:
            said.append(
                f"teacher.cache={s.teacher.cache}: at most {self.cached_bytes() / GIB:.2f} GiB on "
                "disk; reading it takes time that is not counted"
            )
        if s.trainer.offload:
            said.append("trainer.offload: copying layers to the device and back takes time that is not counted")
        if s.model.adapter:
            size = adapter_bytes(Path(s.model.adapter)) / GIB
            said.append(f"model.adapter: merged while the model is read, {size:.2f} GiB then; nothing is left of it")
        if self.vision is not None:
            pictures = self._pictures(s.trainer.context)
            said.append(
                f"images: the vision side is counted in 16 bits, and with {pictures} images a row, the most that fit"
                if pictures else "images: none in the data; the vision side's weights are counted in 16 bits"
            )  # fmt: skip
        if s.trainer.compile and not self.on_cpu:
            said.append("trainer.compile: what it saves is an estimate; the minutes of compiling are not counted")
        return tuple(said)

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
                options += self._recomputed(room) + self._smaller_scope(room, alone=not options)
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

    def _recomputed(self, room: int) -> list[str]:
        """Returns activation checkpointing, where it is not on and helps."""
        if self.settings.trainer.activation_checkpointing:
            return []
        trainer = replace(self.settings.trainer, activation_checkpointing=True)
        (stage,) = self.stages(replace(self.settings, trainer=trainer), only="distill")
        fits = stage.peak <= room
        return [f"trainer.activation_checkpointing=true ({stage.peak / GIB:.1f} GiB)"] if fits else []

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
