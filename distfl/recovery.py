"""Going on without lost ranks: the server's half. What a round has changed is taken back, and the round is repeated.

A round is two orders to the client ranks, "train" and "close" (score, and report what was counted). When a rank is lost, all
ranks drop what they were doing, meet (``Transport.recover``), and the server gives the same order again. As it does not matter
which rank hosts a client, the repeated round has the bits of an undisturbed one.

A client that two ranks were training that were lost in the same round may be what killed them. It is left out of that round and
all later ones, until the job is started anew: it would cost a rank each time.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import numpy as np
from torch import Tensor

from distfl.config import FaultsConfig
from distfl.errors import RankLost, TransportError
from distfl.hosting import RankState
from distfl.launching import say
from distfl.messages import Fault, Place, RankStart
from distfl.server_optimizer import ServerOptimizer
from distfl.transport.base import Transport
from distfl.units import Unit

LOSSES_PER_CLIENT = 2
PHASES = {  # purpose of the transfer in which a loss was seen -> what was going on
    "orders": "giving orders",
    "versions": "broadcasting units",
    "units": "broadcasting units",
    "assignments": "handing out assignments",
    "reports": "training",
    "updates": "gathering updates",
    "layout": "summing up updates",
    "sums": "summing up updates",
    "means": "summing up updates",
    "scores": "scoring",
    "ledgers": "counting bytes",
}

REPEAT, ABORT = "repeat", "abort"
BeforeMerge = Callable[[Unit], None]
T = TypeVar("T")


def own_place() -> Place:
    """Where this process lives."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return Place(socket.gethostname(), os.getpid(), namespace)


def lost_ranks(config: FaultsConfig, transport: Transport) -> str:
    """What becomes of a job when a rank dies: ``REPEAT`` the round without it, or ``ABORT``.

    Raises:
        TransportError: ``faults.recover=on`` where that cannot be.
    """
    if config.recover == "on" and not transport.recovers:
        raise TransportError(
            "faults.recover = on",
            f"transport {transport.name} does not report dead ranks here",
            "start mpirun with --with-ft ulfm (Open MPI 5), or let --ranks start it; or set faults.recover=auto",
        )
    return REPEAT if transport.recovers and config.recover != "off" else ABORT


class Undo:
    """What one attempt of a round changes on the server, as it was before: a copy of each unit, once it is about to change."""

    def __init__(self, state: RankState, optimizer: ServerOptimizer):
        self._replica, self._optimizer = state.replica, optimizer
        self._buffers: dict[int, np.ndarray] = {}
        self._states: dict[str, dict[str, Tensor]] = {}

    def keep(self, unit: Unit) -> None:
        """Before a tensor of a unit changes. Units can change more than once: what was there at first counts."""
        if unit.index in self._buffers:
            return
        self._buffers[unit.index] = self._replica.buffers[unit.index].copy()
        for tensor in unit.tensors:
            self._states[tensor.name] = {key: state.clone() for key, state in self._optimizer.states_of(tensor.name).items()}

    def back(self) -> None:
        """All as it was."""
        for unit, values in self._buffers.items():
            self._replica.buffers[unit][:] = values
        for name, states in self._states.items():
            for key in self._optimizer.states_of(name):
                del self._optimizer.state[key]
            self._optimizer.state |= states


class Recovery:
    """Repeats what a loss has cut short.

    Args:
        ranks: how they came up, by their numbers at the start.
        record: called with each fault, at once.

    ``left_out`` has the clients that may have killed ranks.
    """

    def __init__(self, state: RankState, optimizer: ServerOptimizer, ranks: list[RankStart], record: Callable[[Fault], None]):
        faults, self._transport = state.config.faults, state.transport
        self._state, self._optimizer, self._places, self._record = state, optimizer, [rank.place for rank in ranks], record
        self._goes_on = lost_ranks(faults, state.transport) == REPEAT
        self._hosted: dict[int, int] = {}
        self._losses: Counter[tuple[int, int]] = Counter()  # by round and client
        self.left_out: set[int] = set()
        if self._goes_on and faults.deadline_seconds is not None:
            state.transport.watch(self._places, faults.deadline_seconds, faults.grace_seconds)

    def hosting(self, clients: list[int]) -> None:
        """From now on client ranks 1, 2, ... train these, or with an empty list nobody."""
        self._hosted = dict(zip(self._transport.numbers[1:], clients)) if self._goes_on else {}

    def repeated(self, round: int, what: str, attempt: Callable[[BeforeMerge], T]) -> T:
        """What an attempt at one order returns, once no rank is lost meanwhile. It calls what it is given before it changes a unit.

        Raises:
            RankLost: the job cannot go on.
        """
        while True:
            undo, began = Undo(self._state, self._optimizer), time.monotonic()
            try:
                return attempt(undo.keep if self._goes_on else lambda unit: None)
            except RankLost as error:
                if not self._goes_on:
                    raise
                phase, answered = PHASES.get(error.purpose, error.purpose), error.answered
            self._recover(round, what, phase, answered, began)
            undo.back()

    def _recover(self, round: int, what: str, phase: str, answered: frozenset[int], began: float) -> None:
        """Meet with the ranks that live, and put down what was lost.

        Args:
            answered: ranks that had done what the server waited for: what killed them was not their client.
        """
        lost = self._transport.recover()
        if not lost:
            raise TransportError("a transfer between ranks", f"it failed while {phase}, and no rank is dead", "see what MPI said")
        hosted = [self._hosted[number] for number in lost if number in self._hosted and number not in answered]
        self._losses.update((round, client) for client in hosted)
        suspects = [client for client in hosted if self._losses[round, client] >= LOSSES_PER_CLIENT]
        self.left_out.update(suspects)
        self._hosted = {}
        places = [(number, self._places[number].host, self._places[number].process) for number in lost]
        fault = Fault(round, phase, places, hosted, suspects, self._transport.size - 1, what, _rounded(time.monotonic() - began))
        self._record(fault)
        say(describe(fault))


def _rounded(seconds: float) -> float:
    return round(seconds, 3)


def describe(fault: Fault) -> str:
    """A line for the person who waits."""
    ranks = ", ".join(f"{number} ({host}, process {process})" for number, host, process in fault.lost)
    with_ranks = f"{fault.done} with {fault.client_ranks} client rank{'s' * (fault.client_ranks != 1)}"
    text = f"rank{'s' * (len(fault.lost) > 1)} {ranks} lost while {fault.phase}; {with_ranks}"
    if fault.left_out:
        clients = ", ".join(map(str, fault.left_out))
        text += f"; client{'s' * (len(fault.left_out) > 1)} {clients} left out from now on: {LOSSES_PER_CLIENT} ranks were lost training it"
    return text
