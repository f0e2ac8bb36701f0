"""Attention of the original model, and the kernels that every form of attention in the toolkit runs on.

Softmax is always a library's: flash attention over variable-length documents on CUDA, PyTorch's SDPA elsewhere. No
path builds an [L, L] mask where a window will do: local layers run in bands.

A subclass changes what one token writes into the cache and how keys and values come out of it (``write`` and
``read``); everything else here serves all forms.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_train.gemma3.config import Gemma3Config, LayerKind
from tpa_train.gemma3.images import ImageBlocks
from tpa_train.gemma3.layers import Linear, RMSNorm, apply_rotary, rotary_table

try:  # torch ≥ 2.10; older versions and CPUs use the SDPA path below
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover - depends on the installed torch
    varlen_attn = None
VARLEN_GQA = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters

RotaryTable = tuple[Tensor, Tensor]
OFFSETS = 8  # filled document offsets have a power of this as their size, 64 at least
BAND_BLOCK = 128  # queries of a block in the banded path: it computes W + 128 scores a query for the W that are needed


def document_offsets(ids: Tensor, filled: bool = False) -> Tensor:
    """Returns where documents begin among the flattened [B·L] tokens, and the end: int32 [≥ documents + 1].

    Args:
        ids: int [B, L], constant inside a document and different in neighbouring ones.
        filled: with empty documents at the end, to one of a few sizes: code compiled for its shape serves every batch.
    """
    batch, length = ids.shape
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = starts.flatten().nonzero().flatten()
    size = len(first) + 1
    if filled:
        size = OFFSETS ** math.ceil(math.log(max(size, OFFSETS**2), OFFSETS))
    return F.pad(first, (0, size - len(first)), value=batch * length).to(torch.int32)


@dataclass
class Documents:
    """Which document every token of a packed batch belongs to; attention never crosses a document's edge.

    ``ids``: int [B, L], as ``document_offsets`` takes them. ``cu_seqlens``: what that returns, where it is known: to
    find it on a GPU is to wait for the GPU.
    """

    ids: Tensor
    cu_seqlens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.cu_seqlens is None:
            self.cu_seqlens = document_offsets(self.ids, filled=self.ids.is_cuda)

    def segments(self) -> list[tuple[int, int, int]]:
        """Returns (row, start, end) of every document, on the host."""
        length = self.ids.shape[1]
        edges = self.cu_seqlens.tolist()
        pairs = [(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]
        return [(a // length, a % length, a % length + (b - a)) for a, b in pairs]


class Cache(Protocol):
    """What holds the tokens before the new ones: a layer asks it to take in the new entries and to attend over all."""

    def positions(self, count: int) -> Tensor:
        """Returns RoPE positions int [B or 1, count] of the next ``count`` tokens."""

    def attend(
        self, attention: Attention, queries: Tensor, entries: tuple[Tensor, ...], images: ImageBlocks | None
    ) -> Tensor:
        """Stores ``entries`` (``Attention.write``'s) and returns what attention gives ``queries``, [B, L, H, e]."""

    def advance(self, count: int) -> None:
        """Takes note that all layers have stored ``count`` tokens."""


@dataclass
class AttentionContext:
    """What one forward pass shares between its layers."""

    config: Gemma3Config
    positions: Tensor  # int [B or 1, L], RoPE positions of the new tokens
    documents: Documents | None = None
    cache: Cache | None = None
    images: ImageBlocks | None = None  # None where there are only text tokens
    rotary: dict[LayerKind, RotaryTable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in set(self.config.layer_kinds):
            self.rotary[kind] = rotary_table(self.config, kind, self.positions)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    documents: Documents | None = None,
    images: ImageBlocks | None = None,
) -> Tensor:
    """Attention of a whole sequence on itself: causal, and to and fro inside an image.

    Args:
        q: [B, L, H, d]; k: [B, L, G, d]; v: [B, L, G, e]. Latent values are mostly narrower than keys; a wide joint
            latent is attended to in parts of d columns, since kernels want equal head sizes.
        scale: multiplies the scores.
        window: a query sees itself and the ``window - 1`` tokens before it; None for all.
        documents: packed documents that must not see each other.
        images: blocks whose tokens also see the later ones of their own block.

    Returns:
        [B, L, H, e].
    """
    length, value_dim = q.shape[1], v.shape[-1]
    if value_dim > k.shape[-1]:
        parts = [attend(q, k, part, scale, window, documents, images) for part in v.split(k.shape[-1], dim=-1)]
        return torch.cat(parts, dim=-1)
    if window is not None and window >= length:
        window = None
    if value_dim < k.shape[-1]:  # flash kernels want equal head sizes; zero columns cost less than the math kernel
        v = F.pad(v, (0, k.shape[-1] - value_dim))
    if fuses(q):
        out = _attend_varlen(q, k, v, scale, window, documents)
    elif window is not None:
        out = _attend_banded(q, k, v, scale, window, documents)
    elif documents is not None and len(documents.cu_seqlens) > q.shape[0] + 1:
        out = _attend_segments(q, k, v, scale, documents)
    else:
        out = sdpa(q, k, v, scale, is_causal=True)
    if images is not None:
        out = _attend_images(out, q, k, v, scale, window, images)
    return out[..., :value_dim]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """SDPA on [B, L, heads, d] tensors; ``mask`` broadcasts to [B, H, L, S], True where attention is allowed."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def takes_documents(device: torch.device) -> bool:
    """Whether flash attention over variable-length sequences is there, in half precision."""
    return device.type == "cuda" and varlen_attn is not None


def fuses(q: Tensor) -> bool:
    """Whether flash attention over variable-length sequences serves these queries."""
    return takes_documents(q.device) and q.dtype in (torch.bfloat16, torch.float16)


def attend_last(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Attention of the last L tokens of a sequence on all S of it, as ``attend``, where ``fuses``: no mask is built.

    q: [B, L, H, d]; k: [B, S, G, d]; v: [B, S, G, e] with e ≤ d. Returns [B, L, H, e].
    """
    value_dim = v.shape[-1]
    out = _attend_varlen(q, k, F.pad(v, (0, k.shape[-1] - value_dim)), scale, window, None)
    return out[..., :value_dim]


def _attend_varlen(q, k, v, scale, window, documents) -> Tensor:
    """Flash attention over the flattened tokens, one sequence per document; fewer queries than keys are the last."""
    batch, length, heads, dim = q.shape
    seen = k.shape[1]
    if documents is None:
        edges, key_edges = (
            torch.arange(0, batch * n + 1, n, dtype=torch.int32, device=q.device) for n in (length, seen)
        )
    else:
        edges = key_edges = documents.cu_seqlens
    # Older versions read each key for all its query heads without being told.
    options = {"enable_gqa": True} if VARLEN_GQA and k.shape[2] != heads else {}
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    left = -1 if window is None else window - 1
    out = varlen_attn(q, k, v, edges, key_edges, length, seen, scale=scale, window_size=(left, 0), **options)
    return out.view(batch, length, heads, dim)


def _attend_segments(q, k, v, scale, documents: Documents) -> Tensor:
    """One SDPA call per document: less work than a masked one, and no mask."""
    rows: list[list[Tensor]] = [[] for _ in range(q.shape[0])]
    for row, start, end in documents.segments():
        part = (slice(row, row + 1), slice(start, end))
        rows[row].append(sdpa(q[part], k[part], v[part], scale, is_causal=True))
    return torch.cat([torch.cat(parts, dim=1) for parts in rows], dim=0)


def _attend_banded(q, k, v, scale, window: int, documents: Documents | None) -> Tensor:
    """Sliding window as blocks of queries, each on the block's own keys and the W - 1 before it (rounded up)."""
    batch, length = q.shape[:2]
    block = max(1, min(window, BAND_BLOCK))
    past = -(-window // block) * block  # keys that a block sees of the blocks before it
    blocks = -(-length // block)
    pad = blocks * block - length

    def queries(x: Tensor) -> Tensor:  # [B, L, ...] -> [B·blocks, block, ...]
        fill = x.new_zeros(batch, pad, *x.shape[2:])
        return torch.cat((x, fill), dim=1).unflatten(1, (blocks, block)).flatten(0, 1)

    def keys(x: Tensor) -> Tensor:  # [B, L, ...] -> [B·blocks, past + block, ...]
        x = torch.cat((x.new_zeros(batch, past, *x.shape[2:]), x, x.new_zeros(batch, pad, *x.shape[2:])), dim=1)
        return x.unfold(1, past + block, block).movedim(-1, 2).flatten(0, 1)

    query = torch.arange(block, device=q.device)[:, None] + past
    key = torch.arange(past + block, device=q.device)[None, :]
    band = (key <= query) & (key > query - window)
    first = torch.arange(blocks, device=q.device)[:, None, None] * block  # nothing lies before the first token
    mask = (band & (key + first >= past)).expand(batch, -1, -1, -1)
    if documents is not None:
        mask = mask & (queries(documents.ids)[:, :, None] == keys(documents.ids)[:, None, :]).unflatten(
            0, (batch, blocks)
        )
    out = sdpa(queries(q), keys(k), keys(v), scale, mask.flatten(0, 1)[:, None])
    return out.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]


def _attend_images(out: Tensor, q, k, v, scale, window: int | None, images: ImageBlocks) -> Tensor:
    """Returns ``out`` with the image tokens' rows computed anew: one SDPA call an image, on what is before its end.

    Text sees images causally, so the causal paths are right for it; that they computed the image tokens' rows as well
    costs T rows of the softmax an image, and saves an [L, L] mask. The window cuts an image token's past as any
    other's (``create_attention_mask``).
    """
    parts = []
    for row, start, end, first in images.spans:
        begin = first if window is None else max(first, start - window + 1)
        mask = None
        if window is not None and begin <= end - 1 - window:  # the last token does not see the first key
            query = torch.arange(start, end, device=q.device)[:, None]
            mask = (torch.arange(begin, end, device=q.device)[None, :] > query - window)[None, None]
        queries, keys = (slice(row, row + 1), slice(start, end)), (slice(row, row + 1), slice(begin, end))
        parts.append(sdpa(q[queries], k[keys], v[keys], scale, mask)[0])
    return out.index_put(images.places, torch.cat(parts).to(out.dtype))


class Attention(nn.Module):
    """Gemma 3's grouped-query attention with QK-norm; the base of every factorized form.

    Args:
        config: the model's sizes.
        layer: this layer's index, which decides between sliding window and global attention.
    """

    def __init__(self, config: Gemma3Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.kind: LayerKind = config.layer_kinds[layer]
        self.window = None if config.is_global(layer) else config.sliding_window
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self._build_query()
        self._build_key_value()

    def _build_query(self) -> None:
        self.q_proj = Linear(self.config.hidden_size, self.config.num_heads * self.config.head_dim)

    def _build_key_value(self) -> None:
        config = self.config
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size)

    def raw_queries(self, x: Tensor) -> Tensor:
        """Returns queries [B, L, H, d] before norm and RoPE."""
        return self.q_proj(x).unflatten(-1, (self.config.num_heads, self.config.head_dim))

    def queries(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        """Returns normalised, rotated queries [B, L, H, d] in the projections' dtype."""
        q = self.raw_queries(x)
        return apply_rotary(self.q_norm(q), rotary).to(q.dtype)

    def write(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, ...]:
        """Returns what the tokens ``x`` [B, L, D] put into the cache: rotated keys and values, each [B, L, G, d]."""
        shape = (self.config.num_kv_heads, self.config.head_dim)
        k, v = (proj(x).unflatten(-1, shape) for proj in (self.k_proj, self.v_proj))
        return apply_rotary(self.k_norm(k), rotary).to(k.dtype), v

    def read(self, entries: tuple[Tensor, ...], rotary: RotaryTable) -> tuple[Tensor, Tensor]:
        """Returns keys [B, S, G, d] and values [B, S, G, e] from cached entries; ``rotary`` is that of their tokens."""
        keys, values = entries
        return keys, values

    def storage(self) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        """Returns shape and dtype (None: the cache's) of every tensor that one token puts into the cache."""
        shape = (self.config.num_kv_heads, self.config.head_dim)
        return [(shape, None), (shape, None)]

    def as_cached(self, entries: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns ``entries`` as a cache would give them back, differentiably; the same where nothing is rounded."""
        return entries

    def pack(self, entries: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns what the cache stores of ``write``'s entries, one tensor per item of ``storage``."""
        return entries

    def unpack(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Returns the entries that ``pack`` stored."""
        return tuple(t.to(dtype) for t in stored)

    def output(self, heads: Tensor) -> Tensor:
        """Projects attention results [B, L, H, e] to the residual stream [B, L, D]."""
        return self.o_proj(heads.flatten(-2))

    def forward(self, x: Tensor, context: AttentionContext, queries: Tensor | None = None) -> Tensor:
        """Attends over ``x`` [B, L, D] (and, with a cache, over everything before it); returns [B, L, D].

        ``queries``: what ``self.queries`` returns for x, where a caller has it already.
        """
        rotary = context.rotary[self.kind]
        q = self.queries(x, rotary) if queries is None else queries
        entries = self.write(x, rotary)
        if context.cache is None:
            k, v = self.read(self.as_cached(entries), rotary)
            return self.output(attend(q, k, v, self.config.scale, self.window, context.documents, context.images))
        return self.output(context.cache.attend(self, q, entries, context.images))
