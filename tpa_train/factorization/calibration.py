"""What calibration text says about keys and values, gathered in one streaming pass of the Trainer.

Per layer and KV head, sums in float64:

* keys: how much an error of a key costs the model's *output*. For labels sampled from the model's own distribution,
  the gradient g_s of the log-likelihood with respect to key s has E[g gᵀ] = the Fisher information, whose quadratic
  form is the KL of a small error (Martens, arXiv:1412.1193, §9.2). The sum over tokens is kept in Kronecker-factored
  form: a metric M = Σ g_s g_sᵀ and a second moment C = Σ w_s k̃_s k̃_sᵀ of k̃ = k / rms(k), with w_s the size of g_s in
  that metric. RoPE, attention and everything above the layer are inside the gradient. On the 270M this takes the KL of
  keys truncated to rank 48 from .210 (metric of attention logits) to .138.
* attention outputs: their Fisher information by the same gradients, the metric of the layer-wise recovery;
* values: weight, mean and second moment of v under Σ_t a_ts² — the squared attention, because errors of different
  tokens add up independently in an attention output;
* keys and values of all heads together (``factorization.stacked``), under the heads' mean weights, for factors that
  heads, or keys and values, share; and a sample of the layer's inputs, for fits without a closed form.

The squared attention needs no hand-written softmax: the gradient of the attention output with respect to the values,
for an output gradient of independent random signs, has mean square Σ_t a_ts².
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn

from tpa_train.distillation.losses import chunk_tokens, head_logits
from tpa_train.distributed.processes import gather_rows, gathered, rank, sum_over_processes, world_size
from tpa_train.errors import UserError
from tpa_train.gemma3.attention import Attention, AttentionContext, attend
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import Gemma3ForCausalLM

SAMPLE_EVERY, SAMPLE_LIMIT = 8, 8192  # tokens kept of a layer's inputs: every so-many-th, at most so many
LEVERAGE_FLOOR = 1e-6  # of the metric's mean eigenvalue; a batch smaller than head_dim leaves directions unseen


@dataclass
class LayerMoments:
    """Sums of one layer, float64 (the sample: float32). G KV heads, d head_dim, D hidden size, T sampled tokens."""

    output_fisher: Tensor  # [D, D], with respect to the attention's output (before the post-attention norm), nats
    cross_fisher: Tensor  # [G, d, G, d], with respect to k̃ of all heads (before 1 + w_k and RoPE), nats
    key_weight: Tensor  # [G]
    key_first: Tensor  # [G, d]
    key_second: Tensor  # [G, d, d]
    value_weight: Tensor  # [G]
    value_first: Tensor  # [G, d]
    value_second: Tensor  # [G, d, d]
    # y = [k; v], raw keys and values of all heads, [2·G·d]; s the root mean square of a token's keys over all heads
    shared_key_weight: Tensor  # []
    shared_key_second: Tensor  # [2Gd, 2Gd], Σ w_K y yᵀ / s²
    shared_value_weight: Tensor  # []
    shared_value_first: Tensor  # [2Gd], Σ w_V y
    shared_value_second: Tensor  # [2Gd, 2Gd], Σ w_V y yᵀ
    norm_ratio: Tensor  # [G], Σ w_K (s / rms_g)²: turns the metric of k̃ into that of k / s
    sample_x: Tensor  # [T, D], the attention's input
    sample_key_weight: Tensor  # [T]
    sample_value_weight: Tensor  # [T]

    @classmethod
    def zeros(cls, config: Gemma3Config, device: torch.device | str = "cpu") -> LayerMoments:
        g, d, width = config.num_kv_heads, config.head_dim, config.hidden_size
        y = 2 * g * d
        sums = ((width, width), (g, d, g, d), (g,), (g, d), (g, d, d), (g,), (g, d), (g, d, d))
        shared = ((), (y, y), (), (y,), (y, y), (g,))
        made = [torch.zeros(s, dtype=torch.float64, device=device) for s in sums + shared]
        return cls(*made, *(torch.zeros(s, device=device) for s in ((0, width), (0,), (0,))))

    @property
    def key_fisher(self) -> Tensor:
        """Each head's own block [G, d, d] of the Fisher information."""
        return torch.einsum("gdge->gde", self.cross_fisher)

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def sums(self) -> dict[str, Tensor]:
        """Returns what adds up over processes: all but the sample."""
        return {name: tensor for name, tensor in vars(self).items() if not name.startswith("sample_")}

    def on_host(self, layer: int) -> LayerMoments:
        """Returns a copy on the CPU.

        Raises:
            UserError: a moment of ``layer`` is not finite.
        """
        if not all(bool(torch.isfinite(t).all()) for t in self.tensors().values()):
            raise UserError(f"calibration of layer {layer} gave non-finite moments; the model's weights overflow.")
        return LayerMoments(**{name: tensor.cpu() for name, tensor in self.tensors().items()})

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
        out = attend(q, k, probe, attention.config.scale, attention.window, context.documents, context.images)
        signs = _signs(out.shape, generator)
        (gradient,) = torch.autograd.grad(out, probe, (2 * signs - 1).to(out.dtype))
    return gradient.to(accumulation_dtype(gradient.dtype)).square().mean(-1)


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns random bits, int8."""
    return torch.randint(0, 2, shape, generator=generator, device=generator.device, dtype=torch.int8)


def add_values(moments: LayerMoments, v: Tensor, weight: Tensor) -> None:
    """Adds values [T, G, d] with weights [T, G], float64, to ``moments``."""
    weighted = v * weight[..., None]
    moments.value_weight += weight.sum(0)
    moments.value_first += weighted.sum(0)
    moments.value_second += torch.einsum("tgd,tge->gde", weighted, v)


def add_keys(moments: LayerMoments, k: Tensor, gradient: Tensor) -> Tensor:
    """Adds normalised keys k̃ [T, G, d] and the log-likelihood's gradients with respect to them, float64.

    Returns:
        Each token's weight [T, G].
    """
    crossed = torch.einsum("tgd,the->gdhe", gradient, gradient)
    fisher = torch.einsum("gdge->gde", crossed)
    # A token counts by the size of its gradient measured in the metric itself (its leverage), so that the product of
    # metric and moment reproduces the total cost.
    floor = torch.diagonal(fisher, dim1=-2, dim2=-1).mean(-1)[:, None, None] * LEVERAGE_FLOOR
    ridge = fisher + floor.clamp_min(torch.finfo(fisher.dtype).tiny) * torch.eye(k.shape[-1], device=k.device)
    weight = torch.einsum("tgd,gde,tge->tg", gradient, torch.linalg.inv(ridge), gradient).clamp_min(0)
    # The floor keeps the moment defined for a model so sure of itself that no key matters.
    weight = weight * (k.shape[0] / k.shape[-1]) + LEVERAGE_FLOOR
    weighted = k * weight[..., None]
    moments.cross_fisher += crossed
    moments.key_weight += weight.sum(0)
    moments.key_first += weighted.sum(0)
    moments.key_second += torch.einsum("tgd,tge->gde", weighted, k)
    return weight


def add_shared(moments: LayerMoments, k: Tensor, v: Tensor, key_weight: Tensor, value_weight: Tensor) -> None:
    """Adds raw keys and values [T, G, d] of all heads under the heads' mean weights (weights [T, G]), float64."""
    key_weight, value_weight = key_weight.mean(-1), value_weight.mean(-1)
    square = k.square().mean(-1)  # [T, G]
    scale = square.mean(-1).clamp_min(torch.finfo(k.dtype).tiny)  # s²
    y = torch.cat((k.flatten(1), v.flatten(1)), dim=1)
    moments.shared_key_weight += key_weight.sum()
    moments.shared_key_second += (y * (key_weight / scale)[:, None]).T @ y
    moments.shared_value_weight += value_weight.sum()
    moments.shared_value_first += (y * value_weight[:, None]).sum(0)
    moments.shared_value_second += (y * value_weight[:, None]).T @ y
    ratio = scale[:, None] / square.clamp_min(torch.finfo(k.dtype).tiny)
    moments.norm_ratio += (key_weight[:, None] * ratio).sum(0)


