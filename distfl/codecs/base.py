"""The codec seam: the values of one tensor to words of 4 bytes, and back.

How many words a tensor becomes depends on its shape alone, so that plans know every upload before anything
trains, and a block needs no lengths in its header.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from distfl.errors import ConfigError
from distfl.settings import from_dict
from distfl.transport.base import WORD

CHUNK_VALUES = 4096  # encoded at a time; even


@dataclass(frozen=True)
class NoOptions:
    """Of a codec that has none."""


@dataclass(frozen=True)
class Codec(ABC):
    """One way to write values. Equal codecs are of one class with equal options.

    Args:
        options: of the class ``Options``.
    """

    options: Any

    Options: ClassVar[type] = NoOptions  # frozen dataclass of transport.codec_options
    lossless: ClassVar[bool]
    biased: ClassVar[bool]  # the mean of what is decoded, over all draws, is not what was encoded

    @abstractmethod
    def encoded_words(self, shape: tuple[int, ...]) -> int:
        """Words that values of this shape become."""

    @abstractmethod
    def encode(self, values: Tensor, draws: np.random.Generator) -> np.ndarray:
        """The words (1-D WORD array) of finite float32 values; ``draws`` is the only source of randomness."""

    @abstractmethod
    def decode(self, words: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        """The float32 values.

        Args:
            words: as many as this shape becomes.

        Raises:
            ValueError: no encoder wrote this.
        """

    @abstractmethod
    def working_bytes(self, shape: tuple[int, ...]) -> int:
        """Most bytes that encoding holds besides the values, its result included; decoding holds no more besides its result."""


def load_codec(name: str, options: dict[str, Any]) -> Codec:
    """The codec of this name with its options checked (raises ConfigError)."""
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))
    if name not in known:
        raise ConfigError(f"transport.codec = {name}", f"known codecs are {', '.join(known)}", "set transport.codec to one of these")
    kind = importlib.import_module(f"distfl.codecs.{name}").CODEC
    try:
        return kind(from_dict(kind.Options, options))
    except ConfigError as error:
        raise ConfigError(f"transport.codec_options of {name}: {error.asked}", error.found, error.change) from None


def words_for(bytes_: int) -> int:
    """Words that hold so many bytes."""
    return math.ceil(bytes_ / WORD.itemsize)


def chunks(count: int) -> Iterator[slice]:
    """``count`` values, CHUNK_VALUES at a time."""
    return (slice(start, min(start + CHUNK_VALUES, count)) for start in range(0, count, CHUNK_VALUES))


def require_zeros(padding: np.ndarray) -> None:
    """What fills up the last word holds nothing (raises ValueError)."""
    if padding.any():
        raise ValueError("the padding is not zero")
