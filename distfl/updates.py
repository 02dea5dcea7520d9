"""One client's update on the wire: a block for each unit.

A block is a word that says the format's version, a checksum, the header's length, a JSON header (round, client, unit, and
per piece the number of its tensor in the unit, its region and weight), then the encoded values. Codec, names, shapes and
lengths are not in it: both sides have the unit and the codec, and the checksum depends on them too. Everything is padded
to words of 4 bytes; nothing is pickled.

A piece is one of the unit's shared tensors or a region of it, so with deltas its reference is always at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distfl.checksums import checksum
from distfl.encoding import Encoding
from distfl.errors import NotFinite, WireError
from distfl.messages import Piece, Region
from distfl.transport.base import WORD, pack, unpack
from distfl.units import Unit

FORMAT = int.from_bytes(b"dfl2", "little")  # first word of a block; other contents, another digit
LEAD = 3  # words before the header
LONGEST_REASON = 200  # characters


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
        residuals: by name, what earlier rounds lost of the client's updates, of the pieces' shapes; changed in place. Given with
            error feedback alone.

    Raises:
        NotFinite: there is something to be sent that is not a number.
    """
    if not pieces:
        return np.empty(0, WORD)
    numbers = {tensor.name: number for number, tensor in enumerate(unit.tensors)}
    entries = [[numbers[piece.name], _region_to_json(piece.region), piece.weight] for piece in pieces]
    header = pack({"round": round, "client": client, "unit": unit.index, "pieces": entries})
    lengths = [encoding.codec.encoded_words(piece.values.shape) for piece in pieces]
    end = LEAD + len(header)
    block = np.empty(end + sum(lengths), WORD)
    block[0], block[2], block[LEAD:end] = FORMAT, len(header), header
    for piece, length in zip(pieces, lengths):
        residual = None if residuals is None else residuals[piece.name]
        _encode(encoding, piece, client, shared[piece.name], draws, residual, block[end : end + length])
        end += length
    block[1] = block_checksum(encoding, block, unit)
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
        part = base[place]
        # a region's part is a copy already, and takes the difference; the whole is the node's own tensor
        values = values - part if piece.region is None else torch.sub(values, part, out=part)
    if residual is not None:
        residual += values
        values = residual
    if not _finite(values):
        raise NotFinite(f"update of client {client}", f"{piece.name} is not finite", "lower training.learning_rate")
    out[:] = encoding.codec.encode(values, draws)
    if residual is not None:
        residual -= encoding.codec.decode(out, tuple(values.shape))


def unframe(
    encoding: Encoding, block: np.ndarray, round: int, client: int, unit: Unit, shared: Mapping[str, Tensor], most_weight: float
) -> list[Piece]:
    """The pieces of a block, values in full also where deltas were sent.

    Whatever the words are, the pieces are finite and lie inside the unit's tensors, each at most once. Memory stays below
    three times the unit's tensors and 30 times the header, plus what the codec works with.

    Args:
        shared: by name, the tensors that the round started from.
        most_weight: no piece may weigh more.

    Raises:
        WireError: the block is not what was expected.
    """
    with _named_errors(client, unit):
        entries, end = _read_header(encoding, block, (round, client, unit.index), unit)
        pieces: dict[int, Piece] = {}
        for number, region, weight in entries:
            if type(number) is not int or number in pieces or not 0 <= number < len(unit.tensors):
                raise ValueError(f"tensor {number!r} of {len(unit.tensors)}, or for the second time")
            tensor = unit.tensors[number]
            if type(weight) not in (int, float) or not 0 <= weight <= most_weight:
                raise ValueError(f"{tensor.name} has the weight {weight!r}, of at most {most_weight}")
            where, shape = _region_from_json(region, tensor.shape)
            words = encoding.codec.encoded_words(shape)
            if words > len(block) - end:
                raise ValueError(f"{tensor.name} should have {words} words, {len(block) - end} are left")
            values = _decode(encoding, block[end : end + words], shape, shared[tensor.name], where)
            if not _finite(values):
                raise ValueError(f"{tensor.name} is not finite")
            pieces[number] = Piece(unit.index, tensor.name, where, values, float(weight))
            end += words
        if end != len(block):
            raise ValueError(f"{len(block) - end} words belong to no piece")
        return list(pieces.values())


def check(encoding: Encoding, block: np.ndarray, round: int, client: int, unit: Unit) -> None:
    """Whether a block is what this client wrote of this unit, at a third of what ``unframe`` takes.

    Raises:
        WireError: the block is not what was expected.
    """
    with _named_errors(client, unit):
        _read_header(encoding, block, (round, client, unit.index), unit)


