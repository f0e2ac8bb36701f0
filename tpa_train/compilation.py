"""Compiling parts of models in place, for as long as they train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

RECOMPILES = 256  # graphs of one function; by default eight, after which layers of yet other ranks would run uncompiled


@contextmanager
def compiled(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the context ``parts`` (decoder layers, attentions) run compiled, for the shapes that they are given.

    Parts of one kind and one set of ranks share a graph. Afterwards they are the plain modules that they were: what is
    measured next has other shapes, and would be compiled for each of them.
    """
    parts = list(parts)
    limits = torch._dynamo.config.patch(
        recompile_limit=RECOMPILES, accumulated_recompile_limit=8 * RECOMPILES
    )
    for part in parts:
        part.compile(dynamic=False)
    try:
        with limits:
            yield
    finally:
        for part in parts:
            part._compiled_call_impl = None  # nn.Module.compile has no public opposite
        torch.compiler.reset()  # graphs that nobody will call again, and that count towards the limit
