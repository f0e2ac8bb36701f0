"""Tokens a second of whole models that decode many long sequences: the original, converted ones, and transformers.

Every engine decodes as many sequences of a context as are given, or as fit into memory. Caches are filled with the
entries of random tokens instead of prefilling: what a step costs does not depend on them. All shapes but the 270M have
random weights, and converted models random factors, of one form, rank and width in all layers: the largest rank that
makes the cache so many times smaller; ``export=`` adds a model as a run made it. transformers decodes with its static
cache and ``torch.compile(mode="reduce-overhead")``.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from tpa_train.benchmarks.decode_caches import random_entries, randomize
from tpa_train.benchmarks.decode_steps import describe_layers, open_export
from tpa_train.benchmarks.journal import Journal, free_memory
from tpa_train.benchmarks.record import table_of
from tpa_train.benchmarks.static_decoding import StaticDecoder
from tpa_train.cli import choose_device
from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.config import SIZES, Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.machine_memory import free_bytes
from tpa_train.serving.decoder import STEPS_BEFORE_GRAPH, WARM_UP, Decoder
from tpa_train.serving.memory import RESERVE, largest_batch
from tpa_train.serving.slots import SlotCache
from tpa_train.tpa.command import DTYPES, open_model
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs

ENGINES = ("ours-dense", "ours-tpa", "transformers")
FORMS = ("latent", "joint", "contextual")
EXPORT = "export"  # what rows of ``export=`` have as their form
REAL = "270m"  # the shape whose weights are a real model's
CELL = ("shape", "engine", "form", "ratio", "context", "asked_batch")
FREE = ("shape", "engines", "forms", "ratios", "contexts", "batches")
SHRINK = 7 / 8  # of a batch that was out of memory, to try next


@dataclass
class DecodeModelSettings:
    """Options of ``benchmark.py decode_model``."""

    shape: str = field(default="4b", metadata={"help": "sizes of the model; only the 270m has real weights"})
    model: str = field(default="gemma3_270m", metadata={"help": "checkpoint of the 270m's weights, or a package"})
    engines: list[str] = field(
        default_factory=list, metadata={"help": f"of {', '.join(ENGINES)}; all of them when left out"}
    )
    forms: list[str] = field(
        default_factory=list, metadata={"help": f"of converted models: {', '.join(FORMS)}; all when left out"}
    )
    export: str | None = field(
        default=None,
        metadata={"help": "a converted model, as a run wrote it: beside the forms, or without forms= alone"},
    )
    ratios: list[float] = field(
        default_factory=lambda: [4.0, 8.0], metadata={"help": "how many times smaller their caches are"}
    )
    bits: int = field(default=4, metadata={"help": "width of their cached numbers: 16, 8, 6, 4, 3 or 2"})
    contexts: list[int] = field(default_factory=lambda: [32_768, 131_072], metadata={"help": "tokens of a sequence"})
    batches: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "sequences that decode at once; 0: as many as fit"}
    )
    max_batch: int = field(
        default=2048, metadata={"help": "the most that are tried where as many as fit are asked for"}
    )
    steps: int = field(default=20, metadata={"help": "steps that are timed; the median counts"})
    warmup: int = field(
        default=STEPS_BEFORE_GRAPH + WARM_UP + 2, metadata={"help": "steps before those: graphs and compilation"}
    )
    compile: bool = field(default=True, metadata={"help": "compile transformers' model"})
    graphs: bool = field(default=True, metadata={"help": "replay our steps as CUDA graphs, on a GPU"})
    fuse: bool = field(default=False, metadata={"help": "compile parts of our steps before they are recorded"})
    dtype: str = field(
        default="bfloat16", metadata={"help": "of weights and unquantized entries", "choices": (*DTYPES,)}
    )
    seed: int = field(default=0, metadata={"help": "decides weights, factors and cache entries"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; null: an accelerator if there is one"})


@dataclass(frozen=True)
class Cell:
    """One row to measure; ``form`` and ``ratio`` are those of a converted model, else None."""

    shape: str
    engine: str
    form: str | None
    ratio: float | None
    context: int
    asked_batch: int


@dataclass(frozen=True)
class Contestant:
    """What decodes: ``decoding(batch, context)`` makes full caches; ``sizes`` says how many sequences will fit."""

    sizes: Gemma3ForCausalLM
    device: torch.device
    decoding: Callable[[int, int], Any]
    details: dict[str, Any]


def run(settings: DecodeModelSettings, journal: Journal) -> list[dict[str, Any]]:
    """Measures every cell that has no row yet.

    Raises:
        UserError: an option is at fault.
    """
    cells = list(_cells(settings))
    device = choose_device(settings.device)
    for engine in dict.fromkeys(cell.engine for cell in cells):
        todo = [c for c in cells if c.engine == engine and not journal.done(**dataclasses.asdict(c))]
        if todo:
            _run_engine(settings, journal, engine, todo, device)
            free_memory()
    return journal.rows


def _run_engine(
    settings: DecodeModelSettings, journal: Journal, engine: str, cells: list[Cell], device: torch.device
) -> None:
    model = _dense_model(settings, device)
    if engine == "transformers":
        static = StaticDecoder(model, settings.compile)
        model = static.sizes  # its weights are copied
        free_memory()
    for cell in cells:
        name, contestant = dataclasses.asdict(cell), None
        try:
            if engine == "transformers":
                contestant = Contestant(model, device, partial(_static_decoding, static, settings), {})
            else:
                contestant = _ours(settings, cell, model, device)
            journal.add(name | contestant.details | measure(settings, cell, contestant))
        except UserError as error:
            journal.add(name | {"na": str(error)})
        except Exception as error:  # one cell's failure is a row; the others are still worth their time
            journal.add_error(error, **name)
        contestant = None
        free_memory()


def _ours(settings: DecodeModelSettings, cell: Cell, dense: Gemma3ForCausalLM, device: torch.device) -> Contestant:
    model, spec = dense, dense_specs(dense.config)[0]
    if cell.form == EXPORT:
        return _exported(settings, dense, device)
    if cell.form is not None:
        spec = ratio_spec(dense.config, cell.form, cell.ratio, settings.bits)
        specs = [spec.with_norms(dense.config, index) for index in range(dense.config.num_layers)]
        model = random_student(dense, specs, settings.seed)
    details = {"rank": spec.rank_k, "bits": spec.bits_k}
    return Contestant(model, device, lambda batch, context: OurDecoding(model, batch, context, settings), details)


def _exported(settings: DecodeModelSettings, dense: Gemma3ForCausalLM, device: torch.device) -> Contestant:
    of = f"a model of the sizes of shape={settings.shape}"
    model = open_export(settings.export, settings.dtype, str(device), dense, of).requires_grad_(False)
    details = {"layers": describe_layers(model.specs)}
    return Contestant(model, device, lambda batch, context: OurDecoding(model, batch, context, settings), details)


def _static_decoding(static: StaticDecoder, settings: DecodeModelSettings, batch: int, context: int) -> Any:
    return static.decoding(batch, context, held(settings, context))


def held(settings: DecodeModelSettings, context: int) -> int:
    """Returns the tokens in the caches before the first step: the last step fills them."""
    return context - settings.steps - settings.warmup - 1  # one more is written when a static cache is made


def _cells(settings: DecodeModelSettings) -> Iterator[Cell]:
    engines, forms = settings.engines or list(ENGINES), settings.forms or ([] if settings.export else list(FORMS))
    for name, given, valid in (
        ("engines", engines, ENGINES),
        ("forms", forms, FORMS),
        ("shape", [settings.shape], SIZES),
    ):
        for value in given:
            if value not in valid:
                raise UserError(f"{name}={value} is unknown{nearest(value, valid)}")
    for name in ("steps", "warmup", "max_batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)} must be at least 1.")
    least = settings.steps + settings.warmup + 1
    for context in settings.contexts:
        if context <= least:
            raise UserError(f"contexts: {context} tokens leave no room for {least} steps; name a longer one.")
    for batch in settings.batches:
        if batch < 0:
            raise UserError(f"batches: {batch} must be positive, or 0 for as many as fit.")
    for ratio in settings.ratios:
        if not ratio > 1:
            raise UserError(f"ratios: {ratio:g} must be above 1.")
    for engine in dict.fromkeys(engines):
        exported = [EXPORT] if settings.export else []
        for form in [*forms, *exported] if engine == "ours-tpa" else [None]:
            for ratio in settings.ratios if form in FORMS else [None]:
                for context in settings.contexts:
                    for batch in settings.batches:
                        yield Cell(settings.shape, engine, form, ratio, context, batch)


def measure(settings: DecodeModelSettings, cell: Cell, contestant: Contestant) -> dict[str, Any]:
    """Returns batch, tokens a second and memory of a cell; a batch that is out of memory is tried again smaller.

    Raises:
        UserError: not even one sequence fits.
        OutOfMemoryError: the batch that was asked for does not fit.
    """
    device, context = contestant.device, cell.context
    free = int(free_bytes(device) * (1 - RESERVE))
    fitting = largest_batch(contestant.sizes, context, 1, settings.max_batch, free=free, weights_loaded=True)
    batch, times = cell.asked_batch or fitting, []
    while batch > 0 and not times:
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            decoding = contestant.decoding(batch, context)
            times = [_seconds(decoding.step) for _ in range(settings.warmup + settings.steps)][settings.warmup :]
        except torch.OutOfMemoryError:
            if cell.asked_batch:
                raise
            batch, decoding = int(batch * SHRINK), None
        if not times:  # not above: an exception in hand holds the frames, and they the caches
            free_memory()
    if batch < 1:
        raise UserError(f"not one sequence of {context} tokens fits into memory.")
    seconds, config = statistics.median(times), contestant.sizes.config
    return {
        "batch": batch, "foreseen_batch": fitting, "tokens_per_s": batch / seconds, "ms_per_step": 1000 * seconds,
        "fastest_ms": 1000 * min(times), "cache_gib": decoding.cache_bytes / 2**30,
        "cache_ratio": batch * _original_bytes(config, context, settings) / decoding.cache_bytes,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "steps": settings.steps,
    }  # fmt: skip


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _original_bytes(config: Gemma3Config, context: int, settings: DecodeModelSettings) -> int:
    """Returns the bytes of the original's cache of one sequence, in the same type."""
    numbers = 2 * config.num_kv_heads * config.head_dim
    slots = sum(config.cached_tokens(layer, context) for layer in range(config.num_layers))
    return slots * numbers * DTYPES[settings.dtype].itemsize


