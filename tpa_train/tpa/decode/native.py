"""Decoding attention on the CPU by the compiled kernel of ``native.c``: one pass over the cache as it lies.

It serves latent and joint keys, of constant B too, and dense ones, with values of any of these forms, at all widths, in
float32 and bfloat16. Latent values are summed before they are expanded, which costs H·r operations a token in place of
G·d·r. Keys cost G·d·r, more than everything else together. Where the CPU multiplies bfloat16 in tiles (AMX), they are
products of numbers split in two, whose error is between float32's and 2^-17. Where the weights are bfloat16, or
``torch.backends.mkldnn.matmul.fp32_precision`` is "bf16", one bfloat16 product serves. Keys of joint latents are
normalised as they are rebuilt, whether or not their norms are cached: those are the same, but rounded, and only written
here, for whoever reads the cache otherwise.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from operator import is_
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import accumulation_dtype
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.decode import compiled
from tpa_train.tpa.decode.cached import CachedTokens
from tpa_train.tpa.decode.stored import are_stored, plain
from tpa_train.tpa.entries import Entry
from tpa_train.tpa.forms.latent import DenseKeys, DenseValues, JointKeys, JointValues, LatentKeys, LatentValues
from tpa_train.tpa.quantization import GROUP, planes

MAX_SEGMENTS = 64
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PADDING = 32  # numbers of an entry, and columns of a key, are padded to multiples of it
_KEYS, _VALUES = (DenseKeys, LatentKeys, JointKeys), (DenseValues, LatentValues, JointValues)


class _Segment(ctypes.Structure):
    _fields_ = [
        ("codes", c_void_p), ("scales", c_void_p), ("strides", c_int64 * 6), ("high", c_int64),
        ("start", c_int32), ("count", c_int32), ("bits", c_int32), ("kind", c_int32),
    ]  # fmt: skip


class _Entry(ctypes.Structure):
    _fields_ = [
        ("rows", c_int32), ("count", c_int32), ("segments", c_int32), ("padded", c_int32),
        ("news", c_void_p), ("news_kind", c_int64), ("segment", _Segment * MAX_SEGMENTS),
    ]  # fmt: skip


class _Job(ctypes.Structure):
    """``Job`` of native.c."""

    _fields_ = [
        ("batch", c_int64), ("slots", c_int64),
        ("heads", c_int32), ("groups", c_int32), ("dim", c_int32), ("padded", c_int32),
        ("rebuilt", c_int32), ("normed", c_int32), ("products", c_int32), ("joint", c_int32),
        ("scale", c_float), ("eps", c_float),
        ("lengths", c_void_p), ("rows", c_void_p), ("queries", c_void_p), ("query_kind", c_int32), ("threads", c_int32),
        ("cosine", c_void_p), ("sine", c_void_p), ("bias", c_void_p), ("weight", c_void_p), ("up", c_void_p),
        ("expand", c_void_p), ("expand_kind", c_int32), ("expanded", c_int32), ("out", c_void_p),
        ("workspace", c_void_p), ("workspace_bytes", c_int64),
        ("norms", c_void_p), ("norm_row", c_int64), ("norm_token", c_int64), ("norm_kind", c_int64),
        ("keys", _Entry), ("values", _Entry),
        ("own", c_int64 * 8),
    ]  # fmt: skip


def attend_native(
    attention: Attention, queries: Tensor, cached: CachedTokens, news: tuple[Tensor, ...] | None = None
) -> Tensor | None:
    """Attends as ``decode.attend_cached`` says: [B, H, d] -> [B, H, e]; None, and nothing done, where it cannot.

    It cannot where there is no compiler, where gradients are wanted, or for other forms and types. ``news``: the newest
    token's entries, [B, 1, ...], which are packed into the cache first; None: they are in it.
    """
    if not plain(queries):
        return None
    plan = _plan(attention)
    return None if plan is None else plan.attend(queries, cached, news)


_plans: WeakKeyDictionary[Attention, Plan | None] = WeakKeyDictionary()


def _plan(attention: Attention) -> Plan | None:
    """Returns the layer's plan, made anew when its factors or the wanted precision have changed; None: not served."""
    known = _plans.get(attention)
    if known is not None and known.state == _state(attention):
        return known
    if not _served(attention) or compiled.load() is None:
        return None
    plan = _plans[attention] = Plan(attention)
    return plan


def _served(attention: Attention) -> bool:
    if not isinstance(attention, FactorizedAttention) or not isinstance(attention.keys, _KEYS):
        return False
    if not isinstance(attention.values, _VALUES) or any(len(e.runs) > MAX_SEGMENTS for e in attention.entries):
        return False
    return not are_stored(attention)


def _precision() -> str:
    return getattr(torch.backends.mkldnn.matmul, "fp32_precision", "none")


