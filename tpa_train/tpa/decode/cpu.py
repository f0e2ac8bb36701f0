"""Decoding attention on the CPU: one pass over the cache, a block of tokens at a time, so that it stays in L2.

A block is unpacked, its keys are rebuilt and scored for all heads, and its values (or latents) are summed under the
softmax of the block; blocks are joined at the end (online softmax, arXiv:1805.02867). Latent values are summed before
they are expanded, which costs H·r operations a token in place of G·d·r.

Keys of a latent cost G·d·r operations a token, more than everything else together. Where the latent is stored in 8 bits
or fewer and the CPU multiplies bfloat16 in tiles (AMX), that product may be in bfloat16, seven times as fast as
float32. It is where the weights are bfloat16, or where it is asked for with
``torch.backends.mkldnn.matmul.fp32_precision = "bf16"``; float32 weights get float32 products otherwise.
"""

from __future__ import annotations

import threading
from functools import cache, cached_property
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tpa_train.gemma3.attention import Attention, sdpa
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.decode.blocks import EntryReader
from tpa_train.tpa.decode.cached import CachedTokens
from tpa_train.tpa.forms.latent import DenseKeys, DenseValues, JointKeys, JointValues, LatentKeys, LatentValues

BLOCK = 1024  # tokens; their latents, in float32 and bfloat16, and their keys are 4 MB at rank 512
TABLE = 1 << 21  # numbers in a table of cosines, up to which one of cos + i sin (16 MB) is kept beside it
NARROW_WORK = 1 << 24  # multiplications of one layer's keys from which on bfloat16 pays
_KEYS, _VALUES = (DenseKeys, LatentKeys, JointKeys), (DenseValues, LatentValues, JointValues)
ALIGN = 32  # columns of a block are a multiple of this: rows that begin at a cache line's edge multiply faster


def supported(attention: Attention, queries: Tensor) -> bool:
    """Returns whether ``attend_cpu`` can take this layer and these queries, which must need no gradient."""
    if queries.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if queries.dtype not in (torch.float32, torch.bfloat16):
        return False
    if torch.is_grad_enabled() and queries.requires_grad:
        return False
    if type(attention) is Attention:
        return True
    if not isinstance(attention, FactorizedAttention):
        return False
    return type(attention.keys) in _KEYS and isinstance(attention.values, _VALUES)


@torch.no_grad()
def attend_cpu(attention: Attention, queries: Tensor, cached: CachedTokens) -> Tensor:
    """See ``decode.attend_cached``: [B, H, d] -> [B, H, e]."""
    lengths = cached.lengths.tolist()
    rows = range(len(lengths)) if cached.rows is None else cached.rows.tolist()
    if type(attention) is Attention or all(entry.exact for entry in attention.entries) and _dense(attention):
        return _attend_dense(attention, queries, cached, lengths, rows)
    plan = _plan(attention)
    results = [
        plan.attend(query, tuple(t[row] for t in cached.stored), length, cached.rotary)
        for query, row, length in zip(queries, rows, lengths, strict=True)
    ]
    return plan.expand(torch.stack(results), attention).to(queries.dtype)


def _dense(attention: FactorizedAttention) -> bool:
    return isinstance(attention.keys, DenseKeys) and not isinstance(attention.values, JointValues)


def _attend_dense(attention, queries, cached: CachedTokens, lengths: list[int], rows) -> Tensor:
    """Keys and values as they are stored. A group's query heads are its queries: each key is read once for all."""
    keys, values = cached.stored
    queries = queries.unflatten(1, (keys.shape[2], -1)).transpose(1, 2)  # [B, H/G, G, d]
    if cached.rows is None and len(set(lengths)) == 1 and lengths[0]:
        parts = [(slice(0, len(lengths)), slice(0, len(lengths)), lengths[0])]
    else:
        parts = [(slice(i, i + 1), slice(r, r + 1), n) for i, (r, n) in enumerate(zip(rows, lengths, strict=True))]
    out = queries.new_zeros(len(lengths), *queries.shape[1:3], values.shape[-1])
    for mine, row, length in parts:
        if length:
            k, v = (t[row, :length].to(queries.dtype) for t in (keys, values))
            out[mine] = sdpa(queries[mine], k, v, attention.config.scale)
    return out.transpose(1, 2).flatten(1, 2)


_plans: WeakKeyDictionary[Attention, tuple[tuple, Plan]] = WeakKeyDictionary()


