"""Programmatic dependent launch: a kernel of a step begins while the one before it still runs (sm_90 and newer).

A kernel that is launched so may start as soon as every program of its predecessor has called ``begin_next`` or ended.
It does what needs nothing of the step (lengths, constants, the cache), and reads what predecessors wrote only after
``await_previous``, which returns when they have ended and all that they wrote can be seen.

Why ``begin_next`` is the first thing that programs do: successors start only when all programs of this kernel run or
have ended, so they can take no place on a processor that one of them still waits for; while they wait themselves they
take registers and shared memory that nobody else wants, and no instructions. So nothing can deadlock either.

Why every program awaits, also one that has nothing to do: a kernel counts as ended when all its programs have, and the
one after it relies on that for all kernels before. A step's first kernel is launched the ordinary way, after everything
before the step has ended; its last one never calls ``begin_next``. So nothing outside a step sees any of this. Within
it, every kernel writes only buffers of its own, which no earlier one reads: nothing is overwritten too early.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DEPENDENT = True  # where tiles do not say
CAPABILITY = (9, 0)
LANES = tl.constexpr(128)  # pieces that a program asks the L2 cache for at most
PIECE = tl.constexpr(4096)  # bytes of each


def able(device: torch.device) -> bool:
    """Returns whether a device has the instructions, and nothing is interpreted."""
    if triton.knobs.runtime.interpret:
        return False
    return device.type != "cuda" or not torch.version.hip and torch.cuda.get_device_capability(device) >= CAPABILITY


def overlaps(dependent: bool | None, device: torch.device) -> bool:
    """Returns whether the launches of a step overlap: as told, where the device can."""
    return able(device) and (DEPENDENT if dependent is None else dependent)


@triton.jit
def begin_next(DEPENDENT: tl.constexpr):
    """Lets the next kernel of the step start."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def await_previous(DEPENDENT: tl.constexpr):
    """Returns when all earlier kernels of the step have ended. A volatile instruction, like Triton's loads and stores:
    they are not moved across it."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def _numbers(part, parts):
    """Which pieces are this program's, the first ones in threads of different warps: a warp asks for one at a time."""
    lane = tl.arange(0, LANES)
    return (lane % 32 * (LANES // 32) + lane // 32) * parts + part


@triton.jit
def _ask(at, size):
    """Has the L2 cache load ``size`` bytes at each address ``at``, where there are any; both count in 16."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}",
        "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _fetch(at, end):
    """Has the L2 cache load up to PIECE bytes at each address ``at``, a multiple of 16, none from ``end`` on."""
    _ask(at, (tl.minimum(tl.maximum(end - at, 0), PIECE) & -16).to(tl.int32))


@triton.jit
def fetch_rows(x, first, count, part, parts, WIDTH: tl.constexpr):
    """Has the L2 cache load ``count`` rows of WIDTH numbers from the ``first`` (int64) on; this program is one of
    several ``parts`` that share them."""
    BYTES: tl.constexpr = WIDTH * x.dtype.element_ty.primitive_bitwidth // 8
    begin = x.to(tl.int64) + first * BYTES
    at = (begin & -16) + _numbers(part, parts).to(tl.int64) * PIECE
    _fetch(at, begin + count.to(tl.int64) * BYTES)
