"""The decoding kernels against the reference: on the GPU if there is one, else in Triton's interpreter."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decode_cases import FORMS, filled, layer, moved
from decode_kernels import (  # noqa: F401
    BF16,
    CUDA,
    DEVICE,
    F16,
    F32,
    SMALL,
    bounds_of_loops,
    kernels_stay_inside_their_buffers,
    tl,
    triton,
)  # fmt: skip

from tpa_train.gemma3.config import SIZES
from tpa_train.gemma3.layers import rotary_table
from tpa_train.tpa.decode import attend_cached, launch
from tpa_train.tpa.decode.absorbed import attend_absorbed
from tpa_train.tpa.decode.launch import attend_triton, obstacle, prepare
from tpa_train.tpa.decode.packed import attend_packed
from tpa_train.tpa.decode.plan import columns as columns_of
from tpa_train.tpa.decode.plan import order, pieces, plan_of
from tpa_train.tpa.decode.reference import attend_reference
from tpa_train.tpa.decode.tuning import FEW, default_tiles
from tpa_train.tpa.decode.turning import turning
from tpa_train.tpa.decode.unpacking import in_words, load_piece
from tpa_train.tpa.decode.unpacking import order as order_of_columns
from tpa_train.tpa.decode.values import unit_of
from tpa_train.tpa.entries import Entry
from tpa_train.tpa.quantization import whole_words
from tpa_train.tpa.spec import LayerSpec

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about values that are not selected


def _errors(attention, lengths, capacity, dtype, rows=None, tiles=SMALL, splits=None):
    """Relative errors of the kernels and of the reference in ``dtype`` against the reference in float64."""
    queries, cached, _ = filled(attention, lengths, capacity, dtype, rows)
    exact = attend_reference(attention, queries.double(), moved(cached, "cpu", torch.float64))
    queries, cached, ours = queries.to(DEVICE), moved(cached, DEVICE), copy.deepcopy(attention).to(DEVICE, dtype)
    live = torch.tensor(lengths) > 0
    found = []
    for out in (attend_triton(ours, queries, cached, tiles, splits), attend_reference(ours, queries, cached)):
        assert out.dtype == dtype and out.isfinite().all()
        found.append(((out.cpu().double() - exact)[live].norm() / exact[live].norm()).item())
    return found


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_float32_over_a_split_context(form):
    """A full context whose last part has one token in it, and an idle row."""
    error, _ = _errors(layer(2, FORMS[form]), [17, 0], 17, F32, splits=2)
    assert error < 2e-6


HALF = (
    "dense 8+4, 3+16", "latent", "latent 6+16, 2+3", "joint", "joint 8+16, norms", "contextual", "constant A", "tucker",
    "dense, tucker",
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("form", HALF)
def test_half_precision_in_a_ring(form):
    """Wrapped in the middle of a tile, in rows of another order; as exact as the reference, which unpacks the cache."""
    dtype = F16 if form.startswith("dense") else BF16
    tiles = dataclasses.replace(SMALL, tokens=32)
    error, reference = _errors(layer(2, FORMS[form], local=True), [37, 1], 40, dtype, [2, 0], tiles, splits=1)
    assert error < 1.5 * reference < 2e-2


# Of two KV heads of 128 numbers: of one width, read in units of two bytes, of one, and of parts of one; widths that
# alternate; a group of each; latents, rebuilt or absorbed.
CODES = {
    "8": ("dense", 128, "dense", 128, 8),
    "4": ("dense", 128, "latent", 96, 4),
    "2": ("dense", 128, "dense", 128, 2),
    "6": ("dense", 128, "dense", 128, 6),
    "3": ("dense", 128, "dense", 128, 3),
    "mixed": ("dense", 128, "latent", 120, (2, 8, 2, 8), (4, 8, 4, 16)),
    "one of each": ("dense", 128, "latent", 128, 8, (3, 2, 6, 4)),
    "beside 16": ("dense", 128, "dense", 128, 16, 4),
    "under 16": ("dense", 128, "dense", 128, 4, 16),
    "latent": ("latent", 64, "latent", 128, 4),
    "joint": ("joint", 160, "joint", 160, (8, 4, 8, 4, 4)),
}


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("form", CODES)
def test_codes_are_multiplied_as_they_are_cached(form, heads):
    """One and three query heads a KV head; a context in several parts, one of them in a tile's middle."""
    attention = layer(2, LayerSpec(*CODES[form]), head_dim=128, num_heads=heads)
    tiles = dataclasses.replace(SMALL, tokens=32, largest=128, columns=64, absorbed=None if heads > 2 else False)
    for dtype in (F16, BF16) if form in ("4", "mixed") else (BF16,):
        error, reference = _errors(attention, [70, 33], 80, dtype, tiles=tiles, splits=2)
        assert error < 1.2 * reference < 2e-2
    queries, cached, _ = filled(attention, [70, 33], 80, BF16)
    last = prepare(attention, plan_of(attention, BF16, torch.device("cpu")), queries, cached, tiles, 1)[1][-1]
    assert (last.kernel is attend_packed) == (CODES[form][0] == "dense")
    shares = 16 // (4 if heads == 6 else 1)
    pieces_of = last.options["VALUE_PIECES"]
    units = [unit_of(pieces_of, i, last.options["VALUE_TYPE"], shares) for i in range(len(pieces_of) // 7)]
    read = {"8": [2], "4": [4], "2": [4], "6": [4], "3": [4], "mixed": [2, 1, 0, 0], "beside 16": [4]}
    read["one of each"] = [1, 1, 1, 1]
    assert units == read.get(form, units) and (form not in ("latent", "joint") or any(units))


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [3e-4, 1.0, 300.0])
def test_weights_of_codes_fit_into_float16(size, bits):
    """Scales from 1e-6 to 20, with probabilities from 1 down to e^−30."""
    attention = layer(1, LayerSpec("dense", 64, "dense", 64, 16, bits), head_dim=64)
    attention.values.proj.weight.mul_(size)
    attention.q_proj.weight.mul_(6.0)
    tiles = dataclasses.replace(SMALL, tokens=32, largest=64)
    error, reference = _errors(attention, [90], 96, F16, tiles=tiles, splits=1)
    assert error < 2 * reference < 4e-3


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_many_tokens_of_small_weight_count(bits):
    """One token with weight 1 and 1,023 with e^−12 each, of numbers that are about 0.7 apart in a group."""
    attention = layer(1, LayerSpec("dense", 64, "dense", 64, 16, bits), head_dim=64)
    queries, cached, _ = filled(attention, [1024], 1024, F16)
    keys, *rest = cached.stored
    keys.zero_()
    keys[:, 0] = queries[:, :1].sign().half() * (12 / (attention.config.scale * queries[0, 0].abs().sum())).half()
    values = torch.randn(1, 1024, 1, 64, generator=torch.Generator().manual_seed(1)) * 0.05 + torch.arange(64) / 64
    entry = attention.entries[-1]
    cached = dataclasses.replace(cached, stored=(keys, *entry.pack(values)))
    exact = attend_reference(attention, queries.double(), moved(cached, "cpu", torch.float64))
    tiles = dataclasses.replace(SMALL, tokens=128, largest=64)
    ours = copy.deepcopy(attention).to(DEVICE, F16)
    out = attend_triton(ours, queries.to(DEVICE), moved(cached, DEVICE), tiles, 1)
    errors = (out.cpu().double() - exact)[:, :1].abs() / exact[:, :1].abs().mean()
    assert errors.max() < 2e-3


@torch.no_grad()
@pytest.mark.parametrize("form", ["latent 6+16, 2+3", "constant B, contextual", "tucker, whole"])
@pytest.mark.parametrize("theta,fast", [(1e6, 0), (40.0, 0), (1e6, 16)])
def test_keys_that_are_never_built(form, theta, fast):
    """U absorbed into the queries, of which a KV head has three; one span or several; an offset of keys or none; for
    all pairs, or for the slowest four."""
    attention = layer(2, FORMS[form], num_heads=6, rope_theta=theta, rope_scaling_factor=1.0 if fast else 8.0)
    several = theta < 1e6
    lengths, capacity = [140 if several else 37, 5], 140
    if several:
        attention.keys.center.zero_()
    tiles = dataclasses.replace(SMALL, tokens=32, absorbed=True, fast=fast)
    queries, cached, _ = filled(attention, lengths, capacity, F32)
    plan = plan_of(attention, F32, torch.device("cpu"))
    *_, second, third, _ = prepare(attention, plan, queries, cached, tiles, 2)[1]
    assert third.kernel is attend_absorbed and second.options["CENTERED"] == several
    assert (third.options["S"] < 140) == several and third.options["FAST"] == fast
    error, _ = _errors(attention, lengths, capacity, F32, tiles=tiles, splits=2)
    assert error < 2e-6
    error, reference = _errors(attention, lengths, capacity, BF16, tiles=tiles, splits=2)
    assert error < 2 * reference < 3e-2


@torch.no_grad()
def test_fast_pairs_are_rebuilt_where_positions_are_not_scaled():
    """As in the 270M: chosen by cost; spans end within and with a context. The rebuilt path gives the same."""
    spec = LayerSpec("latent", 16, "latent", 16)
    attention = layer(1, spec, head_dim=128, rope_theta=1e4, rope_scaling_factor=1.0)
    tiles = dataclasses.replace(SMALL, tokens=32, columns=64, absorbed=None)
    found = plan_of(attention, F32, torch.device("cpu")).absorb(32)
    assert found.fast == 16 and found.span == 192
    lengths, capacity = [203, 192, 31], 210
    error, _ = _errors(attention, lengths, capacity, F32, tiles=tiles, splits=2)
    assert error < 2e-6
    error, reference = _errors(attention, lengths, capacity, F16, tiles=tiles, splits=1)
    assert error < 2 * reference < 3e-2
    assert plan_of(attention.to(F16), F16, torch.device("cpu")).absorb(32).fast == 16
    queries, cached, _ = filled(attention.double(), lengths, capacity, F32)
    args = (attention.to(DEVICE, F32), queries.to(DEVICE), moved(cached, DEVICE))
    rebuilt = attend_triton(*args, dataclasses.replace(tiles, absorbed=False))
    torch.testing.assert_close(attend_triton(*args, tiles), rebuilt, rtol=0, atol=1e-5)


@torch.no_grad()
def test_pieces_of_wide_latents_go_into_all_products_at_once():
    """Of packed ones, by default; what is left over is rebuilt."""
    spec = LayerSpec("joint", 224, "joint", 224, (8, 4, 3, 4, 2, 6, 4), cached_norm=True)
    attention = layer(1, spec, head_dim=256, num_heads=4, rope_theta=1e6, rope_scaling_factor=1.0)
    tiles = default_tiles(plan_of(attention, BF16, torch.device("cpu")), BF16, 10 * FEW)
    assert tiles.absorbed and tiles.fast == 32 and tiles.stages == 2
    error, reference = _errors(attention, [70, 33], 80, BF16, tiles=tiles, splits=1)
    assert error < 1.5 * reference < 3e-2


@torch.no_grad()
@pytest.mark.parametrize(
    "form,heads",
    [(("latent", 64, "contextual", 1, 8, 3), 4), (("latent", 64, "constant_a", 1, 8, 3), 4)]
    + [(("latent", 32, "latent", 32, 4), 18)],
)
def test_codes_of_other_values_beside_keys_that_are_never_built(form, heads):
    """Rows that KV heads share, and so many query heads that they fill a product; units are parts of bytes."""
    attention = layer(2, LayerSpec(*form), head_dim=128, num_heads=heads)
    tiles = dataclasses.replace(SMALL, tokens=32, largest=128, columns=64, absorbed=True, fast=0)
    error, reference = _errors(attention, [70, 33], 80, BF16, tiles=tiles, splits=2)
    assert error < 1.2 * reference < 3e-2


@torch.no_grad()
def test_keys_of_joint_latents_are_never_built_where_norms_are_cached():
    """As in the 270M: chosen by cost, which without cached norms it cannot be. The rebuilt path gives the same."""
    spec = LayerSpec("joint", 48, "joint", 48, (8, 4))
    changes = dict(head_dim=128, rope_theta=1e4, rope_scaling_factor=1.0)
    assert plan_of(layer(1, spec, **changes), F16, torch.device("cpu")).absorb(32) is None
    attention = layer(1, dataclasses.replace(spec, cached_norm=True), **changes)
    tiles = dataclasses.replace(SMALL, tokens=32, columns=64, absorbed=None)
    queries, cached, _ = filled(attention, [203, 31], 210, F32)
    args = (attention.to(DEVICE, F32), queries.to(DEVICE), moved(cached, DEVICE))
    plan = plan_of(args[0], F32, args[1].device)
    launches = prepare(args[0], plan, *args[1:], tiles)[1]
    assert plan.absorb(32).fast and attend_absorbed in [item.kernel for item in launches]
    found, expected = attend_triton(*args, tiles), attend_reference(*args)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    rebuilt = attend_triton(*args, dataclasses.replace(tiles, absorbed=False))
    torch.testing.assert_close(rebuilt, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_vectors_of_wide_latents_are_made_by_several_programs():
    attention = layer(2, LayerSpec("joint", 300, "joint", 300, cached_norm=True))
    tiles = dataclasses.replace(SMALL, tokens=32, largest=128, absorbed=True, fast=0)
    error, _ = _errors(attention, [37, 5], 40, F32, tiles=tiles, splits=1)
    assert error < 2e-6


def test_all_pairs_are_rebuilt_for_few_tokens():
    spec = LayerSpec("latent", 16, "latent", 16)
    plan = plan_of(layer(1, spec, head_dim=128, rope_theta=1e4, rope_scaling_factor=1.0), F16, torch.device("cpu"))
    assert plan.absorb(64).fast and default_tiles(plan, F16, FEW).absorbed is None
    assert default_tiles(plan, F16, FEW - 1).absorbed is False
    scaled = plan_of(layer(4, LayerSpec("latent", 32, "latent", 32)), F16, torch.device("cpu"))
    assert default_tiles(scaled, F16, 1).absorbed is None or scaled.absorb(64) is None


@torch.no_grad()
def test_latents_of_several_heads_are_read_as_one_row(monkeypatch):
    """And U is absorbed into four queries at a time, as where there are programs enough."""
    monkeypatch.setattr(launch, "_processors", lambda device: 1)
    attention = layer(4, LayerSpec("latent", 32, "latent", 32, 16, 8))
    tiles = dataclasses.replace(SMALL, tokens=32, largest=64, absorbed=True, joined=2)
    queries, cached, _ = filled(attention, [37, 20], 40, F32)
    plan = plan_of(attention, F32, torch.device("cpu"))
    launches = prepare(attention, plan, queries, cached, tiles, 2)[1]
    assert launches[1].options["HEADS"] == 4 and launches[2].grid == (2, 2, 2)
    assert launches[2].options["JOINED"] == 2 and not plan.joins(8)
    assert _errors(attention, [37, 20], 40, F32, [1, 0], tiles, splits=2)[0] < 2e-6
    error, reference = _errors(attention, [37, 20], 40, BF16, tiles=tiles, splits=1)
    assert error < 2 * reference < 3e-2


@pytest.mark.parametrize(
    "spec,changes",
    [
        (LayerSpec("latent", 35, "latent", 32), {}),  # does not fill its blocks
        (LayerSpec("latent", 32, "latent", 24, 8), {}),  # nor groups
        (LayerSpec("latent", 64, "latent", 32, (8, 4), 8), {}),  # of two widths
        (LayerSpec("tucker", 32, "tucker", 32, heads_k=2, heads_v=2), {}),  # mixed for every head, with norms
        (LayerSpec("latent", 32, "contextual", 1), {}),  # no rows of KV heads
        (LayerSpec("latent", 32, "latent", 32), {"num_heads": 12}),  # three query heads a KV head
    ],
)
def test_latents_that_are_no_row_of_several_heads(spec, changes):
    attention = layer(4, spec, **({"head_dim": 64} | changes)).float()
    assert not plan_of(attention, F32, torch.device("cpu")).joins(2)


@torch.no_grad()
def test_a_batch_in_parts_whose_vectors_fit_memory(monkeypatch):
    attention = layer(2, FORMS["latent"])
    queries, cached, _ = filled(attention, [18, 7, 1], 20, F32, rows=[2, 0, 1])
    tiles = dataclasses.replace(SMALL, absorbed=True, fast=16)
    attention, queries, cached = attention.to(DEVICE, F32), queries.to(DEVICE), moved(cached, DEVICE)
    whole = attend_triton(attention, queries, cached, tiles)
    monkeypatch.setattr(launch, "GROUP_BYTES", 12000)  # of two sequences
    calls = []
    monkeypatch.setattr(launch, "prepare", lambda *args: calls.append(len(args[2])) or prepare(*args))
    assert torch.equal(attend_triton(attention, queries, cached, tiles), whole)
    assert calls == [2, 1]


@pytest.mark.parametrize("size,shape", [("4b", (256, 16, 0)), ("27b", (256, 16, 0)), ("270m", (256, 8, 32))])
def test_what_terms_a_span_takes(size, shape):
    """Scaled positions turn slowly enough; of unscaled ones, a quarter of the pairs does not."""
    config = SIZES[size]
    angles = tuple(t.squeeze(1) for t in rotary_table(config, "global", torch.arange(512)))
    heads, rank = config.num_heads // config.num_kv_heads, config.head_dim // 4
    found = turning(angles, 64, heads, rank, BF16)
    assert (found.span, found.terms, found.fast) == shape
    found = turning(angles, 64, heads, rank, F32, always=True)
    for bends, exact in zip(found.bends, angles, strict=True):
        error = found.basis @ bends - exact[: found.span]
        assert error[:, found.fast :].abs().max() < 4e-7 and not bends[:, : found.fast].any()
    for fast in (0, 16):  # too many terms
        assert (turning(angles, 64, heads, rank, F32, fast=fast) is None) == (size == "270m")


def test_keys_of_fast_turning_pairs_are_rebuilt():
    config = SIZES["270m"]
    angles = tuple(t.squeeze(1) for t in rotary_table(config, "local", torch.arange(512)))
    assert turning(angles, 16, 4, 256, F32) is None


@torch.no_grad()
@pytest.mark.parametrize(
    "spec,groups,changes",
    [
        (LayerSpec("contextual", 1, "contextual", 1), 1, {}),
        (LayerSpec("latent", 8, "latent", 8), 1, {"head_dim": 8, "num_heads": 16}),
        (LayerSpec("constant_a", 5, "constant_a", 6), 8, {"head_dim": 8, "num_heads": 24}),
        (LayerSpec("tucker", 8, "dense", 8, heads_k=2, form_o="tucker", rank_o=4), 4, {"head_dim": 8}),
    ],
)
def test_other_numbers_of_heads(spec, groups, changes):
    error, _ = _errors(layer(groups, spec, **changes), [20, 3], 20, F32, splits=2)
    assert error < 2e-6


@torch.no_grad()
def test_factors_that_are_not_resident():
    tiles = dataclasses.replace(SMALL, resident=0, columns=32)
    assert _errors(layer(2, FORMS["joint"]), [18], 18, F32, tiles=tiles, splits=1)[0] < 2e-6


@torch.no_grad()
def test_a_view_of_the_first_slots():
    """As a caller gives that knows the longest sequence; the grid stays that of the whole buffers."""
    attention = layer(1, FORMS["latent"])
    queries, cached, _ = filled(attention, [5, 18], 40, F32)
    attention, queries, cached = attention.to(DEVICE, F32), queries.to(DEVICE), moved(cached, DEVICE)
    view = dataclasses.replace(cached, stored=tuple(t[:, :18] for t in cached.stored))
    assert obstacle(queries, view) is None
    plan = plan_of(attention, F32, queries.device)
    grids = [[x.grid for x in prepare(attention, plan, queries, c, SMALL)[1]] for c in (cached, view)]
    assert grids[0] == grids[1] and grids[0][0] == (1, 3, 2)
    out = attend_triton(attention, queries, view, SMALL)
    torch.testing.assert_close(out, attend_reference(attention, queries, cached), rtol=0, atol=1e-5)


@torch.no_grad()
def test_constants_follow_the_parameters():
    attention = layer(1, LayerSpec("latent", 9, "latent", 9)).float()
    plan = plan_of(attention, F32, torch.device("cpu"))
    assert plan_of(attention, F32, torch.device("cpu")) is plan
    attention.keys.up.mul_(2)
    changed = plan_of(attention, F32, torch.device("cpu"))
    assert torch.equal(changed.up, 2 * plan.up)
    attention.keys.center = torch.nn.Parameter(attention.keys.center + 1)
    assert not torch.equal(plan_of(attention, F32, torch.device("cpu")).offset, changed.offset)


@pytest.mark.parametrize(
    "count,bits",
    [(49, 16), (8, 16), (256, 4), (160, (8, 4, 4, 3, 16)), (33, 2), (96, 6), (190, (2, 16, 4, 2, 16, 2))],
)
@pytest.mark.parametrize("largest", [32, 128])
def test_pieces_cover_an_entry_once(count, bits, largest):
    entry = Entry(2, count, bits)
    found = pieces(entry, 3, largest)
    found_columns = []
    for i in range(0, len(found), 7):
        tensor, width, size, first, block, _, padded = piece = found[i : i + 7]
        assert block & (block - 1) == 0 and block <= largest and padded % 16 == 0 and first % 16 == 0
        assert width == 16 or first % 32 == block % 32 == 0
        own = [n for part in columns_of(piece) for n in range(part.start, part.stop)]
        assert len(own) == min(block, size - first)
        assert {entry.widths[n // 32] for n in own} == {width}
        found_columns += own
    assert sorted(found_columns) == list(range(count))
    assert found_columns == list(range(count)) or len(set(entry.widths)) > 1
    for segment in entry.segments:
        if segment.bits < 16:  # said twice: for the host, and for the kernels
            assert in_words(segment.bits, segment.count) == whole_words(segment.count, segment.bits)


@triton.jit
def _unpack(
    out, at, stored, tokens, T: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, T)
    for start in tl.static_range(0, COUNT, BLOCK):
        x = load_piece(stored, 0, slot, slot < tokens, 1, 2, 0, BITS, COUNT, start, BLOCK, TYPE)
        n = start + order_of_columns(BITS, BLOCK)
        keep = (slot < tokens)[:, None] & (n < COUNT)[None, :]
        tl.store(out + slot[:, None] * COUNT + n[None, :], x, mask=keep)
    tl.store(at + tl.arange(0, BLOCK), order_of_columns(BITS, BLOCK))


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("count", [96, 70, 40])  # rows that are words, bytes, and words up to some group's middle
@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_packed_numbers_are_what_the_cache_stores(bits, count, dtype):
    entry = Entry(2, count, bits)
    x = torch.randn(5, 2, count, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    stored = entry.pack(x)
    out, at = torch.zeros(5, count, dtype=dtype, device=DEVICE), torch.zeros(64, dtype=torch.int32, device=DEVICE)
    words = tuple(launch._words(t[None].to(DEVICE).contiguous()) for t in stored)
    assert words[0].dtype == (torch.uint8 if count * bits % 32 else torch.int32)
    _unpack[(1,)](out, at, words, 5, T=16, BITS=bits, COUNT=count, BLOCK=64, TYPE=launch.DTYPES[dtype])
    expected = entry.unpack(stored, F32)[:, 1]
    rounding = 0.0 if dtype == F32 else 2.0**-11  # once
    torch.testing.assert_close(out.cpu().float(), expected, rtol=rounding, atol=4e-6)
    assert torch.equal(at.cpu().long(), order(64, torch.device("cpu")))


@torch.no_grad()
def test_the_door_leads_to_the_kernels(monkeypatch):
    attention = layer(1, FORMS["contextual"], head_dim=8).to(DEVICE, F32)
    queries, cached, _ = filled(attention.cpu().double(), [9], 9, F32)
    attention, queries, cached = attention.to(DEVICE, F32), queries.to(DEVICE), moved(cached, DEVICE)
    monkeypatch.setenv("TPA_DECODE", "triton")
    out = attend_cached(attention, queries, cached)
    torch.testing.assert_close(out, attend_cached(attention, queries, cached, "reference"), rtol=0, atol=1e-5)


def test_kernels_compile_for_an_h100():
    """Every kernel at real sizes, without a GPU: they fit a processor and use its matrix units."""
    script, root = Path(__file__).parent / "compile_decode.py", Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    cases = ["latent-contextual-4b-3bit", *(large := ("contextual-4b-1", "constant_a-latent-4b"))]
    cases += ["latent-270m-64-ring", "latent-4b-64", "latent-270m-96-4bit", "joint-270m-128-norms"]
    chained = ["latent-4b-64:dependent=1", "joint-270m-128-norms:dependent=1"]
    command = [sys.executable, str(script), *cases, *chained, "dense-270m-4bit", "dense-270m-mixed"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    absorbing = ["lay_out_queries", "absorb", "attend_absorbed"]
    expected = [*absorbing, *2 * ["attend_direct"], "attend_rebuilt", *3 * absorbing, *2 * [*absorbing, "combine"]]
    expected += 2 * ["attend_packed"]
    assert [f["kernel"] for f in found] == expected
    for f in found:
        small = f["kernel"] in ("lay_out_queries", "combine")
        # Two programs share a processor, but of rows that heads share it holds one.
        assert f["spilled"] <= 256 and f["shared_kb"] <= (227 if f["case"] in large else 113)
        assert (f["wgmma"] > 0 or small) and not f["apart"] and not f["repeated"]
        # What the step's kernels write for each other is read when they have ended; its first one waits for none.
        if f["kernel"] in ("attend_direct", "attend_packed", "attend_rebuilt", "lay_out_queries"):
            assert f["early"] is None
        else:
            assert "lengths" in f["early"]
            assert not {"both", "along", "turned", "w", "bias", "partial", "lse"} & set(f["early"])
    # Codes go from memory into the products, those of less than a byte too; weights alone change hands, [16, 64].
    assert [f["staged"] for f in found[-2:]] == [16 * 64] * 2


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@torch.no_grad()
@pytest.mark.parametrize(
    "form,changes",
    [(form, {}) for form in ("dense", "joint", "joint 8+16, norms", "contextual", "latent")]
    + [("latent", {"head_dim": 128, "rope_theta": 1e4, "rope_scaling_factor": 1.0})],
)
def test_a_captured_step_follows_the_lengths(form, changes, monkeypatch):
    monkeypatch.setenv("TPA_DECODE_TUNE", "1")
    attention = layer(2, FORMS[form], **changes)
    queries, cached, _ = filled(attention, [300, 40], 300, BF16)
    queries, cached, ours = queries.to(DEVICE), moved(cached, DEVICE), copy.deepcopy(attention).to(DEVICE, BF16)
    exactly = copy.deepcopy(ours).double()
    attend_triton(ours, queries, cached)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend_triton(ours, queries, cached)
    for lengths in ([300, 40], [1, 299], [128, 0]):
        cached.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        live = torch.tensor(lengths) > 0
        expected = attend_reference(ours, queries, cached)[live].double()
        exact = attend_reference(exactly, queries.double(), moved(cached, DEVICE, torch.float64))[live]
        assert (out[live] - exact).norm() < 1.5 * (expected - exact).norm() < 3e-2 * exact.norm()
