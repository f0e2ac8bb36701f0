"""From a pretrained model to a converted, recovered one: the steps, each usable on its own.

``Session`` holds what they share (machine, data, settings). ``Run`` in ``tpa_train.launch`` strings them together and
keeps the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpa_train.checkpoints import find_default, load_pretrained
from tpa_train.checks import check_settings
from tpa_train.data.datamodule import PackedDataModule
from tpa_train.distributed.launching import local_rank
from tpa_train.distributed.processes import first_of_node, from_first, merged, send_from_first, share, world_size
from tpa_train.errors import UserError
from tpa_train.factorization.allocation import (
    ALONE,
    AUTO,
    Budget,
    allocate,
    can_be_met,
    corrected,
    joint_groups,
    layer_choices,
    layers_to_convert,
    plan_probes,
    validate_budget,
)
from tpa_train.factorization.calibration import Calibration, CalibrationModule
from tpa_train.factorization.choices import Choice
from tpa_train.factorization.latent import output_metric
from tpa_train.factorization.sensitivity import Probe, layer_kls, measure_sensitivity, output_kl
from tpa_train.factorization.solutions import Bases, build_student
from tpa_train.factorization.streaming import calibrate_streaming
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.settings import RunSettings
from tpa_train.teacher import check_top_k
from tpa_train.texts import data_module, sensitivity_text
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec
from tpa_train.trainers import Machine, choose_machine, make_trainer, release_memory

BALANCES = (0.25, 1.0, 4.0)  # tried for the joint latent, times the ratio of the measured slopes of V and K


@dataclass
class StageCost:
    """What a stage took."""

    tokens: int
    seconds: float
    peak_gib: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Measured:
    """What factorizing rests on: calibrated directions, and measured sensitivities by probe."""

    bases: Bases
    sensitivities: dict[Probe, float]
    cost: StageCost  # of the calibration
    probing_seconds: float = 0.0  # spent on sensitivities


@dataclass(frozen=True)
class Candidate:
    """A student, the choices that its budget was spent on, and the KL that they let expect and the one measured."""

    student: Gemma3ForMultimodalLMwithTPA
    choices: dict[int, list[Choice]]
    expected: float
    measured: float


@dataclass
class Session:
    """Settings, machine, teacher and data of one run.

    Raises:
        UserError: a setting contradicts another or the model, before anything long has begun.
    """

    settings: RunSettings
    folder: Path  # Lightning's scratch root
    loaded: Gemma3ForCausalLM | None = None  # the teacher, where the caller has it already
    measured: Measured | None = None  # from an earlier run with the same model, data and calibration
    machine: Machine = field(init=False)

    def __post_init__(self) -> None:
        self.machine = choose_machine(self.settings.trainer)
        check_settings(self.settings)
        trainer = self.settings.trainer
        if isinstance(trainer.devices, int) and trainer.devices * trainer.num_nodes != world_size():
            raise UserError(
                f"trainer.devices={trainer.devices}: only a single run of scripts/train.py starts a process for each "
                f"device; leave trainer.devices out."
            )

    @cached_property
    def teacher(self) -> Gemma3ForCausalLM:
        model = self.loaded
        if model is None:
            where = "cpu" if self.settings.trainer.offload else self.machine.device
            adapter = self.settings.model.adapter
            model = load_pretrained(model_path(self.settings), self.machine.dtype, adapter, where)
        if isinstance(model, Gemma3ForMultimodalLMwithTPA):  # one not converted, or an export's file as model.path
            model.check_dense()
        if model.tokenizer is None:
            where = model_path(self.settings) if self.loaded is None else "the model"
            raise UserError(f"{where} has no tokenizer; put its tokenizer.model beside the weights.")
        model.requires_grad_(False)
        if not self.settings.trainer.offload:
            return model.to(self.machine.device)
        for part in (model.embed_tokens, model.norm, model.vision):  # the layers are lent to the device as they compute
            if part is not None:
                part.to(self.machine.device)
        return model

    @property
    def config(self) -> Gemma3Config:
        return self.teacher.config

    @property
    def budget(self) -> Budget:
        return budget_of(self.settings, self.config)

    @cached_property
    def data(self) -> PackedDataModule:
        module = data_module(self.settings, self.teacher)
        first_of_node(module.prepare_data, local_rank())
        module.setup()
        return module

    def steps(self, stage: str) -> int:
        """Returns the optimizer steps that the stage's token budget makes (0: the stage is skipped)."""
        return steps_of(self.settings, stage)


