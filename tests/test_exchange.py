"""Updates from client ranks to the server: gather and reduce against each other, on any number of ranks."""

import weakref
from dataclasses import replace
from threading import BrokenBarrierError
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from distfl import exchange
from distfl.aggregation import LARGEST_FIXED
from distfl.errors import NotFinite, WireError
from distfl.exchange import Gather, Reduce, choose, order_in_tree, tree
from distfl.fleet import waves_of
from distfl.hosting import NOTHING
from distfl.messages import Assignment, ClientReport, Piece
from distfl.recipes import Recipe
from distfl.transport.base import WORD, Arrived
from distfl.transport.local import LocalTransport
from distfl.units import TensorSpec, Unit, Window


class Units(list):
    """A table, all of whose units train."""

    trainable = property(lambda self: self)


TABLE = Units(
    [
        Unit(0, "embedding", (TensorSpec("e", (2, 2), 0),)),
        Unit(1, "block.0", (TensorSpec("a", (3, 4), 0), TensorSpec("b", (2,), 12))),
        Unit(2, "head", (TensorSpec("h", (5,), 0),)),
    ]
)
OLD = {"e": torch.full((2, 2), 0.1), "a": torch.arange(12.0).view(3, 4), "b": torch.tensor([0.3, -0.7]), "h": torch.zeros(5)}
METHOD = SimpleNamespace(
    restore=lambda pieces, assignment: pieces, mean_unit=lambda unit: unit, lifted=lambda unit, shared: shared
)  # means are taken of the shared tensors


@pytest.fixture(autouse=True)
def decoding(monkeypatch):
    """A block is the client's number, and a word that is not zero where it is garbled; what it sent of a unit stands in the state."""

    def decode(state, block: np.ndarray, assignment: Assignment, unit: Unit) -> list[Piece]:
        if block[1]:
            raise WireError(f"unit {unit.index} of client {assignment.client}", "garbled", "")
        return state.sent[int(block[0])][unit.index]

    monkeypatch.setattr(exchange, "decode_update", decode)
    monkeypatch.setattr(exchange, "check_update", decode)


def order(client: int, weight: float) -> Assignment:
    return Assignment(1, client, Window(1, 3), weight, 10**6, 0, 60, 0, Recipe(1), 1e-3)


def run(kind, sums: str, ranks: int, weights: list[float], sent: list[dict[int, list[Piece]]]) -> dict[str, tuple]:
    """One round on server and ``ranks`` client ranks. Returns tensor's name -> (mean, share) of what the server got."""
    waves = waves_of(len(sent), ranks)

    def rank(transport):
        state = SimpleNamespace(
            transport=transport,
            table=TABLE,
            sent=sent,
            method=METHOD,
            config=SimpleNamespace(transport=SimpleNamespace(sums=sums)),
            replica=SimpleNamespace(tensors=OLD),
        )
        mine, found = kind(state, sum(weights)), {}
        for number, wave in enumerate(waves):
            if transport.rank == 0:
                messages = transport.gather(None, "reports")[1 : 1 + len(wave)]
                hosted = [order(client, weights[client]) for client in wave]
                by_element = {unit for _, units in messages for unit in units}
                for unit, mean_of in mine.take(hosted, [words for words, _ in messages], by_element, number == len(waves) - 1):
                    found |= {
                        tensor.name: tuple(part.clone() for part in mean_of(tensor.name, OLD[tensor.name])) for tensor in unit.tensors
                    }
                continue
            blocks = [NOTHING] * len(TABLE)
            if transport.rank <= len(wave):
                client = wave[transport.rank - 1]
                blocks = [np.array([client, 0], WORD) if sent[client].get(unit.index) else NOTHING for unit in TABLE]
                mine.keep(order(client, weights[client]), blocks)
            transport.gather([[len(block) for block in blocks], mine.by_element()], "reports")
            mine.give(blocks)
        if transport.rank:
            mine.close()
        return found

    return on_ranks(ranks + 1, rank)[0]