def _state(attention: FactorizedAttention) -> tuple:
    """Returns what a plan is made of, in a form that differs when it does."""
    # Dictionaries, not attributes: modules look those up slowly, and this is asked for at every step of every layer.
    parts = attention._modules
    keys, values = parts["keys"], parts["values"]
    parameters = []
    if not isinstance(keys, DenseKeys):
        own = keys._parameters
        parameters += (own["up"], own["center"], keys._modules["norm"]._parameters["weight"])
    if isinstance(values, JointValues):
        parameters.append(values._parameters["up"])
    return _precision(), *[(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in parameters]


class _Workspace(threading.local):
    """Memory that layers use in turn: freshly allocated pages would cost more than the work in them."""

    memory: Tensor | None = None

    def of(self, size: int) -> Tensor:
        if self.memory is None or self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=torch.uint8)
        return self.memory


_workspace = _Workspace()


class Plan:
    """What does not change between steps of one layer."""

    def __init__(self, attention: FactorizedAttention) -> None:
        config, keys, values, entries = attention.config, attention.keys, attention.values, attention.entries
        self.state, self.heads, self.joint = _state(attention), config.num_heads, isinstance(values, JointValues)
        self.width = config.head_dim if self.joint else entries[-1].count
        self.cached_norm = attention.spec.cached_norm
        self.idle: list[_Call] = []
        self.run, self.parallel = compiled.load().tpa_attend, compiled.parallel()
        self.job = job = _Job(
            heads=config.num_heads, groups=config.num_kv_heads, dim=config.head_dim, scale=config.scale,
            eps=config.rms_norm_eps, normed=isinstance(keys, JointKeys), rebuilt=not isinstance(keys, DenseKeys),
            joint=self.joint,
        )  # fmt: skip
        self.key_shapes = _lay_out(job.keys, entries[0])
        if not self.joint:
            self.value_shapes = _lay_out(job.values, entries[-1])
        else:
            self.expand = values.up.detach().contiguous()
            job.expand, job.expand_kind, job.expanded = self.expand.data_ptr(), KINDS[self.expand.dtype], self.width
        job.padded = job.keys.padded
        if job.rebuilt:
            self._prepare_keys(config, keys)

    def _prepare_keys(self, config: Gemma3Config, keys: LatentKeys | JointKeys) -> None:
        """Lays out U, the norm's weight and the center's key."""
        job, groups = self.job, config.num_kv_heads
        dtype = accumulation_dtype(keys.up.dtype)
        half = -(-config.head_dim // PADDING) * PADDING // 2
        job.padded = 2 * half
        up, center, weight = (p.detach().to(dtype) for p in (keys.up, keys.center, keys.norm.weight))
        up, weight = up.expand(groups, -1, -1), 1.0 + weight  # some forms have one U for all heads
        if not job.normed:  # the norm is in the latent already
            up, weight = up * weight[:, None], torch.ones_like(weight)
        bias = torch.einsum("gdr,gr->gd", up, center.expand(groups, -1))
        self.bias, self.weight = (_halves(t.float(), half).contiguous() for t in (bias, weight))
        columns = up.new_zeros(groups, job.keys.padded, job.padded, dtype=torch.float32)
        columns[:, : up.shape[-1]] = _halves(up.mT.float(), half)
        if compiled.has_tiles():
            job.products = 1 if keys.up.dtype == torch.bfloat16 or _precision() == "bf16" else 3
            columns = _tiles(columns, 2 if job.products > 1 else 1)
        self.up = columns.contiguous()
        job.bias, job.weight, job.up = (t.data_ptr() for t in (self.bias, self.weight, self.up))

    def attend(self, queries: Tensor, cached: CachedTokens, news: tuple[Tensor, ...] | None) -> Tensor | None:
        """See ``attend_native``."""
        # What Python does here is as cold as the caches of a core after a layer's weights: every operation counts.
        call = self._call(cached)
        if call is None:
            return None
        job, lengths, rows = call.job, cached.lengths, cached.rows
        if lengths.dtype != torch.int32 or not lengths.is_contiguous():
            lengths = lengths.to(torch.int32).contiguous()
        if rows is not None:
            rows = rows.to(torch.int64).contiguous()
        queries, kept = queries.contiguous(), []  # kept: what the job points to
        for index, entry in enumerate((job.keys,) if self.joint else (job.keys, job.values)):
            entry.news = None
            if news is not None:
                kept.append(news[index].contiguous())
                entry.news, entry.news_kind = kept[index].data_ptr(), KINDS[kept[index].dtype]
        batch = len(queries)
        out = queries.new_empty(batch, self.heads, self.width)
        job.batch, job.threads = batch, torch.get_num_threads()
        job.lengths, job.rows = lengths.data_ptr(), None if rows is None else rows.data_ptr()
        job.queries, job.query_kind, job.out = queries.data_ptr(), KINDS[queries.dtype], out.data_ptr()
        size = 0
        while True:
            memory = _workspace.of(size)
            job.workspace, job.workspace_bytes = memory.data_ptr(), memory.numel()
            size = self.run(call.address, self.parallel)
            if not size:
                self.idle.append(call)
                return out

    def _call(self, cached: CachedTokens) -> _Call | None:
        """Returns a job that points to what is cached, mostly the last step's; None: it is of no kind that is read."""
        held = (*cached.stored, *cached.rotary)
        try:
            call = self.idle.pop()  # threads may share a layer: nobody else has this one now
            if len(call.held) == len(held) and all(map(is_, held, [r() for r in call.held])):
                return call
        except IndexError:
            pass
        if any(t.dtype != torch.float32 or not t.is_contiguous() for t in cached.rotary):
            return None
        job, count = _Job.from_buffer_copy(self.job), self.key_shapes.tensors
        if not _point(job.keys, self.key_shapes, cached.stored[:count]):
            return None
        if not self.joint and not _point(job.values, self.value_shapes, cached.stored[count:]):
            return None
        if self.cached_norm and not _point_norms(job, cached.stored[-1]):
            return None
        job.slots, (job.cosine, job.sine) = cached.slots, (t.data_ptr() for t in cached.rotary)
        return _Call(job, ctypes.byref(job), [ref(t) for t in held])


@dataclass(frozen=True)
class _Call:
    """A job, where it lies, and the tensors of a cache that it points to."""

    job: _Job
    address: object
    held: list[ref[Tensor]]


@dataclass(frozen=True)
class _Shapes:
    """Where the tensors of an entry go: of each, whether it holds scales, and the runs that lie in it, (number, first
    group) each."""

    places: list[tuple[bool, list[tuple[int, int]]]]

    @property
    def tensors(self) -> int:
        return len(self.places)


def _lay_out(target: _Entry, entry: Entry) -> _Shapes:
    """Describes ``entry`` in ``target``, but for its memory; C reads numbers in their order, run by run."""
    places: list[tuple[bool, list[tuple[int, int]]]] = []
    target.rows, target.count, target.segments = entry.rows, entry.count, len(entry.runs)
    target.padded = -(-entry.count // PADDING) * PADDING
    for index, run in enumerate(entry.runs):
        segment = target.segment[index]
        segment.start, segment.count, segment.bits = run.start, run.count, run.bits
        if run.bits < 16:
            low, high = (*planes(run.bits), 0)[:2]
            whole = -(-entry.segments[run.segment].count * low // 8)
            segment.high = whole + run.within // 8 * high - run.within // 8 * low
    for index, (bits, *_) in enumerate(entry.segments):
        runs = [(i, run.within // GROUP) for i, run in enumerate(entry.runs) if run.segment == index]
        places += [(False, runs)] if bits == 16 else [(False, runs), (True, runs)]
    return _Shapes(places)


def _point(target: _Entry, shapes: _Shapes, stored: tuple[Tensor, ...]) -> bool:
    """Has ``target`` point to the tensors [rows, slots, heads, n] of its entry; False: of no kind that is read."""
    for (scales, runs), t in zip(shapes.places, stored, strict=True):
        size, (row, token, head, *inner) = t.element_size(), t.stride()
        kind = 0 if t.dtype == torch.uint8 else KINDS.get(t.dtype)
        if kind is None or inner[-1] != 1:
            return False
        for index, group in runs:
            segment = target.segment[index]
            if scales:
                segment.scales, segment.strides[3:] = (
                    t.data_ptr() + size * group * inner[0], (size * row, size * token, size * head)
                )  # fmt: skip
            else:
                before = group * (GROUP * size if segment.bits == 16 else GROUP // 8 * planes(segment.bits)[0])
                segment.codes, segment.kind = t.data_ptr() + before, kind
                segment.strides[:3] = size * row, size * token, size * head
    return True


def _point_norms(job: _Job, t: Tensor) -> bool:
    """Has ``job`` point to the norms [rows, slots, 1, G] of a cache; False: of no kind that is written."""
    if t.dtype not in KINDS or t.stride(-1) != 1:
        return False
    size = t.element_size()
    job.norms, job.norm_kind, job.norm_row, job.norm_token = (
        t.data_ptr(), KINDS[t.dtype], size * t.stride(0), size * t.stride(1)
    )  # fmt: skip
    return True


def _halves(t: Tensor, half: int) -> Tensor:
    """[..., d] -> [..., 2·half]: both halves of d filled with zeros."""
    return F.pad(t.unflatten(-1, (2, -1)), (0, half - t.shape[-1] // 2)).flatten(-2)


def _tiles(columns: Tensor, parts: int) -> Tensor:
    """[G, r, d] in float32 -> bfloat16 [G, d/32, r/32, parts, 2, 16, 16, 2], as ``multiply_tiles`` reads it."""
    high = columns.to(torch.bfloat16)
    split = [high, (columns - high.float()).to(torch.bfloat16)][:parts]
    blocks = torch.stack(split, 1).unflatten(-1, (-1, 2, 16)).unflatten(2, (-1, 2, 16))
    # [G, parts, r/32, 2, 16 pairs, d/32, 2, 16 columns]
    return blocks.permute(0, 5, 2, 1, 6, 4, 7, 3)
