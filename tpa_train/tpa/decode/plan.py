"""What the decoding kernels need to know of a layer: how its entries lie in memory, and its constants, made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_train.gemma3.attention import Attention, RotaryTable
from tpa_train.gemma3.config import Gemma3Config, LayerKind
from tpa_train.gemma3.layers import rotary_table
from tpa_train.tpa.decode.turning import SPANS, Turning, turning
from tpa_train.tpa.entries import Entry
from tpa_train.tpa.quantization import GROUP, whole_words

OWN, ONE_HOT, CACHED, CONSTANT = 0, 1, 2, 3  # of ``values.weighted``
UNROLLED = 4  # of ``values``: rows of a sum that are not a loop of their own
LEAST = 16  # the smallest side of a matrix product
LONGEST = 128  # tokens of the largest tile
WIDE = 128  # numbers of a piece of values whose codes are multiplied as they are
TOGETHER = 192  # numbers of a latent, see ``rebuilt.WIDE``
WIDEST = 1024  # numbers of a latent that U can be absorbed for: sums of wider values do not fit in a program


def power_of_two(n: int) -> int:
    """Returns the smallest power of two that is no less than ``n``."""
    return 1 << (n - 1).bit_length()


def _blocks(count: int, largest: int, unit: int, whole: bool = False) -> list[tuple[int, int]]:
    """Cuts ``count`` numbers into (start, block); blocks are powers of two, ``unit`` at least, and mostly filled or,
    if they are to be ``whole``, as few as they can be."""
    found, start = [], 0
    while start < count:
        left = count - start
        block = max(unit, power_of_two(left))
        if 4 * left <= 3 * block and block > unit and not whole:
            block //= 2
        block = min(block, largest)
        found.append((start, block))
        start += block
    return found


def pieces(entry: Entry, tensor: int, largest: int, shares: int = 0) -> tuple[int, ...]:
    """Returns ``unpacking``'s PIECES of ``entry``, whose first tensor is the layer's ``tensor``-th.

    ``largest``: numbers that are unpacked at a time, a power of two, at least 32. ``shares``: as in ``values``, where
    codes are multiplied as they are, in blocks of up to WIDE numbers.
    """
    found: list[int] = []
    padded = 0
    for bits, count, groups in entry.segments:
        blocks = _blocks(count, largest, LEAST if bits == 16 else GROUP)
        if bits < 16 and shares and whole_words(count, bits):
            blocks = _blocks(count, min(WIDE, GROUP * shares), GROUP, whole=True)
        for first, block in blocks:
            held = groups[first // GROUP : -(-(first + block) // GROUP)]
            found += [tensor, bits, count, first, block, sum(g << 16 * i for i, g in enumerate(held)), padded]
            padded += block
        tensor += 1 if bits == 16 else 2
    return tuple(found)


def columns(piece: Sequence[int]) -> list[slice]:
    """Returns which numbers of the entry a piece holds, in its order."""
    _, _, count, first, block, held, _ = piece
    found, left, at = [], min(block, count - first), first % GROUP
    while left:
        size, start = min(GROUP - at, left), (held & 0xFFFF) * GROUP + at
        found.append(slice(start, start + size))
        left, at, held = left - size, 0, held >> 16
    return found


def order(block: int, device: torch.device) -> Tensor:
    """Returns which numbers the columns of a block of packed ones hold, as ``unpacking.order`` does.

    Of eight neighbours in a group of 32, t-th, the q-th and (q + 4)-th are columns 8 q + 2 t and 8 q + 2 t + 1.
    """
    n = torch.arange(block, device=device)
    return n // GROUP * GROUP + n // 2 % 4 * 8 + n % 2 * 4 + n // 8 % 4


def operand_type(entry: Entry, dtype: torch.dtype) -> torch.dtype:
    """Returns what products with an entry's numbers are computed in, where queries are of ``dtype``.

    Packed numbers are exact in float16, but for one rounding, and are made two at a time; in bfloat16 they are not.
    """
    return dtype if entry.exact or dtype == torch.float32 else torch.float16


@dataclass(frozen=True)
class Rows:
    """How keys or values are a sum of an entry's rows. ``mode``: of ``values.weighted``, of which ``weights`` are the
    constants [rows, G] and ``tensor`` the index of the cached ones (−1: none)."""

    entry: Entry
    first: int  # of the entry's tensors, among all of the layer
    mode: int = OWN
    tensor: int = -1
    weights: Tensor | None = None


@dataclass
class Plan:
    """A layer's constants on its device. What follows ``rebuilt`` is for keys that are, or U absorbed into queries."""

    keys: Rows
    values: Rows
    per_program: int  # KV heads
    norm: int = -1  # tensor of the norms that scores take, −1 where there is none
    places: Tensor | None = None  # 0 … 31, as ``values`` takes them
    expand: Tensor | None = None  # U_v [G, d, r] of a joint latent, for the result
    rebuilt: bool = False
    up: Tensor | None = None  # [G or 1, 2, d/2, r], float32, as ``lay_out`` takes it
    offset: Tensor | None = None
    gamma: Tensor | None = None
    relative: Tensor | None = None
    eps: float = 0.0
    config: Gemma3Config | None = None
    kind: LayerKind = "local"
    heads: int = 1  # query heads of a KV head, with padding
    dtype: torch.dtype = torch.float32
    centered: bool = False  # whether no key has an offset
    laid_out: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    absorbed: dict[tuple, AbsorbedKeys | None] = field(default_factory=dict)

    def joins(self, count: int) -> bool:
        """Returns whether ``count`` KV heads' latents, which lie side by side, can be read as one row.

        Their numbers have to fill whole blocks, of one width; query heads, a power of two.
        """
        numbers, heads = self.keys.entry.count, self.config.num_heads // self.config.num_kv_heads
        if self.config.num_kv_heads % count or heads != self.heads or self.norm >= 0:
            return False
        if sum(block for _, block in _blocks(numbers, power_of_two(numbers), LEAST)) > numbers:
            return False
        for rows in (self.keys, self.values):
            unit = LEAST if rows.entry.exact else GROUP
            if rows.mode != OWN or rows.entry.rows == 1 or len(rows.entry.segments) > 1 or rows.entry.count % unit:
                return False
        return True

    def lay_out(self, key_pieces: tuple[int, ...], half: int, dtype: torch.dtype) -> Tensor:
        """Returns U as ``rebuilt.attend_rebuilt`` reads it, [G or 1, 2, WIDTH, HB]: blocks padded with zeros."""
        if key_pieces not in self.laid_out:
            up = self.up.mT  # [G or 1, 2, r, d/2]
            blocks = []
            for i in range(0, len(key_pieces), 7):
                _, bits, _, _, block, *_ = piece = key_pieces[i : i + 7]
                part = torch.cat([up[:, :, numbers] for numbers in columns(piece)], dim=2)
                part = F.pad(part, (0, half - part.shape[-1], 0, block - part.shape[-2]))
                blocks.append(part if bits == 16 else part[:, :, order(block, part.device)])
            most = torch.finfo(dtype).max
            laid_out = torch.cat(blocks, dim=2).clamp(-most, most).to(dtype).contiguous()
            if _recorded(laid_out.device):  # filled when the graph runs, not now
                return laid_out
            self.laid_out[key_pieces] = laid_out
        return self.laid_out[key_pieces]

    def absorb(self, tokens: int, always: bool = False, fast: int | None = None) -> AbsorbedKeys | None:
        """Returns how U goes into the queries of tiles of ``tokens``; None where keys are rebuilt.

        Which they are in local layers: spans of a ring begin anywhere. ``fast``: as ``turning`` takes it.
        """
        key = (tokens, always, fast)
        if key not in self.absorbed:
            device = self.relative.device
            if _recorded(device):
                return None
            found = None
            # Norms that are not cached need keys.
            if self.kind == "global" and self.gamma is None and self.up.shape[-1] <= WIDEST:
                found = _turning(self.config, tokens, self.heads, self.up.shape[-1], self.dtype, always, fast)
            if found is not None:
                pad = self.relative.shape[-1] - found.bends.shape[-1]
                bends = F.pad(found.bends, (0, pad)).to(device, torch.float32)
                basis = found.basis.to(device, self.relative.dtype).contiguous()
                table = self.relative[..., : found.fast].movedim(0, -1).contiguous()
                found = AbsorbedKeys(found.span, found.terms, found.fast, basis, bends, table)
            self.absorbed[key] = found
        return self.absorbed[key]


