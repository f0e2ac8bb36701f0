"""Moments of all heads together, against sums over tokens written out one by one."""

import pytest
import torch
from calibrated_models import calibrate
from random_models import random_model, small_config

from tpa_train.factorization import calibration as calibration_file
from tpa_train.factorization.calibration import LayerMoments, add_keys, add_shared, add_values, keep_sample
from tpa_train.factorization.latent import key_basis, value_basis
from tpa_train.factorization.stacked import (
    ActivationSample,
    HeadMoments,
    centred_values,
    key_metric,
    key_moments,
    value_metric,
    value_moments,
)

GROUPS = [1, 2, 4]


def _recorded(model, layer, monkeypatch, **options):
    """The layer's moments, and every token's input and weights as the calibration pass had them."""
    seen, original = [], calibration_file.keep_sample

    def keep(moments, x, key_weight, value_weight):
        seen.append((x.double(), key_weight, value_weight))
        original(moments, x, key_weight, value_weight)

    monkeypatch.setattr(calibration_file, "keep_sample", keep)
    result = calibrate(model, [layer], **options)
    return result, *(torch.cat(parts) for parts in zip(*seen, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("groups", GROUPS)
def test_shared_moments_are_sums_over_tokens(groups, monkeypatch):
    model = random_model(small_config(num_kv_heads=groups))
    result, x, key_weight, value_weight = _recorded(model, 5, monkeypatch)
    attention, moments = model.layers[5].self_attn, result.layers[5]
    assert x.shape == (result.tokens, 24) and key_weight.shape == value_weight.shape == (result.tokens, groups)
    sums = {name: torch.zeros_like(t) for name, t in moments.sums().items() if name.startswith(("shared", "norm"))}
    for token, weights_k, weights_v in zip(x, key_weight, value_weight, strict=True):
        k, v = attention.k_proj(token).unflatten(-1, (groups, 8)), attention.v_proj(token)
        scale = k.square().mean()
        y, w_k, w_v = torch.cat((k.flatten(), v)), weights_k.mean(), weights_v.mean()
        sums["shared_key_weight"] += w_k
        sums["shared_key_second"] += w_k / scale * y[:, None] * y
        sums["shared_value_weight"] += w_v
        sums["shared_value_first"] += w_v * y
        sums["shared_value_second"] += w_v * y[:, None] * y
        sums["norm_ratio"] += w_k * scale / k.square().mean(-1)
    for name, expected in sums.items():
        torch.testing.assert_close(getattr(moments, name), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    # k / s has mean square one over all heads.
    trace = moments.shared_key_second[: groups * 8, : groups * 8].trace()
    assert float(trace / moments.shared_key_weight) == pytest.approx(groups * 8, rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("groups", GROUPS)
def test_head_moments_are_blocks_of_the_shared_ones(groups, monkeypatch):
    model = random_model(small_config(num_kv_heads=groups))
    result, x, key_weight, value_weight = _recorded(model, 1, monkeypatch)
    attention, moments = model.layers[1].self_attn, result.layers[1]
    k, v = (p(x).unflatten(-1, (groups, 8)) for p in (attention.k_proj, attention.v_proj))
    k = k / k.square().mean((1, 2), keepdim=True).sqrt()
    w_k, w_v = (w.mean(-1) / w.mean(-1).sum() for w in (key_weight, value_weight))
    keys, values = key_moments(moments, result.tokens), value_moments(attention, moments)
    torch.testing.assert_close(keys.second, torch.einsum("t,tgd,the->gdhe", w_k, k, k), rtol=0, atol=1e-9)
    assert not keys.mean.any()
    mean = torch.einsum("t,tgd->gd", w_v, v)
    torch.testing.assert_close(values.mean, mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        values.second, torch.einsum("t,tgd,the->gdhe", w_v, v - mean, v - mean), rtol=0, atol=1e-9
    )
    for found in (keys, values):
        assert found.second.shape == found.metric.shape == (groups, 8, groups, 8) and found.mean.shape == (groups, 8)
        for matrix in (found.second, found.metric):
            flat = matrix.reshape(groups * 8, -1)
            torch.testing.assert_close(flat, flat.mT, rtol=0, atol=1e-9 * float(flat.abs().max()))
            assert torch.linalg.eigvalsh(flat).min() > -1e-9 * flat.abs().max()
    first, covariance = centred_values(moments)
    torch.testing.assert_close(first[groups * 8 :].unflatten(0, (groups, 8)), mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(covariance, covariance.mT, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("groups", GROUPS)
def test_the_value_metric_is_the_error_of_the_layers_output(groups):
    """Of one query head a group sees: Σ_h ‖W_O^h δ_g(h)‖², heads independent of each other."""
    attention = random_model(small_config(num_kv_heads=groups)).layers[5].self_attn
    delta = torch.randn(groups, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = attention.o_proj.weight.unflatten(1, (4, 8))
    expected = sum(float((out[:, h] @ delta[h * groups // 4]).square().sum()) for h in range(4))
    metric = value_metric(attention)
    assert float(torch.einsum("gd,gdhe,he->", delta, metric, delta)) == pytest.approx(expected, rel=1e-9)
    off = metric.clone()
    for head in range(groups):
        off[head, :, head] = 0
    assert not off.any()


@pytest.mark.parametrize("groups", GROUPS)
def test_the_key_metric_carries_the_fisher_information_over(groups):
    """Where every token's heads have scales in one ratio, an error of k / s costs what that of k̃ = k / rms costs."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1.0, 1.0 + groups).double()
    k = torch.randn(50, groups, 8, generator=generator, dtype=torch.float64)
    k = k / k.square().mean(-1, keepdim=True).sqrt() * scales[:, None]
    k = k * (1 + torch.rand(50, 1, 1, generator=generator, dtype=torch.float64))  # a token's own size: no matter
    gradient = torch.randn(50, groups, 8, generator=generator, dtype=torch.float64)
    moments = LayerMoments.zeros(small_config(num_kv_heads=groups))
    weight = add_keys(moments, k / k.square().mean(-1, keepdim=True).sqrt(), gradient)
    add_shared(moments, k, torch.zeros_like(k), weight, torch.ones(50, groups).double())
    delta = torch.randn(groups, 8, generator=generator, dtype=torch.float64)  # of k / s
    own = delta * (scales.square().mean().sqrt() / scales)[:, None]  # the same error of k̃
    expected = float(torch.einsum("tgd,gd->t", gradient, own).square().sum()) / 50
    metric = key_metric(moments, 50)
    assert float(torch.einsum("gd,gdhe,he->", delta, metric, delta)) == pytest.approx(expected, rel=1e-9)
    # The heads' own blocks are the separate latents' metric, but for the scale.
    for head in range(groups):
        ratio = float(scales.square().mean() / scales[head] ** 2)
        torch.testing.assert_close(metric[head, :, head] / ratio, moments.key_fisher[head] / 50, rtol=1e-9, atol=1e-12)


def test_one_head_sees_what_separate_latents_see():
    """G = 1: k / s is k̃ and the weights are the head's own, so both solutions rest on the same moments."""
    model = random_model(small_config(num_kv_heads=1))
    result = calibrate(model, [5])
    attention, moments = model.layers[5].self_attn, result.layers[5]
    for found, basis in (
        (key_moments(moments, result.tokens), key_basis(moments, result.tokens)),
        (value_moments(attention, moments), value_basis(attention, moments)),
    ):
        second, metric = found.second[0, :, 0], found.metric[0, :, 0]
        energies = torch.linalg.eigvals(metric @ second).real.sort(descending=True).values
        torch.testing.assert_close(energies, basis.energies[0], rtol=1e-4, atol=1e-7 * float(basis.energies.max()))


def test_moments_of_weights():
    """White inputs: E[k kᵀ] = W Wᵀ, and a plain squared error."""
    weight = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    found = HeadMoments.of_weights(weight)
    flat = weight.double().flatten(0, 1)
    torch.testing.assert_close(found.second.reshape(6, 6), flat @ flat.T)
    assert torch.equal(found.metric.reshape(6, 6), torch.eye(6).double()) and not found.mean.any()


# --------------------------------------------------------------------------------------------------------------- sample


def test_the_sample_is_every_eighth_token(monkeypatch):
    model = random_model(small_config(num_kv_heads=4))
    result, x, key_weight, value_weight = _recorded(model, 5, monkeypatch, rows=4, length=44)  # batches of 88 tokens
    sample = ActivationSample.of(result.layers[5])
    pick = torch.cat([torch.arange(7, 88, 8), torch.arange(88 + 7, 176, 8)])
    assert sample.x.dtype == torch.float32
    assert torch.equal(sample.x, x[pick].float())
    assert torch.equal(sample.key_weight, key_weight[pick].mean(-1).float())
    assert torch.equal(sample.value_weight, value_weight[pick].mean(-1).float())


@pytest.mark.parametrize("limit", [0, 1, 5, 20, 1000])
def test_the_sample_is_capped(limit, monkeypatch):
    monkeypatch.setattr(calibration_file, "SAMPLE_LIMIT", limit)
    moments = LayerMoments.zeros(small_config(num_kv_heads=2))
    x, weight = torch.randn(50, 24), torch.rand(50, 2).double()
    for _ in range(5):
        keep_sample(moments, x, weight, 2 * weight)
    sample = ActivationSample.of(moments)
    count = min(limit, 5 * (50 // 8))
    expected = torch.cat([x[7::8]] * 5)[:count]
    assert torch.equal(sample.x, expected) and sample.x.shape == (count, 24)
    torch.testing.assert_close(sample.value_weight, 2 * sample.key_weight)
    assert sample.key_weight.shape == (count,)


def test_sums_leave_the_sample_out():
    """What processes add up: everything but the sample."""
    moments = LayerMoments.zeros(small_config())
    assert {n for n in moments.tensors() if n not in moments.sums()} == {
        "sample_x", "sample_key_weight", "sample_value_weight"
    }  # fmt: skip
    add_values(moments, torch.ones(3, 1, 8).double(), torch.ones(3, 1).double())
    assert moments.sums()["value_weight"].item() == 3
