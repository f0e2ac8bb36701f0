"""What each stage of a run takes, traced on tensors without data (``tpa_train.memory_trace``) or by formula."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tpa_train.checkpoints.weights import parameter_shapes
from tpa_train.compilation import worth_compiling
from tpa_train.distillation.layerwise import LayerwiseModule
from tpa_train.distillation.teacher_cache import SHARD_BYTES
from tpa_train.factorization.allocation import Budget, layers_to_convert, plan_probes, uniform_spec
from tpa_train.factorization.calibration import LayerMoments
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import MLP, RMSNorm
from tpa_train.memory_trace import StageTrace, Step, TracedCache, TracedEndToEnd, TracedModels, tracing
from tpa_train.pipeline import budget_of, steps_of
from tpa_train.settings import RunSettings
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs
from tpa_train.trainers import Machine

HEAP = 1.35  # resident bytes over live ones for activations on a CPU: gaps in the heap, measured on the 270M
RECOMPUTED_HEAP = 3.0  # the same where layers recompute: little lives on between gaps of all sizes
COMPILED = 0.55  # of activations, what compiled passes of the end-to-end stage keep; the 270M on an H100
LIKELY_BITS = 4  # below this the allocator seldom goes for most of a layer's numbers
EFFICIENCY = 0.7  # of a feed-forward block's rate that whole models reach: attention and losses are slower


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a run; bytes of each device, and seconds. The parts of ``peak`` add up to it."""

    name: str
    trained: int  # parameters
    tokens: int  # of all devices
    process: int  # what Python and its libraries take of the host's memory; 0 on an accelerator
    weights: int  # models, copies that learn, moments of the calibration
    optimizer: int
    activations: int
    logits: int
    seconds: float
    steps: int = 0  # of the optimizer
    host: int = 0  # bytes that wait in the host's memory for an accelerator (trainer.offload)

    @property
    def peak(self) -> int:
        return self.process + self.weights + self.optimizer + self.activations + self.logits

    def share_within(self, room: int) -> float:
        """Returns the share of its batch's tokens with which the stage takes ``room`` bytes; chunks do not shrink."""
        return (room - self.peak + self.activations) / max(1, self.activations)


