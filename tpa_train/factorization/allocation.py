"""Ranks from a byte budget: global layers first, bytes spent where they buy the most KL.

A part (keys or values of one layer) truncated to rank r is modelled as costing KL(r) = s · tail(r), with tail(r) the
calibrated squared error that rank r leaves and s fixed by one measurement of the model's output. Tails are convex in
the rank, so spending greedily on the best KL per byte is optimal under the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpa_train.errors import UserError
from tpa_train.factorization.sensitivity import Bases, Part
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.tpa.quantization import entry_bytes
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs

LOCAL_BELOW = 8  # local layers join when global layers alone would fall below head_dim / 8 numbers


@dataclass(frozen=True)
class Budget:
    """What the cache may cost.

    ``cache_ratio``: how many times smaller than the original's own windowed bfloat16 cache.
    ``context``: tokens at which that is counted.
    ``bits``: width of the cached latents (16, 8 or 4; scales are counted).
    ``multiple``: ranks are multiples of this.
    """

    cache_ratio: float = 4.0
    context: int = 32_768
    bits: int = 8
    multiple: int = 8

    def bytes(self, config: Gemma3Config) -> int:
        """Returns the bytes that the converted cache of one sequence may take."""
        return int(cache_bytes(config, dense_specs(config), self.context) / self.cache_ratio)


def validate_budget(config: Gemma3Config, budget: Budget) -> None:
    """Refuses budgets that no rank can meet, before anything is computed.

    Raises:
        UserError: names the option, the best ratio that can be had, and what to change.
    """
    if budget.cache_ratio < 1:
        raise UserError(f"budget.cache_ratio={budget.cache_ratio:g} would enlarge the cache; use a ratio above 1.")
    if budget.multiple < 1 or budget.multiple > config.head_dim:
        raise UserError(f"budget.multiple={budget.multiple} must lie between 1 and head_dim={config.head_dim}.")
    if budget.context < 1:
        raise UserError(f"budget.context={budget.context} must be at least 1 token.")
    smallest = [_spec(config, budget, budget.multiple, budget.multiple) for _ in range(config.num_layers)]
    least = cache_bytes(config, smallest, budget.context)
    if least > budget.bytes(config):
        best = cache_bytes(config, dense_specs(config), budget.context) / least
        raise UserError(
            f"budget.cache_ratio={budget.cache_ratio:g} cannot be met at budget.context={budget.context}: even rank "
            f"{budget.multiple} in every layer reaches only {best:.1f}; ask for less or lower budget.bits."
        )


def layers_to_convert(config: Gemma3Config, budget: Budget) -> list[int]:
    """Returns the layers to convert: the global ones, and the local ones only when the budget asks for it."""
    globals_ = [i for i in range(config.num_layers) if config.is_global(i)]
    specs = dense_specs(config)
    floor = max(budget.multiple, config.head_dim // LOCAL_BELOW)
    for i in globals_:
        specs[i] = _spec(config, budget, floor, floor)
    if globals_ and cache_bytes(config, specs, budget.context) <= budget.bytes(config):
        return globals_
    return list(range(config.num_layers))


def _spec(config: Gemma3Config, budget: Budget, rank_k: int, rank_v: int) -> LayerSpec:
    def form(rank: int) -> str:
        return "dense" if rank >= config.head_dim else "latent"

    d = config.head_dim
    return LayerSpec(form(rank_k), min(rank_k, d), form(rank_v), min(rank_v, d), budget.bits)


def allocate(
    config: Gemma3Config, budget: Budget, layers: list[int], bases: Bases, measured: dict[Part, float], probe_rank: int
) -> list[LayerSpec]:
    """Spends the byte budget on ranks, best KL per byte first; deterministic.

    Args:
        config: the architecture.
        budget: what the cache may cost.
        layers: those to convert; the others stay dense.
        bases: calibrated directions of ``layers``.
        measured: KL of each part when it alone is truncated to ``probe_rank``.

    Returns:
        One specification a layer.

    Raises:
        UserError: the smallest ranks in ``layers`` already exceed the budget.
    """
    allowed = budget.bytes(config)
    parts: list[Part] = [(layer, kind) for layer in layers for kind in "kv"]
    ranks = dict.fromkeys(parts, budget.multiple)
    slope = {part: max(measured[part], 0.0) / max(bases.tail(part, probe_rank), 1e-300) for part in parts}

    def cost(part: Part, rank: int) -> int:
        tokens = config.cached_tokens(part[0], budget.context)
        return tokens * config.num_kv_heads * entry_bytes(rank, budget.bits)

    def specs() -> list[LayerSpec]:
        out = dense_specs(config)
        for layer in layers:
            out[layer] = _spec(config, budget, ranks[layer, "k"], ranks[layer, "v"])
        return out

    spent = cache_bytes(config, specs(), budget.context)
    if spent > allowed:
        raise UserError(f"budget.cache_ratio={budget.cache_ratio:g} cannot be met by converting layers {layers}.")
    open_parts = set(parts)
    while open_parts:
        best: tuple[float, Part] | None = None
        for part in sorted(open_parts):
            rank, higher = ranks[part], min(ranks[part] + budget.multiple, config.head_dim)
            extra = cost(part, higher) - cost(part, rank)
            if rank == higher or spent + extra > allowed:
                open_parts.discard(part)
                continue
            gain = slope[part] * (bases.tail(part, rank) - bases.tail(part, higher)) / extra
            if best is None or gain > best[0]:
                best = (gain, part)
        if best is not None:
            part = best[1]
            higher = min(ranks[part] + budget.multiple, config.head_dim)
            spent += cost(part, higher) - cost(part, ranks[part])
            ranks[part] = higher
    return specs()
