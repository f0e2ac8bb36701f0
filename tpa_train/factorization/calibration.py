"""What calibration text says about keys and values, gathered in one streaming pass of the Trainer.

Per layer and KV head, sums in float64:

* keys: how much an error of a key costs the model's *output*. For labels sampled from the model's own distribution,
  the gradient g_s of the log-likelihood with respect to key s has E[g gᵀ] = the Fisher information, whose quadratic
  form is the KL of a small error (Martens, arXiv:1412.1193, §9.2). The sum over tokens is kept in Kronecker-factored
  form: a metric M = Σ g_s g_sᵀ and a second moment C = Σ w_s k̃_s k̃_sᵀ of k̃ = k / rms(k), with w_s the size of g_s in
  that metric. RoPE, attention and everything above the layer are inside the gradient. On the 270M this takes the KL of
  keys truncated to rank 48 from .210 (metric of attention logits, DESIGN §4) to .138.
* attention outputs: their Fisher information by the same gradients, the metric of the layer-wise recovery;
* values: weight, mean and second moment of v under Σ_t a_ts² — the squared attention, because errors of different
  tokens add up independently in an attention output.

The squared attention needs no hand-written softmax: the gradient of the attention output with respect to the values,
for an output gradient of independent random signs, has mean square Σ_t a_ts².
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from tpa_train.distillation.losses import chunk_tokens, head_logits
from tpa_train.errors import UserError
from tpa_train.gemma3.attention import Attention, AttentionContext, attend
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import Gemma3ForCausalLM

LEVERAGE_FLOOR = 1e-6  # of the metric's mean eigenvalue; a batch smaller than head_dim leaves directions unseen


@dataclass
class LayerMoments:
    """Sums of one layer, float64. G KV heads, d head_dim, D hidden size."""

    output_fisher: Tensor  # [D, D], with respect to the attention's output (before the post-attention norm), nats
    key_fisher: Tensor  # [G, d, d], with respect to k̃ (before 1 + w_k and RoPE), nats
    key_weight: Tensor  # [G]
    key_first: Tensor  # [G, d]
    key_second: Tensor  # [G, d, d]
    value_weight: Tensor  # [G]
    value_first: Tensor  # [G, d]
    value_second: Tensor  # [G, d, d]

    @classmethod
    def zeros(cls, config: Gemma3Config, device: torch.device | str = "cpu") -> LayerMoments:
        g, d, width = config.num_kv_heads, config.head_dim, config.hidden_size
        shapes = ((width, width), (g, d, d), (g,), (g, d), (g, d, d), (g,), (g, d), (g, d, d))
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def value_covariance(self) -> tuple[Tensor, Tensor]:
        """Returns the mean [G, d] and covariance [G, d, d] of the values under squared attention."""
        mean = self.value_first / self.value_weight[:, None]
        second = self.value_second / self.value_weight[:, None, None]
        return mean, second - mean[:, :, None] * mean[:, None, :]


@dataclass
class Calibration:
    """Moments of every calibrated layer and the number of tokens they were gathered on."""

    layers: dict[int, LayerMoments]
    tokens: int
    context: int  # the longest distance that the calibration text could show

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns a flat dict for safetensors."""
        flat = {f"{i}.{n}": t.cpu() for i, m in self.layers.items() for n, t in m.tensors().items()}
        return flat | {"tokens": torch.tensor(self.tokens), "context": torch.tensor(self.context)}

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> Calibration:
        layers: dict[int, dict[str, Tensor]] = {}
        for name, tensor in flat.items():
            if "." in name:
                index, key = name.split(".")
                layers.setdefault(int(index), {})[key] = tensor
        moments = {i: LayerMoments(**layers[i]) for i in sorted(layers)}
        return cls(moments, int(flat["tokens"]), int(flat["context"]))


