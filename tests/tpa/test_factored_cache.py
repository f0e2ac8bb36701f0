"""Decoding with the factored, quantized cache equals the full forward; its bytes equal the formula."""

import dataclasses

import pytest
import torch
from random_models import factors_for, random_model, small_config, specs_of, student_of, tokens

from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs

WINDOW, LENGTH, LONG = 64, 464, 1564  # 400 and 1 500 tokens past the window's edge
KINDS = ("local",) * 4 + ("global",) * 4
MIX = {0: (5, 3), 1: (6, 0), 2: (0, 4), 4: (5, 3), 5: (6, 0), 6: (0, 4)}  # 3 and 7: dense K and V


def _mixed(groups, bits, dtype=torch.float32):
    """All four pairs of forms, each in a local and in a global layer."""
    config = small_config(num_layers=8, layer_kinds=KINDS, num_kv_heads=groups, sliding_window=WINDOW)
    model = random_model(config, seed=groups, dtype=dtype)
    forms = dict(MIX) if bits == 16 else MIX | {3: (0, 0), 7: (0, 0)}
    return student_of(model, forms, bits)


def _with_joint(groups, rounded, dtype=torch.float64):
    """Joint latents, half of them with norms, beside dense and latent layers, each in a local and in a global layer.

    40 numbers a head.
    """
    config = small_config(
        num_layers=8, layer_kinds=KINDS, num_kv_heads=groups, sliding_window=WINDOW, head_dim=40, hidden_size=48
    )
    joint, bits_j, bits_k, bits_v, bits_d = 70, 16, 16, 16, 16
    if rounded == "8":
        bits_j = bits_k = bits_v = bits_d = 8
    if rounded == "mixed":
        bits_j, bits_k, bits_v, bits_d = (8, 4, 3), (8, 3), (16, 4), (6, 16)
    pair = [
        LayerSpec("joint", joint, "joint", joint, bits_j), LayerSpec("latent", 35, "dense", 40, bits_k, bits_d),
        LayerSpec("dense", 40, "latent", 33, bits_d, bits_v), LayerSpec("joint", 9, "joint", 9, 8 if rounded else 16),
    ]  # fmt: skip
    specs = [*pair, *pair]
    for layer in (0, 7):  # local and global
        specs[layer] = dataclasses.replace(specs[layer], cached_norm=True)
    model = random_model(config, seed=groups, dtype=dtype)
    return Gemma3ForMultimodalLMwithTPA.from_dense(model, specs, factors_for(model, specs))


