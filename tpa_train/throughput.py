"""How fast a recovery stage trains: tokens a second, the share of the device's peak (MFU), and peak memory, as logged.

MFU (PaLM, arXiv:2204.02311, appendix B) counts the operations that the stage's mathematics needs, nothing that is
computed twice. Here that includes the teacher's forward pass.

L tokens of a row · H query heads · d head_dim · W sliding window · V vocabulary · D hidden size
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tpa_train.distillation.end_to_end import EndToEndModule
from tpa_train.distillation.modules import RecoveryModule
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.trainers import Machine

WINDOW = 20  # steps that a rate is the mean of
# Part of a card's name -> dense bfloat16 operations a second by its data sheet; the first that matches.
PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX A6000": 155e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


# Weights of an attention that its input is multiplied with.
READING = ("down.weight", "keys.proj.weight", "values.proj.weight")


def peak_flops(name: str) -> float | None:
    """Returns the dense bfloat16 peak of the card called ``name`` in operations a second; None if it is unknown."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _products(module: nn.Module) -> int:
    """Returns the operations of one token's matrix products with the weights of ``module``."""
    return 2 * sum(p.numel() for p in module.parameters() if p.dim() >= 2)


def attention_flops(config: Gemma3Config, layer: int, context: int) -> float:
    """Returns the operations of a token's scores and their product with values, a mean over a row of L tokens."""
    span = context if config.is_global(layer) else min(context, config.sliding_window)
    seen = span - span * (span - 1) / (2 * context)  # the first ``span`` tokens see fewer
    return 4 * config.num_heads * config.head_dim * seen


def layers_flops(model: Gemma3ForCausalLM, layers: range, context: int) -> float:
    """Returns the operations of a token's forward pass through ``layers``."""
    return sum(_products(model.layers[i]) + attention_flops(model.config, i, context) for i in layers)


def training_flops(module: RecoveryModule, context: int) -> float:
    """Returns the operations that one token of training takes in ``module``'s stage, teacher included.

    A backward pass takes a forward pass again for the gradients of activations, and two operations a token and
    learning number for those of weights (and as many again for attention, which has two operands).
    """
    student, config = module.student, module.student.config
    trained = 2 * sum(p.numel() for p in module.trained_tensors().values() if p.dim() >= 2)
    if not isinstance(module, EndToEndModule):
        layers = student.converted_layers
        # Dense queries are the teacher's.
        own = sum(_products(student.layers[i].self_attn) for i in layers) - sum(
            2 * student.layers[i].self_attn.q_proj.weight.numel() for i in layers if student.specs[i].form_q == "dense"
        )
        # The layer's input needs no gradient, so none passes through what reads it.
        reading = sum(
            2 * p.numel()
            for i in layers
            for name, p in student.layers[i].self_attn.named_parameters()
            if p.dim() >= 2 and name.endswith(READING)
        )
        attention = sum(attention_flops(config, i, context) for i in layers)
        teacher = layers_flops(module.teacher, range(layers[-1] + 1), context)
        return teacher + 2 * own - reading + 3 * attention + trained
    above = range(module.first, config.num_layers)
    shared = layers_flops(module.teacher, range(module.first), context)
    teacher = layers_flops(module.teacher, above, context) if module.cache is None else 0.0
    attention = sum(attention_flops(config, i, context) for i in above)
    head = 2 * config.vocab_size * config.hidden_size / module.kl_every
    heads = 3 if module.cache is None or module.cache.mode == "hidden" else 2  # scores of both, and the gradient
    return shared + teacher + 2 * layers_flops(student, above, context) + attention + trained + heads * head


class Throughput(L.Callback):
    """Logs ``tokens_per_second`` (of all devices), ``peak_gib`` and, where the card's peak is known, ``mfu``.

    Args:
        machine: where the stage runs.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        on_gpu = machine.device.type == "cuda" and machine.dtype == torch.bfloat16
        self.peak = peak_flops(torch.cuda.get_device_name(machine.device)) if on_gpu else None
        self._ends: deque[float] = deque(maxlen=WINDOW + 1)
        self._flops = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: RecoveryModule) -> None:
        self._ends.clear()
        self._flops = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: RecoveryModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        rows, context = batch["token_ids"].shape
        # The first batch compiles and warms up: rates begin with the second. Without waiting for the device: over a
        # few batches it keeps step with the host.
        self._ends.append(time.perf_counter())
        if trainer.global_step % trainer.log_every_n_steps:
            return  # nothing is written, and to log a number is to wait for the device
        # On the host: Lightning would copy numbers to the device and, for its bar, read them back after every step.
        pl_module.log("peak_gib", torch.tensor(self.machine.peak_gib()), batch_size=rows)
        if len(self._ends) < 2:
            return
        batches = (len(self._ends) - 1) / (self._ends[-1] - self._ends[0])
        rate = batches * rows * context * trainer.world_size
        pl_module.log("tokens_per_second", torch.tensor(rate), prog_bar=True, batch_size=rows)
        if self.peak is not None:
            self._flops = self._flops or training_flops(pl_module, context)
            share = rate * self._flops / (self.peak * trainer.world_size)
            pl_module.log("mfu", torch.tensor(share), batch_size=rows)