def squared_attention_received(
    attention: Attention, x: Tensor, context: AttentionContext, generator: torch.Generator
) -> Tensor:
    """Returns an unbiased estimate of Σ_t a_ts², [B, L, G], summed over a group's query heads.

    Args:
        attention: a dense layer.
        x: its input [B, L, D].
        context: of the forward pass.
        generator: for the random signs (d independent ones, so the estimate is good to √(2/d)).
    """
    rotary = context.rotary[attention.kind]
    with torch.no_grad():
        q = attention.queries(x, rotary)
        k, v = attention.write(x, rotary)
    with torch.enable_grad():
        probe = torch.zeros_like(v).requires_grad_()
        out = attend(q, k, probe, attention.config.scale, attention.window, context.documents)
        signs = torch.randint(0, 2, out.shape, generator=generator, device=out.device, dtype=torch.int8)
        (gradient,) = torch.autograd.grad(out, probe, (2 * signs - 1).to(out.dtype))
    return gradient.to(accumulation_dtype(gradient.dtype)).square().mean(-1)


def add_values(moments: LayerMoments, v: Tensor, weight: Tensor) -> None:
    """Adds values [T, G, d] with weights [T, G], float64, to ``moments``."""
    weighted = v * weight[..., None]
    moments.value_weight += weight.sum(0)
    moments.value_first += weighted.sum(0)
    moments.value_second += torch.einsum("tgd,tge->gde", weighted, v)


def add_keys(moments: LayerMoments, k: Tensor, gradient: Tensor) -> None:
    """Adds normalised keys k̃ [T, G, d] and the log-likelihood's gradients with respect to them, float64."""
    fisher = torch.einsum("tgd,tge->gde", gradient, gradient)
    # A token counts by the size of its gradient measured in the metric itself (its leverage), so that the product of
    # metric and moment reproduces the total cost.
    floor = torch.diagonal(fisher, dim1=-2, dim2=-1).mean(-1)[:, None, None] * LEVERAGE_FLOOR
    ridge = fisher + floor.clamp_min(torch.finfo(fisher.dtype).tiny) * torch.eye(k.shape[-1], device=k.device)
    weight = torch.einsum("tgd,gde,tge->tg", gradient, torch.linalg.inv(ridge), gradient).clamp_min(0)
    # The floor keeps the moment defined for a model so sure of itself that no key matters.
    weight = weight * (k.shape[0] / k.shape[-1]) + LEVERAGE_FLOOR
    weighted = k * weight[..., None]
    moments.key_fisher += fisher
    moments.key_weight += weight.sum(0)
    moments.key_first += weighted.sum(0)
    moments.key_second += torch.einsum("tgd,tge->gde", weighted, k)


@torch.no_grad()
def sampled_score(hidden: Tensor, head: Tensor, generator: torch.Generator) -> Tensor:
    """Returns ∂ log p(y) / ∂h [N, D] for labels y drawn from the model's own p = softmax(h Wᵀ).

    Args:
        hidden: final hidden states [N, D].
        head: W [V, D].
        generator: draws the labels.
    """
    step = chunk_tokens(head.shape[0], hidden.device, head.dtype)
    scores = []
    for part in hidden.split(step):
        p = head_logits(part, head).softmax(-1)
        label = torch.multinomial(p, 1, generator=generator).squeeze(-1)
        expected = p.to(head.dtype) @ head
        scores.append(head[label].to(p.dtype) - expected.to(p.dtype))
    return torch.cat(scores).to(hidden.dtype)