@dataclass(frozen=True)
class AbsorbedKeys:
    """``turning.Turning`` as ``absorbed``'s kernels read it: basis [S, J], bends float32 [2, J, HB]. ``table``: cos and
    sin of the fast pairs within a tile, [LONGEST, FAST, 2]."""

    span: int
    terms: int
    fast: int
    basis: Tensor
    bends: Tensor
    table: Tensor
    made: dict[int, Tensor] = field(default_factory=dict)

    def turns(self, rotary: RotaryTable, spans: int, dtype: torch.dtype) -> Tensor:
        """Returns X = cos(θ p) C − sin(θ p) S and Y = sin(θ p) C + cos(θ p) S of every span's start p, [N, J, 2 HB]."""
        if spans in self.made:
            return self.made[spans]
        pad = self.bends.shape[-1] - rotary[0].shape[-1]
        cos, sin = (F.pad(t[:: self.span][:spans], (0, pad)) for t in rotary)
        bent, rest = self.bends
        turns = torch.cat((cos * bent - sin * rest, sin * bent + cos * rest), dim=-1).to(dtype).contiguous()
        if not _recorded(turns.device):  # else filled when the graph runs, not now
            self.made[spans] = turns
        return turns


@cache
def _turning(
    config: Gemma3Config, tokens: int, heads: int, rank: int, dtype: torch.dtype, always: bool, fast: int | None
) -> Turning | None:
    """``turning`` in global layers, once for all of them: it takes a decomposition for every span."""
    cos, sin = (t.squeeze(1) for t in rotary_table(config, "global", torch.arange(max(SPANS))))
    return turning((cos, sin), tokens, heads, rank, dtype, always, fast)


