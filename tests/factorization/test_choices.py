"""Choices of one layer: the model of their KL, and that none which is best for some budget is missing."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_models import small_config

from tpa_train.factorization.choices import (
    SLOPE_RANGE,
    Choice,
    Groups,
    combine,
    convex,
    dense_choice,
    latent_choices,
    measured_choice,
    rounding_error,
)
from tpa_train.factorization.sensitivity import NOISE_BITS, Probe
from tpa_train.tpa.entries import Entry
from tpa_train.tpa.quantization import fake_quantize
from tpa_train.tpa.spec import LayerSpec

WIDTHS = (16, 8, 6, 4, 3, 2)


def _groups(n=64, size=32, rows=1, decay=0.93, share=1.0):
    """Energies that fall by ``decay`` a latent in each of ``rows``; a constant ``share`` of them is variance."""
    energies = (decay ** torch.arange(n, dtype=torch.float64)).expand(rows, -1)
    return Groups.of(energies, share * energies, size)


# ------------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_rounding_error_is_what_the_cache_does(bits):
    """To normal numbers of another draw and another spread; relative to their variance."""
    x = 3.7 * torch.randn(3000, 64, generator=torch.Generator().manual_seed(5))
    measured = float((fake_quantize(x, bits) - x).square().mean() / x.square().mean())
    assert rounding_error(bits) == pytest.approx(measured, rel=0.03)


def test_every_bit_quarters_the_error():
    assert rounding_error(16) == 0.0
    for more, fewer in ((3, 2), (4, 3)):  # one bit: (2^b - 1)² levels
        expected = ((2**more - 1) / (2**fewer - 1)) ** 2
        assert rounding_error(fewer) / rounding_error(more) == pytest.approx(expected, rel=0.1)
    assert 4**2 * 0.9 < rounding_error(6) / rounding_error(8) < 4**2 * 1.15


# --------------------------------------------------------------------------------------------------------------- groups


def test_groups_add_up_their_rows():
    energies = torch.arange(1.0, 11.0, dtype=torch.float64).flip(0)
    groups = Groups.of(torch.stack((energies, 2 * energies)), torch.stack((energies, energies)), 4)
    assert groups.rows == 2 and groups.counts == [4, 4, 2]
    assert groups.energy == [3 * 34.0, 3 * 18.0, 3 * 3.0] and groups.variance == [2 * 34.0, 2 * 18.0, 2 * 3.0]
    assert [groups.tail(r) for r in (0, 1, 8, 9, 10)] == [165.0, 135.0, 9.0, 3.0, 0.0]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("noise", [None, 0.05])
def test_slopes_reproduce_what_was_measured(rows, noise):
    """The model's KL at the probed ranks is the measured one, where probes lie between groups."""
    groups, measured = _groups(size=8, rows=rows), {8: 0.9, 16: 0.31, 32: 0.05}
    slopes = groups.slopes(measured, noise)
    assert len(slopes) == 8
    for rank, kl in measured.items():
        lost = sum(s * e for s, e in list(zip(slopes, groups.energy, strict=True))[rank // 8 :])
        assert lost == pytest.approx(kl, rel=1e-9)
    assert slopes[1] != slopes[2] == slopes[3] != slopes[4] == slopes[7]


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_first_groups_slope_explains_the_rounded_probe(share):
    """Groups before the first probed rank are only ever rounded: rounding everything costs what was measured."""
    groups, measured = _groups(size=8, share=share), {16: 0.31, 32: 0.05}
    error = rounding_error(NOISE_BITS)
    rest = sum(s * v for s, v in list(zip(groups.slopes(measured, None), groups.variance, strict=True))[2:]) * error
    noise = rest + 0.004 * share
    slopes = groups.slopes(measured, noise)
    assert sum(s * v for s, v in zip(slopes, groups.variance, strict=True)) * error == pytest.approx(noise)
    assert slopes[0] == slopes[1] and slopes[2:] == groups.slopes(measured, None)[2:]


def test_the_first_groups_slope_stays_near_the_next():
    groups, measured = _groups(size=8), {16: 0.31, 32: 0.05}
    plain = groups.slopes(measured, None)
    assert plain[0] == plain[1] == plain[2]
    assert groups.slopes(measured, 1e9)[0] == pytest.approx(plain[2] * SLOPE_RANGE)
    assert groups.slopes(measured, 0.0)[0] == pytest.approx(plain[2] / SLOPE_RANGE)


def test_probes_inside_a_group():
    """A group takes the slope that holds at its middle."""
    groups = _groups(size=8)
    before, after = groups.slopes({11: 0.5, 32: 0.05}, 0.0), groups.slopes({13: 0.5, 32: 0.05}, 0.0)
    assert before[0] != before[1] == before[2] and after[0] == after[1] != after[2]


def test_noisy_probes_make_no_group_free():
    """A KL that rises with the rank, or lies below zero, is noise: every group still costs something."""
    groups = _groups(size=8)
    for measured in ({8: 0.3, 16: 0.31, 32: 0.05}, {8: 0.3, 16: 0.1, 32: -1e-9}, {16: 0.0}, {8: -1e-8, 32: 0.0}):
        for noise in (None, 0.01, -1e-9):
            slopes = groups.slopes(measured, noise)
            assert all(s > 0 for s in slopes), (measured, noise)


# ----------------------------------------------------------------------------------------------------------------- path


def _lost(groups, slopes, index, bits):
    """KL of one group at ``bits`` (0: dropped), by the model of the docstring; rounding never costs more than that."""
    energy = slopes[index] * groups.energy[index]
    return energy if bits == 0 else min(energy, slopes[index] * groups.variance[index] * rounding_error(bits))


def _bytes(groups, index, bits):
    return Entry(groups.rows, groups.counts[index], bits).nbytes if bits else 0


@pytest.mark.parametrize("rows,n,size", [(1, 64, 32), (2, 150, 32), (4, 40, 8)])
@pytest.mark.parametrize("decay,share", [(0.99, 1.0), (0.9, 0.2), (0.8, 1.0)])
@pytest.mark.parametrize("widths", [(16,), (2, 16, 4, 8), (8, 3), (4,)])
def test_the_path_buys_the_best_kl_per_byte(rows, n, size, decay, share, widths):
    groups = _groups(n, size, rows, decay, share)
    slopes = [1.0 + 0.3 * (i % 3) for i in range(len(groups.counts))]
    path = groups.path(slopes, widths)
    assert path, "there is always a smallest choice"
    state = [0] * len(groups.counts)
    for step, (nbytes, kl, bits) in enumerate(path):
        after = [*bits, *[0] * (len(state) - len(bits))]
        changed = [i for i in range(len(state)) if state[i] != after[i]]
        assert len(changed) == 1 and after[changed[0]] > state[changed[0]] and 0 not in bits
        assert nbytes == sum(_bytes(groups, i, b) for i, b in enumerate(after))
        assert kl == pytest.approx(sum(_lost(groups, slopes, i, b) for i, b in enumerate(after)), abs=1e-9)
        # Brute force: from any allowed group to any wider width, nothing buys more KL for a byte.
        opened = [i for i in range(len(state)) if i == 0 or state[i - 1]] if step else [0]
        ratios = {
            (i, b): (_lost(groups, slopes, i, state[i]) - _lost(groups, slopes, i, b))
            / (_bytes(groups, i, b) - _bytes(groups, i, state[i]))
            for i in opened
            for b in widths
            if b > state[i]
        }
        assert ratios[changed[0], after[changed[0]]] >= max(ratios.values()) * (1 - 1e-12)
        state = after
    costs, kls = [p[0] for p in path], [p[1] for p in path]
    assert costs == sorted(set(costs)) and all(a >= b for a, b in zip(kls, kls[1:], strict=False))
    assert state == [max(widths)] * len(state), "in the end everything is as wide as it may be"
    lengths = [len(p[2]) for p in path]
    assert all(b - a in (0, 1) for a, b in zip(lengths, lengths[1:], strict=False)) and lengths[0] == 1


def test_latents_without_energy_are_not_bought():
    """A joint latent has at most as many directions as the hidden size."""
    energies = torch.cat((torch.ones(20), torch.zeros(44))).double()[None]
    path = Groups.of(energies, energies, 8).path([1.0] * 8, (16, 4))
    assert path[-1][2] == (16, 16, 16) and path[-1][1] == 0


def test_rounding_never_costs_more_than_dropping():
    """Where the variance is far above the energy (a floor on the spread), coarse widths buy nothing."""
    groups = Groups.of(torch.ones(1, 8).double(), 100 * torch.ones(1, 8).double(), 8)
    assert [bits for _, _, bits in groups.path([1.0], (16, 2))] == [(16,)]


# ----------------------------------------------------------------------------------------------------------------- hull


def _lowest_mix(points, cost):
    """The smallest value that a mixture of at most two of ``points`` has on average, at ``cost`` or less."""
    best = min((p[1] for p in points if p[0] <= cost), default=None)
    for a, b in itertools.product(points, points):
        if a[0] < cost < b[0]:
            mixed = a[1] + (b[1] - a[1]) * (cost - a[0]) / (b[0] - a[0])
            best = mixed if best is None else min(best, mixed)
    return best


@settings(max_examples=200, deadline=None)
@example([(0, 2), (1, 1), (2, 0)])
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=9))
def test_the_hull_is_the_lower_convex_one(points):
    hull = convex(points)
    assert set(hull) <= set(points)
    costs, values = [p[0] for p in hull], [p[1] for p in hull]
    assert costs == sorted(set(costs)) and values == sorted(set(values), reverse=True)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(hull, hull[1:], strict=False)]
    assert all(a < b for a, b in zip(slopes, slopes[1:], strict=False)), "strictly convex: no point lies on a line"
    assert costs[0] == min(p[0] for p in points) and values[-1] == min(p[1] for p in points)
    for cost in range(costs[0], 31):
        assert _lowest_mix(hull, cost) == pytest.approx(_lowest_mix(points, cost), abs=1e-9)


