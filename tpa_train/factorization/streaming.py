"""Calibration and factorization of a model that fits no device: one decoder layer in memory at a time.

The pass is that of ``calibration.CalibrationModule``, taken apart so that every layer is loaded twice and held never
longer than one layer's work:

1. up: the hidden states go through layer after layer, and each layer's input stays on the host;
2. head: final norm and tied head give the gradient of the sampled labels' log-likelihood (``sampled_score``);
3. down: each layer is loaded again and its forward recomputed from the kept input, this time differentiably. The
   gradient of its probes goes into its moments, that of its input to the layer below; then its factors are solved
   and handed over. (Recomputing is gradient checkpointing, arXiv:1604.06174, with a segment of one layer.)

The device holds one layer (0.8 GB of a 27B in bfloat16) or the head (2.8 GB), one batch's activations, and one layer's
moments; the host 4·D bytes a token and layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tpa_train.errors import UserError
from tpa_train.factorization.calibration import Calibration, LayerMoments, add_layer, probes, sampled_score
from tpa_train.factorization.latent import key_basis, latent_key_factors, latent_value_factors, value_basis
from tpa_train.gemma3.attention import Attention, AttentionContext, Documents
from tpa_train.gemma3.config import Gemma3Config, LayerKind
from tpa_train.gemma3.images import ImageBlocks
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import DecoderLayer, Gemma3ForCausalLM
from tpa_train.settings import TrainerSettings
from tpa_train.trainers import Machine

LoadLayer = Callable[[int], DecoderLayer]
LoadHead = Callable[[], tuple[nn.Module, Tensor]]
Sink = Callable[[int, dict[str, Tensor], LayerMoments], None]
Solve = Callable[[Attention, LayerMoments], dict[str, Tensor]]
UP, DOWN = 1, 4  # what a layer's way up and down counts on the progress bar: forward against recomputing and backward


@dataclass
class LayerCost:
    """What one layer took, in seconds and GiB. ``peak_gib``: of the device; on a CPU, of the process until then."""

    layer: int
    kind: LayerKind
    weight_bytes: int = 0
    load_seconds: float = 0.0  # of both times
    forward_seconds: float = 0.0
    moments_seconds: float = 0.0  # recomputing, backward and the moments' sums
    solve_seconds: float = 0.0
    peak_gib: float = 0.0

    @property
    def seconds(self) -> float:
        return self.load_seconds + self.forward_seconds + self.moments_seconds + self.solve_seconds


@dataclass
class HeadCost:
    """What the final norm and the head took; units as in ``LayerCost``."""

    weight_bytes: int = 0
    load_seconds: float = 0.0
    score_seconds: float = 0.0
    peak_gib: float = 0.0


@dataclass
class StreamingCost:
    """What a whole pass took."""

    layers: list[LayerCost]
    head: HeadCost
    tokens: int
    kept_bytes: int = 0  # of layer inputs, on the host

    @property
    def peak_gib(self) -> float:
        return max(cost.peak_gib for cost in (*self.layers, self.head))


def generator_for(device: torch.device, seed: int, batch: int, layer: int | None) -> torch.Generator:
    """Returns the source of a batch's random signs in ``layer``, or of its labels (None).

    One source for all would give other signs with every order in which layers are visited.
    """
    return torch.Generator(device).manual_seed(
        ((seed << 32) + (batch << 12) + (0 if layer is None else layer + 1)) % 2**63
    )


def factorize_streaming(
    config: Gemma3Config,
    load_layer: LoadLayer,
    load_head: LoadHead,
    hidden: Sequence[Tensor],
    rank_k: int,
    rank_v: int,
    sink: Sink,
    *,
    layers: Sequence[int] | None = None,
    document_ids: Sequence[Tensor] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    score_every: int = 4,
    kept_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> StreamingCost:
    """Calibrates a model layer by layer and solves latent factors of its keys and values.

    Args:
        config: of the model.
        load_layer: makes or reads decoder layer ``index``; called twice for each, and what it returns is moved to
            ``device``, frozen, and dropped before the next one is loaded. It must not keep the layer itself.
        load_head: makes or reads the final norm and the tied head [V, D]; called once, moved and dropped likewise.
        hidden: batches of scaled embeddings [B, L, D], wherever they are: ``embed(token_ids) * D**0.5`` in float32 (or
            wider). A batch needs more tokens than ``head_dim``, since tokens are weighted by their batch's metric.
        rank_k, rank_v: of the latent keys and values, 1 to head_dim.
        sink: gets every layer's index, factors by full state-dict name (float64, on the CPU) and moments (on the CPU),
            from the last layer down. Nothing is kept of them here.
        layers: which to factorize; None for all. Layers below the lowest are only run.
        document_ids: int [B, L] a batch: packed documents that must not see each other.
        device: where layers are computed.
        seed: of the sampled labels and random signs.
        score_every: a label is sampled at every so-many-th position.
        kept_dtype: of the layer inputs on the host; bfloat16 halves them, and then gradients are taken at rounded
            inputs. None keeps the residual stream's own.
        progress: show a bar with the time that is left.

    Returns:
        Seconds and peak memory of every layer and of the head.

    Raises:
        UserError: a rank, a layer or the hidden states do not fit the config, or a moment is not finite.
    """
    wanted = sorted(set(range(config.num_layers) if layers is None else layers))
    _check(config, wanted, hidden, rank_k, rank_v)

    def solve(attention: Attention, moments: LayerMoments) -> dict[str, Tensor]:
        factors = latent_key_factors(attention, key_basis(moments, run.cost.tokens), rank_k)
        return factors | latent_value_factors(attention, value_basis(attention, moments), rank_v)

    run = _Streaming(config, load_layer, hidden, document_ids, torch.device(device), seed, score_every, kept_dtype)
    _pass(run, load_head, wanted, solve, sink, "factorize layer by layer", progress)
    return run.cost


@torch.no_grad()
def calibrate_streaming(
    model: Gemma3ForCausalLM,
    batches: Iterable[Mapping[str, Tensor]],
    layers: Sequence[int],
    *,
    device: torch.device | str,
    seed: int = 0,
    score_every: int = 4,
    kept_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Calibration:
    """Calibrates ``layers`` of a model whose layers wait in the host's memory; its embedding is on ``device``.

    Args:
        model: the dense original. Its layers are copied to the device one at a time, and stay where they are.
        batches: as ``model.begin`` takes them, images included.
        layers: indices.
        device, seed, score_every, kept_dtype, progress: as in ``factorize_streaming``.

    Raises:
        UserError: the moments are not finite.
    """
    config, hidden, documents, images = model.config, [], [], []
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        x, context = model.begin(batch)
        hidden.append(x.cpu())
        documents.append(batch["document_ids"].cpu() if "document_ids" in batch else None)
        images.append(None if context.images is None else context.images.ids.cpu())

    def load_layer(index: int) -> DecoderLayer:
        with torch.device("meta"):
            layer = DecoderLayer(config, Attention(config, index))
        layer.load_state_dict(model.layers[index].state_dict(), assign=True)
        return layer

    found: dict[int, LayerMoments] = {}

    def keep(index: int, factors: dict[str, Tensor], moments: LayerMoments) -> None:
        found[index] = moments

    run = _Streaming(
        config, load_layer, hidden, documents, torch.device(device), seed, score_every, kept_dtype, images
    )  # fmt: skip
    head = (model.norm, model.head_weight)
    _pass(run, lambda: head, sorted(set(layers)), lambda *_: {}, keep, "calibrate layer by layer", progress)
    return Calibration(dict(sorted(found.items())), run.cost.tokens, max(x.shape[1] for x in hidden))


def _pass(
    run: _Streaming, load_head: LoadHead, wanted: list[int], solve: Solve, sink: Sink, title: str, progress: bool
) -> None:
    """Goes up through all layers, scores, and comes down to the lowest one of ``wanted``."""
    count = run.config.num_layers
    total = count * UP + (count - wanted[0]) * DOWN + UP
    with tqdm(total=total, desc=title, leave=False, disable=not progress) as bar:
        for index in range(count):
            bar.set_postfix_str(f"layer {index} up")
            run.up(index, keep=index >= wanted[0])
            bar.update(UP)
        bar.set_postfix_str("head")
        run.score(load_head)
        bar.update(UP)
        for index in range(count - 1, wanted[0] - 1, -1):
            bar.set_postfix_str(f"layer {index} down")
            solved = run.down(index, wanted, solve)
            if solved is not None:
                sink(index, *solved)
            del solved  # before the next layer's moments are made
            bar.update(DOWN)


class _Streaming:
    """The state of one pass: the residual stream, the kept inputs, and the gradients on their way down.

    No method leaves a reference to a layer behind, so each is freed when its step returns.
    """

    def __init__(
        self,
        config: Gemma3Config,
        load_layer: LoadLayer,
        hidden: Sequence[Tensor],
        document_ids: Sequence[Tensor | None] | None,
        device: torch.device,
        seed: int,
        score_every: int,
        kept_dtype: torch.dtype | None,
        image_ids: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.image_ids = image_ids
        self.config, self.load_layer, self.device = config, load_layer, device
        self.document_ids, self.seed, self.score_every = document_ids, seed, score_every
        self.dtype = accumulation_dtype(hidden[0].dtype)
        self.kept_dtype = kept_dtype or self.dtype
        self.stream = [x.detach().to("cpu", self.dtype) for x in hidden]  # [B, L, D] a batch; on the way down gradients
        self.kept: dict[int, list[Tensor]] = {}
        self.machine = Machine(device, self.dtype, TrainerSettings())
        torch.empty(0, device=device)  # a device that nothing has used yet has no peak to reset
        costs = [LayerCost(index, kind) for index, kind in enumerate(config.layer_kinds)]
        self.cost = StreamingCost(costs, HeadCost(), sum(x.shape[0] * x.shape[1] for x in hidden))

    @torch.no_grad()
    def up(self, index: int, keep: bool) -> None:
        """Takes the residual stream through layer ``index``."""
        cost = self.cost.layers[index]
        layer = self._load(index)
        if keep:
            self.kept[index] = [x.to(self.kept_dtype) for x in self.stream]
            self.cost.kept_bytes += sum(x.nbytes for x in self.kept[index])
        with self._measured(cost, "forward_seconds"):
            for batch, x in enumerate(self.stream):
                self.stream[batch] = layer(x.to(self.device), self._context(batch)).cpu()

    def score(self, load_head: LoadHead) -> None:
        """Replaces the residual stream by the gradient of the sampled labels' log-likelihood with respect to it."""
        cost = self.cost.head
        with self._measured(cost, "load_seconds"):
            norm, weight = load_head()
            norm, weight = norm.to(self.device), weight.detach().to(self.device)
        cost.weight_bytes = weight.nbytes
        with self._measured(cost, "score_seconds"):
            for batch, x in enumerate(self.stream):
                x = x.to(self.device).requires_grad_()
                every = min(self.score_every, x.shape[1])
                with torch.enable_grad():
                    final = norm(x)[:, every - 1 :: every].flatten(0, 1)
                labels = generator_for(self.device, self.seed, batch, None)
                score = sampled_score(final.detach(), weight, labels) * every**0.5
                images = self._context(batch).images
                if images is not None:
                    score = score * images.text[:, every - 1 :: every].flatten()[:, None]
                self.stream[batch] = torch.autograd.grad(final, x, score)[0].cpu()

    def down(self, index: int, wanted: list[int], solve: Solve) -> tuple[dict[str, Tensor], LayerMoments] | None:
        """Takes the gradients through layer ``index``; returns its factors and moments if it is ``wanted``."""
        cost = self.cost.layers[index]
        layer = self._load(index)
        moments = LayerMoments.zeros(self.config, self.device) if index in wanted else None
        with self._measured(cost, "moments_seconds"):
            for batch, x in enumerate(self.kept.pop(index)):
                self._add(layer, moments, batch, x, last=index == wanted[0])
        if moments is None:
            return None
        with self._measured(cost, "solve_seconds"):
            # On the host: the eigenproblems are of size head_dim, and the sink's moments belong there anyway.
            moments = moments.on_host(index)
            factors = solve(layer.self_attn, moments)
        return {f"layers.{index}.self_attn.{name}": t for name, t in factors.items()}, moments

    def _add(self, layer: DecoderLayer, moments: LayerMoments | None, batch: int, x: Tensor, last: bool) -> None:
        """Adds one batch to ``moments``, and hands its gradient to the layer below unless this is the ``last``."""
        index = layer.self_attn.layer
        x = x.to(self.device, self.dtype).requires_grad_(not last)
        context = self._context(batch)
        with probes({index: layer}, [index]) as records, torch.enable_grad():
            out = layer(x, context)
        record = records[index]
        by = [record.key_probe, record.output_probe] + ([] if last else [x])
        keys, output, *below = torch.autograd.grad(out, by, self.stream[batch].to(self.device))
        if below:
            self.stream[batch] = below[0].cpu()
        if moments is not None:
            signs = generator_for(self.device, self.seed, batch, index)
            add_layer(moments, layer.self_attn, record, keys, output, context, signs)

    def _load(self, index: int) -> DecoderLayer:
        cost = self.cost.layers[index]
        with self._measured(cost, "load_seconds"):
            layer = self.load_layer(index).to(self.device).requires_grad_(False).eval()
        cost.weight_bytes = sum(p.nbytes for p in layer.parameters())
        return layer

    def _context(self, batch: int) -> AttentionContext:
        """Returns what a layer needs to know besides its input."""
        documents = images = None
        if self.document_ids is not None and self.document_ids[batch] is not None:
            documents = Documents(self.document_ids[batch].to(self.device))
        if self.image_ids is not None and self.image_ids[batch] is not None:
            images = ImageBlocks(self.image_ids[batch].to(self.device), documents)
        positions = torch.arange(self.stream[batch].shape[1], device=self.device)[None]
        return AttentionContext(self.config, positions, documents, images=images)

    @contextmanager
    def _measured(self, cost: LayerCost | HeadCost, name: str) -> Iterator[None]:
        """Adds the block's seconds to ``cost``'s ``name``, and its peak memory."""
        self.machine.reset_peak()
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        setattr(cost, name, getattr(cost, name) + time.perf_counter() - start)
        cost.peak_gib = max(cost.peak_gib, self.machine.peak_gib())


def _check(config: Gemma3Config, wanted: list[int], hidden: Sequence[Tensor], rank_k: int, rank_v: int) -> None:
    for name, rank in (("rank_k", rank_k), ("rank_v", rank_v)):
        if not 1 <= rank <= config.head_dim:
            raise UserError(f"{name}={rank} must be between 1 and head_dim={config.head_dim}.")
    if not wanted or wanted[0] < 0 or wanted[-1] >= config.num_layers:
        raise UserError(f"layers={wanted} must name some of the layers 0 to {config.num_layers - 1}.")
    if not hidden:
        raise UserError("there are no hidden states to calibrate on; give at least one batch [B, L, D].")
    for x in hidden:
        if x.ndim != 3 or x.shape[2] != config.hidden_size or not x.numel():
            raise UserError(f"hidden states of shape {list(x.shape)} are not [B, L, {config.hidden_size}].")
