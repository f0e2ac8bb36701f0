"""Compiling the passes of a training stage, for as long as it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tpa_train.distributed.processes import world_size
from tpa_train.distributed.sharding import wrapped_forwards

if TYPE_CHECKING:
    from tpa_train.distillation.modules import RecoveryModule
    from tpa_train.settings import TrainerSettings

LEAST_STEPS = 500  # of a stage, for which passes are compiled: on an H100 that takes the 270M's 67 to 120 seconds
RECOMPILES = 64  # graphs of one function; by default eight, after which other shapes would silently run uncompiled


@contextmanager
def compiled(owner: Any, names: tuple[str, ...], recorded: bool = False) -> Iterator[None]:
    """Inside the context the methods ``names`` of ``owner`` run compiled, for the shapes that they are given.

    A pass is one graph over all layers: with a graph for each layer, starting them takes the host as long as computing
    them takes a GPU. Afterwards ``owner`` is what it was: what is measured next has other shapes, and would be compiled
    for each of them.

    ``recorded``: passes are replayed as CUDA graphs. What one returns is overwritten when it runs for the next batch.
    """
    options = {"mode": "reduce-overhead"} if recorded else {}
    for name in names:
        vars(owner)[name] = torch.compile(getattr(owner, name), dynamic=False, **options)
    try:
        with many_graphs():
            yield
    finally:
        for name in names:
            del vars(owner)[name]  # the class's own method shows again


@contextmanager
def many_graphs() -> Iterator[None]:
    """Inside the context a function may have many compiled graphs, which are forgotten afterwards."""
    # DDP would have graphs cut where its buckets end, which costs more than to reduce all gradients after them.
    limits = torch._dynamo.config.patch(
        recompile_limit=RECOMPILES, accumulated_recompile_limit=8 * RECOMPILES, optimize_ddp=False
    )
    try:
        with limits:
            yield
    finally:
        torch.compiler.reset()  # graphs that nobody will call again


def worth_compiling(options: TrainerSettings, steps: int) -> bool:
    """Returns whether a stage of so many steps is compiled: where that was asked for, and it can win back its time."""
    return options.compile and steps >= LEAST_STEPS


@contextmanager
def stage_forwards(
    module: RecoveryModule, options: TrainerSettings, sharded: bool, device: torch.device, alike: bool = False
) -> Iterator[None]:
    """Inside the context a stage's passes run on ``device`` as the options say: compiled, recomputed, both or neither.

    Sharded weights are gathered layer by layer by hooks, so that each layer is then compiled on its own. ``alike``:
    whether batches have one of a few shapes, so that what one of them did can be replayed for others.
    """
    layers = [*module.teacher.layers, *module.student.layers]
    with ExitStack() as stack:
        if sharded or options.activation_checkpointing:
            compiles = sharded and options.compile
            if compiles:
                stack.enter_context(many_graphs())
            stack.enter_context(wrapped_forwards(layers, compiles, options.activation_checkpointing))
        if options.compile and not sharded:
            stack.enter_context(compiled(module, module.passes, alike and _may_record(module, options, device)))
        yield


def _may_record(module: RecoveryModule, options: TrainerSettings, device: torch.device) -> bool:
    """Whether passes can be CUDA graphs: the host is then ahead of a GPU that needs 30 us a kernel.

    Gradients that are added up, or reduced over processes, outlive the replay that they came from.
    """
    alone = options.accumulate == 1 and world_size() == 1 and not options.activation_checkpointing
    return module.records and alone and device.type == "cuda"