def _plan(attention: FactorizedAttention) -> Plan:
    """Returns the layer's plan, made anew when its keys' factors have changed."""
    state = tuple(
        (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in attention.keys.parameters(recurse=True)
    )
    known = _plans.get(attention)
    if known is None or known[0] != state:
        known = _plans[attention] = (state, Plan(attention))
    return known[1]


@cache
def has_tiles() -> bool:
    """Returns whether this CPU multiplies bfloat16 matrices in tiles."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _exact_products() -> bool:
    """Returns whether float32 products are to be float32 products: unless the user says otherwise."""
    return getattr(torch.backends.mkldnn.matmul, "fp32_precision", "none") != "bf16"


class _Workspace(threading.local):
    """Memory that layers use in turn: freshly allocated pages would cost more than the work in them."""

    def __init__(self) -> None:
        self.flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Returns a tensor with arbitrary contents."""
        count = torch.Size(shape).numel()
        flat = self.flat.get((name, dtype))
        if flat is None or flat.numel() < count:
            with torch.inference_mode(False):  # it serves outside of inference mode as well
                flat = self.flat[name, dtype] = torch.zeros(count, dtype=dtype)
        return flat[:count].view(shape)


_workspace = _Workspace()


class Plan:
    """How one layer's cache is read: what does not change between steps.

    Key columns are in pairs (i, i + d/2), so that RoPE is a product of complex numbers, and a block is rotated relative
    to its first token: the query is turned back instead, and one table of ``BLOCK`` positions serves all blocks.
    """

    def __init__(self, attention: FactorizedAttention) -> None:
        config, keys = attention.config, attention.keys
        self.heads, self.groups, self.scale = config.num_heads, config.num_kv_heads, config.scale
        self.eps = config.rms_norm_eps
        self.keys = EntryReader(attention.entries[0])
        self.joint = isinstance(attention.values, JointValues)
        self.values = self.keys if self.joint else EntryReader(attention.entries[-1])
        self.dense, self.normed = isinstance(keys, DenseKeys), isinstance(keys, JointKeys)
        self.quantized = max(bits for *_, bits in attention.entries[0].segments) <= 8
        if not self.dense:
            # Not the layer itself: a plan must not keep it alive.
            self.factors = tuple(p.detach() for p in (keys.up, keys.center, keys.norm.weight))
            self.work = self.groups * config.head_dim * self.keys.entry.count
            self.pairs = torch.arange(config.head_dim).view(2, -1).t().flatten()
            dtype = accumulation_dtype(keys.up.dtype)
            self.weight = (1.0 + self.factors[2].to(dtype))[self.pairs]

    @cached_property
    def wide(self) -> Tensor:
        """U for a block's columns [values, bases, ones], as [G, columns, d] in float32 (or float64)."""
        up, center, _ = (t.to(self.weight.dtype) for t in self.factors)
        up = up[:, self.pairs].expand(self.groups, -1, -1)  # [G, d, r]; some forms have one for all heads
        if not self.normed:
            up = up * self.weight[:, None]
        bias = torch.einsum("gdr,gr->gd", up, center.expand(self.groups, -1))
        return self._columns(up, bias)

    @cached_property
    def narrow(self) -> Tensor:
        """``wide`` in bfloat16, for columns [values, bases, ones, what bfloat16 leaves of the bases]."""
        wide, first = self.wide, self.keys.columns
        del self.wide  # seldom needed beside this
        again = F.pad(wide[:, first : first + self.keys.bases], (0, 0, 0, -self.keys.bases % ALIGN))
        narrow = torch.cat((wide, again), 1).to(torch.bfloat16)
        # The second column of ones has what bfloat16 leaves of the center's.
        ones = first + self.keys.bases
        narrow[:, ones + 1] = (wide[:, ones] - narrow[:, ones].to(wide.dtype)).to(torch.bfloat16)
        return narrow

    def _columns(self, up: Tensor, bias: Tensor) -> Tensor:
        """Returns ``up`` [G, d, r] by columns in storage order, and a ``bias`` [G, d] for the ones."""
        zero = up.new_zeros(*up.shape[:2], 1)
        reader = self.keys
        values = torch.cat((up, zero), -1)[..., reader.order]  # −1: the zero
        bases = up.new_zeros(*up.shape[:2], reader.bases + 1).index_add_(-1, reader.group % (reader.bases + 1), values)
        ones = up.new_zeros(*up.shape[:2], _width(reader) - reader.columns - reader.bases)
        ones[..., 0] = bias
        return torch.cat((values, bases[..., :-1], ones), -1).transpose(1, 2).contiguous()

    def attend(self, query: Tensor, stored: tuple[Tensor, ...], length: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Returns sums [H, columns + bases] of the value entry under one sequence's attention.

        Args:
            query: [H, d]. stored: each [slots, ...], of this sequence. rotary: cos and sin of all positions.
        """
        dtype = accumulation_dtype(query.dtype)
        slots = stored[0].shape[0]
        count = min(length, slots)
        if count == 0:
            return query.new_zeros(self.heads, self.values.columns + self.values.bases, dtype=dtype)
        query = query.to(dtype) * self.scale
        narrow = not self.dense and self.quantized and count * self.work >= NARROW_WORK and has_tiles()
        narrow = narrow and (self.factors[0].dtype == torch.bfloat16 or not _exact_products())
        sums, tops, totals = [], [], []
        for start, stop, position, turn in _blocks(length, slots):
            part = tuple(t[start:stop] for t in stored)
            block = self._read(self.keys, "keys", part[: self.keys.tensors], dtype)
            if self.dense:
                scores = self._score_stored(query, block)
            else:
                # Exact: the table's own row for every position.
                turned = _turned(query, rotary, position if narrow else 0)
                angles = _table(rotary)[: stop - start] if narrow else _angles(rotary, position, stop - start)
                if turn:
                    angles = torch.cat((angles[turn:], angles[:turn]))
                scores = self._score_rebuilt(turned.view(self.groups, -1, query.shape[-1]), block, angles, narrow)
            top = scores.amax(-1, keepdim=True)
            weights = scores.sub_(top).exp_()
            if not self.joint:
                block = self._read(self.values, "values", part[self.keys.tensors :], dtype)
            columns = self.values.columns + self.values.bases
            sums.append(_per_group(weights, block[..., :columns]))
            tops.append(top)
            totals.append(weights.sum(-1, keepdim=True))
        return _joined(sums, tops, totals)

    def _read(self, reader: EntryReader, name: str, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Returns a block [n, rows, columns + bases + ones] of the cache's numbers."""
        tokens, rows, first = len(stored[0]), reader.entry.rows, reader.columns
        block = _workspace.take(name, dtype, tokens, rows, _width(reader))
        codes = _workspace.take("codes", torch.uint8, tokens * rows * first)
        reader.read(stored, block[..., :first], block[..., first : first + reader.bases], codes)
        block[..., first + reader.bases :] = 1.0
        return block

    def _score_stored(self, query: Tensor, block: Tensor) -> Tensor:
        """Scores [H, n] of keys that are cached as they are, rotated."""
        padded = torch.cat((query, query.new_zeros(len(query), 1)), -1)[:, self.keys.order]
        bases = query.new_zeros(len(query), self.keys.bases + 1)
        bases.index_add_(-1, self.keys.group % (self.keys.bases + 1), padded)
        columns = torch.cat((padded, bases[:, :-1]), -1).view(self.groups, -1, padded.shape[-1] + self.keys.bases)
        return torch.cat([q @ block[:, g, : q.shape[-1]].t() for g, q in enumerate(columns)])

    def _score_rebuilt(self, query: Tensor, block: Tensor, angles: Tensor, narrow: bool) -> Tensor:
        """Scores [H, n] of keys that are rebuilt from latents and rotated; ``query`` is [G, H/G, d]."""
        tokens, rows, columns = block.shape
        up = self.narrow if narrow else self.wide
        if narrow:
            first, bases = self.keys.columns, self.keys.bases
            small = _workspace.take("narrow", torch.bfloat16, tokens, rows, up.shape[1])
            small[..., :columns] = block
            exact = block[..., first : first + bases]
            small[..., columns : columns + bases] = exact - small[..., first : first + bases].to(block.dtype)
            small[..., columns + bases :] = 0.0
            block = small
            rounded = _workspace.take("rounded", torch.bfloat16, tokens, up.shape[-1])
        wide = _workspace.take("rebuilt", query.dtype, tokens, up.shape[-1])
        scores = []
        for group, q in enumerate(query):
            latent = block[:, group if rows > 1 else 0]
            if narrow:
                wide.copy_(torch.mm(latent, up[group], out=rounded))
            else:
                torch.mm(latent, up[group], out=wide)
            if self.normed:
                norm = torch.linalg.vector_norm(wide, dim=-1)
                inverse = norm.square_().div_(wide.shape[-1]).add_(self.eps).rsqrt_()
                wide.mul_(self.weight)
            torch.view_as_complex(wide.view(tokens, -1, 2)).mul_(angles)
            score = torch.mm(q, wide.t())
            scores.append(score.mul_(inverse) if self.normed else score)
        return scores[0] if len(scores) == 1 else torch.cat(scores)

    def expand(self, sums: Tensor, attention: FactorizedAttention) -> Tensor:
        """Returns values [B, H, e] of ``attend``'s sums [B, H, columns + bases]."""
        reader = self.values
        real = reader.order >= 0
        out = sums.new_empty(*sums.shape[:2], reader.entry.count)
        bases = torch.cat((sums[..., reader.columns :], sums.new_zeros(*sums.shape[:2], 1)), -1)
        out[..., reader.order[real]] = (sums[..., : reader.columns] + bases[..., reader.group])[..., real]
        if not self.joint:
            return out
        up = attention.values.up.detach()
        heads = out.unflatten(1, (self.groups, -1)).to(up.dtype)  # [B, G, H/G, r]
        return (heads @ up.mT).flatten(1, 2)


def _width(reader: EntryReader) -> int:
    """Returns how many columns a block has: values, bases, and two or more ones."""
    return -(-(reader.columns + reader.bases + 2) // ALIGN) * ALIGN


def _per_group(weights: Tensor, block: Tensor) -> Tensor:
    """Returns sums [H, columns] of a block [n, rows, columns] under ``weights`` [H, n]; a row serves H/rows heads."""
    rows = block.shape[1]
    return torch.cat([w @ block[:, row] for row, w in enumerate(weights.view(rows, -1, weights.shape[-1]))])


def _joined(sums: list[Tensor], tops: list[Tensor], totals: list[Tensor]) -> Tensor:
    """Returns the weighted mean of blocks' sums [H, e], whose weights are relative to the blocks' highest scores."""
    if len(sums) == 1:
        return sums[0] / totals[0]
    top = torch.stack(tops)
    share = (top - top.amax(0)).exp_()
    return (torch.stack(sums) * share).sum(0) / (torch.stack(totals) * share).sum(0)


def _blocks(length: int, slots: int):
    """Yields (start, stop, position, turn) of blocks of slots: where tokens follow each other from ``position`` on.

    With ``turn`` the block is a whole ring: its first slot has the token ``turn`` after the oldest, at ``position``.
    """
    cut = length % slots if length > slots else 0  # the oldest token's slot
    if cut and slots <= BLOCK:
        yield 0, slots, length - slots, slots - cut
        return
    runs = [(0, cut, length - cut), (cut, slots, length - slots)] if length > slots else [(0, length, 0)]
    for first, last, position in runs:
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last), position + start - first, 0


def _turned(query: Tensor, rotary: tuple[Tensor, Tensor], position: int) -> Tensor:
    """Returns the query [H, d], columns in pairs, turned back by ``position``."""
    cos, sin = (t[position, 0].to(query.dtype) for t in rotary)
    first, second = query.chunk(2, dim=-1)
    return torch.stack((first * cos + second * sin, second * cos - first * sin), dim=-1).flatten(-2)


def _angles(rotary: tuple[Tensor, Tensor], position: int, count: int) -> Tensor:
    """Returns cos + i sin of ``count`` positions, [count, d/2]; of a short context from a table that is kept."""
    cos, sin = rotary
    if cos.numel() <= TABLE:
        return _table(rotary, len(cos))[position : position + count]
    return torch.complex(cos[position : position + count, 0], sin[position : position + count, 0])


_tables: dict[int, WeakTensorKeyDictionary] = {}


def _table(rotary: tuple[Tensor, Tensor], count: int = BLOCK) -> Tensor:
    """Returns cos + i sin of the first ``count`` positions, made once for all layers that share them."""
    tables = _tables.setdefault(count, WeakTensorKeyDictionary())
    table = tables.get(rotary[0])
    if table is None:
        cos, sin = (t[:count, 0] for t in rotary)
        table = tables[rotary[0]] = torch.complex(cos, sin)
    return table
