"""Decoding attention of one layer: time a token of the converted cache beside the fastest dense kernel there is.

Shapes are those of a global layer of a published size; entries are random, since time does not depend on values. Each
cell is one shape, context and batch. Its dense cache is read by every kernel that is installed, and the fastest counts;
then each form and width is checked against float64 on the first and the last sequence, and timed.

``bytes_ratio`` is dense bytes over the form's, scales counted, ``bandwidth_share`` bytes read a second over those of a
plain copy. ``rebuild_bound`` is the microseconds that matrix units need, at the rate measured in the same call, to
rebuild the keys of a form that caches latents. The bar is 0.6 of what either bound allows: the bytes, or rebuilding. It
is judged where a step reads 256 MB of dense cache or more. Rows of ``kind`` prefill are ``chunk`` new tokens over
``prefill_context`` cached ones: entries unpacked, keys and values rebuilt, and attended to by the fastest flash kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpa_train.benchmarks.decode_backends import (
    CHUNKS,
    COMPILED,
    attend_chunk,
    backends_of,
    heads_first,
    masked,
    own_work,
)
from tpa_train.benchmarks.decode_caches import (
    FORMS,
    cache_nbytes,
    check_forms,
    checked_rows,
    exact_results,
    form_spec,
    in_float64,
    needed_bytes,
    random_attention,
    random_cache,
    random_queries,
    rebuild_flops,
    relative_error,
)
from tpa_train.benchmarks.decode_plots import plot_speedups
from tpa_train.benchmarks.journal import Allowance, Journal, forget
from tpa_train.benchmarks.record import table_of
from tpa_train.benchmarks.scaling import MODELS
from tpa_train.benchmarks.stopwatch import REPEATS, Stopwatch
from tpa_train.cli import choose_device
from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.launch import say
from tpa_train.machine_memory import free_bytes
from tpa_train.tpa.decode import CachedTokens
from tpa_train.tpa.entries import check_widths
from tpa_train.tpa.spec import LayerSpec

CELL = ("kind", "shape", "form", "bits", "context", "batch")
FREE = ("shapes", "contexts", "batches", "forms", "bits", "skip", "minutes")
JUDGED = 256_000_000  # bytes of dense cache that a step reads, from which on the bar is judged
BAR = 0.6  # of what bytes and rebuilding allow
TOLERANCE = 0.01  # relative L2 error of a bfloat16 result above which it is wrong
SHOWN = (*CELL, "rank", "dense_us", "dense_backend", "tpa_us", "tpa_relative_error", "bytes_ratio", "speedup",
         "bandwidth_share", "rebuild_bound", "bar", "meets_bar", "skipped", "error")  # fmt: skip
SLOW, SLOW_COMPILED = 1.5, 1.1  # times the fastest: such a kernel is not tried on the shape's other cells


@dataclass
class DecodeSettings:
    """Options of ``benchmark.py decode``."""

    shapes: list[str] = field(
        default_factory=lambda: ["270m", "4b", "12b", "27b"],
        metadata={"help": f"sizes, one an option, out of {', '.join(MODELS)}."},
    )
    contexts: list[int] = field(default_factory=lambda: [8192, 32_768, 131_072], metadata={"help": "cached tokens."})
    batches: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "sequences of a step."})
    forms: list[str] = field(
        default_factory=lambda: ["latent", "joint", "contextual1", "contextual2"],
        metadata={"help": f"one an option, out of {', '.join(FORMS)} (a number is R; dense: in fewer bits)."},
    )
    bits: list[int] = field(default_factory=lambda: [16], metadata={"help": "widths of cached numbers: 16, 8, 6, …"})
    skip: list[str] = field(
        default_factory=list, metadata={"help": "dense kernels not to try, one an option, such as skip=flex."}
    )
    chunk: int = field(default=4096, metadata={"help": "new tokens of a prefill row; 0: no such rows."})
    prefill_context: int = field(default=32_768, metadata={"help": "cached tokens of a prefill row."})
    repeats: int = field(default=REPEATS, metadata={"help": "timed runs, of which the median counts."})
    minutes: float | None = field(
        default=None, metadata={"help": "begin no cell that would not be measured in so many; null: all of them."}
    )
    seed: int = field(default=0, metadata={"help": "decides weights and entries."})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; null: an accelerator if there is one."})


@dataclass(frozen=True)
class Group:
    """The cells of one dense cache, or of one chunk over it."""

    kind: str  # decode or prefill
    shape: str
    context: int
    batch: int

    @property
    def config(self) -> Gemma3Config:
        return MODELS[self.shape]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense cache, all of which one step reads."""
        return self.batch * self.context * dense_spec(self.config).bytes_per_token(self.config)


