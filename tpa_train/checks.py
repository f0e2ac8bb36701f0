"""What a run's settings must meet before anything is loaded."""

from __future__ import annotations

import math

from tpa_train.data.settings import KINDS, TRAIN_ON
from tpa_train.distillation.divergence import Divergence
from tpa_train.distillation.modules import SCOPES, OptimizerSettings
from tpa_train.errors import UserError, nearest
from tpa_train.settings import RunSettings
from tpa_train.teacher import check_teacher_cache
from tpa_train.trainers import check_logger

STAGES = ("factorize", "layerwise", "distill")


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
    if list(recipe.stages) != [stage for stage in STAGES if stage in recipe.stages]:
        raise UserError(f"recipe.stages must name each stage once, in the order {', '.join(STAGES)}.")
    for name in ("layerwise", "distill"):
        _check_optimizer(f"recipe.{name}", getattr(recipe, name))
    _check_data(settings)
    if trainer.offload and (recipe.stages != ["factorize"] or trainer.devices != 1 or trainer.num_nodes != 1):
        raise UserError("trainer.offload=true is for recipe=factorize on one device: training needs the layers there.")
    if recipe.distill.scope not in SCOPES:
        scope = recipe.distill.scope
        raise UserError(f"recipe.distill.scope={scope} is unknown{nearest(scope, SCOPES)}")
    if not 0 <= recipe.distill.ema < 1:
        raise UserError(f"recipe.distill.ema={recipe.distill.ema:g} must be at least 0 (no average) and below 1.")
    try:
        Divergence.of(recipe.distill)
    except UserError as error:
        raise UserError(f"recipe.distill.{error}") from error
    check_teacher_cache(settings)
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



def _check_optimizer(name: str, settings: OptimizerSettings) -> None:
    """Raises UserError for rates that no training survives."""
    betas = list(settings.betas)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"{name}.betas={betas} must be two numbers from 0 to below 1.")
    for option in ("lr_factors", "lr_original", "warmup", "final_lr"):
        value = getattr(settings, option)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name}.{option}={value:g} must be at least 0.")
    if not settings.clip > 0:
        raise UserError(f"{name}.clip={settings.clip:g} must be above 0; a large number clips nothing.")


def _check_data(settings: RunSettings) -> None:
    """Raises UserError for data options that are unknown, out of range, or contradict each other."""
    data = settings.data
    for option, value, valid in (("kind", data.kind, KINDS), ("train_on", data.train_on, TRAIN_ON)):
        if value not in valid:
            raise UserError(f"data.{option}={value} is unknown{nearest(value, valid)}")
    if data.num_workers < 0:
        raise UserError(f"data.num_workers={data.num_workers} must be at least 0.")
    if not 0 <= data.copy_share <= 1:
        raise UserError(f"data.copy_share={data.copy_share:g} must lie between 0 (none) and 1 (every row).")
    if data.copy_share > 0 and data.kind in ("chat", "image_text"):
        raise UserError(f"data.copy_share repeats plain text; leave it out with data={data.kind}.")
    if data.copy_share > 0 and settings.teacher.cache != "none":
        raise UserError("teacher.cache holds the text as it is; set data.copy_share=0 or teacher.cache=none.")
