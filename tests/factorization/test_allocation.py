"""The byte budget is spent to the last step, where it buys the most, and refused in words when it cannot be met."""

import functools
import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import small_config

from tpa_train.errors import UserError
from tpa_train.factorization.allocation import (
    AUTO,
    CORRECTION,
    FORMS,
    Budget,
    allocate,
    can_be_met,
    corrected,
    layer_choices,
    layers_to_convert,
    plan_probes,
    uniform_specs,
    validate_budget,
)
from tpa_train.factorization.choices import Choice, Groups, convex, rounding_error
from tpa_train.factorization.latent import Basis
from tpa_train.factorization.rounded_keys import RoundingCosts
from tpa_train.factorization.sensitivity import NOISE_BITS, Probe
from tpa_train.factorization.solutions import Bases
from tpa_train.gemma3.config import SIZES
from tpa_train.tpa.quantization import GROUP
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs

WIDTHS = (16, 8, 6, 4, 3, 2)


def _config(groups=1, **changes):
    return small_config(**(dict(num_layers=12, num_kv_heads=groups, head_dim=64, sliding_window=32) | changes))


def _bases(config, layers, decay=0.93):
    """The same spectrum everywhere, all of it variance, so that only sensitivity and cost decide."""
    energies = (decay ** torch.arange(config.head_dim, dtype=torch.float64)).expand(config.num_kv_heads, -1)
    empty = torch.zeros(0)
    one = {i: Basis(energies, empty, empty, empty, energies.sqrt()) for i in layers}
    return Bases(one, dict(one))


def _joint(config, budget, decay=0.93):
    """The joint latent's energies: those of keys and values of every head together."""
    count = 2 * config.num_kv_heads
    energies = (decay ** torch.arange(config.head_dim, dtype=torch.float64)).repeat_interleave(count)[None] / 2
    return Groups.of(energies, energies, GROUP if budget.rounds else budget.multiple)


def _rounding():
    """Costs of two groups of 32, of which rounding the second one costs more."""
    return RoundingCosts({bits: [share * rounding_error(bits) for share in (0.1, 0.9)] for bits in WIDTHS})


def _kl(config, bases, probe, cost):
    """What a probe measures if a unit of energy costs ``cost``."""
    if probe.form == "joint":
        energies = _joint(config, Budget(), 0.93)
        lost = energies.tail(probe.rank) if probe.bits == 16 else float(energies.energies.sum())
    elif probe.form == "latent":
        lost = bases.part(probe.layer, probe.kind).tail(probe.rank if probe.bits == 16 else 0)
    else:
        return cost * config.num_kv_heads * 0.3 / probe.rank + (0 if probe.bits == 16 else 0.1 / probe.bits)
    return cost * lost * (1.0 if probe.bits == 16 else rounding_error(NOISE_BITS))


@functools.cache
def _layer_choices(config, budget, layer, costs):
    bases, costs = _bases(config, [layer]), dict(zip("kv", costs, strict=True))
    measured = {
        p: _kl(config, bases, p, sum(costs[k] for k in p.kind) / len(p.kind))
        for p in plan_probes(config, budget, [layer])
    }
    joint = _joint(config, budget) if "joint" in budget.forms else None
    rounded = _rounding() if "dense" in budget.forms else None
    return layer_choices(config, budget, layer, bases, measured, joint, rounded)


def _choices(config, budget, layers=None, costs=None):
    """Choices of ``layers``, as if measured. ``costs``: (layer, kind) -> KL of a unit of energy, .1 where left out."""
    layers = layers_to_convert(config, budget) if layers is None else layers
    any_budget = replace(budget, cache_ratio=1.0, context=1)  # choices do not depend on these
    twins = {kind: config.layer_kinds.index(kind) for kind in set(config.layer_kinds)}
    own = {i: tuple((costs or {}).get((i, kind), 0.1) for kind in "kv") for i in layers}
    return {i: _layer_choices(config, any_budget, twins[config.layer_kinds[i]], own[i]) for i in layers}


def _spent(config, budget, specs):
    return cache_bytes(config, specs, budget.context)


def _kl_of(choices, layer, spec):
    return min(c.kl for c in choices[layer] if c.spec == spec)


