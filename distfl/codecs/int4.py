"""int4: int8's arithmetic with integers from -7 to 7, two of them in a byte."""

from __future__ import annotations

import numpy as np

from distfl.codecs.int8 import PerChannel


class Int4(PerChannel):
    """Half a byte a value; error of each below 15 % of its channel's largest magnitude."""

    largest, values_per_byte = 7, 2

    def pack(self, integers: np.ndarray) -> np.ndarray:
        nibbles = np.pad(integers.view(np.uint8) & 15, (0, len(integers) % 2))
        return nibbles[::2] | nibbles[1::2] << 4

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        nibbles = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
        return ((nibbles ^ 8) - np.uint8(8)).view(np.int8)  # two's complement of four bits


CODEC = Int4
