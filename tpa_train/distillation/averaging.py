"""The exponential moving average of the weights that learn: less noise than the last step's, at no training cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tpa_train.distributed.sharding import is_sharded, local_part, on_first, sharded_like, whole


class WeightAverage:
    """θ̄ ← d·θ̄ + (1 − d)·θ after every optimizer step, with d = min(decay, (1 + n) / (10 + n)) after n earlier ones.

    Where weights are sharded, so is their average; its state is whole, so that a run may go on with other processes.
    The smaller d of the first steps keeps the weights that training began with from staying in the average (as in
    TensorFlow's ExponentialMovingAverage with ``num_updates``).

    Args:
        decay: d, at least 0 and below 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Takes in the weights, by name, after an optimizer step."""
        if not self.tensors:
            self.tensors = {name: weight.detach().clone() for name, weight in weights.items()}
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, weight in weights.items():
            average = self.tensors[name]
            if not is_sharded(average):  # a checkpoint's come whole and on the CPU
                average = self.tensors[name] = sharded_like(average, weight)
            local_part(average).lerp_(local_part(weight.detach()), 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def copy_to(self, weights: Mapping[str, Tensor]) -> None:
        """Puts the average in the place of the weights, which are whole by then. All processes must call it."""
        for name, average in self.tensors.items():
            weights[name].copy_(whole(average))

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, whole, on the first process. All processes must call it."""
        return {"steps": self.steps, "tensors": on_first(self.tensors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.tensors = state["steps"], dict(state["tensors"])
