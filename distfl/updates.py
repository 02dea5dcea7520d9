"""One client's update on the wire: a block for each unit.

A block is a word with the header's length, a JSON header (round, client, unit, and per piece the number of its tensor
in the unit, its region and weight), then the encoded values. Names, shapes and lengths are not in it: both sides have
the unit and the codec. Everything is padded to words of 4 bytes; nothing is pickled.

A piece is one of the unit's shared tensors or a region of it, so with deltas its reference is always at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distfl.encoding import Encoding
from distfl.errors import NotFinite, WireError
from distfl.messages import Piece, Region
from distfl.transport.base import WORD, pack, unpack
from distfl.units import Unit


def frame(
    encoding: Encoding,
    pieces: list[Piece],
    round: int,
    client: int,
    unit: Unit,
    shared: Mapping[str, Tensor],
    draws: np.random.Generator,
    residuals: Mapping[str, Tensor] | None = None,
) -> np.ndarray:
    """One block of all pieces of a unit; an empty block for no pieces.

    Args:
        shared: by name, the tensors that the round started from.
        residuals: by name, what earlier rounds lost of the client's updates, of the shared tensors' shapes; changed
            in place. Given with error feedback alone.

    Raises:
        NotFinite: there is something to be sent that is not a number.
    """
    if not pieces:
        return np.empty(0, WORD)
    numbers = {tensor.name: number for number, tensor in enumerate(unit.tensors)}
    entries = [[numbers[piece.name], _region_to_json(piece.region), piece.weight] for piece in pieces]
    header = pack({"round": round, "client": client, "unit": unit.index, "pieces": entries})
    lengths = [encoding.codec.encoded_words(piece.values.shape) for piece in pieces]
    end = 1 + len(header)
    block = np.empty(end + sum(lengths), WORD)
    block[0], block[1:end] = len(header), header
    for piece, length in zip(pieces, lengths):
        residual = None if residuals is None else residuals[piece.name]
        _encode(encoding, piece, client, shared[piece.name], draws, residual, block[end : end + length])
        end += length
    return block


def _encode(
    encoding: Encoding,
    piece: Piece,
    client: int,
    reference: Tensor,
    draws: np.random.Generator,
    residual: Tensor | None,
    out: np.ndarray,
) -> None:
    """Write one piece's words, and keep in the residual what they do not say."""
    values = piece.values
    if encoding.deltas:
        base, place = _place(reference, piece.region)
        values = values - base[place]
    if residual is not None:
        kept, place = _place(residual, piece.region)
        kept[place] += values
        values = kept[place]  # whole tensors: no copy
    if not all(math.isfinite(end) for end in _ends(values)):
        raise NotFinite(f"update of client {client}", f"{piece.name} is not finite", "lower training.learning_rate")
    out[:] = encoding.codec.encode(values, draws)
    if residual is not None:
        kept[place] -= encoding.codec.decode(out, tuple(values.shape))


def unframe(encoding: Encoding, block: np.ndarray, round: int, client: int, unit: Unit, shared: Mapping[str, Tensor]) -> list[Piece]:
    """The pieces of a block, values in full also where deltas were sent.

    Args:
        shared: by name, the tensors that the round started from.

    Raises:
        WireError: the block is not what was expected.
    """
    try:
        end = 1 + int(block[0])
        header = unpack(block[1:end])
        found = (header["round"], header["client"], header["unit"])
        if found != (round, client, unit.index):
            raise ValueError(f"it says round, client, unit {found}, expected {(round, client, unit.index)}")
        pieces = []
        for number, region, weight in header["pieces"]:
            if not 0 <= number < len(unit.tensors):
                raise ValueError(f"tensor {number} of {len(unit.tensors)}")
            tensor = unit.tensors[number]
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{tensor.name} has the weight {weight}")
            where, shape = _region_from_json(region, tensor.shape)
            words = encoding.codec.encoded_words(shape)
            if words > len(block) - end:
                raise ValueError(f"{tensor.name} should have {words} words, {len(block) - end} are left")
            values = encoding.codec.decode(block[end : end + words], shape)
            if encoding.deltas:
                base, place = _place(shared[tensor.name], where)
                values = values + base[place]
            pieces.append(Piece(unit.index, tensor.name, where, values, float(weight)))
            end += words
        if end != len(block):
            raise ValueError(f"{len(block) - end} words belong to no piece")
        return pieces
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise WireError(
            f"a block of unit {unit.name} from client {client}", f"{type(error).__name__}: {error}", "report this: a message was garbled"
        ) from None


def _place(tensor: Tensor, region: Region) -> tuple[Tensor, Any]:
    """A view of a shared tensor, and the index that takes the region out of it (the whole: as a view again)."""
    if region is None:
        return tensor, ...
    if isinstance(region, tuple):
        return tensor, (torch.as_tensor(region[0])[:, None], torch.as_tensor(region[1])[None, :])
    return tensor.view(-1), torch.as_tensor(region)


def _ends(values: Tensor) -> tuple[Tensor, ...]:
    """Least and largest value, without a tensor of their size; nothing of nothing."""
    return torch.aminmax(values) if values.numel() else ()


def _region_to_json(region: Region) -> Any:
    if region is None:
        return None
    return [part.tolist() for part in region] if isinstance(region, tuple) else region.tolist()


def _region_from_json(region: Any, full_shape: tuple[int, ...]) -> tuple[Region, tuple[int, ...]]:
    """A region and the shape of its values (raises ValueError where it does not lie inside the tensor)."""
    if region is None:
        return None, full_shape
    pair = len(region) == 2 and isinstance(region[0], list)
    axes = region if pair else [region]
    limits = full_shape if pair else (math.prod(full_shape),)
    if len(axes) != len(limits):
        raise ValueError(f"a region of {len(axes)} axes of a tensor of shape {full_shape}")
    for axis, limit in zip(axes, limits):
        if not all(isinstance(index, int) and 0 <= index < limit for index in axis):
            raise ValueError(f"a region outside of {full_shape}")
    indices = tuple(np.array(axis, np.int64) for axis in axes)
    return (indices if pair else indices[0]), tuple(len(axis) for axis in axes)
