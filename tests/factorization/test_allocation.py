"""The byte budget is spent to the last step, where it buys the most, and refused in words when it cannot be met."""

import pytest
import torch
from random_models import small_config

from tpa_train.errors import UserError
from tpa_train.factorization.allocation import Budget, allocate, layers_to_convert, validate_budget
from tpa_train.factorization.latent import Basis
from tpa_train.factorization.sensitivity import Bases
from tpa_train.gemma3.config import SIZES
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs

PROBE = 32


def _config(groups=1):
    return small_config(num_layers=12, num_kv_heads=groups, head_dim=64, sliding_window=32)


def _bases(config, layers, decay=0.93):
    """The same spectrum everywhere, so that only sensitivity and cost decide."""
    energies = (decay ** torch.arange(config.head_dim, dtype=torch.float64)).expand(config.num_kv_heads, -1)
    empty = torch.zeros(0)
    one = {i: Basis(energies, empty, empty, empty) for i in layers}
    return Bases(one, dict(one))


def _allocate(config, budget, layers=None, measured=None):
    layers = layers_to_convert(config, budget) if layers is None else layers
    measured = measured or {(i, kind): 0.1 for i in layers for kind in "kv"}
    return allocate(config, budget, layers, _bases(config, layers), measured, PROBE), layers


def _steps_up(config, spec, budget):
    """The specifications one rank step above ``spec``."""
    d = config.head_dim
    for kind in "kv":
        rank = getattr(spec, f"rank_{kind}")
        if rank < d:
            higher = min(rank + budget.multiple, d)
            values = {f: getattr(spec, f) for f in ("form_k", "rank_k", "form_v", "rank_v", "bits")}
            values[f"rank_{kind}"], values[f"form_{kind}"] = higher, "dense" if higher == d else "latent"
            yield LayerSpec(**values)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("ratio,context", [(1.5, 100), (2, 4096), (3.3, 1000), (4, 32_768), (4, 200), (7.9, 32_768)])
@pytest.mark.parametrize("multiple", [8, 5])
def test_the_budget_is_met_and_no_step_is_left(groups, bits, ratio, context, multiple):
    config, budget = _config(groups), Budget(ratio, context, bits, multiple)
    validate_budget(config, budget)
    specs, layers = _allocate(config, budget)
    allowed = cache_bytes(config, dense_specs(config), context) / ratio
    assert cache_bytes(config, specs, context) <= allowed
    assert budget.bytes(config) == int(allowed)
    for layer in layers:
        for higher in _steps_up(config, specs[layer], budget):
            richer = [*specs[:layer], higher, *specs[layer + 1 :]]
            assert cache_bytes(config, richer, context) > allowed
    for layer, spec in enumerate(specs):
        if layer not in layers:
            assert not spec.converted
        else:
            assert spec.bits == bits
            for rank in (spec.rank_k, spec.rank_v):
                assert multiple <= rank <= 64 and (rank % multiple == 0 or rank == 64)


def test_deterministic():
    config, budget = _config(4), Budget(4.0, 4096)
    measured = {(i, kind): 0.1 for i in reversed(layers_to_convert(config, budget)) for kind in "vk"}
    assert _allocate(config, budget)[0] == _allocate(config, budget)[0] == _allocate(config, budget, None, measured)[0]


@pytest.mark.parametrize("bits", [16, 8])
def test_more_is_spent_where_it_hurts_more(bits):
    config, budget = _config(), Budget(4.0, 32_768, bits)
    measured = {(5, "k"): 0.01, (5, "v"): 0.1, (11, "k"): 0.5, (11, "v"): 0.02}
    specs, _ = _allocate(config, budget, [5, 11], measured)
    ranks = {(i, kind): getattr(specs[i], f"rank_{kind}") for i, kind in measured}
    by_rank = [ranks[part] for part in sorted(measured, key=measured.get)]
    assert by_rank == sorted(by_rank) and by_rank[0] < by_rank[-1]
    swapped = {(i, {"k": "v", "v": "k"}[kind]): kl for (i, kind), kl in measured.items()}
    other, _ = _allocate(config, budget, [5, 11], swapped)
    assert other[11].rank_v > other[11].rank_k and specs[11].rank_k > specs[11].rank_v


