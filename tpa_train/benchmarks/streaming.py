"""A model of any size is calibrated and factorized with one decoder layer on the device at a time.

The whole set of layers is never held: ``tpa_train.factorization.streaming`` loads each twice. What is measured is the
toolkit's own work: a layer's weights are random and made on the device, where a checkpoint's would be read from disk.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_train.benchmarks.sizes import GIB, check_positive, first_layers
from tpa_train.cli import choose_device
from tpa_train.errors import UserError
from tpa_train.evaluation.report import table
from tpa_train.factorization.calibration import LayerMoments
from tpa_train.factorization.streaming import StreamingCost, factorize_streaming
from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.config import SIZES, Gemma3Config
from tpa_train.gemma3.layers import RMSNorm, accumulation_dtype
from tpa_train.gemma3.model import DecoderLayer
from tpa_train.settings import TrainerSettings
from tpa_train.trainers import Machine

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class StreamingSettings:
    """Options of ``benchmark.py streaming``."""

    size: str = field(default="27b", metadata={"help": "whose shapes the layers have.", "choices": tuple(SIZES)})
    layers: int | None = field(
        default=None,
        metadata={"help": "run only the first so many layers, every 6th of which is global; null: all."},
    )
    tokens: int = field(default=4096, metadata={"help": "random tokens to calibrate on, a multiple of context."})
    context: int = field(default=2048, metadata={"help": "tokens of a row."})
    batch_size: int = field(default=1, metadata={"help": "rows that go through a layer together."})
    rank: int | None = field(
        default=None, metadata={"help": "of the latent keys and values; null: a quarter of head_dim."}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "of the weights.", "choices": tuple(DTYPES)})
    kept: str = field(
        default="float32",
        metadata={"help": "of the layer inputs that wait in the host's memory.", "choices": tuple(DTYPES)},
    )
    score_every: int = field(default=4, metadata={"help": "a label is sampled at every so-many-th position."})
    seed: int = field(default=0, metadata={"help": "decides weights and tokens."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; null: an accelerator if there is one."})


class RandomWeights:
    """Seeded random weights of ``config``'s shapes: the same ones whenever a layer is asked for.

    Matrices keep the size of what goes through (std 1/√inputs), norms have gain 1, and embeddings (the head) std 1/√D:
    scaled by √D they enter with size 1, and logits have size 1.
    """

    def __init__(self, config: Gemma3Config, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.config, self.dtype, self.device, self.seed = config, dtype, device, seed

    @torch.no_grad()
    def layer(self, index: int) -> DecoderLayer:
        """Makes decoder layer ``index`` on the device."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config, Attention(self.config, index)).to(self.dtype)
        layer.to_empty(device=self.device)
        generator = self._generator(index)
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        return layer

    def embedding(self) -> Tensor:
        """Makes the tied embedding [V, D] on the device."""
        weight = torch.empty(self.config.vocab_size, self.config.hidden_size, dtype=self.dtype, device=self.device)
        return weight.normal_(0.0, self.config.hidden_size**-0.5, generator=self._generator(self.config.num_layers))

    def head(self) -> tuple[RMSNorm, Tensor]:
        """Makes the final norm and the head [V, D]."""
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps).to(self.device), self.embedding()

    def hidden(self, tokens: int, context: int, batch_size: int) -> list[Tensor]:
        """Returns the embeddings of random tokens on the CPU, batches [B, L, D] of the residual stream's dtype."""
        generator = self._generator(self.config.num_layers + 1)
        ids = torch.randint(
            self.config.vocab_size, (tokens // context, context), generator=generator, device=self.device
        )
        x = F.embedding(ids, self.embedding()).to("cpu", accumulation_dtype(self.dtype))
        return list((x * self.config.hidden_size**0.5).split(batch_size))

    def _generator(self, part: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed * 4096 + part)


class FactorCheck:
    """A sink that counts bytes, as if stored in bfloat16, and refuses what is not finite."""

    def __init__(self) -> None:
        self.nbytes: dict[int, int] = {}

    def __call__(self, index: int, factors: dict[str, Tensor], moments: LayerMoments) -> None:
        for name, tensor in factors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{name} is not finite; the random weights of seed= overflow, try another.")
        self.nbytes[index] = sum(2 * tensor.numel() for tensor in factors.values())


def run(settings: StreamingSettings) -> list[dict[str, Any]]:
    """Measures ``settings.size``; returns a row per layer, one of the head and a summary.

    Raises:
        UserError: an option is at fault.
    """
    return measure(SIZES[settings.size], settings)


def measure(config: Gemma3Config, settings: StreamingSettings) -> list[dict[str, Any]]:
    """As ``run``, with the shapes of ``config`` whatever ``settings.size`` says."""
    config = _cut(config, settings)
    device = choose_device(settings.device)
    weights = RandomWeights(config, DTYPES[settings.dtype], device, settings.seed)
    hidden = weights.hidden(settings.tokens, settings.context, settings.batch_size)
    rank, sink = settings.rank or config.head_dim // 4, FactorCheck()
    cost = factorize_streaming(
        config, weights.layer, weights.head, hidden, rank, rank, sink, device=device, seed=settings.seed,
        score_every=settings.score_every, kept_dtype=DTYPES[settings.kept], progress=sys.stderr.isatty(),
    )  # fmt: skip
    return rows_of(cost, sink, rank)


def rows_of(cost: StreamingCost, sink: FactorCheck, rank: int) -> list[dict[str, Any]]:
    """Returns the measurements as flat rows; ``row`` says of what."""
    rows = [
        {"row": "layer", **dataclasses.asdict(c), "seconds": c.seconds, "factor_bytes": sink.nbytes[c.layer]}
        for c in cost.layers
    ]
    weights, layers = sum(c.weight_bytes for c in cost.layers), len(cost.layers)
    seconds = [c.seconds for c in cost.layers]
    summary = {
        "row": "summary", "layers": layers, "tokens": cost.tokens, "rank": rank,
        "seconds_per_layer": sum(seconds) / layers,
        "seconds": sum(seconds) + cost.head.load_seconds + cost.head.score_seconds,
        "peak_gib": cost.peak_gib, "layers_peak_gib": max(c.peak_gib for c in cost.layers),
        "weights_gib": weights / GIB, "head_gib": cost.head.weight_bytes / GIB,
        "factors_gib": sum(sink.nbytes.values()) / GIB, "kept_gib": cost.kept_bytes / GIB,
        "host_peak_gib": Machine(torch.device("cpu"), torch.float32, TrainerSettings()).peak_gib(),
    }  # fmt: skip
    return [*rows, {"row": "head", **dataclasses.asdict(cost.head)}, summary]


def render(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table with a line below."""
    *layers, head, summary = rows
    columns = ("load", "forward", "moments", "solve")
    lines = [
        [f"{row['layer']} {row['kind']}", *(f"{row[f'{c}_seconds']:.3f}" for c in columns), f"{row['peak_gib']:.2f}"]
        for row in layers
    ]
    lines.append(
        ["head", f"{head['load_seconds']:.3f}", f"{head['score_seconds']:.3f}", "", "", f"{head['peak_gib']:.2f}"]
    )
    return table(["layer", *(f"{c} s" for c in columns), "peak GiB"], lines) + (
        f"\n\n{summary['layers']} layers of together {summary['weights_gib']:.2f} GiB, and a head of "
        f"{summary['head_gib']:.2f} GiB, in at most {summary['peak_gib']:.2f} GiB (layers alone "
        f"{summary['layers_peak_gib']:.2f}) and {summary['seconds']:.1f} s, {summary['seconds_per_layer']:.2f} s a "
        f"layer; {summary['tokens']:,} tokens, their layer inputs {summary['kept_gib']:.2f} GiB on the host."
    )


def _cut(config: Gemma3Config, settings: StreamingSettings) -> Gemma3Config:
    """Checks the options and returns ``config`` with as many layers as asked for."""
    check_positive(settings, "tokens", "context", "batch_size", "score_every")
    if settings.seed < 0:
        raise UserError(f"seed={settings.seed} must not be negative.")
    if settings.tokens % settings.context:
        raise UserError(
            f"tokens={settings.tokens} must be a multiple of context={settings.context}, the tokens of a row."
        )
    if settings.context > config.max_context:
        raise UserError(f"context={settings.context} is more than the {config.max_context} of this size.")
    if settings.rank is not None and not 1 <= settings.rank <= config.head_dim:
        raise UserError(f"rank={settings.rank} must be between 1 and this size's head_dim, {config.head_dim}.")
    return first_layers(config, settings.layers)
