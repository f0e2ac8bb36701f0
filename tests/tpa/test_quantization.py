"""The cache's numbers: what is stored is what training saw, and the error is what the step says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_train.errors import UserError
from tpa_train.tpa.quantization import check_bits, decode, encode, entry_bytes, fake_quantize, stored_shapes

COUNTS = [1, 2, 31, 32, 33, 75, 128]


def _numbers(count, kind="normal", seed=0):
    x = torch.randn(3, 5, count, generator=torch.Generator().manual_seed(seed))
    return {
        "normal": x, "shifted": x + 100, "tiny": x * 1e-6, "subnormal": x * 1e-30, "large": x * 1.2e4, "huge": x * 1e12,
        "constant": torch.full_like(x, 0.3), "zero": torch.zeros_like(x), "negative": torch.full_like(x, -7e5),
        "outlier": x + 1000 * (x > 2), "bound": x.sign() * 65504,
    }[kind]  # fmt: skip


KINDS = [
    "normal", "shifted", "tiny", "subnormal", "large", "huge", "constant", "zero", "negative", "outlier", "bound"
]  # fmt: skip


def _round_trip(x, bits):
    codes, scales = encode(x, bits)
    assert codes.dtype == torch.uint8 and scales.dtype == torch.float16
    assert (codes.shape[-1:], scales.shape[-2:]) == stored_shapes(x.shape[-1], bits)
    assert codes[0, 0].numel() + 2 * scales[0, 0].numel() == entry_bytes(x.shape[-1], bits)
    assert torch.isfinite(scales).all()
    return decode(codes, scales, bits, x.shape[-1], x.dtype), scales


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_exactly_what_the_cache_gives_back(bits, count, kind):
    x = _numbers(count, kind)
    back, _ = _round_trip(x, bits)
    assert torch.isfinite(back).all()
    assert torch.equal(back, fake_quantize(x, bits))
    assert torch.equal(back, fake_quantize(x.clone().requires_grad_(), bits).detach())


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_in_other_types(bits, dtype):
    x = _numbers(70).to(dtype)
    back, _ = _round_trip(x, bits)
    assert back.dtype == dtype
    assert torch.equal(back, fake_quantize(x, bits))
    assert torch.equal(back, fake_quantize(x.clone().requires_grad_(), bits).detach())


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["normal", "shifted", "tiny", "large", "constant", "zero", "outlier"])
def test_error_is_half_a_step_plus_the_rounding_of_the_bounds(bits, count, kind):
    x = _numbers(count, kind).double()
    back, scales = _round_trip(x.float(), bits)
    levels = 2**bits - 1
    for start in range(0, count, 32):
        group = x[..., start : start + 32]
        low, high = group.amin(-1), group.amax(-1)
        step, stored_low = scales[..., start // 32, :].double().unbind(-1)
        exact_step = ((high - stored_low) / levels).clamp_min(2.0**-24)  # float16's smallest
        # Both stored numbers are the nearest float16: 2⁻¹¹ relative, half of 2⁻²⁴ where that is coarser.
        half = 2.0**-11
        assert ((stored_low - low).abs() <= half * low.abs() + 2.0**-25).all()
        assert ((step - exact_step).abs() <= half * exact_step.abs() + 2.0**-24 + 1e-12).all()
        allowed = 0.5 * step + (stored_low - low).abs() + levels * (step - exact_step).clamp_max(0).abs()
        error = (back[..., start : start + 32].double() - group).abs().amax(-1)
        assert (error <= allowed * (1 + 1e-5) + 1e-6 * group.abs().amax(-1)).all()


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_steps_are_as_small_as_the_bits_allow(bits):
    """The error also comes near half a step: a quantizer with half the levels would pass no longer."""
    x = torch.rand(64, 32, dtype=torch.float64)
    error = (fake_quantize(x, bits) - x).abs().amax()
    step = (x.amax(-1) - x.amin(-1)).amax() / (2**bits - 1)
    assert 0.4 * step < error < 0.6 * step


def test_groups_do_not_disturb_each_other():
    x = torch.randn(2, 96)
    x[:, 32:64] *= 1e4
    back = fake_quantize(x, 8)
    assert (back - x)[:, :32].abs().max() < 0.02 and (back - x)[:, 64:].abs().max() < 0.02


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1024.0])
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_constants_that_float16_holds_are_exact(value, bits):
    x = torch.full((2, 40), value)
    assert torch.equal(fake_quantize(x, bits), x)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("count", [3, 32, 45])
def test_the_gradient_passes_straight_through(bits, count):
    x = _numbers(count).requires_grad_()
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(fake_quantize(x, bits), x, direction)
    assert torch.equal(gradient, direction)


def test_sixteen_bits_change_nothing():
    x = torch.randn(3, 7)
    assert fake_quantize(x, 16) is x


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=70), st.sampled_from([8, 4])
)  # fmt: skip
def test_any_finite_numbers_come_back_finite_and_the_same(values, bits):
    x = torch.tensor(values, dtype=torch.float32)[None, None]
    back, _ = _round_trip(x, bits)
    assert torch.isfinite(back).all() and torch.equal(back, fake_quantize(x, bits))


@pytest.mark.parametrize("bits", [0, 1, 7, 32, 5])
def test_other_widths_are_refused(bits):
    with pytest.raises(UserError, match=f"must be one of 16, 8, 6, 4, 3, 2, not {bits}"):
        check_bits(bits)
