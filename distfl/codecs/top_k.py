"""top_k: the values of largest magnitude, and where they lie; the rest is zero until error feedback brings it.

Of equal magnitudes the first ones are taken. Sorted positions are written by Elias and Fano's code (Elias 1974,
"Efficient storage and retrieval by content and address of static files"): the lowest bits of each as they are, the
rest in unary. Its length depends on the number of values and of positions alone, and is within half a bit per
position of the least that any such code can have. Source of the method: Stich et al. 2018, arXiv 1809.07599.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distfl.codecs.base import CHUNK_VALUES, Codec, chunks, require_zeros, words_for
from distfl.codecs.bf16 import HALF, LARGEST, from_halves
from distfl.settings import require
from distfl.transport.base import WORD

_SIGN_OFF = np.uint32(2**31 - 1)
_DIGITS = ((20, 11), (9, 11), (0, 9))  # (lowest bit, bits) of a magnitude's 31, from the highest down


@dataclass(frozen=True)
class Options:
    """Args:
    density: part of each tensor's values that is sent, rounded up to whole values.
    values: precision of those, rounded to the nearest; what is rounded away goes into the residual.
    """

    density: float = 0.1
    values: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", self.density, "above 0 and at most 1")


class TopK(Codec):
    """The values sent, then the positions: planes of lower bits, one after another, and the unary part."""

    Options = Options
    lossless, biased = False, True

    def encoded_words(self, shape: tuple[int, ...]) -> int:
        return words_for(sum(self._section_bytes(math.prod(shape))))

    def encode(self, values: Tensor, draws: np.random.Generator) -> np.ndarray:
        flat = values.contiguous().numpy().reshape(-1)
        words, sent = np.zeros(self.encoded_words(flat.shape), WORD), self._sent(len(flat))
        if sent:
            value_bytes, planes, unary, _ = self._sections(words, len(flat))
            positions = _largest(flat, sent)
            if self.options.values == "bf16":
                rounded = torch.from_numpy(flat[positions]).clamp_(-LARGEST, LARGEST).to(torch.bfloat16)
                value_bytes.view(HALF)[:] = rounded.view(torch.int16).numpy().view(HALF)
            else:
                value_bytes.view(np.float32)[:] = flat[positions]
            low = len(planes)
            for bit, plane in enumerate(planes):
                plane[:] = np.packbits((positions & 1 << bit).astype(bool), bitorder="little")
            positions >>= low
            positions += np.arange(sent)
            ones = np.zeros(_unary_bits(len(flat), sent, low), bool)
            ones[positions] = True
            unary[:] = np.packbits(ones, bitorder="little")
        return words

    def decode(self, words: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        values, sent = torch.zeros(count), self._sent(count)
        if sent:
            value_bytes, planes, unary, padding = self._sections(words, count)
            require_zeros(padding)
            positions = _positions(planes, unary, count, sent)
            if self.options.values == "bf16":
                found = from_halves(value_bytes.view(HALF))
            else:
                found = torch.from_numpy(value_bytes.view(np.float32).copy())
                if not torch.isfinite(found).all():
                    raise ValueError("a value is not finite")
            values.numpy()[positions] = found.numpy()
        return values.view(shape)

    def working_bytes(self, shape: tuple[int, ...]) -> int:
        count = math.prod(shape)
        sent = self._sent(count)
        at_work = 17 * sent + (_unary_bits(count, sent, _low_bits(count, sent)) if sent else 0)
        return WORD.itemsize * self.encoded_words(shape) + at_work + 32 * CHUNK_VALUES

    def _sent(self, count: int) -> int:
        return math.ceil(self.options.density * count)

    def _section_bytes(self, count: int) -> tuple[int, int, int]:
        """Bytes of the values, of all planes of lower bits, and of the unary part."""
        sent = self._sent(count)
        if not sent:
            return 0, 0, 0
        low = _low_bits(count, sent)
        value_bytes = sent * (HALF.itemsize if self.options.values == "bf16" else WORD.itemsize)
        return value_bytes, low * math.ceil(sent / 8), math.ceil(_unary_bits(count, sent, low) / 8)

    def _sections(self, words: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Views of values, planes (bits, bytes), unary part and padding."""
        values, planes, unary, padding = np.split(words.view(np.uint8), np.cumsum(self._section_bytes(count)))
        sent = self._sent(count)
        return values, planes.reshape(-1, math.ceil(sent / 8)), unary, padding


def _low_bits(count: int, sent: int) -> int:
    """Bits of a position that are written as they are."""
    return (count // sent).bit_length() - 1


def _unary_bits(count: int, sent: int, low: int) -> int:
    return sent + ((count - 1) >> low)


def _positions(planes: np.ndarray, unary: np.ndarray, count: int, sent: int) -> np.ndarray:
    """Rising int64 positions below ``count`` (raises ValueError)."""
    low = len(planes)
    bits = np.unpackbits(unary, bitorder="little")
    require_zeros(bits[_unary_bits(count, sent, low) :])
    positions = np.flatnonzero(bits)
    if len(positions) != sent:
        raise ValueError(f"{len(positions)} positions instead of {sent}")
    positions -= np.arange(sent)
    positions <<= low
    for bit, plane in enumerate(planes):
        ones = np.unpackbits(plane, bitorder="little")
        require_zeros(ones[sent:])
        positions[ones[:sent].view(bool)] |= 1 << bit
    if positions[-1] >= count or (positions[1:] <= positions[:-1]).any():
        raise ValueError("positions that do not rise, or lie outside")
    return positions


def _largest(flat: np.ndarray, sent: int) -> np.ndarray:
    """Rising positions of the ``sent`` values of largest magnitude."""
    least, ties = _least_taken(flat, sent)
    positions, filled = np.empty(sent, np.int64), 0
    for part in chunks(len(flat)):
        magnitudes = flat[part].view(np.uint32) & _SIGN_OFF
        taken = magnitudes > least
        equal = np.flatnonzero(magnitudes == least)[:ties]
        taken[equal] = True
        ties -= len(equal)
        found = np.flatnonzero(taken)
        positions[filled : filled + len(found)] = found + part.start
        filled += len(found)
    return positions


def _least_taken(flat: np.ndarray, sent: int) -> tuple[int, int]:
    """Bit pattern of the least magnitude taken, and how many values of just that magnitude are taken.

    Digit by digit from the highest (magnitudes of finite floats are ordered like their patterns): no sorting, no copy of the values.
    """
    known, left = 0, sent
    for lowest, bits in _DIGITS:
        counts = np.zeros(2**bits, np.int64)
        for part in chunks(len(flat)):
            magnitudes = flat[part].view(np.uint32) & _SIGN_OFF
            candidates = magnitudes[magnitudes >> np.uint32(lowest + bits) == known]
            counts += np.bincount(candidates >> np.uint32(lowest) & np.uint32(2**bits - 1), minlength=2**bits)
        at_least = counts[::-1].cumsum()[::-1]  # values with this digit or a higher one
        digit = int(np.flatnonzero(at_least >= left)[-1])
        left -= int(at_least[digit] - counts[digit])
        known = known << bits | digit
    return known, left


CODEC = TopK
