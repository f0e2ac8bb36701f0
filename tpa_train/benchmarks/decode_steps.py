"""Decoding on a CPU with a whole model: time and memory a token, the original beside its converted self.

Both decode the same number of tokens at the same context, in turns, so that a busy machine slows both. Where no
export is given, the global layers get factors of random values: they cost what solved ones cost. The cache is filled
with entries of random tokens (``fill=random``), or by prefilling random ids, which takes long; time does not depend on
which.

``cache_bytes`` are those allocated; ``step_bytes`` are the most that one step allocates and holds at a time, such as
keys and values that are rebuilt in memory. It counts PyTorch's tensors, not what a kernel of one's own has for itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tpa_train.benchmarks.decode_caches import FORMS, check_forms, form_spec, random_entries, randomize
from tpa_train.benchmarks.record import table_of
from tpa_train.errors import UserError
from tpa_train.gemma3.cache import KVCache
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.memory_trace import LiveBytes
from tpa_train.serving.engine import PREFILL_CHUNK
from tpa_train.tpa.command import DTYPES, open_model
from tpa_train.tpa.entries import check_widths
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs

WARMUP = 1  # tokens that are decoded before the timed ones


@dataclass
class DecodeStepSettings:
    """Options of ``benchmark.py decode_cpu``."""

    model: str = field(default="gemma3_270m", metadata={"help": "the original: a checkpoint or a packaged model."})
    export: str | None = field(
        default=None, metadata={"help": "its converted self, a folder or run; null: one with random factors."}
    )
    form: str = field(
        default="joint", metadata={"help": "of global layers without an export.", "choices": tuple(FORMS)}
    )
    bits: int = field(default=8, metadata={"help": "widths of cached numbers without an export: 16, 8, 6, …"})
    context: int = field(default=8192, metadata={"help": "cached tokens of each sequence."})
    batch: int = field(default=1, metadata={"help": "sequences of a step."})
    tokens: int = field(default=16, metadata={"help": "timed tokens, of which the median counts."})
    fill: str = field(default="random", metadata={"help": "how the cache is filled.", "choices": ("random", "prefill")})
    dtype: str | None = field(
        default=None, metadata={"help": "of weights and unquantized entries; as of generate.py.", "choices": (*DTYPES,)}
    )
    seed: int = field(default=0, metadata={"help": "decides entries, ids and random factors."})
    device: str | None = field(default="cpu", metadata={"help": "cpu, or another one to compare with."})


def run(settings: DecodeStepSettings) -> list[dict[str, Any]]:
    """Returns the original's row and the converted model's.

    Raises:
        UserError: an option or a model is at fault, or the two are not of one size.
    """
    for name in ("context", "batch", "tokens"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)} must be at least 1.")
    check_widths(settings.bits)
    check_forms([settings.form])
    models = open_models(settings)
    longest = models["original"].config.max_context
    if settings.context + WARMUP + settings.tokens > longest:
        raise UserError(f"context={settings.context} and tokens={settings.tokens} exceed the model's {longest} tokens.")
    caches = {name: filled_cache(model, settings) for name, model in models.items()}
    times = interleaved(models, caches, settings.tokens)
    rows = []
    for name, model in models.items():
        specs = getattr(model, "specs", dense_specs(model.config))
        rows.append({
            "name": name, "converted_layers": sum(spec.converted for spec in specs), "context": settings.context,
            "batch": settings.batch, "tokens": settings.tokens, "fill": settings.fill,
            "dtype": str(model.head_weight.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "ms_per_token": 1000 * statistics.median(times[name]),
            "fastest_ms": 1000 * min(times[name]), "cache_bytes": caches[name].nbytes,
            "step_bytes": step_bytes(model, caches[name]), "layers": describe_layers(specs),
        })  # fmt: skip
    rows[1]["speedup"] = rows[0]["ms_per_token"] / rows[1]["ms_per_token"]
    rows[1]["bytes_ratio"] = rows[0]["cache_bytes"] / rows[1]["cache_bytes"]
    return rows


def open_models(settings: DecodeStepSettings) -> dict[str, Gemma3ForCausalLM]:
    """Returns the original and its converted self; without an export they share all weights but the factors.

    Raises:
        UserError: a model cannot be opened, or the two are not of one size.
    """
    original = open_model(settings.model, settings.dtype, settings.device)
    if settings.export is not None:
        of = f"a model of the sizes of {settings.model}"
        return {
            "original": original,
            "converted": open_export(settings.export, settings.dtype, settings.device, original, of),
        }
    config = original.config
    spec = form_spec(settings.form, config, settings.bits)
    specs = [spec if config.is_global(i) else dense for i, dense in enumerate(dense_specs(config))]
    with torch.device("meta"):
        empty = Gemma3ForMultimodalLMwithTPA(config, specs)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    factors = {name: nn.Parameter(torch.empty(shapes[name])) for name in empty.factor_names()}
    randomize(factors.items(), settings.seed)
    converted = Gemma3ForMultimodalLMwithTPA.from_dense(original, specs, factors)
    for layer in converted.converted_layers:
        converted.layers[layer].self_attn.to(original.head_weight.device, original.head_weight.dtype)
    return {"original": original, "converted": converted}


def open_export(
    path: str, dtype: str, device: str, original: Gemma3ForCausalLM, of: str
) -> Gemma3ForMultimodalLMwithTPA:
    """Returns the converted model in the folder ``path``, which must have the sizes of ``original``.

    ``dtype``, ``device``: as ``open_model`` takes them. ``of``: what the original is called in a refusal.

    Raises:
        UserError: it cannot be opened, or is not such a model.
    """
    model = open_model(path, dtype, device)
    if not hasattr(model, "specs") or model.config != original.config:
        raise UserError(f"export={path} was not made from {of}.")
    return model


@torch.inference_mode()
def filled_cache(model: Gemma3ForCausalLM, settings: DecodeStepSettings) -> KVCache:
    """Returns a cache that holds ``context`` tokens of every sequence and has room for those to be decoded."""
    weight, capacity = model.head_weight, settings.context + WARMUP + settings.tokens + 1
    cache = model.allocate_cache(settings.batch, capacity, dtype=weight.dtype)
    if settings.fill == "prefill":
        generator = torch.Generator().manual_seed(settings.seed)
        ids = torch.randint(model.config.vocab_size, (settings.batch, settings.context), generator=generator)
        for chunk in ids.to(weight.device).split(PREFILL_CHUNK, dim=1):
            model.hidden_states(chunk, cache=cache)
        return cache
    for layer, buffers in zip(model.layers, cache.buffers, strict=True):
        random_entries(layer.self_attn, buffers, settings.seed)
    cache.length = settings.context
    return cache


@torch.inference_mode()
def next_tokens(model: Gemma3ForCausalLM, cache: KVCache, tokens: Tensor) -> Tensor:
    """One step of greedy decoding, int64 [B] -> [B]."""
    return model.logits(model.hidden_states(tokens[:, None], cache=cache)[:, -1]).argmax(-1)


def interleaved(
    models: Mapping[str, Gemma3ForCausalLM], caches: Mapping[str, KVCache], count: int
) -> dict[str, list[float]]:
    """Returns the seconds of ``count`` steps of each model, which take turns; the first ones are not timed."""
    times: dict[str, list[float]] = {name: [] for name in models}
    last = {name: torch.zeros(len(caches[name].buffers[0][0]), dtype=torch.long) for name in models}
    last = {name: tokens.to(models[name].head_weight.device) for name, tokens in last.items()}
    for step in range(WARMUP + count):
        for name in list(models) if step % 2 else reversed(list(models)):
            start = time.perf_counter()
            last[name] = next_tokens(models[name], caches[name], last[name])
            last[name].tolist()  # waits for the device
            if step >= WARMUP:
                times[name].append(time.perf_counter() - start)
    return times


def step_bytes(model: Gemma3ForCausalLM, cache: KVCache) -> int:
    """Returns the most bytes that one more step allocates and holds at a time."""
    tokens = torch.zeros(len(cache.buffers[0][0]), dtype=torch.long, device=model.head_weight.device)
    with torch.inference_mode(), LiveBytes() as live:
        model.logits(model.hidden_states(tokens[:, None], cache=cache)[:, -1])
    return live.peak


def describe_layers(specs: Sequence[LayerSpec]) -> str:
    """Returns the different converted layers in words."""
    return "; ".join(dict.fromkeys(spec.describe() for spec in specs if spec.converted)) or "all dense"


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table without the layers, and what they are below it."""
    table = table_of([{k: v for k, v in row.items() if k != "layers"} for row in rows])
    return "\n\n".join([table, *(f"{row['name']}: {row['layers']}" for row in rows)])
