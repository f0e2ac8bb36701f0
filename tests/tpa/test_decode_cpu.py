"""Decoding on the CPU gives what the reference gives, for every form, width, length and ring, and packs as it does."""

import ctypes
import logging
import os
import shutil
import weakref

import pytest
import torch
from random_models import random_model, small_config, student_of, tokens

from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.layers import rotary_table
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.decode import CachedTokens, attend_cached, compiled, native
from tpa_train.tpa.decode.reference import attend_reference
from tpa_train.tpa.spec import LayerSpec

WIDTH = 40  # head_dim: a group of 32 and a partly filled one
SPECS = [
    None, LayerSpec("dense", WIDTH, "dense", WIDTH, 16), LayerSpec("dense", WIDTH, "dense", WIDTH, 4, 8),
    LayerSpec("dense", WIDTH, "dense", WIDTH, 2, 3), LayerSpec("latent", 35, "latent", 24, (8, 3), 16),
    LayerSpec("latent", 40, "dense", WIDTH, 6, (4, 16)), LayerSpec("dense", WIDTH, "latent", 33, 16, (2, 4)),
    LayerSpec("joint", 70, "joint", 70, (8, 4, 2)), LayerSpec("joint", 100, "joint", 100, (8, 8, 4, 3)),
    LayerSpec("joint", 97, "joint", 97, (6, 16, 2, 6)), LayerSpec("joint", 39, "joint", 39, 16),
    LayerSpec("constant_b", 16, "constant_b", 8, 4), LayerSpec("joint", 70, "joint", 70, (8, 4, 2), cached_norm=True),
]  # fmt: skip
STORED = SPECS[:2]  # what a library's kernel serves

# Where there is a compiler, a kernel that it refuses fails these tests.
compiles = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler to make the kernel with"
)


@compiles
def test_the_kernel_compiles():
    assert compiled.load() is not None


def _layer(spec, groups, dtype, width=WIDTH):
    """A layer with random factors and centers, of four heads."""
    config = small_config(num_kv_heads=groups, head_dim=width, num_layers=1, layer_kinds=("local",))
    attention = (Attention(config, 0) if spec is None else FactorizedAttention(config, 0, spec)).to(dtype)
    generator = torch.Generator().manual_seed(groups)
    for name, p in attention.named_parameters():
        scale = 0.3 if p.dim() == 1 or "center" in name else p.shape[-1] ** -0.5
        p.data = (torch.randn(p.shape, generator=generator) * scale).to(dtype)
    return attention.requires_grad_(False)


def _written(attention):
    """Layouts of what ``write`` returns; cached norms come later."""
    return attention.entries[: len(attention.entries) - attention.spec.cached_norm]


def _cached(attention, dtype, slots, lengths, rows=None):
    """Random queries, and caches of sequences of these ``lengths`` in these ``rows``."""
    generator = torch.Generator().manual_seed(slots)
    count = len(lengths) if rows is None else max(rows) + 2

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    if type(attention) is Attention:
        stored = tuple(randn(count, slots, *shape) for shape, _ in attention.storage())
    else:
        stored = attention.pack(tuple(randn(count, slots, e.rows, e.count) for e in _written(attention)))
    rotary = rotary_table(attention.config, "local", torch.arange(max(*lengths, slots) + 3))
    where = None if rows is None else torch.tensor(rows)
    queries = randn(len(lengths), attention.config.num_heads, attention.config.head_dim)
    return queries, CachedTokens(stored, torch.tensor(lengths, dtype=torch.int32), rotary, where)


def _wide(attention, spec, groups, queries, cached):
    """The same layer, queries and cache in float64; what is rounded stays as it is."""
    wide = _layer(spec, groups, torch.float64, attention.config.head_dim)
    wide.load_state_dict(attention.state_dict())
    stored = tuple(t.double() if t.dim() == 4 and t.is_floating_point() else t for t in cached.stored)
    rotary = tuple(t.double() for t in cached.rotary)
    return wide, queries.double(), CachedTokens(stored, cached.lengths, rotary, cached.rows)


def _error(ours, theirs, lengths):
    """Largest difference relative to the largest number, over rows that are not idle."""
    live = lengths > 0
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    return float((ours - theirs)[live].abs().max() / theirs[live].abs().max())


LAYOUTS = [
    (16, [3, 16, 0, 40], None), (150, [150, 150], None), (40, [41, 9, 71], [3, 0, 1])
]  # fmt: skip


@compiles
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "original" if s is None else s.describe())
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_is_the_reference_in_float64(spec, groups, monkeypatch):
    for tiles in {compiled.has_tiles(), False}:
        monkeypatch.setattr(compiled, "has_tiles", lambda tiles=tiles: tiles)
        for dtype, allowed in ((torch.float32, 2e-5 if tiles else 3e-6), (torch.bfloat16, 0.05)):
            attention = _layer(spec, groups, dtype)
            for layout in LAYOUTS:
                queries, cached = _cached(attention, dtype, *layout)
                assert (native.attend_native(attention, queries, cached) is None) == (spec in STORED)
                ours = attend_cached(attention, queries, cached)
                exact = attend_reference(*_wide(attention, spec, groups, queries, cached))
                assert ours.dtype == dtype and _error(ours, exact, cached.lengths) < allowed


