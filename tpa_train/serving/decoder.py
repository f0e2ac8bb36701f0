"""One decoding step of many sequences: as plain PyTorch, or replayed as a CUDA graph.

On a GPU a step of a small model takes its kernels less time than the host needs to launch them. A graph launches them
all at once. It is recorded for a few batch sizes; a smaller batch runs in the next larger one, whose spare places point
at rows that do not decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from tpa_train.gemma3.layers import MLP, RMSNorm
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.serving.slots import SlotCache
from tpa_train.tpa.decode.precompile import compile_step

STEPS_BEFORE_GRAPH = 4  # of a batch size, before it is worth recording: that takes about as long as four plain steps
WARM_UP = 2  # runs on the side stream: kernels are compiled and tuned, and libraries take their memory


def batch_sizes(rows: int) -> list[int]:
    """Returns the sizes that graphs are recorded for: powers of two below ``rows``, and ``rows``."""
    sizes = [1 << i for i in range(rows.bit_length()) if 1 << i < rows]
    return [*sizes, rows]


class Decoder:
    """Runs ``model`` on one token of each of several rows of ``cache``.

    Args:
        model: dense or converted.
        cache: of the same model.
        graphs: record CUDA graphs; None: where the cache is on a GPU. Elsewhere there are none.
        fuse: record compiled norms and feed-forward blocks: fewer kernels, which each read
            and write less, for the time that compiling takes when a batch size is recorded.
    """

    def __init__(
        self, model: Gemma3ForCausalLM, cache: SlotCache, graphs: bool | None = None, fuse: bool = False
    ) -> None:
        self.model, self.cache, self.fuse = model, cache, fuse
        self.uses_graphs = self._can_record() and graphs is not False
        self.sizes = batch_sizes(cache.rows)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._runs = dict.fromkeys(self.sizes, 0)
        self._compiled: set[int] = set()  # batch sizes whose kernels are
        if self.uses_graphs:
            with torch.inference_mode(False):
                # What a graph reads and writes stays where it is: token, row, start, active of each place.
                self._inputs = torch.zeros(4, cache.rows, dtype=torch.int64, device=cache.device)
                shape = (cache.rows, model.head_weight.shape[0])
                self._logits = torch.zeros(shape, dtype=model.head_weight.dtype, device=cache.device)
            self._prepare()

    def _can_record(self) -> bool:
        """Whether the device launches kernels, which can be compiled first and recorded."""
        return self.cache.device.type == "cuda"

    def _prepare(self) -> None:
        # Graphs run one after the other and leave their result outside, so they may share their workspace.
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(self.cache.device)

    @torch.inference_mode()
    def __call__(
        self, tokens: Sequence[int], rows: Sequence[int], lengths: Sequence[int], spare: Sequence[tuple[int, int]] = ()
    ) -> Tensor:
        """Returns the logits [B, V] that follow one more token of each sequence.

        They are overwritten by the next call.

        Args:
            tokens: the sequences' last tokens, not yet in the cache.
            rows: of the cache, all different.
            lengths: tokens that each row holds.
            spare: the other rows and what they hold, where there are any; not needed without graphs.
        """
        count = len(tokens)
        size = next(s for s in self.sizes if s >= count)
        if not self.uses_graphs:
            places = torch.tensor([tokens, rows, lengths, [1] * count], device=self.cache.device)
            self._compile(places, size)
            # A CPU reads whole caches: what is beyond the longest sequence need not be read.
            longest = max(lengths) + 1 if self.cache.device.type == "cpu" else None
            return self._run(places, list(rows) == list(range(count)), longest)
        spare = spare[: size - count]
        assert len(spare) == size - count, "every row decodes or is spare"
        host = torch.tensor([
            [*tokens, *[0] * len(spare)], [*rows, *[row for row, _ in spare]], [*lengths, *[held for _, held in spare]],
            [1] * count + [0] * len(spare),
        ])  # fmt: skip
        self._inputs[:, :size].copy_(host, non_blocking=True)  # from pageable memory: it is read at once
        self._runs[size] += 1
        self._compile(self._inputs[:, :size], size)
        if size not in self._graphs and self._runs[size] <= STEPS_BEFORE_GRAPH:
            return self._run(self._inputs[:, :size])[:count]
        if size not in self._graphs:
            self._record(size)
        self._graphs[size].replay()
        return self._logits[:count]

    def _run(self, places: Tensor, in_order: bool = False, longest: int | None = None) -> Tensor:
        """Returns logits [B, V] for ``places`` int64 [4, B]; nothing here waits for the device."""
        tokens, rows, starts, active = places
        step = self.cache.step(rows, starts, active, in_order, longest)
        hidden = self.model.hidden_states(tokens[:, None], cache=step)
        return self.model.logits(hidden[:, 0])

    def _compile(self, places: Tensor, size: int) -> None:
        """Compiles the kernels of a batch size before its first step: as ``_record``, this leaves nothing behind."""
        if self._can_record() and size not in self._compiled:
            compile_step(lambda: self._run(places), self.cache.device)
            self._compiled.add(size)

    def _record(self, size: int) -> None:
        """Records the graph of a batch size.

        Warming up and recording write the same entries to the same places as the replay that follows, so they leave
        nothing behind.
        """
        with fused(self.model) if self.fuse else nullcontext():
            self._graphs[size] = self._capture(size)

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        places = self._inputs[:, :size]
        self._side.wait_stream(torch.cuda.current_stream(self.cache.device))
        with torch.cuda.stream(self._side):
            for _ in range(WARM_UP):
                self._logits[:size].copy_(self._run(places))
        torch.cuda.current_stream(self.cache.device).wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a server's) may use the device meanwhile: only this thread's calls are recorded.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            self._logits[:size].copy_(self._run(places))
        return graph


@contextmanager
def fused(model: Gemma3ForCausalLM) -> Iterator[None]:
    """Inside the context norms and feed-forward blocks of ``model`` run compiled.

    These are the parts that many layers share: each is compiled once for a shape. Attention has kernels of its own, and
    entries are packed as they are everywhere: a compiler may leave out that scales are rounded before they are used.
    What was compiled is kept: recorded graphs run it.
    """
    from tpa_train.compilation import RECOMPILES

    parts = [part for part in model.modules() if isinstance(part, (RMSNorm, MLP))]
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILES, accumulated_recompile_limit=8 * RECOMPILES):
            for part in parts:
                vars(part)["forward"] = torch.compile(part.forward, dynamic=False)
            yield
    finally:
        for part in parts:
            vars(part).pop("forward", None)  # the class's own method shows again