def _recorded(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_plans: WeakKeyDictionary[nn.Module, tuple[tuple, Plan]] = WeakKeyDictionary()


def plan_of(attention: Attention, dtype: torch.dtype, device: torch.device) -> Plan:
    """Returns the layer's plan for operands of ``dtype``, made anew where a parameter has changed since the last time.

    A CUDA graph keeps the constants that it was captured with.
    """
    state = tuple(
        (p.data_ptr(), 0 if p.is_inference() else p._version)
        for part in (getattr(attention, "keys", None), getattr(attention, "values", None))
        if part is not None
        for p in _constants(part)
    )
    known = _plans.get(attention)
    if known is None or known[0] != (dtype, device, state):
        with torch.no_grad():
            known = ((dtype, device, state), _build(attention, dtype, device))
        if not _recorded(device):
            _plans[attention] = known
    return known[1]


def _constants(part: nn.Module) -> list[Tensor]:
    """The parameters of keys or values that a plan is made of."""
    names = ("up", "center", "a_bias", "heads", "u_feat")
    found = [getattr(part, name, None) for name in names]
    norm = getattr(part, "norm", None)
    return [p for p in (*found, None if norm is None else norm.weight) if p is not None]


def _build(attention: Attention, dtype: torch.dtype, device: torch.device) -> Plan:
    config = attention.config
    groups, width = config.num_kv_heads, config.head_dim
    spec = getattr(attention, "spec", None)
    if spec is None:
        dense = Entry(groups, width)
        return Plan(Rows(dense, 0), Rows(dense, 1), 1)
    first, firsts = 0, []
    for entry in attention.entries:
        firsts.append(first)
        first += len(entry.storage())
    count = attention.num_key_entries
    key_entries = list(zip(attention.entries[:count], firsts[:count], strict=True))
    value_entries = list(zip(attention.entries[count:], firsts[count:], strict=True))
    plan = Plan(_rows(attention.keys, spec.form_k, key_entries), Rows(*key_entries[0]), 1)
    plan.places = torch.arange(GROUP, dtype=torch.int16, device=device)
    if len(key_entries) > 1 and spec.form_k != "contextual":
        plan.norm = key_entries[1][1]
    if spec.form_k in ("latent", "constant_b", "joint", "tucker"):
        _rebuild(plan, attention, spec.form_k, dtype, device)
    if spec.form_v == "joint":
        plan.expand = attention.values.up.detach().to(device, dtype)
    else:
        plan.values = _rows(attention.values, spec.form_v, value_entries)
    # Rows that all KV heads share are read once where that is possible: a rebuilt key is one head's.
    if not plan.rebuilt and OWN != max(plan.keys.mode, plan.values.mode):
        plan.per_program = groups
        plan.keys, plan.values = (replace(r, mode=r.mode or ONE_HOT) for r in (plan.keys, plan.values))
    return plan


def _rows(part: nn.Module, form: str, entries: list[tuple[Entry, int]]) -> Rows:
    if form == "contextual":
        return Rows(*entries[1], mode=CACHED, tensor=entries[0][1])
    if form == "constant_a":
        return Rows(*entries[0], mode=CONSTANT, weights=part.a_bias.detach().float() / part.rank)
    if form == "tucker" and part.mixes_when_read:
        return Rows(*entries[0], mode=CONSTANT, weights=part.heads.detach().float().mT.contiguous())
    return Rows(*entries[0])


def _rebuild(plan: Plan, attention: Attention, form: str, dtype: torch.dtype, device: torch.device) -> None:
    """Fills in what keys are rebuilt with: U c + k₀ with U and k₀ per head, and the rotation within a tile."""
    keys, config = attention.keys, attention.config
    width, pad = config.head_dim, max(LEAST, power_of_two(config.head_dim // 2)) - config.head_dim // 2
    weight = 1.0 + keys.norm.weight.detach().float()
    up = (keys.u_feat[None] if form == "tucker" else keys.up).detach().float()
    center = keys.center.detach().float()
    if form == "tucker" and keys.mixes_when_read:
        center = keys.heads.detach().float() @ center
    if form == "joint" and plan.norm < 0:
        plan.gamma = F.pad(weight.unflatten(0, (2, -1)), (0, pad)).contiguous()
    else:
        up = weight[:, None] * up
    offset = torch.einsum("gdr,gr->gd", up.expand(config.num_kv_heads, -1, -1), center.expand(config.num_kv_heads, -1))
    plan.offset = F.pad(offset.unflatten(1, (2, -1)), (0, pad)).contiguous()
    plan.rebuilt, plan.up, plan.eps = True, up.unflatten(1, (2, width // 2)), keys.norm.eps
    plan.heads = power_of_two(config.num_heads // config.num_kv_heads)
    plan.dtype, plan.centered = dtype, not _recorded(device) and not plan.offset.any()
    plan.config, plan.kind = config, attention.kind
    table = rotary_table(config, attention.kind, torch.arange(LONGEST, device=device))
    table = F.pad(torch.stack(table).squeeze(2), (0, pad))
    plan.relative = table.to(torch.float32 if dtype == torch.float32 else torch.float16).contiguous()
