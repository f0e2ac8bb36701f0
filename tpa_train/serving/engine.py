"""The engine: requests come and go while others decode (continuous batching; Orca, OSDI 2022, §4).

A step of the engine takes one token further every request that decodes, in one forward pass, and reads up to a chunk of
the prompts of those that came later. A request has a row of the cache from its first chunk to its last token; the next
one in the queue takes the row over.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.cache import KVCache
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.serving import memory
from tpa_train.serving.decoder import Decoder
from tpa_train.serving.prompts import check_prompt, prefill_chunks, stop_ids
from tpa_train.serving.requests import FinishReason, Request, Update
from tpa_train.serving.sampling import Sampling, SeenTokens, random_seed, sample
from tpa_train.serving.slots import SlotCache

PREFILL_CHUNK = 1024  # tokens of prompts a step; bounds their mask and scores, and how long others wait


@dataclass(eq=False)
class _Running:
    """A request that has a row."""

    request: Request
    row: int
    cache: KVCache  # the row, while its prompt is read
    chunks: Iterator[dict[str, Tensor | None]]
    held: int = 0  # tokens in the row
    last: int | None = None  # the token that comes next into the row; None while the prompt is read


class Engine:
    """Serves requests on one model. ``submit`` and ``cancel`` may be called from any thread, ``step`` from one.

    Args:
        model: dense or converted, on its device; with a tokenizer, where texts or stop strings are wanted.
        max_batch: sequences that decode at once; as many as memory has room for, at most 64, when left out.
        context: tokens of a prompt and its answer together, at most the model's; the model's when left out.
        dtype: of the cache, where a layer does not quantize it; the weights' own when left out.
        prefill_chunk: tokens of prompts that a step reads; 1024 when left out.
        graphs: replay decoding steps as CUDA graphs (``serving.decoder``); on a GPU, when left out.
        fuse: compile parts of them when they are recorded, which takes a while.
        at_most: bound of ``max_batch`` where it is left out.

    Raises:
        UserError: the batch does not fit into memory; the message names what would.
    """

    def __init__(
        self,
        model: Gemma3ForCausalLM,
        max_batch: int | None = None,
        context: int | None = None,
        dtype: torch.dtype | None = None,
        prefill_chunk: int | None = None,
        graphs: bool | None = None,
        fuse: bool = False,
        at_most: int = memory.DEFAULT_ROWS,
    ) -> None:
        self.model, self._dtype = model, dtype
        self.prefill_chunk = PREFILL_CHUNK if prefill_chunk is None else prefill_chunk
        longest = model.config.max_context
        context = longest if context is None else context
        if not 1 <= context <= longest:
            raise UserError(f"context={context} must lie between 1 and the model's, {longest}.")
        for name, value in (("max_batch", max_batch), ("prefill_chunk", self.prefill_chunk)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1.")
        rows = memory.choose_rows(model, max_batch, context, self.prefill_chunk, dtype, at_most)
        self.cache = SlotCache(model, rows, context, dtype)
        self.decoder = Decoder(model, self.cache, graphs, fuse)
        self._seen = SeenTokens(rows, model.head_weight.shape[0], self.cache.device)
        self._free = list(range(rows))  # sorted: the first rows are the first to be used
        self._running: list[_Running] = []
        self._waiting: deque[Request] = deque()
        self._requests: dict[Hashable, Request] = {}  # waiting or running, by id
        self._cancelled: set[Hashable] = set()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._ends = frozenset() if model.tokenizer is None else frozenset(stop_ids(model))

    # ------------------------------------------------------------------------------------------------ any thread

    @property
    def max_batch(self) -> int:
        return self.cache.rows

    @property
    def context(self) -> int:
        return self.cache.capacity

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._requests

    @property
    def load(self) -> tuple[int, int]:
        """How many requests have a row, and how many wait for one."""
        return len(self._running), len(self._waiting)

    def submit(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 128,
        *,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Iterable[int] | None = None,
        images: Tensor | None = None,
        id: Hashable | None = None,
        on_update: Callable[[Update], None] | None = None,
        **rules,
    ) -> Request:
        """Queues a prompt; ``step`` answers it.

        Args:
            prompt: text, or ids (``prompts.encode_prompts`` makes them of chats and images).
            max_tokens: the answer has at most so many tokens.
            sampling: how tokens are chosen; or its fields as keywords: temperature, top_k, top_p, min_p,
                repetition_penalty, seed. Without a seed it is a random one.
            stop: the answer's text ends before the first of these strings.
            stop_ids: ids that end it; end of sequence and end of turn when left out.
            images: bytes of the prompt's images, [N, 3, S, S].
            id: names the request; a number when left out.
            on_update: called with every ``Update``, in the thread that steps.

        Returns:
            The request, which fills as it is answered.

        Raises:
            UserError: the prompt cannot be read or does not fit, a rule is out of range, or the id is taken.
        """
        if sampling is None:
            sampling = Sampling(**{"seed": random_seed(), **{k: v for k, v in rules.items() if v is not None}})
        elif rules:
            raise UserError(f"give sampling= or its fields, not both ({', '.join(rules)}).")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        tokenizer = self.model.tokenizer
        if tokenizer is None and (stop or isinstance(prompt, str)):
            raise UserError("this model was loaded without a tokenizer; put tokenizer.model beside its weights.")
        if not all(stop):
            raise UserError("stop= has an empty string, which every text begins with; leave it out.")
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        check_prompt(self.model, ids, images)
        self._check_length(len(ids), max_tokens)
        ends = self._ends if stop_ids is None else frozenset(stop_ids)
        with self._lock:
            id = next(n for n in self._numbers if n not in self._requests) if id is None else id
            if id in self._requests:
                raise UserError(f"id={id}: a request of this name is being answered; choose another.")
            request = Request(id, ids, max_tokens, sampling, stop, ends, images, on_update, tokenizer)
            self._requests[id] = request
            self._waiting.append(request)
        return request

    def cancel(self, request: Request | Hashable) -> bool:
        """Ends a request in the next step, with what it has; returns whether it was still being answered."""
        id = request.id if isinstance(request, Request) else request
        with self._lock:
            if id not in self._requests or isinstance(request, Request) and self._requests[id] is not request:
                return False
            self._cancelled.add(id)
            return True

    def _check_length(self, prompt: int, max_tokens: int) -> None:
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens} must be at least 1.")
        if prompt + max_tokens <= self.context:
            return
        longest, more = self.model.config.max_context, ""
        whose = "model's context" if self.context == longest else "engine's context"
        if prompt + max_tokens <= longest:
            free = memory.foresee(self.model, 1, self.context, self.prefill_chunk).free + self.cache.nbytes
            options = {"dtype": self._dtype, "free": free}
            fits = memory.largest_context(self.model, self.max_batch, self.prefill_chunk, **options)
            more = f", or raise context= ({fits} tokens would fit with max_batch={self.max_batch})"
        raise UserError(
            f"the prompt ({prompt} tokens) and max_tokens ({max_tokens}) exceed the {whose} of {self.context} tokens; "
            f"shorten one of them{more}."
        )

    # ------------------------------------------------------------------------------------------- the stepping thread

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Takes every request that decodes one token further, and reads a chunk of waiting prompts.

        Returns:
            What it added, finished requests' last updates among them; none where nothing waits or runs.
        """
        updates = self._cancel()
        try:
            updates += self._decode([r for r in self._running if r.last is not None])
            updates += self._prefill()
        except BaseException:
            self.clear()  # rows in an unknown state serve nobody
            raise
        self._tell(updates)
        return updates

    def stream(self, *requests: Request) -> Iterator[Update]:
        """Steps until ``requests`` are answered, and yields their updates; others are answered meanwhile."""
        while not all(r.finished for r in requests):
            yield from (update for update in self.step() if update.request in requests)

    def run(self) -> None:
        """Steps until nothing waits or runs."""
        while not self.idle:
            self.step()

    def clear(self) -> None:
        """Ends all requests, as cancelled."""
        with self._lock:
            dropped = list(self._requests.values())
            self._requests.clear()
            self._waiting.clear()
            self._cancelled.clear()
        self._free, self._running = list(range(self.max_batch)), []
        self._tell([request.end("cancelled") for request in dropped])

    @staticmethod
    def _tell(updates: list[Update]) -> None:
        for update in updates:
            if update.request.on_update is not None:
                update.request.on_update(update)

    def _cancel(self) -> list[Update]:
        with self._lock:
            named, self._cancelled = self._cancelled, set()
            waiting = [r for r in self._waiting if r.id in named]
            self._waiting = deque(r for r in self._waiting if r.id not in named)
        updates = [self._finish(request, "cancelled") for request in waiting]
        for running in [r for r in self._running if r.request.id in named]:
            self._leave(running)
            updates.append(self._finish(running.request, "cancelled"))
        return updates

    def _finish(self, request: Request, reason: FinishReason) -> Update:
        update = request.end(reason)
        self._forget(request)
        return update

    def _forget(self, request: Request) -> None:
        with self._lock:
            self._requests.pop(request.id, None)
            self._cancelled.discard(request.id)

    def _leave(self, running: _Running) -> None:
        self._running.remove(running)
        self._free.append(running.row)
        self._free.sort()

    def _decode(self, batch: list[_Running]) -> list[Update]:
        """Feeds the last token of each to the model and chooses the next."""
        if not batch:
            return []
        busy = {r.row for r in batch}
        spare = [(r.row, r.held) for r in self._running if r.row not in busy] + [(row, 0) for row in self._free]
        logits = self.decoder([r.last for r in batch], [r.row for r in batch], [r.held for r in batch], spare)
        for running in batch:
            running.held += 1
        return self._choose(batch, logits)

    def _prefill(self) -> list[Update]:
        """Reads prompts, the first ones first, until a chunk of tokens is read or no row is free."""
        room, whole, others, ready, hidden = self.prefill_chunk, [], [], [], []
        while room > 0:
            unread = (r for r in self._running if r.last is None and r not in whole and r not in others)
            running = next(unread, None) or self._admit()
            if running is None:
                break
            request = running.request
            if running.held == 0 and request.images is None and len(request.prompt) <= room:
                whole.append(running)  # with the other short ones, below
                room -= len(request.prompt)
                continue
            others.append(running)
            room -= self._read(running, hidden)
            if running.held == len(request.prompt):
                ready.append(running)
        if whole:
            hidden.append(self._read_whole(whole))
        return self._choose(ready + whole, self.model.logits(torch.cat(hidden))) if hidden else []

    def _read(self, running: _Running, hidden: list[Tensor]) -> int:
        """Reads the next chunk of a prompt, and if it is the last, adds its final hidden state; returns its tokens."""
        step = next(running.chunks)
        last, count = self.model.hidden_states(**step, cache=running.cache)[:, -1], step["token_ids"].shape[1]
        running.held += count
        if running.held == len(running.request.prompt):
            hidden.append(last)
        return count

    def _read_whole(self, batch: list[_Running]) -> Tensor:
        """Reads the prompts of ``batch`` in one pass; returns their final hidden states, [B, D]."""
        prompts = [running.request.prompt for running in batch]
        cache = self.cache.prompts([running.row for running in batch], [len(prompt) for prompt in prompts])
        ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=self.cache.device)
        for running in batch:
            running.held = len(running.request.prompt)
        return self.model.hidden_states(ids, cache=cache)[0, cache.documents.cu_seqlens[1:].long() - 1]

    def _admit(self) -> _Running | None:
        """Gives the first waiting request a free row, if there are both."""
        with self._lock:
            if not self._waiting or not self._free:
                return None
            request = self._waiting.popleft()
        row = self._free.pop(0)
        chunks = prefill_chunks(self.model, request.prompt, request.images, self.prefill_chunk)
        running = _Running(request, row, self.cache.row(row), chunks)
        self._running.append(running)
        self._seen.begin(row, request.sampling, request.prompt)
        return running

    def _choose(self, batch: list[_Running], logits: Tensor) -> list[Update]:
        """Chooses a token for each of ``batch`` from its logits [B, V]; those that are finished leave."""
        vision = self.model.config.vision
        if vision is not None:  # never written: it stands for an image that is given
            logits[:, vision.image_token_id :][:, :1] = -torch.inf  # nothing, where it is beyond them
        requests = [running.request for running in batch]
        rows, rules = [running.row for running in batch], [request.sampling for request in requests]
        tokens = sample(logits, rules, [request.steps for request in requests], self._seen.of(rows, rules))
        self._seen.add(rows, rules, tokens)
        updates = []
        for running, token in zip(batch, tokens.tolist(), strict=True):
            update = running.request.accept(token)
            running.last = token
            if running.request.finished:
                self._leave(running)
                self._forget(running.request)
            updates.append(update)
        return updates
