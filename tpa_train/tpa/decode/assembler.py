"""Whether the ptxas that Triton has may be trusted with tiles that nobody has run yet.

On Hopper, ptxas before 13.1 gives some products wrong addresses in shared memory, and before 13.3 may use registers of
a product that still runs (Triton issues 10486, 10573 and 11366). Seen here with 12.8 on an H100: a tile of 8 warps that
tuning tried, of a joint latent and 40 numbers a head, reads an operand at byte 40,992 of 33,280. The same PTX assembled
by 13.5 reads its own; errors against float64 were the same to five digits (7 cases), times within 3 % (23 cases). What
goes wrong is a number, or an illegal access, which ends the process: it cannot be caught and passed over. Default tiles
were looked at with 12.8 (``compute-sanitizer``, and errors against float64).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from pathlib import Path

import torch

MENDED = (13, 3)
HOPPER = 9  # major compute capability
WHEEL = "cu13/bin/ptxas"  # of nvidia-cuda-nvcc, in the namespace package ``nvidia``

log = logging.getLogger(__name__)


@functools.cache
def trusted(device: torch.device) -> bool:
    """Returns whether tiles may be tried on ``device``; where not, says so once, and what would help."""
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return True
    version = assembler_version()
    if version is None or tuple(int(n) for n in version.split(".")) >= MENDED:
        return True
    needed = ".".join(map(str, MENDED))
    found = _installed()
    log.warning(
        "tiles are not measured: Triton assembles with ptxas %s, which gives some tiles wrong addresses on Hopper; "
        "%sset TRITON_PTXAS_PATH=%s (%s or later), or use a Triton that has it",
        version, "" if found else "`pip install nvidia-cuda-nvcc` and ", found or f"its {WHEEL}", needed,
    )  # fmt: skip
    return False


def assembler_version() -> str | None:
    """Returns the version, "12.8", of what Triton assembles for Hopper with; None where this Triton does not say."""
    try:
        from triton.backends.nvidia import compiler

        # Triton 3.5 has one for all devices; from 3.6 on it depends on them.
        found = compiler.get_ptxas(10 * HOPPER) if compiler.get_ptxas.__code__.co_argcount else compiler.get_ptxas()
        return found.version
    except (ImportError, AttributeError, RuntimeError):  # RuntimeError: there is none
        return None


def _installed() -> Path | None:
    """Returns the ptxas of an installed nvidia-cuda-nvcc."""
    spec = importlib.util.find_spec("nvidia")
    paths = [Path(base) / WHEEL for base in (spec and spec.submodule_search_locations) or ()]
    return next((path for path in paths if path.exists()), None)
