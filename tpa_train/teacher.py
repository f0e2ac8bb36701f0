"""The teacher cache of a run: what its settings must agree with, and opening it filled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tpa_train.distillation.teacher_cache import DTYPES, MODES, TeacherCache, weights_fingerprint
from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.settings import RunSettings

if TYPE_CHECKING:
    from tpa_train.pipeline import Session


def check_teacher_cache(settings: RunSettings) -> None:
    """Refuses settings of the teacher cache that are unknown or contradict others; raises UserError."""
    teacher, distill = settings.teacher, settings.recipe.distill
    for option, value, valid in (("cache", teacher.cache, MODES), ("dtype", teacher.dtype, DTYPES)):
        if value not in valid:
            raise UserError(f"teacher.{option}={value} is unknown{nearest(value, valid)}")
    if teacher.cache == "none":
        return
    if settings.data.kind == "image_text":
        raise UserError(f"teacher.cache={teacher.cache} holds text only; with data=image_text set teacher.cache=none.")
    if distill.hidden_weight > 0:
        raise UserError(
            f"teacher.cache={teacher.cache} trains without the teacher's forward pass, with whose layers "
            f"recipe.distill.hidden_weight={distill.hidden_weight:g} compares; set recipe.distill.hidden_weight=0 or "
            "teacher.cache=none."
        )
    if settings.trainer.devices != 1 or settings.trainer.num_nodes != 1:
        raise UserError(f"teacher.cache={teacher.cache} is filled by one process: set trainer.devices=1.")
    other = distill.divergence != "forward_kl" or distill.temperature != 1 or distill.ce_weight > 0
    if teacher.cache == "topk" and other:
        raise UserError(
            "teacher.cache=topk knows the forward KL at temperature 1 only; leave recipe.distill.divergence, "
            "temperature and ce_weight alone, or set teacher.cache=hidden."
        )
    if teacher.cache == "topk" and teacher.top_k < 1:
        raise UserError(f"teacher.top_k={teacher.top_k} must be at least 1.")


def check_top_k(settings: RunSettings, config: Gemma3Config) -> None:
    """Raises UserError if more classes are asked for than the vocabulary has."""
    if settings.teacher.cache == "topk" and settings.teacher.top_k > config.vocab_size:
        raise UserError(f"teacher.top_k={settings.teacher.top_k} exceeds the vocabulary of {config.vocab_size} tokens.")


def open_teacher_cache(session: Session, fill: bool = True) -> TeacherCache | None:
    """Returns the teacher cache with every row that the end-to-end stage will read, filled here where rows are missing.

    Args:
        session: the run.
        fill: False only checks that a cache that is there is this run's.

    Raises:
        UserError: the folder holds a cache of another teacher, text or setting, or a damaged one.
    """
    settings, data, machine = session.settings.teacher, session.data, session.machine
    if settings.cache == "none":
        return None
    folder = Path(settings.folder) if settings.folder else session.folder.parent / "teacher_cache"
    # The loss starts from the small difference of both models' hidden states: rounded ones would spoil it.
    dtype = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    identity = {
        "teacher": weights_fingerprint(session.teacher), "precision": str(machine.dtype).removeprefix("torch."),
        "tokenizer": session.teacher.tokenizer.fingerprint, "data": data.train_dataset.stream.manifest.fingerprint,
        "join_documents": data.settings.join_documents, "context": data.context,
    }  # fmt: skip
    cache = TeacherCache(folder, settings.cache, dtype, identity, settings.top_k)
    if not fill:
        return cache
    batches = session.steps("distill") * session.settings.trainer.accumulate
    rows = data.rows_in_order("distill", batches * data.batch_size)
    cache.fill(session.teacher, data.train_dataset, rows, data.batch_size, machine.autocast)
    return cache
