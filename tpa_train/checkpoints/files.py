"""Small files beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpa_train.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in the file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content``, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
