"""Recovering a converted student: which module trains it in a stage, and the stage itself.

``tpa_train.pipeline`` has the steps before this one.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from tpa_train.compilation import stage_forwards, worth_compiling
from tpa_train.distillation.divergence import Divergence
from tpa_train.distillation.end_to_end import EndToEndModule
from tpa_train.distillation.layerwise import LayerwiseModule, layer_errors
from tpa_train.distillation.modules import RecoveryModule
from tpa_train.distributed.processes import from_first
from tpa_train.distributed.sharding import gather_models
from tpa_train.errors import UserError
from tpa_train.factorization.sensitivity import output_kl
from tpa_train.pipeline import Session, StageCost, timed
from tpa_train.teacher import open_teacher_cache
from tpa_train.texts import heldout_batch
from tpa_train.throughput import Throughput
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, set_parameter
from tpa_train.trainers import make_trainer, seeded


def measure_layer_errors(session: Session, student: Gemma3ForMultimodalLMwithTPA) -> dict[int, float]:
    """Returns each converted attention's output error on held-out rows (``distillation.layerwise.layer_errors``)."""
    batch = heldout_batch(session)
    with torch.no_grad(), session.machine.autocast():
        return {i: float(error) for i, error in layer_errors(session.teacher, student, batch).items()}


def recovery_module(session: Session, student: Gemma3ForMultimodalLMwithTPA, stage: str) -> RecoveryModule:
    """Returns the LightningModule of ``stage`` ("layerwise" or "distill") around ``student``."""
    recipe, steps = session.settings.recipe, session.steps(stage)
    if stage == "layerwise":
        errors = from_first(lambda: measure_layer_errors(session, student))
        return LayerwiseModule(session.teacher, student, recipe.layerwise, steps, errors)
    distill = recipe.distill
    batch = {k: t for k, t in heldout_batch(session).items() if k != "document_ids"}
    with session.machine.autocast():
        initial_kl = from_first(lambda: output_kl(session.teacher, student, batch))
    return EndToEndModule(
        session.teacher, student, distill, distill.scope, steps,
        hidden_weight=distill.hidden_weight, hidden_until=distill.hidden_until, kl_every=distill.kl_every,
        initial_kl=initial_kl, divergence=Divergence.of(distill), ema=distill.ema, cache=open_teacher_cache(session),
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
        callbacks = [Throughput(session.machine), *(callbacks or [])]
        # Layer by layer only factors learn, and attention runs outside of its layer: nothing to gain from shards.
        sharded = session.machine.strategy == "fsdp2" and stage == "distill"
        trainer = make_trainer(session.machine, session.folder, session.steps(stage), loggers, callbacks, sharded)
        session.data.stage = stage
        session.data.trainer = None
        session.data.start_at(0)

        if checkpoint is not None:
            check_readable(checkpoint)

        def work() -> None:
            # Where documents begin is a tensor of one of a few sizes (``document_offsets``); images come in any number.
            alike = session.settings.data.kind != "image_text"
            options = session.settings.trainer
            options = replace(options, compile=worth_compiling(options, session.steps(stage)))
            with stage_forwards(module, options, sharded, session.machine.device, alike):
                trainer.fit(module, datamodule=session.data, ckpt_path=checkpoint, weights_only=True)

        _, seconds, peak = timed(session.machine, work)
    if sharded:
        gather_models(session.teacher, student)
    module.to(session.machine.device)
    module.finish()
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
