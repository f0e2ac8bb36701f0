"""Second moments of keys, queries and values, gathered in one streaming pass of the Trainer over calibration text.

Per layer and KV head (DESIGN §4), all in float64:

* keys: C = Σ_s m_s k̃_s k̃_sᵀ with k̃ = k / rms(k) and m_s the attention that token s receives, and their mean;
* queries: E[q̂ q̂ᵀ] before RoPE, summed over the query heads of the group;
* values: weight, mean and second moment of v under Σ_t a_ts² — the squared attention, because errors of different
  tokens add up independently in an attention output.

The attention received needs no hand-written softmax: it is the gradient of the attention output with respect to the
values. An output gradient of ones gives the column sums Σ_t a_ts; independent random signs give numbers whose mean
square is Σ_t a_ts², so one backward pass through one kernel yields both.
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.attention import Attention, AttentionContext, attend
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import Gemma3ForCausalLM


@dataclass
class LayerMoments:
    """Sums of one layer, float64. G KV heads, d head_dim."""

    key_weight: Tensor  # [G]
    key_first: Tensor  # [G, d]
    key_second: Tensor  # [G, d, d]
    query_count: Tensor  # [G]
    query_second: Tensor  # [G, d, d]
    value_weight: Tensor  # [G]
    value_first: Tensor  # [G, d]
    value_second: Tensor  # [G, d, d]

    @classmethod
    def zeros(cls, config: Gemma3Config, device: torch.device | str = "cpu") -> LayerMoments:
        g, d = config.num_kv_heads, config.head_dim
        shapes = ((g,), (g, d), (g, d, d), (g,), (g, d, d), (g,), (g, d), (g, d, d))
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


def attention_received(
    attention: Attention, x: Tensor, context: AttentionContext, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns Σ_t a_ts and an unbiased estimate of Σ_t a_ts², each [B, L, G], summed over a group's query heads.

    Args:
        attention: a dense layer.
        x: its input [B, L, D].
        context: of the forward pass.
        generator: for the random signs (d - 1 independent ones, so the estimate is good to √(2/d)).
    """
    rotary = context.rotary[attention.kind]
    with torch.no_grad():
        q = attention.queries(x, rotary)
        k, v = attention.write(x, rotary)
    with torch.enable_grad():
        probe = torch.zeros_like(v).requires_grad_()
        out = attend(q, k, probe, attention.config.scale, attention.window, context.documents)
        signs = torch.randint(0, 2, out.shape, generator=generator, device=out.device, dtype=torch.int8)
        direction = (2 * signs - 1).to(out.dtype)
        direction[..., 0] = 1
        (gradient,) = torch.autograd.grad(out, probe, direction)
    gradient = gradient.to(accumulation_dtype(gradient.dtype))
    return gradient[..., 0], gradient[..., 1:].square().mean(-1)


@torch.no_grad()
def accumulate(
    moments: LayerMoments, attention: Attention, x: Tensor, context: AttentionContext, generator: torch.Generator
) -> None:
    """Adds the tokens ``x`` [B, L, D] (inputs of ``attention``) to ``moments``."""
    config = attention.config
    groups, dim = config.num_kv_heads, config.head_dim
    mass, square_mass = attention_received(attention, x, context, generator)
    q = attention.q_norm(attention.q_proj(x).unflatten(-1, (config.num_heads, dim)))
    k = attention.k_proj(x).unflatten(-1, (groups, dim))
    k = k.to(accumulation_dtype(k.dtype))
    k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + attention.k_norm.eps)
    v = attention.v_proj(x).unflatten(-1, (groups, dim))
    q, k, v, mass, square_mass = (t.flatten(0, 1).double() for t in (q, k, v, mass, square_mass))
    q = q.unflatten(1, (groups, -1))  # [T, G, H/G, d]
    moments.key_weight += mass.sum(0)
    received = k * mass[..., None]
    moments.key_first += received.sum(0)
    moments.key_second += torch.einsum("tgd,tge->gde", received, k)
    moments.query_count += float(q.shape[0])
    moments.query_second += torch.einsum("tghd,tghe->gde", q, q)
    weighted = v * square_mass[..., None]
    moments.value_weight += square_mass.sum(0)
    moments.value_first += weighted.sum(0)
    moments.value_second += torch.einsum("tgd,tge->gde", weighted, v)


class CalibrationModule(L.LightningModule):
    """Runs the original model over text and gathers the moments of ``layers``; use with ``Trainer.validate``.

    Args:
        model: the dense model.
        layers: indices of the layers to calibrate.
        seed: of the random signs.

    After the pass ``result`` holds the ``Calibration``, summed over all processes.
    """

    def __init__(self, model: Gemma3ForCausalLM, layers: list[int], seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.layers = sorted(layers)
        self.seed = seed
        self.result: Calibration | None = None

    def on_validation_start(self) -> None:
        config = self.model.config
        self._moments = {i: LayerMoments.zeros(config, self.device) for i in self.layers}
        self._tokens, self._context = 0, 0
        self._generator = torch.Generator(device=self.device).manual_seed(self.seed + self.global_rank)
        self._hooks = [
            self.model.layers[i].self_attn.register_forward_pre_hook(self._hook(i)) for i in self.layers
        ]

    def _hook(self, index: int):
        def gather(attention: Attention, args: tuple) -> None:
            accumulate(self._moments[index], attention, args[0], args[1], self._generator)

        return gather

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        ids = batch["token_ids"]
        context = self.model.context(ids, batch.get("document_ids"))
        self.model.run_layers(self.model.embed(ids), context, stop=self.layers[-1] + 1)
        self._tokens += ids.numel()
        self._context = max(self._context, ids.shape[1])

    def on_validation_end(self) -> None:
        for hook in self._hooks:
            hook.remove()
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
