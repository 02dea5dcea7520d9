"""Codecs and their frame: what goes in comes out, and whatever arrives damaged is a WireError."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distfl.codecs
from distfl.aggregation import UnitMean
from distfl.codecs.base import CHUNK_VALUES, NoOptions, load_codec
from distfl.config import TransportConfig
from distfl.encoding import Encoding, encoding_of
from distfl.errors import ConfigError, NotFinite, WireError
from distfl.messages import Piece
from distfl.model import ModelSpec
from distfl.transport.base import WORD, pack, unpack
from distfl.units import TensorSpec, Unit, UnitTable, Window
from distfl.updates import LEAD, block_checksum, frame, unframe

CODECS = sorted(path.stem for path in Path(distfl.codecs.__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))
LOSSY = [name for name in CODECS if name != "exact"]
UNBIASED = ["bf16", "int8", "int4", "int2"]
OPTIONS = {"top_k": [{}, {"values": "fp32"}, {"density": 1e-3}, {"density": 0.5}, {"density": 1.0, "values": "fp32"}]}
EVERY = [(name, options) for name in CODECS for options in OPTIONS.get(name, [{}])]
EXACT = Encoding()
UNIT = Unit(2, "block.1", (TensorSpec("a", (2, 3), 0), TensorSpec("b", (4,), 6)))
ROUND, CLIENT, MOST_WEIGHT = 5, 3, 1e12


def draws(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def encoding(name: str, **options) -> Encoding:
    """With deltas and error feedback as they come by default."""
    return encoding_of(TransportConfig(codec=name, codec_options=options))


def zeros(unit: Unit = UNIT) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.zeros(tensor.shape) for tensor in unit.tensors}


def piece(name: str, region, values, unit: int = 2, weight: float = 7.5) -> Piece:
    return Piece(unit, name, region, values, weight)


PIECES = [piece("a", None, torch.arange(6.0).reshape(2, 3)), piece("b", None, torch.tensor([1.5, -2, 0, 3]))]


def block(pieces=PIECES, encoding: Encoding = EXACT, shared=None) -> np.ndarray:
    return frame(encoding, pieces, ROUND, CLIENT, UNIT, shared or zeros(), draws())


def read(block: np.ndarray, round: int = ROUND, client: int = CLIENT, unit: Unit = UNIT, encoding: Encoding = EXACT, shared=None):
    return unframe(encoding, block, round, client, unit, shared or zeros(unit), MOST_WEIGHT)


def rebuilt(change) -> np.ndarray:
    """A block whose header was changed and packed again, with a checksum that fits."""
    good = block()
    header = unpack(good[LEAD : LEAD + good[2]])
    change(header)
    return with_header(pack(header), good[LEAD + good[2] :])


def with_header(header: np.ndarray, values: np.ndarray) -> np.ndarray:
    return resealed(np.concatenate([block()[:2], np.array([len(header)], WORD), header, values]))


def resealed(block: np.ndarray, encoding: Encoding = EXACT) -> np.ndarray:
    """With a checksum that fits."""
    if len(block) >= LEAD:
        block[1] = block_checksum(encoding, block, UNIT)
    return block


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
    made = frame(EXACT, sent, 1, 2, unit, zeros(unit), draws())
    assert_same(read(made, 1, 2, unit), sent)


def test_exact_keeps_every_bit():
    values = torch.tensor([-0.0, 1e-45, 3e38, -1 / 3])
    codec = load_codec("exact", {})
    assert torch.equal(codec.decode(codec.encode(values, draws()), (4,)).view(torch.int32), values.view(torch.int32))


def test_a_transposed_view_is_sent_as_it_reads():
    view = torch.arange(6.0).reshape(3, 2).T
    assert_same(read(block([piece("a", None, view)])), [piece("a", None, view)])


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
    assert_same(read(block(sent)), sent)


@pytest.mark.parametrize("region, shape", [(np.array([], int), (0,)), ((np.array([], int), np.array([0, 1])), (0, 2))])
def test_an_empty_region_can_be_added_after_the_round_trip(region, shape):
    found = read(block([piece("a", region, torch.zeros(shape))]))
    UnitMean(UNIT).add(found)


def test_pieces_of_one_unit_may_differ_in_weight():
    sent = [piece("a", None, torch.zeros(2, 3), weight=1.0), piece("b", None, torch.zeros(4), weight=2.0)]
    assert_same(read(block(sent)), sent)


def test_no_pieces_are_an_empty_block():
    assert block([]).size == 0 and block([]).dtype == WORD


@pytest.mark.parametrize("name", CODECS)
def test_a_block_is_made_of_words(name):
    how = encoding(name)
    for client in range(12):  # headers of different lengths
        made = frame(how, [piece("a", None, torch.rand(2, 3), weight=10.0**client)], ROUND, 10**client, UNIT, zeros(), draws())
        assert made.ndim == 1 and made.dtype == WORD and made.flags.c_contiguous
        assert read(made, client=10**client, encoding=how)[0].values.shape == (2, 3)


def test_exact_sends_four_bytes_a_value_and_the_header():
    made = block()
    assert made.nbytes == 3 * 4 + 4 * int(made[2]) + 4 * (6 + 4)
    assert json.loads(made[LEAD : LEAD + made[2]].tobytes())["unit"] == 2


@pytest.mark.parametrize("name, options, share", [("exact", {}, 1e-3), ("int8", {}, 2e-3), ("int4", {}, 3e-3), ("top_k", {}, 5e-3)])
def test_what_is_no_value_is_a_small_part_of_a_block(name, options, share):
    unit, how = UnitTable(ModelSpec(6, 128, 4, 128, 2048))[4], encoding(name, **options)
    pieces = [Piece(4, tensor.name, None, torch.randn(tensor.shape), 12345.0) for tensor in unit.tensors]
    made = frame(how, pieces, 100, 63, unit, zeros(unit), draws())
    values = 4 * sum(how.codec.encoded_words(tensor.shape) for tensor in unit.tensors)
    assert 0 < made.nbytes - values < share * made.nbytes


# --- damage ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round, client, unit", [(ROUND + 1, CLIENT, 2), (ROUND, CLIENT - 1, 2), (ROUND, CLIENT, 1)])
def test_a_block_of_another_round_client_or_unit_is_refused(round, client, unit):
    with pytest.raises(WireError, match="it says round"):
        read(block(), round, client, Unit(unit, "x", UNIT.tensors))


def test_every_truncation_is_refused():
    whole = block()
    for length in range(len(whole)):
        with pytest.raises(WireError):
            read(whole[:length])
        with pytest.raises(WireError):
            read(resealed(whole[:length].copy()))


NUMBER, REGION, WEIGHT = range(3)  # entries of a piece in the header


def changed(entry: int, value):
    """The first piece (a, whole, six values) with another entry."""
    return lambda header: header["pieces"][0].__setitem__(entry, value)


def test_an_untouched_header_is_accepted():
    for change in (
        lambda header: None,
        changed(WEIGHT, 0),
        changed(REGION, [[0, 6]]),
        changed(REGION, [[0, 2], [2, 3, 0, 2]]),
    ):
        assert len(read(rebuilt(change))) == 2


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda h: h.pop("round"), id="no round"),
        pytest.param(lambda h: h.pop("pieces"), id="no pieces"),
        pytest.param(lambda h: h.update(pieces=5), id="pieces that are a number"),
        pytest.param(lambda h: h["pieces"].pop(), id="words that belong to no piece"),
        pytest.param(lambda h: h["pieces"].append(h["pieces"][0]), id="a piece without words"),
        pytest.param(lambda h: h["pieces"][0].pop(), id="a piece with an entry too few"),
        pytest.param(changed(NUMBER, 2), id="a tensor too many"),
        pytest.param(changed(NUMBER, -1), id="a tensor from the end"),
        pytest.param(changed(NUMBER, 1), id="another tensor"),
        pytest.param(changed(NUMBER, 0.0), id="a number that is not whole"),
        pytest.param(changed(NUMBER, False), id="a truth for a number"),
        pytest.param(lambda h: h.update(pieces=[h["pieces"][1]] * 2 + h["pieces"][:1]), id="a tensor twice"),
        pytest.param(changed(NUMBER, "a"), id="a name"),
        pytest.param(changed(NUMBER, []), id="a list for a tensor"),
        pytest.param(changed(WEIGHT, "heavy"), id="a weight in words"),
        pytest.param(changed(WEIGHT, None), id="no weight"),
        pytest.param(changed(WEIGHT, True), id="a truth for a weight"),
        pytest.param(changed(WEIGHT, 10**400), id="a weight beyond floats"),
        pytest.param(changed(WEIGHT, float("nan")), id="a weight that is not a number"),
        pytest.param(changed(WEIGHT, float("inf")), id="an infinite weight"),
        pytest.param(changed(WEIGHT, -1.0), id="a negative weight"),
        pytest.param(changed(REGION, [[0, 1]]), id="fewer positions than values"),
        pytest.param(changed(REGION, [[0, 5, 6, 7]]), id="a position past the end"),
        pytest.param(changed(REGION, [[-1, 5]]), id="a position before the start"),
        pytest.param(changed(REGION, [[0.5, 6]]), id="half a position"),
        pytest.param(changed(REGION, [[False, 6]]), id="truths for positions"),
        pytest.param(changed(REGION, [[0, 5, 4, 5]]), id="a position twice"),
        pytest.param(changed(REGION, [[0, 2], [2, 3, 2, 3, 1, 2]]), id="a column twice"),
        pytest.param(changed(REGION, {"x": 1}), id="a region that is a mapping"),
        pytest.param(changed(REGION, 7), id="a region that is a number"),
        pytest.param(changed(REGION, "012345"), id="a region that is a text"),
        pytest.param(changed(REGION, [[0, 2], [0, 2, 3, 4]]), id="a column past the end"),
        pytest.param(changed(REGION, [[0, 2], [0, 2]]), id="too few columns"),
        pytest.param(changed(REGION, [[0, 2], 3]), id="columns that are a number"),
        pytest.param(changed(REGION, [[0, 6, 7]]), id="a run without an end"),
        pytest.param(changed(REGION, [[0, 0, 0, 6]]), id="a run of nothing"),
        pytest.param(changed(REGION, [[0, 10**15]]), id="more positions than memory"),
        pytest.param(changed(REGION, [[0, 1], [0, 1], [0, 6]]), id="three axes"),
    ],
)
def test_a_garbled_header_is_refused(change):
    with pytest.raises(WireError):
        read(rebuilt(change))


def test_a_deeply_nested_header_is_refused():
    with pytest.raises(WireError, match="Recursion"):
        read(with_header(np.frombuffer(b"[" * 40_000, WORD), np.empty(0, WORD)))


def test_a_long_quotation_from_a_block_is_cut():
    with pytest.raises(WireError) as refusal:
        read(rebuilt(lambda header: header.update(round="x" * 10_000)))
    assert "it says round" in refusal.value.found and len(refusal.value.found) <= 200


def test_a_piece_heavier_than_the_client_may_be_is_refused():
    assert unframe(EXACT, block(), ROUND, CLIENT, UNIT, zeros(), 7.5)[0].weight == 7.5
    with pytest.raises(WireError, match="weight"):
        unframe(EXACT, block(), ROUND, CLIENT, UNIT, zeros(), 7.4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value):
    words = block()
    words[-1] = np.float32(value).view(WORD)
    with pytest.raises(WireError, match="b is not finite"):
        read(resealed(words))


def test_a_sum_of_delta_and_reference_that_overflows_is_refused():
    how, large = Encoding(deltas=True), {"a": torch.full((2, 3), 3e38), "b": torch.zeros(4)}
    sent = frame(how, [piece("a", None, torch.full((2, 3), 3e38))], ROUND, CLIENT, UNIT, zeros(), draws())
    assert read(sent, encoding=how)[0].values[0, 0] == np.float32(3e38)
    with pytest.raises(WireError, match="a is not finite"):
        read(sent, encoding=how, shared=large)


def test_random_damage_is_a_wire_error_or_a_well_formed_piece():
    """5 000 blocks with bytes or words changed, cut out or repeated, and a checksum that fits."""
    rng, refused = random.Random(1), 0
    whole = block([PIECES[0], piece("b", np.array([0, 3]), torch.tensor([1.0, 2.0]))])
    header_bytes = 4 * (LEAD + int(whole[2]))
    for _ in range(5000):
        damaged = bytearray(whole.tobytes())
        kind = rng.randrange(4)
        if kind == 0:
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(header_bytes)] = rng.randrange(256)
        elif kind == 1:
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(4 * LEAD, header_bytes)] = rng.choice(b'0123456789,:[]{}"-.eE nulltruefalse')
        elif kind == 2:
            start = 4 * rng.randrange(len(damaged) // 4)
            del damaged[start : start + 4 * rng.randint(1, 5)]
        else:
            start = 4 * rng.randrange(len(damaged) // 4)
            damaged[start : start + 4] = rng.randbytes(4 * rng.randint(1, 5))
        try:
            pieces = read(resealed(np.frombuffer(bytes(damaged), WORD).copy()))
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
            read(words)


# --- codecs, one by one --------------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 6), max_size=3).map(tuple) | st.integers(0, 3 * CHUNK_VALUES).map(lambda n: (n,))
SCALES = st.sampled_from([1e-45, 1e-38, 1e-6, 1.0, 1e30, 3e38])


def values_of(shape: tuple[int, ...], scale: float, seed: int) -> torch.Tensor:
    """Between -scale and scale, with zeros, whole rows of them, and ties."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, shape) * scale
    values = np.where(rng.random(shape) < 0.2, 0.0, values)
    if len(shape) > 1 and shape[0]:
        values[rng.integers(shape[0])] = rng.choice([0.0, scale])
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def error_bound(name: str, values: torch.Tensor, codec) -> torch.Tensor:
    """Most that each decoded value may be off."""
    magnitudes = values.abs().double()
    if name == "exact":
        return torch.zeros_like(magnitudes)
    if name == "bf16":
        return magnitudes / 128 + 2.0**-133
    if name == "top_k":  # what is left out is itself the error
        return magnitudes
    channels = magnitudes.reshape(values.shape[0] if values.ndim > 1 else 1, -1)
    step = channels.amax(1, keepdim=True) / codec.largest * 1.01 + 2e-38
    return step.expand_as(channels).reshape(values.shape)