FORM_SETS = [(1, ("latent",)), (4, ("latent",)), (1, ("joint",)), (4, AUTO)]
RATIOS = [(1.5, 100), (2, 4096), (3.3, 1000), (4, 32_768), (4, 200), (7.9, 32_768)]
CASES = [
    *((groups, forms, bits, *ratio) for groups, forms in FORM_SETS
      for bits in [(16,), WIDTHS, (8,), (4, 2)] for ratio in RATIOS),
    *((groups, forms, bits, *ratio) for groups, forms in [(1, ("dense",)), (4, ("dense",)), (4, FORMS)]
      for bits in [WIDTHS, (8, 4), (4, 2)] for ratio in RATIOS[:3]),
    *((groups, ("dense",), (16,), ratio, 32_768) for groups in (1, 4) for ratio in (1.1, 1.3, 1.6)),
]  # fmt: skip


@pytest.mark.parametrize("groups,forms,bits,ratio,context", CASES)
@pytest.mark.parametrize("multiple", [8, 5])
def test_the_budget_is_met_and_nothing_that_helps_is_left(groups, forms, bits, ratio, context, multiple):
    config, budget = _config(groups), Budget(ratio, context, bits, multiple, forms)
    validate_budget(config, budget)
    choices = _choices(config, budget)
    specs, expected = allocate(config, budget, choices)
    allowed = cache_bytes(config, dense_specs(config), context) / ratio
    assert budget.bytes(config) == int(allowed) >= _spent(config, budget, specs)
    assert expected == pytest.approx(sum(_kl_of(choices, i, specs[i]) for i in choices))
    for layer, found in choices.items():
        now = _kl_of(choices, layer, specs[layer])
        for choice in found:
            assert choice.bytes == choice.spec.bytes_per_token(config)
            if choice.kl < now:
                richer = [*specs[:layer], choice.spec, *specs[layer + 1 :]]
                assert _spent(config, budget, richer) > allowed
    for layer, spec in enumerate(specs):
        if layer not in choices:
            assert not spec.converted
            continue
        assert spec == spec.with_norms(config, layer)
        for kind in "kv":
            form, rank = getattr(spec, f"form_{kind}"), getattr(spec, f"rank_{kind}")
            whole = 2 * groups * 64 if form == "joint" else 64
            widths = getattr(spec, f"bits_{kind}")
            assert form in (*forms, "dense") or (form, kind, forms) == ("latent", "v", ("dense",))
            assert form in ("contextual", "constant_a") or rank == whole or multiple <= rank and rank % multiple == 0
            assert set(widths if isinstance(widths, tuple) else [widths]) <= set(bits)


@pytest.mark.parametrize("ratio", [3.0, 6.0, 12.0])
def test_rounding_pays(ratio):
    """At the same bytes, ranks and bits together are expected to cost less than ranks at any one width."""
    config, kls = _config(4, head_dim=256), {}
    for bits in ((16,), (8,), (4,), WIDTHS):
        budget = Budget(ratio, 32_768, bits)
        kls[bits] = allocate(config, budget, _choices(config, budget))[1]
    assert kls[WIDTHS] < 0.95 * min(kl for bits, kl in kls.items() if bits != WIDTHS)


@pytest.mark.parametrize("bits", [(16,), WIDTHS])
def test_deterministic(bits):
    config, budget = _config(4), Budget(4.0, 4096, bits)
    first, again = (allocate(config, budget, _choices(config, budget)) for _ in range(2))
    backwards = dict(reversed(list(_choices(config, budget).items())))
    assert first == again == allocate(config, budget, backwards)


@pytest.mark.parametrize("bits", [(16,), (8,), WIDTHS])
def test_more_is_spent_where_it_hurts_more(bits):
    config, budget = _config(), Budget(4.0, 32_768, bits)
    costs = {(5, "k"): 0.01, (5, "v"): 0.1, (11, "k"): 0.5, (11, "v"): 0.02}

    def bytes_of(costs):
        specs, _ = allocate(config, budget, _choices(config, budget, [5, 11], costs))
        return {
            (i, kind): sum(e.nbytes for e in (specs[i].key_entries if kind == "k" else specs[i].value_entries)(config))
            for i, kind in costs
        }

    spent = bytes_of(costs)
    in_order = [spent[part] for part in sorted(costs, key=costs.get)]
    assert in_order == sorted(in_order) and in_order[0] < in_order[-1]
    swapped = bytes_of({(i, {"k": "v", "v": "k"}[kind]): cost for (i, kind), cost in costs.items()})
    assert swapped[11, "v"] > swapped[11, "k"] and spent[11, "k"] > spent[11, "v"]


