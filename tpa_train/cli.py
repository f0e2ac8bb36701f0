"""``key=value`` command lines for the small scripts, checked against a dataclass.

The dataclass is the whole interface: its fields are the keys (nested ones dotted), their types the checks, and

    field(default=…, metadata={"help": "one sentence", "choices": ("a", "b")})

their help. A field without default is required. Texts are taken as they stand, so that prompts may hold '=', commas,
quotes and ``${…}``; everything else goes through OmegaConf.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tpa_train.errors import UserError, nearest

T = TypeVar("T")
HELP = ("--help", "-h", "help")


@dataclass(frozen=True)
class _Option:
    """One dotted key of a schema."""

    key: str
    type: Any  # without its None
    optional: bool  # None is a value
    default: Any  # MISSING for required ones
    help: str
    choices: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        return self.type is str

    @property
    def is_texts(self) -> bool:
        return typing.get_origin(self.type) is list and typing.get_args(self.type) == (str,)

    @property
    def type_name(self) -> str:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        if self.choices:
            return " | ".join(self.choices)
        return "text, may be repeated" if self.is_texts else names.get(self.type, str(self.type))


def parse(schema: type[T], argv: Sequence[str], prog: str, description: str) -> T:
    """Turns ``key=value`` arguments into an instance of ``schema``.

    Args:
        schema: a dataclass; nested dataclasses make dotted keys. ``str``, ``int``, ``float``, ``bool``, ``list[str]``
            (repeat the key to add values) and any of them ``| None`` (``key=null`` sets None).
        argv: arguments without the program's name.
        prog: shown in the help, such as "python scripts/evaluate.py".
        description: first lines of the help.

    Raises:
        UserError: an unknown key (with the nearest one), a value of the wrong type, or a missing required key.
        SystemExit: with status 0, after printing the help.
    """
    options = {option.key: option for option in _options(schema)}
    if any(argument in HELP for argument in argv):
        print(_help(list(options.values()), prog, description))
        raise SystemExit(0)
    config = OmegaConf.structured(schema)
    texts: dict[str, Any] = {}  # kept out of OmegaConf, which would read ${...} in them
    for argument in argv:
        key, separator, value = argument.partition("=")
        bare = key.lstrip("-")  # people write --model=x
        if bare not in options:
            what = f"unknown option '{key}'" if separator else f"'{argument}' is not of the form key=value"
            raise UserError(f"{what}{_nearest_key(bare, options)}")
        option = options[bare]
        if not separator:
            raise UserError(f"'{argument}' has no value; write {bare}=VALUE.")
        if option.optional and value == "null":
            texts.pop(bare, None)
            OmegaConf.update(config, bare, None)
        elif option.is_text:
            texts[bare] = _choice(option, value)
        elif option.is_texts:
            texts.setdefault(bare, []).append(value)
        else:
            OmegaConf.update(config, bare, _value(option, value))
    for key, option in options.items():
        if option.default is MISSING and key not in texts and OmegaConf.is_missing(config, key):
            raise UserError(f"{key}= is missing ({option.help or option.type_name}); see {prog} --help.")
    for key in texts:  # a placeholder, so that required texts do not count as missing
        OmegaConf.update(config, key, [] if options[key].is_texts else "")
    result = OmegaConf.to_object(config)
    for key, value in texts.items():
        *path, leaf = key.split(".")
        owner = result
        for name in path:
            owner = getattr(owner, name)
        setattr(owner, leaf, value)
    return result


def run_main(main: Callable[[], int | None]) -> typing.NoReturn:
    """Runs a script's main function and exits with its status.

    A ``UserError`` becomes one line on stderr and status 2, Ctrl-C status 130, and a reader that went away
    (``| head``) a quiet 141. Anything else is a bug and keeps its traceback.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def choose_device(name: str | None):
    """Returns the torch device called ``name``; None takes an accelerator if there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    import torch  # parsing and --help do without

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} cannot be used here ({str(error).splitlines()[0]}).") from error
    return device


def _options(schema: type, prefix: str = "") -> list[_Option]:
    hints = typing.get_type_hints(schema)
    options = []
    for item in dataclasses.fields(schema):
        kind, optional = _without_none(hints[item.name])
        key = prefix + item.name
        if dataclasses.is_dataclass(kind):
            options += _options(kind, f"{key}.")
            continue
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        elif default is dataclasses.MISSING:
            default = MISSING
        metadata = item.metadata
        options.append(
            _Option(key, kind, optional, default, metadata.get("help", ""), tuple(metadata.get("choices", ())))
        )
    return options


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [a for a in typing.get_args(hint) if a is not type(None)]
        if len(others) == 1:
            return others[0], True
    return hint, False


def _choice(option: _Option, value: str) -> str:
    if option.choices and value not in option.choices:
        raise UserError(f"{option.key}={value} is not a choice{nearest(value, option.choices)}")
    return value


def _value(option: _Option, text: str) -> Any:
    """Reads a value that is not a text, by OmegaConf's rules for the field's type."""
    _choice(option, text)
    try:
        probe = OmegaConf.create({"value": yaml.safe_load(text) if text else None})
        node = OmegaConf.to_container(probe)["value"]
        if node is None or isinstance(node, bool) != (option.type is bool):  # "context=true" is not a 1
            raise ValueError
        typed = dataclasses.make_dataclass("Probe", [("value", option.type, dataclasses.field(default=MISSING))])
        return OmegaConf.structured(typed(value=node)).value
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        hint = nearest(text, ("true", "false")) if option.type is bool else "."
        raise UserError(f"{option.key}={text}: expected {option.type_name}{hint}") from error


def _nearest_key(key: str, options: dict[str, _Option]) -> str:
    """The nearest full key, or the one whose last part was meant (``path`` for ``data.path``)."""
    same_leaf = [name for name in options if name.rsplit(".", 1)[-1] == key]
    return f"; did you mean '{same_leaf[0]}'?" if same_leaf else nearest(key, options)


def _help(options: list[_Option], prog: str, description: str) -> str:
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    required = " ".join(f"{o.key}=…" for o in options if o.default is MISSING)
    lines = [f"usage: {prog} {required} [key=value …]".replace("  ", " "), "", textwrap.dedent(description).strip(), ""]
    column = max(len(o.key) for o in options) + 4
    for option in options:
        default = "required" if option.default is MISSING else f"default {_show(option.default)}"
        text = f"{option.help} " if option.help else ""
        body = textwrap.wrap(f"{text}({option.type_name}; {default})", max(30, width - column))
        lines.append(f"  {option.key}".ljust(column) + body[0])
        lines += [" " * column + part for part in body[1:]]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value in ("", []) else str(value)