class StageCosts:
    """Traces the stages of one run.

    Args:
        settings: of the run.
        machine: where it runs.
        config: of the model.
        process: bytes of host memory that the process takes by itself; 0 on an accelerator.
    """

    def __init__(self, settings: RunSettings, machine: Machine, config: Gemma3Config, process: int) -> None:
        self.settings, self.machine, self.process = settings, machine, process
        # The vision side has no part in training: its weights and its forward pass are added to the text side's.
        self.config, self.vision = replace(config, vision=None), config.vision
        self.vision_bytes = 2 * (parameters_of(config) - parameters_of(self.config))  # published in 16 bits
        self.budget = budget_of(settings, config)
        self.specs = likely_specs(config, self.budget)
        trainer, self.on_cpu = settings.trainer, machine.device.type == "cpu"
        self.devices = trainer.devices * trainer.num_nodes
        self.sharded = self.devices > 1 and trainer.strategy == "fsdp2"
        self.rate = block_rate(machine, config) * EFFICIENCY
        if self.on_cpu:
            self.rate /= trainer.devices  # processes share the cores

    def stages(self, settings: RunSettings, only: str | None = None) -> tuple[StageEstimate, ...]:
        """Traces every stage of ``settings`` that runs, or the one named ``only``."""
        made: dict[str, Callable[[TracedModels], StageEstimate]] = {
            "calibration": self._calibration, "sensitivities": self._sensitivities,
        }  # fmt: skip
        for name, stage in (("layerwise", self._layerwise), ("distill", self._distill)):
            if name in settings.recipe.stages and getattr(settings.recipe, name).tokens > 0:
                if name == "distill" and settings.teacher.cache != "none":
                    made["teacher cache"] = self._filling
                made[name] = stage
        made["evaluation"] = self._evaluation
        found, before = [], self.settings
        self.settings = settings
        for name, stage in made.items():
            if only in (None, name):
                with tracing() as live:
                    models = TracedModels(
                        self.config, self.specs, self.machine.dtype, self.machine.device, live, self.machine.autocast
                    )
                    found.append(stage(models))
                    del models
        self.settings = before
        return tuple(found)

    def _made(
        self, models: TracedModels, name: str, trace: StageTrace, tokens: int, flops: float, rows: tuple[int, int],
        passes: float = 0.0, host: int = 0, steps: int = 0, heap: float = HEAP,
    ) -> StageEstimate:  # fmt: skip
        """Returns the estimate of a traced stage.

        Args:
            models, name, trace: of the stage.
            tokens: of all devices.
            flops: of one device.
            rows: of a forward pass, and their length.
            passes: forward passes of a device with images in their rows.
            host, steps: as in ``StageEstimate``.
            heap: resident bytes over live ones on a CPU.
        """
        activations = trace.activations
        if pictures := rows[0] * self._pictures(rows[1]):
            seen, each = models.images(self.vision, pictures)
            activations, flops = max(activations, seen), flops + passes * each
        parts = [trace.weights + self.vision_bytes, trace.optimizer, activations, trace.logits]
        if self.on_cpu:
            # Gradients of another step do not fit exactly where the last ones were, between what came meanwhile.
            parts[2] = round(parts[2] * heap) + trace.remade
        if trace.ending + self.vision_bytes > sum(parts):
            parts = [trace.ending + self.vision_bytes - trace.optimizer, trace.optimizer, 0, 0]
        return StageEstimate(name, trace.trained, tokens, self.process, *parts, flops / self.rate, steps, host)

    def _pictures(self, context: int) -> int:
        """Returns the images of a row: as many as fit with a few words around each; none where the data has none."""
        if self.vision is None or self.settings.data.kind != "image_text":
            return 0
        return max(1, context // (self.vision.tokens_per_image + 16))

    def _lent(self, trace: StageTrace, models: TracedModels, kept: int = 0) -> tuple[StageTrace, int]:
        """Returns the trace of a stage whose layers wait in the host's memory (trainer.offload), and the bytes there.

        ``kept``: bytes of the stage that are in the host's memory too.
        """
        if not self.settings.trainer.offload:
            return trace, 0
        if self.on_cpu:  # layers and what they leave behind are in the same memory: nothing is saved
            return replace(trace, weights=trace.weights + kept, peak=trace.peak + kept), 0
        layers = [sum(p.nbytes for p in layer.parameters()) for layer in models.teacher.layers]
        waiting = sum(layers) - max(layers)
        return replace(trace, weights=trace.weights - waiting, peak=trace.peak - waiting), sum(layers) + kept

    def _calibration(self, models: TracedModels) -> StageEstimate:
        t, tokens, c = self.settings.trainer, self.settings.recipe.calibration.tokens, self.config
        rows, layers, host = -(-tokens // t.context), layers_to_convert(self.config, self.budget), 0
        batch = min(rows, t.batch_size)
        batches = -(-rows // batch)
        trace = models.calibration(layers, batch, t.context)
        flops = trace.flops * batches / self.devices
        if t.offload:  # one layer differentiates at a time, and has moments on the device; the host keeps its inputs
            below = c.num_layers - layers[0] + 1
            kept = below * rows * t.context * c.hidden_size * 4 + len(layers) * moment_bytes(c)
            flops += batches * models.evaluation(batch, t.context, 1).flops  # the way up, before that down
            trace, host = self._lent(models.calibration([c.num_layers - 1], batch, t.context), models, kept)
        passes = batches / self.devices
        return self._made(
            models, "calibration", trace, rows * t.context, flops, (batch, t.context), passes, host
        )  # fmt: skip

    def _sensitivities(self, models: TracedModels) -> StageEstimate:
        """By formula: the residual stream behind every layer, and the logits that all probes are compared with."""
        tokens, c = self.settings.recipe.calibration.sensitivity_tokens, self.config
        layers = layers_to_convert(c, self.budget)
        trace, host = self._lent(models.evaluation(1, tokens, 1), models)
        scored = max(1, tokens // 4)
        chunk = min(scored * c.vocab_size * 4, 2**27 if self.on_cpu else 2**30)
        kept = (c.num_layers + 1) * tokens * c.hidden_size * 4
        probes = len(plan_probes(c, self.budget, layers))
        if "joint" in self.budget.forms:  # their balance is measured first
            probes += 2 * len(layers) + 3 * sum(c.is_global(i) for i in layers)
        if not self.settings.trainer.offload:  # what was chosen is measured too, in float32
            probes += len(layers)
            if self.machine.dtype != torch.float32:
                layer = max(sum(p.numel() for p in layer.parameters()) for layer in models.teacher.layers)
                kept += 4 * (c.vocab_size * c.hidden_size + layer)
        logits = scored * c.vocab_size * 4 + 4 * chunk
        if self.on_cpu:  # moments, bases and the problems of joint latents, in float64
            kept += 3 * moment_bytes(c) * len(layers)
        forward = trace.flops / 2 + 2 * scored * c.vocab_size * c.hidden_size  # the layers above the probed one
        peak = trace.weights + kept + trace.activations + logits
        return self._made(
            models, "sensitivities", replace(trace, logits=logits, peak=peak), tokens, probes * forward / self.devices,
            (1, tokens), 1, host, heap=1,
        )  # fmt: skip

    def _layerwise(self, models: TracedModels) -> StageEstimate:
        errors = dict.fromkeys(range(self.config.num_layers), 1.0)
        settings = self.settings.recipe.layerwise
        return self._recovery(models, "layerwise", lambda s: LayerwiseModule(models.teacher, s, settings, 1, errors))

    def _distill(self, models: TracedModels) -> StageEstimate:
        d = self.settings.recipe.distill
        cache = self._cache() if self.settings.teacher.cache != "none" else None
        return self._recovery(
            models, "distill",
            lambda s: TracedEndToEnd(
                models.teacher, s, d, d.scope, 1, hidden_weight=d.hidden_weight, hidden_until=d.hidden_until,
                kl_every=d.kl_every, ema=d.ema, cache=cache,
            ),
        )  # fmt: skip

    def _recovery(self, models: TracedModels, name: str, make: Callable) -> StageEstimate:
        t = self.settings.trainer
        step = Step(
            t.batch_size, t.context, t.accumulate, self.devices, self.sharded and name == "distill",
            t.activation_checkpointing,
        )  # fmt: skip
        trace, steps = models.training(make, step), steps_of(self.settings, name)
        plain = self.on_cpu or step.sharded or t.activation_checkpointing
        if name == "distill" and worth_compiling(t, steps) and not plain:
            trace = replace(trace, peak=trace.peak - round(trace.activations * (1 - COMPILED)))
        batches = steps * t.accumulate
        tokens = batches * self.devices * t.batch_size * t.context
        heap = RECOMPUTED_HEAP if t.activation_checkpointing else HEAP
        return self._made(
            models, name, trace, tokens, trace.flops * batches, (t.batch_size, t.context), batches, steps=steps,
            heap=heap,
        )  # fmt: skip

    def _cache(self) -> TracedCache:
        s = self.settings
        dtype = torch.float32 if s.teacher.dtype == "auto" else getattr(torch, s.teacher.dtype)
        return TracedCache(s.teacher.cache, s.teacher.top_k, dtype, self.config, s.trainer.context)

    def _cached_rows(self) -> int:
        """Returns the most rows that the teacher cache may need: each is read once at the least."""
        return steps_of(self.settings, "distill") * self.settings.trainer.rows_per_step

    def cached_bytes(self) -> int:
        """Returns the bytes of the teacher cache on disk, at most."""
        return self._cached_rows() * self._cache().row_bytes()

    def _filling(self, models: TracedModels) -> StageEstimate:
        t, cache, rows = self.settings.trainer, self._cache(), self._cached_rows()
        trace = models.filling(cache, t.batch_size, t.context)
        made = self._made(
            models, "teacher cache", trace, rows * t.context, trace.flops * rows / t.batch_size,
            (t.batch_size, t.context),
        )  # fmt: skip
        # A shard is gathered in the host's memory: its parts, the whole, and what is written of it.
        shard = 3 * min(SHARD_BYTES, rows * cache.row_bytes())
        return replace(made, activations=made.activations + shard * self.on_cpu)

    def _evaluation(self, models: TracedModels) -> StageEstimate:
        """The longest text decides over the memory: a row, or a copy text."""
        e, c = self.settings.evaluation, self.config
        longest = max(e.context, 2 * max(e.copy, default=0) + 1)
        trace, host = self._lent(models.evaluation(1, longest, min(longest, 4096)), models)
        rows = max(1, e.tokens // e.context) * e.context
        copies = e.copy_count * sum(2 * d + 1 for d in e.copy)
        scored = 2 * rows + e.copy_count * sum(min(d, e.copy_tokens or d) for d in e.copy)
        body = 2 * (trace.flops / longest / 2)  # one forward of the student, and one of the teacher at the first time
        head = 2 * c.vocab_size * c.hidden_size
        runs = 1 + sum(s in self.settings.recipe.stages for s in ("factorize", "layerwise", "distill"))
        flops = runs * ((rows + copies) * body + scored * head) / self.devices
        passes = runs * rows / e.context / self.devices
        kept = self.on_cpu * rows * c.hidden_size * 4 // self.devices  # the teacher's hidden states, for every stage
        trace = replace(trace, peak=trace.peak + kept)
        return self._made(
            models, "evaluation", trace, runs * (rows + copies), flops, (1, e.context), passes, host
        )  # fmt: skip


def parameters_of(config: Gemma3Config) -> int:
    """Returns the number of parameters of a model."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def moment_bytes(config: Gemma3Config) -> int:
    """Returns the bytes of one layer's moments."""
    return sum(t.numel() * t.element_size() for t in LayerMoments.zeros(config, "meta").tensors().values())


def likely_specs(config: Gemma3Config, budget: Budget) -> list[LayerSpec]:
    """Returns uniform forms that spend the budget: the allowed width nearest to ``LIKELY_BITS``, the largest rank."""
    layers = layers_to_convert(config, budget)
    likely = min(budget.bits, key=lambda width: (abs(width - LIKELY_BITS), width))
    joint = uniform_spec(config, budget, budget.multiple, likely).form_k == "joint"
    widest = 2 * config.num_kv_heads * config.head_dim if joint else config.head_dim
    for bits in sorted({likely, min(budget.bits)}, reverse=True):
        for rank in range(widest // budget.multiple * budget.multiple, 0, -budget.multiple):
            specs = dense_specs(config)
            for layer in layers:
                specs[layer] = uniform_spec(config, budget, rank, bits).with_norms(config, layer)
            if cache_bytes(config, specs, budget.context) <= budget.bytes(config):
                return specs
    return specs  # the smallest rank; mixed widths will have to do better


def block_rate(machine: Machine, config: Gemma3Config) -> float:
    """Returns the operations a second of one feed-forward block with its norm on this device (a median of five)."""
    tokens = 1024 if machine.device.type == "cpu" else 8192
    with torch.random.fork_rng(devices=[]), torch.device(machine.device), torch.no_grad(), machine.autocast():
        block = torch.nn.Sequential(RMSNorm(config.hidden_size, config.rms_norm_eps), MLP(config)).to(machine.dtype)
        x, taken = torch.ones(tokens, config.hidden_size), []
        for _ in range(6):  # the first one warms up
            start = time.perf_counter()
            block(x)
            if machine.device.type == "cuda":
                torch.cuda.synchronize(machine.device)
            taken.append(time.perf_counter() - start)
    return 2 * tokens * 3 * config.hidden_size * config.intermediate_size / statistics.median(taken[1:])