def dense_spec(config: Gemma3Config) -> LayerSpec:
    """Returns the original's layer."""
    return LayerSpec(rank_k=config.head_dim, rank_v=config.head_dim)


def run(settings: DecodeSettings, journal: Journal) -> list[dict[str, Any]]:
    """Returns the journal's rows, those of this call among them; what does not fit a cell's row says why.

    Raises:
        UserError: an option is out of range, or the device failed and cannot go on.
    """
    check(settings)
    allowance = Allowance(settings.minutes)
    bench = _Bench(settings, journal, choose_device(settings.device))
    todo = [group for group in groups(settings) if bench.missing(group)]
    for number, group in enumerate(todo):
        if number and not allowance.fits(0):
            say(f"minutes={settings.minutes:g} are spent; {len(todo) - number} caches are left, which the same command "
                "goes on with")  # fmt: skip
            break
        begin = time.perf_counter()
        bench.measure(group)
        allowance.learn(time.perf_counter() - begin, 0.0, 0)
    if journal.path is not None:
        plot_speedups(journal.path.with_suffix(".png"), judged(journal.rows))
    return journal.rows


def check(settings: DecodeSettings) -> None:
    """Refuses options that cannot work, before anything is allocated."""
    for name in settings.shapes:
        if name not in MODELS:
            raise UserError(f"shapes={name} is unknown{nearest(name, MODELS)}")
    check_forms(settings.forms)
    kernels = [name for name, *_ in backends_of(choose_device(settings.device))]
    for name in settings.skip:
        if name not in kernels:
            raise UserError(f"skip={name} is no dense kernel of this device{nearest(name, kernels)}")
    for name in ("shapes", "contexts", "batches", "bits"):
        values = getattr(settings, name)
        if not values or name != "shapes" and min(values) < 1:
            raise UserError(f"{name}={values} must be a list of positive numbers, such as {name}=[8,16].")
    for bits in settings.bits:
        check_widths(bits)
    if "dense" in settings.forms and set(settings.bits) == {16}:
        raise UserError("forms=dense is the dense cache in fewer bits: add some, such as bits=[8,4].")
    for name, least in (("chunk", 0), ("prefill_context", 1), ("repeats", 1), ("seed", 0)):
        if getattr(settings, name) < least:
            raise UserError(f"{name}={getattr(settings, name)} must be at least {least}.")


def groups(settings: DecodeSettings) -> list[Group]:
    """Returns what is measured: first what is judged, the largest caches of every shape in turn; then prefill."""
    shapes = list(dict.fromkeys(settings.shapes))
    decode = [
        Group("decode", shape, context, batch)
        for shape in shapes
        for context in dict.fromkeys(settings.contexts)
        for batch in dict.fromkeys(settings.batches)
    ]
    place = {
        group: number
        for shape in shapes
        for number, group in enumerate(
            sorted((g for g in decode if g.shape == shape), key=lambda g: (-g.dense_bytes, -g.batch))
        )
    }
    decode.sort(key=lambda g: place[g])
    prefill = [Group("prefill", shape, settings.prefill_context, 1) for shape in shapes if settings.chunk]
    large = [g for g in decode if g.dense_bytes >= JUDGED]
    return large + prefill + [g for g in decode if g.dense_bytes < JUDGED]


class _Bench:
    """Measures groups of cells; rates are measured when this is made."""

    def __init__(self, settings: DecodeSettings, journal: Journal, device: torch.device) -> None:
        self.settings, self.journal, self.device = settings, journal, device
        self.watch = Stopwatch(device, settings.repeats)
        self.copy_rate, self.multiply_rate = self.watch.copy_rate(), self.watch.multiply_rate()
        self.dropped: dict[tuple[str, str], str] = {}  # (shape, dense kernel) -> why it is not tried again
        rates = {
            "kind": "rates", "copy_gb_s": self.copy_rate / 1e9, "multiply_tflops": self.multiply_rate / 1e12,
            "empty_us": self.watch.empty_us(),
        }  # fmt: skip
        journal.add(dict.fromkeys(CELL) | rates)
        self._give_back()

    def cells(self, group: Group) -> list[tuple[str, int]]:
        """Returns the forms and widths that are measured of a group."""
        pairs = [(form, bits) for form in self.settings.forms for bits in self.settings.bits]
        return [pair for pair in dict.fromkeys(pairs) if pair != ("dense", 16)]

    def cell(self, group: Group, form: str, bits: int) -> dict[str, Any]:
        return asdict(group) | {"form": form, "bits": bits}

    def missing(self, group: Group) -> list[tuple[str, int]]:
        """Returns the cells of a group that have no row yet."""
        return [pair for pair in self.cells(group) if not self.journal.done(**self.cell(group, *pair))]

    def measure(self, group: Group) -> None:
        """Adds the rows of a group. The dense cache is measured again, so that a row's two times are of one call."""
        todo = self.missing(group)
        try:
            dense = self._dense(group)
        except Exception as error:  # noqa: BLE001 - whatever a kernel does, the other cells are measured
            for pair in todo:
                self.journal.add_error(error, **self.cell(group, *pair))
            self._check_device(self.cell(group, "dense", 16))
            return
        for form, bits in todo:
            row, begin = self.cell(group, form, bits), time.perf_counter()
            try:
                row |= self._row(group, form_spec(form, group.config, bits), dense)
            except Exception as error:  # noqa: BLE001 - as above
                self.journal.add_error(error, **row)
                self._check_device(row)
                row |= {"error": _reason(error)}
            else:
                self.journal.add(row | {"seconds": time.perf_counter() - begin})  # what it took, compiling included
            _show(row)
        self._give_back()

    def _give_back(self) -> None:
        """Frees the buffers of sizes that will not come again; nothing here is held by a cycle of references."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_device(self, row: Mapping[str, Any]) -> None:
        """Raises UserError where the device is lost to this process, as after a kernel that wrote out of bounds."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise UserError(
                f"the device failed in {row} ({str(error).splitlines()[0]}); the rows before it are kept, the same "
                "command without that form goes on."
            ) from error

    def _row(self, group: Group, spec: LayerSpec, dense: dict[str, Any]) -> dict[str, Any]:
        """Returns what is measured of one form and width, beside the group's dense figures."""
        config = group.config
        found = {"rank": spec.rank_k, "tpa_bytes": self._bytes(group, spec), "dense_bytes": self._bytes(group)}
        found["bytes_ratio"] = found["dense_bytes"] / found["tpa_bytes"]
        if "skipped" in dense:
            return found | dense
        if found["bytes_ratio"] <= 1:
            return found | {"skipped": "its cache is no smaller than the dense one"}
        attention = random_attention(config, spec, self.device, self.settings.seed)
        queries, cached = self._cache(group, attention)
        assert cache_nbytes(cached) == found["tpa_bytes"]
        if group.kind == "prefill":
            found |= dense | _fastest(self._chunk_times(attention, queries, cached), "tpa")
        else:
            work, exact = own_work(attention, queries[:, 0], cached), exact_results(attention, queries[:, 0], cached)
            found |= dense | _named(self._timed(work, _checked, exact), "tpa")
        flops = rebuild_flops(config, spec)
        rebuild = 1e6 * group.batch * self._tokens(group) * flops / self.multiply_rate
        found |= {"speedup": found["dense_us"] / found["tpa_us"], "rebuild_bound": rebuild if flops else None}
        if group.kind == "decode":
            bar = BAR * min(found["bytes_ratio"], found["dense_us"] / rebuild if flops else float("inf"))
            found |= {
                "bandwidth_share": 1e6 * found["tpa_bytes"] / found["tpa_us"] / self.copy_rate,
                "dense_bandwidth_share": 1e6 * found["dense_bytes"] / found["dense_us"] / self.copy_rate,
                "bar": bar,
                "meets_bar": found["speedup"] >= bar if group.dense_bytes >= JUDGED else None,
            }  # fmt: skip
        return found

    def _tokens(self, group: Group) -> int:
        """Returns the tokens of each sequence that are attended to."""
        return group.context + (self.settings.chunk if group.kind == "prefill" else 0)

    def _bytes(self, group: Group, spec: LayerSpec | None = None) -> int:
        spec = dense_spec(group.config) if spec is None else spec
        return group.batch * self._tokens(group) * spec.bytes_per_token(group.config)

    def _cache(self, group: Group, attention: Attention) -> tuple[Tensor, CachedTokens]:
        """Returns queries of the last tokens, [B, L, H, d], and the cache that they attend to."""
        tokens = self._tokens(group)
        new = self.settings.chunk if group.kind == "prefill" else 1
        positions = torch.arange(tokens - new, tokens, device=self.device)
        queries = random_queries(attention, group.batch, positions, self.settings.seed)
        return queries, random_cache(attention, group.batch, tokens, self.settings.seed)

    # ------------------------------------------------------------------------------------------------ a step

    def _dense(self, group: Group) -> dict[str, Any]:
        """Returns the figures of the group's fastest dense kernel, and what became of the others."""
        needed = needed_bytes(group.config, self._bytes(group) // group.batch // self._tokens(group), group.batch,
                              self._tokens(group))  # fmt: skip
        free = free_bytes(self.device)
        if needed > free:
            return {"skipped": f"it needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"}
        attention = random_attention(group.config, None, self.device, self.settings.seed)
        queries, cached = self._cache(group, attention)
        if group.kind == "prefill":
            times = self._chunk_times(attention, queries, cached)
        else:
            times = self._dense_times(group, attention, queries[:, 0], cached)
        return _fastest(times, "dense")

    def _dense_times(
        self, group: Group, attention: Attention, queries: Tensor, cached: CachedTokens
    ) -> dict[str, dict[str, Any] | str]:
        """Returns of each kernel and layout its time and error, or why there is none."""
        layouts = {"tokens first": cached, "heads first": heads_first(cached)}
        exact: dict[str, Tensor] = {}
        times: dict[str, dict[str, Any] | str] = {}
        for kernel, layout, backend in backends_of(self.device):
            name = f"{kernel}, {layout}"
            if (group.shape, name) in self.dropped or kernel in self.settings.skip:
                times[name] = self.dropped.get((group.shape, name), "skipped by option")
                continue
            try:
                if layout not in exact:
                    exact[layout] = exact_results(attention, queries, layouts[layout])
                if backend is None:
                    work = own_work(attention, queries, cached)
                else:
                    work = backend(queries, *layouts[layout].stored, attention.config.scale)
                times[name] = self._timed(work, _checked, exact[layout])
            except Exception as error:  # noqa: BLE001 - a kernel that cannot do this is no failure of the benchmark
                times[name] = _reason(error)
                forget(error)
                self._check_device({"dense kernel": name})
        self._drop(group, times)
        return times

    def _drop(self, group: Group, times: Mapping[str, dict[str, Any] | str]) -> None:
        """Takes what will not be the fastest out of the shape's other cells: each cell costs what is built for it."""
        where = f"at context {group.context}, batch {group.batch}"
        measured = {name: found["us"] for name, found in times.items() if isinstance(found, dict)}
        fastest = min(measured.values(), default=0.0)
        for name, found in times.items():
            kernel = name.partition(",")[0]
            if (group.shape, name) in self.dropped or kernel in self.settings.skip:
                continue
            layouts = [us for other, us in measured.items() if other.partition(",")[0] == kernel]
            limit = SLOW_COMPILED if kernel in COMPILED else SLOW
            reason = None
            if name not in measured:
                reason = f"failed {where}: {found}" if kernel in COMPILED else None
            elif measured[name] > limit * fastest:
                reason = f"{measured[name] / fastest:.2f}× the fastest {where}"
            elif measured[name] > min(layouts):
                reason = f"its other layout was faster {where}"
            if reason is not None:
                self.dropped[group.shape, name] = reason

    def _timed(self, work: Callable[[], Tensor], checked: Callable[[Tensor], Tensor], exact: Tensor) -> dict[str, Any]:
        """Returns time and relative error of work; its first run compiles.

        Raises:
            ArithmeticError: the result is wrong.
        """
        with torch.no_grad():
            error = relative_error(checked(work()), exact)
            if not error <= TOLERANCE:
                raise ArithmeticError(f"the result differs from float64 by {error:.2g} of its size")
            timing = self.watch.time(work)
        return {"us": timing.us, "relative_error": error, "graph": timing.graph}

    # ------------------------------------------------------------------------------------------------ a chunk

    def _chunk_times(
        self, attention: Attention, queries: Tensor, cached: CachedTokens
    ) -> dict[str, dict[str, Any] | str]:
        """Returns of each flash kernel the time of a chunk, unpacking and rebuilding included."""
        scale, length = attention.config.scale, queries.shape[1]
        last = min(8, length)  # queries that are checked: those that see the whole cache
        wide = in_float64(attention)
        keys, values = wide.read(wide.unpack(cached.stored, torch.float64), cached.rotary)
        exact = masked(queries[:, length - last :].double(), keys, values, scale)
        del keys, values, wide
        times: dict[str, dict[str, Any] | str] = {}
        for name, kernel in CHUNKS[self.device.type].items():

            def work(kernel=kernel) -> Tensor:
                read = attention.read(attention.unpack(cached.stored, queries.dtype), cached.rotary)
                return attend_chunk(kernel, queries, *read, scale)

            try:
                times[name] = self._timed(work, lambda out: out[:, length - last :], exact)
            except Exception as error:  # noqa: BLE001 - as above
                times[name] = _reason(error)
                forget(error)
                self._check_device({"chunk kernel": name})
        return times


