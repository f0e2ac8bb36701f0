"""The one exception for mistakes a user can fix, and the nearest-name helper behind every "did you mean"."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the caller's that one sentence explains; scripts print it without a traceback.

    The message names the option or file at fault and what to do about it.
    """


def check_keys(values: Iterable[str], kind: type, what: str) -> None:
    """Refuses keys that are no field of the dataclass ``kind``.

    Args:
        values: the keys.
        kind: a dataclass.
        what: it describes, for the message.

    Raises:
        UserError: a key is unknown.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise UserError(f"unknown {what} key '{key}'{nearest(key, known)}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns ``; did you mean 'x'?`` for the closest valid name, or a list of the valid ones.

    Args:
        name: what the user wrote.
        valid: the names that would have been accepted.
    """
    names = sorted(str(v) for v in valid)
    # A dotted key is compared by its last part too: `budget.ratoi` should find `budget.cache_ratio`'s siblings first.
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid: {', '.join(names)}" if names else ""