class CalibrationModule(L.LightningModule):
    """Runs the original model over text and gathers the moments of ``layers``; use with ``Trainer.validate``.

    Args:
        model: the dense model.
        layers: indices of the layers to calibrate.
        seed: of the sampled labels and random signs.
        score_every: a label is sampled at every so-many-th position.

    After the pass ``result`` holds the ``Calibration``, summed over all processes.
    """

    def __init__(self, model: Gemma3ForCausalLM, layers: list[int], seed: int = 0, score_every: int = 4) -> None:
        super().__init__()
        self.model = model
        self.layers = sorted(layers)
        self.seed, self.score_every = seed, score_every
        self.result: Calibration | None = None

    def on_validation_start(self) -> None:
        config = self.model.config
        self._moments = {i: LayerMoments.zeros(config, self.device) for i in self.layers}
        self._tokens, self._context = 0, 0
        self._generator = torch.Generator(device=self.device).manual_seed(self.seed + self.global_rank)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        ids = batch["token_ids"]
        with torch.no_grad():
            context = self.model.context(ids, batch.get("document_ids"))
            x = self.model.run_layers(self.model.embed(ids), context, stop=self.layers[0])
        with _probes(self.model, self.layers) as records, torch.enable_grad():
            x = self.model.run_layers(x.requires_grad_(), context, start=self.layers[0])
            # Every so-many-th position's label, weighted up: the head costs more than the layers of a small model.
            every = min(self.score_every, ids.shape[1])
            hidden = self.model.norm(x)[:, every - 1 :: every].flatten(0, 1)
            with torch.autocast(self.device.type, enabled=False):
                score = sampled_score(hidden.detach(), self.model.head_weight, self._generator) * every**0.5
            probes = [p for i in self.layers for p in (records[i].key_probe, records[i].output_probe)]
            gradients = torch.autograd.grad(hidden, probes, score)
        for index, keys, output in zip(self.layers, gradients[::2], gradients[1::2], strict=True):
            output = output.flatten(0, 1).double()
            self._moments[index].output_fisher += output.T @ output
            self._accumulate(index, records[index], keys, context)
        self._tokens += ids.numel()
        self._context = max(self._context, ids.shape[1])

    @torch.no_grad()
    def _accumulate(self, index: int, record: _Record, gradient: Tensor, context: AttentionContext) -> None:
        attention, moments = self.model.layers[index].self_attn, self._moments[index]
        shape = (attention.config.num_kv_heads, attention.config.head_dim)
        k = record.raw_keys.to(accumulation_dtype(record.raw_keys.dtype))
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + attention.k_norm.eps)
        # The probe sits behind the norm's weight; the metric is that of k̃ before it.
        gradient = gradient * (1.0 + attention.k_norm.weight)
        add_keys(moments, k.flatten(0, 1).double(), gradient.flatten(0, 1).double())
        weight = squared_attention_received(attention, record.input, context, self._generator)
        v = attention.v_proj(record.input).unflatten(-1, shape)
        add_values(moments, v.flatten(0, 1).double(), weight.flatten(0, 1).double())

    def on_validation_end(self) -> None:
        total = torch.tensor(float(self._tokens), dtype=torch.float64, device=self.device)
        reduce = self.trainer.strategy.reduce
        if self.trainer.world_size > 1:
            total = reduce(total, reduce_op="sum")
            for moments in self._moments.values():
                for name, tensor in moments.tensors().items():
                    setattr(moments, name, reduce(tensor, reduce_op="sum"))
        for index, moments in self._moments.items():
            if not all(bool(torch.isfinite(t).all()) for t in moments.tensors().values()):
                raise UserError(f"calibration of layer {index} gave non-finite moments; the model's weights overflow.")
        cpu = {
            i: LayerMoments(**{n: t.cpu() for n, t in m.tensors().items()}) for i, m in self._moments.items()
        }
        self.result = Calibration(cpu, int(total.item()), self._context)


@dataclass
class _Record:
    """One layer in one forward pass."""

    input: Tensor  # [B, L, D]
    raw_keys: Tensor  # [B, L, G, d], before QK-norm
    key_probe: Tensor  # zeros [B, L, G, d] added to the normalised keys, to differentiate by
    output_probe: Tensor | None = None  # zeros [B, L, D] added to the attention's output


@contextmanager
def _probes(model: Gemma3ForCausalLM, layers: list[int]) -> Iterator[dict[int, _Record]]:
    """Records the layers' inputs and keys, and adds differentiable zeros to their normalised keys and outputs."""
    records: dict[int, _Record] = {}
    inputs: dict[int, Tensor] = {}

    def before(index: int):
        def hook(_module, args: tuple) -> None:
            inputs[index] = args[0].detach()

        return hook

    def behind_norm(index: int):
        def hook(_module, args: tuple, output: Tensor) -> Tensor:
            probe = torch.zeros_like(output).requires_grad_()
            records[index] = _Record(inputs[index], args[0].detach(), probe)
            return output + probe

        return hook

    def behind_attention(index: int):
        def hook(_module, args: tuple, output: Tensor) -> Tensor:
            records[index].output_probe = torch.zeros_like(output).requires_grad_()
            return output + records[index].output_probe

        return hook

    handles = []
    for index in layers:
        attention = model.layers[index].self_attn
        handles.append(attention.register_forward_pre_hook(before(index)))
        handles.append(attention.k_norm.register_forward_hook(behind_norm(index)))
        handles.append(attention.register_forward_hook(behind_attention(index)))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
