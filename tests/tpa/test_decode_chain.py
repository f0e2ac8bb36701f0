"""Overlapping launches: see ``decode.chain``."""

import dataclasses

import pytest
import torch
from decode_cases import FORMS, filled, layer, moved
from decode_kernels import BF16, CUDA, DEVICE, F32, SMALL

from tpa_train.tpa.decode import chain
from tpa_train.tpa.decode.launch import attend_triton, prepare
from tpa_train.tpa.decode.plan import plan_of
from tpa_train.tpa.decode.reference import attend_reference
from tpa_train.tpa.decode.tiles import Tiles


def test_launches_of_a_step_overlap_where_the_device_can(monkeypatch):
    attention = layer(2, FORMS["latent"]).float()
    queries, cached, _ = filled(attention.double(), [18, 7], 20, F32)
    tiles = dataclasses.replace(SMALL, absorbed=True, fast=0, dependent=True)
    args = (attention.float(), plan_of(attention, F32, torch.device("cpu")), queries, cached)

    def options(splits: int, **changes) -> list[tuple]:
        launches = prepare(*args, dataclasses.replace(tiles, **changes), splits)[1]
        return [tuple(item.options.get(name) for name in ("DEPENDENT", "launch_pdl")) for item in launches]

    if not CUDA:
        assert options(2) == 4 * [(False, None)]
    monkeypatch.setattr(chain, "able", lambda device: True)
    chained = [(True, None), *3 * [(True, True)]]  # the first waits for everything before the step
    assert options(2) == options(2, dependent=None) == chained
    assert options(2, dependent=False) == 4 * [(False, None)]
    assert options(1, absorbed=False) == [(False, None)]  # nothing follows


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
    kinds = [dataclasses.replace(usual, dependent=on) for on in (False, True)]
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
