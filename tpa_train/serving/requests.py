"""A request, what it has been answered so far, and the text of an answer as it becomes certain."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tpa_train.gemma3.tokenizer import StreamDecoder
from tpa_train.serving.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]


class TextStream:
    """Ids to text, piece by piece, that ends before the first stop string.

    What might become a stop string is held back, so no part of one ever shows. Which of several is the first does not
    depend on where tokens end: the one that is complete first, and of two that end together the longer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._stop, self._held, self.stopped = tuple(stop), "", False

    def push(self, token: int) -> str:
        """Takes the next id and returns the text that has become certain."""
        return "" if self._decoder is None else self._add(self._decoder.push(token))

    def flush(self) -> str:
        """Returns what is still held back; call it when no more ids come."""
        if self._decoder is None:
            return ""
        text = self._add(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _add(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        # The longest end that is the beginning of a stop string.
        longest = min(len(text), max((len(s) - 1 for s in self._stop), default=0))
        hold = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


@dataclass(frozen=True)
class Update:
    """What a step of the engine added to one request.

    ``tokens``: new ids; ``text``: what became certain of the text, often of earlier tokens; ``finish_reason``: set in
    the request's last update.
    """

    request: Request
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Request:
    """One prompt and its answer; made by ``Engine.submit``.

    Attributes:
        id: names it in the engine.
        prompt: token ids.
        max_tokens: the answer has at most so many tokens.
        sampling: how tokens are chosen.
        stop: the text ends before the first of these.
        stop_ids: ids that end the answer; they are no part of it.
        images: of the prompt, bytes [N, 3, S, S], or None.
        on_update: called with every update, in the thread that steps the engine.
        tokens: the answer's ids; a stop string's own are among them, a stop id is not.
        text: the answer so far, as far as it is certain.
        steps: tokens chosen so far, a stop id included.
        finish_reason: "stop" (a stop id or string), "length" (``max_tokens``), "cancelled", or None while it goes on.
    """

    id: Hashable
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    images: Tensor | None = None
    on_update: Callable[[Update], None] | None = None
    tokenizer: Any = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    steps: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._stream = TextStream(self.tokenizer, self.stop)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def accept(self, token: int) -> Update:
        """Adds the token that was chosen; returns what came of it."""
        self.steps += 1
        if token in self.stop_ids:
            return self.end("stop")
        self.tokens.append(token)
        text = self._stream.push(token)
        if self._stream.stopped or self.steps == self.max_tokens:
            rest = self.end("stop" if self._stream.stopped else "length", text)
            return Update(self, (token,), rest.text, rest.finish_reason)
        self.text += text
        return Update(self, (token,), text)

    def end(self, reason: FinishReason, text: str = "") -> Update:
        """Finishes the request: ``text``, and what was held back, is the last of it."""
        text += self._stream.flush()
        self.text, self.finish_reason = self.text + text, "stop" if self._stream.stopped else reason
        return Update(self, (), text, self.finish_reason)
