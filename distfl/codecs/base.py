"""The codec seam, and the frame around one unit's encoded pieces.

A block is what one client sends of one unit: a word with the header's length, a JSON header
(round, client, unit, and per piece its name, region, shape, weight and what the codec adds), then the
encoded values. Everything is padded to words of 4 bytes; nothing is pickled.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from distfl.errors import WireError
from distfl.messages import Piece, Region
from distfl.transport.base import WORD, pack, unpack
from distfl.units import Unit


class Codec(ABC):
    """Values to words and back."""

    @abstractmethod
    def encode(self, values: torch.Tensor, draws: np.random.Generator) -> tuple[Any, np.ndarray]:
        """A JSON-ready header and the words (1-D WORD array)."""

    @abstractmethod
    def decode(self, header: Any, words: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
        """The float32 values (raises WireError)."""


def load_codec(name: str) -> Codec:
    """The codec of this name (names are checked by the config)."""
    return importlib.import_module(f"distfl.codecs.{name}").CODEC()


def frame(codec: Codec, pieces: list[Piece], round: int, client: int, draws: np.random.Generator) -> np.ndarray:
    """One block of all pieces of a unit; an empty block for no pieces."""
    if not pieces:
        return np.empty(0, WORD)
    entries, buffers = [], []
    for piece in pieces:
        header, words = codec.encode(piece.values, draws)
        entries.append([piece.name, _region_to_json(piece.region), list(piece.values.shape), piece.weight, len(words), header])
        buffers.append(words)
    header = pack({"round": round, "client": client, "unit": pieces[0].unit, "pieces": entries})
    return np.concatenate([np.array([len(header)], WORD), header, *buffers])


def unframe(codec: Codec, block: np.ndarray, round: int, client: int, unit: Unit) -> list[Piece]:
    """The pieces of a block (raises WireError where it is not what was expected)."""
    try:
        end = 1 + int(block[0])
        header = unpack(block[1:end])
        found = (header["round"], header["client"], header["unit"])
        if found != (round, client, unit.index):
            raise ValueError(f"it says round, client, unit {found}, expected {(round, client, unit.index)}")
        full_shapes = {tensor.name: tensor.shape for tensor in unit.tensors}
        pieces = []
        for name, region, shape, weight, words, details in header["pieces"]:
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} has the weight {weight}")
            if not 0 <= words <= len(block) - end:
                raise ValueError(f"{name} should have {words} words, {len(block) - end} are left")
            where = _region_from_json(region, tuple(shape), full_shapes[name])
            values = codec.decode(details, block[end : end + words], tuple(shape))
            pieces.append(Piece(unit.index, name, where, values, float(weight)))
            end += words
        if end != len(block):
            raise ValueError(f"{len(block) - end} words belong to no piece")
        return pieces
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise WireError(
            f"a block of unit {unit.name} from client {client}", f"{type(error).__name__}: {error}", "report this: a message was garbled"
        ) from None


def _region_to_json(region: Region) -> Any:
    if region is None:
        return None
    return [part.tolist() for part in region] if isinstance(region, tuple) else region.tolist()


def _region_from_json(region: Any, shape: tuple[int, ...], full_shape: tuple[int, ...]) -> Region:
    """The region of values of this shape inside a tensor (raises ValueError where it does not lie inside)."""
    if region is None:
        if shape != full_shape:
            raise ValueError(f"shape {shape} instead of {full_shape}")
        return None
    pair = len(region) == 2 and isinstance(region[0], list)
    axes = region if pair else [region]
    limits = full_shape if pair else (math.prod(full_shape),)
    if len(axes) != len(limits) or shape != tuple(len(axis) for axis in axes):
        raise ValueError(f"values of shape {shape} for a region of another one")
    for axis, limit in zip(axes, limits):
        if not all(isinstance(index, int) and 0 <= index < limit for index in axis):
            raise ValueError(f"a region outside of {full_shape}")
    indices = tuple(np.array(axis, np.int64) for axis in axes)
    return indices if pair else indices[0]
