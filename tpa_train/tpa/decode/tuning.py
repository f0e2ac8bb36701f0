"""Which tiles a shape runs with: a rule, or the fastest of a few that were measured when the shape was first seen.

``TPA_DECODE_TUNE=1`` turns measuring on. It waits for the GPU, so it never happens while a CUDA graph is captured: run
a step before. What was found is kept for the process; ``tuned`` shows it. Nothing is measured where Triton's assembler
is known to err (``assembler``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import triton
from torch import Tensor

from tpa_train.tpa.decode.assembler import trusted
from tpa_train.tpa.decode.plan import CACHED, LEAST, OWN, TOGETHER, UNROLLED, Plan, pieces, power_of_two
from tpa_train.tpa.decode.precompile import gathers
from tpa_train.tpa.decode.tiles import Tiles
from tpa_train.tpa.decode.turning import MOST
from tpa_train.tpa.entries import Entry
from tpa_train.tpa.quantization import GROUP

VARIABLE = "TPA_DECODE_TUNE"
SHARED = 160  # KiB of a processor that U and what is loaded ahead may take: 227 less what products are laid out in
THREE, TWO = 56, 48  # the same where only the fastest pairs of keys are rebuilt, for so many programs a processor
JOINT = 64  # as ``TWO``, of joint latents
PACKED = 32  # fast pairs that are rebuilt beside packed numbers: more take registers that unpacking needs
# 1,024 of what ``_packed_tiles`` counts up to which two programs share a processor, with three stages and with two; a
# joint latent has more beside it
FULL, JOINT_FULL = (51, 74), (45, 58)
ROWS = 72, 108  # KiB that each of three and of two programs of packed rows may take
# Numbers of a block of packed rows; 32 numbers of values, pieces of keys, and 64 numbers of the largest of these, all
# together, up to which a thread does with 168 registers.
LARGEST, CROWDED = 128, 13
FEWER = 128  # numbers of a packed latent for which a thread does with 128 registers, and with 168 for twice as many
WIDEST = 512  # numbers of a packed latent whose values' sums fit in registers
WIDE_FULL = 200  # KiB that U and, of two tiles, W and what is cached of such a latent may take: one program a processor
WIDE = 256  # numbers of a latent, the vectors of which are too many to be loaded ahead where there are more
LINE = 128  # bytes that memory gives at once
MOST_LOADED = 208  # KiB of a processor that rows which are scored as they are cached may take
SHORT = 65_536  # tokens of a launch up to which contextual forms are cut into one part a processor
FEW = 100_000  # tokens and KV heads of a launch below which three kernels more cost what fewer rebuilt pairs save
MANY = 1 << 20  # the same from which on latents of two KV heads are read as one row, up to two lines long
AGREES = 0.02  # relative L2 distance of two results in half precision: 0.002 or less where both are right
WARM_UP, REPEATS = 5, 20  # milliseconds of each candidate; between runs the L2 cache is emptied

tuned: dict[tuple, Tiles] = {}


def default_tiles(plan: Plan, dtype: torch.dtype, tokens: int | None = None) -> Tiles:
    """Returns what suits an H100 by its shared memory and registers (``tests/tpa/compile_decode.py`` shows them).

    ``tokens``: that all caches of a launch hold at most; None: many. Two programs share a processor where their tiles
    allow it: what one of them waits for, the other does meanwhile. Of two stages only one is in shared memory: the next
    tile is asked for when this one has been read. Three have memory and products overlap within a program.
    """
    if dtype == torch.float32:  # no tensor cores: products that are exact, and slow
        return Tiles(tokens=16, stages=1, largest=32, columns=16)
    if plan.rebuilt:
        tiles, size, rank = Tiles(), dtype.itemsize * plan.up[0].numel() >> 10, plan.up.shape[-1]
        token = sum(_loaded(rows.entry) for rows in (plan.keys, plan.values))
        found = plan.absorb(tiles.tokens)
        few = tokens is not None and tokens * len(plan.offset) < FEW
        if found is not None and not (found.fast and few):
            exact = plan.keys.entry.exact and plan.values.entry.exact
            if not found.fast:  # few registers, little in shared memory
                if exact and 2 * plan.heads * found.terms <= MOST and plan.joins(2) and _joining(plan, tokens):
                    return Tiles(programs=4, joined=2, registers=128)
                if not exact and plan.expand is None and rank <= 2 * FEWER:
                    if rank <= FEWER:
                        return Tiles(programs=4, registers=128)
                    return Tiles(largest=64, programs=3, registers=168)
                if exact and rank <= FEWER // 2:
                    return Tiles(programs=4, registers=128)
                return Tiles(programs=4, stages=2 if rank <= WIDE else 1)
            if not exact:
                packed, joint = plan.absorb(tiles.tokens, fast=PACKED), plan.expand is not None
                if packed is None or rank > TOGETHER:
                    packed = plan.absorb(tiles.tokens, True, PACKED) if rank <= WIDEST else None
                    if packed is not None and plan.heads * packed.terms <= MOST:
                        size = 4 * (PACKED + plan.heads * packed.terms) * rank  # U and, of two tiles, W
                        size += 2 * tiles.tokens * (token // 2 if joint else token)
                        stages = 2 if size <= WIDE_FULL << 10 else 1
                        return Tiles(stages=stages, largest=64, fast=PACKED, absorbed=True)
                    # All pairs, rather than more of them than fit beside unpacking.
                    return Tiles(stages=1, largest=64, columns=128, absorbed=False)
                return _packed_tiles(rank, plan.heads * packed.terms, token // 2 if joint else token, joint)
            # The rotation fills registers: of three programs where latents are small, of two otherwise.
            rebuilt = 2 * found.fast * rank * dtype.itemsize
            if plan.expand is not None:  # a joint latent is loaded once, and takes more vectors for its bytes
                ahead = tiles.stages * tiles.tokens * token // 2
                return tiles if ahead + rebuilt <= JOINT << 10 else Tiles(stages=1)
            if exact and 3 * tiles.tokens * token + rebuilt <= THREE << 10:
                return Tiles(stages=3, programs=3, registers=168)
            return tiles if tiles.stages * tiles.tokens * token + rebuilt <= TWO << 10 else Tiles(stages=1)
        tiles = replace(tiles, absorbed=False)
        if size > tiles.resident:
            return replace(tiles, stages=1, largest=64, columns=128)
        # A small U leaves room for a second program instead of a pipeline, a large one may leave no room for either.
        pipelined = size + (tiles.stages * tiles.tokens * token >> 10)
        if pipelined <= 64:  # with the rotation, which is loaded ahead as well, two programs fit
            return replace(tiles, columns=128)
        return tiles if 2 * size > tiles.resident and pipelined <= SHARED else replace(tiles, stages=1)
    # Of rows that are a loop of their own only one is in a tile.
    rows = [1 if r.mode == OWN or r.entry.rows > UNROLLED else r.entry.rows for r in (plan.keys, plan.values)]
    numbers = rows[0] * plan.keys.entry.count + rows[1] * plan.values.entry.count
    numbers += sum(r.entry.rows * plan.per_program for r in (plan.keys, plan.values) if r.mode == CACHED)
    if not (plan.keys.entry.exact and plan.values.entry.exact):
        if plan.keys.mode == plan.values.mode == OWN:
            return _packed_rows(plan)
        return Tiles(tokens=32) if numbers > 544 else Tiles()
    if numbers > 1088:
        return Tiles(tokens=16)
    # Rows of keys that several heads share are in shared memory once more.
    loops = any(r.mode != OWN and r.entry.rows > UNROLLED for r in (plan.keys, plan.values))
    again = 0 if loops or plan.keys.mode == OWN else rows[0] * plan.keys.entry.count

    def fits(stages: int) -> bool:
        return dtype.itemsize * Tiles.tokens * ((stages - 1) * numbers + again) <= MOST_LOADED << 10

    if not fits(2):
        return Tiles(tokens=32)
    if numbers > 768 or not fits(3):  # no room for a third stage
        return Tiles()
    if tokens is None or tokens > SHORT:
        return Tiles(stages=3)
    return Tiles(tokens=32, stages=4, programs=1) if numbers <= 320 else Tiles(stages=3, programs=1)


def _joining(plan: Plan, tokens: int | None) -> bool:
    """Whether two KV heads' latents are read as one row: one's is less than a line, or just one and there are eight of
    them, or tokens are many and it is no more than two."""
    size, groups = max(_loaded(plan.keys.entry), _loaded(plan.values.entry)), len(plan.offset)
    if tokens is None or tokens * groups >= MANY:
        return size <= 2 * LINE
    return size < LINE or (size == LINE and groups >= 8)


def _packed_rows(plan: Plan) -> Tiles:
    """Returns what suits packed keys that are cached rotated, beside packed values: three programs where they fit."""
    # Two tiles of what is cached are in shared memory, and the queries.
    size = 2 * Tiles.tokens * (_loaded(plan.keys.entry) + _loaded(plan.values.entry))
    size += 2 * LEAST * plan.keys.entry.count
    keys = pieces(plan.keys.entry, 0, LARGEST)[4::7]
    values = pieces(plan.values.entry, 0, LARGEST, LARGEST // GROUP)[4::7]
    if size <= ROWS[0] << 10 and sum(values) // GROUP + len(keys) + max(keys) // 64 <= CROWDED:
        return Tiles(stages=3, programs=3, registers=168)
    return Tiles(stages=3) if size <= ROWS[1] << 10 else Tiles()


def _loaded(entry: Entry) -> int:
    """Returns the bytes of shared memory that a row of an entry takes."""
    return entry.nbytes // entry.rows


def _packed_tiles(rank: int, columns: int, token: int, joint: bool) -> Tiles:
    """Returns what suits packed latents where PACKED pairs are rebuilt: of ``rank`` numbers, ``token`` bytes, and
    ``columns`` of W.

    Most of a tile's time one step waits for another: two programs share a processor where they fit, and load ahead
    where they still do then.
    """
    tiles = Tiles(largest=64, fast=PACKED)
    # U of the fast pairs and, of two tiles each, W, turned queries, the cache and the table of angles; all in 16 bits.
    size = 2 * PACKED * rank + 2 * (columns * rank + 2 * PACKED * LEAST + tiles.tokens * (token // 2 + 2 * PACKED))
    ahead, fits = JOINT_FULL if joint else FULL
    if size <= ahead << 10:
        return replace(tiles, stages=3)
    return tiles if size <= fits << 10 else replace(tiles, stages=1)


def candidates(plan: Plan, dtype: torch.dtype, tokens: int | None = None) -> list[Tiles]:
    """Returns the tiles to measure, the default first; ``tokens``: as ``default_tiles`` takes it."""
    first = default_tiles(plan, dtype, tokens)
    if dtype == torch.float32:
        return [first]
    shapes = [(64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 1), (128, 8, 2), (32, 4, 2), (32, 4, 3)]
    found = [first]
    if plan.rebuilt:
        found += [Tiles(*shape, columns=columns) for shape in shapes for columns in (32, 64)]
        found += [Tiles(64, 4, 1, programs=4), Tiles(64, 4, 2, largest=64), Tiles(128, 8, 1, resident=0)]
        found += [Tiles(*shape, largest=64, columns=128) for shape in ((64, 4, 1), (64, 8, 1), (128, 8, 1))]
        if absorbing := plan.absorb(first.tokens):
            found = [first, *(replace(tiles, absorbed=False) for tiles in found)]
            if absorbing.fast:
                found += [Tiles(64, 4, 2, programs=3, registers=168, fast=fast) for fast in (32, 64)]
                found += [Tiles(64, 4, stages, fast=fast) for stages in (1, 2, 3) for fast in (32, 64)]
                found += [Tiles(64, 4, 2, programs=4, registers=128), Tiles(32, 2, 2, programs=4)]
                found += [Tiles(128, 8, 2, programs=1), Tiles(128, 8, 2, registers=128), Tiles(64, 4, 1, largest=64)]
                if not (plan.keys.entry.exact and plan.values.entry.exact):
                    found += [Tiles(64, 4, stages, 64, fast=PACKED) for stages in (1, 2, 3)]
                    found += [Tiles(64, 4, stages, 64, programs=3, fast=PACKED, registers=168) for stages in (1, 2)]
                    found += [Tiles(64, 4, stages, 64, programs=4, fast=PACKED, registers=128) for stages in (1, 2)]
            else:
                found += [Tiles(*shape, programs=4) for shape in ((64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3))]
                found += [Tiles(64, 4, 2, programs=programs) for programs in (4, 6, 8)]
                found += [Tiles(64, 4, 1, programs=programs) for programs in (2, 4)]
                found += [Tiles(64, 4, 2, programs=n, registers=r) for n, r in ((3, 168), (4, 128))]
                found += [Tiles(64, 4, 1, 64, programs=n, registers=r) for n, r in ((4, None), (3, 168))]
                found += [Tiles(32, 1, 3, programs=8), Tiles(64, 2, 2, programs=6), Tiles(128, 8, 2, programs=3)]
                found += [Tiles(64, 2, 3, programs=4)]
                if plan.joins(2):
                    shapes = ((64, 4, 2, 3, None), (64, 4, 3, 3, 168), (128, 8, 2, 2, 128), (128, 4, 2, 3, 168))
                    found += [Tiles(*s[:3], programs=s[3], joined=2, registers=s[4]) for s in shapes]
                if plan.joins(4):
                    found += [Tiles(64, 8, 2, programs=2, joined=4, registers=128)]
    else:
        found += [Tiles(*shape, programs=programs) for shape in shapes for programs in (2, 4)]
        found += [Tiles(64, 4, 2, programs=n, registers=r) for n, r in ((3, 168), (4, 128))]
        found += [Tiles(32, 2, 3, programs=8), Tiles(64, 4, 4, programs=1), Tiles(16, 4, 3, programs=4)]
        found += [Tiles(64, 2, 3, programs=4), Tiles(32, 2, 3, programs=2), Tiles(64, 4, 3, programs=1)]
    if not (plan.keys.entry.exact and plan.values.entry.exact):
        found = [tiles for tiles in found if tiles.tokens >= 32]  # see ``Tiles``
    return list(dict.fromkeys(found))


def key_of(plan: Plan, batch: int, slots: int, heads: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """Returns what tiles are chosen by: the form, the shapes, and the context to a power of two."""
    sides = tuple((rows.entry, rows.mode) for rows in (plan.keys, plan.values))
    kind = (plan.rebuilt, plan.norm >= 0)
    return (sides, kind, heads, batch, power_of_two(slots), dtype, torch.cuda.get_device_name(device))


def chosen(
    plan: Plan,
    key: Callable[[], tuple],
    dtype: torch.dtype,
    device: torch.device,
    run: Callable[[Tiles], Iterable[Callable[[], Tensor]]],
    tokens: int | None = None,
) -> Tiles:
    """Returns the tiles of a call.

    Args:
        plan: the layer's.
        key: gives ``key_of`` the call.
        dtype: of the operands.
        device: that the call runs on.
        run: prepares a call with given tiles, and returns what runs it, and what does over a full cache.
        tokens: as ``default_tiles`` takes it.
    """
    known = device.type != "cuda" or trusted(device)  # asked first: it says what it knows
    if not known or not tuned and not os.environ.get(VARIABLE):
        return default_tiles(plan, dtype, tokens)
    name = key()
    if name not in tuned:
        if not os.environ.get(VARIABLE) or gathers() or torch.cuda.is_current_stream_capturing():
            return default_tiles(plan, dtype, tokens)
        tuned[name] = fastest(candidates(plan, dtype, tokens), run)
    return tuned[name]


def fastest(options: Sequence[Tiles], run: Callable[[Tiles], Iterable[Callable[[], Tensor]]]) -> Tiles:
    """Returns the fastest of ``options``; passed over are those that do not fit the device, and those whose result is
    not that of the first one that does: compilers err, and not with every tile."""
    times: dict[Tiles, float] = {}
    expected = None
    for tiles in options:
        try:
            call, full = run(tiles)
            found = call().float()
            expected = found if expected is None else expected
            if not (found - expected).norm() <= AGREES * expected.norm():
                continue
            replay = _replay(full)
            times[tiles] = triton.testing.do_bench(replay, warmup=WARM_UP, rep=REPEATS, return_mode="median")
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue
    return min(times, key=times.__getitem__, default=options[0])


def _replay(work: Callable[[], object]) -> Callable[[], None]:
    """Returns ``work`` as a CUDA graph: the host takes longer to launch a short kernel than the kernel runs."""
    work()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay
