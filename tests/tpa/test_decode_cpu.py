"""Blockwise decoding on the CPU gives what the reference gives, for every form, width, length and ring."""

import pytest
import torch
from random_models import random_model, small_config, student_of, tokens

from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.layers import rotary_table
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.decode import CachedTokens, attend_cached, cpu
from tpa_train.tpa.decode.reference import attend_reference
from tpa_train.tpa.spec import LayerSpec

WIDTH = 40  # head_dim: a group of 32 and a partly filled one
SPECS = [
    None, LayerSpec("dense", WIDTH, "dense", WIDTH, 16), LayerSpec("dense", WIDTH, "dense", WIDTH, 4, 8),
    LayerSpec("dense", WIDTH, "dense", WIDTH, 2, 3), LayerSpec("latent", 35, "latent", 24, (8, 3), 16),
    LayerSpec("latent", 40, "dense", WIDTH, 6, (4, 16)), LayerSpec("dense", WIDTH, "latent", 33, 16, (2, 4)),
    LayerSpec("joint", 70, "joint", 70, (8, 4, 2)), LayerSpec("joint", 100, "joint", 100, (8, 8, 4, 3)),
    LayerSpec("joint", 97, "joint", 97, (6, 16, 2, 6)), LayerSpec("constant_b", 16, "constant_b", 8, 4),
]  # fmt: skip


def _layer(spec, groups, dtype):
    """A layer with random factors and centers, of four heads."""
    config = small_config(num_kv_heads=groups, head_dim=WIDTH, num_layers=1, layer_kinds=("local",))
    attention = (Attention(config, 0) if spec is None else FactorizedAttention(config, 0, spec)).to(dtype)
    generator = torch.Generator().manual_seed(groups)
    for name, p in attention.named_parameters():
        scale = 0.3 if p.dim() == 1 or "center" in name else p.shape[-1] ** -0.5
        p.data = (torch.randn(p.shape, generator=generator) * scale).to(dtype)
    return attention


def _cached(attention, dtype, slots, lengths, rows=None):
    """Random queries, and caches of sequences of these ``lengths`` in these ``rows``."""
    generator = torch.Generator().manual_seed(slots)
    count = len(lengths) if rows is None else max(rows) + 2

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    if type(attention) is Attention:
        stored = tuple(randn(count, slots, *shape) for shape, _ in attention.storage())
    else:
        stored = attention.pack(tuple(randn(count, slots, e.rows, e.count) for e in attention.entries))
    rotary = rotary_table(attention.config, "local", torch.arange(max(*lengths, slots) + 3))
    where = None if rows is None else torch.tensor(rows)
    queries = randn(len(lengths), attention.config.num_heads, WIDTH)
    return queries, CachedTokens(stored, torch.tensor(lengths, dtype=torch.int32), rotary, where)


@torch.no_grad()
def _error(attention, queries, cached):
    """Largest difference from the reference, relative to its largest number, over rows that are not idle."""
    live = cached.lengths > 0
    ours, theirs = cpu.attend_cpu(attention, queries, cached), attend_reference(attention, queries, cached)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.isfinite(ours).all()
    return float((ours - theirs)[live].abs().max() / theirs[live].abs().max())


LAYOUTS = [
    (16, [3, 16, 0, 40], None), (16, [16, 16], None), (24, [25, 9, 71], [3, 0, 1])
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "original" if s is None else s.describe())
@pytest.mark.parametrize("groups", [1, 2])
def test_is_the_reference(spec, groups, monkeypatch):
    for dtype, allowed in ((torch.float64, 1e-6), (torch.float32, 2e-5), (torch.bfloat16, 0.05)):
        attention = _layer(spec, groups, dtype)
        for block in (7, 1024):
            monkeypatch.setattr(cpu, "BLOCK", block)
            for slots, lengths, rows in LAYOUTS:
                assert _error(attention, *_cached(attention, dtype, slots, lengths, rows)) < allowed


def test_unrounded_entries_are_exact():
    for spec in (LayerSpec("joint", 50, "joint", 50), LayerSpec("latent", 20, "latent", 30)):
        attention = _layer(spec, 2, torch.float64)
        assert _error(attention, *_cached(attention, torch.float64, 16, [3, 40])) < 1e-12


@pytest.mark.parametrize("form", ["joint", "latent", "constant_b"])
@pytest.mark.parametrize("block", [16, 64])
@torch.no_grad()
def test_narrow_products_round_less_than_eight_bits_do(form, block, monkeypatch):
    monkeypatch.setattr(cpu, "has_tiles", lambda: True)  # slower elsewhere, but the same
    monkeypatch.setattr(cpu, "NARROW_WORK", 0)
    monkeypatch.setattr(cpu, "_exact_products", lambda: False)
    monkeypatch.setattr(cpu, "BLOCK", block)
    cpu._tables.clear()  # of the usual block
    rounded, exact = (_layer(LayerSpec(form, 39, form, 39, bits), 2, torch.float32) for bits in (8, 16))
    layout, unrounded = (_cached(layer, torch.float32, 64, [33, 64, 100]) for layer in (rounded, exact))
    true, stored = attend_reference(exact, *unrounded), attend_reference(rounded, *layout)
    ours = cpu.attend_cpu(rounded, *layout)
    error, quantization = (ours - stored).square().mean().sqrt(), (stored - true).square().mean().sqrt()
    assert 1e-3 * quantization < error < quantization
    monkeypatch.setattr(cpu, "_exact_products", lambda: True)
    assert _error(rounded, *layout) < 2e-5
    cpu._tables.clear()


def test_narrow_products_are_asked_for():
    assert cpu._exact_products()
    before = torch.get_float32_matmul_precision()
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert not cpu._exact_products()
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert cpu._exact_products() and torch.get_float32_matmul_precision() == before


def test_changed_factors_are_noticed():
    attention = _layer(LayerSpec("joint", 70, "joint", 70, (8, 4, 2)), 1, torch.float32)
    layout = _cached(attention, torch.float32, 16, [12])
    assert _error(attention, *layout) < 2e-5
    with torch.no_grad():
        attention.keys.up.mul_(0.5)
        attention.keys.center.add_(1.0)
        attention.values.up.mul_(2.0)
    assert _error(attention, *layout) < 2e-5


def test_gradients_and_other_forms_take_the_reference():
    attention = _layer(LayerSpec("joint", 70, "joint", 70, 8), 1, torch.float32)
    queries, cached = _cached(attention, torch.float32, 16, [12])
    assert cpu.supported(attention, queries) and not cpu.supported(attention, queries.clone().requires_grad_())
    assert attend_cached(attention, queries.requires_grad_(), cached).requires_grad
    contextual = _layer(LayerSpec("contextual", 1, "dense", WIDTH), 2, torch.float32)
    assert not cpu.supported(contextual, queries.detach())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cpu.supported(attention, queries)


@torch.inference_mode()
@pytest.mark.parametrize("bits", [16, 4])
def test_a_step_of_the_model_is_a_forward_over_everything(bits):
    """Through the cache, past the window, for two sequences; the blocks' memory serves both modes of inference."""
    config = small_config(num_layers=4, layer_kinds=("local", "global") * 2)
    student = student_of(random_model(config, dtype=torch.float32), {0: (5, 3), 1: (6, 0), 3: (0, 4)}, bits)
    ids = tokens(config, 2, 40)
    cache = student.allocate_cache(2, 40, dtype=torch.float32)
    parts = [student(part, cache=cache) for part in ids.split([20] + [1] * 20, dim=1)]
    assert torch.allclose(torch.cat(parts, 1), student(ids), rtol=1e-4, atol=1e-4)
