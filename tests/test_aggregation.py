"""The streaming mean against a dense computation: whole tensors, rows x columns, flat positions, and mixtures."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distfl.aggregation import UnitMean
from distfl.messages import Piece
from distfl.units import TensorSpec, Unit

ROWS, COLUMNS = 3, 4
UNIT = Unit(1, "block.0", (TensorSpec("a", (ROWS, COLUMNS), 0), TensorSpec("b", (2,), 12)))


def whole(values, weight: float = 1.0, name: str = "a") -> Piece:
    return Piece(1, name, None, torch.as_tensor(values, dtype=torch.float32), weight)


def part(region, values, weight: float = 1.0) -> Piece:
    arrays = tuple(np.array(r, int) for r in region) if isinstance(region, tuple) else np.array(region, int)
    return Piece(1, "a", arrays, torch.tensor(values, dtype=torch.float32), weight)


def mean_of(*pieces: Piece, old=None, round_weight: float | None = None, name: str = "a"):
    """Mean and share; each piece from a client of its own."""
    unit_mean = UnitMean(UNIT)
    for piece in pieces:
        unit_mean.add([piece])
    old = torch.zeros(ROWS, COLUMNS) if old is None else old
    return unit_mean.mean(name, old, sum(piece.weight for piece in pieces) if round_weight is None else round_weight)


def test_whole_tensors_are_averaged_by_weight():
    mean, share = mean_of(whole([1.0, 5.0], 1, "b"), whole([4.0, 2.0], 2, "b"), old=torch.zeros(2), round_weight=4, name="b")
    assert mean.tolist() == [3.0, 3.0]  # (1 + 2*4) / 3, (5 + 2*2) / 3
    assert share.shape == () and share.item() == 0.75  # 3 of 4


def test_rows_and_columns_are_averaged_where_they_overlap():
    # Client 0 sends rows 0, 2 x columns 1, 3; client 1 (weight 3) sends row 2 x columns 0, 1. They meet at (2, 1): (30 + 3*2) / 4 = 9.
    old = torch.full((3, 4), -1.0)
    mean, share = mean_of(part(([0, 2], [1, 3]), [[10, 20], [30, 40]]), part(([2], [0, 1]), [[1, 2]], 3.0), old=old)
    assert mean.tolist() == [[-1, 10, -1, 20], [-1, -1, -1, -1], [1, 9, -1, 40]]
    assert share.tolist() == [[0, 0.25, 0, 0.25], [0, 0, 0, 0], [0.75, 1, 0, 0.25]]


def test_flat_positions_count_along_rows():
    mean, share = mean_of(part([1, 4, 11], [7, 8, 9]), round_weight=2.0, old=torch.full((3, 4), 5.0))
    assert mean.tolist() == [[5, 7, 5, 5], [8, 5, 5, 5], [5, 5, 5, 9]]
    assert share.flatten().nonzero().flatten().tolist() == [1, 4, 11] and share.max() == 0.5


def test_nobody_sent_it_so_it_stays():
    old = torch.randn(ROWS, COLUMNS)
    mean, share = UnitMean(UNIT).mean("a", old, 1.0)
    assert torch.equal(mean, old) and share.item() == 0
    mean += 1
    assert not torch.equal(mean, old)  # a copy


finite = st.floats(-1e6, 1e6, width=32)
weight = st.integers(1, 50).map(float) | st.floats(1e-3, 1e3)


@st.composite
def pieces(draw) -> Piece:
    kind = draw(st.sampled_from(["whole", "grid", "flat"]))
    if kind == "whole":
        region, shape = None, (ROWS, COLUMNS)
    elif kind == "grid":
        rows = draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True))
        columns = draw(st.lists(st.integers(0, COLUMNS - 1), min_size=1, max_size=COLUMNS, unique=True))
        region, shape = (np.array(rows), np.array(columns)), (len(rows), len(columns))
    else:
        positions = draw(st.lists(st.integers(0, ROWS * COLUMNS - 1), min_size=1, max_size=ROWS * COLUMNS, unique=True))
        region, shape = np.array(positions), (len(positions),)
    count = int(np.prod(shape))
    values = draw(st.lists(finite, min_size=count, max_size=count))
    return Piece(1, "a", region, torch.tensor(values, dtype=torch.float32).reshape(shape), draw(weight))


def dense(sent: list[Piece], old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of weighted values and of weights behind every element, one element at a time."""
    total, behind = np.zeros((ROWS, COLUMNS)), np.zeros((ROWS, COLUMNS))
    for piece in sent:
        values = piece.values.numpy().astype(np.float64)
        for i in range(ROWS):
            for j in range(COLUMNS):
                if piece.region is None:
                    found = values[i, j]
                elif isinstance(piece.region, tuple):
                    if i not in piece.region[0] or j not in piece.region[1]:
                        continue
                    found = values[list(piece.region[0]).index(i), list(piece.region[1]).index(j)]
                elif i * COLUMNS + j in piece.region:
                    found = values[list(piece.region).index(i * COLUMNS + j)]
                else:
                    continue
                total[i, j] += piece.weight * found
                behind[i, j] += piece.weight
    return np.where(behind > 0, total / np.where(behind > 0, behind, 1), old), behind


@given(st.lists(pieces(), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_mixture_of_pieces_equals_the_dense_computation(sent):
    old = torch.arange(12.0).reshape(ROWS, COLUMNS) - 5
    round_weight = sum(piece.weight for piece in sent) + 1
    mean, share = mean_of(*sent, old=old, round_weight=round_weight)
    expected, behind = dense(sent, old.numpy())
    scale = max(float(piece.values.abs().max()) for piece in sent)
    np.testing.assert_allclose(mean.numpy(), expected, rtol=2e-7, atol=1e-12 * scale)
    np.testing.assert_allclose(np.broadcast_to(share.numpy(), (ROWS, COLUMNS)), behind / round_weight, rtol=2e-7)
    assert mean.dtype == torch.float32


any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(any_float32, min_size=12, max_size=12), st.lists(weight, min_size=1, max_size=8), st.data())
@settings(max_examples=150, deadline=None)
def test_the_mean_of_equal_values_is_that_value_bit_for_bit(values, client_weights, data):
    value = torch.tensor(values, dtype=torch.float32).reshape(ROWS, COLUMNS)
    sent = []
    for number in client_weights:
        if data.draw(st.booleans()):
            sent.append(whole(value, number))
        else:
            sent.append(Piece(1, "a", (np.arange(ROWS), np.array([2, 0])), value[:, [2, 0]], number))
    mean, _ = mean_of(*sent, old=value)
    assert torch.equal(mean, value)


def test_a_different_order_of_exact_sums_gives_the_same_bits():
    one, two, three = (whole(torch.full((3, 4), v), w) for v, w in ((0.5, 1), (0.25, 2), (3.0, 5)))
    assert torch.equal(mean_of(one, two, three)[0], mean_of(three, one, two)[0])


def test_sums_do_not_lose_small_values_beside_large_ones():
    # In float32 1 + 2^24 = 2^24; the float64 sum keeps it: (2^24 + 1 - 2^24) / 3 = 1/3.
    mean, _ = mean_of(whole(torch.full((3, 4), 2.0**24)), whole(torch.ones(3, 4)), whole(torch.full((3, 4), -(2.0**24))))
    assert torch.equal(mean, torch.full((3, 4), 1 / 3))


def test_no_weight_at_all_keeps_the_old_value():
    old = torch.ones(ROWS, COLUMNS)
    assert torch.equal(mean_of(whole(torch.zeros(3, 4), 0.0), old=old, round_weight=1.0)[0], old)
