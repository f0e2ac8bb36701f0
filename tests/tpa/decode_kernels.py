"""What tests of the decoding kernels share: where they run, small tiles, and Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

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
