"""Ranks, bits and forms from a byte budget: bytes are spent where they buy the most KL.

Every layer offers choices (``factorization.choices``) whose KLs add up under the model. Along the lower convex hulls of
bytes against KL, buying the best KL per byte first is optimal; what is left in the end goes to the best single step
that fits. Global layers count with the whole context, local ones with their window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tpa_train.errors import UserError, nearest
from tpa_train.factorization.choices import (
    Choice,
    Groups,
    combine,
    convex,
    dense_choice,
    latent_choices,
    measured_choice,
    rounded_key_choices,
)
from tpa_train.factorization.rounded_keys import RoundingCosts
from tpa_train.factorization.sensitivity import NOISE_BITS, Probe
from tpa_train.factorization.solutions import Bases
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.tpa.entries import check_widths
from tpa_train.tpa.quantization import BITS, GROUP
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs

LOCAL_BELOW = 8  # without rounding, local layers join when global layers alone would fall below head_dim / 8 numbers
AUTO = ("latent", "joint", "contextual", "constant_a")  # that compete where none are named
# That a budget may choose from. "dense": keys in fewer bits, and otherwise as the original caches them, beside values
# that are latents: nothing has to be rebuilt when it is read. It buys speed; for bytes alone there are better ones.
FORMS = (*AUTO, "dense")
ALONE = ("latent", "joint", "dense")  # that can be made smaller and smaller, and so meet a budget without others
MEASURED_RANKS = 3  # contextual forms are measured at R = 1 … this
CORRECTION = 50.0  # the most that a measured layer changes what its other choices are expected to cost
MIXED_BITS = (16, 8, 4)  # and in these widths, of those that the budget allows


@dataclass(frozen=True)
class Budget:
    """What the cache may cost, and what may be tried to meet it.

    ``cache_ratio``: how many times smaller than the original's own windowed bfloat16 cache.
    ``context``: tokens at which that is counted.
    ``bits``: widths that cached numbers may have (scales are counted).
    ``multiple``: ranks are multiples of this.
    ``forms``: that compete.
    """

    cache_ratio: float = 4.0
    context: int = 32_768
    bits: tuple[int, ...] = (16, 8, 6, 4, 3, 2)
    multiple: int = 8
    forms: tuple[str, ...] = ("latent",)

    def bytes(self, config: Gemma3Config) -> int:
        """Returns the bytes that the converted cache of one sequence may take."""
        return int(cache_bytes(config, dense_specs(config), self.context) / self.cache_ratio)

    @property
    def rounds(self) -> bool:
        """Whether anything may be cached in fewer than 16 bits."""
        return min(self.bits) < 16

    @property
    def latent_kinds(self) -> str:
        """Keys ("k") and values ("v") that may be latents of their own: values also beside dense keys."""
        return "kv" if "latent" in self.forms else "v" if "dense" in self.forms else ""

    @property
    def group_size(self) -> int:
        """Latents of a row that are bought at a time."""
        return GROUP if self.rounds else self.multiple


def validate_budget(config: Gemma3Config, budget: Budget) -> None:
    """Refuses budgets that no choice can meet, before anything is computed.

    Raises:
        UserError: names the option, the best ratio that can be had, and what to change.
    """
    if not 0 < budget.cache_ratio < math.inf:  # nor NaN
        raise UserError(f"budget.cache_ratio={budget.cache_ratio:g} is no ratio; use a number above 1, such as 4.")
    if budget.cache_ratio < 1:
        raise UserError(f"budget.cache_ratio={budget.cache_ratio:g} would enlarge the cache; use a ratio above 1.")
    if not budget.bits:
        raise UserError(f"budget.bits names no width; choose from {', '.join(map(str, BITS))}.")
    check_widths(budget.bits)
    if budget.multiple < 1 or budget.multiple > config.head_dim:
        raise UserError(f"budget.multiple={budget.multiple} must lie between 1 and head_dim={config.head_dim}.")
    if budget.context < 1:
        raise UserError(f"budget.context={budget.context} must be at least 1 token.")
    for form in budget.forms:
        if form not in FORMS:
            raise UserError(f"budget.forms: '{form}' cannot be chosen by a budget{nearest(form, FORMS)}")
    if not set(ALONE) & set(budget.forms):
        raise UserError("budget.forms needs latent, joint or dense: the other forms cannot meet every budget.")
    rank, smallest = budget.multiple, _smallest_bytes(config, budget)
    if smallest > budget.bytes(config):
        beside = " beside dense keys" if not {"latent", "joint"} & set(budget.forms) else ""
        best = int(10 * cache_bytes(config, dense_specs(config), budget.context) / smallest) / 10  # can be had itself
        raise UserError(
            f"budget.cache_ratio={budget.cache_ratio:g} cannot be met at budget.context={budget.context}: even rank "
            f"{rank} in every layer{beside} reaches only {best:.1f}; ask for less or allow fewer budget.bits."
        )


def uniform_spec(config: Gemma3Config, budget: Budget, rank: int, bits: int) -> LayerSpec:
    """Returns a layer of ``rank`` at one width in the first of ``ALONE`` that the budget has."""
    form = next(form for form in ALONE if form in budget.forms)
    if form == "dense":
        return LayerSpec("dense", config.head_dim, "latent", rank, bits)
    return LayerSpec(form, rank, form, rank, bits)


def _smallest_bytes(config: Gemma3Config, budget: Budget) -> int:
    least = uniform_spec(config, budget, budget.multiple, min(budget.bits))
    return cache_bytes(config, [least] * config.num_layers, budget.context)


def can_be_met(config: Gemma3Config, budget: Budget) -> bool:
    """Returns whether the budget's forms can be as small as it asks for."""
    return _smallest_bytes(config, budget) <= budget.bytes(config)


