"""Puts this folder on the import path, for the helpers that several test folders share, and makes the tiny run."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

# Test processes share the machine's cores; read when torch is imported, by them and by the processes that they start.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# Without a GPU's driver Triton's kernels run in its interpreter. Read when Triton is imported, as PyTorch does.
with contextlib.suppress(OSError):
    ctypes.CDLL("libcuda.so.1")
    os.environ.setdefault("TRITON_INTERPRET", "0")
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A tiny model, a text, a cache folder and the options of a run on them."""
    from tiny_runs import run_options, training_options, write_model, write_text_file

    folder = tmp_path_factory.mktemp("tiny")
    model, text, cache = write_model(folder / "model"), write_text_file(folder / "text.txt"), folder / "cache"
    return SimpleNamespace(
        model=model, text=text, cache=cache, options=run_options(model, text, cache),
        training_options=training_options(text, cache),
    )  # fmt: skip


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of recipe=distill; not to be changed."""
    from tpa_train.launch import main

    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["recipe=distill", *tiny.options, f"run_dir={run}"]) == 0
    return run