@compiles
@pytest.mark.parametrize("spec", [s for s in SPECS[:-1] if s not in STORED], ids=lambda s: s.describe())
@torch.no_grad()
def test_packs_new_tokens_to_the_bit(spec):
    for dtype, scale in ((torch.float32, 1.0), (torch.float32, 1e-6), (torch.bfloat16, 3e4)):
        attention = _layer(spec, 2, dtype)
        lengths, rows = [25, 9, 0, 71], [3, 0, 2, 1]
        queries, cached = _cached(attention, dtype, 24, lengths, rows)
        before = tuple(t.clone() for t in cached.stored)
        generator = torch.Generator().manual_seed(0)
        news = tuple(
            (torch.randn(4, 1, e.rows, e.count, generator=generator) * scale).to(dtype) for e in _written(attention)
        )
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for expected, packed in zip(before, attention.pack(news), strict=True):
                if length:
                    expected[row, (length - 1) % 24] = packed[b, 0]
        assert native.attend_native(attention, queries, cached, news) is not None
        pairs = list(zip(cached.stored, before, strict=True))
        if spec.cached_norm:  # of keys that are rebuilt otherwise
            torch.testing.assert_close(*pairs.pop(), rtol=1e-4 if dtype == torch.float32 else 0.02, atol=0)
        assert all(torch.equal(mine, expected) for mine, expected in pairs)


@compiles
@torch.no_grad()
def test_one_bfloat16_product_where_it_is_asked_for():
    """Without tiles float32 vectors are faster than anything narrower."""
    attention = _layer(LayerSpec("joint", 70, "joint", 70, 8), 1, torch.float32)
    queries, cached = _cached(attention, torch.float32, 64, [64])
    exact = attend_reference(attention, queries, cached)
    split = _error(attend_cached(attention, queries, cached), exact, cached.lengths)
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        single = _error(attend_cached(attention, queries, cached), exact, cached.lengths)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert 20 * split < single < 0.02 if compiled.has_tiles() else split == single
    assert _error(attend_cached(attention, queries, cached), exact, cached.lengths) == split


@compiles
@torch.no_grad()
def test_changed_factors_are_noticed():
    attention = _layer(LayerSpec("joint", 70, "joint", 70, (8, 4, 2)), 1, torch.float32)
    queries, cached = _cached(attention, torch.float32, 16, [12])
    for _ in range(2):
        ours = attend_cached(attention, queries, cached)
        assert _error(ours, attend_reference(attention, queries, cached), cached.lengths) < 2e-5
        attention.keys.up.mul_(0.5)
        attention.keys.center.add_(1.0)
        attention.values.up.mul_(2.0)


@compiles
def test_gradients_and_other_forms_take_the_reference():
    attention = _layer(LayerSpec("joint", 70, "joint", 70, 8), 1, torch.float32)
    queries, cached = _cached(attention, torch.float32, 16, [12])
    assert native.attend_native(attention, queries, cached) is not None
    queries.requires_grad_()
    assert native.attend_native(attention, queries, cached) is None
    assert attend_cached(attention, queries, cached).requires_grad
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert native.attend_native(attention, queries, cached) is None
    contextual = _layer(LayerSpec("contextual", 1, "dense", WIDTH), 2, torch.float32)
    assert native.attend_native(contextual, *_cached(contextual, torch.float32, 16, [12])) is None


@compiles
def test_the_struct_is_mirrored():
    assert compiled.load().tpa_job_bytes() == ctypes.sizeof(native._Job)


@compiles
def test_the_library_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TPA_TRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "FLAGS", ("-O0", "-std=gnu11", "-shared", "-fPIC"))  # sooner done
    first = compiled._compiled()
    made = os.stat(first).st_mtime_ns
    assert compiled._compiled() == first and os.stat(first).st_mtime_ns == made
    assert list(first.parent.iterdir()) == [first]
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-g0"))
    assert compiled._compiled() != first


@torch.no_grad()
def test_without_a_compiler_pytorch_serves(monkeypatch, caplog):
    attention = _layer(LayerSpec("joint", 70, "joint", 70, 8), 1, torch.float32)
    queries, cached = _cached(attention, torch.float32, 16, [12, 20])
    monkeypatch.setattr(compiled, "_compiled", lambda: (_ for _ in ()).throw(OSError("no space left")))
    compiled._load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            ours = [attend_cached(attention, queries, cached) for _ in range(2)]
        assert [r.getMessage() for r in caplog.records] == [
            "decoding on the CPU does without its compiled kernel: no space left"
        ]
        assert all(torch.equal(o, attend_reference(attention, queries, cached)) for o in ours)
    finally:
        compiled._load.cache_clear()


@torch.inference_mode()
@pytest.mark.parametrize("bits", [16, 4])
def test_a_step_of_the_model_is_a_forward_over_everything(bits):
    """Through the cache and past the window, for two sequences."""
    config = small_config(num_layers=4, layer_kinds=("local", "global") * 2)
    student = student_of(random_model(config, dtype=torch.float32), {0: (5, 3), 1: (6, 0), 3: (0, 4)}, bits)
    ids = tokens(config, 2, 40)
    cache = student.allocate_cache(2, 40, dtype=torch.float32)
    parts = [student(part, cache=cache) for part in ids.split([20] + [1] * 20, dim=1)]
    assert torch.allclose(torch.cat(parts, 1), student(ids), rtol=1e-4, atol=1e-4)


@compiles
@torch.no_grad()
def test_a_layer_is_not_held_to_the_cache_of_its_last_step():
    """Caches take turns, grow, lie elsewhere under the same rotation tables, and are let go."""
    attention = _layer(SPECS[4], 2, torch.float32)
    first, second = _cached(attention, torch.float32, 16, [12]), _cached(attention, torch.float32, 40, [33])
    moved = CachedTokens(tuple(t.flip(1) for t in first[1].stored), first[1].lengths, first[1].rotary)
    for queries, cached in (first, first, second, (first[0], moved), first):
        ours = native.attend_native(attention, queries, cached)
        assert _error(ours, attend_reference(attention, queries, cached), cached.lengths) < 2e-5
    held = weakref.ref(moved.stored[0])
    native.attend_native(attention, first[0], moved)
    del moved, cached
    assert held() is None
