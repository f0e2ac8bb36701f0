"""Chat templates: conversations as the stretches of text that a tuned model was trained on, and their token ids.

A checkpoint's own template (Jinja, as transformers keeps it) is used where it has one, else Gemma 3's, which is built
in. What people and data sets write stays text: a ``<end_of_turn>`` typed by a user is spelled out in ordinary tokens
(``Tokenizer.literal``), since as a control token it would let anybody put words into the model's mouth.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tpa_train.errors import UserError
from tpa_train.gemma3.tokenizer import TURN_NAMES, Tokenizer, without_marks

ROLES = ("system", "user", "assistant")
START, END = TURN_NAMES

Message = Mapping[str, str]
"""{"role": one of ROLES, "content": text}"""


class Stretch(NamedTuple):
    """A piece of a rendered conversation."""

    text: str  # rendered, with `Tokenizer.literal` marks
    by_model: bool  # what the model would write itself: a turn's text and the piece that ends the turn


class Conversation(tuple[Stretch, ...]):
    """A rendered conversation; concatenated, its stretches are what the template gives."""

    @property
    def text(self) -> str:
        """For people and hashes."""
        return without_marks("".join(stretch.text for stretch in self))


class ChatTemplate:
    """Renders conversations and says which part of them is the model's.

    Args:
        tokenizer: its ``chat_template`` is used; Gemma 3's own format where it is None.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.source = tokenizer, tokenizer.chat_template

    def render(self, messages: Sequence[Message]) -> Conversation:
        """Returns the conversation with every turn of the model set apart.

        Raises:
            UserError: roles do not alternate, a turn of the model is empty, or the template refuses something.
        """
        _check(messages)
        literal = self._literal(messages)
        return Conversation(_builtin(literal) if self.source is None else self._stretches(literal))

    def prompt(self, messages: Sequence[Message]) -> str:
        """Returns the text that asks the model for the next turn, with ``literal`` marks.

        Raises:
            UserError: as ``render``.
        """
        _check(messages)
        literal = self._literal(messages)
        if self.source is None:
            return "".join(s.text for s in _builtin(literal)) + f"{START}model\n"
        return self._jinja(literal, add_generation_prompt=True)

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids that ask for an answer to ``text``, one user's turn."""
        rendered = self.prompt([{"role": "user", "content": text}])
        return self.with_bos(self.tokenizer.encode_rendered([rendered])[0])

    def encode(self, conversations: Sequence[Conversation]) -> list[tuple[list[int], list[bool]]]:
        """Returns ids and, for each id, whether the model would write it; every conversation begins with ``<bos>``.

        Stretches are tokenised one by one: at inference, too, what the model writes begins a token of its own.
        """
        flat = [stretch for conversation in conversations for stretch in conversation]
        encoded = iter(self.tokenizer.encode_rendered([stretch.text for stretch in flat]))
        rows = []
        for conversation in conversations:
            ids: list[int] = []
            mask: list[bool] = []
            for stretch in conversation:
                part = next(encoded)
                ids += part
                mask += [stretch.by_model] * len(part)
            whole = self.with_bos(ids)
            rows.append((whole, [False] * (len(whole) - len(ids)) + mask))
        return rows

    def with_bos(self, ids: list[int]) -> list[int]:
        """Returns ``ids`` with ``<bos>`` before them, unless the template wrote it."""
        bos = self.tokenizer.bos_id
        return ids if ids[:1] == [bos] else [bos, *ids]

    def _literal(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        return [{"role": m["role"], "content": self.tokenizer.literal(m["content"])} for m in messages]

    # ------------------------------------------------------------------------------------------ a checkpoint's own

    def _stretches(self, messages: list[dict[str, str]]) -> list[Stretch]:
        """Finds the model's turns in what the checkpoint's template renders.

        A turn is what appears between the prompt for it and the rest, so the template must render a conversation's
        beginning as the beginning of the whole (all but a few do).
        """
        whole, stretches, at = self._jinja(messages), [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._jinja(messages[:index], add_generation_prompt=True)
            after = self._jinja(messages[: index + 1])
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= at):
                raise UserError(
                    "the checkpoint's chat template does not render one turn after the other, so the model's turns "
                    "cannot be told apart; use data.train_on=all."
                )
            # The model's own output ends with the piece that closes its turn; line breaks after it are the template's.
            end = len(before) + len(after[len(before) :].rstrip())
            end = end if after[:end].endswith(">") else len(after)
            stretches += [Stretch(whole[at : len(before)], False), Stretch(whole[len(before) : end], True)]
            at = end
        return [s for s in (*stretches, Stretch(whole[at:], False)) if s.text]

    def _jinja(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        import jinja2

        if not messages:  # templates look at the first message
            return ""
        names = {name: f"<{name[:3]}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **names
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses the conversation: {_sentence(error)}.") from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"the checkpoint's chat template fails ({type(error).__name__}: {error}).") from error

    @cached_property
    def _compiled(self) -> Any:
        """The template, in the sandbox and with the functions that transformers gives to templates."""
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %}: marks the model's part for transformers; here its content is taken as it is."""

            tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"the checkpoint's chat template is not valid Jinja ({_sentence(error)}).") from error


def _builtin(messages: Sequence[Message]) -> list[Stretch]:
    """Renders in the format of the template published with Gemma 3 (google/gemma-3-*-it, chat_template.json).

    The system prompt becomes the head of the first user's turn; contents are stripped, the system prompt is not.
    """
    first, turns = "", list(messages)
    if turns and turns[0]["role"] == "system":
        first = turns.pop(0)["content"] + "\n\n"
    stretches, text = [], "<bos>"
    for index, message in enumerate(turns):
        if (message["role"] == "user") != (index % 2 == 0):
            raise UserError("conversation roles must alternate user/assistant/user/assistant.")
        content = message["content"].strip()
        if message["role"] == "user":
            text += f"{START}user\n{first if index == 0 else ''}{content}{END}\n"
        else:
            stretches += [Stretch(f"{text}{START}model\n", False), Stretch(content + END, True)]
            text = "\n"
    return [*stretches, Stretch(text, False)]


def _check(messages: Sequence[Message]) -> None:
    if not any(m["role"] == "user" for m in messages):
        raise UserError("the conversation has no turn of a user.")
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise UserError(f"message {number}, a turn of the assistant, is empty.")
        if message["role"] == "system" and number > 1:
            raise UserError(f"message {number} is a system prompt; only the first one can be.")


def _sentence(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