def test_the_best_kl_per_byte_is_bought_first():
    """A step in a local layer costs 32 tokens, in a global one 100. With tails ∝ .93^r, gains per byte are equal where
    .93^Δr = 32/100: the local layers' ranks lie 16 above the global ones'."""
    config, budget = _config(), Budget(2.0, 100, (16,), 1)
    specs, _ = allocate(config, budget, _choices(config, budget))
    ranks = {
        kind: [r for i in range(12) if config.layer_kinds[i] == kind for r in (specs[i].rank_k, specs[i].rank_v)]
        for kind in ("local", "global")
    }
    for values in ranks.values():
        assert 1 < min(values) and max(values) < 64 and max(values) - min(values) <= 1
    assert sum(ranks["local"]) / 20 - sum(ranks["global"]) / 4 == pytest.approx(15.7, abs=1)


def test_long_contexts_take_bits_from_global_layers_first():
    """With bits in play, too: a local layer is never poorer than a global one, and richer at long context."""
    config, budget = _config(), Budget(4.0, 32_768)
    specs, _ = allocate(config, budget, _choices(config, budget))
    local, far = ([s.bytes_per_token(config) for i, s in enumerate(specs) if config.is_global(i) == g] for g in (0, 1))
    assert min(local) > max(far)


def test_parts_that_cost_nothing_get_what_is_left():
    config, budget = _config(), Budget(3.0, 32_768, (16,))
    specs, expected = allocate(config, budget, _choices(config, budget, [5, 11], {(5, "k"): 0.0}))
    assert specs[5].rank_k == 8 < min(specs[5].rank_v, specs[11].rank_k, specs[11].rank_v)
    specs, expected = allocate(config, budget, _choices(config, budget, None, dict.fromkeys(
        [(i, kind) for i in range(12) for kind in "kv"], 0.0)))  # fmt: skip
    assert _spent(config, budget, specs) <= budget.bytes(config) and expected < 1e-5


def test_no_exchange_of_a_step_between_two_parts_helps():
    """Equal costs and equal steps (global layers, 16 bits): the allocation is the best of all its neighbours."""
    config, budget = _config(), Budget(4.0, 32_768, (16,))
    costs = {(5, "k"): 0.03, (5, "v"): 0.1, (11, "k"): 0.2, (11, "v"): 0.07}
    specs, expected = allocate(config, budget, _choices(config, budget, [5, 11], costs))
    bases = _bases(config, [5, 11])
    ranks = {(i, kind): getattr(specs[i], f"rank_{kind}") for i, kind in costs}

    def modelled(ranks):
        return sum(costs[i, kind] * bases.part(i, kind).tail(r) for (i, kind), r in ranks.items())

    assert modelled(ranks) == pytest.approx(expected, rel=1e-9)
    tried = 0
    for a, b in itertools.permutations(ranks, 2):
        if ranks[a] + 8 <= 64 and ranks[b] - 8 >= 8:
            tried += 1
            assert modelled(ranks | {a: ranks[a] + 8, b: ranks[b] - 8}) >= modelled(ranks)
    assert tried > 3


def _two_layers(local, far):
    """A local and a global layer with free choices (bytes, KL); the rank says which one it is."""
    config = small_config(num_layers=2, layer_kinds=("local", "global"), sliding_window=4)
    choices = {
        layer: [Choice(b, float(kl), LayerSpec("latent", r, "latent", r)) for r, (b, kl) in enumerate(points)]
        for layer, points in enumerate((local, far))
    }
    return config, choices


