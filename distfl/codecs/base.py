"""The codec seam, and the frame around one unit's encoded pieces.

A block is what one client sends of one unit: a word with the header's length, a JSON header
(round, client, unit, weight, and per piece its name, region and what the codec adds), then the
encoded values. Everything is padded to words of 4 bytes; nothing is pickled.
"""

from __future__ import annotations

import importlib
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
        entries.append([piece.name, _region_to_json(piece.region), list(piece.values.shape), len(words), header])
        buffers.append(words)
    header = pack({"round": round, "client": client, "unit": pieces[0].unit, "weight": pieces[0].weight, "pieces": entries})
    return np.concatenate([np.array([len(header)], WORD), header, *buffers])


def unframe(codec: Codec, block: np.ndarray, round: int, client: int, unit: Unit) -> list[Piece]:
    """The pieces of a block (raises WireError where it is not what was expected)."""
    try:
        end = 1 + int(block[0])
        header = unpack(block[1:end])
        found = (header["round"], header["client"], header["unit"])
        if found != (round, client, unit.index):
            raise WireError(
                f"round {round}, client {client}, unit {unit.index}",
                f"a block of round, client, unit {found}",
                "report this: ranks are out of step",
            )
        shapes = {tensor.name: tensor.shape for tensor in unit.tensors}
        pieces = []
        for name, region, shape, words, details in header["pieces"]:
            if region is None and tuple(shape) != shapes[name]:
                raise WireError(f"{name} of shape {shapes[name]}", f"shape {tuple(shape)}", "report this: ranks hold different models")
            if end + words > len(block):
                raise WireError(f"{words} words for {name}", f"{len(block) - end} are left", "report this: a message was cut")
            values = codec.decode(details, block[end : end + words], tuple(shape))
            pieces.append(Piece(unit.index, name, _region_from_json(region), values, float(header["weight"])))
            end += words
        return pieces
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise WireError(
            f"a block of unit {unit.name} from client {client}", f"{type(error).__name__}: {error}", "report this: a message was garbled"
        ) from None


def _region_to_json(region: Region) -> Any:
    if region is None:
        return None
    return [part.tolist() for part in region] if isinstance(region, tuple) else region.tolist()


def _region_from_json(region: Any) -> Region:
    if region is None:
        return None
    pair = len(region) == 2 and isinstance(region[0], list)
    return (np.array(region[0]), np.array(region[1])) if pair else np.array(region)