class OurDecoding:
    """Our engine's decoding step over full caches, greedily."""

    def __init__(self, model: Gemma3ForCausalLM, batch: int, context: int, settings: DecodeModelSettings) -> None:
        cache = SlotCache(model, batch, context)
        for layer, buffers in zip(model.layers, cache.buffers, strict=True):
            random_entries(layer.self_attn, buffers, settings.seed)
        self.decoder, self.cache_bytes = Decoder(model, cache, settings.graphs, settings.fuse), cache.nbytes
        self.rows, self.tokens = list(range(batch)), [0] * batch
        self.length = held(settings, context)

    def step(self) -> None:
        logits = self.decoder(self.tokens, self.rows, [self.length] * len(self.rows))
        self.tokens = logits.argmax(-1).tolist()
        self.length += 1


def _dense_model(settings: DecodeModelSettings, device: torch.device) -> Gemma3ForCausalLM:
    """Returns the 270M, or a model of random weights, on ``device``."""
    if settings.shape == REAL:
        return open_model(settings.model, settings.dtype, str(device)).requires_grad_(False)
    with torch.device("meta"):
        model = Gemma3ForMultimodalLMwithTPA(SIZES[settings.shape]).to(DTYPES[settings.dtype])
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(settings.seed)
    with torch.no_grad():
        for p in model.parameters():  # on the device: billions of numbers
            p.zero_() if p.ndim == 1 else p.normal_(0.0, p.shape[-1] ** -0.5, generator=generator)
    return model.requires_grad_(False).eval()