def test_points_carry_what_they_stand_for():
    assert convex([(3, 0.0, "c"), (1, 5.0, "a"), (2, 4.9, "b")]) == [(1, 5.0, "a"), (3, 0.0, "c")]


# ------------------------------------------------------------------------------------------------------ latent choices


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("widths", [(16,), WIDTHS, (8,)])
@pytest.mark.parametrize("multiple", [1, 5, 8, 24, 40])
@pytest.mark.parametrize("kind,form", [("k", "latent"), ("v", "latent"), ("kv", "joint")])
def test_ranks_and_bytes_of_latent_choices(groups, widths, multiple, kind, form):
    """Ranks are multiples, also inside the last group, or everything; bytes are the cache's."""
    config = small_config(num_kv_heads=groups, head_dim=72)
    joint = form == "joint"
    n = 2 * groups * 72 if joint else 72
    energies = _groups(n, 32 if min(widths) < 16 else multiple, 1 if joint else groups)
    ranks = {n // 8: 0.5, n // 4: 0.2, n // 2: 0.05}
    choices = latent_choices(config, kind, form, energies, ranks, 0.01, widths, multiple, 5)
    found = set()
    for choice in choices:
        spec = choice.spec
        rank, bits = getattr(spec, f"rank_{kind[0]}"), getattr(spec, f"bits_{kind[0]}")
        found.add(rank)
        assert rank % multiple == 0 or rank == n
        assert {bits} if isinstance(bits, int) else set(bits) <= set(widths)
        latents = Entry(1 if joint else groups, rank, bits).nbytes
        norms = 2 * groups if joint and 32 * 2 * groups <= latents else 0  # layer 5 is global
        assert choice.bytes == latents + norms and choice.kl >= 0
        assert [getattr(spec, f"form_{k}") for k in kind] == [form] * len(kind)
        other = {"k": "v", "v": "k"}.get(kind)
        if other:
            assert (getattr(spec, f"form_{other}"), getattr(spec, f"rank_{other}")) == ("dense", 72)
            assert getattr(spec, f"bits_{other}") == 16
        spec.key_entries(config), spec.value_entries(config)  # as many widths as groups, or refused
    assert found == {*range(multiple, n, multiple), n}
    full = [c for c in choices if getattr(c.spec, f"rank_{kind[0]}") == n]
    assert (min(c.kl for c in full) == pytest.approx(0, abs=1e-12)) == (16 in widths)


@pytest.mark.parametrize("multiple", [8, 3])
def test_a_partly_filled_group_costs_what_it_drops(multiple):
    """Two groups of 32 at 4 bits, cut inside the second one; computed latent by latent."""
    config = small_config(head_dim=64)
    groups = _groups(64, 32, share=0.5)
    measured = {8: 0.5, 16: 0.2, 32: 0.05}
    slopes, error = groups.slopes(measured, None), rounding_error(4)
    choices = latent_choices(config, "k", "latent", groups, measured, None, (4,), multiple, 5)
    ranks = []
    for choice in choices:
        rank = choice.spec.rank_k
        kept = sum(slopes[i // 32] * 0.5 * 0.93**i * error for i in range(rank))
        dropped = sum(slopes[i // 32] * 0.93**i for i in range(rank, 64))
        assert choice.kl == pytest.approx(kept + dropped, rel=1e-9)
        ranks.append(rank)
    assert ranks == [*range(multiple, 64, multiple), 64]


def test_widths_fall_along_the_latents():
    """Where all energy costs alike and falls, a later group never gets more bits (reverse water-filling)."""
    for decay in (0.99, 0.95):
        path = _groups(256, decay=decay).path([1.0] * 8, (16, 8, 6, 4, 3, 2))
        assert len({len(set(bits)) for *_, bits in path}) > 1
        assert all(list(bits) == sorted(bits, reverse=True) for *_, bits in path)


def test_a_part_that_costs_nothing_still_has_choices():
    config = small_config(head_dim=64)
    for measured in ({8: 0.0, 16: 0.0, 32: 0.0}, {16: -1e-9}):
        choices = latent_choices(config, "k", "latent", _groups(64), measured, 0.0, (8,), 8, 5)
        assert [c.spec.rank_k for c in choices] == [*range(8, 65, 8)]
        assert max(c.kl for c in choices) < 1e-6


def test_dense_and_measured_choices():
    config = small_config(num_kv_heads=4, head_dim=64)
    dense = dense_choice(config)
    assert (dense.bytes, dense.kl, dense.spec.converted) == (2 * 4 * 64, 0.0, False)
    assert 2 * dense.bytes == dense.spec.bytes_per_token(config)
    for kind in "kv":
        choice = measured_choice(config, Probe(0, kind, "contextual", 2, 8), -1e-9)
        assert (choice.bytes, choice.kl) == (2 * (2 * 4) + 2 * (64 + 8), 0.0)
        assert getattr(choice.spec, f"form_{kind}") == "contextual" and getattr(choice.spec, f"bits_{kind}") == 8
        assert choice.bytes == choice.spec.bytes_per_token(config) - dense.bytes
    norms = measured_choice(config, Probe(0, "k", "constant_a", 2, 4), 0.5)
    assert (norms.bytes, norms.kl) == (2 * (32 + 8) + 2 * 4, 0.5)


# -------------------------------------------------------------------------------------------------------------- combine


def _part(kind, points):
    """Choices of one part; the rank says which one it is."""
    specs = [
        LayerSpec(**{f"form_{kind}": "latent", f"rank_{kind}": i, f"bits_{kind}": 8 - 4 * (i % 2)})
        for i in range(len(points))
    ]
    return [Choice(b, float(kl), spec) for (b, kl), spec in zip(points, specs, strict=True)]


POINTS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(POINTS, POINTS)
def test_the_best_pairs_are_among_the_combined(keys, values):
    """At the bytes of every combined choice, no pair (of all, on the hulls or not) costs less."""
    keys, values = _part("k", keys), _part("v", values)
    found = combine(keys, values)
    pairs = [(k.bytes + v.bytes, k.kl + v.kl) for k in keys for v in values]
    assert {(c.bytes, c.kl) for c in found} <= set(pairs)
    assert [c.bytes for c in found] == sorted({c.bytes for c in found})
    for choice in found:
        assert choice.kl == min(kl for b, kl in pairs if b <= choice.bytes)
    # ... and the hull of all pairs is theirs.
    assert {p[:2] for p in convex(pairs)} <= {(c.bytes, c.kl) for c in found}
    for choice in found:
        k, v = keys[choice.spec.rank_k], values[choice.spec.rank_v]
        assert (k.bytes + v.bytes, k.kl + v.kl) == (choice.bytes, choice.kl)
        assert (choice.spec.bits_k, choice.spec.bits_v) == (k.spec.bits_k, v.spec.bits_v)
        assert (choice.spec.form_k, choice.spec.form_v) == ("latent", "latent")