POINTS = st.lists(st.tuples(st.integers(1, 32), st.integers(0, 50)), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(POINTS, POINTS, st.floats(1.0, 20.0))
def test_against_every_allocation(local, far, ratio):
    """Greedy along hulls is at most one hull step's KL above the best of all allocations, and the best where it
    ends with all bytes spent; a step in the global layer costs three times as many tokens."""
    config, choices = _two_layers(local, far)
    budget, tokens = Budget(ratio, 12), {0: 4, 1: 12}
    allowed = budget.bytes(config)
    pairs = [
        (tokens[0] * a.bytes + tokens[1] * b.bytes, a.kl + b.kl) for a, b in itertools.product(choices[0], choices[1])
    ]
    possible = [p for p in pairs if p[0] <= allowed]
    if not possible:
        with pytest.raises(UserError, match=r"cannot be met by converting layers \[0, 1\]"):
            allocate(config, budget, choices)
        return
    specs, expected = allocate(config, budget, choices)
    chosen = [choices[i][specs[i].rank_k] for i in (0, 1)]
    spent = sum(tokens[i] * chosen[i].bytes for i in (0, 1))
    assert spent <= allowed and expected == sum(c.kl for c in chosen)
    best = min(kl for _, kl in possible)
    hulls = [convex([(tokens[i] * c.bytes, c.kl) for c in choices[i]]) for i in (0, 1)]
    steps = [a[1] - b[1] for hull in hulls for a, b in zip(hull, hull[1:], strict=False)]
    assert best <= expected <= best + max(steps, default=0)
    # Where a budget is exactly what some steps along both hulls cost, in order of KL per byte, nothing is better.
    position, ends = [hull[0] for hull in hulls], []
    order = sorted(
        ((a[1] - b[1]) / (b[0] - a[0]), i, b) for i, hull in enumerate(hulls) for a, b in itertools.pairwise(hull)
    )
    for _, i, point in [(0, 0, position[0]), *reversed(order)]:
        position[i] = point
        ends.append(sum(p[0] for p in position))
    if allowed in ends:
        assert expected == best


# --------------------------------------------------------------------------------------------------- layers and probes


@pytest.mark.parametrize("size", SIZES)
def test_rank_alone_touches_local_layers_only_when_the_budget_asks(size):
    config = SIZES[size]
    globals_ = [i for i in range(config.num_layers) if config.is_global(i)]
    everything = list(range(config.num_layers))
    assert layers_to_convert(config, Budget(3.0, 32_768, (16,))) == globals_
    assert layers_to_convert(config, Budget(1.0, 32_768, (16,))) == globals_
    # A short context: the windows hold most of the cache, and the global layers alone cannot give four.
    assert layers_to_convert(config, Budget(4.0, config.sliding_window, (16,))) == everything
    # Bits are worth having everywhere.
    assert layers_to_convert(config, Budget(1.0, 32_768)) == everything
    assert layers_to_convert(config, Budget(30.0, 32_768, (4,))) == everything


def test_global_layers_alone_carry_what_they_are_asked_to():
    """Whatever ``layers_to_convert`` says of rank alone, the allocation can meet."""
    for ratio in (2, 3, 4, 5, 6, 7, 7.9):
        config, budget = _config(), Budget(ratio, 4096, (16,))
        layers = layers_to_convert(config, budget)
        specs, _ = allocate(config, budget, _choices(config, budget, layers))
        assert [i for i, s in enumerate(specs) if s.converted] == layers
        assert layers == ([5, 11] if ratio < 7 else list(range(12)))


def test_a_model_without_global_layers_converts_what_it_has():
    config = small_config(num_layers=2, layer_kinds=("local", "local"))
    assert layers_to_convert(config, Budget(1.5, 100, (16,), 2)) == [0, 1]


def test_probes():
    """Three ranks in a global layer, one in a local one, and everything rounded where bits may be bought."""
    config = _config()
    assert plan_probes(config, Budget(bits=(16,)), [5]) == [
        Probe(5, kind, "latent", rank) for kind in "kv" for rank in (8, 16, 32)
    ]
    assert plan_probes(config, Budget(), [0]) == [
        Probe(0, kind, "latent", rank, bits) for kind in "kv" for rank, bits in ((16, 16), (64, NOISE_BITS))
    ]
    assert plan_probes(config, Budget(forms=("joint",)), [5]) == [
        Probe(5, "kv", "joint", rank, bits) for rank, bits in ((8, 16), (16, 16), (32, 16), (128, NOISE_BITS))
    ]
    assert plan_probes(config, Budget(bits=(16, 8, 4), forms=("dense",)), [0]) == [
        Probe(0, "v", "latent", 16), Probe(0, "v", "latent", 64, NOISE_BITS),
        Probe(0, "k", "dense", 64, NOISE_BITS),
    ]  # fmt: skip
    both = plan_probes(config, Budget(forms=AUTO), [0, 5])
    assert len(both) == len(set(both)) and {p.form for p in both} == {"latent", "joint"}, "one head: nothing to mix"


def test_contextual_probes_are_cheaper_than_the_original():
    for groups, ranks in ((2, {1}), (4, {1, 2, 3})):
        config = _config(groups)
        probes = plan_probes(config, Budget(forms=AUTO), [5])
        mixing = [p for p in probes if p.form in ("contextual", "constant_a")]
        assert {p.rank for p in mixing} == ranks and {p.bits for p in mixing} == {16, 8, 4}
        assert len(mixing) == 2 * 2 * len(ranks) * 3 and len(set(probes)) == len(probes)


def test_only_what_the_budget_allows_is_offered():
    """Forms and widths that were measured for another budget are not chosen by this one."""
    config, rich = _config(4), Budget(forms=FORMS)
    bases = _bases(config, [5])
    measured = {p: _kl(config, bases, p, 0.1) for p in plan_probes(config, rich, [5])}

    def offered(budget):
        joint = _joint(config, budget) if "joint" in budget.forms else None
        rounded = _rounding() if "dense" in budget.forms else None
        specs = [c.spec for c in layer_choices(config, budget, 5, bases, measured, joint, rounded)]
        entries = [e for s in specs for e in (*s.key_entries(config), *s.value_entries(config)) if e.count > 4]
        return {f for s in specs for f in (s.form_k, s.form_v)}, {b for e in entries for b in e.widths}

    assert offered(Budget()) == ({"latent", "dense"}, {16, 8, 6, 4, 3, 2})
    assert offered(Budget(bits=(8,))) == ({"latent"}, {8})
    assert offered(Budget(forms=("joint",))) == ({"joint"}, {16, 8, 6, 4, 3, 2})
    forms, widths = offered(Budget(forms=AUTO, bits=(8, 4)))
    assert {"latent", "joint"} <= forms and "dense" not in forms and widths == {8, 4}
    assert offered(Budget(forms=("dense",))) == ({"latent", "dense"}, {16, 8, 6, 4, 3, 2})
    specs = [c.spec for c in layer_choices(config, Budget(forms=("dense",)), 5, bases, measured, None, _rounding())]
    assert {s.form_k for s in specs} == {"dense"} and {s.form_v for s in specs} == {"latent", "dense"}
    cheap = {p: 1e-9 if p.form == "contextual" else kl for p, kl in measured.items()}
    specs = [c.spec for c in layer_choices(config, rich, 5, bases, cheap, None)]
    assert any("contextual" in (s.form_k, s.form_v) for s in specs)


def test_the_original_is_kept_where_it_costs_the_same():
    """Latents of full rank in 16 bits lose as little in as many bytes, but are slower."""
    for forms in (("latent",), AUTO, ("dense",), FORMS):
        config, budget = _config(4), Budget(1.0, 4096, WIDTHS, 8, forms)
        specs, expected = allocate(config, budget, _choices(config, budget))
        assert expected == 0 and not any(spec.converted for spec in specs)


def test_which_forms_can_meet_a_budget():
    """As ``validate_budget`` says, and what can be met is met by spending it."""
    config, ratios = _config(4), (2, 3, 4, 6, 10, 30, 200)
    for forms in (("latent",), ("joint",), ("dense",), ("latent", "dense")):
        budgets = [Budget(ratio, 32_768, (8, 4), 8, forms) for ratio in ratios]
        met = [can_be_met(config, budget) for budget in budgets]
        assert met == [_refusal(config, budget) is None for budget in budgets]
        assert met[0] and not met[-1] and met == sorted(met, reverse=True)
        for budget in [b for b, can in zip(budgets, met, strict=True) if can]:
            specs, _ = allocate(config, budget, _choices(config, budget))
            assert _spent(config, budget, specs) <= budget.bytes(config)


# ------------------------------------------------------------------------------------------------------------- refusals


def _refusal(config, budget):
    try:
        validate_budget(config, budget)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "budget,message",
    [
        (Budget(0.5), r"budget.cache_ratio=0.5 would enlarge the cache"),
        (Budget(multiple=0), r"budget.multiple=0 must lie between 1 and head_dim=64"),
        (Budget(multiple=65), r"budget.multiple=65 must lie"),
        (Budget(context=0), r"budget.context=0 must be at least 1"),
        (Budget(bits=()), r"budget.bits names no width; choose from 16, 8, 6, 4, 3, 2"),
        (Budget(bits=(8, 5)), r"cache bits must be one of 16, 8, 6, 4, 3, 2, not 5"),
        (Budget(forms=("latnet",)), r"budget.forms: 'latnet' cannot be chosen by a budget; did you mean 'latent'"),
        (Budget(forms=("latent", "tucker")), r"budget.forms: 'tucker' cannot be chosen by a budget"),
        (Budget(forms=()), r"budget.forms needs latent, joint or dense"),
        (Budget(forms=("contextual", "constant_a")), r"budget.forms needs latent, joint or dense"),
        (Budget(100.0, 4096, (16,)), r"cache_ratio=100 cannot be met at budget.context=4096: even rank 8 .* only 8\.0"),
        (Budget(100.0, 4096, (8,)), r"even rank 8 .* only 10\.6"),
    ],
)
def test_impossible_budgets_are_refused(budget, message):
    with pytest.raises(UserError, match=message):
        validate_budget(_config(), budget)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [(16,), WIDTHS, (4,), (8, 3)])
