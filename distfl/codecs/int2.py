"""int2: int8's arithmetic with the integers -1, 0 and 1, four of them in a byte (ternary: TernGrad, Wen et al. 2017, arXiv 1705.07878)."""

from __future__ import annotations

import numpy as np

from distfl.codecs.int8 import PerChannel


class Int2(PerChannel):
    """A quarter of a byte a value; error of each below 101 % of its channel's largest magnitude: only means over clients make sense."""

    largest, values_per_byte = 1, 4

    def pack(self, integers: np.ndarray) -> np.ndarray:
        quarters = np.pad(integers.view(np.uint8) & 3, (0, -len(integers) % 4)).reshape(-1, 4)
        return quarters[:, 0] | quarters[:, 1] << 2 | quarters[:, 2] << 4 | quarters[:, 3] << 6

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        quarters = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(-1)
        return ((quarters ^ 2) - np.uint8(2)).view(np.int8)  # two's complement of two bits


CODEC = Int2
