"""The second recovery stage: the student's next-token distributions are to be the teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpa_train.distillation.averaging import WeightAverage
from tpa_train.distillation.divergence import Divergence
from tpa_train.distillation.losses import linear_divergence, normalised_error
from tpa_train.distillation.modules import OptimizerSettings, RecoveryModule, TrainScope
from tpa_train.distillation.teacher_cache import TeacherCache
from tpa_train.distillation.topk_loss import topk_kl
from tpa_train.gemma3.attention import AttentionContext
from tpa_train.tpa.gemma3_tpa_model_modular import layer_of

FULL_RATE_KL = 0.3  # nats; students that start closer learn at lower rates


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
    the tokens of the output loss, as being text does in batches with images; hidden states, which later positions
    attend to, count everywhere in a batch, and a batch counts by its tokens that do.

    Args (beyond ``RecoveryModule``'s):
        hidden_weight: of the mean normalised hidden-state error at the first step.
        hidden_until: share of the steps after which that weight is zero.
        kl_every: the KL is taken at every so-many-th position (1: all); the head dominates small models on a CPU.
        initial_kl: of the student before the stage, in nats a token. Rates are those of a student that starts at
            ``FULL_RATE_KL`` or above, and fall with the root of its KL below: the noise of Adam's steps is a KL of its
            own, in proportion to the squared rate, and would bury what a close student has. On the 270M, 20 steps of
            2K tokens at full rates took a student from .006 to .038.
        ema: decay of the average of the weights that the student ends with (``averaging``); 0: no average.
        divergence: in place of the KL, another comparison of the distributions; may include the text's next tokens.
        cache: what the teacher says of every row; it then does not run. ``hidden_weight`` must be 0.
    """

    stage, passes = "distilled", ("teacher_pass", "student_pass")
    records = True  # on an H100 the 270M at 16K tokens a step: 153K tokens a second against 146K

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
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__(teacher, student, settings, scope, total_steps)
        assert cache is None or hidden_weight == 0, "layers are compared with a teacher that runs"
        self.average = WeightAverage(ema) if ema > 0 else None
        self.initial_kl, self.divergence, self.cache = initial_kl, divergence, cache
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
        super().finish()

    def output_loss(
        self, student: Tensor, teacher: Tensor, weights: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Returns the mean divergence of final hidden states [N, D], with weights and next tokens [N]."""
        heads = self.student.head_weight, self.teacher.head_weight
        return linear_divergence(student, teacher, *heads, weights, divergence=self.divergence, labels=labels)[0]

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

    def student_pass(self, x: Tensor, context: AttentionContext, targets: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Returns final hidden states [B, L, D] and the normalised errors against the streams ``targets``.

        Args:
            x: residual stream below the first learning layer, where teacher and student are one.
        """
        errors = []
        for number, layer in enumerate(self.student.layers[self.first :]):
            x = layer(x, context)
            if targets:
                errors.append(normalised_error(x, targets[number]))
        return self.student.norm(x), errors

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch["token_ids"]
        with torch.no_grad():
            x, context = self.teacher.begin(batch)
            if self.cache is None:
                shared, streams, h_teacher = self.teacher_pass(x, context)
            else:
                shared, streams = self.teacher.run_layers(x, context, stop=self.first), []
        h_student, hidden_errors = self.student_pass(shared, context, streams)
        every = min(self.kl_every, ids.shape[1])
        # Another residue each step, so that all positions get their turn.
        pick = slice(self.global_step % every, None, every)
        h_student, mask = h_student[:, pick].flatten(0, 1), batch.get("loss_mask")
        if context.images is not None:
            # Nobody reads what a model says at an image token: there the hidden states are matched, not the outputs.
            mask = context.images.text if mask is None else mask * context.images.text
        weights = None if mask is None else mask[:, pick].flatten()
        if self.cache is None:
            stored = {"hidden": h_teacher[:, pick].flatten(0, 1)}
        else:
            stored = {name: tensor.flatten(0, 1) for name, tensor in self.cache.read(batch["row"], pick).items()}
        if "hidden" in stored:
            labels = None
            if self.divergence.ce_weight > 0:
                labels = next_tokens(batch)
                if context.images is not None:  # what an image token is followed by is no word of the vocabulary
                    labels = labels.masked_fill(labels == self.teacher.config.vision.image_token_id, -1)
                labels = labels[:, pick].flatten()
            loss = self.output_loss(h_student, stored["hidden"], weights, labels)
        else:
            loss = topk_kl(h_student, self.student.head_weight, **stored, weights=weights)[0]
        if mask is not None or "images" in batch:  # rows of image data, though these have none
            self._share = torch.ones_like(loss.detach()) if weights is None else weights.to(loss.dtype).mean()
        metrics = {"kl" if self.divergence == Divergence() else "output_loss": loss.detach()}
        if hidden_errors:
            metrics |= {f"hidden_error/layer_{i}": e.detach() for i, e in enumerate(hidden_errors, self.first)}
            hidden_error = torch.stack(hidden_errors).mean()
            metrics["hidden_error"] = hidden_error.detach()
            loss = loss + self._decayed_weight() * hidden_error
        return loss, metrics