value = st.floats(-100, 100, width=32)


@st.composite
def update(draw, weight: float) -> dict[int, list[Piece]]:
    """What one client sends: whole units from some unit on, now and then only some rows of a tensor, or nothing at all."""

    def values(*shape: int) -> torch.Tensor:
        count = int(np.prod(shape))
        return torch.tensor(draw(st.lists(value, min_size=count, max_size=count)), dtype=torch.float32).view(shape)

    pieces: dict[int, list[Piece]] = {}
    for unit in TABLE[draw(st.integers(0, 3)) :]:
        pieces[unit.index] = [Piece(unit.index, t.name, None, values(*t.shape), weight) for t in unit.tensors]
        if unit.index == 1 and draw(st.booleans()):
            pieces[1][0] = Piece(1, "a", (np.array([0, 2]), np.array([1, 3])), values(2, 2), weight)
    return pieces


@st.composite
def rounds(draw) -> tuple[list[float], list[dict[int, list[Piece]]]]:
    weights = draw(st.lists(st.integers(1, 40).map(float), min_size=1, max_size=7))
    return weights, [draw(update(weight)) for weight in weights]


@given(rounds(), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_fixed_sums_are_the_same_bits_on_any_number_of_ranks_and_close_to_those_in_client_order(drawn, ranks, others):
    weights, sent = drawn
    gathered = run(Gather, "fixed", ranks, weights, sent)
    reduced, elsewhere = (run(Reduce, "fixed", number, weights, sent) for number in (ranks, others))
    assert reduced.keys() == elsewhere.keys() == gathered.keys()
    for name, (mean, share) in reduced.items():
        assert torch.equal(mean, elsewhere[name][0]) and torch.equal(share, elsewhere[name][1])
        np.testing.assert_allclose(mean, gathered[name][0], rtol=2**-23, atol=1e-11)
        np.testing.assert_allclose(share, gathered[name][1].expand_as(share), rtol=1e-6)


@given(rounds(), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_gathered_means_are_the_same_bits_on_any_number_of_ranks(drawn, ranks, others):
    here, there = (run(Gather, "fixed", number, *drawn) for number in (ranks, others))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name][0], there[name][0]) and torch.equal(here[name][1], there[name][1]) for name in here)


