"""Causal language modelling of a dense Gemma 3 from random weights, as a LightningModule.

B rows of a batch · L tokens of a row · N = B·L · D hidden size · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tpa_train.distillation.modules import schedule
from tpa_train.errors import UserError
from tpa_train.evaluation.metrics import next_token_mask, score_tokens
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.pretraining.settings import OptimizerArgs

WEIGHT_STD = 0.02
ADDING_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
LOSS_TOKENS = 32_768  # at most so many positions' logits are turned into losses at a time
IGNORED = -100  # target of a position that is not scored


def new_model(config: Gemma3Config, seed: int) -> Gemma3ForCausalLM:
    """Returns a float32 model of random weights on the CPU, the same ones for the same seed whatever the device.

    Matrices are normal with std 0.02. Embeddings have std 1/√D: scaled by √D they enter with size 1, and as the tied
    head they start with logits of size 1. Norm weights are zero (a gain of 1), but for the norms behind attention and
    MLP: these, not the output matrices before them, decide how much a layer adds to the residual stream, so it is they
    that start at a gain of 1/√(2·layers). (10 layers of width 128, 0.6M tokens: held-out loss 5.83 instead of 6.03;
    scaling the output matrices made no difference.)
    """
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(ADDING_NORMS):
                parameter.fill_((2 * config.num_layers) ** -0.5 - 1)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                std = config.hidden_size**-0.5 if name == "embed_tokens.weight" else WEIGHT_STD
                parameter.normal_(0.0, std, generator=generator)
    return model


class PretrainModule(L.LightningModule):
    """Next-token cross-entropy of ``model``.

    Args:
        model: learns in place; float32.
        settings: learning rate, its schedule and weight decay.
        total_steps: optimizer steps of the whole training, for the schedule.
        join_documents: the documents of a row are one text; otherwise attention does not cross their edges, nor is a
            document's first token predicted from another one.
        compile: compile the layers and the loss. Rows and batches must then always have the same size.
    """

    stage = "pretraining"

    def __init__(
        self,
        model: Gemma3ForCausalLM,
        settings: OptimizerArgs,
        total_steps: int,
        join_documents: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.settings, self.total_steps = model, settings, total_steps
        self.join_documents = join_documents
        self._loss = summed_loss
        if compile:
            for layer in model.layers:
                layer.compile(dynamic=False)
            self._loss = torch.compile(summed_loss, dynamic=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids = batch["token_ids"]
        documents = None if self.join_documents else batch["document_ids"]
        hidden = self.model.hidden_states(ids, documents).flatten(0, 1)
        loss = causal_loss(hidden, self.model.head_weight, next_targets(ids, documents), self._loss)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        others = [p for p in self.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.settings.lr,
            betas=(0.9, self.settings.beta2),
            fused=self.device.type == "cuda",
        )
        rates = self.settings.schedule()
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: schedule(step, self.total_steps, rates)
        )  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.settings.clip)


def next_targets(token_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Returns the token after each position, int64 [N]; IGNORED at the end of rows and of documents.

    Args:
        token_ids: int64 [B, L]; document_ids: int [B, L], or None if a row is one text.
    """
    targets = token_ids.roll(-1, dims=1)
    targets[:, -1] = IGNORED
    if document_ids is not None:
        scored, _ = next_token_mask(token_ids, document_ids)
        targets[:, :-1].masked_fill_(~scored, IGNORED)
    return targets.flatten()


def summed_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Returns Σ −log p(target) in nats, float32: hidden [N, D], head [V, D], targets [N]."""
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(head.dtype)
    return F.cross_entropy(F.linear(hidden, head).float(), targets, ignore_index=IGNORED, reduction="sum")


def causal_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, summed: Callable[[Tensor, Tensor, Tensor], Tensor] = summed_loss
) -> Tensor:
    """Returns the mean cross-entropy in nats over the scored positions.

    Args:
        hidden: [N, D] final normalised hidden states; head: [V, D]; targets: int64 [N].
        summed: ``summed_loss`` or its compiled form; takes at most LOSS_TOKENS positions at a time, so that the
            float32 logits of a large batch, and their gradients, are never all there at once.
    """
    pieces = -(-len(targets) // LOSS_TOKENS)
    parts = zip(hidden.chunk(pieces), targets.chunk(pieces), strict=True)
    return sum(summed(h, head, t) for h, t in parts) / (targets != IGNORED).sum().clamp_min(1)


@torch.no_grad()
def heldout_loss(
    model: Gemma3ForCausalLM,
    rows: Dataset,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager],
    join_documents: bool = True,
) -> float:
    """Returns the mean cross-entropy in nats of ``rows``, scored in float32 and summed in float64.

    Args:
        model: on any device; compiled layers run uncompiled, since a second graph for a few batches does not pay.
        rows: ``{"token_ids": [L], "document_ids": [L]}``.
        batch_size: rows at a time.
        autocast: makes the context that the layers run under.

    Raises:
        UserError: every document is shorter than two tokens, or the model has diverged.
    """
    device, total, count = model.head_weight.device, 0.0, 0
    for batch in DataLoader(rows, batch_size=batch_size):
        ids = batch["token_ids"].to(device)
        documents = None if join_documents else batch["document_ids"].to(device)
        scored, _ = next_token_mask(ids, documents)
        with torch.compiler.set_stance("force_eager"), autocast():
            hidden = model.hidden_states(ids, documents)[:, :-1][scored]
        nll, _ = score_tokens(hidden, model.head_weight, ids[:, 1:][scored])
        total, count = total + float(nll.sum()), count + nll.numel()
    if not count:
        raise UserError("the held-out text has no token to score: every document is shorter than two tokens.")
    if not math.isfinite(total):
        raise UserError("the training diverged: the held-out loss is not finite; lower optimizer.lr and start again.")
    return total / count
