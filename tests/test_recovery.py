"""Repeating a round: what is taken back, who is blamed, what is counted; without MPI."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SPEC, same_bits, weights

from distfl.config import FaultsConfig, ServerConfig
from distfl.errors import RankLost, TransportError
from distfl.messages import Place, RankStart
from distfl.recovery import ABORT, REPEAT, Recovery, Undo, describe, lost_ranks
from distfl.replica import NEVER, Replica
from distfl.server_optimizer import ServerOptimizer
from distfl.transport.base import Ledger
from distfl.units import UnitTable


class Ranks:
    """A transport of which ranks are lost as planned: by ``recover``, in this order."""

    name, recovers, rank = "planned", True, 0

    def __init__(self, size: int, losses: list[list[int]]):
        self.numbers, self._losses = list(range(size)), losses

    @property
    def size(self) -> int:
        return len(self.numbers)

    def recover(self) -> list[int]:
        lost = self._losses.pop(0)
        self.numbers = [number for number in self.numbers if number not in lost]
        return lost


def replica_of_weights() -> Replica:
    replica = Replica(UnitTable(SPEC))
    replica.fill(weights())
    return replica


def recovery_of(transport: Ranks, faults: FaultsConfig | None = None) -> tuple[Recovery, list]:
    state = SimpleNamespace(transport=transport, config=SimpleNamespace(faults=faults or FaultsConfig()), replica=replica_of_weights())
    ranks, recorded = [RankStart(0.0, "", Place("here", 100 + rank, "")) for rank in range(transport.size)], []
    return Recovery(state, ServerOptimizer(ServerConfig()), ranks, recorded.append), recorded


def attempts(recovery: Recovery, clients: list[int], failures: list[frozenset[int]], round: int = 1) -> int:
    """One order that fails so many times while the ranks train; who has answered is given. Returns how often it was tried."""
    tried = []

    def attempt(before_merge) -> int:
        recovery.hosting([client for client in clients if client not in recovery.left_out])
        tried.append(1)
        if len(tried) <= len(failures):
            error = RankLost("", "", "", "reports")
            error.answered = failures[len(tried) - 1]
            raise error
        return len(tried)

    return recovery.repeated(round, f"round {round} is repeated", attempt)


@pytest.mark.parametrize("kind", ["average", "momentum", "adam"])
def test_merged_units_and_their_optimizer_state_are_taken_back(kind):
    replica, optimizer = replica_of_weights(), ServerOptimizer(ServerConfig(optimizer=kind))

    def merge(unit) -> None:
        for tensor in unit.tensors:
            old = replica.tensors[tensor.name]
            old.copy_(optimizer.step(tensor.name, old, old + torch.ones_like(old)))

    first, second, *_ = replica.table
    merge(first)  # an earlier round
    tensors, states = replica.copy(), {name: state.clone() for name, state in optimizer.state.items()}
    kept = optimizer.state
    undo = Undo(SimpleNamespace(replica=replica), optimizer)
    for unit in (first, second, first):  # a method may change a unit more than once
        undo.keep(unit)
        merge(unit)
    assert not same_bits(replica.tensors, tensors)
    undo.back()
    assert same_bits(replica.tensors, tensors) and same_bits(optimizer.state, states)
    assert optimizer.state is kept  # the checkpoint's


def test_a_client_whose_ranks_are_lost_twice_in_one_round_is_left_out():
    recovery, recorded = recovery_of(Ranks(5, [[2], [3]]))  # client 11 is dealt to rank 2, then to rank 3, the second of those that live
    assert attempts(recovery, [10, 11, 12], [frozenset(), frozenset()]) == 3
    assert recovery.left_out == {11}
    assert [(fault.lost, fault.hosted, fault.left_out, fault.client_ranks) for fault in recorded] == [
        ([(2, "here", 102)], [11], [], 3),
        ([(3, "here", 103)], [11], [11], 2),
    ]
    assert "client 11 left out from now on" in describe(recorded[1])


def test_a_client_is_not_blamed_for_losses_of_different_rounds_or_after_its_rank_has_answered():
    recovery, recorded = recovery_of(Ranks(6, [[2], [3], [4]]))
    attempts(recovery, [10, 11, 12], [frozenset()], round=1)
    attempts(recovery, [10, 11, 12], [frozenset(), frozenset({4})], round=2)
    assert [fault.hosted for fault in recorded] == [[11], [11], []] and not recovery.left_out


def test_a_failure_without_a_loss_is_an_error():
    recovery, _ = recovery_of(Ranks(3, [[]]))
    with pytest.raises(TransportError, match="no rank is dead"):
        attempts(recovery, [10, 11], [frozenset()])


def test_without_recovery_a_loss_is_the_end():
    recovery, recorded = recovery_of(Ranks(3, [[1]]), FaultsConfig(recover="off"))
    with pytest.raises(RankLost):
        attempts(recovery, [10, 11], [frozenset()])
    assert recorded == []


def test_what_becomes_of_a_lost_rank():
    deaf = SimpleNamespace(name="torch", recovers=False)
    assert [lost_ranks(FaultsConfig(how), Ranks(2, [])) for how in ("auto", "on", "off")] == [REPEAT, REPEAT, ABORT]
    assert [lost_ranks(FaultsConfig(how), deaf) for how in ("auto", "off")] == [ABORT, ABORT]
    with pytest.raises(TransportError, match="--with-ft ulfm"):
        lost_ranks(FaultsConfig("on"), deaf)


def test_bytes_of_a_repeated_end_of_a_round_stay_with_their_round():
    ledger = Ledger()
    ledger.add("units", sent=4)
    assert ledger.of_round(1) == {"sent": {"units": 4}, "received": {}}
    ledger.add("ledgers", sent=1)
    assert ledger.of_round(1) == {"sent": {"units": 4, "ledgers": 1}, "received": {}}  # asked again: it did not arrive
    ledger.add("orders", received=2)
    assert ledger.of_round(2) == {"sent": {}, "received": {"orders": 2}}
    assert ledger.whole_run()["sent"] == {"units": 4, "ledgers": 1}


def test_what_a_cut_off_broadcast_wrote_into_is_not_used_again():
    replica = replica_of_weights()
    before, tensors = list(replica.buffers), replica.copy()
    replica.spoil([1])
    assert replica.versions[1] == NEVER
    replica.renew_spoilt()
    assert [new is old for new, old in zip(replica.buffers, before)] == [True, False, *[True] * (len(before) - 2)]
    before[1][:] = np.nan  # the library, late
    of_unit = {tensor.name for tensor in replica.table[1].tensors}
    assert same_bits({name: replica.tensors[name] for name in tensors.keys() - of_unit}, {n: tensors[n] for n in tensors.keys() - of_unit})
    assert all(torch.isfinite(replica.tensors[name]).all() for name in of_unit)
