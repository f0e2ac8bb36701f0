"""Layers, tokens and metrics that the contextual forms are tested on."""

from __future__ import annotations

import torch
from random_models import random_model, small_config

from tpa_train.factorization.contextual_factorization import PROJECTION
from tpa_train.factorization.stacked import ActivationSample, HeadMoments
from tpa_train.gemma3.attention import Attention

DOUBLE = torch.float64


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def _positive(size, seed, decay=0.7):
    turn = torch.linalg.qr(torch.randn(size, size, generator=seeded(seed), dtype=DOUBLE)).Q
    return (turn * decay ** torch.arange(size)) @ turn.mT


def random_moments(weight, seed=0, metric="heads") -> HeadMoments:
    """Of random correlated keys; one metric for all heads ("same"), one a head ("heads"), or a "full" one."""
    g, d, _ = weight.shape
    second = _positive(g * d, seed, 0.9).view(g, d, g, d)
    full = torch.zeros(g, d, g, d, dtype=DOUBLE)
    for head in range(g):
        full[head, :, head] = _positive(d, seed + 1) + (0.7 * _positive(d, seed + 2 + head) if metric != "same" else 0)
    if metric == "full":
        full = full + 0.3 * _positive(g * d, seed + 50).view_as(full)
    return HeadMoments(second, full, torch.randn(g, d, generator=seeded(seed), dtype=DOUBLE))


def random_layer(groups=4, heads=8, hidden=48, d=8) -> Attention:
    config = small_config(hidden_size=hidden, num_heads=heads, num_kv_heads=groups, head_dim=d, num_layers=1,
                          layer_kinds=("global",))  # fmt: skip
    return random_model(config, seed=3).layers[0].self_attn


def heads_of(attention, kind):
    count = attention.config.num_heads if kind == "q" else attention.config.num_kv_heads
    return getattr(attention, PROJECTION[kind]).weight.detach().double().unflatten(0, (count, -1))


def random_sample(attention, kind, structure=True, count=1500) -> ActivationSample:
    """Tokens whose heads follow one of a few patterns: rank 1 a token (and noise), but rank G over all of them."""
    weight, generator = heads_of(attention, kind), seeded(1)
    g, d, hidden = weight.shape
    x = torch.randn(count, hidden, generator=generator, dtype=DOUBLE)
    if structure:
        patterns, centres = (torch.randn(3, n, generator=generator, dtype=DOUBLE) for n in (g, d))
        which = torch.randint(0, 3, (count,), generator=generator)
        b = 2 * centres[which] + torch.randn(count, d, generator=generator, dtype=DOUBLE)
        k = patterns[which][:, :, None] * b[:, None] + 0.1 * torch.randn(count, g, d, generator=generator, dtype=DOUBLE)
        x = torch.linalg.lstsq(weight.flatten(0, 1), k.flatten(1).mT).solution.mT
    weights = [torch.rand(count, generator=generator) + 0.1 for _ in range(2)]
    return ActivationSample(x.float(), *weights)
