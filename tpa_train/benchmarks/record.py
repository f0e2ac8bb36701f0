"""The file that a benchmark leaves: what was measured, on which card, by which versions and command."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tpa_train.errors import UserError
from tpa_train.evaluation.atomic import write_text
from tpa_train.evaluation.report import json_safe, table
from tpa_train.evaluation.report import versions as package_versions

PACKAGES = ("torch", "triton", "lightning", "liger-kernel")


def make_record(command: str, settings: Any, rows: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Any]:
    """Returns ``{"card", "versions", "command", "settings", "rows"}``, fit for JSON; ``settings``: a dataclass."""
    return json_safe(
        {
            "card": card(device),
            "versions": versions(),
            "command": command,
            "settings": dataclasses.asdict(settings),
            "rows": list(rows),
        }
    )


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes ``record`` to ``path`` in one piece, its folder included.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(Path(path).expanduser(), json.dumps(record, indent=1, allow_nan=False) + "\n")


def check_out(path: str | None) -> None:
    """Raises UserError if nothing can be written at ``path``: better before the measurement than after."""
    if path is None:
        return
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"out={path} is a folder; name a file in it, such as out={file / 'benchmark.json'}.")
    folder = file.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"out={path} cannot be written: {folder} is no folder that you may write to.")


def card(device: torch.device) -> str:
    """Returns the name of the GPU, or of the CPU with the number of threads that are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Returns the versions of what shapes a measurement; what is not installed is left out."""
    found = {"tpa_train": _own_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found | package_versions(PACKAGES)


def _own_version() -> str:
    """Returns the toolkit's version, also from a checkout that was never installed."""
    try:
        return importlib.metadata.version("tpa-train")
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
        return tomllib.loads(text)["project"]["version"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "unknown"


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows that may have different keys as one table."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    return table(head, [[_cell(row.get(key)) for key in head] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