@given(rounds(), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_float_sums_are_close(drawn, ranks):
    gathered, reduced = (run(kind, "float", ranks, *drawn) for kind in (Gather, Reduce))
    for name, (mean, share) in reduced.items():
        np.testing.assert_allclose(mean, gathered[name][0], rtol=1e-5, atol=2e-4)  # 7 changes of up to 100, of small shares
        np.testing.assert_allclose(share, gathered[name][1].expand_as(share), rtol=1e-6)


@pytest.mark.parametrize("kind", [Gather, Reduce])
def test_units_that_nobody_trained_do_not_come(kind):
    sent = [{}, {2: [Piece(2, "h", None, torch.arange(5.0), 3.0)]}, {}]
    found = run(kind, "fixed", 2, [1.0, 3.0, 4.0], sent)
    assert found.keys() == {"h"}
    assert found["h"][0].tolist() == [0, 1, 2, 3, 4] and float(found["h"][1]) == 3 / 8
    assert run(kind, "fixed", 2, [1.0], [{}]) == {}


@pytest.mark.parametrize("kind, sums", [(Gather, "fixed"), (Reduce, "fixed"), (Reduce, "float")])
def test_equal_updates_merge_to_that_update(kind, sums):
    weights = [37.0, 11.0, 53.0]
    values = torch.randn(12, generator=torch.Generator().manual_seed(1)).view(3, 4)
    sent = [{1: [Piece(1, "a", None, values, weight), Piece(1, "b", None, OLD["b"], weight)]} for weight in weights]
    found = run(kind, sums, 2, weights, sent)
    assert torch.equal(found["b"][0], OLD["b"])  # nobody changed it
    if sums == "fixed":
        assert torch.equal(found["a"][0], values)
    np.testing.assert_allclose(found["a"][0], values, rtol=2e-6, atol=1e-6)  # float32 of changes of up to 12


@given(st.integers(0, 8), st.integers(1, 3))
def test_no_more_transfers_are_under_way_than_there_may_be_and_what_came_is_let_go(count, at_most):
    class Buffer:
        pass

    started, alive = [], []

    def start(item):
        assert sum(ref() is not None for ref in alive) < at_most
        started.append(item)
        buffer = Buffer()
        alive.append(weakref.ref(buffer))
        return Arrived(buffer)

    landed = []
    with mock.patch.object(exchange, "UNITS_UNDER_WAY", at_most):
        for item, buffer, others in exchange._pipelined(range(count), start):
            assert len(started) == min(count, item + at_most) and len(others) == len(started) - item - 1
            landed.append(item)
            del buffer
    assert landed == list(range(count))


@pytest.mark.parametrize("bad", [-LARGEST_FIXED, LARGEST_FIXED, float("nan"), float("inf")])
def test_a_value_too_large_for_fixed_point_is_refused_with_nothing_kept(bad):
    state = SimpleNamespace(
        table=TABLE,
        sent=[{1: [Piece(1, "b", None, torch.ones(2), 1.0)], 2: [Piece(2, "h", None, torch.tensor([0, 1, bad, 2, 3]), 1.0)]}],
        method=METHOD,
        config=SimpleNamespace(transport=SimpleNamespace(sums="fixed")),
    )
    mine = Reduce(state, 1.0)
    with pytest.raises(NotFinite, match="fixed point"):
        mine.keep(order(0, 1.0), [NOTHING, np.zeros(2, WORD), np.zeros(2, WORD)])
    assert mine._means == {}


# --- bad messages --------------------------------------------------------------------------------------------------------------------


def whole(client: int, *units: int) -> dict[int, list[Piece]]:
    """A client's update: every value its number, weight 1."""
    return {
        unit: [Piece(unit, tensor.name, None, torch.full(tensor.shape, float(client)), 1.0) for tensor in TABLE[unit].tensors]
        for unit in units
    }


def state_of(sent: list[dict[int, list[Piece]]], **more) -> SimpleNamespace:
    config = SimpleNamespace(transport=SimpleNamespace(sums="fixed"))
    return SimpleNamespace(table=TABLE, sent=sent, method=METHOD, config=config, replica=SimpleNamespace(tensors=OLD), **more)


REPORT = ClientReport(1, 1, True, None, "", 1, 4, 0.5, 10**6, 0, 9, 60, 62, 0, 0, 0.1)


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("waves", [[[0, 1, 2]], [[0, 1], [2]]], ids=["one wave", "two"])
def test_from_a_garbled_block_on_a_client_is_left_out_and_named(bad, waves):
    class Server:
        size = 4

        def start_gather(self, block, purpose, words, room):
            unit = next(units)
            of_wave = [np.array([client, (client, unit) == (1, bad)], WORD) for client in wave]
            return Arrived([NOTHING, *of_wave])

    sent = [whole(client, 0, 1, 2) for client in range(3)]
    mine, found = Gather(state_of(sent, transport=Server()), 3.0), {}
    for wave in waves:
        units = iter(range(3))
        hosted = [order(client, 1.0) for client in wave]
        for unit, mean_of in mine.take(hosted, [[2, 2, 2]] * len(wave), set(), wave is waves[-1]):
            found[unit.index] = [mean_of(tensor.name, OLD[tensor.name]) for tensor in unit.tensors]
    assert found.keys() == {0, 1, 2}
    for unit, merged in found.items():
        values, share = (1.0, 1.0) if unit < bad else (1.0, np.float32(2 / 3))  # (0 + 1 + 2) / 3, or (0 + 2) / 2
        assert all((mean == values).all() and float(part) == share for mean, part in merged)
    assert [mine.took(1, unit) for unit in range(3)] == [unit < bad for unit in range(3)]
    assert all(mine.took(client, unit) for client in (0, 2) for unit in range(3))
    judged = mine.judged(REPORT)
    assert judged == replace(REPORT, ok=False, cause="bad_message", reason=f"unit {bad} of client 1: garbled")
    other = replace(REPORT, client=2)
    assert mine.judged(other) == other


def test_a_unit_whose_only_block_is_garbled_stays_as_it_was():
    class Server:
        size = 2

        def start_gather(self, block, purpose, words, room):
            return Arrived([NOTHING, np.array([0, 1], WORD) if words[1] else NOTHING])

    mine = Gather(state_of([whole(0, 2)], transport=Server()), 1.0)
    assert list(mine.take([order(0, 1.0)], [[0, 0, 2]], set(), True)) == [] and not mine.took(0, 2)


@pytest.mark.parametrize("kind", [Gather, Reduce])
def test_one_garbled_block_on_the_client_rank_keeps_all_of_them_out(kind):
    mine = kind(state_of([whole(0, 1, 2)]), 1.0)
    with pytest.raises(WireError):
        mine.keep(order(0, 1.0), [NOTHING, np.zeros(2, WORD), np.array([0, 1], WORD)])
    assert mine._means == {}


@pytest.mark.parametrize("purpose", ["sums", "means"])
def test_garbled_sums_and_means_end_the_job_by_name(monkeypatch, purpose):
    plain = LocalTransport.start_send

    def start_send(self, array, destination, of):
        if of == purpose:
            array = array.copy()
            array[0] ^= 1
        return plain(self, array, destination, of)

    def unseal(*arguments):
        try:
            return exchange_unseal(*arguments)
        except WireError as error:
            errors.append(error)
            raise

    errors, exchange_unseal = [], exchange.unseal
    monkeypatch.setattr(exchange, "unseal", unseal)
    monkeypatch.setattr(LocalTransport, "start_send", start_send)
    with pytest.raises((WireError, BrokenBarrierError)):  # of the rank that saw it, or of one that waited for that rank
        run(Reduce, "fixed", 2, [1.0, 1.0], [whole(client, 2) for client in range(2)])
    assert len(errors) == 1 and "sums or means of unit 2" in str(errors[0])


@given(st.lists(st.integers(1, 64), min_size=1, max_size=64, unique=True).map(sorted), st.integers(0, 30))
def test_the_tree_has_one_root_and_is_no_higher_than_it_must_be(ranks, unit):
    parents = {rank: tree(ranks, rank, unit)[0] for rank in ranks}
    root = order_in_tree(ranks, unit)[0]
    assert [rank for rank, parent in parents.items() if parent == 0] == [root]
    for rank in ranks:
        children = tree(ranks, rank, unit)[1]
        assert sorted(children) == sorted(other for other, parent in parents.items() if parent == rank)
        height, at = 0, rank
        while at != root:
            at, height = parents[at], height + 1
        assert height <= (len(ranks) - 1).bit_length()


def test_every_unit_has_another_root():
    assert [order_in_tree([2, 5, 9], unit)[0] for unit in range(4)] == [2, 5, 9, 2]


def test_auto_takes_what_moves_less_and_says_why():
    def planned(clients: int, bytes_: int) -> list[Assignment]:
        return [Assignment(1, client, Window(1, 3), 1.0, 1, 0, bytes_, 0, Recipe(1), 1e-3) for client in range(clients)]

    trained = TABLE[1].bytes + TABLE[2].bytes  # 76
    of_units = [unit.bytes for unit in TABLE]
    assert choose(planned(2, trained), of_units)[0] == "gather"
    collective, reason = choose(planned(3, trained), of_units)
    assert collective == "reduce" and "gather" in reason and "reduce" in reason
    assert choose(planned(7, trained // 4), of_units)[0] == "gather"  # a codec that writes a quarter
