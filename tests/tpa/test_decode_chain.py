"""Overlapping launches, vectors that one kernel makes, and what memory is asked for ahead: see ``decode.chain``."""

import dataclasses

import pytest
import torch
from decode_cases import FORMS, filled, layer, moved
from decode_kernels import BF16, CUDA, DEVICE, F32, SMALL, bounds_of_loops  # noqa: F401

from tpa_train.tpa.decode import chain, launch
from tpa_train.tpa.decode.launch import attend_triton, prepare
from tpa_train.tpa.decode.plan import plan_of
from tpa_train.tpa.decode.reference import attend_reference
from tpa_train.tpa.decode.tiles import Tiles
from tpa_train.tpa.spec import LayerSpec

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about values that are not selected


@torch.no_grad()
@pytest.mark.parametrize(
    "spec,groups,changes,fast,processors",
    [
        (LayerSpec("latent", 35, "latent", 9, (6, 16), 16), 2, {}, 0, 132),  # a program a head, an offset
        (LayerSpec("latent", 16, "latent", 9), 2, dict(rope_theta=40.0), 0, 1),  # four heads a program, several spans
        (LayerSpec("latent", 32, "latent", 9), 2, dict(head_dim=128, rope_theta=1e4), 16, 1),  # and fast pairs
        (LayerSpec("joint", 300, "joint", 300, cached_norm=True), 1, {}, 0, 132),  # two programs a head
    ],
)
def test_one_kernel_makes_the_vectors_that_two_make(spec, groups, changes, fast, processors, monkeypatch):
    monkeypatch.setattr(launch, "_processors", lambda device: processors)
    attention = layer(groups, spec, **changes)
    if processors == 1:
        attention.keys.center.zero_()
    queries, cached, _ = filled(attention, [37, 5], 40, F32)
    args = (attention.to(DEVICE, F32), plan_of(attention, F32, torch.device(DEVICE)), queries.to(DEVICE))
    found = []
    for fused in (False, True):
        tiles = dataclasses.replace(SMALL, tokens=32, largest=128, absorbed=True, fast=fast, fused=fused)
        out, launches = prepare(*args, moved(cached, DEVICE), tiles, 2)
        for item in launches:
            item.run()
        found.append(out)
    assert [len(item.grid) for item in launches] == [3, 3, 2] and launches[0].options["CENTERED"] == (processors == 1)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6)


def test_launches_of_a_step_overlap_where_the_device_can(monkeypatch):
    attention = layer(2, FORMS["latent"]).float()
    queries, cached, _ = filled(attention.double(), [18, 7], 20, F32)
    tiles = dataclasses.replace(SMALL, absorbed=True, fast=0, dependent=True, ahead=1)
    args = (attention.float(), plan_of(attention, F32, torch.device("cpu")), queries, cached)

    def options(splits: int, **changes) -> list[tuple]:
        launches = prepare(*args, dataclasses.replace(tiles, **changes), splits)[1]
        assert not any(item.options.get("WIDTHS") for item in launches[1:])
        return [tuple(item.options.get(name) for name in ("DEPENDENT", "launch_pdl")) for item in launches], launches[0]

    if not CUDA:
        assert options(2)[0] == 4 * [(False, None)] and options(2)[1].options["WIDTHS"] == ()
    monkeypatch.setattr(chain, "able", lambda device: True)
    found, first = options(2)
    assert found == [(True, None), *3 * [(True, True)]]
    # Numbers of a token, and tokens of each part of a sequence: a MiB, shared out among two of each.
    assert first.options["WIDTHS"] == (70, 34) and first.arguments[-1] == (1 << 20) // (4 * 4 * 104)
    found, first = options(2, dependent=False, ahead=0)
    assert found == 4 * [(False, None)] and first.options["WIDTHS"] == ()
    assert options(2, dependent=None)[0] == 4 * [(chain.DEPENDENT, chain.DEPENDENT or None)]
    assert options(1, absorbed=False)[0] == [(False, None)]  # nothing follows


