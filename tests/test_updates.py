"""Blocks against damage: by every codec, whatever was changed is refused, and what a fitting checksum lets through can be merged."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes

from distfl.aggregation import UnitMean
from distfl.checksums import seal, sealed_words, unseal
from distfl.codecs.base import load_codec
from distfl.config import TransportConfig
from distfl.encoding import Encoding, encoding_of
from distfl.errors import WireError
from distfl.messages import Piece
from distfl.transport.base import WORD, pack
from distfl.units import TensorSpec, Unit
from distfl.updates import LEAD, block_checksum, frame, unframe

UNIT = Unit(2, "block.1", (TensorSpec("a", (4, 5), 0), TensorSpec("b", (7,), 20), TensorSpec("c", (), 27)))
ROUND, CLIENT, WEIGHT = 5, 3, 7.5
OLD = {tensor.name: torch.linspace(-1, 1, tensor.elements).view(tensor.shape) for tensor in UNIT.tensors}
REGIONS = {"a": (np.array([3, 0]), np.array([1, 2, 4])), "b": np.array([6, 0, 2])}
ENCODINGS = {
    "exact": encoding_of(TransportConfig()),
    "exact deltas": encoding_of(TransportConfig(deltas="on")),
    "bf16": encoding_of(TransportConfig(codec="bf16")),
    "int8": encoding_of(TransportConfig(codec="int8")),
    "int4": encoding_of(TransportConfig(codec="int4")),
    "top_k": encoding_of(TransportConfig(codec="top_k")),
    "top_k fp32": encoding_of(TransportConfig(codec="top_k", codec_options={"values": "fp32"})),
}


@functools.cache
def valid(name: str, regions: bool) -> np.ndarray:
    pieces = []
    for tensor in UNIT.tensors:
        region = REGIONS.get(tensor.name) if regions else None
        old = OLD[tensor.name]
        part = old if region is None else old[region] if isinstance(region, np.ndarray) else old[np.ix_(*region)]
        pieces.append(Piece(UNIT.index, tensor.name, region, part * 1.1 + 0.01, WEIGHT))
    return frame(ENCODINGS[name], pieces, ROUND, CLIENT, UNIT, OLD, np.random.default_rng(1))


def read(words: np.ndarray, encoding: Encoding, round: int = ROUND, client: int = CLIENT, unit: Unit = UNIT) -> list[Piece]:
    return unframe(encoding, words, round, client, unit, OLD, WEIGHT)


def assert_can_be_merged(pieces: list[Piece]) -> None:
    mean = UnitMean(UNIT)
    mean.add(pieces)  # raises where shapes differ, or an index lies outside
    assert len({piece.name for piece in pieces}) == len(pieces)
    for piece in pieces:
        assert piece.unit == UNIT.index and piece.values.dtype == torch.float32 and torch.isfinite(piece.values).all()
        assert 0 <= piece.weight <= WEIGHT
        axes = () if piece.region is None else piece.region if isinstance(piece.region, tuple) else (piece.region,)
        assert all((axis >= 0).all() for axis in axes)  # torch would count these from the end
        found, share = mean.mean(piece.name, OLD[piece.name], WEIGHT)
        assert torch.isfinite(found).all() and ((share >= 0) & (share <= 1)).all()


@st.composite
def changes(draw, words: np.ndarray) -> np.ndarray:
    """The words with some of their bits, letters or places changed; perhaps, in the end, as they were."""
    place = st.integers(0, len(words) - 1)
    kind = draw(st.sampled_from(["bits", "header", "shorter", "longer", "swapped", "cut out", "repeated"]))
    words = words.copy()
    if kind == "bits":
        for _ in range(draw(st.integers(1, 4))):
            words[draw(place)] ^= np.uint32(1 << draw(st.integers(0, 31)))
    elif kind == "header":
        letters = words.view(np.uint8)[4 * LEAD : 4 * (LEAD + int(words[2]))]
        for _ in range(draw(st.integers(1, 3))):
            letters[draw(st.integers(0, len(letters) - 1))] = draw(st.sampled_from(b'0123456789,:[]{}"-.eE nulltruefalse'))
    elif kind == "shorter":
        words = words[: draw(place)]
    elif kind == "longer":
        words = np.concatenate([words, np.array(draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9)), WORD)])
    elif kind == "swapped":
        one, other = draw(place), draw(place)
        words[[one, other]] = words[[other, one]]
    else:
        start, count = draw(place), draw(st.integers(1, 5))
        part = words[start : start + count]
        words = np.concatenate([words[:start], *([part, part] if kind == "repeated" else []), words[start + count :]])
    return words


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("regions", [False, True], ids=["whole", "regions"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_was_changed_is_refused(name, regions, data):
    good = valid(name, regions)
    words = data.draw(changes(good))
    if np.array_equal(words, good):
        assert_can_be_merged(read(words, ENCODINGS[name]))
    else:
        with pytest.raises(WireError):
            read(words, ENCODINGS[name])


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("regions", [False, True], ids=["whole", "regions"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_was_changed_under_a_fitting_checksum_is_refused_or_can_be_merged(name, regions, data):
    words = data.draw(changes(valid(name, regions)))
    if len(words) >= LEAD:
        words[1] = block_checksum(ENCODINGS[name], words, UNIT)
    try:
        pieces = read(words, ENCODINGS[name])
    except WireError:
        return
    assert_can_be_merged(pieces)


NUMBERS = st.integers() | st.floats() | st.integers(-1, 8)
ANY = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(max_size=3), lambda inner: st.lists(inner, max_size=7), max_leaves=12)
RUNS = st.sampled_from([[0, 4], [0, 7], [1, 3], [3, 4, 0, 2], [0, 1, 2, 5]]) | st.lists(st.integers(0, 8), max_size=6)
REGION = st.none() | st.lists(RUNS, max_size=3) | ANY
ENTRY = st.tuples(st.integers(0, 2) | ANY, REGION, st.floats(0, 8) | ANY) | ANY


@pytest.mark.parametrize("name", ENCODINGS)
@given(entries=st.lists(ENTRY, max_size=4) | ANY, seed=st.integers(0, 2**32 - 1), missing=st.integers(-2, 2))
@settings(max_examples=60, deadline=None)
def test_a_header_of_any_pieces_is_refused_or_they_can_be_merged(name, entries, seed, missing):
    """With about as many words behind it as they need, so that many headers get as far as the values."""
    encoding = ENCODINGS[name]
    header = pack({"round": ROUND, "client": CLIENT, "unit": UNIT.index, "pieces": entries})
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**32, max(0, needed(encoding, entries) + missing), np.uint32) >> rng.integers(0, 32)
    words = np.concatenate([valid(name, False)[:2], np.array([len(header)], WORD), header, values.astype(WORD)])
    words[1] = block_checksum(encoding, words, UNIT)
    try:
        pieces = read(words, encoding)
    except WireError:
        return
    assert_can_be_merged(pieces)


def needed(encoding: Encoding, entries) -> int:
    """Words of all pieces, as far as they can be read."""
    words = 0
    try:
        for number, region, _ in entries:
            shape = UNIT.tensors[number].shape if region is None else tuple(sum(np.diff(runs)[::2]) for runs in region)
            words += encoding.codec.encoded_words(shape) if all(length <= 8 for length in shape) else 0
    except (TypeError, ValueError, IndexError, KeyError, OverflowError, AttributeError):
        pass
    return words


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_stale_or_foreign_block_is_refused_by_name(name):
    good = valid(name, False)
    twin = Unit(3, "block.2", UNIT.tensors)  # what it shares has the same names and shapes here
    for others in ({"round": ROUND - 1}, {"client": CLIENT + 1}, {"unit": twin}):
        with pytest.raises(WireError, match=r"it says round, client, unit \(5, 3, 2\)"):
            read(good, ENCODINGS[name], **others)


def test_a_block_of_another_codec_option_shape_or_version_is_refused():
    for written in ENCODINGS:
        for reader in ENCODINGS.keys() - {written}:
            with pytest.raises(WireError, match="checksum"):
                read(valid(written, False), ENCODINGS[reader])
    turned = Unit(2, "block.1", (TensorSpec("a", (5, 4), 0), *UNIT.tensors[1:]))
    with pytest.raises(WireError, match="checksum"):
        read(valid("int8", False), ENCODINGS["int8"], unit=turned)
    sparse = Encoding(load_codec("top_k", {"density": 0.2}), True, True)
    with pytest.raises(WireError, match="checksum"):
        read(valid("top_k", False), sparse)
    later = valid("exact", False).copy()
    later[0] += 1
    with pytest.raises(WireError, match="this version"):
        read(later, ENCODINGS["exact"])


def test_a_short_block_cannot_make_many_tensors():
    """top_k writes few words for many zeros: one tensor named a thousand times would be a thousand times its memory."""
    encoding, count = ENCODINGS["top_k"], 1000
    words = valid("top_k", False)
    values = words[LEAD + int(words[2]) :][: encoding.codec.encoded_words((4, 5))]
    header = pack({"round": ROUND, "client": CLIENT, "unit": UNIT.index, "pieces": [[0, None, 1.0]] * count})
    many = np.concatenate([words[:2], np.array([len(header)], WORD), header, *[values] * count])
    many[1] = block_checksum(encoding, many, UNIT)
    with pytest.raises(WireError, match="second time"):
        read(many, encoding)


# --- sums and means ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int64, np.float32])
@given(values=st.lists(st.integers(-(2**31), 2**31), max_size=9), unit=st.integers(0, 99), data=st.data())
@settings(max_examples=40, deadline=None)
def test_sealed_sums_come_back_and_no_changed_bit_passes(kind, values, unit, data):
    array = np.array(values, kind)
    words = seal(array, unit)
    assert words.dtype == WORD and len(words) == sealed_words(len(array), kind) == math.ceil(array.nbytes / 4) + 1
    assert np.array_equal(unseal(words, np.dtype(kind), unit), array)
    with pytest.raises(WireError, match="sums or means"):
        unseal(words, np.dtype(kind), unit + 1)
    words[data.draw(st.integers(0, len(words) - 1))] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    with pytest.raises(WireError, match="sums or means"):
        unseal(words, np.dtype(kind), unit)


@pytest.mark.parametrize(
    "region", [None, (np.arange(0, 200), np.arange(100, 300)), np.arange(0, 80_000, 2)], ids=["whole", "matrix", "flat"]
)
def test_a_delta_takes_no_more_than_one_tensor_of_its_size(region):
    """With one that the codec makes, that is what costs count for the moment of sending (``Encoding.working_bytes``)."""
    encoding = encoding_of(TransportConfig(codec="bf16"))
    shared = {"w": torch.ones(400, 400)}
    shape = shared["w"].shape if region is None else tuple(map(len, region)) if isinstance(region, tuple) else region.shape
    values = torch.full(shape, 1.5)
    unit = Unit(1, "block.0", (TensorSpec("w", (400, 400), 0),))
    with LiveBytes() as live:
        block = frame(encoding, [Piece(1, "w", region, values, 1.0)], 1, 1, unit, shared, np.random.default_rng(0))
    assert live.peak <= encoding.working_bytes(shape) + 64
    assert torch.equal(shared["w"], torch.ones(400, 400)) and torch.equal(values, torch.full(shape, 1.5))
    (piece,) = unframe(encoding, block, 1, 1, unit, shared, 1.0)
    assert torch.equal(torch.as_tensor(piece.values), values)