def _decode(student, ids):
    """A prompt, chunks below and above the window, and single tokens."""
    cache = student.allocate_cache(1, ids.shape[1], dtype=student.head_weight.dtype)
    sizes = [50] + [1] * 30 + [150, 7, 100] + [13] * 3 + [1] * 10
    sizes += [97] * ((ids.shape[1] - sum(sizes)) // 97)
    parts = ids.split(sizes + [1] * (ids.shape[1] - sum(sizes)), dim=1)
    return student.logits(torch.cat([student.hidden_states(part, cache=cache) for part in parts], dim=1))


def _same_greedy(decoded, full, margin):
    """The likeliest token is the same wherever it leads by ``margin``: a tie may fall either way."""
    top = full.topk(2).values
    clear = top[..., 0] - top[..., 1] > margin
    assert clear.float().mean() > 0.6
    assert torch.equal(decoded.argmax(-1)[clear], full.argmax(-1)[clear])


@torch.inference_mode()
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    "bits,dtype,tolerance", [(16, torch.float32, 1e-3), (8, torch.float64, 1e-6), (4, torch.float64, 1e-6)]
)
def test_factored_decode_equals_the_full_forward(groups, bits, dtype, tolerance):
    """Far past the window, with the same greedy tokens.

    Quantized caches need float64 for this: in float32 two orders of summation differ by 1e-7, now and then that falls
    on either side of a rounding edge, and the cached number moves by a whole step (the test below).
    """
    student = _mixed(groups, bits, dtype)
    assert len({(s.form_k, s.form_v) for s in student.specs}) == 4
    ids = tokens(student.config, 1, LONG if groups == 1 else LENGTH, seed=bits)
    decoded, full = _decode(student, ids), student(ids)
    torch.testing.assert_close(decoded, full, rtol=0, atol=tolerance)
    _same_greedy(decoded, full, 2 * tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    "rounded,dtype,tolerance",
    [("", torch.float32, 1e-3), ("", torch.float64, 1e-9), ("8", torch.float64, 1e-6), ("mixed", torch.float64, 1e-6)],
)
def test_joint_latents_and_mixed_widths_decode_as_the_full_forward(groups, rounded, dtype, tolerance):
    student = _with_joint(groups, rounded, dtype)
    assert {s.form_k for s in student.specs} == {"joint", "latent", "dense"}
    ids = tokens(student.config, 2, 200)
    cache = student.allocate_cache(2, 200, dtype=dtype)
    parts = ids.split([50] + [1] * 20 + [100, 7] + [1] * 23, dim=1)
    decoded = torch.cat([student(part, cache=cache) for part in parts], dim=1)
    full = student(ids)
    torch.testing.assert_close(decoded, full, rtol=0, atol=tolerance)
    _same_greedy(decoded, full, 2 * tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("groups", [1, 4])
def test_quantized_decode_in_float32_differs_by_rare_rounding_edges_only(groups):
    student = _mixed(groups, 8)
    ids = tokens(student.config, 1, LENGTH, seed=8)
    decoded, full = _decode(student, ids), student(ids)
    difference = (decoded - full).abs()
    assert (difference < 1e-3).float().mean() > 0.9 and difference.max() < 0.05
    _same_greedy(decoded, full, 0.1)


@torch.inference_mode()
def test_greedy_text_equals_that_of_the_full_forward():
    """The tokens themselves, chosen one by one, against a full forward over the finished text."""
    student = _mixed(4, 8, torch.float64)
    ids = tokens(student.config, 1, 20)
    cache = student.allocate_cache(1, 120, dtype=torch.float64)
    logits = student(ids, cache=cache)
    for _ in range(100):
        token = logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
        logits = student(token, cache=cache)
    assert torch.equal(student(ids)[:, 19:-1].argmax(-1), ids[:, 20:])


@torch.inference_mode()
def test_lower_precision_costs_more():
    """The rounding is really there: the error grows as bits fall, and 16 bits add none."""
    config = small_config(num_kv_heads=4)
    model, ids = random_model(config), tokens(config, 1, 60)
    full = {i: (8, 8) for i in range(6)}
    errors = [(student_of(model, full, bits)(ids) - model(ids)).square().mean().sqrt() for bits in (16, 8, 4)]
    assert errors[0] < 1e-10 < 1e-4 < errors[1] < errors[2] / 5


def _bytes(count, bits):
    """Of one head's ``count`` numbers: whole bytes of codes and 4 bytes a group of 32."""
    if bits == 16:
        return 2 * count
    return {8: count, 4: (count + 1) // 2}[bits] + 4 * ((count + 31) // 32)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("context", [1, 64, 65, 1000])
@pytest.mark.parametrize("rank_k,rank_v", [(5, 3), (8, 33), (40, 0), (0, 31)])
def test_bytes_equal_the_formula(groups, bits, context, rank_k, rank_v):
    config = small_config(num_kv_heads=groups, head_dim=40, sliding_window=64)
    specs = specs_of(config, {1: (rank_k, rank_v), 5: (rank_k, rank_v)}, bits)
    with torch.device("meta"):
        student = Gemma3ForMultimodalLMwithTPA(config, specs)
    converted = groups * (_bytes(rank_k or 40, bits) + _bytes(rank_v or 40, bits))
    short = min(context, 64)
    expected = short * (4 * groups * 2 * 40 * 2 + converted) + context * converted
    assert student.cache_bytes(context) == cache_bytes(config, specs, context) == expected
    cache = student.allocate_cache(1, context, dtype=torch.bfloat16, device="cpu")
    assert sum(t.untyped_storage().nbytes() for layer in cache.buffers for t in layer) == expected == cache.nbytes
    assert student.allocate_cache(3, context, device="meta").nbytes == 3 * expected


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("context", [1, 64, 65, 1000])
@pytest.mark.parametrize("rank,widths", [(9, (8,)), (32, (4,)), (70, (8, 4, 16)), (70, (16, 16, 8)), (80, (4, 4, 4))])
def test_bytes_of_joint_latents_and_mixed_widths(groups, context, rank, widths):
    """One row for all heads, counted once; every group of 32 at its own width."""
    config = small_config(num_kv_heads=groups, head_dim=40, sliding_window=64)
    specs = dense_specs(config)
    specs[1] = LayerSpec("joint", rank, "joint", rank, widths)
    specs[5] = dataclasses.replace(specs[1], cached_norm=True)
    specs[2] = LayerSpec("latent", 40, "latent", 33, (8, 4), (16, 4))
    with torch.device("meta"):
        student = Gemma3ForMultimodalLMwithTPA(config, specs)
    joint = sum(_bytes(min(32, rank - 32 * i), bits) for i, bits in enumerate(widths))
    latent = groups * (_bytes(32, 8) + _bytes(8, 4) + _bytes(32, 16) + _bytes(1, 4))
    short = min(context, 64)
    expected = short * (3 * groups * 2 * 40 * 2 + latent + joint) + context * (joint + 2 * groups)
    assert student.cache_bytes(context) == cache_bytes(config, specs, context) == expected
    cache = student.allocate_cache(1, context, dtype=torch.bfloat16, device="cpu")
    assert sum(t.untyped_storage().nbytes() for layer in cache.buffers for t in layer) == expected == cache.nbytes


def test_the_designs_own_numbers():
    """Bytes a token and layer of the 270M, worked out by hand (dense int8 there has groups of 64)."""
    from tpa_train.gemma3.config import SIZES

    config = SIZES["270m"]
    for spec, expected in [
        (dense_specs(config)[0], 1024),
        (LayerSpec("dense", 256, "dense", 256, 4), 320),
        (LayerSpec("latent", 192, "latent", 192, 4), 240),
        (LayerSpec("latent", 96, "latent", 96, 8), 216),
        (LayerSpec("latent", 128, "latent", 128, 4), 160),
    ]:
        assert spec.bytes_per_token(config) == expected
