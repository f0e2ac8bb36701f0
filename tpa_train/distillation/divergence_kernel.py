"""Triton kernels of the distillation loss on CUDA; ``losses.py`` says what is computed and calls ``chunk_divergence``.

A chunk of N tokens goes through four launches, and its logits never reach memory in float32:

1. ``_encode_logits``: teacher logits x = h_T Eᵀ / T and differences y = (h_S − h_T) Eᵀ / T from half precision operands
   with float32 accumulation. Each tile leaves its softmax statistics, and x and y in 16 bits a number;
2. ``_combine``: the statistics of a row's tiles become log-sum-exps and the divergence;
3. ``_gradient``: the gradient with respect to the student's logits, in float16, in place of y;
4. cuBLAS: that gradient times the head.

Why it is accurate where student and teacher nearly agree: y comes from the small difference of the hidden states, not
from a difference of large logits, and probabilities differ by p_T·(e^(y − Δ) − 1) with Δ = log Σ p_T e^y. Hidden states
in float32 lose 13 bits in float16; for x, where a rounding error is as large as logits are, what they lose goes through
a product of its own. The 16-bit numbers are fixed-point with a scale for each row of a tile: at most max|y|/65534 off
in y, and (max x − min x)/131070 in x, where half precision floats would be 2⁻¹¹ of the number off.

Shapes: N tokens of the chunk, V vocabulary, D hidden size, B = ⌈V/BN⌉ tiles of a row. ``stats`` is float32 [B, S, N].
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tpa_train.distillation.divergence import Divergence

ROUND = tl.constexpr(1.5 * 2**23)
FORWARD, REVERSE, JSD = 0, 1, 2  # values of KIND
KINDS = {"forward_kl": FORWARD, "reverse_kl": REVERSE, "jsd": JSD}
# Rows of ``stats``: of the teacher's x and the student's x + y the maximum and Σ e^(· − maximum), then
MAX_T, SUM_T, MAX_S, SUM_S = 0, 1, 2, 3
CHANGE = 4  # of float32 logits: Σ e^(x − MAX_T) (e^y − 1)
MOMENT = 5  # Σ y under the teacher's weights (forward) or the student's (reverse)
STEP_T, STEP_Y = 6, 7  # of the 16-bit numbers
SUM_1, LABEL = 8, 9  # with cross-entropy: Σ e^(T·(x + y − MAX_S)), and T·(x + y) at the label
NUM_STATS, NUM_STATS_CE = 8, 10
# Rows of what ``_combine`` leaves, [R, N]
LSE_T, DELTA, CENTER, LSE_1, LOSS = 0, 1, 2, 3, 4
NUM_ROWS = 5


@triton.jit
def _expm1(x):
    """e^x − 1; a Taylor series where the subtraction would cost digits."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _leave_statistics(
    x, y, max_t, cols, rows, valid, labels, stats, block, n, temperature,
    CODED: tl.constexpr, KIND: tl.constexpr, HAS_CE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Writes the statistics of a tile's rows; x, y [BM, BN], columns beyond V hold x = −1e30, y = 0."""
    base = stats + block.to(tl.int64) * S * n + rows
    z = x + y
    max_s = tl.max(z, 1)
    e_t = tl.exp(x - max_t[:, None])
    e_s = tl.exp(z - max_s[:, None])
    tl.store(base + 0 * n, max_t, mask=valid)
    tl.store(base + 1 * n, tl.sum(e_t, 1), mask=valid)
    tl.store(base + 2 * n, max_s, mask=valid)
    tl.store(base + 3 * n, tl.sum(e_s, 1), mask=valid)
    if not CODED:
        # Infinite or NaN where the student's largest logit is far above the teacher's: _combine then does without.
        near, far = e_t * _expm1(y), e_s * tl.exp(max_s - max_t)[:, None] - e_t
        tl.store(base + 4 * n, tl.sum(tl.where(tl.abs(y) < 0.25, near, far), 1), mask=valid)
    if KIND == 0:
        tl.store(base + 5 * n, tl.sum(e_t * y, 1), mask=valid)
    if KIND == 1:
        tl.store(base + 5 * n, tl.sum(e_s * y, 1), mask=valid)
    if HAS_CE:
        label = tl.load(labels + rows, mask=valid, other=-1)
        tl.store(base + 8 * n, tl.sum(tl.exp((z - max_s[:, None]) * temperature), 1), mask=valid)
        hit = cols[None, :] == label[:, None]
        tl.store(base + 9 * n, tl.sum(tl.where(hit, z * temperature, 0.0), 1), mask=valid)


