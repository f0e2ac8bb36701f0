"""From a pretrained Gemma 3 to a Tensor Product Attention model with a smaller KV cache, in a few lines:

    import tpa_train

    teacher = tpa_train.load_pretrained()
    student = tpa_train.factorize(teacher, "budget.cache_ratio=4")
    student = tpa_train.distill(teacher, student, "budget.cache_ratio=4")
    tpa_train.export(student, "my-model")

``scripts/train.py`` does the same with measurements, a report, and a run folder that survives interruptions.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["UserError", "distill", "export", "factorize", "load_pretrained"]

_HOMES = {"UserError": "tpa_train.errors"}  # the others live in tpa_train.api


def __getattr__(name: str) -> Any:
    # PyTorch and Lightning take seconds to import: only those who use them wait.
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "tpa_train.api")), name)
    raise AttributeError(f"module 'tpa_train' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
