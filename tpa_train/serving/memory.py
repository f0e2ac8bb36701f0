"""Whether a batch will fit, before anything is allocated: weights, cache and workspace against free memory.

The cache is counted exactly, from what every layer says it stores. The workspace is bounded by a formula over the
largest tensors of a prefill step and of a decoding step; a test holds it against what the code really makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tpa_train.errors import UserError
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.machine_memory import UNKNOWN, free_bytes
from tpa_train.serving.sampling import rows_at_once
from tpa_train.tpa.decode.reference import GROUP_BYTES, expanded_bytes

DEFAULT_ROWS = 64  # where nobody says how many, and memory would allow more
RESERVE = 0.05  # of free memory, left for fragmentation and for what others take


@dataclass(frozen=True)
class Forecast:
    """Bytes that ``rows`` sequences of ``context`` tokens take, and what there is for them."""

    rows: int
    context: int
    cache: int
    workspace: int
    free: int  # what may be taken of the free memory, weights in memory not counted

    @property
    def needed(self) -> int:
        return self.cache + self.workspace

    @property
    def fits(self) -> bool:
        return self.needed <= self.free


def weight_bytes(model: Gemma3ForCausalLM) -> int:
    """Returns the bytes of the parameters, shared ones once; of a model on the meta device, those it would take."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def slot_bytes(model: Gemma3ForCausalLM, rows: int, context: int, dtype: torch.dtype) -> int:
    """Returns the bytes that ``SlotCache`` allocates for its entries (``SlotCache.nbytes``)."""
    return rows * sum(
        model.config.cached_tokens(index, context)
        * sum(math.prod(shape) * (own or dtype).itemsize for shape, own in layer.self_attn.storage())
        for index, layer in enumerate(model.layers)
    )


def workspace_bytes(model: Gemma3ForCausalLM, rows: int, context: int, chunk: int) -> int:
    """Returns the most that a step takes besides weights and cache: of prefill or of decoding, whichever is more."""
    config, dtype = model.config, model.head_weight.dtype
    narrow, wide = dtype.itemsize, accumulation_dtype(dtype).itemsize
    chunk = min(chunk, context)
    if config.vision is not None:
        chunk = max(chunk, min(context, config.vision.tokens_per_image))

    def activations(tokens: int) -> int:
        heads = config.num_heads * config.head_dim
        stream = 8 * wide * config.hidden_size + 3 * narrow * config.hidden_size
        return tokens * (stream + heads * (4 * narrow + 5 * wide) + 3 * narrow * config.intermediate_size)

    prefill = decode = 0
    for index, layer in enumerate(model.layers):
        slots, each = config.cached_tokens(index, context), expanded_bytes(layer.self_attn, dtype)
        seen = slots if config.is_global(index) else slots + chunk
        # A mask as truth values and as numbers, and the scores where the masked kernel is not a fused one.
        masked = chunk * seen * (2 + 2 * narrow)
        prefill = max(prefill, seen * each + masked + chunk * each)
        decode = max(decode, min(rows * slots * each, max(GROUP_BYTES, slots * each)))
    # Logits, and what sampling makes of some rows of them: at most three in the accumulation type, three in 64 bits.
    words = model.head_weight.shape[0]
    logits, chosen = words * 2 * narrow, words * (3 * wide + 3 * 8)
    tables = 2 * len(set(config.layer_kinds)) * context * (config.head_dim // 2) * 4
    return tables + max(
        prefill + activations(chunk) + logits + chosen, decode + activations(rows),
        activations(rows) + rows * logits + min(rows, rows_at_once(words)) * chosen,
    )  # fmt: skip


def foresee(
    model: Gemma3ForCausalLM,
    rows: int,
    context: int,
    chunk: int,
    dtype: torch.dtype | None = None,
    free: int | None = None,
    weights_loaded: bool | None = None,
) -> Forecast:
    """Returns what a batch takes.

    Args:
        model: dense or converted.
        rows, context: sequences, and tokens of each.
        chunk: tokens of a prefill step.
        dtype: of the cache, where a layer does not quantize it; the weights' own when left out.
        free: bytes that may be taken; what the model's device has left, less a reserve, when left out.
        weights_loaded: whether the weights are in memory already, so that ``free`` is what they left; where that is
            not said, those of a model without data are not.
    """
    weight = model.head_weight
    if free is None:
        found = UNKNOWN if weight.is_meta else free_bytes(weight.device)
        free = found if found == UNKNOWN else int(found * (1 - RESERVE))
    workspace = workspace_bytes(model, rows, context, chunk)
    if weight.is_meta if weights_loaded is None else not weights_loaded:
        workspace += weight_bytes(model)
    return Forecast(rows, context, slot_bytes(model, rows, context, dtype or weight.dtype), workspace, free)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Returns the largest number up to ``limit`` that ``fits``, which is true of all below it; 0 if there is none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def largest_batch(model: Gemma3ForCausalLM, context: int, chunk: int, limit: int = 4096, **options) -> int:
    """Returns how many sequences of ``context`` tokens fit, at most ``limit``; options as in ``foresee``."""
    return largest(lambda rows: foresee(model, rows, context, chunk, **options).fits, limit)


def largest_context(model: Gemma3ForCausalLM, rows: int, chunk: int, limit: int | None = None, **options) -> int:
    """Returns how many tokens each of ``rows`` sequences may have, at most ``limit`` (the model's context)."""
    limit = model.config.max_context if limit is None else limit
    return largest(lambda context: foresee(model, rows, context, chunk, **options).fits, limit)


def choose_rows(
    model: Gemma3ForCausalLM,
    wanted: int | None,
    context: int,
    chunk: int,
    dtype: torch.dtype | None = None,
    at_most: int = DEFAULT_ROWS,
) -> int:
    """Returns ``wanted``, or where that is None as many sequences of ``context`` tokens as fit, up to ``at_most``.

    Raises:
        UserError: they do not fit, or not even one does.
    """
    forecast = foresee(model, wanted or 1, context, chunk, dtype)
    options = {"dtype": dtype, "free": forecast.free}
    if forecast.fits:
        return wanted or largest_batch(model, context, chunk, at_most, **options)
    rows = largest_batch(model, context, chunk, **options)
    tokens = largest_context(model, wanted or 1, chunk, context, **options)
    asked = f"max_batch={wanted} sequences" if wanted else "a sequence"
    ways = [f"max_batch={rows} at this context"] * (rows > 0) + [f"context={tokens} at this batch"] * (tokens > 0)
    raise UserError(
        f"{asked} of context={context} tokens need {gib(forecast.needed)} ({gib(forecast.cache)} of it cache), but "
        f"{gib(forecast.free)} are free; " + (f"{' or '.join(ways)} would fit." if ways else "nothing would fit.")
    )


def gib(size: int) -> str:
    """Returns bytes for a person."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"
