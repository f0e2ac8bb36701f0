"""How much the model's output suffers when one part of one layer changes: measured, one probe at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from tpa_train.distillation.losses import chunk_tokens, head_logits, linear_kl
from tpa_train.distributed.processes import is_first, merged, share
from tpa_train.factorization.solutions import Bases, layer_factors
from tpa_train.gemma3.attention import AttentionContext
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import DecoderLayer, Gemma3ForCausalLM
from tpa_train.tpa.gemma3_tpa_model_modular import converted_attention
from tpa_train.tpa.spec import LayerSpec

NOISE_BITS = 3  # coarse enough that its KL stands out of half precision's, fine enough to be a small error


@dataclass(frozen=True, order=True)
class Probe:
    """One layer's keys ("k"), values ("v") or both ("kv": a joint latent) in one form, everything else dense."""

    layer: int
    kind: str
    form: str
    rank: int
    bits: int = 16

    def spec(self, config: Gemma3Config) -> LayerSpec:
        """Returns the layer's specification."""
        values = {f"form_{k}": self.form for k in self.kind} | {f"rank_{k}": self.rank for k in self.kind}
        values |= {f"bits_{k}": self.bits for k in self.kind}
        return replace(LayerSpec(rank_k=config.head_dim, rank_v=config.head_dim), **values)

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind} {self.form} {self.rank} @{self.bits}"

    @classmethod
    def parse(cls, text: str) -> Probe:
        """Returns the probe that ``str`` wrote."""
        where, form, rank, bits = text.split(" ")
        layer, kind = where.split(".")
        return cls(int(layer), kind, form, int(rank), int(bits.removeprefix("@")))


class OutputDivergence:
    """KL(model ‖ changed model) in nats a token, against one set of final hidden states whose scores are kept.

    Args:
        hidden: the original's final hidden states [N, D].
        head: output matrix [V, D].
    """

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        self.head = head
        self.step = chunk_tokens(head.shape[0], hidden.device, head.dtype)
        self.reference = [head_logits(part, head).log_softmax(-1) for part in hidden.split(self.step)]

    def __call__(self, hidden: Tensor) -> float:
        """Returns the mean KL for the changed model's hidden states [N, D]."""
        total = 0.0
        for expected, part in zip(self.reference, hidden.split(self.step), strict=True):
            changed = head_logits(part, self.head).log_softmax(-1)
            total += float((expected.exp() * (expected - changed)).sum(dtype=torch.float64))
        return total / hidden.shape[0]


class OutputRun:
    """A pass of the model over one text, kept as its residual streams, which changed models go on from.

    Args:
        model: the dense model.
        text: token ids [B, L], or a batch as ``model.begin`` takes it.
        every: the KL is taken at every so-many-th position; the head costs more than the layers.
        dtype: to compute in, without autocast, a copy of one layer and of the head at a time; None: as the model's
            weights and autocast have it.
    """

    def __init__(
        self, model: Gemma3ForCausalLM, text: Tensor | Mapping[str, Tensor], every: int, dtype: torch.dtype | None
    ) -> None:
        x, self.context = model.begin(text)
        self.model, self.dtype, self.kind = model, dtype, x.device.type
        self.pick = slice(min(every, x.shape[1]) - 1, None, every)
        self.residuals = [x if dtype is None else x.to(dtype)]  # below every layer, and the last one's output
        for layer in model.layers:
            self.residuals.append(self._run(self.residuals[-1], [layer]))
        head, last = model.head_weight, self._final(self.residuals[-1])
        with torch.autocast(self.kind, enabled=False):
            self.divergence = OutputDivergence(last, head if dtype is None else head.to(dtype))

    def kl(self, index: int, layer: DecoderLayer) -> float:
        """Returns KL(model ‖ model with ``layer`` in the place of its layer ``index``), in nats a token."""
        last = self._final(self._run(self.residuals[index], [layer, *self.model.layers[index + 1 :]]))
        with torch.autocast(self.kind, enabled=False):
            return self.divergence(last)

    def _run(self, residual: Tensor, layers: Iterable[DecoderLayer]) -> Tensor:
        for layer in layers:
            if self.dtype is None:
                residual = layer(residual, self.context)
                continue
            exact = all(p.dtype == self.dtype for p in layer.parameters())
            with torch.autocast(self.kind, enabled=False):
                residual = (layer if exact else copy.deepcopy(layer).to(self.dtype))(residual, self.context)
        return residual

    def _final(self, residual: Tensor) -> Tensor:
        return read_outputs(self.model.norm(residual), self.context, self.pick)


