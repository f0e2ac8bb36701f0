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
import shlex
import shutil
import subprocess
import threading
from functools import cache
from pathlib import Path

import torch

from tpa_train.errors import UserError
from tpa_train.evaluation.atomic import replacing

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "native_products.h", "native_numbers.h"))
# Contraction: a product and a sum are rounded once, as everywhere in a matrix product.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=gnu11", "-shared", "-fPIC")
SECONDS = 120  # that compiling may take; it takes one or two

log = logging.getLogger(__name__)
_lock = threading.Lock()


def load() -> ctypes.CDLL | None:
    """Returns the compiled library, or None where there is none to be had."""
    with _lock:  # threads must not compile beside each other
        return _load()


@cache
def _load() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError, UserError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("decoding on the CPU does without its compiled kernel: %s", " ".join(detail.split())[:300])
        return None
    found.tpa_attend.restype = ctypes.c_int64
    return found


@cache
def has_tiles() -> bool:
    """Returns whether the kernel may multiply bfloat16 in tiles (AMX) on this CPU."""
    found = load()
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

    named = shlex.split(os.environ.get("CC", ""))[:1]
    compiler = next(filter(None, map(shutil.which, (*named, "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise UserError("there is no C compiler (cc, gcc or clang, or what the variable CC names).")
    identity = "\0".join((_output(compiler, "--version"), _cpu(), *FLAGS)).encode()
    key = hashlib.sha256(b"\0".join((identity, *(source.read_bytes() for source in SOURCES)))).hexdigest()[:16]
    target = cache_folder() / "native" / f"decode-{key}.so"
    if not target.exists():
        with replacing(target, ".so") as temporary:
            _output(compiler, *FLAGS, str(SOURCES[0]), "-o", str(temporary))
    return target


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout


def _cpu() -> str:
    """Returns what decides which instructions ``-march=native`` means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    named = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))
