"""The control communicator of a job whose MPI reports dead ranks: where living ranks meet after a loss, and where the server asks
who lives.

Nobody revokes it, and all that moves in it are small messages between the server and one other rank, so that a dead one is
never waited for: the library reports it. Whoever waits here sleeps.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import mpi4py
import numpy as np

mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
from mpi4py import MPI  # noqa: E402

from distfl.errors import TransportError  # noqa: E402
from distfl.launching import say  # noqa: E402
from distfl.messages import Place  # noqa: E402

PAUSE_SECONDS = 2e-3
COME, WORD, CALL, ANSWER = 1, 2, 3, 4  # tags; an answer's is ANSWER + number of the call
NOTHING = [None, 0, MPI.INT64_T]
NOBODY = 0  # in place of a process id

T = TypeVar("T")


@dataclass(frozen=True)
class Watch:
    """What the server needs to deal with ranks that stay silent.

    Args:
        places: of all ranks, by their numbers at the start.
        deadline_seconds: of waiting, until it asks who lives.
        grace_seconds: until it kills those that have not answered.
    """

    places: list[Place]
    deadline_seconds: float
    grace_seconds: float


class Control:
    """One rank's end. Rank 0 is the server.

    Args:
        numbers: of its ranks, at the start.
    """

    def __init__(self, comm: MPI.Intracomm, numbers: list[int]):
        self.comm, self._numbers = comm, numbers
        self.watch: Watch | None = None
        self._roll: _RollCall | None = None
        self._calls, self._asked_last = 0, 0.0
        self._kept: list[Any] = []  # small messages: the library may still need them

    def shrunk(self, everybody: MPI.Group) -> Control:
        """The same among the ranks that live: all of them call it.

        Args:
            everybody: all ranks at the start, in order.
        """
        comm = self.comm.Shrink()
        smaller = Control(comm, comm.group.Translate_ranks(None, everybody))
        smaller.watch, smaller._calls, smaller._kept = self.watch, self._calls, [self._kept, self._roll]
        return smaller

    # --- meetings

    def come(self) -> int | None:
        """Client rank: tell the server that this rank has come; what it says once all have. None where it is dead."""
        word = np.empty(1, np.int64)
        sent = unless_dead(lambda: self.comm.Isend(NOTHING, dest=0, tag=COME))
        coming = sent and unless_dead(lambda: self.comm.Irecv([word, 1, MPI.INT64_T], source=0, tag=WORD))
        self._kept += [sent, word]
        is_there = False if coming else None
        while is_there is False:
            time.sleep(PAUSE_SECONDS)
            unless_dead(self.answer)
            is_there = unless_dead(coming.Test)
        return int(word[0]) if is_there else None

    def welcome(self, word: int) -> None:
        """Server: wait until every living rank has come, then say the word to all of them."""
        since, have_come = time.monotonic(), []
        coming = {rank: unless_dead(lambda rank=rank: self.comm.Irecv(NOTHING, source=rank, tag=COME)) for rank in range(1, self.comm.size)}
        while coming:
            for rank, request in list(coming.items()):
                has_come = request and unless_dead(request.Test)
                if has_come is not False:
                    self._kept.append(coming.pop(rank))
                    have_come += [rank] if has_come else []
            if coming:
                time.sleep(PAUSE_SECONDS)
                self.call_roll(since)
        said = np.array([word], np.int64)
        for rank in have_come:
            request = unless_dead(lambda rank=rank: self.comm.Isend([said, 1, MPI.INT64_T], dest=rank, tag=WORD))
            while request and unless_dead(request.Test) is False:
                time.sleep(2e-5)
        self._kept.append(said)

    # --- who lives

    def answer(self) -> None:
        """Client rank: answer the server's calls; end a silent process of this host for it (raises MPI.Exception where it is dead)."""
        while self.comm.Iprobe(source=0, tag=CALL):
            call = np.empty(2, np.int64)
            self.comm.Recv([call, 2, MPI.INT64_T], source=0, tag=CALL)
            number, process = map(int, call)
            if process == NOBODY:
                self._kept.append(self.comm.Isend(NOTHING, dest=0, tag=ANSWER + number))
            else:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def call_roll(self, since: float) -> None:
        """Server, while it waits: ask who lives when that takes too long, kill who does not answer.

        Args:
            since: when this wait began.

        Raises:
            TransportError: a silent rank is on a host with no other rank.
        """
        if self.watch is None:
            return
        now, roll = time.monotonic(), self._roll
        if roll is not None and roll.began < since:  # that wait ended well
            self._kept.append(roll)
            self._roll = roll = None
        if roll is None:
            if now - max(since, self._asked_last) > self.watch.deadline_seconds:
                self._calls, self._asked_last = self._calls + 1, now
                self._roll = _RollCall(self.comm, self._calls)
        elif not (silent := roll.silent()):
            self._roll, self._asked_last = None, now
        elif now - roll.began > self.watch.grace_seconds:
            self._kept.append(roll)
            self._roll, self._asked_last = None, now
            for rank in silent:
                self._end(rank, silent)

    def _end(self, rank: int, silent: list[int]) -> None:
        """Have a silent rank killed by a process of its host."""
        places = {other: self.watch.places[number] for other, number in enumerate(self._numbers)}
        place, number = places[rank], self._numbers[rank]
        say(f"rank {number} ({place.host}, process {place.process}) has not answered for {self.watch.grace_seconds:g} s and is killed")
        near = [other for other in places if other not in silent and places[other].shares_processes_with(place)]
        if not near:
            raise TransportError(
                f"an answer of rank {number}",
                f"it has stayed silent for {self.watch.grace_seconds:g} s, and no other rank is on {place.host} to end it",
                f"end process {place.process} there, or the job, and continue with --resume",
            )
        if near[0] == 0:
            with suppress(ProcessLookupError):
                os.kill(place.process, signal.SIGKILL)
        else:
            order = np.array([0, place.process], np.int64)
            self._kept += [order, unless_dead(lambda: self.comm.Isend([order, 2, MPI.INT64_T], dest=near[0], tag=CALL))]


class _RollCall:
    """One question to all ranks, and the answers that are awaited."""

    def __init__(self, comm: MPI.Intracomm, number: int):
        self.began = time.monotonic()
        self._call = np.array([number, NOBODY], np.int64)
        self._sent, self._awaited = [], {}
        for rank in range(1, comm.size):
            self._sent.append(unless_dead(lambda rank=rank: comm.Isend([self._call, 2, MPI.INT64_T], dest=rank, tag=CALL)))
            self._awaited[rank] = unless_dead(lambda rank=rank: comm.Irecv(NOTHING, source=rank, tag=ANSWER + number))

    def silent(self) -> list[int]:
        """Ranks that have neither answered nor died."""
        for rank, request in list(self._awaited.items()):
            if not request or unless_dead(request.Test) is not False:
                del self._awaited[rank]
        return list(self._awaited)


def unless_dead(act: Callable[[], T]) -> T | None:
    """What it returns; None where the other rank is dead."""
    try:
        return act()
    except MPI.Exception:
        return None
