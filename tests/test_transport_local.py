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
        transport.broadcast([array], "units")
        return array.tolist(), transport.ledger.take()

    found = on_ranks(size, work)
    assert all(array == [[7.0] * 3] * 2 for array, _ in found)
    assert found[0][1] == {"sent": {"units": 24}, "received": {}}
    assert all(ledger == {"sent": {}, "received": {"units": 24}} for _, ledger in found[1:])


@pytest.mark.parametrize("size", SIZES)
def test_broadcast_value_gives_everybody_the_value_of_rank_0(size):
    def work(transport):
        return transport.broadcast_value({"round": 3} if transport.rank == 0 else "ignored", "orders"), transport.ledger.take()

    found = on_ranks(size, work)
    assert [value for value, _ in found] == [{"round": 3}] * size
    assert found[0][1] == {"sent": {"orders": 12}, "received": {}}  # {"round":3} is 11 letters: 3 words
    assert all(ledger == {"sent": {}, "received": {"orders": 12}} for _, ledger in found[1:])


@pytest.mark.parametrize("size", SIZES)
def test_scatter_gives_everybody_their_own(size):
    def work(transport):
        values = ["a" * 6 * rank for rank in range(transport.size)] if transport.rank == 0 else None
        return transport.scatter(values, "assignments"), transport.ledger.take()

    found = on_ranks(size, work)
    assert [value for value, _ in found] == ["a" * 6 * rank for rank in range(size)]
    received = [0, 8, 16]  # "" is rank 0's own; 6 letters in quotes are 2 words, 12 are 14 letters: 4 words
    assert found[0][1] == {"sent": {"assignments": sum(received[1:size])} if size > 1 else {}, "received": {}}
    assert all(found[rank][1] == {"sent": {}, "received": {"assignments": received[rank]}} for rank in range(1, size))


@pytest.mark.parametrize("size", SIZES)
def test_gather_brings_all_values_to_rank_0_in_order(size):
    def work(transport):
        return transport.gather({"rank": transport.rank}, "reports"), transport.ledger.take()

    found = on_ranks(size, work)
    assert [values for values, _ in found] == [[{"rank": rank} for rank in range(size)]] + [None] * (size - 1)
    assert found[0][1] == {"sent": {}, "received": {"reports": 12 * (size - 1)} if size > 1 else {}}
    assert all(ledger == {"sent": {"reports": 12}, "received": {}} for _, ledger in found[1:])


@pytest.mark.parametrize("size", SIZES)
def test_started_gathers_take_blocks_of_any_length(size):
    lengths = [2, 0, 5]

    def work(transport):
        block = np.full(lengths[transport.rank], transport.rank + 1, WORD)
        pending = transport.start_gather(block, "updates", lengths[: transport.size])
        pending.advance()
        return pending.wait(), transport.ledger.take()

    found = on_ranks(size, work)
    assert [block.tolist() for block in found[0][0]] == [[1, 1], [], [3] * 5][:size]
    assert found[0][1]["received"] == ({"updates": 20} if size > 1 else {})
    assert [blocks for blocks, _ in found[1:]] == [None] * (size - 1)
    assert [ledger["sent"].get("updates", 0) for _, ledger in found[1:]] == [0, 20][: size - 1]


@pytest.mark.parametrize("size", SIZES)
def test_sum_replaces_every_array_by_the_sum(size):
    def work(transport):
        array = np.array([1, 10 * transport.rank], np.float32)
        transport.sum(array)
        return array, transport.ledger.take()

    found = on_ranks(size, work)
    assert all(array.tolist() == [size, sum(10 * rank for rank in range(size))] and array.dtype == np.float32 for array, _ in found)
    assert all(ledger == {"sent": {"sum": 8}, "received": {"sum": 8}} for _, ledger in found)


def test_letters_arrive_in_the_order_in_which_they_were_sent():
    def work(transport):
        if transport.rank == 0:
            return [transport.start_receive(np.empty(2, np.int64), source, "sums").wait().tolist() for source in (2, 1, 2)]
        sent = [transport.start_send(np.array([transport.rank, i]), 0, "sums") for i in range(3 - (transport.rank == 1))]
        return [pending.wait() for pending in sent], transport.ledger.take()

    found = on_ranks(3, work)
    assert found[0] == [[2, 0], [1, 0], [2, 1]]
    assert found[1] == ([None] * 2, {"sent": {"sums": 32}, "received": {}})


def test_a_rank_that_waits_for_a_letter_leaves_its_turn_to_others():
    ends = group(2, taking_turns=True)
    found = []

    def server():
        ends[0].gather(None, "start")
        found.append(ends[0].start_receive(np.empty(1, np.int64), 1, "sums").wait().tolist())
        ends[0].leave()

    def client():
        ends[1].gather(None, "start")
        ends[1].start_send(np.array([7]), 0, "sums").wait()
        ends[1].leave()

    threads = [threading.Thread(target=rank, daemon=True) for rank in (server, client)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [[7]]


def test_many_verbs_in_a_row_do_not_mix():
    def work(transport):
        seen = []
        for i in range(50):
            values = [[i, rank] for rank in range(transport.size)] if transport.rank == 0 else None
            seen.append((transport.broadcast_value(i), transport.scatter(values, "b"), transport.gather([i, transport.rank], "c")))
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
    ledger.add("a", received=1)
    assert ledger.whole_run() == {"sent": {"a": 7}, "received": {"a": 6}, "direct": {}, "broadcast_bytes": 0}


@pytest.mark.parametrize("waits_for_a_letter", [False, True])
def test_abort_wakes_the_others(waits_for_a_letter):
    ended: dict[int, BaseException] = {}

    def rank(transport):
        try:
            if transport.rank == 1:
                time.sleep(0.05)
                transport.abort(3)
            if waits_for_a_letter:
                transport.start_receive(np.empty(1, np.int64), 1, "sums").wait()
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
