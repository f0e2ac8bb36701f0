"""What both recovery stages share as LightningModules: what learns, how, and checkpoints of it.

``layerwise`` and ``end_to_end`` have the stages. Both train float32 copies of the parameters that learn and share
everything else with the teacher. A checkpoint holds only what learns: neither the teacher nor the frozen weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from tpa_train.distillation.optimizer import ScaledAdamW, element_scale
from tpa_train.distributed.processes import sum_over_processes, world_size
from tpa_train.distributed.progress import adapt_progress
from tpa_train.distributed.sharding import shard, whole
from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.attention import document_offsets, takes_documents
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.constants import settle_constants
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, layer_of, set_parameter

TrainScope = Literal["factors", "attention", "above", "all"]
ADAM_EPS = 1e-12  # gradients of a mean over tokens are small, most of all those of widely scaled factors
SCOPES = ("factors", "attention", "above", "all")


@dataclass
class OptimizerSettings:
    """Learning rates and schedule of one stage."""

    # of the factors, relative to their own size, row by row and column by column, since latents differ in scale
    lr_factors: float = 3e-3
    # of the original's weights, where they train; absolute
    lr_original: float = 1e-4
    # share of the steps with a rising rate
    warmup: float = 0.05
    # share of the peak rate at the last step (a cosine in between)
    final_lr: float = 0.05
    # AdamW's decay rates
    betas: tuple[float, float] = (0.9, 0.95)
    # largest gradient norm
    clip: float = 1.0


def trainable_names(student: Gemma3ForMultimodalLMwithTPA, scope: TrainScope) -> list[str]:
    """Returns the parameters that learn.

    ``factors``: those that conversion introduced; ``attention``: the converted layers' attention; ``above``: every
    layer from the first converted one up (the others' forward is then shared with the teacher); ``all``: everything
    but the embedding and the vision side.

    Raises:
        UserError: the scope is unknown.
    """
    if scope not in SCOPES:
        raise UserError(f"unknown training scope '{scope}'{nearest(scope, SCOPES)}")
    factors = set(student.factor_names())
    converted = set(student.converted_layers)

    def learns(name: str) -> bool:
        layer = layer_of(name)
        if name.endswith(".center"):  # where the quantizer's groups are centred: a constant of the data
            return False
        if name in factors:
            return True
        if scope == "attention":
            return layer in converted and ".self_attn." in name
        if scope == "above":
            return name == "norm.weight" or (layer is not None and layer >= min(converted))
        return scope == "all" and name != "embed_tokens.weight" and not name.startswith("vision.")

    return [name for name, _ in student.named_parameters() if learns(name)]


def schedule(step: int, total: int, settings: OptimizerSettings) -> float:
    """Returns the factor on the learning rate at ``step`` of ``total``: linear warm-up, then half a cosine."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class RecoveryModule(L.LightningModule):
    """What both stages share: which parameters learn, their optimizer, and checkpoints without the teacher.

    Args:
        teacher: the dense original; frozen.
        student: shares its unconverted parameters with the teacher.
        settings: learning rates and schedule.
        scope: which of the student's parameters learn.
        total_steps: optimizer steps of the whole stage, for the schedule.
    """

    stage: str
    passes: tuple[str, ...]  # names of the methods that a step spends its time in, to be compiled
    records = False  # whether they gain by being replayed as CUDA graphs

    def __init__(
        self,
        teacher: Gemma3ForCausalLM,
        student: Gemma3ForMultimodalLMwithTPA,
        settings: OptimizerSettings,
        scope: TrainScope,
        total_steps: int,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold only what learns; on_load_checkpoint checks that by name
        self.teacher, self.student = teacher.requires_grad_(False).eval(), student.requires_grad_(False).eval()
        self.settings, self.total_steps = settings, total_steps
        self.trained = trainable_names(student, scope)
        self._factors = set(student.factor_names())
        parameters = dict(student.named_parameters())
        for name in self.trained:
            # A float32 copy: the teacher keeps its own, and small updates are not lost in bfloat16.
            wide = parameters[name].detach().to(accumulation_dtype(parameters[name].dtype), copy=True)
            set_parameter(student, name, nn.Parameter(wide))
        self._tokens = 0
        # Share of a batch's tokens that its loss is the mean of, where some do not count: the last batch's, and all
        # batches' since the last step.
        self._share: Tensor | None = None
        self._counted: list[Tensor] = []
        self._is_sharded = False

    def configure_model(self) -> None:
        """Shards both models where the strategy has made a mesh for it (Lightning calls this in every fit)."""
        if self.device_mesh is None or self._is_sharded:
            return
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        shard(self, self.teacher, self.student, self.device_mesh["data_parallel"], dtype)
        self._is_sharded = True

    def trained_tensors(self) -> dict[str, Tensor]:
        """Returns the learning parameters by the student's names, detached."""
        parameters = dict(self.student.named_parameters())
        return {name: parameters[name].detach() for name in self.trained}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {f"student.{name}": tensor for name, tensor in self.trained_tensors().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recovery"] = {"stage": self.stage, "tokens": self._tokens}
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        expected, found = set(self.state_dict()), set(checkpoint["state_dict"])
        if expected != found or checkpoint.get("recovery", {}).get("stage") != self.stage:
            differing = sorted(expected ^ found)
            raise UserError(
                f"the checkpoint does not belong to this {self.stage} stage"
                + (f" (first difference: '{differing[0]}')" if differing else "")
                + "; start a new run folder or restore the options that it was made with."
            )
        self._tokens = checkpoint["recovery"]["tokens"]
        if self._trainer is None:
            return
        adapt_progress(checkpoint, self.trainer)
        rng = checkpoint.get("rng", {})
        if "cpu" in rng:
            torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)

    def finish(self) -> None:
        """Called after training; what the student ends with is set here once all steps are done."""
        if self.global_step >= self.total_steps:
            settle_constants(self.student, self.trained)

    def learning_rates(self) -> dict[str, float]:
        """Returns the peak learning rate of every parameter that learns; a factor's is relative to its size."""
        settings = self.settings
        return {n: settings.lr_factors if n in self._factors else settings.lr_original for n in self.trained}

    def configure_optimizers(self) -> dict[str, Any]:
        parameters, members = dict(self.student.named_parameters()), {}
        for name, rate in self.learning_rates().items():
            members.setdefault((rate, name in self._factors), []).append(parameters[name])
        groups = [
            {
                "params": list_, "lr": rate,
                "scales": [element_scale(whole(p.detach())) for p in list_] if relative else None,
            }
            for (rate, relative), list_ in members.items()
        ]  # fmt: skip
        optimizer = ScaledAdamW(
            groups, betas=tuple(self.settings.betas), eps=ADAM_EPS, weight_decay=0.0, fused=self.device.type == "cuda"
        )
        rule: Callable[[int], float] = lambda step: schedule(step, self.total_steps, self.settings)  # noqa: E731
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clips by the stage's own setting and logs the norm before clipping."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._normalise_by_tokens(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self.log("grad_norm", whole(norm), prog_bar=False)

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Looks at documents while they are on the host: on a GPU this would wait for the step before."""
        ids = batch.get("document_ids")
        if ids is None:
            return batch
        # Where kernels take documents, a batch of whole rows looks like any other: its own shape would have compiled
        # passes compiled again, which takes minutes and may come once in thousands of steps.
        if not takes_documents(self.device) and bool((ids[:, 0] == ids[:, -1]).all()):  # ids ascend
            return {name: tensor for name, tensor in batch.items() if name != "document_ids"}
        return batch | {"cu_seqlens": document_offsets(ids, filled=self.device.type == "cuda")}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # where passes are recorded: what the last batch left is not read
        loss, metrics = self(batch)
        self._tokens += batch["token_ids"].numel() * self.trainer.world_size
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # other steps are not written
            self._log_means(metrics | {"loss": loss.detach()})
        return self._weighted(loss)

    def _log_means(self, values: dict[str, Tensor]) -> None:
        """Logs means over processes, from the host: Lightning reads what its bar shows after every step, logged anew or
        not, and to read from a device is to wait for it.
        """
        means = sum_over_processes(torch.stack(list(values.values()))) / world_size()
        for name, value in zip(values, means.cpu(), strict=True):
            self.log(name, value, prog_bar=name == "loss")

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns ``losses``; called as a module, so that sharded weights are gathered around it."""
        return self.losses(batch)

    def _weighted(self, loss: Tensor) -> Tensor:
        """Returns the mean ``loss`` of a batch times the share of its tokens that count, as ``losses`` left it.

        Stages that compare every token leave none. A step averages over its batches, of all processes. That is the mean
        over tokens as long as every batch counts equally many; otherwise ``_normalise_by_tokens`` makes it so, once the
        step's counts are known.
        """
        share, self._share = self._share, None
        if share is None:
            return loss
        self._counted.append(share)
        return loss * share

    def _normalise_by_tokens(self, parameters: list[nn.Parameter]) -> None:
        """Scales gradients from a mean over batches of Σ over tokens to one Σ over tokens by their number."""
        if not self._counted:
            return
        batches = len(self._counted) * world_size()
        shares = sum_over_processes(torch.stack(self._counted).sum())
        factor = batches / float(shares) if float(shares) > 0 else 0.0  # nothing counted: nothing is learned
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self._counted = []

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and what else to log, from ``token_ids``, ``document_ids`` and ``loss_mask`` [B, L].

        Where data have tokens that do not count, every batch of theirs leaves its ``_share``: all processes must do so.
        """
        raise NotImplementedError
