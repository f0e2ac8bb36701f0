"""Puts this folder on the import path, for the helpers that several test folders share, and makes the tiny run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

# Test processes share the machine's cores; read when torch is imported, by them and by the processes that they start.
# Set in them alone: they would inherit the share of the one that starts them, which is all of the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: without a GPU, its kernels are interpreted


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes the last would run alone: files with the real model come first, then those of most tests."""
    if hasattr(config, "workerinput"):
        real, tests = {item.path for item in items if item.get_closest_marker("real")}, Counter(i.path for i in items)
        items.sort(key=lambda item: (item.path not in real, -tests[item.path]))


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


@pytest.fixture(scope="session", autouse=True)
def undrawn() -> Iterator[Callable]:
    """Reports come without pictures: drawing them takes longer than a tiny run. Gives what draws them."""
    from tpa_train.evaluation import report

    with pytest.MonkeyPatch.context() as patch:
        draw = report._write_plots
        patch.setattr(report, "_write_plots", lambda folder, report: {})
        yield draw


@pytest.fixture
def drawn(undrawn, monkeypatch) -> None:
    """Reports of this test come with their pictures."""
    monkeypatch.setattr("tpa_train.evaluation.report._write_plots", undrawn)


@pytest.fixture(scope="session")
def finished(tiny, undrawn, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of recipe=distill, pictures included; not to be changed."""
    from tpa_train.launch import main

    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpa_train.evaluation.report._write_plots", undrawn)
        assert main(["recipe=distill", *tiny.options, f"run_dir={run}"]) == 0
    return run
