"""Compiling ``native.c`` with the system's C compiler, once for a source, a compiler and a CPU.

The library lies in the toolkit's cache folder (``checkpoints.locate.cache_folder``). Where it cannot be made, callers
get None and use PyTorch; a line in the log says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch


SOURCE = Path(__file__).with_name("native.c")
# Contraction: a product and a sum are rounded once, as everywhere in a matrix product.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=gnu11", "-shared", "-fPIC")
SECONDS = 120  # that compiling may take; it takes one or two

log = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled library, or None where there is none to be had."""
    try:
        found = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("decoding on the CPU goes without its compiled kernel: %s", " ".join(detail.split())[:300])
        return None
    found.tpa_attend.restype = ctypes.c_int64
    return found


@cache
def has_tiles() -> bool:
    """Returns whether the kernel may multiply bfloat16 in tiles (AMX) on this CPU."""
    found = library()
    return found is not None and bool(found.tpa_tiles())


@cache
def parallel() -> ctypes.c_void_p:
    """Returns the entry into the threads that PyTorch itself runs on, or NULL where it has no OpenMP.

    With threads of its own the kernel would wait for cores on which PyTorch's still spin.
    """
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError):
        return ctypes.c_void_p()


def _compiled() -> Path:
    from tpa_train.checkpoints.locate import cache_folder  # its package imports models, which import this one

    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler (cc, gcc or clang, or the variable CC)")
    version = _output(compiler, "--version")
    key = hashlib.sha256("\0".join((version, _cpu(), *FLAGS)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    target = cache_folder() / "native" / f"decode-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Another process may do the same: each has its own file until it is whole.
        handle, temporary = tempfile.mkstemp(".so", ".decode-", target.parent)
        os.close(handle)
        try:
            _output(compiler, *FLAGS, str(SOURCE), "-o", temporary)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return target


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout


def _cpu() -> str:
    """Returns what decides which instructions ``-march=native`` means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}))