def test_the_best_kl_per_byte_is_bought_first():
    """A step in a local layer costs 32 tokens, in a global one 100. With tails ∝ .93^r, gains per byte are equal where
    .93^Δr = 32/100: the local layers' ranks lie 16 above the global ones'."""
    config, budget = _config(), Budget(2.0, 100, 16, 1)
    specs, layers = _allocate(config, budget)
    assert len(layers) == 12
    ranks = {
        kind: [r for i in layers if config.layer_kinds[i] == kind for r in (specs[i].rank_k, specs[i].rank_v)]
        for kind in ("local", "global")
    }
    for values in ranks.values():
        assert 1 < min(values) and max(values) < 64 and max(values) - min(values) <= 1
    assert sum(ranks["local"]) / 20 - sum(ranks["global"]) / 4 == pytest.approx(15.7, abs=1)


def test_parts_that_cost_nothing_get_the_rest():
    config, budget = _config(), Budget(3.0, 32_768, 16)
    specs, _ = _allocate(config, budget, [5, 11], {(5, "k"): 0.0, (5, "v"): 0.3, (11, "k"): 0.3, (11, "v"): 0.3})
    assert specs[5].rank_k == min(specs[i].rank_k for i in (5, 11)) < specs[5].rank_v


def test_the_greedy_choice_beats_every_exchange_of_a_step():
    """Moving one step of rank from one part to another never lowers the modelled KL (equal costs, 16 bits)."""
    config, budget = _config(), Budget(4.0, 32_768, 16)
    measured = {(5, "k"): 0.03, (5, "v"): 0.1, (11, "k"): 0.2, (11, "v"): 0.07}
    specs, layers = _allocate(config, budget, [5, 11], measured)
    bases = _bases(config, layers)
    ranks = {(i, kind): getattr(specs[i], f"rank_{kind}") for i, kind in measured}

    def modelled(ranks):
        return sum(measured[p] * bases.tail(p, r) / bases.tail(p, PROBE) for p, r in ranks.items())

    tried = 0
    for a in ranks:
        for b in ranks:
            if a != b and ranks[a] + 8 <= 64 and ranks[b] - 8 >= 8:
                tried += 1
                assert modelled(ranks | {a: ranks[a] + 8, b: ranks[b] - 8}) >= modelled(ranks)
    assert tried > 3


@pytest.mark.parametrize("size", ["270m", "1b", "4b", "12b", "27b"])
def test_local_layers_only_when_the_budget_asks(size):
    config = SIZES[size]
    globals_ = [i for i in range(config.num_layers) if config.is_global(i)]
    assert layers_to_convert(config, Budget(4.0, 32_768)) == globals_
    assert layers_to_convert(config, Budget(1.0, 32_768)) == globals_
    # A short context: the windows hold most of the cache, and the global layers alone cannot give four.
    short = Budget(4.0, config.sliding_window)
    assert layers_to_convert(config, short) == list(range(config.num_layers))
    assert layers_to_convert(config, Budget(30.0, 32_768, 4)) == list(range(config.num_layers))


def test_a_model_without_global_layers_converts_what_it_has():
    config = small_config(num_layers=2, layer_kinds=("local", "local"))
    assert layers_to_convert(config, Budget(1.5, 100, 16, 2)) == [0, 1]


@pytest.mark.parametrize(
    "budget,message",
    [
        (Budget(0.5), r"budget.cache_ratio=0.5 would enlarge the cache"),
        (Budget(multiple=0), r"budget.multiple=0 must lie between 1 and head_dim=64"),
        (Budget(multiple=65), r"budget.multiple=65 must lie"),
        (Budget(context=0), r"budget.context=0 must be at least 1"),
        (Budget(100.0, 4096, 16), r"cache_ratio=100 cannot be met at budget.context=4096: even rank 8 .* only 8\.0"),
    ],
)
def test_impossible_budgets_are_refused(budget, message):
    with pytest.raises(UserError, match=message):
        validate_budget(_config(), budget)


def test_the_named_best_ratio_can_be_had():
    config = _config()
    validate_budget(config, Budget(7.99, 4096, 16))
    specs, _ = _allocate(config, Budget(7.99, 4096, 16))
    assert {(s.rank_k, s.rank_v) for s in specs} == {(8, 8)}


def test_layers_that_cannot_carry_the_budget_are_refused():
    with pytest.raises(UserError, match=r"cannot be met by converting layers \[5\]"):
        _allocate(_config(), Budget(4.0, 100), [5], {(5, "k"): 0.1, (5, "v"): 0.1})
