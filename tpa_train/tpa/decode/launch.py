"""Launches the decoding kernels: what they support, how the context is split, and which tile suits a shape.

Grid and splits depend on shapes alone, so a step can be captured in a CUDA graph whose lengths change between replays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpa_train.gemma3.attention import Attention
from tpa_train.tpa.decode import absorbed, chain, kernel, packed, rebuilt
from tpa_train.tpa.decode import combine as joining
from tpa_train.tpa.decode.cached import CachedTokens
from tpa_train.tpa.decode.plan import (
    LEAST,
    LONGEST,
    OWN,
    TOGETHER,
    AbsorbedKeys,
    Plan,
    Rows,
    operand_type,
    pieces,
    plan_of,
    power_of_two,
)
from tpa_train.tpa.decode.precompile import gather
from tpa_train.tpa.decode.reference import GROUP_BYTES
from tpa_train.tpa.decode.tiles import Tiles
from tpa_train.tpa.decode.tuning import chosen, key_of
from tpa_train.tpa.entries import Entry
from tpa_train.tpa.quantization import GROUP

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
PROCESSORS = 132  # of an H100; where there is no device to ask
MADE_AT_ONCE = 256  # numbers of a latent that one program makes vectors of: their sums fill its registers
LARGEST_OFFSET = 2**31 - 1  # numbers of one sequence in one buffer: offsets in it are 32-bit


def obstacle(queries: Tensor, cached: CachedTokens) -> str | None:
    """Returns why the kernels cannot serve this call, in a few words; None where they can."""
    if queries.dtype not in DTYPES:
        return f"queries are {queries.dtype}"
    if not queries.is_cuda and not triton.knobs.runtime.interpret:
        return f"queries are on {queries.device.type}"
    if torch.is_grad_enabled() and queries.requires_grad:
        return "queries need a gradient"
    for stored in cached.stored:
        if not stored[0].is_contiguous() or _pitch(stored) != _pitch(cached.stored[0]):
            return "a buffer is not contiguous"
        if stored[0].numel() > LARGEST_OFFSET:
            return "a sequence's buffer has more than 2³¹ numbers"
        if stored.dtype == torch.float64:
            return "the cache is float64"
    return None


def attend_triton(
    attention: Attention, queries: Tensor, cached: CachedTokens, tiles: Tiles | None = None, splits: int | None = None
) -> Tensor:
    """See ``decode.attend_cached``: [B, H, d] -> [B, H, e]. ``tiles`` and ``splits`` override what is chosen."""
    plan = plan_of(attention, queries.dtype, queries.device)
    tiles = tiles or _chosen(attention, plan, queries, cached)
    if found := _absorbed_keys(plan, tiles):
        # W and the turned queries are in memory for all sequences of a launch.
        numbers = _steps(cached, found.span) * found.terms * plan.up.shape[-1]
        numbers += _steps(cached, tiles.tokens) * 2 * found.fast
        size = max(1, GROUP_BYTES // (queries.shape[1] * numbers * queries.itemsize))
        if size < len(queries):
            starts = range(0, len(queries), size)
            return torch.cat([
                attend_triton(attention, queries[i : i + size], cached.part(i, size), tiles, splits) for i in starts
            ])  # fmt: skip
    out, launches = prepare(attention, plan, queries, cached, tiles, splits)
    if not gather(launches):
        _run(out, launches)
    if plan.expand is None:
        return out
    # The values of a joint latent, once a step instead of once a token.
    latents = out.unflatten(1, (attention.config.num_kv_heads, -1))
    return torch.einsum("bgnr,gdr->bgnd", latents, plan.expand).flatten(1, 2)


def _chosen(attention: Attention, plan: Plan, queries: Tensor, cached: CachedTokens) -> Tiles:
    def key() -> tuple:
        return key_of(
            plan, len(queries), _pitch(cached.stored[0]), attention.config.num_heads, queries.dtype, queries.device
        )

    def run(tiles: Tiles) -> list[Callable[[], Tensor]]:
        full = replace(cached, lengths=torch.full_like(cached.lengths, cached.slots))
        calls = [prepare(attention, plan, queries, tokens, tiles) for tokens in (cached, full)]
        return [functools.partial(_run, *call) for call in calls]

    return chosen(plan, key, queries.dtype, queries.device, run, len(queries) * _pitch(cached.stored[0]))


def _run(out: Tensor, launches: list[Launch]) -> Tensor:
    for launch in launches:
        launch.run()
    return out


@dataclass(frozen=True)
class Launch:
    """A kernel's grid, arguments and constants (by name, with its warps and stages)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)


