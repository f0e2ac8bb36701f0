"""OpenAI's completions and chat completions: requests checked field by field, and the shapes of answers and errors.

https://platform.openai.com/docs/api-reference/completions and /chat. Fields that would change the answer and are not
supported are refused unless they ask for nothing; a misspelt one gets the nearest valid name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.chat import ROLES, Message
from tpa_train.serving.sampling import Sampling, random_seed

COMPLETION_TOKENS = 16  # of a completion that names no limit, as OpenAI's
MAX_STOPS, MAX_PROMPTS = 16, 64
RULES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_SHARED = ("model", "stream", "stream_options", "stop", "max_tokens", *RULES)
FIELDS = {"completion": (*_SHARED, "prompt"), "chat": (*_SHARED, "messages", "max_completion_tokens")}
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Not supported: accepted only where they ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip


class RequestError(Exception):
    """A request that is refused: HTTP status, and OpenAI's ``message``, ``param`` and ``code``."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Call:
    """What a request asks for. ``prompts``: texts or ids, of a completion; ``messages``: of a chat."""

    kind: str
    model: str
    prompts: list[str | list[int]]
    messages: list[Message]
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


def read_call(body: Any, kind: str, model: str) -> Call:
    """Reads the body of a request.

    Args:
        body: decoded JSON.
        kind: "completion" or "chat".
        model: the name of the one that is served.

    Raises:
        RequestError: a field is missing, unknown, of a wrong type or out of range.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object.")
    values = {key: value for key, value in body.items() if value is not None and key not in IGNORED}
    _check_known(values, kind)
    chat = kind == "chat"
    named = _take(values, "model", _text, model)
    if named != model:
        raise RequestError(
            f"there is no model '{named}' here, only '{model}'.", "model", status=404, code="model_not_found"
        )
    limit = _take(values, "max_completion_tokens", _count, None)
    limit = _take(values, "max_tokens", _count, None if chat else COMPLETION_TOKENS) if limit is None else limit
    options = _take(values, "stream_options", _object, {})
    if wrong := options.keys() - {"include_usage", "include_obfuscation"}:
        raise RequestError(f"stream_options has no '{min(wrong)}'.", "stream_options")
    return Call(
        kind, model,
        prompts=[] if chat else _prompts(values.get("prompt")),
        messages=_messages(values.get("messages")) if chat else [],
        max_tokens=limit,
        sampling=_sampling(values),
        stop=_stops(values.get("stop", [])),
        stream=_take(values, "stream", _flag, False),
        include_usage=_take(options, "include_usage", _flag, False),
    )  # fmt: skip


def _check_known(values: Mapping[str, Any], kind: str) -> None:
    for name, value in values.items():
        if name in FIELDS[kind]:
            continue
        if name not in NOTHING:
            raise RequestError(f"unknown field '{name}'{nearest(name, FIELDS[kind])}", name, code="unknown_parameter")
        if not any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in NOTHING[name]):
            raise RequestError(f"'{name}' is not supported here; leave it out.", name, code="unsupported_parameter")


def _sampling(values: Mapping[str, Any]) -> Sampling:
    rules = {
        "temperature": _take(values, "temperature", _number, 1.0),
        "top_p": _take(values, "top_p", _number, None),
        "top_k": _take(values, "top_k", _count, None),
        "min_p": _take(values, "min_p", _number, None),
        "repetition_penalty": _take(values, "repetition_penalty", _number, 1.0),
        "seed": _take(values, "seed", _integer, None),
    }
    rules["seed"] = random_seed() if rules["seed"] is None else rules["seed"]
    try:
        return Sampling(**rules)
    except UserError as error:
        raise RequestError(str(error), str(error).partition("=")[0]) from error


def _prompts(value: Any) -> list[str | list[int]]:
    """One text, several, the ids of one, or of several."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        raise RequestError("'prompt' must be a text, token ids, or a list of texts or of lists of ids.", "prompt")
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"{len(prompts)} prompts are too many for a request; at most {MAX_PROMPTS}.", "prompt")
    return prompts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RequestError("'messages' must be a list of at least one message.", "messages")
    messages = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RequestError(f"{where} must be an object with role and content.", where)
        role = message.get("role")
        role = "system" if role == "developer" else role
        if role not in ROLES:
            raise RequestError(f"{where}.role is {role!r}; valid: {', '.join(ROLES)}.", f"{where}.role")
        messages.append({"role": role, "content": _content(message.get("content"), f"{where}.content")})
    if messages[-1]["role"] != "user":
        raise RequestError("the last message must be a user's, for the model to answer.", "messages")
    return messages


