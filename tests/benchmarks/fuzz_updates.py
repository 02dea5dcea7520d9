"""Random damage against the decoder of updates: nothing but WireError may come out, or pieces that can be merged.

python tests/benchmarks/fuzz_updates.py [INPUTS] [SEED]

Half of the inputs keep the checksum of what they were made of, half get one that fits what they became. The process may not
hold 64 MB more than at the start, at any time, and no input may take longer than a minute.
"""

import resource
import signal
import sys
import time
from collections import Counter

import numpy as np
import torch

from distfl.aggregation import UnitMean
from distfl.caps.process import data_bytes
from distfl.config import TransportConfig
from distfl.encoding import Encoding, encoding_of
from distfl.errors import WireError
from distfl.messages import Piece
from distfl.transport.base import WORD
from distfl.units import TensorSpec, Unit
from distfl.updates import LEAD, block_checksum, frame, unframe

UNIT = Unit(2, "block.1", (TensorSpec("a", (6, 7), 0), TensorSpec("b", (9,), 42), TensorSpec("c", (), 51), TensorSpec("d", (64, 40), 52)))
ROUND, CLIENT, WEIGHT = 5, 3, 7.5
CODECS = [("exact", "auto"), ("exact", "on"), ("bf16", "auto"), ("int8", "auto"), ("int4", "auto"), ("top_k", "auto")]
REGIONS = {"a": (np.array([1, 4]), np.array([0, 2, 6])), "b": np.array([8, 0, 3]), "c": None, "d": np.arange(0, 2560, 9)}
JSON_BYTES = np.frombuffer(b'0123456789,:[]{}"-.eE nulltruefalse', np.uint8)
MOST_MORE_BYTES, LONGEST_SECONDS = 64 * 2**20, 60


def shared() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {tensor.name: torch.randn(tensor.shape, generator=generator) for tensor in UNIT.tensors}


def valid_blocks() -> list[tuple[Encoding, np.ndarray]]:
    """By every codec: whole tensors, and regions of them."""
    old, made = shared(), []
    for codec, deltas in CODECS:
        encoding = encoding_of(TransportConfig(codec=codec, deltas=deltas))
        for regions in ({}, REGIONS):
            pieces = []
            for tensor in UNIT.tensors:
                region = regions.get(tensor.name)
                flat = isinstance(region, np.ndarray)
                values = old[tensor.name].view(-1)[region] if flat else old[tensor.name][np.ix_(*region)] if region else old[tensor.name]
                pieces.append(Piece(UNIT.index, tensor.name, region, 1.01 * values, WEIGHT))
            made.append((encoding, frame(encoding, pieces, ROUND, CLIENT, UNIT, old, np.random.default_rng(1))))
    return made


def damage(block: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy with one kind of damage."""
    words, kind = block.copy(), rng.integers(8)
    bytes_, header_end = words.view(np.uint8), 4 * (LEAD + int(words[2]))
    some = rng.integers(1, 4)
    if kind == 0:  # single bits, anywhere
        np.bitwise_xor.at(bytes_, rng.integers(0, len(bytes_), some), 1 << rng.integers(0, 8, some).astype(np.uint8))
    elif kind == 1:  # letters of the header
        bytes_[rng.integers(4 * LEAD, header_end, some)] = rng.choice(JSON_BYTES, some)
    elif kind == 2:  # whole words of the values
        words[rng.integers(header_end // 4, len(words), some)] = rng.integers(0, 2**32, some, np.uint32)
    elif kind == 3:
        words = words[: rng.integers(0, len(words))]
    elif kind == 4:
        words = np.concatenate([words, rng.integers(0, 2**32, some, np.uint32)])
    elif kind == 5:
        places = rng.integers(0, len(words), 2)
        words[places] = words[places[::-1]]
    elif kind == 6:  # cut out of the middle
        start = rng.integers(0, len(words))
        words = np.delete(words, slice(start, start + some))
    else:  # nothing of a block, perhaps but its beginning
        words = rng.integers(0, 2**32, rng.integers(0, 60), np.uint32)
        words[: min(len(words), 2)] = block[: min(len(words), 2)]
        if len(words) > 2:
            words[2] = rng.integers(0, len(words))
    return words.astype(WORD, copy=False)


def check(pieces: list[Piece]) -> None:
    """They can be merged, and the mean is finite."""
    specs = {tensor.name: tensor for tensor in UNIT.tensors}
    for piece in pieces:
        full = specs[piece.name].shape
        axes = () if piece.region is None else piece.region if isinstance(piece.region, tuple) else (piece.region,)
        limits = full if isinstance(piece.region, tuple) else (specs[piece.name].elements,)
        assert all(((axis >= 0) & (axis < limit)).all() for axis, limit in zip(axes, limits))
        assert tuple(piece.values.shape) == (tuple(map(len, axes)) if axes else full)
        assert piece.values.dtype == torch.float32 and torch.isfinite(piece.values).all() and 0 <= piece.weight <= WEIGHT
    mean = UnitMean(UNIT)
    mean.add(pieces)
    assert all(torch.isfinite(mean.mean(tensor.name, torch.zeros(tensor.shape), WEIGHT)[0]).all() for tensor in UNIT.tensors)


def main(inputs: int = 1_000_000, seed: int = 0) -> None:
    rng, old, blocks, found = np.random.default_rng(seed), shared(), valid_blocks(), Counter()
    for encoding, block in blocks:
        check(unframe(encoding, block, ROUND, CLIENT, UNIT, old, WEIGHT))
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + MOST_MORE_BYTES, resource.RLIM_INFINITY))
    began = time.monotonic()
    for number in range(inputs):
        encoding, block = blocks[number % len(blocks)]
        words = damage(block, rng)
        fits = bool(rng.integers(2))
        if fits and len(words) >= LEAD:
            words[1] = block_checksum(encoding, words, UNIT)
        unchanged = np.array_equal(words, block)
        signal.alarm(LONGEST_SECONDS)
        try:
            pieces = unframe(encoding, words, ROUND, CLIENT, UNIT, old, WEIGHT)
        except WireError:
            assert not unchanged
            found["refused, checksum fits" if fits else "refused"] += 1
        else:
            assert fits or unchanged, "damage that the checksum does not show"
            check(pieces)
            found["unchanged" if unchanged else "harmless, checksum fits"] += 1
    signal.alarm(0)
    seconds = time.monotonic() - began
    print(f"{found.total()} inputs, seed {seed}: {seconds:.0f} s, {found.total() / seconds:.0f} a second; {dict(found.most_common())}")
    print(
        f"nothing but WireError was raised; never {MOST_MORE_BYTES // 2**20} MB more than at the start, never {LONGEST_SECONDS} s for one"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