def prepare(
    attention: Attention, plan: Plan, queries: Tensor, cached: CachedTokens, tiles: Tiles, splits: int | None = None
) -> tuple[Tensor, list[Launch]]:
    """Returns the result [B, H, e or, of a joint latent, r] to be, and the launches that fill it."""
    config, dtype = attention.config, queries.dtype
    groups, heads, d = config.num_kv_heads, config.num_heads, config.head_dim
    batch, half = len(queries), max(LEAST, power_of_two(d // 2))
    queries = queries.contiguous()
    found, joined = _absorbed_keys(plan, tiles), 1
    if found is not None and not found.fast and tiles.joined > 1 and plan.joins(tiles.joined):
        joined = tiles.joined
    groups //= joined
    repeats, grid = heads // groups, groups // plan.per_program
    pitch = _pitch(cached.stored[0])  # the shape that decides: a view of the first slots only may grow with each step
    if splits is None:
        splits = tiles.splits(grid * batch, pitch, _processors(queries.device))
    width = plan.values.entry.count
    keys, values = (_joined(rows, joined) for rows in (plan.keys, plan.values))
    out = queries.new_empty(batch, heads, width)
    partial, lse = out, out  # not touched where there is one split
    if splits > 1:
        partial = queries.new_empty(batch, heads, splits, width, dtype=torch.float32)
        lse = queries.new_empty(batch, heads, splits, dtype=torch.float32)
    stored = tuple(_words(t) for t in cached.stored)
    key_pieces = pieces(keys.entry, keys.first, tiles.largest)
    rows = max(LEAST, power_of_two(plan.per_program * repeats))
    own = power_of_two(repeats)  # query heads of a KV head, padded
    shares = 0
    if values.mode == OWN and not values.entry.exact and dtype != torch.float32 and own < LEAST:
        shares = rows // own
    nothing = cached.rotary[0]  # float32, not read
    key_type, value_type = operand_type(keys.entry, dtype), operand_type(values.entry, dtype)
    options: dict[str, Any] = {
        "d": d, "E": width, "GROUPS": groups, "REPEATS": repeats,
        "KEY_MODE": keys.mode, "KEY_ROWS": keys.entry.rows, "KEY_PIECES": key_pieces, "NORM": plan.norm,
        "VALUE_MODE": values.mode, "VALUE_ROWS": values.entry.rows, "VALUE_TENSOR": values.tensor,
        "VALUE_PIECES": pieces(values.entry, values.first, tiles.largest, shares),
        "HAS_ROWS": cached.rows is not None, "RING": pitch < cached.rotary[0].shape[0], "SPLIT": splits > 1,
        "T": tiles.tokens, "BH": rows, "DTYPE": DTYPES[dtype],
        "KEY_TYPE": DTYPES[key_type], "VALUE_TYPE": DTYPES[value_type],
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    arguments = (
        queries, out, partial, lse, cached.lengths, cached.lengths if cached.rows is None else cached.rows, stored,
        nothing if keys.weights is None else keys.weights,
        nothing if values.weights is None else values.weights, nothing if plan.places is None else plan.places,
    )  # fmt: skip
    rounded = not (keys.entry.exact and values.entry.exact)
    if rounded and tiles.tokens < 32 and dtype != torch.float32:
        raise ValueError(f"tiles of {tiles.tokens} tokens: packed numbers need 32 in {dtype} (see Tiles)")
    scale = config.scale * math.log2(math.e)
    launches: list[Launch] = []
    if found is not None:
        up = plan.lay_out(pieces(plan.keys.entry, keys.first, tiles.largest), half, key_type)
        launches, vectors, shape = _absorb(plan, found, queries, cached, up, tiles)
        options = {k: v for k, v in options.items() if k not in ("d", "RING")} | shape
        # A table of more pairs fills the registers, and so does one beside what unpacking needs, of a wide latent above
        # all.
        kept = found.fast <= 32 and not (rounded and (tiles.registers is not None or plan.up.shape[-1] > TOGETHER))
        options |= {"JOINED": joined, "RH": joined * plan.heads, "KEPT": kept}
        steps = _steps(cached, found.span), _steps(cached, tiles.tokens)
        arguments = (*arguments[1:], *vectors, cached.slots, pitch, splits, scale, *steps)
        attend = absorbed.attend_absorbed
    elif plan.rebuilt:
        up = plan.lay_out(key_pieces, half, key_type)
        arguments += (up, plan.offset, nothing if plan.gamma is None else plan.gamma, plan.relative, *cached.rotary)
        options |= {
            "OWN_UP": up.shape[0] > 1, "HAS_RMS": plan.gamma is not None, "WIDTH": up.shape[2], "LONGEST": LONGEST,
            "RESIDENT": up[0].nbytes <= tiles.resident << 10, "HB": half, "HC": min(half, tiles.columns),
            "SHARES": shares,
        }  # fmt: skip
        arguments, attend = (*arguments, cached.slots, pitch, splits, scale, plan.eps), rebuilt.attend_rebuilt
    elif rounded and dtype != torch.float32 and own < LEAST and keys.mode == values.mode == OWN:
        names = ("KEY_MODE", "KEY_TENSOR", "NORM", "VALUE_MODE", "VALUE_TENSOR")
        options = {k: v for k, v in options.items() if k not in names} | {"RH": own}
        options["KEY_PIECES"] = pieces(keys.entry, keys.first, min(tiles.largest, GROUP * (rows // own)))
        arguments, attend = (*arguments[:7], arguments[9], cached.slots, pitch, splits, scale), packed.attend_packed
    else:
        options |= {"KEY_TENSOR": keys.tensor, "PER_PROGRAM": plan.per_program}
        arguments, attend = (*arguments, cached.slots, pitch, splits, scale), kernel.attend_direct
    launches.append(Launch(attend, (grid, splits, batch), arguments, options))
    if splits > 1:
        parts = min(128, power_of_two(splits))  # at a time: what one thread waits for, all others load meanwhile
        columns = min(4096 // parts, 64, power_of_two(width))
        options = {
            "HEADS": heads, "E": width, "T": tiles.tokens, "BS": parts, "BE": columns, "DTYPE": DTYPES[dtype],
            "num_warps": 4,
        }  # fmt: skip
        arguments = (partial, lse, out, cached.lengths, cached.slots, splits)
        launches.append(Launch(joining.combine, (triton.cdiv(width, columns), batch * heads), arguments, options))
    return out, _chained(launches, chain.overlaps(tiles.dependent, queries.device))


def _chained(launches: list[Launch], overlap: bool) -> list[Launch]:
    """Returns the launches of a step, all but the first of which may begin before the one before has ended."""
    overlap = overlap and len(launches) > 1
    found = []
    for number, item in enumerate(launches):
        early = {"launch_pdl": True} if overlap and number else {}
        fused = {"enable_fp_fusion": True}  # said, since the default is another in Triton 3.10
        found.append(replace(item, options=item.options | {"DEPENDENT": overlap} | fused | early))
    return found


def _pitch(stored: Tensor) -> int:
    """Returns the tokens from one row of a buffer to the next: more than its slots where it is a view of the first."""
    return stored.stride(0) // stored[0, 0].numel()


def _joined(rows: Rows, count: int) -> Rows:
    """Returns the rows of KV heads as so many times fewer that are as many times longer; see ``Plan.joins``."""
    if count == 1:
        return rows
    entry = rows.entry
    return replace(rows, entry=Entry(entry.rows // count, entry.count * count, entry.segments[0].bits))


def _absorbed_keys(plan: Plan, tiles: Tiles) -> AbsorbedKeys | None:
    """Returns how U goes into the queries, None where it does not."""
    if not plan.rebuilt or tiles.absorbed is False:
        return None
    return plan.absorb(tiles.tokens, tiles.absorbed is True, tiles.fast)


def _steps(cached: CachedTokens, size: int) -> int:
    """Returns how many times ``size`` tokens hold every position that there may be."""
    return triton.cdiv(cached.rotary[0].shape[0], size)


def _absorb(
    plan: Plan, found: AbsorbedKeys, queries: Tensor, cached: CachedTokens, up: Tensor, tiles: Tiles
) -> tuple[list[Launch], tuple[Tensor, ...], dict[str, Any]]:
    """Returns what makes the vectors of all spans and the turned queries of all tiles; what ``attend_absorbed`` reads
    beside the cache; and its further options.

    ``up``: U as ``Plan.lay_out`` gives it, [G or 1, 2, R, HB].
    """
    (batch, heads, d), (owners, _, rank, half), fast = queries.shape, up.shape, found.fast
    groups, across, spans, steps = (
        len(plan.offset), power_of_two(rank), _steps(cached, found.span), _steps(cached, tiles.tokens)
    )  # fmt: skip
    both, along = queries.new_empty(batch, heads, 2, half, rank), queries.new_empty(batch, heads, 2, half)
    w = queries.new_empty(batch, heads, spans, found.terms, rank, dtype=up.dtype)
    bias = queries.new_empty(batch, heads, spans, found.terms, dtype=torch.float32)
    turned = queries.new_empty(batch, heads, steps, fast, 2) if fast else queries  # not touched where there are none
    shared = {"R": rank, "FAST": fast, "HB": half}
    vectors = {"J": found.terms, "S": found.span, "CENTERED": plan.centered} | shared
    dtype, at_once, rest = {"DTYPE": DTYPES[queries.dtype]}, 64, half - fast
    rows, each = triton.cdiv(spans * found.terms, 128), 1
    # Several heads share what they all read, where enough programs are left.
    while 2 * each * across <= 128 and heads % (2 * each) == 0:
        if rows * heads * batch < 4 * each * _processors(queries.device):
            break
        each *= 2
    parts = triton.cdiv(across, MADE_AT_ONCE)  # of a wide latent, each in a program of its own
    blocks = rest // LEAST + (triton.cdiv(steps, at_once) if fast else 0)
    launches = [
        Launch(
            absorbed.lay_out_queries, (blocks, heads, batch),
            (queries, both, along, up, plan.offset, turned, *cached.rotary, cached.lengths, steps),
            {
                "d": d, "GROUPS": groups, "REPEATS": heads // groups, "OWN_UP": owners > 1, "T": tiles.tokens,
                "BK": LEAST, "BR": 64, "BT": at_once, **shared, **dtype,
            },
        ),
        Launch(
            absorbed.absorb, (rows, heads // each * parts, batch),
            (both, along, found.turns(cached.rotary, spans, queries.dtype), w, bias, cached.lengths, spans),
            {
                "HEADS": each, "BLOCKS": parts, "BM": 128, "BN": each * across // parts, "BK": min(64, rest & -rest),
                "num_warps": 4 if each * across <= 64 else 8, "num_stages": 3,
                "KEY_TYPE": DTYPES[up.dtype], **vectors, **dtype,
            },
        ),
    ]  # fmt: skip
    return launches, (w, bias, found.basis, turned, up, plan.offset, found.table), vectors | {"OWN_UP": owners > 1}


def _words(stored: Tensor) -> Tensor:
    """Returns (scale, minimum) pairs, and codes whose rows are whole words, as int32; other buffers as they are.

    Pairs have a dimension more than codes and numbers.
    """
    whole = stored.dim() == 5 or (stored.dtype == torch.uint8 and stored.shape[-1] % 4 == 0)
    return stored.view(torch.int32) if whole else stored


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS
