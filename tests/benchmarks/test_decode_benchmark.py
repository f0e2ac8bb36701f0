"""The decoding benchmark on a CPU, at tiny sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tpa_train.benchmarks import command, decode, decode_backends, journal, stopwatch
from tpa_train.benchmarks.decode import DecodeSettings, Group, groups
from tpa_train.benchmarks.decode_backends import backends_of, heads_first
from tpa_train.benchmarks.decode_caches import (
    FORMS,
    checked_rows,
    exact_results,
    form_spec,
    random_attention,
    random_cache,
    random_queries,
    rebuild_flops,
    relative_error,
)
from tpa_train.benchmarks.scaling import TINY
from tpa_train.benchmarks.stopwatch import Stopwatch
from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES
from tpa_train.tpa.decode import attend_cached

CPU = torch.device("cpu")
OPTIONS = ["device=cpu", "shapes=tiny", "contexts=[16]", "chunk=5", "prefill_context=20", "repeats=1"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Everything from the second batch on is judged; rates are measured on little."""
    monkeypatch.setattr(decode, "JUDGED", 16 * 128 * 2)
    monkeypatch.setitem(stopwatch.COPIED, "cpu", 1 << 16)
    monkeypatch.setitem(stopwatch.MULTIPLIED, "cpu", 32)


def cells(path) -> tuple[dict, dict]:
    rates, *rows = json.loads(path.read_text())["rows"]
    return rates, {tuple(row[name] for name in decode.CELL): row for row in rows}


def test_tiny_run(tmp_path, capsys, monkeypatch):
    out = tmp_path / "decode.json"
    argv = ["decode", *OPTIONS, "batches=[1,2]", *(f"forms={name}" for name in FORMS), "bits=[16,4]", f"out={out}"]
    command.main(argv)
    assert "median speedup" in capsys.readouterr().out and out.with_suffix(".png").stat().st_size > 1000
    rates, rows = cells(out)
    assert rates["kind"] == "rates" and min(rates[k] for k in ("copy_gb_s", "multiply_tflops", "empty_us")) > 0
    pairs = 2 * len(FORMS) - 1  # a dense cache in 16 bits is the baseline itself
    assert len(rows) == 3 * pairs and [kind for kind, *_ in rows][::pairs] == ["decode", "prefill", "decode"]
    for (kind, _, form, bits, context, batch), row in rows.items():
        spec, tokens = form_spec(form, TINY, bits), 16 if kind == "decode" else 25
        assert context == (16 if kind == "decode" else 20) and row["rank"] == spec.rank_k
        assert row["dense_bytes"] == batch * tokens * 128 and "error" not in row
        assert row["bytes_ratio"] == pytest.approx(128 / spec.bytes_per_token(TINY))
        if spec.bytes_per_token(TINY) >= 128:
            assert row["skipped"] == "its cache is no smaller than the dense one" and "tpa_us" not in row
            continue
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["tpa_us"])
        assert 1e-4 < row["tpa_relative_error"] < 0.01 and 1e-4 < row["dense_relative_error"] < 0.01
        assert (
            row["dense_us"] == min(t for t in row["dense_backends"].values() if isinstance(t, float))
            and not row["dense_graph"]
        )
        assert (row["rebuild_bound"] is None) == (form not in ("latent", "joint", "joint_norms", "tucker"))
        if kind == "prefill":
            assert row["tpa_backend"] == "masked" and "bar" not in row
            continue
        assert row["bandwidth_share"] == pytest.approx(row["tpa_bytes"] / row["tpa_us"] / 1e3 / rates["copy_gb_s"])
        allowed = [row["bytes_ratio"]] + ([row["dense_us"] / row["rebuild_bound"]] if row["rebuild_bound"] else [])
        assert row["bar"] == pytest.approx(0.6 * min(allowed))
        assert row["meets_bar"] == ((row["speedup"] >= row["bar"]) if batch == 2 else None)
    monkeypatch.setattr(decode._Bench, "measure", lambda *_: pytest.fail("it was measured"))
    command.main(argv)  # nothing is left to do
    assert cells(out)[1] == rows


def test_wrong_and_failing_kernels(tmp_path, monkeypatch):
    """They get no time: a wrong dense kernel is not the fastest, and a wrong form's row is tried again."""
    out = tmp_path / "d.json"
    argv = ["decode", *OPTIONS, "batches=[3]", "chunk=0", "forms=latent", "skip=sdpa", f"out={out}"]

    def last_row_wrong(attention, queries, cached):
        results = attend_cached(attention, queries, cached)
        results[-1] *= 1.1
        return results

    def broken(*_):
        raise NotImplementedError("no such card\nand more")

    def fast_zeros(q, k, v, scale):
        zeros = torch.zeros_like(q)
        return lambda: zeros

    others = {"broken": broken, "zeros": fast_zeros}
    monkeypatch.setitem(decode_backends.OTHERS, "cpu", others)
    monkeypatch.setattr(journal, "free_memory", lambda: None)  # half a second
    with monkeypatch.context() as patch:
        patch.setattr(decode_backends, "attend_cached", last_row_wrong)
        command.main(argv)
    (row,) = cells(out)[1].values()
    assert row["error"].startswith("ArithmeticError: the result differs from float64 by")
    command.main(argv)
    (row,) = cells(out)[1].values()
    found = row["dense_backends"]
    assert row["speedup"] > 0 and "error" not in row and row["dense_backend"].startswith(("sdpa", "attend_cached"))
    assert found["sdpa, tokens first"] == found["sdpa, heads first"] == "skipped by option"
    assert found["broken, tokens first"] == "NotImplementedError: no such card"
    assert "differs from float64 by 1 of its size" in found["zeros, tokens first"]


