"""How a decoding kernel is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Tiles of one launch.

    ``tokens`` of a tile, ``warps`` and pipeline ``stages`` of a program, the ``largest`` block of numbers that is read
    at a time, ``columns`` of each half of a key that are rebuilt at a time, ``programs`` a processor. A factor U of at
    most ``resident`` KiB stays in shared memory; a larger one is read from the L2 cache for every tile. ``absorbed``:
    whether U goes into the queries instead of the keys; None: where that takes fewer products (module ``turning``).
    ``fast``: pairs of such keys that are rebuilt all the same, 0, 16, 32 or 64; None: as many as take the fewest.
    ``joined``: KV heads of a program where U is absorbed, if their latents can be read as one row; a power of two.
    ``registers``: the most that a thread of the attention kernel takes; None: what the compiler likes.
    ``dependent``: whether the launches of a step overlap, where the device can; None: as ``chain`` says.

    In half precision a tile of packed numbers has 32 tokens at least: of 16, Triton 3.6 computes wrong products.
    """

    tokens: int = 64
    warps: int = 4
    stages: int = 2
    largest: int = 128
    columns: int = 64
    programs: int = 2
    resident: int = 128
    absorbed: bool | None = None
    fast: int | None = None
    joined: int = 1
    registers: int | None = None
    dependent: bool | None = None

    def splits(self, grid: int, slots: int, processors: int) -> int:
        """Returns into how many parts each context is cut, ``grid`` being the programs without splits.

        Enough to give every processor ``programs``, in whole waves; no more than there are tiles.
        """
        wanted = max(1, processors * self.programs // grid)
        return min(wanted, max(1, math.ceil(slots / self.tokens)))