def keep_sample(moments: LayerMoments, x: Tensor, key_weight: Tensor, value_weight: Tensor) -> None:
    """Keeps every so-many-th token of the inputs ``x`` [T, D] with its weights [T, G], up to the limit."""
    room = SAMPLE_LIMIT - moments.sample_x.shape[0]
    pick = slice(SAMPLE_EVERY - 1, SAMPLE_EVERY * room, SAMPLE_EVERY)
    if room <= 0:
        return
    for name, tensor in (("x", x), ("key_weight", key_weight.mean(-1)), ("value_weight", value_weight.mean(-1))):
        kept = getattr(moments, f"sample_{name}")
        setattr(moments, f"sample_{name}", torch.cat((kept, tensor[pick].to(kept.dtype))))


@torch.no_grad()
def add_layer(
    moments: LayerMoments,
    attention: Attention,
    record: _Record,
    key_gradient: Tensor,
    output_gradient: Tensor,
    context: AttentionContext,
    generator: torch.Generator,
) -> None:
    """Adds one layer's forward and backward pass to its ``moments``.

    Args:
        moments: added to.
        attention: the dense layer.
        record: of the forward pass.
        key_gradient: [B, L, G, d], of the log-likelihood with respect to ``record.key_probe``.
        output_gradient: [B, L, D], with respect to ``record.output_probe``.
        context: of the forward pass.
        generator: for random signs.
    """
    output = output_gradient.flatten(0, 1).double()
    moments.output_fisher += output.T @ output
    shape = (attention.config.num_kv_heads, attention.config.head_dim)
    raw = record.raw_keys.to(accumulation_dtype(record.raw_keys.dtype))
    k = raw * torch.rsqrt(raw.square().mean(-1, keepdim=True) + attention.k_norm.eps)
    # The probe sits behind the norm's weight; the metric is that of k̃ before it.
    gradient = key_gradient * (1.0 + attention.k_norm.weight)
    key_weight = add_keys(moments, k.flatten(0, 1).double(), gradient.flatten(0, 1).double())
    weight = squared_attention_received(attention, record.input, context, generator).flatten(0, 1).double()
    v = attention.v_proj(record.input).unflatten(-1, shape).flatten(0, 1).double()
    add_values(moments, v, weight)
    add_shared(moments, raw.flatten(0, 1).double(), v, key_weight, weight)
    keep_sample(moments, record.input.flatten(0, 1), key_weight, weight)