def test_slow_kernels_are_dropped_for_a_shape():
    bench, group = object.__new__(decode._Bench), Group("decode", "4b", 8, 2)
    bench.dropped, bench.settings = {}, DecodeSettings()
    us = {"a, tokens first": 1.0, "a, heads first": 1.1, "b, tokens first": 1.4, "b, heads first": 1.6,
          "flex, heads first": 1.2}  # fmt: skip
    times = {name: {"us": value} for name, value in us.items()}
    bench._drop(group, times | {"c, tokens first": "not this time", "flashinfer, tokens first": "ImportError"})
    assert bench.dropped == {
        ("4b", "a, heads first"): "its other layout was faster at context 8, batch 2",
        ("4b", "b, heads first"): "1.60× the fastest at context 8, batch 2",
        ("4b", "flex, heads first"): "1.20× the fastest at context 8, batch 2",
        ("4b", "flashinfer, tokens first"): "failed at context 8, batch 2: ImportError",
    }


def test_what_is_judged_comes_first(monkeypatch):
    monkeypatch.undo()
    order = groups(DecodeSettings())
    assert len(order) == len(set(order)) == 4 * (9 + 1)
    judged = [g for g in order if g.kind == "decode" and g.dense_bytes >= 256e6]
    assert order[: len(judged)] == judged and [g.kind for g in order[len(judged) :][:4]] == ["prefill"] * 4
    assert [g.shape for g in order[:4]] == ["270m", "4b", "12b", "27b"] and order[3].dense_bytes == 2**35
    assert {(g.context, g.batch) for g in order[:4]} == {(131_072, 32)}


@pytest.mark.parametrize("size", ["270m", "4b", "27b"])
def test_forms_of_the_published_sizes(size):
    config = SIZES[size]
    dense, latent, joint = (form_spec(n, config, 16) for n in ("dense", "latent", "joint"))
    assert latent.rank_k == config.head_dim // 4
    assert dense.bytes_per_token(config) == 4 * latent.bytes_per_token(config)
    for bits in (16, 4):
        wide = [form_spec(n, config, bits).bytes_per_token(config) for n in ("latent", "joint", "joint_norms")]
        assert wide[0] == wide[1] and (bits < 16 or wide[2] == wide[1] + 2 * config.num_kv_heads)
    # Separate latents take d/2 operations a byte read; a joint one G·d.
    assert rebuild_flops(config, latent) / latent.bytes_per_token(config) == config.head_dim / 2
    assert rebuild_flops(config, joint) / joint.bytes_per_token(config) == config.num_kv_heads * config.head_dim
    assert rebuild_flops(config, form_spec("contextual1", config, 16)) == 0


def test_every_kernel_reads_the_cache_it_is_given():
    """Query heads meet their own KV head, in both layouts; the exact results are those of the sequences checked."""
    attention = random_attention(TINY, None, CPU, 0, torch.float32)
    cached = random_cache(attention, 3, 11, 1)
    queries = random_queries(attention, 3, torch.tensor([10]), 2)[:, 0]
    assert not torch.equal(cached.stored[0][0], cached.stored[0][2])
    for name, layout, backend in backends_of(CPU):
        view = cached if layout == "tokens first" else heads_first(cached)
        exact = exact_results(attention, queries, view)
        work = backend(queries, *view.stored, attention.config.scale) if backend else None
        found = work() if work else attend_cached(attention, queries, view)
        assert relative_error(found[checked_rows(3)], exact) < 1e-5, name
    part = replace(cached, stored=tuple(t[2:] for t in cached.stored), lengths=cached.lengths[2:])
    torch.testing.assert_close(
        exact_results(attention, queries[2:], part), exact_results(attention, queries, cached)[1:]
    )


def test_the_median_counts_and_repeats_end():
    watch, calls = Stopwatch(CPU, repeats=5, seconds=0.0), []
    assert watch.time(lambda: calls.append(0)).us > 0 and len(calls) == 3
    times = iter([9.0, 1.0, 2.0])
    watch._clock = lambda work: next(times)
    assert watch.time(lambda: None).us == 2e6


@pytest.mark.parametrize("argv,message", [
    (["shapes=4c"], "shapes=4c is unknown; did you mean '4b'"), (["forms=latnt"], "did you mean 'latent'"),
    (["contexts=[]"], r"contexts=\[\] must be a list of positive"), (["batches=[0]"], r"batches=\[0\] must be"),
    (["bits=[5]"], "cache bits must be one of"), (["forms=dense"], "add some, such as"), (["chunk=-1"], "chunk=-1"),
    (["skip=sdpaa"], "did you mean 'sdpa'"),
    (["repeats=0"], "repeats=0 must be at least 1"), (["minutes=0"], "minutes=0 must be positive"),
])  # fmt: skip
def test_mistakes_are_named(argv, message, monkeypatch):
    monkeypatch.setattr(decode, "_Bench", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UserError, match=message):
        command.main(["decode", "device=cpu", *argv])