@contextmanager
def _named_errors(client: int, unit: Unit) -> Iterator[None]:
    """Whatever goes wrong in reading a block becomes a WireError that says whose block it was."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"[:LONGEST_REASON]  # it may quote the block
        raise WireError(f"a block of unit {unit.name} from client {client}", found, "report this: a message was garbled") from None


def _read_header(encoding: Encoding, block: np.ndarray, expected: tuple[int, int, int], unit: Unit) -> tuple[list, int]:
    """The entries of all pieces, and where the values begin (raises what JSON raises, and ValueError)."""
    if len(block) < LEAD or block[0] != FORMAT:
        raise ValueError(f"its {block.nbytes} bytes do not begin like a block of this version")
    if block[1] != block_checksum(encoding, block, unit):
        raise ValueError("its checksum does not fit: it was garbled or cut short, or another codec or unit was meant")
    end = LEAD + int(block[2])
    header = unpack(block[LEAD:end])
    found = (header["round"], header["client"], header["unit"])
    if found != expected:
        raise ValueError(f"it says round, client, unit {found}, expected {expected}")
    return header["pieces"], end


def _decode(encoding: Encoding, words: np.ndarray, shape: tuple[int, ...], reference: Tensor, region: Region) -> Tensor:
    values = encoding.codec.decode(words, shape)
    if not encoding.deltas:
        return values
    base, place = _place(reference, region)
    return values + base[place]


def block_checksum(encoding: Encoding, block: np.ndarray, unit: Unit) -> int:
    """Of what a block says, and of what its reader must know besides."""
    return checksum(block[2:], _layout(encoding, unit))


@lru_cache(maxsize=2**12)
def _layout(encoding: Encoding, unit: Unit) -> int:
    """What both sides must agree on to read a block's values, as a number: codec, options, deltas, names and shapes."""
    codec = encoding.codec
    tensors = [[tensor.name, tensor.shape] for tensor in unit.tensors]
    return checksum(pack([type(codec).__name__, asdict(codec.options), encoding.deltas, tensors]))


def _place(tensor: Tensor, region: Region) -> tuple[Tensor, Any]:
    """A view of a shared tensor, and the index that takes the region out of it (the whole: as a view again)."""
    if region is None:
        return tensor, ...
    if isinstance(region, tuple):
        return tensor, (torch.as_tensor(region[0])[:, None], torch.as_tensor(region[1])[None, :])
    return tensor.view(-1), torch.as_tensor(region)


def _finite(values: Tensor) -> bool:
    """Whether all are numbers; makes no tensor of their size."""
    if not values.numel():
        return True
    least, most = torch.aminmax(values)
    return math.isfinite(least) and math.isfinite(most)


def _region_to_json(region: Region) -> Any:
    """Every axis as its runs of places: first, behind the last, first, ..."""
    if region is None:
        return None
    return [_runs(axis) for axis in (region if isinstance(region, tuple) else (region,))]


def _runs(places: np.ndarray) -> list[int]:
    starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    ends = np.flatnonzero(np.diff(places, append=-2) != 1)
    return np.stack([places[starts], places[ends] + 1], 1).ravel().tolist()


def _region_from_json(region: Any, full_shape: tuple[int, ...]) -> tuple[Region, tuple[int, ...]]:
    """A region and the shape of its values (raises ValueError where it does not lie inside the tensor)."""
    if region is None:
        return None, full_shape
    limits = full_shape if len(region) == 2 else (math.prod(full_shape),)
    if len(region) != len(limits):
        raise ValueError(f"a region of {len(region)} axes of a tensor of shape {full_shape}")
    indices = tuple(_places(runs, limit) for runs, limit in zip(region, limits))
    return (indices if len(region) == 2 else indices[0]), tuple(map(len, indices))


def _places(runs: list[int], limit: int) -> np.ndarray:
    """Places below the limit, none of them twice (raises ValueError)."""
    ends = list(zip(runs[::2], runs[1::2], strict=True))
    if not all(type(start) is type(stop) is int and 0 <= start < stop <= limit for start, stop in ends):
        raise ValueError(f"runs of places that do not lie below {limit}")
    if any(before > start for (_, before), (start, _) in pairwise(sorted(ends))):
        raise ValueError("a place twice in a region")
    return np.concatenate([np.arange(start, stop) for start, stop in ends]) if ends else np.empty(0, np.int64)
