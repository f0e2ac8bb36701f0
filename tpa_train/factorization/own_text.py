"""Calibration without text: on what the model itself writes, sampled from BOS (LLM-QAT, arXiv:2305.17888, §3.1).

Weights alone do not say what matters: on the 270M, dropping the 8 least of 256 directions of every K and V costs the
output 9.5 nats a token, because inputs are far from white (a few channels are huge, BOS most of all). 1024 tokens of
the model's own text bring that to hundredths. Text of the kind that the model will read is better still.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tpa_train.factorization.calibration import Calibration, CalibrationModule
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.generation import stream_ids

ROWS, LENGTH = 16, 64
ROWS_PER_PASS = 8
BOS = 2  # Gemma's, where the model has no tokenizer


def sample_own_text(model: Gemma3ForCausalLM, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Returns token ids [rows, length] that begin with BOS and go on as the model likes, at temperature 1."""
    length = min(length, model.config.max_context)
    bos = BOS if model.tokenizer is None else model.tokenizer.bos_id
    device = model.head_weight.device
    steps = stream_ids(model, [[bos]] * rows, length - 1, temperature=1.0, seed=rows * seed)
    return torch.stack([torch.full((rows,), bos, device=device), *steps], dim=1)


def calibrate_on_own_text(
    model: Gemma3ForCausalLM, layers: Iterable[int] | None = None, rows: int = ROWS, length: int = LENGTH, seed: int = 0
) -> Calibration:
    """Returns the calibration of the dense ``model``'s ``layers`` (all when None) on text that it writes itself.

    Raises:
        UserError: the moments are not finite.
    """
    layers = range(model.config.num_layers) if layers is None else layers
    text = sample_own_text(model, rows, length, seed)
    module = CalibrationModule(model, list(layers), seed=seed).to(model.head_weight.device)
    module.on_validation_start()
    for index, part in enumerate(text.split(ROWS_PER_PASS)):
        module.validation_step({"token_ids": part}, index)
    return module.collected()
