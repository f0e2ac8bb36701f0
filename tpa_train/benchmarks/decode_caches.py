"""Random attention of a published size's shapes, caches full of its entries, and what is right for them, in float64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import rotary_table
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.decode import CachedTokens
from tpa_train.tpa.decode.reference import attend_reference
from tpa_train.tpa.spec import LayerSpec

DTYPE = torch.bfloat16  # of queries, weights and unquantized entries
HIDDEN = 64  # size of the inputs that entries are made of: attention itself never sees it
POOL = 32_749  # different tokens of a cache; a prime, so that no block of a kernel meets the same ones twice
ROUNDS = 64  # sequences that are filled one by one
# name -> form, and its rank; None: a quarter of head_dim (a joint latent: of as many numbers as two of that)
FORMS: dict[str, tuple[str, int | None]] = {
    "latent": ("latent", None),
    "joint": ("joint", None),
    "joint_norms": ("joint", None),  # with norms in the cache, as conversions make it where they add little
    "contextual1": ("contextual", 1),
    "contextual2": ("contextual", 2),
    "constant_a1": ("constant_a", 1),
    "constant_a2": ("constant_a", 2),
    "tucker": ("tucker", None),
    "dense": ("dense", None),
}


def check_forms(names: list[str]) -> None:
    """Raises UserError if there is no form of a name, or none at all."""
    if not names:
        raise UserError(f"forms= needs at least one of {', '.join(FORMS)}.")
    for name in names:
        if name not in FORMS:
            raise UserError(f"forms={name} is unknown{nearest(name, FORMS)}")


def form_spec(name: str, config: Gemma3Config, bits: int) -> LayerSpec:
    """Returns what global layer a name of ``FORMS`` means for a model of these sizes."""
    form, rank = FORMS[name]
    if form == "dense":
        rank = config.head_dim
    elif rank is None:
        rank = config.head_dim // 4
        if form == "joint":
            rank *= 2 * config.num_kv_heads
    spec = LayerSpec(form, rank, form, rank, bits)
    return spec.with_norms(config, config.layer_kinds.index("global")) if name == "joint_norms" else spec


def rebuild_flops(config: Gemma3Config, spec: LayerSpec) -> int:
    """Returns the operations that it takes to rebuild one token's keys of all KV heads; 0 where none are rebuilt."""
    if spec.form_k not in ("latent", "joint", "tucker", "constant_b"):
        return 0
    return 2 * config.num_kv_heads * config.head_dim * spec.rank_k


@torch.no_grad()
def randomize(parameters: Iterable[tuple[str, nn.Parameter]], seed: int) -> None:
    """Gives named parameters random values that keep the size of what goes through; norms and centers are small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters:
        small = name.endswith(("norm.weight", "center", "bias"))
        scale = 0.2 if small else parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def random_attention(
    config: Gemma3Config, spec: LayerSpec | None, device: torch.device, seed: int, dtype: torch.dtype = DTYPE
) -> Attention:
    """Returns a global layer's attention with random weights, on ``HIDDEN`` inputs; dense where there is no spec."""
    narrow = dataclasses.replace(config, hidden_size=HIDDEN, num_layers=1, layer_kinds=("global",), vision=None)
    attention = Attention(narrow, 0) if spec is None else FactorizedAttention(narrow, 0, spec)
    randomize(attention.named_parameters(), seed)
    return attention.to(device, dtype).requires_grad_(False).eval()


@torch.no_grad()
def random_queries(attention: Attention, batch: int, positions: Tensor, seed: int) -> Tensor:
    """Returns normalised and rotated queries [B, L, H, d] of random tokens at ``positions`` int [L]."""
    weight = next(attention.parameters())
    generator = torch.Generator(weight.device).manual_seed(seed)
    x = torch.randn(batch, len(positions), HIDDEN, generator=generator, device=weight.device)
    table = rotary_table(attention.config, attention.kind, positions)
    return attention.queries(x.to(weight.dtype), table).to(weight.dtype)


@torch.no_grad()
def random_entries(attention: Attention, buffers: tuple[Tensor, ...], seed: int) -> None:
    """Fills a layer's buffers [B, slots, …], one per item of its ``storage``, with the entries of random tokens.

    At most ``POOL`` tokens are computed; each of the first ``ROUNDS`` sequences goes round them from another start, and
    later ones repeat these.
    """
    weight = next(attention.parameters())
    device, slots = weight.device, buffers[0].shape[1]
    pool = min(slots, POOL)
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(1, pool, attention.config.hidden_size, generator=generator, device=device).to(weight.dtype)
    rotary = rotary_table(attention.config, attention.kind, torch.arange(pool, device=device))
    packed = attention.pack(attention.write(x, rotary))
    places = torch.arange(slots, device=device)
    for row in range(min(ROUNDS, len(buffers[0]))):
        taken = (places + row * (pool // 3 + 1)) % pool
        for buffer, tokens in zip(buffers, packed, strict=True):
            torch.index_select(tokens[0].to(buffer.dtype), 0, taken, out=buffer[row])
    for buffer in buffers:
        for later in buffer[ROUNDS:].split(ROUNDS):
            later.copy_(buffer[: len(later)])


def random_cache(attention: Attention, batch: int, context: int, seed: int) -> CachedTokens:
    """Returns a cache of ``batch`` full sequences of ``context`` tokens, packed as the layer packs them."""
    weight = next(attention.parameters())
    device = weight.device
    stored = tuple(
        torch.empty(batch, context, *shape, dtype=own or weight.dtype, device=device)
        for shape, own in attention.storage()
    )
    random_entries(attention, stored, seed)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    rotary = rotary_table(attention.config, attention.kind, torch.arange(context, device=device))
    return CachedTokens(stored, lengths, rotary)


def checked_rows(batch: int) -> list[int]:
    """Returns the sequences whose results are checked: the first, and the last, whose bytes lie farthest away."""
    return sorted({0, batch - 1})


def in_float64(attention: Attention) -> Attention:
    """Returns a copy that computes in float64."""
    return copy.deepcopy(attention).double()


@torch.no_grad()
def exact_results(attention: Attention, queries: Tensor, cached: CachedTokens) -> Tensor:
    """Returns what attention gives for the ``checked_rows`` of one query a sequence, float64 [rows, H, e]."""
    wide = in_float64(attention)
    results = []
    for row in checked_rows(len(queries)):  # one at a time: wide keys take several times the cache
        part = CachedTokens(
            tuple(t[row : row + 1] for t in cached.stored), cached.lengths[row : row + 1], cached.rotary
        )
        results.append(attend_reference(wide, queries[row : row + 1].double(), part))
    return torch.cat(results)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Returns ‖found − exact‖ / ‖exact‖."""
    return float((found.double() - exact).norm() / exact.norm())


def cache_nbytes(cached: CachedTokens) -> int:
    """Returns the bytes of the cache's buffers as allocated."""
    return sum(t.numel() * t.element_size() for t in cached.stored)


def needed_bytes(config: Gemma3Config, token_bytes: int, batch: int, context: int) -> int:
    """Returns the bytes of a cell: its cache, and what the check of one sequence in float64 takes."""
    keys, heads = config.num_kv_heads * config.head_dim, config.num_heads * config.head_dim
    # Keys on their way through norm and rotation, values, and both twice more for every query head.
    wide = 8 * context * (5 * keys + 4 * heads)
    return batch * context * token_bytes + wide + min(context, POOL) * 16 * keys
