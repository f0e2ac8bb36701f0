"""What the benchmarks of memory share: a model's first layers, checked options, and the process's peak memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from tpa_train.errors import UserError
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.machine_memory import host_memory
from tpa_train.settings import TrainerSettings
from tpa_train.trainers import Machine

GIB = 2**30


def check_positive(settings: Any, *names: str) -> None:
    """Raises UserError if an option of ``settings`` is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)} must be at least 1.")


def first_layers(config: Gemma3Config, count: int | None) -> Gemma3Config:
    """Returns ``config`` with its first ``count`` layers; None: all of them.

    Raises:
        UserError: it has fewer.
    """
    count = config.num_layers if count is None else count
    if not 1 <= count <= config.num_layers:
        raise UserError(f"layers={count} must be between 1 and the {config.num_layers} of this size, or null for all.")
    return dataclasses.replace(config, num_layers=count, layer_kinds=config.layer_kinds[:count])


def reset_host_peak() -> None:
    """Starts the peak of the resident size anew, where the system allows it (Linux); else it is the process's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def host_peak_gib() -> float:
    """Returns the largest resident size since ``reset_host_peak``, in GiB."""
    peak = host_memory("/proc/self/status", "VmHWM")
    return peak / GIB if peak else Machine(torch.device("cpu"), torch.float32, TrainerSettings()).peak_gib()