def _content(value: Any, where: str) -> str:
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{where} must be a text, or a list of parts of type 'text'.", where)
    return "".join(texts)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops) or len(stops) > MAX_STOPS:
        raise RequestError(f"'stop' must be a text or a list of at most {MAX_STOPS}, none of them empty.", "stop")
    return tuple(stops)


def _take(values: Mapping[str, Any], name: str, read: Callable[[str, Any], Any], default: Any) -> Any:
    return read(name, values[name]) if values.get(name) is not None else default


def _kind(name: str, value: Any, right: bool, what: str) -> Any:
    if not right:
        raise RequestError(f"'{name}' must be {what}, not {str(value)[:40]!r}.", name)
    return value


def _text(name: str, value: Any) -> str:
    return _kind(name, value, isinstance(value, str), "a text")


def _flag(name: str, value: Any) -> bool:
    return _kind(name, value, isinstance(value, bool), "true or false")


def _object(name: str, value: Any) -> dict:
    return _kind(name, value, isinstance(value, dict), "an object")


def _number(name: str, value: Any) -> float:
    return _kind(name, value, isinstance(value, (int, float)) and not isinstance(value, bool), "a number")


def _integer(name: str, value: Any) -> int:
    return _kind(name, value, type(value) is int, "a whole number")


def _count(name: str, value: Any) -> int:
    return _kind(name, value, type(value) is int and value >= 1, "a whole number of at least 1")


# ------------------------------------------------------------------------------------------------------------ answers


def usage(prompt: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def answer(call: Call, texts: list[str], reasons: list[str], used: Mapping[str, int]) -> dict[str, Any]:
    """Returns the whole answer of a request that is not streamed."""

    def choice(index: int) -> dict[str, Any]:
        said = ({"message": {"role": "assistant", "content": texts[index], "refusal": None}} if call.kind == "chat"
                else {"text": texts[index]})  # fmt: skip
        return {"index": index, **said, "logprobs": None, "finish_reason": reasons[index]}

    return _envelope(call, [choice(i) for i in range(len(texts))]) | {"usage": dict(used)}


def chunk(call: Call, index: int, text: str, reason: str | None = None, first: bool = False) -> dict[str, Any]:
    """Returns one part of a streamed answer; ``first``: the one that opens a chat's turn."""
    if call.kind == "chat":
        said = {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})}
    else:
        said = {"text": text}
    choices = [{"index": index, **said, "logprobs": None, "finish_reason": reason}]
    return _envelope(call, choices, chunk=True) | ({"usage": None} if call.include_usage else {})


def usage_chunk(call: Call, used: Mapping[str, int]) -> dict[str, Any]:
    """Returns the last part of a stream whose request wants its usage."""
    return _envelope(call, [], chunk=True) | {"usage": dict(used)}


def _envelope(call: Call, choices: list[dict[str, Any]], chunk: bool = False) -> dict[str, Any]:
    prefix, name = ("chatcmpl-", "chat.completion") if call.kind == "chat" else ("cmpl-", "text_completion")
    name += ".chunk" if chunk and call.kind == "chat" else ""
    return {"id": prefix + call.id, "object": name, "created": call.created, "model": call.model, "choices": choices}
