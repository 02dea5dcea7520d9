"""Codecs and their frame: what goes in comes out, and whatever arrives damaged is a WireError."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distfl.codecs
from distfl.aggregation import UnitMean
from distfl.codecs.base import frame, load_codec, unframe
from distfl.errors import WireError
from distfl.messages import Piece
from distfl.transport.base import WORD, pack, unpack
from distfl.units import TensorSpec, Unit

CODECS = sorted(path.stem for path in Path(distfl.codecs.__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))
EXACT = load_codec("exact")
DRAWS = np.random.default_rng(1)
UNIT = Unit(2, "block.1", (TensorSpec("a", (2, 3), 0), TensorSpec("b", (4,), 6)))
ROUND, CLIENT = 5, 3


def piece(name: str, region, values, unit: int = 2, weight: float = 7.5) -> Piece:
    return Piece(unit, name, region, values, weight)


PIECES = [piece("a", None, torch.arange(6.0).reshape(2, 3)), piece("b", None, torch.tensor([1.5, -2, 0, 3]))]


def block(pieces=PIECES) -> np.ndarray:
    return frame(EXACT, pieces, ROUND, CLIENT, DRAWS)


def rebuilt(change) -> np.ndarray:
    """A block whose header was changed and packed again."""
    good = block()
    header = unpack(good[1 : 1 + good[0]])
    change(header)
    words = pack(header)
    return np.concatenate([np.array([len(words)], WORD), words, good[1 + good[0] :]])


def assert_same(found: list[Piece], sent: list[Piece]) -> None:
    assert [(p.unit, p.name, p.weight) for p in found] == [(p.unit, p.name, p.weight) for p in sent]
    for one, other in zip(found, sent):
        assert one.values.dtype == torch.float32 and torch.equal(one.values, other.values)
        if other.region is None:
            assert one.region is None
        else:
            pairs = zip(one.region, other.region) if isinstance(other.region, tuple) else [(one.region, other.region)]
            assert isinstance(one.region, tuple) == isinstance(other.region, tuple)
            assert all(np.array_equal(left, right) for left, right in pairs)


# --- round trip --------------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=4),
    st.integers(0, 9),
    st.floats(0, 1e9),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_pieces_of_any_shape_come_back_bit_for_bit(shapes, index, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    unit = Unit(index, "u", tuple(TensorSpec(f"t{i}", tuple(tensor.shape), 0) for i, tensor in enumerate(tensors)))
    sent = [piece(f"t{i}", None, tensor, index, weight) for i, tensor in enumerate(tensors)]
    assert_same(unframe(EXACT, frame(EXACT, sent, 1, 2, DRAWS), 1, 2, unit), sent)


def test_special_values_keep_their_bits():
    values = torch.tensor([float("inf"), -0.0, float("nan"), 1e-45])
    found = unframe(EXACT, block([piece("b", None, values)]), ROUND, CLIENT, UNIT)[0].values
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))


def test_a_transposed_view_is_sent_as_it_reads():
    view = torch.arange(6.0).reshape(3, 2).T
    assert_same(unframe(EXACT, block([piece("a", None, view)]), ROUND, CLIENT, UNIT), [piece("a", None, view)])


@pytest.mark.parametrize(
    "region, shape",
    [
        ((np.array([1]), np.array([0, 2])), (1, 2)),
        ((np.array([0, 1]), np.array([2])), (2, 1)),
        (np.array([0, 5]), (2,)),
        (np.array([3]), (1,)),
    ],
)
def test_regions_come_back(region, shape):
    sent = [piece("a", region, torch.rand(shape)), PIECES[1]]
    assert_same(unframe(EXACT, block(sent), ROUND, CLIENT, UNIT), sent)


@pytest.mark.parametrize("region, shape", [(np.array([], int), (0,)), ((np.array([], int), np.array([0, 1])), (0, 2))])
def test_an_empty_region_can_be_added_after_the_round_trip(region, shape):
    found = unframe(EXACT, block([piece("a", region, torch.zeros(shape))]), ROUND, CLIENT, UNIT)
    UnitMean(UNIT).add(found)


def test_pieces_of_one_unit_may_differ_in_weight():
    sent = [piece("a", None, torch.zeros(2, 3), weight=1.0), piece("b", None, torch.zeros(4), weight=2.0)]
    assert_same(unframe(EXACT, block(sent), ROUND, CLIENT, UNIT), sent)


def test_no_pieces_are_an_empty_block():
    assert block([]).size == 0 and block([]).dtype == WORD


@pytest.mark.parametrize("name", CODECS)
def test_a_block_is_made_of_words(name):
    codec = load_codec(name)
    for client in range(12):  # headers of different lengths
        made = frame(codec, [piece("a", None, torch.rand(2, 3), weight=10.0**client)], ROUND, 10**client, DRAWS)
        assert made.ndim == 1 and made.dtype == WORD and made.flags.c_contiguous
        assert unframe(codec, made, ROUND, 10**client, UNIT)[0].values.shape == (2, 3)


def test_exact_sends_four_bytes_a_value_and_the_header():
    made = block()
    assert made.nbytes == 4 + 4 * int(made[0]) + 4 * (6 + 4)
    assert json.loads(made[1 : 1 + made[0]].tobytes())["unit"] == 2


# --- damage ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round, client, unit", [(ROUND + 1, CLIENT, 2), (ROUND, CLIENT - 1, 2), (ROUND, CLIENT, 1)])
def test_a_block_of_another_round_client_or_unit_is_refused(round, client, unit):
    with pytest.raises(WireError, match="it says round"):
        unframe(EXACT, block(), round, client, Unit(unit, "x", UNIT.tensors))


def test_every_truncation_is_refused():
    whole = block()
    for length in range(len(whole)):
        with pytest.raises(WireError):
            unframe(EXACT, whole[:length], ROUND, CLIENT, UNIT)


def test_another_shape_is_refused():
    with pytest.raises(WireError, match="shape"):
        unframe(EXACT, block([piece("a", None, torch.zeros(3, 2))]), ROUND, CLIENT, UNIT)


NAME, REGION, SHAPE, WEIGHT, WORDS, DETAILS = range(6)  # entries of a piece in the header


def changed(entry: int, value):
    """The first piece (a, whole, six values) with another entry."""
    return lambda header: header["pieces"][0].__setitem__(entry, value)


def flat(region, shape=(6,)):
    """The first piece as six values of a region of a."""
    return lambda header: header["pieces"].__setitem__(0, ["a", region, list(shape), 1.0, 6, None])


def test_an_untouched_header_is_accepted():
    for change in (lambda header: None, changed(WEIGHT, 0), flat([0, 1, 2, 3, 4, 5]), flat([[0, 1], [2, 0, 1]], [2, 3])):
        assert len(unframe(EXACT, rebuilt(change), ROUND, CLIENT, UNIT)) == 2


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda h: h.pop("round"), id="no round"),
        pytest.param(lambda h: h.pop("pieces"), id="no pieces"),
        pytest.param(lambda h: h.update(pieces=5), id="pieces that are a number"),
        pytest.param(lambda h: h["pieces"].pop(), id="words that belong to no piece"),
        pytest.param(lambda h: h["pieces"][0].pop(), id="a piece with an entry too few"),
        pytest.param(changed(NAME, "c"), id="an unknown tensor"),
        pytest.param(changed(NAME, []), id="a name that is a list"),
        pytest.param(changed(SHAPE, None), id="no shape"),
        pytest.param(changed(SHAPE, [3, 2]), id="another shape"),
        pytest.param(changed(WEIGHT, "heavy"), id="a weight in words"),
        pytest.param(changed(WEIGHT, None), id="no weight"),
        pytest.param(changed(WEIGHT, 10**400), id="a weight beyond floats"),
        pytest.param(changed(WEIGHT, float("nan")), id="a weight that is not a number"),
        pytest.param(changed(WEIGHT, float("inf")), id="an infinite weight"),
        pytest.param(changed(WEIGHT, -1.0), id="a negative weight"),
        pytest.param(changed(WORDS, -1), id="a negative number of words"),
        pytest.param(changed(WORDS, 5.5), id="half a word"),
        pytest.param(changed(WORDS, 5), id="a word too few"),
        pytest.param(changed(WORDS, 7), id="a word of the next piece"),
        pytest.param(changed(WORDS, 10**30), id="more words than there are"),
        pytest.param(changed(REGION, [0]), id="fewer positions than values"),
        pytest.param(lambda h: h["pieces"].__setitem__(0, ["c", [0], [6], 1.0, 6, None]), id="a region of an unknown tensor"),
        pytest.param(flat([0, 1, 2, 3, 4, 6]), id="a position past the end"),
        pytest.param(flat([0, 1, 2, 3, 4, -1]), id="a position before the start"),
        pytest.param(flat([0, 1]), id="too few positions"),
        pytest.param(flat([0.5, 1, 2, 3, 4, 5]), id="half a position"),
        pytest.param(flat({"x": 1}), id="a region that is a mapping"),
        pytest.param(flat(7), id="a region that is a number"),
        pytest.param(flat("012345"), id="a region that is a text"),
        pytest.param(flat([[0, 1], [0, 1, 3]], [2, 3]), id="a column past the end"),
        pytest.param(flat([[0, 1], [0, 1]], [2, 3]), id="too few columns"),
    ],
)
def test_a_garbled_header_is_refused(change):
    with pytest.raises(WireError):
        unframe(EXACT, rebuilt(change), ROUND, CLIENT, UNIT)


def test_a_deeply_nested_header_is_refused():
    words = np.frombuffer(b"[" * 40_000, WORD)
    with pytest.raises(WireError):
        unframe(EXACT, np.concatenate([np.array([len(words)], WORD), words]), ROUND, CLIENT, UNIT)


def test_random_damage_is_a_wire_error_or_a_well_formed_piece():
    """5 000 blocks with bytes or words changed, cut out or repeated."""
    rng, refused = random.Random(1), 0
    whole = block([PIECES[0], piece("b", np.array([0, 3]), torch.tensor([1.0, 2.0]))])
    header_bytes = 4 * (1 + int(whole[0]))
    for _ in range(5000):
        damaged = bytearray(whole.tobytes())
        kind = rng.randrange(4)
        if kind == 0:
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(header_bytes)] = rng.randrange(256)
        elif kind == 1:
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(4, header_bytes)] = rng.choice(b'0123456789,:[]{}"-.eE nulltruefalse')
        elif kind == 2:
            start = 4 * rng.randrange(len(damaged) // 4)
            del damaged[start : start + 4 * rng.randint(1, 5)]
        else:
            start = 4 * rng.randrange(len(damaged) // 4)
            damaged[start : start + 4] = rng.randbytes(4 * rng.randint(1, 5))
        try:
            pieces = unframe(EXACT, np.frombuffer(bytes(damaged), WORD).copy(), ROUND, CLIENT, UNIT)
        except WireError:
            refused += 1
            continue
        for one in pieces:
            assert one.region is not None or one.values.shape == dict(a=(2, 3), b=(4,))[one.name]
            assert one.values.dtype == torch.float32 and isinstance(one.weight, float)
    assert refused > 2500


def test_random_words_are_a_wire_error():
    rng = np.random.default_rng(1)
    for _ in range(1000):
        words = rng.integers(0, 2**32, rng.integers(0, 40), dtype=np.uint32)
        if len(words) and rng.random() < 0.5:
            words[0] = rng.integers(0, len(words))
        with pytest.raises(WireError):
            unframe(EXACT, words, ROUND, CLIENT, UNIT)