@torch.no_grad()
def measure_sensitivity(
    model: Gemma3ForCausalLM,
    bases: Bases,
    probes: Iterable[Probe],
    text: Tensor | Mapping[str, Tensor],
    every: int = 4,
    shared: bool = True,
) -> dict[Probe, float]:
    """Returns the output KL (nats a token) of each probe.

    The forward of the layers before the probed one is computed once and reused. Several processes measure a part of
    the probes each; all return all of them.

    Args:
        model, text, every: see ``OutputRun``.
        bases: directions of all probed layers.
        probes: what to change, one at a time.
        shared: whether processes share the work; otherwise this one does it all.
    """
    probes = sorted(set(probes))
    if not probes:
        return {}
    run = OutputRun(model, text, every, None)
    bar = {"desc": "measuring sensitivities", "unit": "probe", "leave": False, "disable": not is_first()}
    result = {
        probe: run.kl(probe.layer, changed_layer(model, bases, probe))
        for probe in tqdm(share(probes) if shared else probes, **bar)
    }
    return merged(result) if shared else result


@torch.no_grad()
def layer_kls(
    model: Gemma3ForCausalLM, student: Gemma3ForCausalLM, text: Tensor | Mapping[str, Tensor], every: int = 4
) -> dict[int, float]:
    """Returns the output KL (nats a token) that each converted layer of ``student`` costs alone, among ``model``'s.

    In float32 (or wider): between two passes in half precision lies a KL of its own (0.0005 on the 270M), in which what
    a layer costs at 8 bits would drown.

    Args: as ``OutputRun`` takes them.
    """
    run = OutputRun(model, text, every, accumulation_dtype(model.head_weight.dtype))
    bar = {"desc": "measuring layers", "unit": "layer", "leave": False, "disable": not is_first()}
    return {index: run.kl(index, student.layers[index]) for index in tqdm(student.converted_layers, **bar)}


@torch.no_grad()
def output_kl(
    model: Gemma3ForCausalLM, student: Gemma3ForCausalLM, text: Tensor | Mapping[str, Tensor], every: int = 4
) -> float:
    """Returns KL(model ‖ student) in nats a token on ``text``, at every so-many-th position.

    ``text``: token ids [B, L], or a batch as ``model.begin`` takes it.
    """
    x, context = model.begin(text)  # the student's too: it shares the embedding and the vision side
    pick = slice(min(every, x.shape[1]) - 1, None, every)
    teacher, changed = (read_outputs(m.norm(m.run_layers(x, context)), context, pick) for m in (model, student))
    with torch.autocast(teacher.device.type, enabled=False):
        return float(linear_kl(changed, teacher, student.head_weight, model.head_weight)[0])


def read_outputs(hidden: Tensor, context: AttentionContext, pick: slice) -> Tensor:
    """Returns the final hidden states [N, D] at the positions ``pick`` of [B, L, D], less those of image tokens."""
    hidden = hidden[:, pick]
    return hidden.flatten(0, 1) if context.images is None else hidden[context.images.text[:, pick]]


def changed_layer(model: Gemma3ForCausalLM, bases: Bases, probe: Probe) -> DecoderLayer:
    """Returns decoder layer ``probe.layer`` with its attention in the probe's form; the rest is the model's own."""
    layer, spec = model.layers[probe.layer], probe.spec(model.config)
    weight, prefix = model.embed_tokens.weight, f"layers.{probe.layer}.self_attn."
    factors = {
        name.removeprefix(prefix): t.to(device=weight.device, dtype=accumulation_dtype(weight.dtype))
        for name, t in layer_factors(model, bases, probe.layer, spec).items()
    }
    changed = copy.copy(layer)  # the layer's own norms and MLP around another attention
    changed._modules = {**layer._modules, "self_attn": converted_attention(layer.self_attn, spec, factors)}
    return changed
