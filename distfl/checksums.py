"""Checksums of what ranks send each other: zlib's CRC-32, 0.15 ns a byte.

It shows any damage within 32 consecutive bits, and of other damage all but one in 2^32. It is no signature: who can compute it
can forge it. So what a block says is checked besides, see ``updates.py``.
"""

from __future__ import annotations

import zlib

import numpy as np

from distfl.errors import WireError
from distfl.transport.base import WORD


def checksum(array: np.ndarray, start: int = 0) -> int:
    """CRC-32 of a contiguous array's bytes.

    Args:
        start: what else it is to depend on, 0 to 2^32 - 1.
    """
    return zlib.crc32(array, start)


def seal(array: np.ndarray, unit: int) -> np.ndarray:
    """The words of a unit's 1-D array, and one more that is their checksum."""
    words = np.empty(sealed_words(len(array), array.dtype), WORD)
    words[:-1] = array.view(WORD)
    words[-1] = checksum(words[:-1], unit)
    return words


def unseal(words: np.ndarray, kind: np.dtype, unit: int) -> np.ndarray:
    """The array in what ``seal`` made, without a copy (raises WireError where it is damaged or of another unit)."""
    if words[-1] != checksum(words[:-1], unit):
        raise WireError(
            f"sums or means of unit {unit} from another rank",
            "their checksum does not fit: they were garbled on the way",
            "check network and memory of the nodes, then go on with --resume",
        )
    return words[:-1].view(kind)


def sealed_words(values: int, kind: np.dtype) -> int:
    """Words that so many values become."""
    return values * np.dtype(kind).itemsize // WORD.itemsize + 1
