"""From a pretrained model to a converted, recovered one: the steps, each usable on its own.

``Session`` holds what they share (machine, data, settings). ``run`` in ``tpa_train.launch`` strings them together and
keeps the run folder.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tpa_train.checkpoints import find_default, load_pretrained
from tpa_train.data.datamodule import PackedDataModule
from tpa_train.distillation.modules import SCOPES, EndToEndModule, LayerwiseModule, RecoveryModule, layer_errors
from tpa_train.errors import UserError, nearest
from tpa_train.factorization.allocation import Budget, allocate, layers_to_convert, validate_budget
from tpa_train.factorization.calibration import Calibration, CalibrationModule
from tpa_train.factorization.latent import key_basis, output_metric, value_basis
from tpa_train.factorization.sensitivity import Bases, build_student, measure_sensitivity
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.settings import RunSettings
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, set_parameter
from tpa_train.tpa.spec import LayerSpec
from tpa_train.trainers import Machine, check_logger, choose_machine, make_trainer, seeded

STAGES = ("factorize", "layerwise", "distill")
PROBE_SHARE = 4  # sensitivities are measured at rank head_dim / 4, near what budgets end up with


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
class Session:
    """Settings, machine, teacher and data of one run.

    Raises:
        UserError: a setting contradicts another or the model, before anything long has begun.
    """

    settings: RunSettings
    folder: Path  # Lightning's scratch root
    loaded: Gemma3ForCausalLM | None = None  # the teacher, where the caller has it already
    machine: Machine = field(init=False)

    def __post_init__(self) -> None:
        self.machine = choose_machine(self.settings.trainer)
        check_settings(self.settings)

    @cached_property
    def teacher(self) -> Gemma3ForCausalLM:
        model = self.loaded
        if model is None:
            model = load_pretrained(model_path(self.settings), dtype=self.machine.dtype)
        if model.tokenizer is None:
            where = model_path(self.settings) if self.loaded is None else "the model"
            raise UserError(f"{where} has no tokenizer; put its tokenizer.model beside the weights.")
        return model.requires_grad_(False).to(self.machine.device)

    @property
    def config(self) -> Gemma3Config:
        return self.teacher.config

    @property
    def budget(self) -> Budget:
        b = self.settings.budget
        return Budget(b.cache_ratio, b.context, b.bits, b.multiple)

    @cached_property
    def data(self) -> PackedDataModule:
        trainer, calibration = self.settings.trainer, self.settings.recipe.calibration
        module = PackedDataModule(
            self.settings.data,
            self.teacher.tokenizer,
            trainer.context,
            trainer.batch_size,
            stage_rows={"calibration": max(1, -(-calibration.tokens // trainer.context))},
        )
        module.prepare_data()
        module.setup()
        return module

    def steps(self, stage: str) -> int:
        """Returns the optimizer steps that the stage's token budget makes (0: the stage is skipped)."""
        trainer = self.settings.trainer
        devices = trainer.devices if isinstance(trainer.devices, int) else 1
        per_step = trainer.context * trainer.batch_size * trainer.accumulate * devices * trainer.num_nodes
        return -(-getattr(self.settings.recipe, stage).tokens // per_step)


def model_path(settings: RunSettings) -> Path:
    """Returns the checkpoint that the settings name, finding the packaged model if none is given."""
    return Path(settings.model.path) if settings.model.path else find_default(settings.model.name)


def check_settings(settings: RunSettings) -> None:
    """Refuses what cannot work, naming the option.

    Raises:
        UserError: see the message.
    """
    recipe, trainer = settings.recipe, settings.trainer
    check_logger(settings.logger)
    for stage in recipe.stages:
        if stage not in STAGES:
            raise UserError(f"recipe.stages: '{stage}' is no stage{nearest(stage, STAGES)}")
    if not recipe.stages or recipe.stages[0] != "factorize":
        raise UserError("recipe.stages must begin with factorize: there is nothing to recover before it.")
    if recipe.distill.scope not in SCOPES:
        scope = recipe.distill.scope
        raise UserError(f"recipe.distill.scope={scope} is unknown{nearest(scope, SCOPES)}")
    if settings.export.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(
            f"export.dtype={settings.export.dtype} is unknown"
            f"{nearest(settings.export.dtype, ('auto', 'float32', 'bfloat16'))}"
        )
    positive = {
        "trainer.context": trainer.context, "trainer.batch_size": trainer.batch_size,
        "trainer.accumulate": trainer.accumulate, "recipe.calibration.tokens": recipe.calibration.tokens,
        "recipe.calibration.sensitivity_tokens": recipe.calibration.sensitivity_tokens,
        "recipe.distill.kl_every": recipe.distill.kl_every, "evaluation.tokens": settings.evaluation.tokens,
        "evaluation.context": settings.evaluation.context,
    }  # fmt: skip
    for option, value in positive.items():
        if value < 1:
            raise UserError(f"{option}={value} must be at least 1.")


def check_against_model(settings: RunSettings, config: Gemma3Config) -> None:
    """Refuses settings that this model cannot meet.

    Raises:
        UserError: see the message.
    """
    budget = settings.budget
    validate_budget(config, Budget(budget.cache_ratio, budget.context, budget.bits, budget.multiple))
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
    return result, time.perf_counter() - start, machine.peak_gib()


# ------------------------------------------------------------------------------------------------------- factorization


def calibrate(session: Session, layers: list[int]) -> tuple[Calibration, StageCost]:
    """Gathers the moments of ``layers`` in one pass of the Trainer over the calibration rows."""
    module = CalibrationModule(session.teacher, layers, seed=session.settings.seed)
    trainer = make_trainer(session.machine, session.folder)
    loader = session.data.calibration_dataloader()

    def work() -> Calibration:
        trainer.validate(module, loader, verbose=False)
        return module.result

    calibration, seconds, peak = timed(session.machine, work)
    session.teacher.to(session.machine.device)  # Lightning leaves the model on the CPU
    return calibration, StageCost(calibration.tokens, seconds, peak)


def bases_of(session: Session, calibration: Calibration) -> Bases:
    """Solves for the directions of every calibrated layer's keys and values."""
    layers = session.teacher.layers
    return Bases(
        {i: key_basis(m, calibration.tokens) for i, m in calibration.layers.items()},
        {i: value_basis(layers[i].self_attn, m) for i, m in calibration.layers.items()},
    )


def choose_ranks(session: Session, bases: Bases) -> tuple[list[LayerSpec], dict[str, float]]:
    """Measures sensitivities and spends the byte budget; returns the specifications and the measured KLs."""
    layers = sorted(bases.keys)
    config, budget = session.config, session.budget
    rank = max(budget.multiple, config.head_dim // PROBE_SHARE)
    rows = session.data.rows_of("calibration")
    count = max(1, session.settings.recipe.calibration.sensitivity_tokens // session.data.context)
    dataset = session.data.train_dataset
    token_ids = torch.stack([dataset[int(i)]["token_ids"] for i in rows[:count]]).to(session.machine.device)
    parts = [(layer, kind) for layer in layers for kind in "kv"]
    with session.machine.autocast():
        measured = measure_sensitivity(session.teacher, bases, parts, rank, token_ids)
    specs = allocate(config, budget, layers, bases, measured, rank)
    return specs, {f"{layer}.{kind}": kl for (layer, kind), kl in measured.items()}


def factorize_model(session: Session) -> tuple[Gemma3ForMultimodalLMwithTPA, StageCost, dict[str, float]]:
    """Calibrates, chooses ranks and converts.

    Returns:
        The student, which shares everything unconverted with the teacher; tokens and time spent; measured KL of each
        part truncated alone, by "layer.k" or "layer.v".
    """
    calibration, cost = calibrate(session, layers_to_convert(session.config, session.budget))

    def work() -> tuple:
        bases = bases_of(session, calibration)
        specs, measured = choose_ranks(session, bases)
        student = build_student(session.teacher, bases, specs)
        student.output_metrics = {
            i: output_metric(calibration.layers[i], calibration.tokens) for i in student.converted_layers
        }
        return student, measured

    (student, measured), seconds, peak = timed(session.machine, work)
    return student, StageCost(cost.tokens, cost.seconds + seconds, max(cost.peak_gib, peak)), measured


# ------------------------------------------------------------------------------------------------------------ recovery


def measure_layer_errors(session: Session, student: Gemma3ForMultimodalLMwithTPA) -> dict[int, float]:
    """Returns each converted attention's output error on held-out rows (``distillation.modules.layer_errors``)."""
    rows = session.data.heldout_rows(2 * session.data.context)
    keys = ("token_ids", "document_ids")
    batch = {k: torch.stack([rows[i][k] for i in range(len(rows))]).to(session.machine.device) for k in keys}
    with torch.no_grad(), session.machine.autocast():
        return {i: float(error) for i, error in layer_errors(session.teacher, student, batch).items()}


def recovery_module(session: Session, student: Gemma3ForMultimodalLMwithTPA, stage: str) -> RecoveryModule:
    """Returns the LightningModule of ``stage`` ("layerwise" or "distill") around ``student``."""
    recipe, steps = session.settings.recipe, session.steps(stage)
    if stage == "layerwise":
        errors = measure_layer_errors(session, student)
        return LayerwiseModule(session.teacher, student, recipe.layerwise, steps, errors)
    distill = recipe.distill
    return EndToEndModule(
        session.teacher, student, distill, distill.scope, steps,
        hidden_weight=distill.hidden_weight, hidden_until=distill.hidden_until, kl_every=distill.kl_every,
    )  # fmt: skip


def recover(
    session: Session,
    student: Gemma3ForMultimodalLMwithTPA,
    stage: str,
    checkpoint: Path | None = None,
    loggers: list | None = None,
    callbacks: list[L.Callback] | None = None,
) -> tuple[RecoveryModule, StageCost]:
    """Trains ``student`` in place through one recovery stage.

    Args:
        session: the run.
        student: the converted model.
        stage: "layerwise" or "distill".
        checkpoint: of this stage, to go on from.
        loggers, callbacks: for the Trainer.

    Raises:
        UserError: the checkpoint belongs to another stage, model or data order.
    """
    with seeded(session.settings.seed):
        module = recovery_module(session, student, stage)
        if session.settings.trainer.compile:
            compile_layers(session.teacher, module)
        trainer = make_trainer(session.machine, session.folder, session.steps(stage), loggers, callbacks)
        session.data.stage = stage
        session.data.trainer = None

        if checkpoint is not None:
            check_readable(checkpoint)

        def work() -> None:
            trainer.fit(module, datamodule=session.data, ckpt_path=checkpoint, weights_only=True)

        _, seconds, peak = timed(session.machine, work)
    module.to(session.machine.device)
    student.requires_grad_(False)
    tokens = module.global_step * session.data.context * session.data.batch_size * trainer.accumulate_grad_batches
    return module, StageCost(tokens * trainer.world_size, seconds, peak)


def check_readable(checkpoint: Path) -> None:
    """Raises UserError if a training checkpoint is damaged; Lightning would say so in a page of traceback."""
    try:
        torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True)
    except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{checkpoint} is damaged ({str(error).splitlines()[0]}); delete it to redo that stage."
        ) from error


def compile_layers(teacher: Gemma3ForCausalLM, module: RecoveryModule) -> None:
    """Compiles the decoder layers in place: they share one graph per kind, and hooks stay outside of it."""
    for model in (teacher, module.student):
        for layer in model.layers:
            layer.compile(dynamic=False)


def load_trained(student: Gemma3ForMultimodalLMwithTPA, tensors: dict[str, Tensor]) -> None:
    """Puts what a finished stage trained back into ``student``.

    Raises:
        UserError: the tensors belong to another model.
    """
    shapes = {name: p.shape for name, p in student.named_parameters()}
    for name, tensor in tensors.items():
        if shapes.get(name) != tensor.shape:
            raise UserError(f"the run folder's state holds '{name}', which does not fit this model; start a new run.")
        set_parameter(student, name, nn.Parameter(tensor, requires_grad=False))


def student_factors(student: Gemma3ForMultimodalLMwithTPA) -> dict[str, Tensor]:
    """Returns the parameters that conversion introduced, by name."""
    parameters = dict(student.named_parameters())
    return {name: parameters[name].detach() for name in student.factor_names()}

