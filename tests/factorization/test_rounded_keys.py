"""Rounding costs of rotated keys: what they are made of, and which groups get the bits."""

import pytest
import torch
from random_models import small_config

from tpa_train.factorization.calibration import LayerMoments
from tpa_train.factorization.choices import rounded_key_choices
from tpa_train.factorization.rounded_keys import RoundingCosts
from tpa_train.factorization.sensitivity import NOISE_BITS
from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.layers import rotary_table
from tpa_train.tpa.quantization import BITS, GROUP, fake_quantize

TOKENS = 96


def _layer(groups, kind="global", head_dim=128):
    config = small_config(num_layers=1, layer_kinds=(kind,), num_kv_heads=groups, head_dim=head_dim)
    torch.manual_seed(groups)
    attention = Attention(config, 0)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    moments = LayerMoments.zeros(config)
    moments.sample_x = torch.randn(TOKENS, config.hidden_size)
    moments.sample_key_weight = torch.rand(TOKENS)
    return config, attention, moments


def _metric(config, diagonal):
    """A Fisher information [G, d, G, d] with that diagonal [G, d]."""
    return torch.diag(diagonal.double().flatten()).view(*(2 * (config.num_kv_heads, config.head_dim)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["global", "local"])
def test_costs_are_rounding_errors_in_the_metric_of_the_output(groups, kind):
    config, attention, moments = _layer(groups, kind)
    fisher = torch.rand(groups, config.head_dim)
    moments.cross_fisher += _metric(config, fisher)
    costs = RoundingCosts.of(attention, moments)
    rotary = rotary_table(config, kind, torch.arange(TOKENS))
    with torch.no_grad():
        keys = attention.write(moments.sample_x[None], rotary)[0][0]
    # A pair is turned through all angles: each of its numbers takes the mean of what both matter.
    scaled = fisher / (1 + attention.k_norm.weight.detach()) ** 2
    half = config.head_dim // 2
    for bits in BITS:
        expected = torch.zeros(config.head_dim, dtype=torch.float64)
        for t in range(TOKENS):
            for g in range(groups):
                error = (fake_quantize(keys[t, g], bits) - keys[t, g]).double() ** 2
                for i in range(config.head_dim):
                    weight = 0.5 * (scaled[g, i] + scaled[g, (i + half) % config.head_dim])
                    expected[i] += float(moments.sample_key_weight[t] * weight) * error[i]
        found = torch.tensor(costs.of_group[bits], dtype=torch.float64)
        torch.testing.assert_close(found, expected.view(-1, GROUP).sum(1), rtol=1e-5, atol=1e-12)
    assert costs.of_group[16] == [0.0] * 4
    for wide, narrow in ((8, 4), (4, 2)):
        assert all(a < b for a, b in zip(costs.of_group[wide], costs.of_group[narrow], strict=True))


def test_groups_that_matter_get_the_bits():
    config, attention, moments = _layer(1)
    fisher = torch.full((1, 128), 1e-6)
    fisher[:, 32:64] = 1.0  # pairs 32 … 63: the slow ones, and their other halves 96 … 127
    moments.cross_fisher += _metric(config, fisher)
    choices = rounded_key_choices(config, RoundingCosts.of(attention, moments), 0.5, (8, 4, 2))
    sizes = [c.bytes for c in choices]
    assert sizes == sorted(set(sizes)) and all(a.kl > b.kl for a, b in zip(choices, choices[1:], strict=False))
    widths = [c.spec.bits_k for c in choices]
    assert widths[0] == 2 and widths[-1] == 8 and (2, 8, 2, 8) in widths
    assert all(c.spec.form_k == "dense" and c.spec.bits_v == 16 for c in choices)
    assert all(c.bytes == sum(e.nbytes for e in c.spec.key_entries(config)) for c in choices)


@pytest.mark.parametrize("lacking", ["sample", "metric"])
def test_without_knowledge_of_the_groups_they_count_alike(lacking):
    config, attention, moments = _layer(1)
    if lacking == "sample":
        moments.sample_x, moments.sample_key_weight = moments.sample_x[:0], moments.sample_key_weight[:0]
        moments.cross_fisher += _metric(config, torch.rand(1, 128))
    choices = rounded_key_choices(config, RoundingCosts.of(attention, moments), 0.5, (16, 8, 4, 3, 2))
    by_width = {c.spec.bits_k: c.kl for c in choices if isinstance(c.spec.bits_k, int)}
    assert by_width[NOISE_BITS] == pytest.approx(0.5) and by_width[16] == 0
    assert by_width[2] > by_width[3] > by_width[4] > by_width[8] > 0


def test_groups_that_are_not_full_are_counted_as_they_are():
    config, attention, moments = _layer(1, head_dim=80)
    moments.cross_fisher += _metric(config, torch.rand(1, 80))
    choices = rounded_key_choices(config, RoundingCosts.of(attention, moments), 0.5, (8, 4, 2))
    assert choices[0].spec.bits_k == 2 and choices[-1].spec.bits_k == 8
    assert all(a.bytes < b.bytes and a.kl > b.kl for a, b in zip(choices, choices[1:], strict=False))


def test_costs_are_scaled_to_what_was_measured():
    config, attention, moments = _layer(2)
    moments.cross_fisher += _metric(config, torch.rand(2, 128))
    costs = RoundingCosts.of(attention, moments)
    (choice,) = rounded_key_choices(config, costs, 0.25, (NOISE_BITS,))
    assert choice.kl == pytest.approx(0.25) and choice.spec.bits_k == NOISE_BITS
