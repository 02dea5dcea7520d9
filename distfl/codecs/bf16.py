"""bf16: the upper half of each float32, rounded up or down at random so that the mean is the value itself."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from distfl.codecs.base import CHUNK_VALUES, Codec, chunks, require_zeros, words_for
from distfl.transport.base import WORD

HALF = np.dtype("<u2")
LARGEST = torch.finfo(torch.bfloat16).max


class Bf16(Codec):
    """Two bytes a value, relative error below 2^-7, unbiased.

    Neighbouring bf16 numbers lie 2^16 float32 bit patterns apart, also across powers of two and below the smallest
    normal number: adding a uniform draw from 0 to 2^16 - 1 to the pattern and cutting its lower half off rounds up with
    just the right probability. Values beyond the largest bf16 number become that.
    """

    lossless, biased = False, False

    def encoded_words(self, shape: tuple[int, ...]) -> int:
        return words_for(HALF.itemsize * math.prod(shape))

    def encode(self, values: Tensor, draws: np.random.Generator) -> np.ndarray:
        flat = values.contiguous().numpy().reshape(-1)
        words = np.zeros(self.encoded_words(flat.shape), WORD)
        halves = words.view(HALF)
        for part in chunks(len(flat)):
            patterns = np.clip(flat[part], -LARGEST, LARGEST).view(np.uint32)
            patterns += draws.integers(0, 2**16, len(patterns), np.uint32)
            patterns >>= 16
            halves[part] = patterns
        return words

    def decode(self, words: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        halves, count = words.view(HALF), math.prod(shape)
        require_zeros(halves[count:])
        return from_halves(halves[:count]).view(shape)

    def working_bytes(self, shape: tuple[int, ...]) -> int:
        return WORD.itemsize * self.encoded_words(shape) + 16 * min(CHUNK_VALUES, math.prod(shape))


def from_halves(halves: np.ndarray) -> Tensor:
    """float32 values of bf16 patterns (raises ValueError where one is not finite)."""
    values = torch.from_numpy(halves.view(np.int16)).view(torch.bfloat16)
    if len(values) and not all(torch.isfinite(end) for end in torch.aminmax(values)):
        raise ValueError("a value is not finite")
    return values.float()


CODEC = Bf16
