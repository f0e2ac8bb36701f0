"""Compiles the kernels of a step before it runs, side by side.

A converted model may have other ranks and widths in every layer, and each is a kernel of its own that Triton compiles
for 4 to 10 seconds when it is first launched: one after another, minutes for a model. Most of that time is spent in
LLVM and ptxas, outside of Python's lock, so that threads divide it. What was compiled stays in Triton's cache on disk.

So a step is run once without its attention kernels, which are gathered instead (what attention gives is then not
filled), compiled, and the step that counts follows. Of tensors only types and addresses are gathered: held for all
layers at once, what kernels write for each other would take many times what a step does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

WORKERS = 16  # at most; each takes some hundred MB while it compiles
SHOWN = 4  # kernels to compile from which on a bar is shown

_gathered: ContextVar[list[Compilable] | None] = ContextVar("gathered", default=None)
_compiled: set[str] = set()  # what this process has compiled, as ``identity`` names it


class Compilable(Protocol):
    """A kernel, its arguments and its constants: ``launch.Launch``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]


@dataclass(frozen=True)
class Address:
    """What a kernel is compiled for of a tensor."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@contextmanager
def gathering() -> Iterator[list[Compilable]]:
    """Inside the context this thread's launches are gathered in the list that it gives, and do not run."""
    found: list[Compilable] = []
    token = _gathered.set(found)
    try:
        yield found
    finally:
        _gathered.reset(token)


def gathers() -> bool:
    """Whether this thread's launches are gathered: what a step computes is then not what it will."""
    return _gathered.get() is not None


def gather(launches: Sequence[Compilable]) -> bool:
    """Takes ``launches`` where they are gathered; returns whether they are."""
    found = _gathered.get()
    if found is not None:
        found += [replace(item, arguments=_without_memory(item.arguments)) for item in launches]
    return found is not None


def _without_memory(value: Any) -> Any:
    """Returns an argument with addresses instead of tensors, or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_without_memory(v) for v in value)
    return Address(value.dtype, value.data_ptr()) if isinstance(value, Tensor) else value


def compile_step(step: Callable[[], object], device: torch.device) -> None:
    """Compiles the attention kernels that ``step`` would run on ``device``.

    Args:
        step: runs twice without harm; what it computes is thrown away here.
    """
    with gathering() as found:
        step()
    compile_all(found, device)


def compile_all(launches: Sequence[Compilable], device: torch.device) -> None:
    """Compiles every kernel among ``launches`` for every set of constants and types, once in a process.

    Raises:
        whatever compiling one of them raises.
    """
    new = {name: item for item in launches if (name := identity(item, device)) not in _compiled}

    def enter() -> None:  # a new thread would compile for the first device
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def build(item: Compilable) -> None:
        item.kernel.warmup(*item.arguments, grid=item.grid, **item.options)

    hidden = True if len(new) < SHOWN else None  # None: where nobody looks
    with (
        ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1, max(1, len(new))), initializer=enter) as threads,
        tqdm(total=len(new), desc="compiling kernels", unit="kernel", leave=False, disable=hidden) as bar,
    ):
        jobs = [threads.submit(build, item) for item in new.values()]
        try:
            for job in as_completed(jobs):
                job.result()
                bar.update()
        finally:
            for job in jobs:
                job.cancel()
    _compiled.update(new)


def identity(item: Compilable, device: torch.device) -> str:
    """Returns what a compiled kernel depends on, as text: constants, types, and how addresses are aligned."""

    def kind(value: Any) -> Any:
        if isinstance(value, tuple):
            return [kind(v) for v in value]
        if isinstance(value, Tensor | Address):
            return str(value.dtype), value.data_ptr() % 16 == 0
        return type(value).__name__

    return repr((item.kernel.__name__, device, kind(item.arguments), sorted(item.options.items())))