def _uniform(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.rand(count, 1, generator=generator, dtype=dtype, device=generator.device)


def _sample(p: Tensor, generator: torch.Generator) -> Tensor:
    """Returns one index [N] a row of probabilities [N, V], by inverting the cumulative sum.

    Faster than ``torch.multinomial`` by far over 262 144 choices on a CPU, where it took a fifth of the calibration.
    """
    total = p.cumsum(-1)
    u = _uniform(p.shape[0], p.dtype, generator) * total[:, -1:]
    return torch.searchsorted(total, u, right=True).clamp_max(p.shape[-1] - 1).squeeze(-1)


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
        label = _sample(p, generator)
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

    Image tokens count with their keys and values; their own outputs, which nobody reads, do not.

    After the pass ``result`` holds the ``Calibration``, summed over all processes. Each process reads all batches and
    works on every n-th one; from the others it takes the random numbers, so that what it draws for its own batches is
    what a single process draws for them.
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
        self._sampled: list[int] = []  # tokens kept of each of this process's batches
        self._generator = torch.Generator(device=self.device).manual_seed(self.seed)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        ids = batch["token_ids"]
        self._context = max(self._context, ids.shape[1])
        if batch_idx % world_size() != rank():
            self._skip(ids)
            return
        kept = self._kept()
        with torch.no_grad():
            x, context = self.model.begin(batch)
            x = self.model.run_layers(x, context, stop=self.layers[0])
        with probes(self.model.layers, self.layers) as records, torch.enable_grad():
            x = self.model.run_layers(x.requires_grad_(), context, start=self.layers[0])
            # Every so-many-th position's label, weighted up: the head costs more than the layers of a small model.
            every = min(self.score_every, ids.shape[1])
            hidden = self.model.norm(x)[:, every - 1 :: every].flatten(0, 1)
            with torch.autocast(self.device.type, enabled=False):
                score = sampled_score(hidden.detach(), self.model.head_weight, self._generator) * every**0.5
            if context.images is not None:
                score = score * context.images.text[:, every - 1 :: every].flatten()[:, None]
            zeros = [p for i in self.layers for p in (records[i].key_probe, records[i].output_probe)]
            gradients = torch.autograd.grad(hidden, zeros, score)
        for index, keys, output in zip(self.layers, gradients[::2], gradients[1::2], strict=True):
            attention = self.model.layers[index].self_attn
            add_layer(self._moments[index], attention, records[index], keys, output, context, self._generator)
        self._tokens += ids.numel()
        self._sampled.append(self._kept() - kept)

    def _kept(self) -> int:
        return self._moments[self.layers[0]].sample_x.shape[0]

    def _skip(self, ids: Tensor) -> None:
        """Draws the random numbers that ``validation_step`` draws for a batch, in the same order and shapes."""
        config, head = self.model.config, self.model.head_weight
        every = min(self.score_every, ids.shape[1])
        scored = ids.shape[0] * (ids.shape[1] // every)
        step = chunk_tokens(head.shape[0], head.device, head.dtype)
        for start in range(0, scored, step):
            _uniform(min(step, scored - start), accumulation_dtype(head.dtype), self._generator)
        for _ in self.layers:
            _signs((*ids.shape, config.num_heads, config.head_dim), self._generator)

    def on_validation_end(self) -> None:
        if world_size() > 1:
            self._tokens = sum(gathered(self._tokens))
            counts = gathered(self._sampled)
            for moments in self._moments.values():
                for tensor in moments.sums().values():
                    sum_over_processes(tensor)
                for name in [n for n in moments.tensors() if n not in moments.sums()]:  # all gather in one order
                    parts = [t.split(n) for t, n in zip(gather_rows(getattr(moments, name)), counts, strict=True)]
                    setattr(moments, name, torch.cat(in_turn(parts))[:SAMPLE_LIMIT])
        self.result = self.collected()

    def collected(self) -> Calibration:
        """Returns what this process has gathered, on the CPU.

        Raises:
            UserError: the moments are not finite.
        """
        cpu = {i: moments.on_host(i) for i, moments in self._moments.items()}
        return Calibration(cpu, self._tokens, self._context)


def in_turn(dealt: list[Sequence[Tensor]]) -> list[Tensor]:
    """Returns what was dealt to the processes one by one, in the order before dealing."""
    return [part for turn in itertools.zip_longest(*dealt) for part in turn if part is not None]


@dataclass
class _Record:
    """One layer in one forward pass."""

    input: Tensor  # [B, L, D]
    raw_keys: Tensor  # [B, L, G, d], before QK-norm
    key_probe: Tensor  # zeros [B, L, G, d] added to the normalised keys, to differentiate by
    output_probe: Tensor | None = None  # zeros [B, L, D] added to the attention's output


@contextmanager
def probes(blocks: Mapping[int, nn.Module] | nn.ModuleList, layers: list[int]) -> Iterator[dict[int, _Record]]:
    """Records inputs and keys of ``layers`` among the decoder layers ``blocks``, and adds differentiable zeros.

    The zeros are added to the normalised keys and to the attention's output.
    """
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
        attention = blocks[index].self_attn
        handles.append(attention.register_forward_pre_hook(before(index)))
        handles.append(attention.k_norm.register_forward_hook(behind_norm(index)))
        handles.append(attention.register_forward_hook(behind_attention(index)))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
