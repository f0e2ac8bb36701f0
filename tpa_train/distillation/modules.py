"""The two recovery stages as LightningModules: layer-wise (teacher-forced) and end to end (DESIGN §5).

Both train float32 copies of the parameters that learn and share everything else with the teacher. A checkpoint holds
only what learns: neither the teacher nor the frozen weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tpa_train.distillation.averaging import WeightAverage
from tpa_train.distillation.divergence import Divergence
from tpa_train.distillation.losses import linear_divergence, normalised_error
from tpa_train.distillation.optimizer import ScaledAdamW, element_scale
from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.attention import AttentionContext
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, layer_of, set_parameter

TrainScope = Literal["factors", "attention", "above", "all"]
FULL_RATE_KL = 0.3  # nats; students that start closer learn at lower rates
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

    def trained_tensors(self) -> dict[str, Tensor]:
        """Returns the learning parameters by the student's names, detached."""
        parameters = dict(self.student.named_parameters())
        return {name: parameters[name].detach() for name in self.trained}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {f"student.{name}": tensor for name, tensor in self.trained_tensors().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recovery"] = {"stage": self.stage, "tokens": self._tokens}

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

    def finish(self) -> None:
        """Called after training; what the student ends with is set here once all steps are done."""

    def learning_rates(self) -> dict[str, float]:
        """Returns the peak learning rate of every parameter that learns; a factor's is relative to its size."""
        settings = self.settings
        return {n: settings.lr_factors if n in self._factors else settings.lr_original for n in self.trained}

    def configure_optimizers(self) -> dict[str, Any]:
        parameters, members = dict(self.student.named_parameters()), {}
        for name, rate in self.learning_rates().items():
            members.setdefault((rate, name in self._factors), []).append(parameters[name])
        groups = [
            {"params": list_, "lr": rate, "scales": [element_scale(p) for p in list_] if relative else None}
            for (rate, relative), list_ in members.items()
        ]
        optimizer = ScaledAdamW(
            groups, betas=tuple(self.settings.betas), eps=ADAM_EPS, weight_decay=0.0, fused=self.device.type == "cuda"
        )
        rule: Callable[[int], float] = lambda step: schedule(step, self.total_steps, self.settings)  # noqa: E731
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clips by the stage's own setting and logs the norm before clipping."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self.log("grad_norm", norm, prog_bar=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, metrics = self.losses(batch)
        self._tokens += batch["token_ids"].numel() * self.trainer.world_size
        for name, value in metrics.items():
            self.log(name, value, prog_bar=False)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and what else to log, from ``token_ids``, ``document_ids`` and ``loss_mask`` [B, L]."""
        raise NotImplementedError


def trace_attention(
    teacher: Gemma3ForCausalLM, layers: list[int], x: Tensor, context: AttentionContext
) -> list[tuple[Tensor, Tensor]]:
    """Returns what enters and leaves the attention of each of ``layers``, [B, L, D] each, from embeddings ``x``."""
    traces = []
    for index in range(layers[-1] + 1):
        x, *trace = teacher.layers[index](x, context, trace=True)
        if index in layers:
            traces.append(tuple(trace))
    return traces


def attention_errors(
    student: Gemma3ForMultimodalLMwithTPA,
    traces: list[tuple[Tensor, Tensor]],
    roots: list[Tensor | None],
    context: AttentionContext,
) -> list[Tensor]:
    """Returns each converted attention's normalised error on the teacher's ``traces``, under M^½ of ``roots``."""
    errors = []
    for index, (entering, expected), root in zip(student.converted_layers, traces, roots, strict=True):
        errors.append(normalised_error(student.layers[index].self_attn(entering, context), expected, root))
    return errors


def layer_errors(
    teacher: Gemma3ForCausalLM,
    student: Gemma3ForMultimodalLMwithTPA,
    batch: dict[str, Tensor],
    trace: Callable[..., list[tuple[Tensor, Tensor]]] = trace_attention,
    measure: Callable[..., list[Tensor]] = attention_errors,
) -> dict[int, Tensor]:
    """Returns each converted attention's normalised output error when it is given the teacher's input.

    The error is measured by what it does to the model's output (``student.output_metrics``, from calibration). A plain
    mean square of a Gemma 3 attention output is ruled by a few large channels: training on it, or on the output after
    the post-attention norm, lowered the error in every layer of the 270M and raised the KL.

    Args:
        batch: ``token_ids`` and, if documents are packed, ``document_ids``, int [B, L]; ``images`` (``model.begin``).
        trace, measure: the two passes, where a caller has compiled them.
    """
    ids, layers, metrics = batch["token_ids"], student.converted_layers, student.output_metrics
    for index, root in metrics.items():
        metrics[index] = root.to(ids.device)
    with torch.no_grad():
        x, context = teacher.begin(batch)
        traces = trace(teacher, layers, x, context)
    errors = measure(student, traces, [metrics.get(index) for index in layers], context)
    return dict(zip(layers, errors, strict=True))


class LayerwiseModule(RecoveryModule):
    """Every converted attention gets the teacher's input to its layer and must reproduce the teacher's output.

    All layers learn in parallel, without the vocabulary and without the layers above the last converted one.

    Args (beyond ``RecoveryModule``'s):
        initial_errors: of each layer before the stage (``layer_errors``). Adam's steps do not shrink with the error, so
            a layer that starts close gets rates smaller by the root of its error: its noise stays below what it has.
    """

    stage, passes = "layerwise", ("trace", "measure")
    trace, measure = staticmethod(trace_attention), staticmethod(attention_errors)

    def __init__(
        self, teacher, student, settings: OptimizerSettings, total_steps: int, initial_errors: dict[int, float]
    ) -> None:
        super().__init__(teacher, student, settings, "factors", total_steps)
        self.initial_errors = initial_errors

    def learning_rates(self) -> dict[str, float]:
        return {
            name: rate * min(1.0, self.initial_errors[layer_of(name)]) ** 0.5
            for name, rate in super().learning_rates().items()
        }

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        errors = layer_errors(self.teacher, self.student, batch, self.trace, self.measure)
        return torch.stack(list(errors.values())).sum(), {f"error/layer_{i}": e.detach() for i, e in errors.items()}


def next_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Returns the token that follows each position in its own document, int [B, L]; -1 where there is none.

    Args:
        batch: ``token_ids`` and, if documents are packed, ``document_ids``, int [B, L].
    """
    labels = torch.full_like(batch["token_ids"], -1)
    labels[:, :-1] = batch["token_ids"][:, 1:]
    documents = batch.get("document_ids")
    if documents is not None:
        labels[:, :-1].masked_fill_(documents[:, 1:] != documents[:, :-1], -1)
    return labels


class EndToEndModule(RecoveryModule):
    """KL(teacher ‖ student) over the full vocabulary plus a hidden-state loss per layer that decays to zero.

    A batch may carry ``loss_mask`` [B, L], float or bool: the weight of what is predicted at each position. It weights
    the output loss only: hidden states matter wherever later positions attend to.

    Args (beyond ``RecoveryModule``'s):
        hidden_weight: of the mean normalised hidden-state error at the first step.
        hidden_until: share of the steps after which that weight is zero.
        kl_every: the KL is taken at every so-many-th position (1: all); the head dominates small models on a CPU.
        initial_kl: of the student before the stage, in nats a token. Rates are those of a student that starts at
            ``FULL_RATE_KL`` or above, and fall with the root of its KL below: the noise of Adam's steps is a KL of its
            own, in proportion to the squared rate, and would bury what a close student has. On the 270M, 20 steps of
            2K tokens at full rates took a student from .006 to .038.
        checkpoint_activations: keep a layer's input only for the backward pass (arXiv:1604.06174).
        ema: decay of the average of the weights that the student ends with (``averaging``); 0: no average.
        divergence: in place of the KL, another comparison of the distributions; may include the text's next tokens.
    """

    stage, passes = "distilled", ("teacher_pass", "student_pass")

    def __init__(
        self,
        teacher,
        student,
        settings: OptimizerSettings,
        scope: TrainScope,
        total_steps: int,
        hidden_weight: float = 0.1,
        hidden_until: float = 0.5,
        kl_every: int = 1,
        initial_kl: float = FULL_RATE_KL,
        divergence: Divergence = Divergence(),  # noqa: B008 (frozen)
        ema: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(teacher, student, settings, scope, total_steps)
        self.average = WeightAverage(ema) if ema > 0 else None
        self.initial_kl, self.divergence = initial_kl, divergence
        self.checkpoint_activations = checkpoint_activations
        self.hidden_weight, self.hidden_until, self.kl_every = hidden_weight, hidden_until, kl_every
        self.first = min(i for i in map(layer_of, self.trained) if i is not None)

    def learning_rates(self) -> dict[str, float]:
        share = min(1.0, max(self.initial_kl, 0.0) / FULL_RATE_KL) ** 0.5
        return {name: rate * share for name, rate in super().learning_rates().items()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update(self.trained_tensors())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.average is not None:
            checkpoint["recovery"]["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.average is not None:
            self.average.load_state_dict(checkpoint["recovery"]["average"])

    def finish(self) -> None:
        if self.average is not None and self.global_step >= self.total_steps:
            self.average.copy_to(self.trained_tensors())

    def _decayed_weight(self) -> float:
        progress = self.global_step / max(1, self.hidden_until * self.total_steps)
        return self.hidden_weight * max(0.0, 1.0 - progress)

    def teacher_pass(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, list[Tensor], Tensor]:
        """Returns the residual stream below the first learning layer, those above it, and final hidden states.

        All are [B, L, D]; the streams above are left out where no hidden-state loss asks for them.
        """
        shared = x = self.teacher.run_layers(x, context, stop=self.first)
        streams = []
        for layer in self.teacher.layers[self.first :]:
            x = layer(x, context)
            streams.append(x)
        return shared, streams if self.hidden_weight > 0 else [], self.teacher.norm(x)

    def student_pass(self, x: Tensor, context: AttentionContext, targets: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Returns final hidden states [B, L, D] and the mean normalised error against the streams ``targets``.

        Args:
            x: residual stream below the first learning layer, where teacher and student are one.
        """
        error = None
        for number, layer in enumerate(self.student.layers[self.first :]):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context)
            if targets:
                term = normalised_error(x, targets[number]) / len(targets)
                error = term if error is None else error + term
        return self.student.norm(x), error

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch["token_ids"]
        with torch.no_grad():
            x, context = self.teacher.begin(batch)
            shared, streams, h_teacher = self.teacher_pass(x, context)
        h_student, hidden_error = self.student_pass(shared, context, streams)
        every = min(self.kl_every, ids.shape[1])
        # Another residue each step, so that all positions get their turn.
        pick = slice(self.global_step % every, None, every)
        h_teacher, h_student = (h[:, pick].flatten(0, 1) for h in (h_teacher, h_student))
        mask, labels = batch.get("loss_mask"), next_tokens(batch)
        if context.images is not None:
            # Nobody reads what a model says at an image token: there the hidden states are matched, not the outputs.
            mask = context.images.text if mask is None else mask * context.images.text
            labels = labels.masked_fill(labels == self.teacher.config.vision.image_token_id, -1)
        loss, _ = linear_divergence(
            h_student, h_teacher, self.student.head_weight, self.teacher.head_weight,
            weights=None if mask is None else mask[:, pick].flatten(),
            divergence=self.divergence,
            labels=labels[:, pick].flatten() if self.divergence.ce_weight > 0 else None,
        )  # fmt: skip
        metrics = {"kl" if self.divergence == Divergence() else "output_loss": loss.detach()}
        if hidden_error is not None:
            metrics["hidden_error"] = hidden_error.detach()
            loss = loss + self._decayed_weight() * hidden_error
        return loss, metrics
