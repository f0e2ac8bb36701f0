"""One step of decoding: attention of one new query a sequence on everything that its layer has cached.

``attend_new`` and ``attend_cached`` are the only doors. ``reference`` reads the cache with PyTorch, on any device; it
defines what is right. Kernels read it as it lies, and unpack nothing in memory: on CUDA Triton's (``launch`` chooses);
on a CPU ``native``, in C, or a library's where keys and values are ``stored`` as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.attention import Attention
from tpa_train.tpa.decode.cached import CachedTokens
from tpa_train.tpa.decode.native import attend_native
from tpa_train.tpa.decode.reference import attend_reference
from tpa_train.tpa.decode.stored import are_stored, attend_stored, plain

__all__ = ["CachedTokens", "attend_cached", "attend_new"]

BACKENDS = ("auto", "triton", "reference")
VARIABLE = "TPA_DECODE"  # in the environment: a backend, where a call names none


def attend_new(
    attention: Attention,
    queries: Tensor,
    entries: tuple[Tensor, ...],
    cached: CachedTokens,
    store: Callable[[tuple[Tensor, ...]], None],
    longest: int | None = None,
) -> Tensor:
    """Puts one new token a sequence into the cache and attends as ``attend_cached``.

    Args:
        attention, queries: as there.
        entries: of the new tokens, ``attention.write``'s, each [B, 1, ...].
        cached: with room for the new tokens, which its lengths count.
        store: writes what ``attention.pack`` gives for the entries into the buffers of ``cached``.
        longest: the most tokens of a sequence, where it is known: no others need be read.
    """
    backend = _backend(None)
    if backend == "auto":
        done = attend_native(attention, queries, cached, entries)
        if done is not None:
            return done
    store(attention.pack(entries))
    return _attend(attention, queries, cached if longest is None else cached.first(longest), backend)


def _backend(name: str | None) -> str:
    name = name or os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        raise UserError(f"unknown decoding backend '{name}' (argument or {VARIABLE}){nearest(name, BACKENDS)}")
    return name


def attend_cached(attention: Attention, queries: Tensor, cached: CachedTokens, backend: str | None = None) -> Tensor:
    """Returns what attention gives for one query a sequence, [B, H, e]: ``attention.output`` takes it from there.

    Args:
        attention: the layer's, dense or factorized.
        queries: normalised and rotated, [B, H, d].
        cached: the layer's entries, the new token's among them.
        backend: "triton", "reference" or "auto": on CUDA and on a CPU the kernels wherever they serve. Left out: what
            the environment variable ``TPA_DECODE`` says, else "auto".

    Raises:
        UserError: the backend is unknown, or the kernels cannot serve a call that demands them.
    """
    backend = _backend(backend)
    if backend == "auto":
        done = attend_native(attention, queries, cached)
        if done is not None:
            return done
    return _attend(attention, queries, cached, backend)


def _attend(attention: Attention, queries: Tensor, cached: CachedTokens, backend: str) -> Tensor:
    """As ``attend_cached``, where ``native`` does not serve."""
    if backend == "auto" and plain(queries) and are_stored(attention):
        return attend_stored(attention, queries, cached)
    if backend == "reference" or (backend == "auto" and not queries.is_cuda):
        return attend_reference(attention, queries, cached)
    reason = "Triton is not installed (its wheels come with CUDA builds of PyTorch)"
    try:
        from tpa_train.tpa.decode import launch
    except ImportError:
        launch = None
    if launch is not None:
        reason = launch.obstacle(queries, cached)
        if reason is None:
            return launch.attend_triton(attention, queries, cached)
    if backend == "triton":
        raise UserError(f"{VARIABLE}=triton cannot serve this call: {reason}; leave it at auto.")
    return attend_reference(attention, queries, cached)
