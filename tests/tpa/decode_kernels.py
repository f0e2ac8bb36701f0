"""What tests of the decoding kernels share: where they run, small tiles, and Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (the test extra has it for Linux on x86-64)", allow_module_level=True)
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and not in Triton's interpreter (conftest.py)", allow_module_level=True)

import triton  # noqa: E402, F401
import triton.language as tl  # noqa: E402, F401
from triton.runtime import interpreter  # noqa: E402

from tpa_train.tpa.decode.launch import Launch  # noqa: E402
from tpa_train.tpa.decode.tiles import Tiles  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
SMALL = Tiles(tokens=16, largest=32, columns=16, absorbed=False)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def bounds_of_loops(monkeypatch):
    """Has the interpreter take the bounds of loops from its one-element arrays, which new versions of numpy refuse."""
    patch = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index_too)


@pytest.fixture(autouse=True)
def kernels_stay_inside_their_buffers(monkeypatch):
    """Has the interpreter refuse addresses that lie in none of a launch's tensors: a GPU may read there unpunished."""
    buffers: list[tuple[int, int]] = []
    run, builder = Launch.run, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def extent(t: torch.Tensor) -> int:  # bytes to its last number; a view may have gaps
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return (last + 1) * t.itemsize if t.numel() else 0

    def run_inside(launch):
        parts = [part if isinstance(part, tuple) else (part,) for part in launch.arguments]
        tensors = [t for part in parts for t in part if isinstance(t, torch.Tensor)]
        buffers[:] = sorted((t.data_ptr(), t.data_ptr() + extent(t)) for t in tensors)
        run(launch)
        buffers.clear()

    def check(pointers, mask):
        if not buffers:  # not one of ours
            return
        where = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))[mask.data]
        starts, ends = np.array(buffers, dtype=np.uint64).T
        ends = np.maximum.accumulate(ends)  # views overlap
        index = np.searchsorted(starts, where.astype(np.uint64), "right") - 1
        assert (index >= 0).all() and (where < ends[index]).all(), "a kernel reads or writes beyond its buffers"

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(Launch, "run", run_inside)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
