"""The local transport: every verb's value and bytes, alone and among three threads."""

import threading
import time

import numpy as np
import pytest
from helpers import on_ranks

from distfl.transport.base import WORD, Ledger, pack, unpack
from distfl.transport.local import group

SIZES = [1, 3]


@pytest.mark.parametrize("value", [None, True, 0, -1.5, "", "ä", [], {"a": [1, None]}, "x" * 1001])
def test_a_value_comes_back_from_its_words(value):
    words = pack(value)
    assert words.dtype == WORD and unpack(words) == value


@pytest.mark.parametrize("size", SIZES)
def test_broadcast_fills_every_array_with_that_of_rank_0(size):
    def work(transport):
        array = np.full((2, 3), float(transport.rank + 7), np.float32)
        transport.broadcast(array)
        return array.tolist(), transport.ledger.take()

    found = on_ranks(size, work)
    assert all(array == [[7.0] * 3] * 2 for array, _ in found)
    assert found[0][1] == {"sent": {"broadcast": 24}, "received": {}}
    assert all(ledger == {"sent": {}, "received": {"broadcast": 24}} for _, ledger in found[1:])


@pytest.mark.parametrize("size", SIZES)
def test_broadcast_value_gives_everybody_the_value_of_rank_0(size):
    def work(transport):
        return transport.broadcast_value({"round": 3} if transport.rank == 0 else "ignored"), transport.ledger.take()

    found = on_ranks(size, work)
    assert [value for value, _ in found] == [{"round": 3}] * size
    assert found[0][1] == {"sent": {"broadcast_value": 12}, "received": {}}  # {"round":3} is 11 letters: 3 words
    assert all(ledger == {"sent": {}, "received": {"broadcast_value": 12}} for _, ledger in found[1:])


@pytest.mark.parametrize("size", SIZES)
def test_scatter_gives_everybody_their_own(size):
    def work(transport):
        values = ["a" * 6 * rank for rank in range(transport.size)] if transport.rank == 0 else None
        return transport.scatter(values), transport.ledger.take()

    found = on_ranks(size, work)
    assert [value for value, _ in found] == ["a" * 6 * rank for rank in range(size)]
    received = [0, 8, 16]  # "" is rank 0's own; 6 letters in quotes are 2 words, 12 are 14 letters: 4 words
    assert found[0][1] == {"sent": {"scatter": sum(received[1:size])} if size > 1 else {}, "received": {}}
    assert all(found[rank][1] == {"sent": {}, "received": {"scatter": received[rank]}} for rank in range(1, size))


@pytest.mark.parametrize("size", SIZES)
def test_gather_brings_all_values_to_rank_0_in_order(size):
    def work(transport):
        return transport.gather({"rank": transport.rank}), transport.ledger.take()

    found = on_ranks(size, work)
    assert [values for values, _ in found] == [[{"rank": rank} for rank in range(size)]] + [None] * (size - 1)
    assert found[0][1] == {"sent": {}, "received": {"gather": 12 * (size - 1)} if size > 1 else {}}
    assert all(ledger == {"sent": {"gather": 12}, "received": {}} for _, ledger in found[1:])


@pytest.mark.parametrize("size", SIZES)
def test_gather_blocks_takes_any_length(size):
    lengths = [2, 0, 5]

    def work(transport):
        block = np.full(lengths[transport.rank], transport.rank + 1, WORD)
        blocks = transport.gather_blocks(block)
        block[...] = 99  # what was handed over is not looked at again
        return blocks, transport.ledger.take()

    found = on_ranks(size, work)
    assert [block.tolist() for block in found[0][0]] == [[1, 1], [], [3] * 5][:size]
    assert found[0][1]["received"] == ({"gather_blocks": 20} if size > 1 else {})
    assert [blocks for blocks, _ in found[1:]] == [None] * (size - 1)
    assert [ledger["sent"].get("gather_blocks", 0) for _, ledger in found[1:]] == [0, 20][: size - 1]


@pytest.mark.parametrize("size", SIZES)
def test_sum_replaces_every_array_by_the_sum(size):
    def work(transport):
        array = np.array([1, 10 * transport.rank], np.float32)
        transport.sum(array)
        return array, transport.ledger.take()

    found = on_ranks(size, work)
    assert all(array.tolist() == [size, sum(10 * rank for rank in range(size))] and array.dtype == np.float32 for array, _ in found)
    assert all(ledger == {"sent": {"sum": 8}, "received": {"sum": 8}} for _, ledger in found)


def test_many_verbs_in_a_row_do_not_mix():
    def work(transport):
        seen = []
        for i in range(50):
            values = [[i, rank] for rank in range(transport.size)] if transport.rank == 0 else None
            seen.append((transport.broadcast_value(i), transport.scatter(values), transport.gather([i, transport.rank])))
        return seen

    found = on_ranks(3, work)
    for rank, seen in enumerate(found):
        everybody = [None, [[i, r] for i in range(50) for r in range(3)]][rank == 0]
        assert [(i, mine) for i, mine, _ in seen] == [(i, [i, rank]) for i in range(50)]
        assert everybody is None or [value for _, _, values in seen for value in values] == everybody


def test_the_ledger_starts_again_after_it_was_taken():
    ledger = Ledger()
    ledger.add("a", sent=3)
    ledger.add("a", sent=4, received=5)
    assert ledger.take() == {"sent": {"a": 7}, "received": {"a": 5}}
    assert ledger.take() == {"sent": {}, "received": {}}


def test_abort_wakes_the_others():
    ended: dict[int, BaseException] = {}

    def rank(transport):
        try:
            if transport.rank == 1:
                time.sleep(0.05)
                transport.abort(3)
            transport.broadcast_value(1)
        except BaseException as error:
            ended[transport.rank] = error

    threads = [threading.Thread(target=rank, args=(transport,), daemon=True) for transport in group(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert isinstance(ended[1], SystemExit) and ended[1].code == 3
    assert isinstance(ended[0], threading.BrokenBarrierError) and isinstance(ended[2], threading.BrokenBarrierError)