@pytest.mark.skipif(CUDA, reason="watches the interpreter")
@torch.no_grad()
@pytest.mark.parametrize("form", ["contextual", "latent", "latent, fused"])
def test_what_memory_is_asked_for_ahead(form, monkeypatch):
    """The first tokens of every part that a sequence has; if one kernel makes vectors, what that reads itself too."""
    spec = LayerSpec("latent", 16, "latent", 8) if "latent" in form else LayerSpec("contextual", 2, "contextual", 2)
    attention = layer(4, spec).float()
    queries, cached, _ = filled(attention.double(), [120, 0, 31], 130, F32, rows=[2, 0, 1])
    plan = plan_of(attention.float(), F32, torch.device("cpu"))
    monkeypatch.setattr(chain, "able", lambda device: True)
    tiles = dataclasses.replace(SMALL, absorbed=True, fast=0, fused="fused" in form, dependent=False, ahead=1)
    first = prepare(attention, plan, queries, cached, tiles, 3)[1][0]
    names, asked = first.kernel.arg_names, []
    arguments = [20 if name == "fetched" else x for name, x in zip(names, first.arguments, strict=False)]
    monkeypatch.setattr(
        chain, "_ask", lambda at, size: asked.extend(zip(at.handle.data, size.handle.data, strict=True))
    )
    dataclasses.replace(first, arguments=tuple(arguments)).run()
    found = sorted((int(at), int(at + size)) for at, size in asked if size > 0)
    once = all(end <= begin for (_, end), (begin, _) in zip(found, found[1:], strict=False))
    assert once or "fused" in form  # whose heads share U
    expected = []
    for t in cached.stored:
        token = t[0, 0].nbytes
        for row, parts in ((2, [(0, 20), (48, 68), (96, 116)]), (1, [(0, 16), (16, 31)])):
            expected += [(t[row].data_ptr() + a * token, t[row].data_ptr() + b * token) for a, b in parts]
    if "fused" in form:
        expected += [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (first.arguments[1], first.arguments[3])]
    assert _joined_up(found) == _joined_up(expected)


def _joined_up(spans):
    found = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            begin, last = found.pop()
            end = max(last, end)
        found.append((begin, end))
    return found


@pytest.mark.skipif(not CUDA or not chain.able(torch.device("cuda")), reason="needs a GPU whose launches can overlap")
@torch.no_grad()
@pytest.mark.parametrize("form", ["contextual", "latent", "latent, fast pairs"])
def test_overlapping_launches_give_what_others_do(form):
    """In a graph, whose replays see other lengths and queries; what a kernel reads too early is of the one before."""
    changes = {"head_dim": 128, "rope_theta": 1e4, "rope_scaling_factor": 1.0} if "fast" in form else {}
    attention = layer(2, FORMS[form.partition(",")[0]], **changes)
    queries, cached, _ = filled(attention, [300, 40, 170], 300, BF16)
    queries, cached, ours = queries.to(DEVICE), moved(cached, DEVICE), attention.to(DEVICE, BF16)
    usual = Tiles(absorbed="latent" in form or None, fast=16 if "fast" in form else 0, dependent=False)
    kinds = [dataclasses.replace(usual, dependent=on, fused=fused, ahead=ahead)
             for on in (False, True) for fused in (False, True) for ahead in (0, 1)]  # fmt: skip
    replays = []
    for tiles in kinds:
        attend_triton(ours, queries, cached, tiles, 3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend_triton(ours, queries, cached, tiles, 3)
        replays.append((graph, out))
    for lengths in ([300, 40, 170], [1, 299, 0], [128, 64, 257]):
        cached.lengths.copy_(torch.tensor(lengths))
        queries.mul_(-1)
        live = torch.tensor(lengths) > 0
        expected = attend_reference(ours, queries, cached)[live]
        for tiles, (graph, out) in zip(kinds, replays, strict=True):
            graph.replay()
            error = (out[live] - expected).float().norm() / expected.float().norm()
            assert out.isfinite().all() and error < 3e-2, (tiles, lengths)
