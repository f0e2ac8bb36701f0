"""What a session reads: the rows of its stages, and the few batches that measurements and checks are made on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tpa_train.data.datamodule import PackedDataModule
from tpa_train.data.image_text import ImageTextDataModule
from tpa_train.data.rows import collate_rows, shortened
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.settings import RunSettings

if TYPE_CHECKING:
    from tpa_train.pipeline import Session


def data_module(settings: RunSettings, teacher: Gemma3ForCausalLM) -> PackedDataModule:
    """Returns what serves the rows that ``settings.data`` names to the stages."""
    trainer, calibration = settings.trainer, settings.recipe.calibration
    kind, options = PackedDataModule, {}
    if settings.data.kind == "image_text":
        kind, options = ImageTextDataModule, {"vision": teacher.config.vision}
    return kind(
        settings.data,
        teacher.tokenizer,
        trainer.context,
        trainer.batch_size,
        stage_rows={"calibration": max(1, -(-calibration.tokens // trainer.context))},
        window=teacher.config.sliding_window,
        **options,
    )


def sensitivity_text(session: Session) -> dict[str, Tensor]:
    """Returns what sensitivities are measured on, ``token_ids`` [B, L]: not what the directions were calibrated on.

    Rows are read as one text each; images come with theirs.
    """
    rows = session.data.rows_of("distill")
    tokens = session.settings.recipe.calibration.sensitivity_tokens
    dataset, context = session.data.train_dataset, session.data.context
    chosen = [dataset[int(i)] for i in rows[: max(1, tokens // context)]]
    batch = shortened(collate_rows(chosen), max(1, tokens // len(chosen)), session.config.vision)
    return {k: batch[k].to(session.machine.device) for k in ("token_ids", "images") if k in batch}


def heldout_batch(session: Session) -> dict[str, Tensor]:
    """Returns two held-out rows on the machine's device, as one batch."""
    rows = session.data.heldout_rows(2 * session.data.context)
    batch = collate_rows([rows[i] for i in range(len(rows))])
    return {name: tensor.to(session.machine.device) for name, tensor in batch.items()}


def check_batch(session: Session) -> dict[str, Tensor]:
    """Returns one held-out row, of at most 512 tokens or one image more, that the export is compared on."""
    vision, context = session.config.vision, session.settings.trainer.context
    least = 512 + (0 if vision is None else vision.tokens_per_image)
    return collate_rows([session.data.heldout_rows(512, min(least, context))[0]])
