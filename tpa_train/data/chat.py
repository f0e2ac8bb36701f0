"""Records of conversations as data sets really hold them, turned into messages with the roles of ``gemma3.chat``.

    {"messages": [{"role": "user", "content": "…"}, …]}                OpenAI; content may be a list of text parts
    {"conversations": [{"from": "human", "value": "…"}, …]}            ShareGPT
    {"prompt": "…", "completion": "…"}                                 either may also be a list of messages (TRL)
    {"instruction": "…", "input": "…", "output": "…"}                  Alpaca; input may be missing or empty

A "system" field beside any of them is the system prompt. Other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpa_train.errors import UserError, nearest

SHAPES = "messages, conversations, prompt + completion, instruction + output"
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip


def conversation_of(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns ``[{"role": "system" | "user" | "assistant", "content": text}, …]``.

    Raises:
        UserError: the record has no known shape, a role is unknown, or a content is not text.
    """

    def has(*keys: str) -> bool:
        return all(record.get(key) is not None for key in keys)

    if has("messages"):
        messages = _messages(record["messages"], "messages")
    elif has("conversations"):
        messages = _messages(record["conversations"], "conversations")
    elif has("prompt", "completion"):
        messages = _side(record["prompt"], "prompt", "user") + _side(record["completion"], "completion", "assistant")
    elif has("instruction", "output"):
        question = _text(record["instruction"], "instruction")
        if record.get("input"):
            question += "\n\n" + _text(record["input"], "input")
        messages = _pair(question, _text(record["output"], "output"))
    else:
        known = ("messages", "conversations", "prompt", "completion", "instruction", "output")
        hints = [hint for key in record if "mean" in (hint := nearest(key, known))]
        found = ", ".join(map(str, record)) or "no fields"
        raise UserError(f"the record has none of the known shapes ({SHAPES}), but {found}{(hints or ['.'])[0]}")
    if record.get("system") and messages[:1] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(record["system"], "system")})
    return messages


def _messages(value: Any, key: str) -> list[dict[str, str]]:
    if isinstance(value, Mapping):  # a table of columns, as `datasets` stores a list of records
        lengths = {len(column) for column in value.values() if isinstance(column, (list, tuple))}
        if len(lengths) != 1 or not all(isinstance(column, (list, tuple)) for column in value.values()):
            raise UserError(f"'{key}' is an object, not a list of messages.")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, tuple)) or not value:
        found = f"a {type(value).__name__}" if value else "empty"
        raise UserError(f"'{key}' is {found}, not a list of messages.")
    messages = []
    for number, message in enumerate(value, start=1):
        where = f"message {number} of '{key}'"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is a {type(message).__name__}, not an object with role and content.")
        role = message.get("role") or message.get("from")
        if role is None:
            raise UserError(f"{where} has neither a 'role' nor a 'from' field.")
        if not isinstance(role, str) or role not in _ROLES:
            raise UserError(f"{where} has the role '{role}'; known: {', '.join(_ROLES)}.")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        messages.append({"role": _ROLES[role], "content": _text(content, where)})
    return messages


def _side(value: Any, key: str, role: str) -> list[dict[str, str]]:
    if isinstance(value, (list, tuple)):
        return _messages(value, key)
    return [{"role": role, "content": _text(value, key)}]


def _pair(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(value: Any, where: str) -> str:
    """Returns a content's text; parts are stripped and joined, as Gemma 3's template does."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        parts = []
        for part in value:
            part = part if isinstance(part, Mapping) else {"type": type(part).__name__}
            if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                raise UserError(f"{where} holds a part of the type '{part.get('type')}'; only text is supported.")
            parts.append(part["text"].strip())
        return "".join(parts)
    raise UserError(f"{where} has {'no content' if value is None else f'a {type(value).__name__} for its text'}.")
