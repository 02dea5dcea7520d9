"""Local transport: ranks are threads of one process that meet at a barrier. The oracle of the tests.

With ``taking_turns`` only one rank at a time runs between collectives, so that what one allocates is
not counted against the cap of another.
"""

from __future__ import annotations

import threading
from typing import Any, NoReturn

import numpy as np

from distfl.transport.base import Ledger, Transport, pack, unpack


class _Meeting:
    """What the ranks share: a barrier and one slot for each."""

    def __init__(self, size: int, taking_turns: bool):
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size
        self.turn = threading.Lock() if taking_turns else None


class LocalTransport(Transport):
    """One of the endpoints that ``group`` makes."""

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
        if self._meeting.turn is not None:
            self._meeting.turn.acquire()
            self._has_turn = True
        return everybody

    def leave(self) -> None:
        """Let another rank run: at the next collective, and when this rank's life ends."""
        if self._has_turn:
            self._has_turn = False
            self._meeting.turn.release()

    def broadcast(self, array: np.ndarray) -> None:
        array[...] = self._exchange(array.copy() if self.rank == 0 else None)[0]
        self.ledger.add("broadcast", array.nbytes if self.rank == 0 else 0, array.nbytes if self.rank else 0)

    def broadcast_value(self, value: Any = None) -> Any:
        words = self._exchange(pack(value) if self.rank == 0 else None)[0]
        self.ledger.add("broadcast_value", words.nbytes if self.rank == 0 else 0, words.nbytes if self.rank else 0)
        return unpack(words)

    def scatter(self, values: list[Any] | None = None) -> Any:
        blocks = self._exchange([pack(value) for value in values] if self.rank == 0 else None)[0]
        others = sum(block.nbytes for block in blocks[1:])
        self.ledger.add("scatter", others if self.rank == 0 else 0, blocks[self.rank].nbytes if self.rank else 0)
        return unpack(blocks[self.rank])

    def gather(self, value: Any) -> list[Any] | None:
        blocks = self._gather("gather", pack(value))
        return None if blocks is None else [unpack(block) for block in blocks]

    def gather_blocks(self, block: np.ndarray) -> list[np.ndarray] | None:
        return self._gather("gather_blocks", block.copy())

    def _gather(self, verb: str, block: np.ndarray) -> list[np.ndarray] | None:
        blocks = self._exchange(block)
        if self.rank != 0:
            self.ledger.add(verb, sent=block.nbytes)
            return None
        self.ledger.add(verb, received=sum(other.nbytes for other in blocks[1:]))
        return blocks

    def sum(self, array: np.ndarray) -> None:
        total = np.sum(self._exchange(array.copy()), axis=0, dtype=array.dtype)
        array[...] = total
        self.ledger.add("sum", array.nbytes, array.nbytes)

    def abort(self, code: int) -> NoReturn:
        self._meeting.barrier.abort()
        self.leave()
        raise SystemExit(code)


def group(size: int, taking_turns: bool = False) -> list[LocalTransport]:
    """Endpoints of ``size`` ranks, to be used from one thread each, which calls ``leave`` at its end if they take turns."""
    meeting = _Meeting(size, taking_turns)
    return [LocalTransport(rank, size, meeting) for rank in range(size)]
