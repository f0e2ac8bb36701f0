"""The first recovery stage: every converted attention gets the teacher's input and must give its output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tpa_train.distillation.losses import normalised_error
from tpa_train.distillation.modules import OptimizerSettings, RecoveryModule
from tpa_train.gemma3.attention import AttentionContext
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, layer_of

Trace = tuple[Tensor, Tensor, Tensor]


def trace_attention(
    teacher: Gemma3ForCausalLM, layers: list[int], x: Tensor, context: AttentionContext
) -> list[Trace]:
    """Returns what enters the attention of each of ``layers``, its queries, and what leaves it; ``x``: embeddings."""
    traces = []
    for index in range(layers[-1] + 1):
        x, *trace = teacher.layers[index](x, context, trace=True)
        if index in layers:
            traces.append(tuple(trace))
    return traces


def attention_errors(
    student: Gemma3ForMultimodalLMwithTPA,
    traces: list[Trace],
    roots: list[Tensor | None],
    context: AttentionContext,
) -> list[Tensor]:
    """Returns each converted attention's normalised error on the teacher's ``traces``, under M^½ of ``roots``.

    Dense queries are the teacher's own, since what they are made from does not learn here.
    """
    errors = []
    for index, (entering, queries, expected), root in zip(student.converted_layers, traces, roots, strict=True):
        same = student.specs[index].form_q == "dense"
        output = student.layers[index].self_attn(entering, context, queries if same else None)
        errors.append(normalised_error(output, expected, root))
    return errors


def layer_errors(
    teacher: Gemma3ForCausalLM,
    student: Gemma3ForMultimodalLMwithTPA,
    batch: dict[str, Tensor],
    trace: Callable[..., list[Trace]] = trace_attention,
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

    All layers learn in parallel, without the vocabulary and without the layers above the last converted one. All tokens
    count alike, also those that a batch's ``loss_mask`` leaves out (prompts of conversations) and image tokens: what
    this stage matches is what later tokens read of them.

    Args (beyond ``RecoveryModule``'s):
        initial_errors: of each layer before the stage (``layer_errors``). Adam's steps do not shrink with the error, so
            a layer that starts close gets rates smaller by the root of its error: its noise stays below what it has.
    """

    # Not recorded: with CUDA graphs the 270M trained 279K tokens a second on an H100, without 426K.
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
