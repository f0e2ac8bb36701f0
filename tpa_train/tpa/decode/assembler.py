"""Whether the ptxas that Triton assembles kernels with is known to err.

On Hopper, ptxas before 13.1 gives some products wrong addresses in shared memory, and before 13.3 may use registers of
a product that still runs (Triton issues 10486, 10573 and 11366). Triton up to 3.8 has 12.8 or 12.9 for it, 3.9 has
13.4. Seen here with 12.8 on an H100: a tile of 8 warps that tuning tried, of a joint latent and 40 numbers a head,
reads an operand at byte 40,992 of 33,280. The same PTX assembled by 13.5 reads its own; errors against float64 were the
same to five digits (7 cases), times within 3 % (23 cases). Triton 3.8 and 3.9 pass ``--regAllocOptLevel=2`` to it
besides; these ran without.

What goes wrong is a number, or an illegal access, which ends the process: it cannot be caught and passed over. So no
tiles are tried with such a ptxas, and whoever has one is told. Default tiles, of few tokens and of many, read and wrote
their own with 12.8 (``compute-sanitizer``) and agreed with float64: every pair of forms at the size of the 4B, latents
and dense ones at that of the 270M, the commonest at those of the 1B, 12B and 27B.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from importlib import metadata
from typing import Any

import torch
import triton

MENDED = (13, 3)
HOPPER = 9  # major compute capability
WHEEL = "nvidia-cuda-nvcc"

log = logging.getLogger(__name__)


@functools.cache
def trusted(device: torch.device) -> bool:
    """Returns whether tiles may be tried on ``device``; where not, says so once, and what would help."""
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return True
    version, variable = assembler()
    if version is None or _parts(version) >= MENDED:
        return True
    _tell(version, variable, installed())
    return False


@functools.cache
def _tell(version: str, variable: str, found: str | None) -> None:
    needed = ".".join(map(str, MENDED))
    log.warning(
        "Triton assembles with ptxas %s, which gives some kernels wrong addresses on Hopper. Default tiles were "
        "checked with it at the sizes of Gemma 3; no others are tried. To have a newer one, %sset %s=%s, or use Triton "
        "3.9 or later",
        version, "" if found else f"`pip install '{WHEEL}>={needed}'` and ", variable, found or "the path of its ptxas",
    )  # fmt: skip


def assembler() -> tuple[str | None, str]:
    """Returns the version, "12.8", of what Triton assembles for Hopper with, and the variable that names another.

    The version is None where this Triton does not say.
    """
    newer = _parts(triton.__version__) >= (3, 9)  # takes for Hopper what it has for Blackwell
    variable = "TRITON_PTXAS_BLACKWELL_PATH" if newer else "TRITON_PTXAS_PATH"
    try:
        return tool().version, variable
    except (ImportError, AttributeError, TypeError, RuntimeError, OSError):  # there is none, or it cannot be run
        return None, variable


def tool() -> Any:
    """Returns the ptxas, a path and a version, that Triton takes for Hopper."""
    from triton.backends.nvidia import compiler  # not everywhere

    # Triton 3.5 has one for all devices; from 3.6 on it depends on them.
    arguments = [10 * HOPPER][: len(inspect.signature(compiler.get_ptxas).parameters)]
    return compiler.get_ptxas(*arguments)


def installed() -> str | None:
    """Returns the path of the ptxas of an installed nvidia-cuda-nvcc that is new enough."""
    try:
        wheel = metadata.distribution(WHEEL)
        version = wheel.version
    except (metadata.PackageNotFoundError, AttributeError, KeyError):  # or without its metadata
        return None
    file = next((file for file in wheel.files or () if file.name in ("ptxas", "ptxas.exe")), None)
    return None if file is None or _parts(version) < MENDED else str(wheel.locate_file(file))


def _parts(version: str | None) -> tuple[int, ...]:
    """Returns the first two numbers of a version; none where it has no such."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return tuple(map(int, found.groups())) if found else ()