@pytest.mark.parametrize("name, options", EVERY)
@given(shape=SHAPES, scale=SCALES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_words_are_as_many_as_promised_and_values_come_back_within_their_bound(name, options, shape, scale, seed):
    codec, values = load_codec(name, options), values_of(shape, scale, seed)
    before = values.clone()
    words = codec.encode(values, draws(seed))
    assert words.dtype == WORD and words.shape == (codec.encoded_words(shape),)
    assert torch.equal(values, before)  # what is encoded belongs to somebody else
    found = codec.decode(words, shape)
    assert found.dtype == torch.float32 and found.shape == shape and torch.isfinite(found).all()
    if values.numel():
        bound = error_bound(name, values, codec) + (1e-2 * scale if scale > 1e38 else 0)  # see PerChannel: clipped
        assert ((found.double() - values.double()).abs() <= bound).all()
    assert np.array_equal(words, codec.encode(values, draws(seed)))  # only the draws decide
    assert codec.working_bytes(shape) >= (0 if name == "exact" else words.nbytes)


@pytest.mark.parametrize("name, options", EVERY)
def test_zeros_stay_zeros_and_no_number_of_threads_changes_a_bit(name, options):
    codec, values = load_codec(name, options), torch.randn(300, 200, generator=torch.Generator().manual_seed(3))
    assert not codec.decode(codec.encode(torch.zeros(7, 9), draws()), (7, 9)).any()
    words, threads = codec.encode(values, draws()), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert np.array_equal(words, codec.encode(values, draws()))
        assert torch.equal(codec.decode(words, (300, 200)), codec.decode(words.copy(), (300, 200)))
    finally:
        torch.set_num_threads(threads)
    transposed = values.T.contiguous().T  # laid out differently, the same values
    assert np.array_equal(words, codec.encode(transposed, draws()))


def test_bytes_by_hand():
    words = {name: load_codec(name, {}).encoded_words((10, 20)) for name in CODECS}
    # 200 values: 800 bytes | 400 | 10 scales of 2 bytes, 200 | 20, 100 | 20 values of 2 bytes, 3 planes of 20 bits = 3 * 3 bytes,
    # 20 + (199 >> 3) = 44 bits of the unary part = 6 bytes: 55 bytes, 14 words
    assert words == {"exact": 200, "bf16": 100, "int8": 55, "int4": 30, "int2": 18, "top_k": 14}
    assert {name: load_codec(name, {}).encoded_words(()) for name in CODECS} == {
        "exact": 1,
        "bf16": 1,
        "int8": 1,
        "int4": 1,
        "int2": 1,
        "top_k": 1,
    }
    assert all(load_codec(name, options).encoded_words(shape) == 0 for name, options in EVERY for shape in ((0,), (3, 0), (0, 3)))


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("scale", [1e-40, 1e-3, 1e30])
def test_the_mean_of_many_draws_is_the_value(name, scale):
    """Each rounding lies within one step, so the mean of n has a standard deviation of at most step / (2 sqrt(n)). Of 300
    values the furthest may be 5 of them off: a false alarm in 1 of 5 000 tests; the seed is fixed."""
    codec, count = load_codec(name, {}), 1500
    values = values_of((3, 100), scale, 8)
    values[1] *= 1e-3
    values[1, 7] = scale  # one huge value among small ones
    total, rng = torch.zeros(3, 100, dtype=torch.float64), draws(4)
    for _ in range(count):
        total += codec.decode(codec.encode(values, rng), (3, 100)).double()
    deviation = error_bound(name, values, codec) / (2 * count**0.5)
    assert ((total / count - values.double()).abs() <= 5 * deviation + 1e-6 * values.abs()).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_each_channel_has_a_scale_of_its_own(name):
    codec = load_codec(name, {})
    values = torch.tensor([[1e-3, -1e-3, 5e-4], [1e3, 0.0, -1e3], [0.0, 0.0, 0.0], [1e-45, 0.0, 0.0]])
    found = codec.decode(codec.encode(values, draws()), (4, 3))
    assert torch.allclose(found[0, :2], values[0, :2], rtol=0.01) and torch.allclose(found[1], values[1], rtol=0.01)
    assert not found[2].any() and found[3].abs().max() < 2e-38


def by_hand(values: torch.Tensor, density: float) -> torch.Tensor:
    """The largest magnitudes by a stable sort: of equal ones the first."""
    flat, taken = values.reshape(-1), int(np.ceil(density * values.numel()))
    order = np.argsort(-flat.abs().numpy(), kind="stable")[:taken]
    found = torch.zeros_like(flat)
    found[order.copy()] = flat[order.copy()]
    return found.reshape(values.shape)


@given(
    st.sampled_from([(0,), (1,), (), (5, 7), (40, 50), (2 * CHUNK_VALUES + 3,)]),
    st.floats(1e-4, 1),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_top_k_takes_the_largest_magnitudes_and_the_first_of_equal_ones(shape, density, different, seed):
    codec = load_codec("top_k", {"density": density, "values": "fp32"})
    values = torch.from_numpy(np.random.default_rng(seed).integers(-different, different + 1, shape).astype(np.float32)).reshape(shape)
    assert torch.equal(codec.decode(codec.encode(values, draws()), shape), by_hand(values, density))


def test_top_k_in_bf16_rounds_to_the_nearest():
    codec, values = load_codec("top_k", {"density": 1.0}), torch.randn(1000)
    assert torch.equal(codec.decode(codec.encode(values, draws()), (1000,)), values.to(torch.bfloat16).float())


@pytest.mark.parametrize("name, options", [entry for entry in EVERY if entry[0] != "exact"])
def test_garbage_is_refused_or_decodes_to_finite_values(name, options):
    codec, rng, refused = load_codec(name, options), np.random.default_rng(5), 0
    for shape in ((3, 5), (11,), (40, 33)):
        for _ in range(100):
            words = rng.integers(0, 2**32, codec.encoded_words(shape), np.uint32)
            try:
                assert torch.isfinite(codec.decode(words, shape)).all()
            except ValueError:
                refused += 1
    assert refused > (10 if name == "bf16" else 100)


GARBAGE = {
    "bf16: infinite": ("bf16", {}, (2,), [0x00007F80]),
    "bf16: padding": ("bf16", {}, (1,), [0x00010000]),
    "int8: a scale that is no number": ("int8", {}, (1,), [0x00007FC0]),
    "int8: a negative scale": ("int8", {}, (1,), [0x0000BF80]),
    "int8: no scale": ("int8", {}, (1,), [0]),
    "int8: a scale too large": ("int8", {}, (1,), [0x00007F00]),
    "int8: -128": ("int8", {}, (1,), [0x00803F80]),
    "int8: padding": ("int8", {}, (1,), [0x01003F80]),
    "int4: -8": ("int4", {}, (1,), [0x00083F80]),
    "int4: half a byte of padding": ("int4", {}, (1,), [0x00103F80]),
    "int2: -2": ("int2", {}, (1,), [0x00023F80]),
    "int2: a quarter of a byte of padding": ("int2", {}, (1,), [0x00043F80]),
    "top_k: no position": ("top_k", {"density": 0.5}, (2,), [0x00003F80]),
    "top_k: two positions for one": ("top_k", {"density": 0.5}, (2,), [0x03003F80]),
    "top_k: an infinite value": ("top_k", {"density": 0.5}, (2,), [0x01007F80]),
    "top_k: outside": ("top_k", {"density": 0.3}, (3,), [0x02013F80]),
    "top_k: padding": ("top_k", {"density": 0.5}, (2,), [0x41003F80]),
}


@pytest.mark.parametrize("name, options, shape, words", GARBAGE.values(), ids=GARBAGE)
def test_what_no_encoder_writes_is_refused(name, options, shape, words):
    codec = load_codec(name, options)
    assert len(words) == codec.encoded_words(shape)
    with pytest.raises(ValueError):
        codec.decode(np.array(words, WORD), shape)


def test_damaged_values_of_a_block_are_a_wire_error():
    how = encoding("int8")
    made = block(encoding=how)
    made[LEAD + int(made[2])] = 0  # the scales of both rows
    resealed(made, how)
    with pytest.raises(WireError, match="a scale is out of range"):
        read(made, encoding=how)


# --- what is asked for ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, text",
    [
        ({"codec": "int9"}, "known codecs are bf16, exact, int2, int4, int8, top_k"),
        ({"codec": "base"}, "known codecs"),
        ({"codec": "../x"}, "known codecs"),
        ({"codec": "int8", "codec_options": {"density": 0.1}}, "unknown"),
        ({"codec": "top_k", "codec_options": {"densty": 0.1}}, "did you mean 'density'"),
        ({"codec": "top_k", "codec_options": {"density": 0}}, "above 0"),
        ({"codec": "top_k", "codec_options": {"density": 1.5}}, "at most 1"),
        ({"codec": "top_k", "codec_options": {"values": "int8"}}, "fp32, bf16"),
        ({"codec": "top_k", "deltas": "off"}, "set transport.deltas"),
        ({"codec": "int8", "deltas": "off", "error_feedback": "on"}, "set transport.deltas"),
        ({"codec": "exact", "error_feedback": "on"}, "it loses nothing"),
        ({"codec": "exact", "deltas": "on", "error_feedback": "on"}, "it loses nothing"),
    ],
)
def test_what_cannot_be_is_refused(config, text):
    with pytest.raises(ConfigError, match="transport") as refusal:
        encoding_of(TransportConfig(**config))
    assert text in str(refusal.value)


@pytest.mark.parametrize(
    "config, deltas, feedback",
    [
        ({}, False, False),
        ({"deltas": "on"}, True, False),
        ({"codec": "int4"}, True, False),
        ({"codec": "int4", "deltas": "off"}, False, False),
        ({"codec": "int4", "error_feedback": "on"}, True, True),
        ({"codec": "top_k"}, True, True),
        ({"codec": "top_k", "error_feedback": "off"}, True, False),
    ],
)
def test_what_is_left_to_auto(config, deltas, feedback):
    found = encoding_of(TransportConfig(**config))
    assert (found.deltas, found.error_feedback) == (deltas, feedback)
    assert found == encoding_of(TransportConfig(**config)) and hash(found) == hash(encoding_of(TransportConfig(**config)))


def test_codecs_are_equal_by_class_and_options():
    assert load_codec("int8", {}) == load_codec("int8", {}) != load_codec("int4", {})
    assert load_codec("top_k", {}) != load_codec("top_k", {"density": 0.2}) and load_codec("exact", {}).options == NoOptions()


# --- deltas and error feedback -------------------------------------------------------------------------------------------------------


def shared_of(unit: Unit, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {tensor.name: torch.randn(tensor.shape, generator=generator) for tensor in unit.tensors}


REGIONS = {"whole": None, "rows and columns": (np.array([1, 0]), np.array([0, 2])), "flat": np.array([5, 0, 2])}


def part(tensor: torch.Tensor, region) -> torch.Tensor:
    return tensor if region is None else tensor.view(-1)[region] if isinstance(region, np.ndarray) else tensor[region[0]][:, region[1]]


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("name", CODECS)
def test_what_did_not_change_comes_back_as_it_was(name, region):
    how, shared = replaced(encoding(name), deltas=True), shared_of(UNIT, 1)
    sent = piece("a", region, part(shared["a"], region).clone())
    made = frame(how, [sent], ROUND, CLIENT, UNIT, shared, draws())
    assert_same(read(made, encoding=how, shared=shared), [sent])


@pytest.mark.parametrize("name", LOSSY)
def test_with_deltas_the_change_is_coded_not_the_weights(name):
    how, shared = encoding(name), shared_of(UNIT, 1)
    sent = piece("a", None, shared["a"] + 1e-4 * torch.randn(2, 3, generator=torch.Generator().manual_seed(2)))
    with_deltas = read(block([sent], how, shared), encoding=how, shared=shared)[0].values
    assert (with_deltas - sent.values).abs().max() < 4e-4
    assert (with_deltas - sent.values).abs().max() > 0


def replaced(how: Encoding, **changes) -> Encoding:
    return Encoding(**{"codec": how.codec, "deltas": how.deltas, "error_feedback": how.error_feedback} | changes)


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("name, options", [entry for entry in EVERY if entry[0] != "exact"])
def test_all_that_was_sent_and_the_residual_are_all_that_changed(name, options, region):
    how = replaced(encoding(name, **options), error_feedback=True)
    shared, rng = shared_of(UNIT, 1), draws()
    residuals = zeros() | {"a": torch.zeros_like(part(shared["a"], region))}
    changed, received = torch.zeros_like(part(shared["a"], region)), torch.zeros_like(part(shared["a"], region))
    for round in range(20):
        delta = 0.01 * torch.randn(changed.shape, generator=torch.Generator().manual_seed(round))
        changed += delta
        sent = piece("a", region, part(shared["a"], region) + delta)
        made = frame(how, [sent], round, CLIENT, UNIT, shared, rng, residuals)
        found = read(made, round, encoding=how, shared=shared)[0].values
        received += found - part(shared["a"], region)
    assert torch.allclose(received + residuals["a"], changed, atol=2e-5)
    assert (residuals["a"].any() or options.get("density") == 1.0) and not residuals["b"].any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_finite_is_not_sent(name, value):
    with pytest.raises(NotFinite, match="a is not finite"):
        block([piece("a", None, torch.full((2, 3), value))], encoding(name))


def test_working_memory_and_uploads_by_hand():
    table = UnitTable(ModelSpec(2, 4, 2, 3, 5))  # a block: 976 bytes, head 112, largest tensors 4 * 64 = 256 and 4 * 20 = 80
    window = Window(2, 4)
    exact, deltas = Encoding(), Encoding(deltas=True)
    assert exact.upload_bytes(table, window) == exact.sending_bytes(table, window) == 976 + 112
    assert deltas.sending_bytes(table, window) == max(976 + 256, 976 + 112 + 80)
    assert exact.residual_bytes(table, window) == 0 and encoding("top_k").residual_bytes(table, window) == 976 + 112
    # qkv 12x4, proj 4x4, fc1 16x4, fc2 4x16: 36 scales and 192 bytes; 8 vectors of 4 4 4 4 12 4 16 4: a scale each
    words = [(12 * 2 + 48) // 4, (4 * 2 + 16) // 4, (16 * 2 + 64) // 4, (4 * 2 + 64) // 4] + [2, 2, 2, 2, 4, 2, 5, 2]
    assert encoding("int8").upload_bytes(table, Window(2, 3)) == 4 * sum(words)
