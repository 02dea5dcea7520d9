"""int8: one byte a value and one scale per output channel, rounded up or down at random so that the mean is the value itself.

Symmetric, without a zero point: q = floor(x / scale + u), u uniform in [0, 1), decoded as q scale. The scale of a channel
is its largest magnitude over 127, rounded up to bf16; as the stored scale is the one divided by, nothing becomes biased.
Source of stochastic rounding of updates: QSGD (Alistarh et al. 2017, arXiv 1610.02132), there with the norm as scale.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from distfl.codecs.base import CHUNK_VALUES, Codec, chunks, require_zeros, words_for
from distfl.codecs.bf16 import HALF, from_halves
from distfl.transport.base import WORD

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a normal number; an empty or all-zero channel has it too


class PerChannel(Codec):
    """What int8 and int4 share. A channel is a row of the first dimension; a vector or a scalar is one channel.

    On the wire: the bf16 scales of all channels, then the integers, then zeros up to a whole word. Values within 1 % of
    the largest float32 may be clipped to what the largest scale can hold.
    """

    largest: ClassVar[int]
    values_per_byte: ClassVar[int]
    lossless, biased = False, False

    @abstractmethod
    def pack(self, integers: np.ndarray) -> np.ndarray:
        """int8 array -> bytes, an even number of integers at a time except at the end."""

    @abstractmethod
    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """Bytes -> int8 array, padding included."""

    def encoded_words(self, shape: tuple[int, ...]) -> int:
        return words_for(HALF.itemsize * _channels(shape) + self._packed_bytes(math.prod(shape)))

    def encode(self, values: Tensor, draws: np.random.Generator) -> np.ndarray:
        words = np.zeros(self.encoded_words(values.shape), WORD)
        channels = _channels(values.shape)
        if not channels:
            return words
        rows = values.contiguous().view(channels, -1)
        halves, packed = self._sections(words, channels)
        halves[:] = self._scales(rows)
        scales = from_halves(halves).numpy()
        flat, width = rows.numpy().reshape(-1), rows.shape[1]
        for part in chunks(len(flat)):
            scaled = flat[part] / scales[np.arange(part.start, part.stop) // width]
            scaled += draws.random(len(scaled), np.float32)
            np.floor(scaled, out=scaled)
            integers = scaled.clip(-self.largest, self.largest, out=scaled).astype(np.int8)
            packed[self._packed_bytes(part.start) : self._packed_bytes(part.stop)] = self.pack(integers)
        return words

    def decode(self, words: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        count, channels = math.prod(shape), _channels(shape)
        halves, packed = self._sections(words, channels)
        require_zeros(packed[self._packed_bytes(count) :])
        scales = from_halves(halves)
        if not ((scales >= SMALLEST_SCALE) & (scales <= self._largest_scale())).all():
            raise ValueError("a scale is out of range")
        values = torch.empty(count)
        flat, width = values.numpy(), count // max(1, channels)
        for part in chunks(count):
            integers = self.unpack(packed[self._packed_bytes(part.start) : self._packed_bytes(part.stop)])
            require_zeros(integers[part.stop - part.start :])
            if (integers < -self.largest).any():
                raise ValueError(f"an integer below {-self.largest}")
            owner = np.arange(part.start, part.stop) // width
            np.multiply(integers[: len(owner)], scales.numpy()[owner], out=flat[part])
        return values.view(shape)

    def working_bytes(self, shape: tuple[int, ...]) -> int:
        return WORD.itemsize * self.encoded_words(shape) + 24 * _channels(shape) + 32 * min(CHUNK_VALUES, math.prod(shape))

    def _packed_bytes(self, count: int) -> int:
        return math.ceil(count / self.values_per_byte)

    def _sections(self, words: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of the scales and of the packed integers with their padding."""
        end = HALF.itemsize * channels
        return words.view(np.uint8)[:end].view(HALF), words.view(np.uint8)[end:]

    def _scales(self, rows: Tensor) -> np.ndarray:
        """(channels, n) -> bf16 patterns of the scales."""
        low, high = torch.aminmax(rows, dim=1)
        scales = torch.maximum(low.neg_(), high) / self.largest
        up = (scales.clamp_min_(SMALLEST_SCALE).numpy().view(np.uint32) + np.uint32(2**16 - 1)) >> 16
        return np.minimum(up, _pattern_below(self._largest_scale()))

    def _largest_scale(self) -> float:
        """What times the largest integer is still finite."""
        return torch.finfo(torch.float32).max / self.largest


class Int8(PerChannel):
    """A byte a value; error of each below 0.8 % of its channel's largest magnitude."""

    largest, values_per_byte = 127, 1

    def pack(self, integers: np.ndarray) -> np.ndarray:
        return integers.view(np.uint8)

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        return packed.view(np.int8)


def _channels(shape: tuple[int, ...]) -> int:
    """Channels that hold values."""
    return 0 if 0 in shape else shape[0] if len(shape) > 1 else 1


def _pattern_below(value: float) -> int:
    """bf16 pattern of the largest number that is not above a positive one."""
    return int(np.float32(value).view(np.uint32)) >> 16


CODEC = Int8