def layers_to_convert(config: Gemma3Config, budget: Budget) -> list[int]:
    """Returns the layers that the budget may touch.

    Local layers are worth converting for their bits; by rank alone only when the global layers cannot carry the budget.
    """
    globals_ = [i for i in range(config.num_layers) if config.is_global(i)]
    everything = list(range(config.num_layers))
    if budget.rounds or not globals_:
        return everything
    specs = dense_specs(config)
    floor = max(budget.multiple, config.head_dim // LOCAL_BELOW)
    keys = ("dense", config.head_dim) if set(budget.forms) == {"dense"} else ("latent", floor)
    for i in globals_:
        specs[i] = LayerSpec(*keys, "latent", floor)
    return globals_ if cache_bytes(config, specs, budget.context) <= budget.bytes(config) else everything


def plan_probes(config: Gemma3Config, budget: Budget, layers: list[int]) -> list[Probe]:
    """Returns what has to be measured to allocate ``budget`` over ``layers``."""
    d, probes = config.head_dim, []
    # Each width of these is a measurement of its own: those between are left out, where others are allowed.
    mixed = [b for b in budget.bits if b in MIXED_BITS] or [b for b in budget.bits if b > 2]
    for layer in layers:
        shares = (8, 4, 2) if config.is_global(layer) else (4,)
        for kind in budget.latent_kinds:
            probes += [Probe(layer, kind, "latent", max(1, d // share)) for share in shares]
            if budget.rounds:
                probes.append(Probe(layer, kind, "latent", d, NOISE_BITS))
        if "dense" in budget.forms:
            probes.append(Probe(layer, "k", "dense", d, NOISE_BITS))
        if "joint" in budget.forms:
            width = 2 * config.num_kv_heads * d
            probes += [Probe(layer, "kv", "joint", max(1, width // (2 * share))) for share in shares]
            if budget.rounds:
                probes.append(Probe(layer, "kv", "joint", width, NOISE_BITS))
        for form in ("contextual", "constant_a"):
            if form in budget.forms and config.num_kv_heads > 1:  # with one head they are the original, and larger
                probes += [
                    Probe(layer, kind, form, rank, bits)
                    for kind in "kv"
                    for rank in range(1, min(MEASURED_RANKS, config.num_kv_heads - 1) + 1)
                    for bits in mixed
                ]
    return probes


def layer_choices(
    config: Gemma3Config,
    budget: Budget,
    layer: int,
    bases: Bases,
    measured: dict[Probe, float],
    joint: Groups | None = None,
    rounded: RoundingCosts | None = None,
) -> list[Choice]:
    """Returns every choice of one layer that can be best for some budget, bytes ascending.

    Args:
        config, budget, layer: as elsewhere.
        bases: calibrated directions.
        measured: KLs by probe.
        joint: energies of the joint latent, where it competes.
        rounded: costs of rounding rotated keys, where these compete.
    """
    own = {p: kl for p, kl in measured.items() if p.layer == layer}

    def curve(kind: str, form: str, groups: Groups) -> list[Choice]:
        ranks = {p.rank: kl for p, kl in own.items() if (p.kind, p.form, p.bits) == (kind, form, 16)}
        noise = [kl for p, kl in own.items() if (p.kind, p.form, p.bits) == (kind, form, NOISE_BITS)]
        return latent_choices(
            config, kind, form, groups, ranks, noise[0] if noise else None, budget.bits, budget.multiple, layer
        )

    parts: dict[str, list[Choice]] = {"k": [], "v": []}
    for kind, found in parts.items():
        if kind in budget.latent_kinds:
            basis = bases.part(layer, kind)
            found += curve(kind, "latent", Groups.of(basis.energies, basis.spread.square(), budget.group_size))
        if kind == "k" and rounded is not None:
            noise = own[Probe(layer, "k", "dense", config.head_dim, NOISE_BITS)]
            found += rounded_key_choices(config, rounded, noise, budget.bits)
        forms = set(budget.forms) - set(ALONE)
        singly = [p for p in own if p.kind == kind and p.form in forms and p.bits in budget.bits]
        found += [measured_choice(config, p, own[p]) for p in singly]
        if found and 16 in budget.bits:  # first: of two that lose nothing in the same bytes, the original is taken
            found.insert(0, dense_choice(config))
    choices = combine(parts["k"], parts["v"]) if parts["k"] and parts["v"] else []
    if joint is not None:
        choices += curve("kv", "joint", joint)
    return sorted(choices, key=lambda c: (c.bytes, c.kl))


def joint_groups(budget: Budget, bases: Bases, attention, layer: int) -> Groups:
    """Returns the energies of a layer's joint latent; its latents have unit spread, so all energy is variance."""
    energies = bases.joint(attention, layer).energies[None]
    return Groups.of(energies, energies, budget.group_size)


def corrected(
    choices: dict[int, list[Choice]], specs: list[LayerSpec], measured: dict[int, float]
) -> dict[int, list[Choice]]:
    """Returns choices whose expected KLs are scaled, layer by layer, to what the chosen one was measured to cost.

    Probes are far from what is chosen: whole layers at one width or one rank. On the 270M the model of a layer that was
    made from them was off by a factor of .3 to 80, layer by layer, which the sum of all layers hides.

    Args:
        choices: of every layer that may change.
        specs: one a layer, chosen from ``choices``.
        measured: KLs of these in nats, by layer (``sensitivity.layer_kls``); other layers' choices stay as they are.
    """
    found = {}
    for layer, own in choices.items():
        expected = next((c.kl for c in own if c.spec == specs[layer]), 0.0)
        factor = measured[layer] / expected if layer in measured and expected > 0 else 1.0
        factor = min(max(factor, 1 / CORRECTION), CORRECTION)
        found[layer] = [replace(choice, kl=factor * choice.kl) for choice in own]
    return found


def allocate(config: Gemma3Config, budget: Budget, choices: dict[int, list[Choice]]) -> tuple[list[LayerSpec], float]:
    """Spends the byte budget, best KL per byte first; deterministic.

    Args:
        config: the architecture.
        budget: what the cache may cost.
        choices: of every layer that may change (``layer_choices``); the others stay dense.

    Returns:
        One specification a layer, and the KL that the model expects of them.

    Raises:
        UserError: the smallest choices of these layers already exceed the budget.
    """
    allowed = budget.bytes(config)
    tokens = {layer: config.cached_tokens(layer, budget.context) for layer in choices}
    hulls = {layer: [p[2] for p in convex([(c.bytes, c.kl, c) for c in found])] for layer, found in choices.items()}
    position = dict.fromkeys(sorted(choices), 0)
    untouched = [spec if i not in choices else None for i, spec in enumerate(dense_specs(config))]
    spent = sum(
        config.cached_tokens(i, budget.context) * spec.bytes_per_token(config)
        for i, spec in enumerate(untouched)
        if spec is not None
    ) + sum(tokens[layer] * hulls[layer][0].bytes for layer in position)
    if spent > allowed:
        raise UserError(
            f"budget.cache_ratio={budget.cache_ratio:g} cannot be met by converting layers {list(position)}."
        )
    open_layers = set(position)
    while open_layers:
        best: tuple[float, int, int] | None = None
        for layer in sorted(open_layers):
            hull, at = hulls[layer], position[layer]
            extra = tokens[layer] * (hull[at + 1].bytes - hull[at].bytes) if at + 1 < len(hull) else 0
            if at + 1 == len(hull) or spent + extra > allowed:
                open_layers.discard(layer)
                continue
            ratio = (hull[at].kl - hull[at + 1].kl) / extra
            if best is None or ratio > best[0]:
                best = (ratio, layer, extra)
        if best is not None:
            position[best[1]] += 1
            spent += best[2]
    chosen = {layer: hulls[layer][at] for layer, at in position.items()}
    _spend_the_rest(choices, chosen, tokens, allowed - spent)
    specs = [chosen[i].spec if spec is None else spec for i, spec in enumerate(untouched)]
    return specs, sum(choice.kl for choice in chosen.values())


def _spend_the_rest(
    choices: dict[int, list[Choice]], chosen: dict[int, Choice], tokens: dict[int, int], left: int
) -> None:
    """Takes, while one fits, the single change (on a hull or not) that lowers the KL most."""
    while True:
        best: tuple[float, int, Choice] | None = None
        for layer in sorted(choices):
            now = chosen[layer]
            for choice in choices[layer]:
                gain = now.kl - choice.kl
                fits = tokens[layer] * (choice.bytes - now.bytes) <= left
                if fits and gain > 0 and (best is None or gain > best[0]):
                    best = (gain, layer, choice)
        if best is None:
            return
        _, layer, choice = best
        left -= tokens[layer] * (choice.bytes - chosen[layer].bytes)
        chosen[layer] = choice


def uniform_specs(config: Gemma3Config, budget: Budget, layers: list[int], bits: int) -> list[LayerSpec] | None:
    """Returns latents of one rank for K and V in all ``layers`` at ``bits``: the largest that fits, None if none does.
    """
    best = None
    for rank in range(budget.multiple, config.head_dim + 1, budget.multiple):
        specs = dense_specs(config)
        for layer in layers:
            specs[layer] = LayerSpec("latent", rank, "latent", rank, bits)
        if cache_bytes(config, specs, budget.context) <= budget.bytes(config):
            best = specs
    return best
