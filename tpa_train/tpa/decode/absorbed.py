"""Decoding kernels of latents whose keys are never built: U is absorbed into the query, as in multi-head latent
attention (DeepSeek-V2, arXiv:2405.04434, §2.1.2), although RoPE comes between them.

``absorb`` makes W_j = Uᵀ a_j for every span of S tokens, J of them a query head (the mathematics: module ``turning``).
``attend_absorbed`` reads latents and W: score(t) = Σ_j φ_j(t) (W_j · c_t + a_j · k₀), and values as every kernel does.

Shapes as in ``kernel``, and HB half a head, padded; RH query heads of a KV head, padded; BJ = RH · J; N spans.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpa_train.tpa.decode.kernel import EMPTY, add_values, leave, no_values, part_of, softmax, weighted
from tpa_train.tpa.decode.rebuilt import latent
from tpa_train.tpa.decode.unpacking import dot, narrow, zeros


@triton.jit(do_not_specialize=("slots", "spans"))
def absorb(
    q, w, bias, lengths, up, offset, bends, cos, sin, slots, spans,
    d: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr, J: tl.constexpr, RH: tl.constexpr, S: tl.constexpr,
    OWN_UP: tl.constexpr, CENTERED: tl.constexpr, WIDTH: tl.constexpr, HB: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (⌈N · RH / BP⌉, G, B): a program makes J vectors of each of BP pairs of a span and a query head.

    Args (in memory):
        q: [B, H, d].
        w, bias: written, [B, G, N, BJ, WIDTH] and float32 [B, G, N, BJ].
        lengths: as in ``CachedTokens``; spans beyond it are left as they are.
        up: U in both halves, [G or 1, 2, WIDTH, HB].
        offset: keys of a zero latent, float32 [G, 2, HB]; not read where keys are CENTERED.
        bends: C and S of ``turning.Turning``, [2, J, HB].
        cos, sin: of the positions that tokens have, float32 [capacity, d/2].
    """
    group, sequence = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    held = tl.minimum(length, slots)
    if tl.program_id(0) * BP // RH * S >= held:
        return
    pair = tl.program_id(0) * BP + tl.arange(0, BP)
    span, head = pair // RH, pair % RH
    live = (span * S < held)[:, None]
    position = length - held + tl.where(span * S < held, span, 0) * S
    if OWN_UP:
        up += group * (2 * WIDTH * HB)
    offset += group * (2 * HB)
    at_q = q + (((sequence * GROUPS + group) * REPEATS + head) * d)[:, None]
    term = tl.arange(0, J)[:, None]
    k = tl.arange(0, BN)
    total = zeros(BP * J, BN)
    base = tl.zeros((BP * J,), tl.float32)
    for block in tl.static_range(HB // BK):
        column = block * BK + tl.arange(0, BK)
        inside = (column < d // 2)[None, :]
        asked = inside & live & (head < REPEATS)[:, None]
        q1 = tl.load(at_q + column[None, :], mask=asked, other=0.0).to(tl.float32)
        q2 = tl.load(at_q + (d // 2 + column)[None, :], mask=asked, other=0.0).to(tl.float32)
        at_table = position[:, None] * (d // 2) + column[None, :]
        cb = tl.load(cos + at_table, mask=inside, other=0.0)
        sb = tl.load(sin + at_table, mask=inside, other=0.0)
        t1 = (q1 * cb + q2 * sb)[:, None, :]
        t2 = (q2 * cb - q1 * sb)[:, None, :]
        c = tl.load(bends + term * HB + column[None, :]).to(tl.float32)[None, :, :]
        s = tl.load(bends + (J + term) * HB + column[None, :]).to(tl.float32)[None, :, :]
        a1 = tl.reshape(t1 * c + t2 * s, (BP * J, BK))
        a2 = tl.reshape(t2 * c - t1 * s, (BP * J, BK))
        if not CENTERED:
            o1 = tl.load(offset + column)[None, :]
            o2 = tl.load(offset + HB + column)[None, :]
            base += tl.sum(a1 * o1 + a2 * o2, 1)
        at_up = up + k[None, :] * HB + column[:, None]
        narrower = (k < WIDTH)[None, :]
        total = dot(narrow(a1, DTYPE), tl.load(at_up, mask=narrower, other=0.0), total, DTYPE)
        total = dot(narrow(a2, DTYPE), tl.load(at_up + WIDTH * HB, mask=narrower, other=0.0), total, DTYPE)
    row = tl.program_id(0) * (BP * J) + tl.arange(0, BP * J)
    kept = row < spans * (RH * J)
    at = (sequence * GROUPS + group).to(tl.int64) * spans * (RH * J) + row
    if not CENTERED:
        tl.store(bias + at, base, mask=kept)
    tl.store(w + at[:, None] * WIDTH + k[None, :], narrow(total, DTYPE), mask=kept[:, None] & (k < WIDTH)[None, :])


@triton.jit
def _spread(x, BH: tl.constexpr):
    """[T, RH] to [T, BH]: heads over and over, to fill a matrix product."""
    x = tl.broadcast_to(x[:, None, :], (x.shape[0], BH // x.shape[1], x.shape[1]))
    return tl.reshape(x, (x.shape[0], BH))


@triton.jit(do_not_specialize=("slots", "pitch", "splits", "spans"))
def attend_absorbed(
    q, out, partial, lse, lengths, rows, stored, key_weights, value_weights, w, bias, basis,
    slots, pitch, splits, scale, spans,
    d: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr,
    KEY_MODE: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_PIECES: tl.constexpr, NORM: tl.constexpr,
    J: tl.constexpr, RH: tl.constexpr, S: tl.constexpr, CENTERED: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_MODE: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_TENSOR: tl.constexpr, VALUE_PIECES: tl.constexpr,
    HAS_ROWS: tl.constexpr, RING: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (G, splits, B). As ``kernel.attend_direct`` (``q`` is not read), and

    Args (in memory):
        w, bias: of ``absorb``.
        basis: φ [S, J], S a multiple of T.
    NORM: tensor of factors [1, G] of a token that its scores take, −1 without.
    """
    begin, end, first, sequence = part_of(lengths, rows, slots, pitch, splits, HAS_ROWS, T)
    if SPLIT:
        if begin >= end:
            return
    row = tl.program_id(0)
    n = tl.arange(0, BH)
    group = row + 0 * tl.arange(0, RH)
    term = tl.arange(0, RH * J)
    at_bias = bias + (tl.program_id(2) * GROUPS + row).to(tl.int64) * spans * (RH * J) + term
    at_w = w + ((tl.program_id(2) * GROUPS + row).to(tl.int64) * spans * (RH * J) + term)[None, :] * WIDTH
    at_basis = basis + tl.arange(0, T)[:, None] * J + tl.arange(0, J)[None, :]
    m = tl.full((RH,), EMPTY, tl.float32)
    total = tl.zeros((RH,), tl.float32)
    accs = no_values(VALUE_PIECES, BH)
    for tile in range(begin, end, T):
        slot = tile + tl.arange(0, T)
        valid = slot < end
        if RING:
            slot = (first + slot) % slots
        span = tile // S
        x = zeros(T, RH * J)
        for i in tl.static_range(len(KEY_PIECES) // 7):
            c = latent(
                stored, sequence, slot, valid, row, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_PIECES, i, DTYPE
            )
            k = KEY_PIECES[7 * i + 6] + tl.arange(0, KEY_PIECES[7 * i + 4])
            x = dot(c, tl.load(at_w + k[:, None] + span * (RH * J * WIDTH)), x, DTYPE)
        if not CENTERED:
            x += tl.load(at_bias + span * (RH * J))[None, :]
        phi = tl.load(at_basis + tile % S * J).to(tl.float32)
        s = tl.sum(tl.reshape(x, (T, RH, J)) * phi[:, None, :], 2)
        if NORM >= 0:
            s = weighted(s, 0, stored, sequence, slot, valid, group, key_weights, 2, 1, GROUPS, NORM, False)
        p, m, total, alpha = softmax(s * scale, valid, m, total)
        group_of_all = row + 0 * n
        accs = add_values(
            accs, _spread(p, BH), tl.reshape(_spread(alpha[None, :], BH), (BH,)), stored, sequence, slot, valid,
            group_of_all, row if VALUE_ROWS > 1 else 0, value_weights,
            VALUE_MODE, VALUE_ROWS, GROUPS, VALUE_TENSOR, VALUE_PIECES, False, DTYPE,
        )  # fmt: skip
    m = tl.reshape(_spread(m[None, :], BH), (BH,))
    total = tl.reshape(_spread(total[None, :], BH), (BH,))
    leave(
        accs, m, total, out, partial, lse, row * REPEATS + n % RH, n < REPEATS, GROUPS * REPEATS, splits, E, SPLIT,
        VALUE_PIECES, DTYPE,
    )  # fmt: skip
