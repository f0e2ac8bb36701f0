"""Group-wise asymmetric quantization of cached numbers: 2 to 8 bits, groups of 32 with a 16-bit scale and minimum.

The cache stores ``encode``'s output and reads ``decode``'s; training and the full forward see exactly the same
numbers through ``fake_quantize``, with the straight-through gradient (arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_train.errors import UserError

GROUP = 32  # numbers that share a scale and a minimum
BITS = (16, 8, 6, 4, 3, 2)  # 16: stored in the cache's own floating-point type
SCALE_BYTES = 2 * 2  # of one group: scale and minimum in float16


def check_bits(bits: int) -> None:
    """Raises UserError unless ``bits`` is a width that the cache can store."""
    if bits not in BITS:
        raise UserError(f"cache bits must be one of {', '.join(map(str, BITS))}, not {bits}.")


def planes(bits: int) -> tuple[int, ...]:
    """Returns the widths of the planes in which codes are stored, lowest bits first: each fills bytes evenly.

    Codes of 6 and 3 bits would lie across the words that a GPU reads, each in other places than its neighbours.
    """
    return {6: (4, 2), 3: (2, 1)}.get(bits, (bits,))


def code_bytes(count: int, bits: int) -> int:
    """Returns the bytes that the codes of ``count`` numbers take, padding of every plane's last byte counted."""
    return sum(-(-count * width // 8) for width in planes(bits))


def whole_words(count: int, bits: int) -> bool:
    """Returns whether every plane of ``count`` codes is whole words of four bytes."""
    return all(-(-count * width // 8) % 4 == 0 for width in planes(bits))


def entry_bytes(count: int, bits: int) -> int:
    """Returns the bytes that ``count`` numbers of one KV head take, scales and padding of the last byte counted."""
    if bits == 16:
        return 2 * count
    return code_bytes(count, bits) + SCALE_BYTES * -(-count // GROUP)


def stored_shapes(count: int, bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the trailing shapes of the codes (uint8) and of the scales (float16) of ``count`` numbers."""
    return (code_bytes(count, bits),), (-(-count // GROUP), 2)


def _grouped(x: Tensor) -> Tensor:
    """[..., n] -> [..., groups, GROUP]; the last group is filled with its own last number, which moves no bound."""
    missing = -x.shape[-1] % GROUP
    if missing:
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), dim=-1)
    return x.unflatten(-1, (-1, GROUP))


def code_levels(bits: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Returns the largest code of every group, uint8 [groups]; 0 where a group is not rounded (16 bits)."""
    return torch.tensor([0 if width == 16 else 2**width - 1 for width in bits], dtype=torch.uint8, device=device)


def _bounds(groups: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and minimum [..., groups], as they are once stored in float16; ``levels`` broadcasts."""
    low = groups.amin(-1).clamp(-6e4, 6e4).to(torch.float16)
    span = groups.amax(-1) - low.to(groups.dtype)
    scale = (span / levels.to(groups.dtype).clamp_min(1.0)).clamp(6e-8, 6e4).to(torch.float16)
    return scale, low


def _codes(groups: Tensor, scale: Tensor, low: Tensor, levels: Tensor) -> Tensor:
    steps = (groups - low.to(groups.dtype)[..., None]) / scale.to(groups.dtype)[..., None]
    return torch.minimum(steps.round().clamp_min(0), levels[..., None].to(groups.dtype))


def _one_level(bits: int, device: torch.device) -> Tensor:
    # Filled on the device: a copy from the host would wait for it.
    return torch.full((1,), 2**bits - 1, dtype=torch.uint8, device=device)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes [..., n] below 2^bits into bytes [..., ``code_bytes``]: plane after plane (``planes``), in each
    of which the first code lies in the lowest bits of the first byte."""
    packed, low = [], 0
    for width in planes(bits):
        plane = codes if width == bits else codes >> low & (1 << width) - 1
        packed.append(_pack_plane(plane, width))
        low += width
    return packed[0] if len(packed) == 1 else torch.cat(packed, dim=-1)


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    if width == 8:
        return codes
    size = 8 // width
    words = F.pad(codes, (0, -codes.shape[-1] % size)).unflatten(-1, (-1, size))
    packed = words[..., 0]
    for index in range(1, size):
        packed = packed | words[..., index] << width * index
    return packed


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Returns the ``count`` codes [..., n] that ``pack_codes`` packed, uint8."""
    found, low, start = None, 0, 0
    for width in planes(bits):
        size = -(-count * width // 8)
        plane = _unpack_plane(packed[..., start : start + size], width)[..., :count]
        found = plane if found is None else found | plane << low
        low, start = low + width, start + size
    return found


def _unpack_plane(packed: Tensor, width: int) -> Tensor:
    if width == 8:
        return packed
    codes = [packed >> width * index & (1 << width) - 1 for index in range(8 // width)]
    return torch.stack(codes, dim=-1).flatten(-2)


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantizes the last dimension of ``x`` [..., n].

    Returns:
        codes uint8 [..., ``code_bytes``], as ``pack_codes`` packs them, and scales float16 [..., ⌈n/32⌉, 2] (scale,
        minimum).
    """
    codes, scales = quantize(x, _one_level(bits, x.device))
    return pack_codes(codes, bits), scales


def quantize(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the codes of ``x`` [..., n], uint8 [..., n], and the scales, float16 [..., ⌈n/32⌉, 2].

    ``levels``: ``code_levels`` of a width for every group.
    """
    groups = _grouped(x.float())
    scale, low = _bounds(groups, levels)
    codes = _codes(groups, scale, low, levels).flatten(-2)[..., : x.shape[-1]].to(torch.uint8)
    # Stacked in float32: autocast on a CPU cannot promote float16.
    return codes, torch.stack((scale.float(), low.float()), dim=-1).to(torch.float16)


def decode(codes: Tensor, scales: Tensor, bits: int, count: int, dtype: torch.dtype) -> Tensor:
    """Returns the ``count`` numbers [..., n] that ``encode`` stored, in ``dtype``."""
    return dequantize(unpack_codes(codes, bits, count), scales, dtype)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the numbers [..., n] of ``quantize``'s codes and scales, in ``dtype``."""
    count = codes.shape[-1]
    groups = F.pad(codes, (0, -count % GROUP)).unflatten(-1, (-1, GROUP)).to(torch.float32)
    scale, low = scales.float().unbind(-1)
    return groups.mul_(scale[..., None]).add_(low[..., None]).flatten(-2)[..., :count].to(dtype)


def fake_quantize(x: Tensor, bits: int | Tensor) -> Tensor:
    """Returns what a cache of ``bits`` would give back for ``x`` [..., n]; the gradient passes straight through.

    ``bits``: one width, or ``code_levels`` of a width for every group. The latter is one pass whatever the widths, and
    one compiled graph for all layers.
    """
    if isinstance(bits, int):
        if bits == 16:
            return x
        bits = _one_level(bits, x.device)
    with torch.no_grad():
        exact = _grouped(x)
        groups = exact.float()
        scale, low = _bounds(groups, bits)
        codes = _codes(groups, scale, low, bits)
        rounded = (codes * scale.float()[..., None] + low.float()[..., None]).to(x.dtype)
        rounded = torch.where(bits[..., None] > 0, rounded, exact).flatten(-2)[..., : x.shape[-1]]
    # Added as an exact zero: x + (rounded − x) would differ from what the cache gives back in the last digit.
    return rounded + (x - x.detach()) if x.requires_grad else rounded
