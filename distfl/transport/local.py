"""Local transport: ranks are threads of one process that meet at a barrier. The oracle of the tests.

With ``taking_turns`` only one rank at a time runs between transfers, so that what one allocates is
not counted against the cap of another.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from distfl.transport.base import Arrived, Ledger, Pending, Transport, pack, unpack


class _Meeting:
    """What the ranks share: a barrier with one slot for each, and the mail between any two."""

    def __init__(self, size: int, taking_turns: bool):
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size
        self.turn = threading.Lock() if taking_turns else None
        self.mail: dict[tuple[int, int], deque] = defaultdict(deque)
        self.posted = threading.Condition()


class _Letter:
    """An array that one rank waits for from another."""

    def __init__(self, transport: LocalTransport, array: np.ndarray, source: int):
        self._transport, self._array, self._source = transport, array, source

    def wait(self) -> np.ndarray:
        self._array[...] = self._transport.take_letter(self._source)
        return self._array

    def advance(self) -> None:
        pass


class LocalTransport(Transport):
    """One of the endpoints that ``group`` makes."""

    name, library = "local", "threads of one process"

    def __init__(self, rank: int, size: int, meeting: _Meeting):
        self.rank, self.size, self.ledger, self._meeting = rank, size, Ledger(), meeting
        self._has_turn = False

    def _exchange(self, mine: Any) -> list[Any]:
        """Everybody's contribution; returns once all ranks have read it."""
        self._meeting.slots[self.rank] = mine
        self.leave()
        self._meeting.barrier.wait()
        everybody = list(self._meeting.slots)
        self._meeting.barrier.wait()
        self._take_turn()
        return everybody

    def leave(self) -> None:
        """Let another rank run: at the next transfer, and when this rank's life ends."""
        if self._has_turn:
            self._has_turn = False
            self._meeting.turn.release()

    def _take_turn(self) -> None:
        if self._meeting.turn is not None:
            self._meeting.turn.acquire()
            self._has_turn = True

    def broadcast(self, arrays: Sequence[np.ndarray], purpose: str) -> None:
        given = self._exchange([array.copy() for array in arrays] if self.rank == 0 else None)[0]
        for array, values in zip(arrays, given, strict=True):
            array[...] = values
            self.ledger.add(purpose, array.nbytes if self.rank == 0 else 0, array.nbytes if self.rank else 0)

    def broadcast_value(self, value: Any = None, purpose: str = "orders") -> Any:
        words = self._exchange(pack(value) if self.rank == 0 else None)[0]
        self.ledger.add(purpose, words.nbytes if self.rank == 0 else 0, words.nbytes if self.rank else 0)
        return unpack(words)

    def scatter(self, values: list[Any] | None, purpose: str) -> Any:
        blocks = self._exchange([pack(value) for value in values] if self.rank == 0 else None)[0]
        others = sum(block.nbytes for block in blocks[1:])
        self.ledger.add(purpose, others if self.rank == 0 else 0, blocks[self.rank].nbytes if self.rank else 0)
        return unpack(blocks[self.rank])

    def gather(self, value: Any, purpose: str) -> list[Any] | None:
        blocks = self.start_gather(pack(value), purpose).wait()
        return None if blocks is None else [unpack(block) for block in blocks]

    def start_gather(self, block: np.ndarray, purpose: str, words: Sequence[int] | None = None, room: np.ndarray | None = None) -> Pending:
        blocks = self._exchange(block.copy())
        if self.rank != 0:
            self.ledger.add(purpose, sent=block.nbytes)
            return Arrived()
        self.ledger.add(purpose, received=sum(other.nbytes for other in blocks[1:]))
        return Arrived(blocks)

    def start_send(self, array: np.ndarray, destination: int, purpose: str) -> Pending:
        with self._meeting.posted:
            self._meeting.mail[self.rank, destination].append(array.copy())
            self._meeting.posted.notify_all()
        self.ledger.add(purpose, sent=array.nbytes)
        return Arrived()

    def start_receive(self, array: np.ndarray, source: int, purpose: str) -> Pending:
        self.ledger.add(purpose, received=array.nbytes)
        return _Letter(self, array, source)

    def take_letter(self, source: int) -> np.ndarray:
        """The next array from that rank (raises BrokenBarrierError where a rank has ended the job)."""
        self.leave()
        with self._meeting.posted:
            letters = self._meeting.mail[source, self.rank]
            self._meeting.posted.wait_for(lambda: letters or self._meeting.barrier.broken)
        if not letters:
            raise threading.BrokenBarrierError
        self._take_turn()
        return letters.popleft()

    def sum(self, array: np.ndarray) -> None:
        total = np.sum(self._exchange(array.copy()), axis=0, dtype=array.dtype)
        array[...] = total
        self.ledger.add("sum", array.nbytes, array.nbytes)

    def abort(self, code: int) -> NoReturn:
        self._meeting.barrier.abort()
        with self._meeting.posted:
            self._meeting.posted.notify_all()
        self.leave()
        raise SystemExit(code)


def group(size: int, taking_turns: bool = False) -> list[LocalTransport]:
    """Endpoints of ``size`` ranks, to be used from one thread each, which calls ``leave`` at its end if they take turns."""
    meeting = _Meeting(size, taking_turns)
    return [LocalTransport(rank, size, meeting) for rank in range(size)]