@pytest.mark.parametrize("multiple", [8, 5, 7, 24])
@pytest.mark.parametrize("forms", [("latent",), ("joint",), ("latent", "joint")])
def test_the_named_best_ratio_can_be_had(groups, bits, multiple, forms):
    config, context = _config(groups), 777
    budget = Budget(1e4, context, bits, multiple, forms)
    with pytest.raises(UserError) as refused:
        validate_budget(config, budget)
    best = float(re.search(r"reaches only ([0-9.]+);", str(refused.value))[1])
    budget = replace(budget, cache_ratio=best)
    validate_budget(config, budget)
    for alone in {budget.forms, *((form,) for form in forms)}:
        own = replace(budget, forms=alone)
        specs, _ = allocate(config, own, _choices(config, own))
        assert best <= cache_bytes(config, dense_specs(config), context) / _spent(config, own, specs)
    with pytest.raises(UserError, match="cannot be met"):
        validate_budget(config, replace(budget, cache_ratio=best + 0.2))


def test_layers_that_cannot_carry_the_budget_are_refused():
    config, budget = _config(), Budget(4.0, 100, (16,))
    with pytest.raises(UserError, match=r"budget.cache_ratio=4 cannot be met by converting layers \[5\]"):
        allocate(config, budget, _choices(config, budget, [5]))


