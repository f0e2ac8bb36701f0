"""Decoding kernels of latents whose keys are never built: U is absorbed into the query, as in multi-head latent
attention (DeepSeek-V2, arXiv:2405.04434, §2.1.2), although RoPE comes between them (see ``turning``).

1. ``lay_out_queries``: P and Q of every query head, which hold U and the query;
2. ``absorb``: W = X P + Y Q, J vectors for every span of S tokens; X and Y are constants of the span;
3. ``attend_absorbed`` reads latents and W: score(t) = Σ_j φ_j(t) (W_j · c_t + a_j · k₀); values as in every kernel.

Shapes as in ``kernel``, and HB half a head, padded; RH query heads of a KV head, padded; BJ = RH · J; N spans; R
numbers of a latent with its padding. No buffer is a ring: spans begin at multiples of S.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tpa_train.tpa.decode.kernel import EMPTY, add_values, leave, no_values, part_of, softmax
from tpa_train.tpa.decode.rebuilt import latent, norms
from tpa_train.tpa.decode.unpacking import dot, narrow, zeros


@triton.jit
def lay_out_queries(
    q, both, along, up, offset, d: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr, OWN_UP: tl.constexpr,
    R: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (HB / BK, H, B).

    Args (in memory):
        q: [B, H, d].
        both: written, P and Q, [B, H, 2, HB, R].
        along: written, the same of the offset k₀ instead of U, [B, H, 2, HB].
        up: U in both halves, [G or 1, 2, R, HB].
        offset: keys of a zero latent, float32 [G, 2, HB].
    """
    head, sequence = tl.program_id(1), tl.program_id(2)
    group = head // REPEATS
    place = sequence * (GROUPS * REPEATS) + head
    column = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = column < d // 2
    q1 = tl.load(q + place * d + column, mask=inside, other=0.0).to(tl.float32)
    q2 = tl.load(q + place * d + d // 2 + column, mask=inside, other=0.0).to(tl.float32)
    o1 = tl.load(offset + group * (2 * HB) + column)
    o2 = tl.load(offset + group * (2 * HB) + HB + column)
    tl.store(along + place * (2 * HB) + column, narrow(q1 * o1 + q2 * o2, DTYPE))
    tl.store(along + place * (2 * HB) + HB + column, narrow(q2 * o1 - q1 * o2, DTYPE))
    if OWN_UP:
        up += group * (2 * R * HB)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        keep = (r < R)[None, :]
        at = up + r[None, :] * HB + column[:, None]
        u1 = tl.load(at, mask=keep, other=0.0).to(tl.float32)
        u2 = tl.load(at + R * HB, mask=keep, other=0.0).to(tl.float32)
        to = both + place.to(tl.int64) * (2 * HB * R) + column[:, None] * R + r[None, :]
        tl.store(to, narrow(q1[:, None] * u1 + q2[:, None] * u2, DTYPE), mask=keep)
        tl.store(to + HB * R, narrow(q2[:, None] * u1 - q1[:, None] * u2, DTYPE), mask=keep)


@triton.jit(do_not_specialize=("spans",))
def absorb(
    both, along, turns, w, bias, lengths, spans, J: tl.constexpr, S: tl.constexpr, CENTERED: tl.constexpr,
    R: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (⌈N · J / BM⌉, H, B): one product [BM, 2 HB] [2 HB, R].

    Args (in memory):
        both, along: of ``lay_out_queries``; ``along`` is not read where keys are CENTERED.
        turns: X and Y of every span, [N, J, 2 HB].
        w, bias: written, [B, H, N, J, R] and float32 [B, H, N, J].
        lengths: as in ``CachedTokens``; spans beyond it are left as they are.
    """
    if tl.program_id(0) * BM // J * S >= tl.load(lengths + tl.program_id(2)):
        return
    place = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    kept = row < spans * J
    n, k = tl.arange(0, BN), tl.arange(0, BK)
    narrower = (n < R)[None, :]
    at_turns = turns + tl.where(kept, row, 0)[:, None] * (2 * HB) + k[None, :]
    at_both = both + place.to(tl.int64) * (2 * HB * R) + k[:, None] * R + n[None, :]
    total = zeros(BM, BN)
    base = tl.zeros((BM,), tl.float32)
    for start in range(0, 2 * HB, BK):
        x = tl.load(at_turns + start)
        total = dot(x, tl.load(at_both + start * R, mask=narrower, other=0.0), total, DTYPE)
        if not CENTERED:
            base += tl.sum(x.to(tl.float32) * tl.load(along + place * (2 * HB) + start + k).to(tl.float32)[None, :], 1)
    at = place.to(tl.int64) * spans * J + row
    if not CENTERED:
        tl.store(bias + at, base, mask=kept)
    tl.store(w + at[:, None] * R + n[None, :], narrow(total, DTYPE), mask=kept[:, None] & narrower)


@triton.jit
def _spread(x, BH: tl.constexpr):
    """[T, RH] to [T, BH]: heads over and over, to fill a matrix product."""
    x = tl.broadcast_to(x[:, None, :], (x.shape[0], BH // x.shape[1], x.shape[1]))
    return tl.reshape(x, (x.shape[0], BH))


@triton.jit(do_not_specialize=("slots", "pitch", "splits", "spans"))
def attend_absorbed(
    out, partial, lse, lengths, rows, stored, key_weights, value_weights, w, bias, basis,
    slots, pitch, splits, scale, spans, E: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr,
    KEY_MODE: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_PIECES: tl.constexpr, NORM: tl.constexpr,
    J: tl.constexpr, RH: tl.constexpr, S: tl.constexpr, CENTERED: tl.constexpr, R: tl.constexpr,
    VALUE_MODE: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_TENSOR: tl.constexpr, VALUE_PIECES: tl.constexpr,
    HAS_ROWS: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (G, splits, B). As ``kernel.attend_direct``, and

    Args (in memory):
        w, bias: of ``absorb``.
        basis: φ [S, J], S a multiple of T.
    NORM: tensor of factors [1, G] of a token that its scores take, −1 without.
    """
    begin, end, _, sequence = part_of(lengths, rows, slots, pitch, splits, HAS_ROWS, T)
    if SPLIT:
        if begin >= end:
            return
    row = tl.program_id(0)
    term = tl.arange(0, RH * J)
    # Of heads that only fill a product, the first stands for all.
    head = (tl.program_id(2) * GROUPS + row) * REPEATS + tl.where(term // J < REPEATS, term // J, 0)
    at_bias = bias + head.to(tl.int64) * spans * J + term % J
    at_w = w + ((head.to(tl.int64) * spans * J + term % J) * R)[None, :]
    at_basis = basis + tl.arange(0, T)[:, None] * J + tl.arange(0, J)[None, :]
    m = tl.full((RH,), EMPTY, tl.float32)
    total = tl.zeros((RH,), tl.float32)
    accs = no_values(VALUE_PIECES, BH)
    at = begin + tl.arange(0, T)
    factor = norms(stored, sequence, at, at < end, row, GROUPS, NORM)
    for tile in range(begin, end, T):
        slot = tile + tl.arange(0, T)
        valid = slot < end
        following = norms(stored, sequence, slot + T, slot + T < end, row, GROUPS, NORM)
        span = tile // S
        x = zeros(T, RH * J)
        for i in tl.static_range(len(KEY_PIECES) // 7):
            c = latent(
                stored, sequence, slot, valid, row, key_weights, KEY_MODE, KEY_ROWS, GROUPS, KEY_PIECES, i, DTYPE
            )
            k = KEY_PIECES[7 * i + 6] + tl.arange(0, KEY_PIECES[7 * i + 4])
            x = dot(c, tl.load(at_w + k[:, None] + span * (J * R)), x, DTYPE)
        if not CENTERED:
            x += tl.load(at_bias + span * J)[None, :]
        phi = tl.load(at_basis + tile % S * J).to(tl.float32)
        s = tl.sum(tl.reshape(x, (T, RH, J)) * phi[:, None, :], 2)
        if NORM >= 0:
            s *= factor[:, None]
        p, m, total, alpha = softmax(s * scale, valid, m, total)
        accs = add_values(
            accs, _spread(p, BH), tl.reshape(_spread(alpha[None, :], BH), (BH,)), stored, sequence, slot, valid,
            row + 0 * tl.arange(0, BH), row if VALUE_ROWS > 1 else 0, value_weights,
            VALUE_MODE, VALUE_ROWS, GROUPS, VALUE_TENSOR, VALUE_PIECES, False, DTYPE,
        )  # fmt: skip
        factor = following
    n = tl.arange(0, BH)
    m = tl.reshape(_spread(m[None, :], BH), (BH,))
    total = tl.reshape(_spread(total[None, :], BH), (BH,))
    leave(
        accs, m, total, out, partial, lse, row * REPEATS + n % RH, n < REPEATS, GROUPS * REPEATS, splits, E, SPLIT,
        VALUE_PIECES, DTYPE,
    )  # fmt: skip
