"""Small random models calibrated on random text: what the solvers of every form start from."""

from __future__ import annotations

import functools
import logging
import tempfile

import lightning as L
from random_models import random_model, small_config, tokens
from torch.utils.data import DataLoader

from tpa_train.factorization.calibration import Calibration, CalibrationModule
from tpa_train.factorization.solutions import Bases
from tpa_train.gemma3.model import Gemma3ForCausalLM


def calibrate(model: Gemma3ForCausalLM, layers: list[int], rows: int = 4, length: int = 40) -> Calibration:
    """Returns the moments of ``layers`` on random text that tests do not measure on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = CalibrationModule(model, layers)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, inference_mode=False,
        )  # fmt: skip
        texts = [{"token_ids": row} for row in tokens(model.config, rows, length, seed=99)]
        trainer.validate(module, DataLoader(texts, batch_size=2), verbose=False)
    return module.result


@functools.cache
def calibrated(groups: int, layers: tuple[int, ...] = (1, 5), **changes) -> tuple[Gemma3ForCausalLM, Calibration]:
    """Returns a model of ``small_config`` and its calibration; shared by the tests, not to be changed."""
    model = random_model(small_config(num_kv_heads=groups, **changes))
    return model, calibrate(model, list(layers))


def calibrated_bases(groups: int, layers: tuple[int, ...] = (1, 5), **changes) -> tuple[Gemma3ForCausalLM, Bases]:
    """Returns a calibrated model and fresh bases."""
    model, calibration = calibrated(groups, layers, **changes)
    return model, Bases.of(model, calibration)