# -------------------------------------------------------------------------------------------------------------- uniform


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0, 7.0])
@pytest.mark.parametrize("layers", [[5, 11], list(range(12))])
def test_uniform_specs_are_the_largest_that_fit(groups, bits, ratio, layers):
    config, budget = _config(groups), Budget(ratio, 512)
    specs = uniform_specs(config, budget, layers, bits)

    def bytes_at(rank):
        own = dense_specs(config)
        for i in layers:
            own[i] = LayerSpec("latent", rank, "latent", rank, bits)
        return _spent(config, budget, own)

    fitting = [r for r in range(8, 65, 8) if bytes_at(r) <= budget.bytes(config)]
    if not fitting:
        assert specs is None
        return
    assert [i for i, s in enumerate(specs) if s.converted] == layers
    assert {specs[i] for i in layers} == {LayerSpec("latent", max(fitting), "latent", max(fitting), bits)}
    assert _spent(config, budget, specs) == bytes_at(max(fitting))


def test_no_uniform_specs_where_none_fit():
    assert uniform_specs(_config(), Budget(7.9, 64), [5, 11], 8) is None
    assert uniform_specs(_config(), Budget(7.9, 64), list(range(12)), 8) is not None


def test_measured_layers_correct_their_choices():
    """Every choice of a layer is scaled alike, within a bound; layers that were not measured keep theirs."""
    config, budget = SIZES["270m"], Budget(4, 4096)
    choices = _choices(config, budget)
    specs, _ = allocate(config, budget, choices)
    expected = {i: _kl_of(choices, i, specs[i]) for i in choices}
    found = corrected(choices, specs, {0: 3 * expected[0], 1: 1e6, 5: -1e-9})
    for layer, factor in {0: 3.0, 1: CORRECTION, 5: 1 / CORRECTION, 2: 1.0}.items():
        assert [c.kl for c in found[layer]] == pytest.approx([factor * c.kl for c in choices[layer]])
        assert [(c.spec, c.bytes) for c in found[layer]] == [(c.spec, c.bytes) for c in choices[layer]]
    again, _ = allocate(config, budget, found)
    for layer, sign in ((1, 1), (5, -1)):
        assert sign * (again[layer].bytes_per_token(config) - specs[layer].bytes_per_token(config)) > 0
    assert _spent(config, budget, again) <= budget.bytes(config)