def steps_of(settings: RunSettings, stage: str) -> int:
    """Returns the optimizer steps that the token budget of ``stage`` makes."""
    trainer = settings.trainer
    return -(-getattr(settings.recipe, stage).tokens // (trainer.context * trainer.rows_per_step))


def budget_of(settings: RunSettings, config: Gemma3Config) -> Budget:
    """Returns the budget that the settings describe for this model.

    Raises:
        UserError: bits or forms are of another kind than documented.
    """
    b = settings.budget
    bits = [b.bits] if isinstance(b.bits, int) else list(b.bits) if isinstance(b.bits, (list, tuple)) else []
    if not all(isinstance(width, int) for width in bits):
        raise UserError(f"budget.bits={b.bits} must be a width like 8, or a list of them like [16,8,4].")
    forms = b.forms
    if forms == "auto":
        forms = ["joint"] if config.num_kv_heads == 1 else list(AUTO)
    forms = [forms] if isinstance(forms, str) else forms
    if not isinstance(forms, (list, tuple)) or not all(isinstance(form, str) for form in forms):
        raise UserError(f"budget.forms={b.forms} must be auto, a form, or a list of them like [latent,joint].")
    return Budget(b.cache_ratio, b.context, tuple(sorted(set(bits), reverse=True)), b.multiple, tuple(forms))


def model_path(settings: RunSettings) -> Path:
    """Returns the checkpoint that the settings name, finding the packaged model if none is given."""
    return Path(settings.model.path) if settings.model.path else find_default(settings.model.name)


def check_against_model(settings: RunSettings, config: Gemma3Config) -> None:
    """Refuses settings that this model cannot meet.

    Raises:
        UserError: see the message.
    """
    budget = settings.budget
    validate_budget(config, budget_of(settings, config))
    if settings.data.kind == "image_text" and config.vision is None:
        raise UserError("data=image_text needs a multimodal model, but this one is text-only; use data=text.")
    check_top_k(settings, config)
    for option, tokens in (
        ("trainer.context", settings.trainer.context),
        ("evaluation.context", settings.evaluation.context),
        ("budget.context", budget.context),
        ("evaluation.copy", 2 * max(settings.evaluation.copy, default=0) + 1),
    ):
        if tokens > config.max_context:
            raise UserError(
                f"{option} needs {tokens} tokens, but the model's context is {config.max_context}; lower it."
            )


def timed(machine: Machine, work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Returns the result of ``work``, its wall-clock seconds and its peak memory in GiB."""
    machine.reset_peak()
    start = time.perf_counter()
    result = work()
    if machine.device.type == "cuda":
        torch.cuda.synchronize(machine.device)
    seconds, peak = time.perf_counter() - start, machine.peak_gib()
    release_memory()
    return result, seconds, peak


# ------------------------------------------------------------------------------------------------------- factorization


def calibrate(session: Session, layers: list[int]) -> tuple[Calibration, StageCost]:
    """Gathers the moments of ``layers`` in one pass of the Trainer over the calibration rows."""
    if session.settings.trainer.offload:
        batches, seed = session.data.calibration_dataloader(), session.settings.seed

        def stream() -> Calibration:
            return calibrate_streaming(session.teacher, batches, layers, device=session.machine.device, seed=seed)

        calibration, seconds, peak = timed(session.machine, stream)
        return calibration, StageCost(calibration.tokens, seconds, peak)
    module = CalibrationModule(session.teacher, layers, seed=session.settings.seed)
    trainer = make_trainer(session.machine, session.folder)
    loader = session.data.calibration_dataloader()

    def work() -> Calibration:
        trainer.validate(module, loader, verbose=False)
        return module.result

    calibration, seconds, peak = timed(session.machine, work)
    session.teacher.to(session.machine.device)  # Lightning leaves the model on the CPU
    return calibration, StageCost(calibration.tokens, seconds, peak)


def measure(
    session: Session, known: dict[Probe, float], balances: dict[int, float], budget: Budget | None = None
) -> Measured:
    """Calibrates, and measures what the allocation of ``budget`` (the session's) asks for and is not known yet.

    Args:
        session: the run; what ``session.measured`` holds is not done again.
        known: sensitivities measured before.
        balances: λ of the joint latents that ``known`` was measured with, by layer.
    """
    config, budget = session.config, budget or session.budget
    layers = layers_to_convert(config, budget)
    earlier = session.measured
    if earlier is None or not set(layers) <= set(earlier.bases.keys):
        calibration, cost = calibrate(session, layers)
        earlier = Measured(Bases.of(session.teacher, calibration), {}, cost)
    bases, found = earlier.bases, earlier.sensitivities
    if not found:  # measured with these directions, in an interrupted run
        found |= known
        bases.balances |= balances
    text = sensitivity_text(session)

    def probe(probes: list[Probe]) -> dict[Probe, float]:
        with session.machine.autocast():
            return measure_sensitivity(session.teacher, bases, [p for p in probes if p not in found], text)

    start = time.perf_counter()
    plan = plan_probes(config, budget, layers)
    if "joint" in budget.forms:
        quarter = max(1, config.head_dim // 4)
        found |= probe([Probe(layer, kind, "latent", quarter) for layer in layers for kind in "kv"])
        waiting = [i for i in layers if i not in bases.balances]
        bases.balances |= merged({i: choose_balance(session, bases, found, i, quarter, text) for i in share(waiting)})
    found |= probe(plan)
    earlier.probing_seconds += time.perf_counter() - start
    session.measured = earlier
    return earlier


def choose_balance(
    session: Session, bases: Bases, found: dict[Probe, float], layer: int, rank: int, text: Tensor
) -> float:
    """Returns λ of a layer's joint latent: the ratio of the slopes of V and K, measured at latents of ``rank``.

    In global layers, where the bytes are, a few factors around it are measured and the best one is taken.
    """
    slope = {k: max(found[Probe(layer, k, "latent", rank)], 1e-9) / bases.part(layer, k).tail(rank) for k in "kv"}
    if not session.config.is_global(layer):
        return slope["v"] / max(slope["k"], 1e-300)
    joint = Probe(layer, "kv", "joint", max(1, 2 * session.config.num_kv_heads * session.config.head_dim // 8))
    tried = {}
    for factor in BALANCES:
        bases.balances[layer] = slope["v"] / max(slope["k"], 1e-300) * factor
        with session.machine.autocast():
            (kl,) = measure_sensitivity(session.teacher, bases, [joint], text, shared=False).values()
        tried[bases.balances[layer]] = kl
    return min(tried, key=tried.get)


def choose_student(
    session: Session, measured: Measured, budget: Budget | None = None
) -> tuple[Gemma3ForMultimodalLMwithTPA, dict[str, float]]:
    """Spends the byte budget (the session's, where none is given).

    Where several forms compete, the budget is also spent on each alone, and what costs the model's output least on the
    sensitivity text wins: forms are modelled apart, so the model's errors differ between them. Then every layer of the
    winner is measured on its own and the budget is spent once more on what that corrects (``allocation.corrected``);
    the better of the two is returned. Layers that are lent to the device one at a time are not measured.

    Returns:
        The student, whose ``specs`` say what was chosen; the KL that the allocation expects ("expected"), the one
        measured ("measured"), and that of the student before the second spending ("first").
    """
    config, budget, bases = session.config, budget or session.budget, measured.bases
    mixes = [budget.forms]
    if len(budget.forms) > 1:
        alone = [(form,) for form in ALONE if form in budget.forms]
        mixes += [forms for forms in alone if can_be_met(config, replace(budget, forms=forms))]
    layers = layers_to_convert(config, budget)
    text = sensitivity_text(session)

    def better(best: Candidate | None, choices: dict[int, list[Choice]]) -> Candidate:
        specs, expected = allocate(config, budget, choices)
        if best is not None and specs == best.student.specs:  # built and measured already
            return best
        student = build_student(session.teacher, bases, specs)
        with session.machine.autocast():
            found = Candidate(student, choices, expected, output_kl(session.teacher, student, text))
        return found if best is None or found.measured < best.measured else best

    best = None
    for forms in mixes:  # no list of them: a student is memory
        best = better(best, choices_of(session, measured, replace(budget, forms=forms), layers))
    first = best.measured
    if not session.settings.trainer.offload:
        best = better(best, corrected(best.choices, best.student.specs, layer_kls(session.teacher, best.student, text)))
    return best.student, {"expected": best.expected, "measured": best.measured, "first": first}


def choices_of(session: Session, measured: Measured, budget: Budget, layers: list[int]) -> dict[int, list[Choice]]:
    """Returns what ``layers`` can become in the budget's forms (``allocation.layer_choices``)."""
    config, bases, choices = session.config, measured.bases, {}
    for layer in layers:
        attention = session.teacher.layers[layer].self_attn
        joint = joint_groups(budget, bases, attention, layer) if "joint" in budget.forms else None
        rounded = bases.rounding(attention, layer) if "dense" in budget.forms else None
        choices[layer] = layer_choices(config, budget, layer, bases, measured.sensitivities, joint, rounded)
    return choices


def convert(
    session: Session,
    measured: Measured,
    specs: list[LayerSpec],
    student: Gemma3ForMultimodalLMwithTPA | None = None,
) -> Gemma3ForMultimodalLMwithTPA:
    """Returns the student of ``specs``, which shares everything unconverted with the teacher.

    ``student``: of these specifications, where this process has built it already.
    """
    calibration = measured.bases.calibration
    student = student or build_student(session.teacher, measured.bases, specs)
    send_from_first(student_factors(student).values())
    student.output_metrics = {
        i: output_metric(calibration.layers[i], calibration.tokens) for i in student.converted_layers
    }
    send_from_first(student.output_metrics.values())
    return student


def factorize_model(
    session: Session,
    known: dict[Probe, float] | None = None,
    balances: dict[int, float] | None = None,
    on_measured: Callable[[Measured], None] = lambda measured: None,
) -> tuple[Gemma3ForMultimodalLMwithTPA, StageCost, Measured, dict[str, float]]:
    """Calibrates, spends the budget and converts.

    Args:
        session: the run.
        known, balances: measured before, by an interrupted run.
        on_measured: called before anything is solved or converted, to record what was measured.

    Returns:
        The student; tokens and time spent; what was measured; the allocation's KLs (``choose_student``).
    """

    def work() -> tuple:
        measured = measure(session, known or {}, balances or {})
        on_measured(measured)
        chosen: list[Gemma3ForMultimodalLMwithTPA] = []  # on the first process

        def choose() -> tuple[list[LayerSpec], dict[str, float]]:
            student, kls = choose_student(session, measured)
            chosen.append(student)
            return student.specs, kls

        specs, expected = from_first(choose)
        return convert(session, measured, specs, *chosen), measured, expected

    (student, measured, expected), seconds, peak = timed(session.machine, work)
    return student, StageCost(measured.cost.tokens, seconds, max(measured.cost.peak_gib, peak)), measured, expected


def student_factors(student: Gemma3ForMultimodalLMwithTPA) -> dict[str, Tensor]:
    """Returns the parameters that conversion introduced, by name."""
    parameters = dict(student.named_parameters())
    return {name: parameters[name].detach() for name in student.factor_names()}
