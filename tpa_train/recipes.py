"""Composing a run's settings: recipes (Hydra groups), the command line's overrides, and the schema they must fit."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tpa_train.distributed.launching import find_cluster, resolve_devices
from tpa_train.errors import UserError, nearest
from tpa_train.settings import RunSettings

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
GROUPS = ("recipe", "model", "data", "trainer", "budget", "logger")
MULTIRUN = ("--multirun", "-m")
# The option that tells a group's choices apart: single options may have overridden the others.
_IDENTITY = {
    "recipe": "recipe.stages", "model": "model.name", "data": "data.kind", "trainer": "trainer.accelerator",
    "budget": "budget.cache_ratio", "logger": "logger.kind",
}  # fmt: skip
# Options that may change when a run goes on elsewhere, as long as an optimizer step takes as many rows.
_LAYOUT = ("devices", "num_nodes", "strategy", "batch_size", "accumulate", "activation_checkpointing")
_SEVERAL = "has several values; add --multirun to run them one after another."


def choices(group: str) -> list[str]:
    """Returns the names that ``group=`` accepts."""
    return sorted(path.stem for path in (RECIPES / group).glob("*.yaml"))


def option_keys(schema: type = RunSettings, prefix: str = "") -> dict[str, tuple[Any, Any, str]]:
    """Returns every dotted option of the schema with its type, default and help (the comment above the field)."""
    hints = typing.get_type_hints(schema)
    comments = _comments(schema)
    found: dict[str, tuple[Any, Any, str]] = {}
    for item in dataclasses.fields(schema):
        kind, key = hints[item.name], prefix + item.name
        if dataclasses.is_dataclass(kind):
            found |= option_keys(kind, f"{key}.")
            continue
        default = item.default_factory() if item.default is dataclasses.MISSING else item.default
        found[key] = (kind, default, comments.get(item.name, ""))
    return found


@functools.cache  # read for every option of every job of a sweep
def _comments(schema: type) -> dict[str, str]:
    """Returns the comment above (or behind) each field, base classes included."""
    comments: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        above: list[str] = []
        for line in inspect.getsource(cls).splitlines():
            stripped = line.strip()
            field = re.match(r"(\w+)\s*:[^#]*(?:#\s*(.*))?$", stripped)
            if stripped.startswith("#"):
                above.append(stripped.lstrip("# "))
            elif field and line.startswith("    ") and not line.startswith("     "):
                text = " ".join(above) or (field.group(2) or "")
                if text:
                    comments[field.group(1)] = text
                above = []
            else:
                above = []
    return comments


def compose(argv: list[str]) -> RunSettings:
    """Returns the settings that the command line asks for.

    Group choices (``recipe=distill``) come first, single options (``budget.cache_ratio=8``) override them. Without a
    ``trainer=`` the machine decides. With ``resume=true`` the interrupted run's own settings are used, and options that
    contradict them are refused.

    Raises:
        UserError: an unknown key or value, with the nearest valid one.
    """
    overrides = [_checked(argument) for argument in argv]
    if not any(o.startswith("trainer=") for o in overrides):
        overrides.append(f"trainer={'gpu' if torch.cuda.is_available() else 'cpu'}")
    composed = _hydra(overrides)
    try:
        # Hydra's own schema lets +key= through: merging into the structured config again refuses what is unknown.
        merged = OmegaConf.merge(OmegaConf.structured(RunSettings), composed)
        settings: RunSettings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "an option"
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
    if settings.resume:
        return _resumed(settings, argv)
    resolve_devices(settings.trainer)
    return settings


def _checked(argument: str) -> str:
    """Returns the override, its ``path`` values quoted for Hydra's grammar.

    Raises:
        UserError: not of the form key=value, or the key or group choice is unknown.
    """
    argument = argument.lstrip("-") if argument.startswith("--") and "=" in argument else argument
    key, separator, value = argument.partition("=")
    key = key.lstrip("+~")
    options = option_keys()
    if not separator:
        raise UserError(f"'{argument}' is not of the form key=value{nearest(key, [*GROUPS, *options])}")
    if key in GROUPS:
        if value not in choices(key):
            if "," in value:
                raise UserError(f"{key}={value} {_SEVERAL}")
            raise UserError(f"{key}={value} is unknown{nearest(value, choices(key))}")
        return f"{key}={value}"
    if key not in options:
        same_leaf = [name for name in options if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        hint = f"; did you mean '{same_leaf[0]}'?" if same_leaf else nearest(key, [*GROUPS, *options])
        raise UserError(f"unknown option '{key}'{hint}")
    if value == "":
        raise UserError(f"{key}= has no value.")
    text = options[key][0]
    plain_text = text is str or str in typing.get_args(text) or key == "data.path"
    if plain_text and value != "null" and not value.startswith(("[", "'", '"')):
        value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{key}={value}"


def _hydra(overrides: list[str]) -> Any:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(RECIPES), version_base="1.3"):
            # The recipe files name a few options; the rest exist in the schema only, hence "+" where needed.
            return hydra_compose("train", overrides=[_additive(o) for o in overrides])
    except HydraException as error:
        said = str(error).splitlines()[0]
        ambiguous = re.match(r"Ambiguous value for argument '\+*(.*)'", said)  # Hydra's words for a comma list
        if ambiguous:
            raise UserError(f"{ambiguous[1]} {_SEVERAL}") from error
        raise UserError(f"cannot read the options: {said}") from error


def _additive(override: str) -> str:
    key = override.partition("=")[0]
    return override if key in GROUPS else f"++{override}"


def _resumed(settings: RunSettings, argv: list[str]) -> RunSettings:
    """Returns the settings stored in ``run_dir``; whatever ``argv`` names must agree with them."""
    if not settings.run_dir:
        raise UserError("resume=true needs run_dir=: which run is to go on?")
    if not (Path(settings.run_dir) / "run.yaml").is_file():
        sweep = (Path(settings.run_dir) / "sweep.json").is_file()
        hint = "it holds a sweep: add --multirun." if sweep else "leave resume out to start one."
        raise UserError(f"resume=true, but there is no run in {settings.run_dir}; {hint}")
    resumed = load_settings(settings.run_dir)
    asked, stored = OmegaConf.structured(settings), OmegaConf.structured(resumed)
    rows = resumed.trainer.rows_per_step
    for argument in argv:
        key = argument.partition("=")[0].lstrip("+-~")
        if key in ("run_dir", "resume"):
            continue
        group, _, option = key.partition(".")
        if group == "trainer" and option in _LAYOUT:
            setattr(resumed.trainer, option, getattr(settings.trainer, option))
            continue
        if key == "trainer" and argument.partition("=")[2] in ("ddp", "fsdp2"):
            raise UserError(
                f"resume=true: {argument} is a choice of many options; name those that change, such as "
                "trainer.devices=2 trainer.strategy=fsdp2."
            )
        compared = _IDENTITY.get(key, key)
        ours, theirs = (OmegaConf.select(c, compared) for c in (asked, stored))
        if ours != theirs and "auto" not in (ours, theirs):  # what auto came to was stored
            raise UserError(
                f"resume=true: {argument} contradicts the interrupted run, where {compared} is {theirs}; leave it out."
            )
    _check_rows(resumed, rows, argv)
    resumed.run_dir, resumed.resume = settings.run_dir, True
    return resumed


def _check_rows(resumed: RunSettings, rows: int, argv: list[str]) -> None:
    """Resolves the devices of a run that goes on; raises UserError if its steps would take other than ``rows`` rows."""
    trainer = resumed.trainer
    changed = [a for a in argv if a.partition("=")[0].lstrip("+-~").removeprefix("trainer.") in _LAYOUT]
    if find_cluster() is not None:  # torchrun or SLURM decides anew, unless somebody insists
        for option in ("devices", "num_nodes"):
            if not any(f"trainer.{option}=" in a for a in changed):
                setattr(trainer, option, 1)
    resolve_devices(trainer)
    if trainer.rows_per_step == rows:
        return
    raise UserError(
        f"resume=true: {' '.join(changed) or 'the number of processes'} contradicts the interrupted run, where an "
        f"optimizer step takes {rows} rows: devices × num_nodes × batch_size × accumulate must stay {rows}, "
        f"not {trainer.rows_per_step}."
    )


def load_settings(run: str | Path) -> RunSettings:
    """Returns the settings that the run in the folder ``run`` was started with.

    Raises:
        UserError: there is no run in the folder, or its run.yaml is damaged.
    """
    path = Path(run) / "run.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: there is no run.yaml in it.")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunSettings), OmegaConf.load(path)))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def help_text() -> str:
    """Returns the help: what can be chosen, and every option with its default."""
    lines = [
        "usage: python scripts/train.py [--multirun] [group=choice …] [option=value …]",
        "",
        "Converts a pretrained Gemma 3 into Tensor Product Attention form, recovers its quality by distillation and",
        "exports it. Without arguments: recipe=distill on the packaged Gemma 3 270M.",
        "With --multirun options may have several values, comma-separated: each combination is run, one after another,",
        "and frontier.md sets quality against cache bytes.",
        "",
        "choices",
    ]
    for group in GROUPS:
        for name in choices(group):
            about = _headline(RECIPES / group / f"{name}.yaml")
            lines.append(f"  {group + '=' + name:<24} {about}")
    lines += ["", "options (defaults before the recipe and trainer choose theirs)"]
    for key, (_, default, comment) in option_keys().items():
        shown = yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()
        lines.append(f"  {key:<40} {comment}{' ' if comment else ''}({shown})")
    lines += [
        "",
        "examples",
        "  python scripts/train.py recipe=distill",
        "  python scripts/train.py model.path=gemma-3-1b-it data=text data.path='notes/*.md' budget=ratio6",
        "  python scripts/train.py run_dir=runs/mine resume=true",
        "  python scripts/train.py --multirun budget.cache_ratio=2,3,4,6,8 budget.bits=8",
    ]
    return "\n".join(lines)


def _headline(path: Path) -> str:
    """Returns a recipe file's first comment line that is not a Hydra directive."""
    for line in path.read_text().splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ")
    return ""
