"""Kernels of a step that are compiled side by side before it runs: see ``decode.precompile``."""

import threading
from types import SimpleNamespace

import pytest
import torch
from decode_cases import FORMS, filled, layer, moved
from decode_kernels import BF16, CUDA, DEVICE, F32, SMALL

from tpa_train.tpa.decode import launch, precompile
from tpa_train.tpa.decode.launch import Launch, attend_triton
from tpa_train.tpa.decode.reference import attend_reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(precompile, "_compiled", set())


@torch.no_grad()
def test_a_gathered_step_launches_nothing_and_names_what_it_would(monkeypatch):
    attention = layer(2, FORMS["latent"])
    queries, cached, _ = filled(attention, [18, 7], 20, F32)
    args = (attention.to(DEVICE, F32), queries.to(DEVICE, F32), moved(cached, DEVICE))
    ran = []
    monkeypatch.setattr(launch.Launch, "run", lambda item: ran.append(item.kernel))
    with precompile.gathering() as found:
        out = attend_triton(*args, SMALL, 2)
        assert not ran and out.shape == queries.shape[:2] + (out.shape[-1],)
    names = [item.kernel for item in found]
    assert len(names) >= 2 and not any(isinstance(x, torch.Tensor) for item in found for x in item.arguments)
    assert all(isinstance(x, precompile.Address) for item in found for x in item.arguments[0:2])
    *_, last = launch.prepare(args[0], launch.plan_of(args[0], F32, args[1].device), *args[1:], SMALL, 2)[1]
    assert precompile.identity(last, CPU) == precompile.identity(found[-1], CPU)
    attend_triton(*args, SMALL, 2)
    assert ran == names  # the same kernels, once nobody gathers


def _launch(built: list, name: str = "attend", dtype: torch.dtype = F32, fails: bool = False, **options) -> Launch:
    def warmup(*arguments, grid, **constants):
        if fails:
            raise RuntimeError("ptxas")
        built.append((name, arguments[0].dtype, constants, threading.get_ident()))

    kernel = SimpleNamespace(__name__=name, warmup=warmup)
    return Launch(kernel, (1, 2), (torch.zeros(4, dtype=dtype), (torch.zeros(2),), 3), options)


def test_every_kernel_is_compiled_once_for_its_constants_and_types_in_other_threads():
    built: list = []
    items = [_launch(built, T=16), _launch(built, T=32), _launch(built, T=16), _launch(built, "combine", T=16)]
    items += [_launch(built, dtype=BF16, T=16)]
    precompile.compile_all(items, CPU)
    found = {(name, dtype, options["T"]) for name, dtype, options, _ in built}
    assert found == {("attend", F32, 16), ("attend", F32, 32), ("combine", F32, 16), ("attend", BF16, 16)}
    assert len(built) == 4 and threading.get_ident() not in {thread for *_, thread in built}
    precompile.compile_all([*items, _launch(built, T=64)], CPU)  # only what is new
    assert [options["T"] for _, _, options, _ in built[4:]] == [64]


def test_pointers_of_another_alignment_are_another_kernel():
    built: list = []
    whole = torch.zeros(8)
    items = [Launch(_launch(built).kernel, (1,), (t,), {}) for t in (whole, whole[4:], whole[1:])]
    assert len({precompile.identity(item, CPU) for item in items}) == 2


def test_a_kernel_that_cannot_be_compiled_says_so_and_is_tried_again():
    built: list = []
    with pytest.raises(RuntimeError, match="ptxas"):
        precompile.compile_all([_launch(built, fails=True)], CPU)
    precompile.compile_all([_launch(built)], CPU)
    assert len(built) == 1


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@torch.no_grad()
def test_a_compiled_step_gives_what_another_does():
    attention = layer(2, FORMS["latent"])
    queries, cached, _ = filled(attention, [18, 7], 20, F32)
    args = (attention.to(DEVICE, F32), queries.to(DEVICE, F32), moved(cached, DEVICE))
    exact = attend_reference(attention.double(), queries.to(DEVICE).double(), moved(cached, DEVICE))
    attention.float()
    precompile.compile_step(lambda: attend_triton(*args, SMALL, 2), torch.device("cuda", 0))
    assert len(precompile._compiled) >= 2
    torch.testing.assert_close(attend_triton(*args, SMALL, 2).double(), exact, rtol=1e-3, atol=1e-4)
