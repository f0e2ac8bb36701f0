"""Who this process is among those of the run, and what they tell each other; a run of one process does none of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tpa_train.errors import UserError

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Returns this process's number; 0 outside of a process group."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """Returns how many processes take part in the run."""
    return dist.get_world_size() if _in_group() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def from_first(work: Callable[[], T]) -> T:
    """Returns on every process what ``work`` returns on the first one, the only one that calls it; the others wait.

    Raises:
        UserError: on every process, where ``work`` raised it.
    """
    if world_size() == 1:
        return work()
    said: list[Any] = [None, None]  # result, error
    if is_first():
        try:
            said[0] = work()
        except UserError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise UserError(said[1])
    return said[0]


def first_of_node(work: Callable[[], T], local_rank: int) -> T:
    """Returns ``work()``; the first process of every node is done before the others begin, and leaves them its files.

    Raises:
        UserError: on every process, where ``work`` raised it on one of the first ones.
    """
    if world_size() == 1:
        return work()
    result, error = None, None
    if local_rank == 0:
        try:
            result = work()
        except UserError as raised:
            error = str(raised)
    for said in gathered(error):
        if said is not None:
            raise UserError(said)
    return result if local_rank == 0 else work()


def gathered(value: T) -> list[T]:
    """Returns what every process passed, in the order of their numbers, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share(items: Sequence[T]) -> Sequence[T]:
    """Returns this process's part of ``items``, dealt one by one; ``merged`` puts results together again."""
    return items[rank() :: world_size()]


def merged(found: dict[K, V]) -> dict[K, V]:
    """Returns the union of all processes' dicts, sorted by key where there are several (so that all iterate alike)."""
    if world_size() == 1:
        return found
    return dict(sorted(item for part in gathered(found) for item in part.items()))


def gather_rows(rows: Tensor) -> list[Tensor]:
    """Returns every process's ``rows`` [N, …], where N may differ, in the order of their numbers."""
    if world_size() == 1:
        return [rows]
    counts = gathered(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def sum_over_processes(total: Tensor) -> Tensor:
    """Returns the sum of ``total`` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def send_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrites ``tensors``, which have the same shapes everywhere, with the first process's."""
    if world_size() > 1:
        for tensor in tensors:
            sent = tensor.contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def raised_anywhere(*flags: bool) -> list[bool]:
    """Returns for each flag whether any process passed True."""
    if world_size() == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised]
