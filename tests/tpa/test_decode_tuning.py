"""Which tiles are chosen: see ``decode.tuning``. A timer stands in for the GPU's."""

import pytest
import torch
import triton
from decode_cases import FORMS, filled, layer, moved
from decode_kernels import BF16, CUDA, DEVICE, F32, bounds_of_loops, kernels_stay_inside_their_buffers  # noqa: F401

from tpa_train.gemma3.config import SIZES
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.decode import launch, precompile, tuning
from tpa_train.tpa.decode.plan import plan_of
from tpa_train.tpa.decode.tiles import Tiles
from tpa_train.tpa.spec import LayerSpec

DEFAULT, FAST, WRONG, LOST, LARGE = (Tiles(programs=n) for n in range(1, 6))
TIMES = {DEFAULT: 3.0, FAST: 2.0, WRONG: 1.0, LOST: 0.5, LARGE: 0.1}


@pytest.fixture
def timed(monkeypatch):
    """Takes the time of tiles from TIMES; returns the tiles that were timed."""
    seen = []
    monkeypatch.setattr(tuning, "_replay", lambda work: work)
    monkeypatch.setattr(triton.testing, "do_bench", lambda work, **_: seen.append(work()) or TIMES[seen[-1]])
    return seen


def _run(tiles: Tiles) -> list:
    if tiles is LARGE:
        raise triton.runtime.errors.OutOfResources(300, 227, "shared memory")
    error = {WRONG: 0.1, LOST: float("nan")}.get(tiles, 0.001 * (tiles is FAST))
    return [lambda: torch.ones(4, dtype=BF16) * (1 + error), lambda: tiles]


def test_the_fastest_of_those_that_are_right_wins(timed):
    assert tuning.fastest([DEFAULT, FAST, WRONG, LOST, LARGE], _run) is FAST
    assert timed == [DEFAULT, FAST]
    assert tuning.fastest([LARGE, DEFAULT], _run) is DEFAULT and tuning.fastest([LARGE], _run) is LARGE


@torch.no_grad()
@pytest.mark.parametrize("form", ["latent", "contextual", "joint 8+6+4"])
def test_a_call_is_tuned_once(form, monkeypatch):
    """What is compared is of the tokens that are cached: beyond them buffers hold anything. What is timed is full."""
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setattr(tuning, "tuned", {})
    found = []

    def fastest(options, run):
        call, full = run(options[0])
        found.append((options, call(), full))
        return options[-1]

    monkeypatch.setattr(tuning, "fastest", fastest)
    monkeypatch.setattr(tuning, "trusted", lambda device: True)
    if not CUDA:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    attention = layer(2, FORMS[form])
    queries, cached, _ = filled(attention, [18, 7], 20, F32)
    attention, queries, cached = attention.to(DEVICE, F32), queries.to(DEVICE, F32), moved(cached, DEVICE)
    for stored in cached.stored:
        if stored.is_floating_point():
            stored[1, 12:] = torch.nan
    plan = plan_of(attention, F32, queries.device)
    with precompile.gathering():  # whose results are not those of a step
        assert launch._chosen(attention, plan, queries, cached) == tuning.default_tiles(plan, F32) and not found
    first = launch._chosen(attention, plan, queries, cached)
    assert launch._chosen(attention, plan, queries, cached) is first and len(found) == 1
    options, out, full = found[0]
    assert first is options[-1] and out.isfinite().all()
    tensors = [t for item in full.args[1] for t in item.arguments if isinstance(t, torch.Tensor)]
    lengths = [t.tolist() for t in tensors if t.dtype == torch.int32 and t.shape == (2,)]
    assert lengths and all(held == [cached.slots] * 2 for held in lengths)


def test_tiles_of_packed_numbers_have_32_tokens_in_half_precision():
    for form in ("joint 8+6+4", "contextual, R = 5", "contextual"):
        attention = layer(2, FORMS[form]).to(BF16)
        plan = plan_of(attention, BF16, torch.device("cpu"))
        least = min(tiles.tokens for tiles in tuning.candidates(plan, BF16))
        assert least == (16 if plan.keys.entry.exact and plan.values.entry.exact else 32)


@pytest.mark.parametrize(
    "size,spec,tokens,stages",
    [
        ("1b", ("joint", 352, "joint", 352, 8), 64, 2), ("1b", ("latent", 384, "latent", 384, 16, 8), 64, 1),
        ("4b", ("contextual", 1, "contextual", 1), 64, 3), ("4b", ("constant_a", 2, "latent", 64), 64, 2),
        ("4b", ("contextual", 3, "contextual", 1), 32, 2), ("27b", ("constant_a", 3, "contextual", 2), 64, 2),
    ],
)  # fmt: skip
def test_tiles_fit_a_processor(size, spec, tokens, stages):
    """An H100's; all but the third need smaller ones, or fewer of them, than others of their kind."""
    form = LayerSpec(*spec, cached_norm=spec[0] == "joint")
    plan = plan_of(FactorizedAttention(SIZES[size], 5, form).to(BF16), BF16, torch.device("cpu"))
    tiles = tuning.default_tiles(plan, BF16)
    assert (tiles.tokens, tiles.stages) == (tokens, stages)
    assert tiles.absorbed if plan.rebuilt else tiles.absorbed is None


@pytest.mark.parametrize(
    "size,ranks,tokens,joined",
    [("27b", (32, 32), 1, 2), ("12b", (64, 64), 1, 2), ("4b", (64, 64), 1, 1), ("4b", (64, 64), 1 << 18, 2),
     ("4b", (128, 128), None, 2), ("4b", (64, 160), None, 1)],
)  # fmt: skip
def test_narrow_latents_of_two_heads_are_one_row(size, ranks, tokens, joined):
    form = LayerSpec("latent", ranks[0], "latent", ranks[1])
    plan = plan_of(FactorizedAttention(SIZES[size], 5, form).to(BF16), BF16, torch.device("cpu"))
    assert tuning.default_tiles(plan, BF16, tokens).joined == joined