def ratio_spec(config: Gemma3Config, form: str, ratio: float, bits: int) -> LayerSpec:
    """Returns a global layer in ``form`` with the largest rank whose cache is at least ``ratio`` times smaller.

    Ranks of latents are multiples of 8.

    Raises:
        UserError: the smallest rank's is larger.
    """
    dense = dense_specs(config)[0].bytes_per_token(config)
    largest, step = {
        "latent": (config.head_dim, 8), "joint": (2 * config.num_kv_heads * config.head_dim, 8),
        "contextual": (config.num_kv_heads, 1),
    }[form]  # fmt: skip
    for rank in range(largest, 0, -step):
        spec = LayerSpec(form, rank, form, rank, bits).with_norms(config, config.layer_kinds.index("global"))
        if dense >= ratio * spec.bytes_per_token(config):
            return spec
    raise UserError(f"no {form} layer at {bits} bits is {ratio:g} times smaller; lower bits= or ratios=.")


def random_student(dense: Gemma3ForCausalLM, specs: list[LayerSpec], seed: int) -> Gemma3ForMultimodalLMwithTPA:
    """Returns a converted model with random factors that shares the other weights with ``dense``."""
    with torch.device("meta"):
        empty = Gemma3ForMultimodalLMwithTPA(dense.config, specs)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    weight = dense.head_weight
    factors = {name: nn.Parameter(torch.empty(shapes[name], dtype=weight.dtype)) for name in empty.factor_names()}
    randomize(factors.items(), seed)
    moved = {name: factor.detach().to(weight.device) for name, factor in factors.items()}
    student = Gemma3ForMultimodalLMwithTPA.from_dense(dense, specs, moved)
    return student.requires_grad_(False).eval()


def render(rows: list[dict[str, Any]]) -> str:
    """Returns the table, and each converted model against the fastest other engine at its context in words."""
    lines = [table_of([{k: v for k, v in row.items() if k != "layers"} for row in rows])]
    for row in rows:
        others = [
            r for r in rows
            if r["engine"] != "ours-tpa" and r.get("tokens_per_s")
            and (r["shape"], r["context"]) == (row["shape"], row["context"])
        ]  # fmt: skip
        if row["engine"] == "ours-tpa" and row.get("tokens_per_s") and others:
            best = max(others, key=lambda r: r["tokens_per_s"])
            ratio = row["ratio"] or row["cache_ratio"]
            lines.append(
                f"{row['shape']}, {row['form']}, {ratio:.3g}× at {row['context']:,} tokens: {row['batch']} "
                f"sequences, {row['tokens_per_s'] / best['tokens_per_s']:.2f} times the tokens a second of "
                f"{best['engine']} ({best['batch']} sequences)"
            )
    return "\n\n".join(lines)
