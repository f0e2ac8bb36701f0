"""RoPE: both bases, the linear scaling, the half-split pairs; QK-norm; the scale of the embedding."""

import math

import pytest
import torch
from random_models import naive_attention, random_model, small_config, tokens

from tpa_train.gemma3.layers import RMSNorm, apply_rotary, rope_frequencies, rotary_table


@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize("kind", ["local", "global"])
def test_speeds(kind, factor):
    config = small_config(head_dim=16, rope_theta=1_000_000.0, rope_local_theta=10_000.0, rope_scaling_factor=factor)
    base, scaling = (1_000_000.0, factor) if kind == "global" else (10_000.0, 1.0)
    expected = [base ** (-2 * i / 16) / scaling for i in range(8)]
    assert rope_frequencies(config, kind).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["local", "global"])
def test_rotates_half_split_pairs_by_position(kind):
    config = small_config()
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 5, 1000]])
    out = apply_rotary(x, rotary_table(config, kind, positions))
    speeds = rope_frequencies(config, kind).double()
    for t, position in enumerate(positions[0].tolist()):
        for i in range(4):
            angle = position * float(speeds[i])
            pair = torch.complex(x[0, t, :, i], x[0, t, :, i + 4]) * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(out[0, t, :, i], pair.real, rtol=0, atol=2e-4)
            torch.testing.assert_close(out[0, t, :, i + 4], pair.imag, rtol=0, atol=2e-4)
    assert torch.equal(out[:, 0], x[:, 0])


def test_half_precision_tables_stay_float32():
    cos, sin = rotary_table(small_config(), "global", torch.arange(4))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (4, 1, 4)


def test_norm_computes_in_float32_and_adds_one():
    norm = RMSNorm(8, 1e-6)
    norm.weight.data = torch.linspace(-0.5, 0.5, 8)
    x = torch.randn(5, 8).bfloat16()
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    out = norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", ["local", "global"])
def test_a_layer_by_the_definition(groups, kind):
    """One whole block written out: norms, QK-norm, RoPE, scale, window, sandwich norms, gated MLP."""
    config = small_config(num_layers=1, layer_kinds=(kind,), num_kv_heads=groups)
    model, ids = random_model(config), tokens(config, 2, 30)
    w = dict(model.named_parameters())
    layer = "layers.0."

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w[name])

    def heads(x, name, n):
        return (x @ w[f"{layer}self_attn.{name}.weight"].T).unflatten(-1, (n, 8))

    speeds = rope_frequencies(config, kind)
    angles = torch.arange(30, dtype=torch.float32)[:, None, None] * speeds

    def rope(x):
        a, b = x[..., :4], x[..., 4:]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    x = w["embed_tokens.weight"][ids] * config.hidden_size**0.5
    y = norm(x, layer + "input_layernorm.weight")
    q = rope(norm(heads(y, "q_proj", 4), layer + "self_attn.q_norm.weight"))
    k = rope(norm(heads(y, "k_proj", groups), layer + "self_attn.k_norm.weight"))
    v = heads(y, "v_proj", groups).repeat_interleave(4 // groups, dim=2)
    p = naive_attention(q, k, config.query_pre_attn_scalar**-0.5, 8 if kind == "local" else None)
    out = torch.einsum("bhts,bshd->bthd", p, v).flatten(-2) @ w[layer + "self_attn.o_proj.weight"].T
    x = x + norm(out, layer + "post_attention_layernorm.weight")
    y = norm(x, layer + "pre_feedforward_layernorm.weight")
    gate = y @ w[layer + "mlp.gate_proj.weight"].T
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    y = (gelu * (y @ w[layer + "mlp.up_proj.weight"].T)) @ w[layer + "mlp.down_proj.weight"].T
    x = norm(x + norm(y, layer + "post_feedforward_layernorm.weight"), "norm.weight")
    torch.testing.assert_close(model(ids), x @ w["embed_tokens.weight"].T, rtol=0, atol=1e-10)
