"""What each layer could become, with its bytes and the KL that it is expected to cost.

The KL of a part (keys or values of one layer) is modelled as a sum over its cached numbers: a group of latents that is
dropped costs slope · energy, one that is rounded to b bits slope · (its variance in the metric) · (relative rounding
error of b bits). Energies come from calibration, slopes from measurements of the model's output at a few ranks and one
width. Dropping is rounding to no bits at all, so ranks and bits are one dimension: reverse water-filling over groups
(Cover & Thomas, Elements of Information Theory, §10.3.3). Forms that have no such curve are measured one by one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tpa_train.factorization.rounded_keys import RoundingCosts
from tpa_train.factorization.sensitivity import NOISE_BITS, Probe
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.tpa.entries import Bits
from tpa_train.tpa.quantization import GROUP, entry_bytes, fake_quantize
from tpa_train.tpa.spec import LayerSpec

SMALLEST_KL = 1e-9  # nats; a part whose truncation costs nothing measurable still has an order of choices
SLOPE_RANGE = 20.0  # the first groups' slope, where only rounding is measured, stays within this factor of the next's


@dataclass(frozen=True)
class Choice:
    """One way to store a layer, or one part of it: bytes a token, expected KL in nats, and the specification."""

    bytes: int
    kl: float
    spec: LayerSpec


@lru_cache
def rounding_error(bits: int) -> float:
    """Returns the mean square error of rounding unit normal numbers in groups of 32, measured on such numbers."""
    if bits == 16:
        return 0.0
    numbers = torch.randn(2048, GROUP, generator=torch.Generator().manual_seed(0))
    return float((fake_quantize(numbers, bits) - numbers).square().mean())


@dataclass
class Groups:
    """Consecutive latents of one part in groups that share a width; n latents a row, summed over the rows."""

    energies: Tensor  # [n], lost in the metric when a latent is dropped
    variances: Tensor  # [n], in the metric: what rounding errors are relative to
    rows: int  # entries a token (KV heads, or 1 for a joint latent)
    size: int  # latents of a row in a group; the last one may be smaller

    @classmethod
    def of(cls, energies: Tensor, variances: Tensor, size: int) -> Groups:
        """Returns the groups of energies and variances [rows, n]."""
        return cls(energies.sum(0), variances.sum(0), energies.shape[0], size)

    @cached_property
    def energy(self) -> list[float]:
        """Energy of every group."""
        return [float(part.sum()) for part in self.energies.split(self.size)]

    @cached_property
    def variance(self) -> list[float]:
        """Variance of every group."""
        return [float(part.sum()) for part in self.variances.split(self.size)]

    @cached_property
    def counts(self) -> list[int]:
        """Latents of a row in every group."""
        return [len(part) for part in self.energies.split(self.size)]

    def tail(self, rank: int) -> float:
        """Returns the energy from latent ``rank`` on."""
        return float(self.energies[rank:].sum())

    def slopes(self, ranks: dict[int, float], noise: float | None) -> list[float]:
        """Returns each group's KL per energy, from the KL at some ``ranks`` and with everything rounded.

        Between two measured ranks the slope is the difference of the KLs over that of the tails. Groups before the
        first one are never dropped in a probe: theirs is what the rounded probe's KL leaves to explain.
        """
        tiny = 1e-300
        known = sorted(ranks)
        edges = [*known, sum(self.counts)]
        kls = [max(ranks[r], 0.0) for r in known] + [0.0]
        between = []
        for i in range(len(known)):
            energy = self.tail(edges[i]) - self.tail(edges[i + 1])
            between.append(max(kls[i] - kls[i + 1], 0.0) / max(energy, tiny))
        overall = max(kls[0], SMALLEST_KL) / max(self.tail(known[0]), tiny)
        # A probe's KL is noisy where little is lost: an interval that seems free takes a share of the average.
        between = [max(s, 0.05 * overall) for s in between]
        slopes, start = [], 0
        for count in self.counts:
            middle = start + count / 2
            inside = [i for i, r in enumerate(known) if r <= middle]
            slopes.append(between[inside[-1]] if inside else -1.0)
            start += count
        first = [i for i, s in enumerate(slopes) if s < 0]
        reference = between[0]
        if first and noise is not None:
            error = rounding_error(NOISE_BITS)
            rest = sum(s * v * error for s, v in zip(slopes, self.variance, strict=True) if s >= 0)
            own = sum(self.variance[i] for i in first) * error
            estimate = (noise - rest) / max(own, tiny)
            reference = min(max(estimate, reference / SLOPE_RANGE), reference * SLOPE_RANGE)
        return [reference if s < 0 else s for s in slopes]

    def path(self, slopes: list[float], widths: Iterable[int]) -> list[tuple[int, float, tuple[int, ...]]]:
        """Returns (bytes, KL, width of every group in use) from the first group at its smallest to all at the widest.

        Each step buys the best KL per byte; a group is opened only after the one before it.
        """
        steps = [self._steps(i, slopes[i], sorted(widths)) for i in range(len(self.counts))]
        state = [0] * len(self.counts)  # steps taken in each group
        kl = sum(s * e for s, e in zip(slopes, self.energy, strict=True))
        total, found = 0, []
        while True:
            opened = [i for i in range(len(state)) if state[i] < len(steps[i]) and (i == 0 or state[i - 1] > 0)]
            if not opened:
                return found
            best = max(opened, key=lambda i: (steps[i][state[i]][1] / steps[i][state[i]][0], -i))
            extra, gain, _ = steps[best][state[best]]
            state[best] += 1
            total, kl = total + extra, kl - gain
            bits = tuple(steps[i][s - 1][2] for i, s in enumerate(state) if s > 0)
            found.append((total, max(kl, 0.0), bits))

    def _steps(self, index: int, slope: float, widths: list[int]) -> list[tuple[int, float, int]]:
        """Returns (extra bytes, KL gained, width) of the convex steps of one group, from nothing to the widest."""
        energy, variance = self.energy[index] * slope, self.variance[index] * slope
        points = [(0, energy, 0)]
        for bits in widths:
            lost = min(variance * rounding_error(bits), energy)
            points.append((self.rows * entry_bytes(self.counts[index], bits), lost, bits))
        hull = convex(points)
        return [(b[0] - a[0], a[1] - b[1], b[2]) for a, b in zip(hull, hull[1:], strict=False)]


def convex(points: Iterable[tuple]) -> list[tuple]:
    """Returns the lower convex hull of (cost, value, …) points, cost ascending and value falling."""
    hull: list[tuple] = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-2][1] - hull[-1][1]) * (point[0] - hull[-1][0]) <= (
            hull[-1][1] - point[1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        if hull and point[0] == hull[-1][0]:
            hull.pop()
        hull.append(point)
    return hull


def latent_choices(
    config: Gemma3Config,
    kind: str,
    form: str,
    groups: Groups,
    ranks: dict[int, float],
    noise: float | None,
    widths: tuple[int, ...],
    multiple: int,
    layer: int,
) -> list[Choice]:
    """Returns the choices of one part in a latent form, in the order of best KL per byte.

    Args:
        config: sizes.
        kind: "k", "v" or "kv" (joint).
        form: "latent" or "joint".
        groups: energies of the part.
        ranks: measured KL by rank.
        noise: measured KL with every latent rounded to ``NOISE_BITS``.
        widths: that the cache may use.
        multiple: of which ranks are; the last group in use may be partly filled.
        layer: that the part is of; where joint latents cache norms there, those count.
    """
    found, slopes = [], groups.slopes(ranks, noise)
    for _, kl, bits in groups.path(slopes, widths):
        full, last = sum(groups.counts[: len(bits) - 1]), groups.counts[len(bits) - 1]
        for rank in range(full + 1, full + last + 1):
            if rank % multiple and rank != len(groups.energies):
                continue
            dropped = slice(rank, full + last)
            lost = groups.energies[dropped].sum() - groups.variances[dropped].sum() * rounding_error(bits[-1])
            expected = kl + slopes[len(bits) - 1] * max(float(lost), 0.0)
            found.append(_latent_choice(config, kind, form, rank, _simple(bits), expected, layer))
    return found


def _latent_choice(config: Gemma3Config, kind: str, form: str, rank: int, bits: Bits, kl: float, layer: int) -> Choice:
    values = {f"form_{k}": form for k in kind} | {f"rank_{k}": rank for k in kind} | {f"bits_{k}": bits for k in kind}
    spec = replace(LayerSpec(rank_k=config.head_dim, rank_v=config.head_dim), **values).with_norms(config, layer)
    return Choice(_part_bytes(config, kind, spec), kl, spec)


def _part_bytes(config: Gemma3Config, kind: str, spec: LayerSpec) -> int:
    entries = [e for k in kind for e in (spec.key_entries if k == "k" else spec.value_entries)(config)]
    return sum(e.nbytes for e in entries)


def _simple(bits: tuple[int, ...]) -> Bits:
    """Returns one width where all groups have the same."""
    return bits[0] if len(set(bits)) == 1 else bits


def rounded_key_choices(
    config: Gemma3Config, costs: RoundingCosts, noise: float, widths: Sequence[int]
) -> list[Choice]:
    """Returns what dense keys can become in fewer bits: the group that gains most for its bytes gets wider next.

    Where the calibration says nothing of the groups (no sample, or keys that never mattered), they count alike.

    Args:
        config: sizes.
        costs: of rounding their groups.
        noise: measured KL with all of them in ``NOISE_BITS`` bits, which scales the costs.
        widths: that the cache may use.
    """
    counts = [min(GROUP, config.head_dim - start) for start in range(0, config.head_dim, GROUP)]
    groups, noisy = range(len(counts)), [NOISE_BITS] * len(counts)
    if not 0 < costs.total(noisy) < math.inf:
        costs = RoundingCosts({b: [rounding_error(b)] * len(counts) for b in costs.of_group})
    scale = max(noise, SMALLEST_KL) / costs.total(noisy)
    hulls = [convex((entry_bytes(counts[i], b), costs.of_group[b][i], b) for b in widths) for i in groups]
    state, found = [0] * len(groups), []

    def gain(i: int) -> float:
        (size, cost, _), (larger, less, _) = hulls[i][state[i]], hulls[i][state[i] + 1]
        return (cost - less) / (larger - size)

    while True:
        bits = tuple(hull[s][2] for hull, s in zip(hulls, state, strict=True))
        spec = LayerSpec(rank_k=config.head_dim, rank_v=config.head_dim, bits_k=_simple(bits), bits_v=16)
        found.append(Choice(_part_bytes(config, "k", spec), scale * costs.total(bits), spec))
        narrow = [i for i in groups if state[i] + 1 < len(hulls[i])]
        if not narrow:
            return found
        state[max(narrow, key=lambda i: (gain(i), -i))] += 1


def measured_choice(config: Gemma3Config, probe: Probe, kl: float) -> Choice:
    """Returns a form that was measured as it is."""
    spec = probe.spec(config)
    return Choice(_part_bytes(config, probe.kind, spec), max(kl, 0.0), spec)


def dense_choice(config: Gemma3Config) -> Choice:
    """Returns the original part: nothing lost."""
    spec = LayerSpec(rank_k=config.head_dim, rank_v=config.head_dim)
    return Choice(2 * config.num_kv_heads * config.head_dim, 0.0, spec)


def combine(keys: list[Choice], values: list[Choice]) -> list[Choice]:
    """Returns the layer's choices from those of its keys and values, adding bytes and KL.

    Of all pairs, those along the two convex hulls' steps in order of KL per byte, which contain the best ones.
    """
    hulls = [convex([(c.bytes, c.kl, c.spec) for c in part]) for part in (keys, values)]
    position = [0, 0]
    found = [_pair(hulls, position)]
    heap = [(-_ratio(hulls[i], 0), i) for i in (0, 1) if len(hulls[i]) > 1]
    heapq.heapify(heap)
    while heap:
        _, which = heapq.heappop(heap)
        position[which] += 1
        found.append(_pair(hulls, position))
        if position[which] + 1 < len(hulls[which]):
            heapq.heappush(heap, (-_ratio(hulls[which], position[which]), which))
    return found


def _ratio(hull: list[tuple], index: int) -> float:
    (cost, value, _), (higher, lower, _) = hull[index], hull[index + 1]
    return (value - lower) / (higher - cost)


def _pair(hulls: list[list[tuple]], position: list[int]) -> Choice:
    (bytes_k, kl_k, k), (bytes_v, kl_v, v) = hulls[0][position[0]], hulls[1][position[1]]
    spec = replace(k, form_v=v.form_v, rank_v=v.rank_v, bits_v=v.bits_v, heads_v=v.heads_v)
    return Choice(bytes_k + bytes_v, kl_k + kl_v, spec)