@triton.jit
def _encode_logits(
    h_t, h_s, low_t, low_s, e_t, e_s, scale_t, scale_s, codes_x, codes_y, labels, stats,
    n, vocab, temperature, hidden_size: tl.constexpr,
    SHARED: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr, HAS_CE: tl.constexpr,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of x and y: two products that share the head's tile.

    Args (in memory):
        h_t, h_s: float16 [N, D]; with SHARED, ``h_s`` holds h_S − h_T, else h_S.
        low_t, low_s: with SPLIT, what h_t (and without SHARED h_s) lost to rounding.
        e_t, e_s: heads, float16 [V, D].
        scale_t, scale_s: what the products are multiplied by, 1/T included, float32 [N].
        codes_x, codes_y: int16 [N, V], written.
    """
    block = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = block * BN + tl.arange(0, BN)
    valid, inside = rows < n, cols < vocab
    ks = tl.arange(0, BK)
    # Rows and columns beyond the end repeat the last one: loads need no mask, and nothing of them is kept.
    at_row = tl.minimum(rows, n - 1)[:, None] * hidden_size + ks[None, :]
    at_col = tl.minimum(cols, vocab - 1)[None, :] * hidden_size + ks[:, None]
    x = tl.zeros((BM, BN), tl.float32)
    y = tl.zeros((BM, BN), tl.float32)
    for k in range(0, hidden_size, BK):
        left = ks < hidden_size - k
        w = tl.load(e_t + at_col + k, mask=left[:, None], other=0.0)
        x = tl.dot(tl.load(h_t + at_row + k, mask=left[None, :], other=0.0), w, x)
        if not SHARED:
            w = tl.load(e_s + at_col + k, mask=left[:, None], other=0.0)
        y = tl.dot(tl.load(h_s + at_row + k, mask=left[None, :], other=0.0), w, y)
    if SPLIT:  # a loop of its own: more tiles in the first one would leave no room for a second program
        for k in range(0, hidden_size, BK):
            left = ks < hidden_size - k
            w = tl.load(e_t + at_col + k, mask=left[:, None], other=0.0)
            x = tl.dot(tl.load(low_t + at_row + k, mask=left[None, :], other=0.0), w, x)
            if not SHARED:
                w = tl.load(e_s + at_col + k, mask=left[:, None], other=0.0)
                y = tl.dot(tl.load(low_s + at_row + k, mask=left[None, :], other=0.0), w, y)
    x = x * tl.load(scale_t + rows, mask=valid, other=0.0)[:, None]
    y = y * tl.load(scale_s + rows, mask=valid, other=0.0)[:, None]
    if not SHARED:
        y = y - x
    if EVEN:
        top, bottom = tl.max(x, 1), tl.min(x, 1)
    else:
        y = tl.where(inside[None, :], y, 0.0)
        top = tl.max(tl.where(inside[None, :], x, float("-inf")), 1)
        bottom = tl.min(tl.where(inside[None, :], x, float("inf")), 1)
    step_x, step_y = (top - bottom) / 65535, tl.max(tl.abs(y), 1) / 32767
    # Adding ROUND leaves the nearest whole number in the low bits, as two's complement.
    code_x = (top[:, None] - x) * tl.where(step_x > 0, 1 / step_x, 0.0)[:, None] + ROUND
    code_y = y * tl.where(step_y > 0, 1 / step_y, 0.0)[:, None] + ROUND
    at = rows.to(tl.int64)[:, None] * vocab + cols[None, :]
    keep = valid[:, None] & inside[None, :]
    tl.store(codes_x + at, code_x.to(tl.int32, bitcast=True).to(tl.int16), mask=keep)
    tl.store(codes_y + at, code_y.to(tl.int32, bitcast=True).to(tl.int16), mask=keep)
    base = stats + block.to(tl.int64) * S * n + rows
    tl.store(base + 6 * n, step_x, mask=valid)
    tl.store(base + 7 * n, step_y, mask=valid)
    # From the numbers as they are kept, so that loss and gradient belong to the same distributions.
    x = top[:, None] - (code_x - ROUND) * step_x[:, None]
    y = (code_y - ROUND) * step_y[:, None]
    if not EVEN:
        x = tl.where(inside[None, :], x, -1e30)
    _leave_statistics(x, y, top, cols, rows, valid, labels, stats, block, n, temperature, True, KIND, HAS_CE, S)


@triton.jit
def _read_statistics(
    logits_x, logits_y, labels, stats, n, vocab, temperature,
    KIND: tl.constexpr, HAS_CE: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """As ``_encode_logits`` for logits x, y that are float32 [N, V] in memory, for float32 heads."""
    block = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = block * BN + tl.arange(0, BN)
    valid = rows < n
    keep = valid[:, None] & (cols < vocab)[None, :]
    at = rows.to(tl.int64)[:, None] * vocab + cols[None, :]
    x = tl.load(logits_x + at, mask=keep, other=-1e30)
    y = tl.load(logits_y + at, mask=keep, other=0.0)
    top = tl.max(x, 1)
    _leave_statistics(x, y, top, cols, rows, valid, labels, stats, block, n, temperature, False, KIND, HAS_CE, S)


@triton.jit
def _combine(
    stats, labels, found, n, temperature, ce_weight, blocks: tl.constexpr,
    CODED: tl.constexpr, KIND: tl.constexpr, HAS_CE: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps and losses of BM rows, over their tiles BB at a time; the loss of JSD comes later."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = rows < n
    max_t = tl.full((BM,), float("-inf"), tl.float32)
    max_s = tl.full((BM,), float("-inf"), tl.float32)
    sum_t = tl.zeros((BM,), tl.float32)
    sum_s = tl.zeros((BM,), tl.float32)
    change = tl.zeros((BM,), tl.float32)
    moment = tl.zeros((BM,), tl.float32)
    sum_1 = tl.zeros((BM,), tl.float32)
    at_label = tl.zeros((BM,), tl.float32)
    for first in range(0, blocks, BB):
        block = first + tl.arange(0, BB)
        keep = (block < blocks)[:, None] & valid[None, :]
        at = stats + block.to(tl.int64)[:, None] * S * n + rows[None, :]
        tile_t = tl.load(at + 0 * n, mask=keep, other=float("-inf"))
        tile_s = tl.load(at + 2 * n, mask=keep, other=float("-inf"))
        new_t = tl.maximum(max_t, tl.max(tile_t, 0))
        new_s = tl.maximum(max_s, tl.max(tile_s, 0))
        new_t = tl.where(valid, new_t, 0.0)
        new_s = tl.where(valid, new_s, 0.0)
        old_t, factor_t = tl.exp(max_t - new_t), tl.exp(tile_t - new_t[None, :])
        old_s, factor_s = tl.exp(max_s - new_s), tl.exp(tile_s - new_s[None, :])
        sum_t = sum_t * old_t + tl.sum(tl.load(at + 1 * n, mask=keep, other=0.0) * factor_t, 0)
        sum_s = sum_s * old_s + tl.sum(tl.load(at + 3 * n, mask=keep, other=0.0) * factor_s, 0)
        if not CODED:
            change = change * old_t + tl.sum(tl.load(at + 4 * n, mask=keep, other=0.0) * factor_t, 0)
        if KIND == 0:
            moment = moment * old_t + tl.sum(tl.load(at + 5 * n, mask=keep, other=0.0) * factor_t, 0)
        if KIND == 1:
            moment = moment * old_s + tl.sum(tl.load(at + 5 * n, mask=keep, other=0.0) * factor_s, 0)
        if HAS_CE:
            part = tl.load(at + 8 * n, mask=keep, other=0.0) * tl.exp((tile_s - new_s[None, :]) * temperature)
            sum_1 = sum_1 * tl.exp((max_s - new_s) * temperature) + tl.sum(part, 0)
            at_label += tl.sum(tl.load(at + 9 * n, mask=keep, other=0.0), 0)
        max_t, max_s = new_t, new_s
    lse_t = max_t + tl.log(sum_t)
    delta = max_s - max_t + tl.log(tl.div_rn(sum_s, sum_t))  # '/' is inexact: equal sums must give 1
    if not CODED:
        ratio = change / sum_t
        near = tl.abs(ratio) < 0.5  # false for NaN
        delta = tl.where(near, _log1p(tl.where(near, ratio, 0.0)), delta)
    out = found + rows
    loss = tl.zeros((BM,), tl.float32)
    if KIND == 0:
        loss = delta - moment / sum_t
    if KIND == 1:
        loss = moment / sum_s - delta
    tl.store(out + 0 * n, lse_t, mask=valid)
    tl.store(out + 1 * n, delta, mask=valid)
    tl.store(out + 2 * n, loss, mask=valid)  # what a reverse KL's gradient is centred by
    loss = loss * temperature * temperature
    if HAS_CE:
        lse_1 = max_s * temperature + tl.log(sum_1)
        tl.store(out + 3 * n, lse_1, mask=valid)
        labelled = tl.load(labels + rows, mask=valid, other=-1) >= 0
        loss = (1 - ce_weight) * loss + ce_weight * tl.where(labelled, lse_1 - at_label, 0.0)
    tl.store(out + 4 * n, loss, mask=valid)


@triton.jit
def _load_tile(
    logits_x, logits_y, stats, at, keep, block, rows, valid, n, CODED: tl.constexpr, S: tl.constexpr
):
    x = tl.load(logits_x + at, mask=keep, other=0)
    y = tl.load(logits_y + at, mask=keep, other=0)
    if CODED:
        base = stats + block.to(tl.int64) * S * n + rows
        top = tl.load(base + 0 * n, mask=valid, other=0.0)
        step_x = tl.load(base + 6 * n, mask=valid, other=0.0)
        step_y = tl.load(base + 7 * n, mask=valid, other=0.0)
        x = top[:, None] - (x.to(tl.int32) & 65535).to(tl.float32) * step_x[:, None]
        y = y.to(tl.float32) * step_y[:, None]
    return x, y


@triton.jit
def _jsd_statistics(
    logits_x, logits_y, stats, found, n, vocab, beta,
    CODED: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Leaves each tile's share of the JSD in CHANGE and of Σ p_S log(p_S/M) in MOMENT, for ``_combine_jsd``."""
    block = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = block * BN + tl.arange(0, BN)
    valid = rows < n
    keep = valid[:, None] & (cols < vocab)[None, :]
    at = rows.to(tl.int64)[:, None] * vocab + cols[None, :]
    x, y = _load_tile(logits_x, logits_y, stats, at, keep, block, rows, valid, n, CODED, S)
    lse_t = tl.load(found + rows, mask=valid, other=0.0)
    delta = tl.load(found + n + rows, mask=valid, other=0.0)
    log_p = x - lse_t[:, None]
    ratio = tl.where(keep, y - delta[:, None], 0.0)
    p_t, p_s = tl.where(keep, tl.exp(log_p), 0.0), tl.where(keep, tl.exp(log_p + ratio), 0.0)
    s_to_m = -_log1p(beta * _expm1(tl.minimum(-ratio, 80.0)))
    t_to_m = -_log1p((1 - beta) * _expm1(tl.minimum(ratio, 80.0)))
    base = stats + block.to(tl.int64) * S * n + rows
    share = beta * p_t * t_to_m + (1 - beta) * p_s * s_to_m
    tl.store(base + 4 * n, tl.sum(share, 1), mask=valid)
    tl.store(base + 5 * n, tl.sum(p_s * s_to_m, 1), mask=valid)


@triton.jit
def _combine_jsd(
    stats, found, n, temperature, ce_weight, blocks: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = rows < n
    loss = tl.zeros((BM,), tl.float32)
    center = tl.zeros((BM,), tl.float32)
    for first in range(0, blocks, BB):
        block = first + tl.arange(0, BB)
        keep = (block < blocks)[:, None] & valid[None, :]
        at = stats + block.to(tl.int64)[:, None] * S * n + rows[None, :]
        loss += tl.sum(tl.load(at + 4 * n, mask=keep, other=0.0), 0)
        center += tl.sum(tl.load(at + 5 * n, mask=keep, other=0.0), 0)
    tl.store(found + 2 * n + rows, center, mask=valid)
    # _combine left the cross-entropy's part of the loss, and nothing of the JSD's.
    rest = tl.load(found + 4 * n + rows, mask=valid, other=0.0)
    tl.store(found + 4 * n + rows, rest + (1 - ce_weight) * loss * temperature * temperature, mask=valid)


@triton.jit
def _gradient(
    logits_x, logits_y, out, labels, stats, found, n, vocab, temperature, beta, ce_weight, scale,
    KIND: tl.constexpr, HAS_CE: tl.constexpr, CODED: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes ``scale`` times the gradient of each row's loss with respect to its student logits; ``out`` may be y."""
    block = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = block * BN + tl.arange(0, BN)
    valid = rows < n
    keep = valid[:, None] & (cols < vocab)[None, :]
    at = rows.to(tl.int64)[:, None] * vocab + cols[None, :]
    x, y = _load_tile(logits_x, logits_y, stats, at, keep, block, rows, valid, n, CODED, S)
    lse_t = tl.load(found + rows, mask=valid, other=0.0)
    delta = tl.load(found + n + rows, mask=valid, other=0.0)
    log_p = x - lse_t[:, None]
    ratio = y - delta[:, None]  # log p_S − log p_T
    if KIND == 0:
        p_t = tl.exp(log_p)
        series = ratio * (1 + ratio * (1 / 2 + ratio * (1 / 6 + ratio * (1 / 24 + ratio * (1 / 120 + ratio / 720)))))
        gradient = tl.where(tl.abs(ratio) < 0.25, p_t * series, tl.exp(log_p + ratio) - p_t)
    else:
        center = tl.load(found + 2 * n + rows, mask=valid, other=0.0)
        if KIND == 1:
            gradient = tl.exp(log_p + ratio) * (ratio - center[:, None])
        else:
            s_to_m = -_log1p(beta * _expm1(tl.minimum(-ratio, 80.0)))
            gradient = (1 - beta) * tl.exp(log_p + ratio) * (s_to_m - center[:, None])
    gradient = gradient * temperature
    if HAS_CE:
        label = tl.load(labels + rows, mask=valid, other=-1)
        lse_1 = tl.load(found + 3 * n + rows, mask=valid, other=0.0)
        hard = tl.exp((x + y) * temperature - lse_1[:, None])
        hard = hard - (cols[None, :] == label[:, None]).to(tl.float32)
        gradient = (1 - ce_weight) * gradient + tl.where((label >= 0)[:, None], ce_weight * hard, 0.0)
    gradient = gradient * scale
    if CODED:
        gradient = tl.minimum(tl.maximum(gradient, -60000.0), 60000.0)
    tl.store(out + at, gradient.to(out.dtype.element_ty), mask=keep)


HEAD_ROWS = 32_768  # of the head whose gradient is added at a time
CHUNK_BYTES = 14 << 27  # of a chunk's logits
TILE_M, TILE_N, TILE_K = 64, 128, 64  # of _encode_logits; two programs share a processor and overlap
ENCODE_OPTIONS = {"num_warps": 4, "num_stages": 3}
ROWS, TILES = 8, 128  # of _combine
GRADIENT_ROWS = 16  # of _gradient; its columns are those of the statistics
RANGE = {"forward_kl": 2.0**14, "reverse_kl": 2.0**9, "jsd": 2.0**13}  # of float16 gradients, for temperature 1


def scaled_half(tensor: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns ``tensor`` in float16 after a power of two that brings it into range, and what undoes that.

    float16 has three more digits than bfloat16, so nothing of a bfloat16 tensor is lost (but what is 2⁻²⁶ of its
    largest number), and eight times less of a float32 one.

    Args:
        tensor: [..., D].
        dim: the dimension along which the power is chosen; the whole tensor's when left out.
    """
    low, high = torch.aminmax(tensor) if dim is None else torch.aminmax(tensor, dim=dim, keepdim=True)
    exponent = torch.frexp(torch.maximum(high, -low).float()).exponent - 12
    if tensor.dtype == torch.float16:
        exponent = torch.zeros_like(exponent)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), -exponent)
    half = torch.empty_like(tensor, dtype=torch.float16)
    torch.mul(tensor, scale.to(tensor.dtype), out=half)
    return half, 1 / scale


_halves = WeakTensorKeyDictionary()  # frozen head -> its version, and ``scaled_half`` of it


def half_of_head(head: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``scaled_half(head)``, which is kept as long as a frozen head lives and does not change."""
    if head.requires_grad:
        return scaled_half(head)
    version, *found = _halves.get(head, (None,))
    if version != head._version:
        found = scaled_half(head)
        _halves[head] = (head._version, *found)
    return tuple(found)


def lost_half(tensor: Tensor, half: Tensor, unit: Tensor) -> Tensor:
    """Returns in float16 what ``tensor`` lost as ``half``, in the same ``unit`` (both from ``scaled_half``)."""
    return (tensor / unit - half).half()


class TritonDivergence:
    """``losses.ChunkedDivergence`` on CUDA, for heads in half precision (as the module says) or float32.

    Half precision takes ``CHUNK_BYTES`` for two 16-bit numbers a token and word, and a float16 copy of the head. With
    float32 heads the products are float32 too, and so are the logits of a chunk.
    """

    def __init__(
        self, student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor,
        labels: Tensor | None, divergence: Divergence, exact: bool = True,
    ) -> None:  # fmt: skip
        self.divergence, self.labels, self.student = divergence, labels, student.float()
        self.coded = student_head.dtype != torch.float32 and teacher_head.dtype != torch.float32
        self.shared = student_head.data_ptr() == teacher_head.data_ptr()
        self.hidden_t, self.hidden_s = teacher.float(), self.student - teacher if self.shared else self.student
        self.head_t, self.head_s, self.unit, self.range = teacher_head, student_head, 1.0, 1.0
        self.split = exact and self.coded and torch.promote_types(student.dtype, teacher.dtype) == torch.float32
        if self.coded:
            wide_t, wide_s = self.hidden_t, self.hidden_s
            self.hidden_t, scale_t = scaled_half(teacher, -1)
            self.hidden_s, scale_s = scaled_half(wide_s, -1)
            self.low_t, self.low_s = self.hidden_t, self.hidden_s  # not read
            if self.split:
                self.low_t = lost_half(wide_t, self.hidden_t, scale_t)
                self.low_s = self.low_t if self.shared else lost_half(wide_s, self.hidden_s, scale_s)
            self.head_s, self.unit = half_of_head(student_head)
            self.head_t, unit_t = (self.head_s, self.unit) if self.shared else half_of_head(teacher_head)
            self.scale_t = (scale_t * unit_t / divergence.temperature).flatten()
            self.scale_s = (scale_s * self.unit / divergence.temperature).flatten()
            self.range = RANGE[divergence.kind] / 2.0 ** max(0, math.ceil(math.log2(divergence.temperature)))
        vocab, dtype = student_head.shape[0], torch.int16 if self.coded else torch.float32
        self.step = max(TILE_M, CHUNK_BYTES // (2 * dtype.itemsize * vocab) // TILE_M * TILE_M)
        rows, self.tiles = min(self.step, student.shape[0]), triton.cdiv(vocab, TILE_N)
        self.num_stats = NUM_STATS_CE if divergence.ce_weight > 0 else NUM_STATS
        self.logits = torch.empty(2, rows, vocab, dtype=dtype, device=student.device)
        self.stats = torch.empty(self.tiles * self.num_stats * rows, device=student.device)

    def __call__(self, part: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        d, kind, vocab = self.divergence, KINDS[self.divergence.kind], self.head_t.shape[0]
        hidden_t, hidden_s = self.hidden_t[part], self.hidden_s[part]
        n, hidden_size = hidden_t.shape
        x, y = self.logits[:, :n]
        found = hidden_t.new_empty(NUM_ROWS, n, dtype=torch.float32)
        labels = found if self.labels is None else self.labels[part]  # not read without labels
        common = {"KIND": kind, "HAS_CE": d.ce_weight > 0, "S": self.num_stats}
        if self.coded:
            _encode_logits[(triton.cdiv(n, TILE_M), self.tiles)](
                hidden_t, hidden_s, self.low_t[part], self.low_s[part], self.head_t, self.head_s, self.scale_t[part],
                self.scale_s[part], x, y, labels, self.stats, n, vocab, d.temperature, hidden_size, SHARED=self.shared,
                SPLIT=self.split, EVEN=vocab % TILE_N == 0, BM=TILE_M, BN=TILE_N, BK=TILE_K, **common, **ENCODE_OPTIONS,
                enable_fp_fusion=self.shared,  # a fused multiply-add would leave a rounding error of equal products
            )  # fmt: skip
        else:
            torch.mm(hidden_t, self.head_t.T, out=x).div_(d.temperature)
            torch.mm(hidden_s, self.head_s.T, out=y).div_(d.temperature)
            if not self.shared:
                y.sub_(x)
            _read_statistics[(triton.cdiv(n, GRADIENT_ROWS), self.tiles)](
                x, y, labels, self.stats, n, vocab, d.temperature, **common, BM=GRADIENT_ROWS, BN=TILE_N
            )
        few = (triton.cdiv(n, ROWS),)
        _combine[few](
            self.stats, labels, found, n, d.temperature, d.ce_weight, self.tiles, CODED=self.coded, **common,
            BM=ROWS, BB=TILES,
        )  # fmt: skip
        tiles = (triton.cdiv(n, GRADIENT_ROWS), self.tiles)
        shape = {"CODED": self.coded, "BM": GRADIENT_ROWS, "BN": TILE_N}
        if kind == JSD:
            _jsd_statistics[tiles](x, y, self.stats, found, n, vocab, d.beta, S=self.num_stats, **shape)
            _combine_jsd[few](
                self.stats, found, n, d.temperature, d.ce_weight, self.tiles, S=self.num_stats, BM=ROWS, BB=TILES
            )
        if not with_gradient:
            return found[LOSS], None
        gradient = y.view(torch.float16) if self.coded else y
        _gradient[tiles](
            x, y, gradient, labels, self.stats, found, n, vocab, d.temperature, d.beta, d.ce_weight, self.range,
            **common, **shape,
        )  # fmt: skip
        return found[LOSS], gradient

    def times_head(self, gradient: Tensor) -> Tensor:
        return _product(gradient, self.head_s) * (self.unit / self.range)

    def add_times_hidden(self, gradient: Tensor, part: slice, weights: Tensor, total: Tensor) -> None:
        hidden, unit = self.student[part] * weights[:, None], 1.0
        if self.coded:
            hidden, unit = scaled_half(hidden)
        for start in range(0, total.shape[0], HEAD_ROWS):  # a part of the head at a time: the product is float32
            rows = slice(start, start + HEAD_ROWS)
            total[rows].add_(_product(gradient[:, rows].T, hidden) * (unit / self.range))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a × b in float32, summed in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())
