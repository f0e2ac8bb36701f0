"""What else computes decoding attention over a dense cache: PyTorch's kernels and FlashInfer's, the fastest of which
is what the converted cache has to beat.

B sequences · S cached tokens · H query heads · G KV heads · d head_dim. A backend takes queries [B, H, d], keys and
values [B, S, G, d] of any strides, and returns work that computes [B, H, d].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from tpa_train.gemma3.attention import VARLEN_GQA, Attention, sdpa, varlen_attn
from tpa_train.tpa.decode import CachedTokens, attend_cached

Work = Callable[[], Tensor]
Backend = Callable[[Tensor, Tensor, Tensor, float], Work]
ChunkAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
PAGE = 16  # tokens of a page of FlashInfer's
WORKSPACE = 256 << 20  # bytes that FlashInfer asks for
OWN, FLEX, FLASHINFER = "attend_cached", "flex", "flashinfer"
COMPILED = (OWN, FLEX, FLASHINFER)  # new sizes cost them seconds or more to compile


def sdpa_backend(kernel: SDPBackend | None, folded: bool) -> Backend:
    """Returns PyTorch's SDPA, on one of its kernels or whatever it chooses.

    ``folded``: the query heads that share a KV head become queries of that head, so that its keys are read once even
    by a kernel that knows nothing of groups.
    """

    def make(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Work:
        batch, heads, width = q.shape
        groups = k.shape[2]
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        q = q.view(batch, groups, heads // groups, width) if folded else q[:, :, None]
        shared = not folded and groups != heads

        def work() -> Tensor:
            with nullcontext() if kernel is None else sdpa_kernel(kernel):
                out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=shared)
            return out.reshape(batch, heads, width)

        return work

    return make


def flex_backend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Work:
    """PyTorch's flex attention, compiled; of one query it makes its decoding kernel, split over the keys."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = q[:, :, None], k.transpose(1, 2), v.transpose(1, 2)

    def work() -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=64):
            return compiled(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])[:, :, 0]

    return work


def flashinfer_backend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Work:
    """FlashInfer's batched decoding over pages, which here lie one behind another."""
    import flashinfer

    (batch, slots, groups, width), heads = k.shape, q.shape[1]
    if slots % PAGE:
        raise ValueError(f"{slots} tokens are no whole number of pages of {PAGE}")
    pages = batch * slots // PAGE
    space = torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=q.device) * (slots // PAGE),
        torch.arange(pages, dtype=torch.int32, device=q.device),
        torch.full((batch,), PAGE, dtype=torch.int32, device=q.device),
        heads, groups, width, PAGE, q_data_type=q.dtype, kv_data_type=k.dtype, sm_scale=scale,
    )  # fmt: skip
    cache = tuple(t.view(pages, PAGE, groups, width) for t in (k, v))
    return lambda: wrapper.run(q, cache)


def _sdpa_backends() -> dict[str, Backend]:
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }  # fmt: skip
    found = {name: sdpa_backend(kernel, False) for name, kernel in kernels.items() if name != "efficient"}
    return found | {f"{name} folded": sdpa_backend(kernel, True) for name, kernel in kernels.items()}


SDPA: dict[str, dict[str, Backend]] = {
    "cuda": _sdpa_backends(),
    "cpu": {"sdpa": sdpa_backend(None, False), "sdpa folded": sdpa_backend(None, True)},
}
OTHERS: dict[str, dict[str, Backend]] = {
    "cuda": {FLEX: flex_backend, FLASHINFER: flashinfer_backend},
    "cpu": {},
}


def heads_first(cached: CachedTokens) -> CachedTokens:
    """Returns the same buffers, all slots filled, as if they had been laid out [B, G, S, d]: other keys and values."""
    stored = tuple(t.view(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in cached.stored)
    return replace(cached, stored=stored)


def backends_of(device: torch.device) -> Iterator[tuple[str, str, Backend | None]]:
    """Yields name, layout and backend; the backend of ``OWN`` is None (``own_work``).

    Kernels that take strides are tried on both layouts of the cache, as either may be the faster one.
    """
    for layout in ("tokens first", "heads first"):
        for name, backend in SDPA[device.type].items():
            yield name, layout, backend
    yield OWN, "tokens first", None
    for name, backend in OTHERS[device.type].items():
        yield name, "heads first" if name == FLEX else "tokens first", backend


def own_work(attention: Attention, queries: Tensor, cached: CachedTokens) -> Work:
    """The toolkit's own door, of a dense or of a converted layer."""
    return lambda: attend_cached(attention, queries, cached)


# ---------------------------------------------------------------------------- a chunk of new tokens over a full cache


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if varlen_attn is None:
        raise NotImplementedError("this PyTorch has no varlen_attn")
    options = {"enable_gqa": True} if VARLEN_GQA and q.shape[2] != k.shape[2] else {}
    (length, cached), device = (q.shape[1], k.shape[1]), q.device
    edges = [torch.arange(0, n + 1, n, dtype=torch.int32, device=device) for n in (length, cached)]
    out = varlen_attn(q[0], k[0], v[0], *edges, length, cached, scale=scale, window_size=(-1, 0), **options)
    return out[None]


def _lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    bias = causal_lower_right(q.shape[1], k.shape[1])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def masked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of the last L of S tokens, q [1, L, H, d] on k, v [1, S, G, d], with a mask in memory."""
    length, cached = q.shape[1], k.shape[1]
    allowed = torch.ones(length, cached, dtype=torch.bool, device=q.device).tril(cached - length)
    return sdpa(q, k, v, scale, allowed)


CHUNKS: dict[str, dict[str, ChunkAttention]] = {
    "cuda": {"varlen": _varlen, "flash": _lower_right},
    "cpu": {"masked": masked},
}


def attend_chunk(kernel: ChunkAttention, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Returns [1, L, H, e] for values [1, S, G, e] of at most d columns; flash kernels want as many as keys have."""
    width = v.shape[-1]
    out = kernel(q, k, F.pad(v, (0, k.shape[-1] - width)), scale)
    return out[..., :width]
