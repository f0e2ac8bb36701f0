"""Times short work on a device as it would take inside a decoder: nothing in the caches, no launches counted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

REPEATS = 20  # of which the median counts
SECONDS = 0.3  # after which nothing more is repeated, but for the first three times
COPIED = {"cuda": 1 << 30, "cpu": 1 << 24}  # bytes of the copy that measures bandwidth
MULTIPLIED = {"cuda": 8192, "cpu": 256}  # rows and columns of the product that measures the rate of matrix units


@dataclass(frozen=True)
class Timing:
    """``us``: median microseconds. ``graph``: whether launches were left out, by a CUDA graph."""

    us: float
    graph: bool


class Stopwatch:
    """Times work on ``device``.

    On CUDA the work is captured in a CUDA graph and its replay timed with events, after the second-level cache was
    filled with other data. What the graph leaves in (about as long as an empty kernel takes) counts for every row.
    """

    def __init__(self, device: torch.device, repeats: int = REPEATS, seconds: float = SECONDS) -> None:
        self.device, self.repeats, self.seconds = device, repeats, seconds
        self.cuda = device.type == "cuda"
        if self.cuda:
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
            self._written, self._read = (torch.zeros(size // 4, dtype=torch.int32, device=device) for _ in range(2))

    def flush(self) -> None:
        """Leaves nothing in the second-level cache that a kernel could use or would have to write back."""
        self._written.zero_()
        # Reading drives the written lines out: otherwise the timed kernel would wait for them.
        self._read.amax()

    def time(self, work: Callable[[], Any]) -> Timing:
        """Returns the median time of ``work``, which has run before (so that everything is compiled).

        Raises:
            RuntimeError: the work failed, or was out of memory.
        """
        if not self.cuda:
            return Timing(1e6 * statistics.median(self._repeat(lambda: self._clock(work))), False)
        replay, graph = self._captured(work)
        times = self._repeat(lambda: self._events(replay))
        return Timing(1e6 * statistics.median(times), graph)

    def _repeat(self, once: Callable[[], float]) -> list[float]:
        times: list[float] = []
        while len(times) < self.repeats and (len(times) < 3 or sum(times) < self.seconds):
            times.append(once())
        return times

    def _clock(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _events(self, replay: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()  # takes longer than the host needs to ask for the rest
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def _captured(self, work: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
        """Returns a replay of ``work``, or ``work`` itself where it cannot be captured, and which of them it is."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize(self.device)  # raises where the device itself has failed
            work()
            return work, False
        graph.replay()
        return graph.replay, True

    def copy_rate(self) -> float:
        """Returns the bytes a second, read and written together, of a copy on the device."""
        source = torch.randint(0, 255, (COPIED[self.device.type],), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2e6 * source.numel() / self.time(lambda: target.copy_(source)).us

    def multiply_rate(self) -> float:
        """Returns the operations a second of a bfloat16 matrix product on the device."""
        n = MULTIPLIED[self.device.type]
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        out = a @ b
        return 2e6 * n**3 / self.time(lambda: torch.mm(a, b, out=out)).us

    def empty_us(self) -> float:
        """Returns the microseconds that a kernel with next to nothing to do takes by this clock."""
        one = torch.zeros(1, device=self.device)
        return self.time(one.zero_).us
