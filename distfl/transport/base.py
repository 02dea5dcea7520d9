"""The transport seam: a handful of verbs, and a ledger of the bytes they moved.

Collective verbs are called by all ranks, in the same order; ``start_send`` and ``start_receive`` by the
two they concern. Values are what JSON can hold (small records); arrays are contiguous NumPy arrays of a
4- or 8-byte type, so that counts stay counts of elements. Every call says what it is for, and the
ledger counts by that.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

from distfl.errors import RankLost
from distfl.messages import Place

WORD = np.dtype("<u4")  # blocks are counted in words of 4 bytes


class Ledger:
    """Bytes that this rank handed to (``sent``) and took from (``received``) the transport, by purpose.

    Args:
        direct: destination, by its number at the start of the job -> bytes that went from this rank straight to it, over the whole run.
        broadcast_bytes: of all broadcasts of the whole run. Which rank hands them on to which is the library's choice.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.direct: Counter[int] = Counter()
        self.broadcast_bytes = 0
        self._taken: dict[str, Counter[str]] = {"sent": Counter(), "received": Counter()}
        self._round, self._of_round = None, {}

    def add(self, purpose: str, sent: int = 0, received: int = 0) -> None:
        self.sent[purpose] += sent
        self.received[purpose] += received

    def take(self) -> dict[str, dict[str, int]]:
        """What was counted since the last call: {"sent": {purpose: bytes}, "received": {...}}."""
        counted = {"sent": dict(+self.sent), "received": dict(+self.received)}
        for way, since in counted.items():
            self._taken[way].update(since)
        self.sent.clear()
        self.received.clear()
        return counted

    def of_round(self, round: int) -> dict[str, dict[str, int]]:
        """What was counted since an earlier round was asked for, as ``take`` gives it. Asked again for the same round, it
        gives that and what came since."""
        if round != self._round:
            self._round, self._of_round = round, {"sent": Counter(), "received": Counter()}
        for way, counted in self.take().items():
            self._of_round[way].update(counted)
        return {way: dict(counted) for way, counted in self._of_round.items()}

    def whole_run(self) -> dict[str, dict]:
        """Everything counted so far, for ``distfl audit``."""
        return {
            "sent": dict(self._taken["sent"] + self.sent),
            "received": dict(self._taken["received"] + self.received),
            "direct": {str(rank): bytes_ for rank, bytes_ in self.direct.items()},
            "broadcast_bytes": self.broadcast_bytes,
        }


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> Any:
        """What it brought, once it is there. What was handed over must not be changed before."""

    def advance(self) -> None:
        """Let it go on, without waiting."""


class Dismissed(Exception):
    """The server ended the run while this rank was in the middle of something.

    Args:
        finished: all rounds are done.
    """

    def __init__(self, finished: bool):
        super().__init__(finished)
        self.finished = finished


class Arrived:
    """A transfer that is done already."""

    def __init__(self, value: Any = None):
        self._value = value

    def wait(self) -> Any:
        return self._value

    def advance(self) -> None:
        pass


class Transport(ABC):
    """Verbs among ranks 0 (the server) to size - 1.

    Args:
        name: as ``transport.name`` says it.
        library: what moves the bytes, with its version.
        recovers: whether living ranks can go on without dead ones: then every verb raises RankLost where one has died.
        numbers: of the ranks that live, at the start of the job; in rank order.
    """

    name: str
    library: str
    rank: int
    size: int
    ledger: Ledger
    recovers: bool = False
    numbers: list[int]

    @abstractmethod
    def broadcast(self, arrays: Sequence[np.ndarray], purpose: str) -> None:
        """Fill every rank's arrays with rank 0's (same shapes and types everywhere)."""

    @abstractmethod
    def broadcast_value(self, value: Any = None, purpose: str = "orders") -> Any:
        """Rank 0's value, on every rank."""

    @abstractmethod
    def scatter(self, values: list[Any] | None, purpose: str) -> Any:
        """The entry of rank 0's list (one per rank) that is meant for this rank."""

    @abstractmethod
    def gather(self, value: Any, purpose: str) -> list[Any] | None:
        """Every rank's value at rank 0, in rank order; None elsewhere."""

    @abstractmethod
    def start_gather(self, block: np.ndarray, purpose: str, words: Sequence[int] | None = None, room: np.ndarray | None = None) -> Pending:
        """Every rank's block (1-D WORD array, any length, also 0) to rank 0.

        Args:
            words: length of every rank's block; only rank 0 must know them.
            room: at rank 0, a WORD array that all of them fit in, for a transport to put them there: new memory is slow.

        Returns:
            The blocks in rank order at rank 0, None elsewhere. Gathers arrive in the order in which they were started.
        """

    @abstractmethod
    def start_send(self, array: np.ndarray, destination: int, purpose: str) -> Pending:
        """One array to one rank, which receives it with ``start_receive``; in the order of the calls."""

    @abstractmethod
    def start_receive(self, array: np.ndarray, source: int, purpose: str) -> Pending:
        """Fill the array with what that rank sends (same length and type); the pending transfer brings the array."""

    @abstractmethod
    def sum(self, array: np.ndarray) -> None:
        """Replace every rank's float32 array by the sum over all ranks."""

    def attend(self) -> None:  # noqa: B027
        """To be called now and then by a rank that works long between two transfers: it answers the server, and hears of
        losses (raises RankLost)."""

    def watch(self, places: list[Place], deadline_seconds: float, grace_seconds: float) -> None:  # noqa: B027
        """Server: from now on, ask all ranks who lives where a transfer takes longer than the deadline; those that do not answer
        within the grace are killed. Only where the transport recovers.

        Args:
            places: of all ranks.
        """

    def recover(self) -> list[int]:
        """After RankLost, called by all living ranks wherever they were: what was under way is dropped, ``rank`` and
        ``size`` change, the server stays rank 0.

        Returns:
            Numbers, at the start of the job, of the ranks that were lost since then or since the last call.

        Raises:
            RankLost: the server or all client ranks are dead.
            Dismissed: the server has ended the run.
        """
        raise RankLost("living ranks that go on without a dead one", f"transport {self.name} cannot", "continue with --resume")

    def part(self, finished: bool) -> None:  # noqa: B027
        """All living ranks meet a last time: the last transfer, once the server has said that the run ends."""

    def leave(self, code: int) -> int:
        """End of this rank's part, after its last transfer: what it is to exit with, given what it would."""
        return code

    @abstractmethod
    def abort(self, code: int) -> NoReturn:
        """End every rank of the job at once."""


def pack(value: Any) -> np.ndarray:
    """A JSON value as words, padded with blanks."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return np.frombuffer(text + b" " * (-len(text) % WORD.itemsize), WORD)


def unpack(words: np.ndarray) -> Any:
    """The value that ``pack`` made words of."""
    return json.loads(words.tobytes())