def _fastest(times: Mapping[str, dict[str, Any] | str], prefix: str) -> dict[str, Any]:
    """Returns the fastest kernel's figures, names beginning with ``prefix``, and all kernels' times or reasons."""
    measured = {name: found for name, found in times.items() if isinstance(found, dict)}
    if not measured:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in times.items()))
    best = min(measured, key=lambda name: measured[name]["us"])
    every = {name: found["us"] if isinstance(found, dict) else found for name, found in times.items()}
    return _named(measured[best], prefix) | {f"{prefix}_backend": best, f"{prefix}_backends": every}


def _named(figures: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in figures.items()}


def _checked(out: Tensor) -> Tensor:
    return out[checked_rows(len(out))]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _show(row: Mapping[str, Any]) -> None:
    shown = ("dense_us", "tpa_us", "bytes_ratio", "speedup", "meets_bar", "skipped", "error")
    figures = "  ".join(
        f"{k} {row[k]:.4g}" if isinstance(row[k], float) else f"{k} {row[k]}" for k in shown if k in row
    )
    say(f"{'  '.join(str(row[k]) for k in CELL)}  {figures}")


def judged(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows whose bar is judged."""
    return [row for row in rows if row.get("meets_bar") is not None]


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table without what only the file has room for, and for each form how it stands against the bar."""
    rates = [row for row in rows if row["kind"] == "rates"]
    others = [{k: row[k] for k in SHOWN if k in row} for row in rows if row["kind"] != "rates"]
    parts = [table_of(others)] if others else []
    forms = {(row["form"], row["bits"]): [] for row in judged(rows)}
    for row in judged(rows):
        forms[row["form"], row["bits"]].append(row)
    if forms:
        parts.append(table_of([_summary(found) for found in forms.values()]))
    parts += [
        f"copy {row['copy_gb_s']:.4g} GB/s, bfloat16 product {row['multiply_tflops']:.4g} TFLOP/s, an empty kernel "
        f"{row['empty_us']:.3g} µs"
        for row in rates
    ]
    return "\n\n".join(parts)


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one line about the judged rows of a form and width."""
    line = {"form": rows[0]["form"], "bits": rows[0]["bits"], "judged": len(rows)}
    line["meet the bar"] = sum(row["meets_bar"] for row in rows)
    for name in ("bytes_ratio", "speedup", "bandwidth_share"):
        line[f"median {name}"] = statistics.median(row[name] for row in rows)
    return line
