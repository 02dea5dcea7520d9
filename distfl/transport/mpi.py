"""MPI transport: mpi4py's buffer collectives, waited for without eating the core.

Every transfer is started in its non-blocking form and tested with growing sleeps, so that with
more ranks than cores the ranks that wait leave the cores to those that train. The only module that
imports mpi4py. MPI itself starts in ``world``: this module may be loaded before a rank is forked.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

import mpi4py
import numpy as np

mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
from mpi4py import MPI  # noqa: E402

from distfl.errors import TransportError  # noqa: E402
from distfl.transport.base import WORD, Ledger, Pending, Transport, pack, unpack  # noqa: E402

EAGER_TESTS = 50  # tests without sleep: what is under way on the same node is there by then
SHORTEST_SLEEP_SECONDS = 2e-5
SLEEP_OF_WAITED = 1 / 20  # of the time waited so far: so much later at most than it could is a transfer noticed
LONGEST_SLEEP_SECONDS = 1e-3  # with a core for each rank; more ranks sleep longer, so that all tests together cost the same
KINDS = {
    np.dtype(np.float32): MPI.FLOAT,
    np.dtype(np.int32): MPI.INT32_T,
    np.dtype(np.int64): MPI.INT64_T,
    WORD: MPI.UINT32_T,
}


class MpiPending:
    """One request, or several that belong together."""

    def __init__(self, requests: list[MPI.Request], bring: Callable[[], Any] = lambda: None):
        self._requests, self._bring = requests, bring

    def wait(self) -> Any:
        for _ in range(EAGER_TESTS):
            if MPI.Request.Testall(self._requests):
                return self._bring()
        began, longest = time.monotonic(), _longest_sleep_seconds()
        while not MPI.Request.Testall(self._requests):
            waited = time.monotonic() - began
            time.sleep(min(longest, max(SHORTEST_SLEEP_SECONDS, waited * SLEEP_OF_WAITED)))
        return self._bring()

    def advance(self) -> None:
        MPI.Request.Testall(self._requests)


class MpiTransport(Transport):
    """Ranks of an MPI communicator.

    Raises:
        TransportError: fewer ranks than ``smallest``.
    """

    name = "mpi"

    def __init__(self, comm: MPI.Intracomm, smallest: int):
        self.comm, self.rank, self.size, self.ledger = comm, comm.rank, comm.size, Ledger()
        if self.size < smallest:
            raise TransportError(
                f"at least {smallest} ranks",
                f"MPI started {self.size}",
                "start more: mpirun -n N distfl ... or distfl ... --ranks N; srun needs --mpi=pmix, else every task is a job",
            )

    def broadcast(self, arrays: Sequence[np.ndarray], purpose: str) -> None:
        MpiPending([self._broadcast(array, purpose) for array in arrays]).wait()

    def _broadcast(self, array: np.ndarray, purpose: str) -> MPI.Request:
        self.ledger.broadcast_bytes += array.nbytes
        self.ledger.add(purpose, array.nbytes if self.rank == 0 else 0, array.nbytes if self.rank else 0)
        return self.comm.Ibcast(_typed(array), root=0)

    def broadcast_value(self, value: Any = None, purpose: str = "orders") -> Any:
        words = pack(value).copy() if self.rank == 0 else None
        length = np.array([len(words) if words is not None else 0], np.int64)
        self.broadcast([length], purpose)
        buffer = words if words is not None else np.empty(length[0], WORD)
        self.broadcast([buffer], purpose)
        return unpack(buffer)

    def scatter(self, values: list[Any] | None, purpose: str) -> Any:
        blocks = [pack(value) for value in values] if values is not None else []
        assert self.rank != 0 or len(blocks) == self.size, (len(blocks), self.size)
        counts = np.array([len(block) for block in blocks], np.int64)
        mine = np.empty(1, np.int64)
        MpiPending([self.comm.Iscatter(counts if self.rank == 0 else None, mine, root=0)]).wait()
        buffer = np.empty(mine[0], WORD)
        send = [np.concatenate(blocks), counts, _starts(counts), MPI.UINT32_T] if self.rank == 0 else None
        MpiPending([self.comm.Iscatterv(send, _typed(buffer), root=0)]).wait()
        if self.rank:
            self.ledger.add(purpose, received=mine.nbytes + buffer.nbytes)
        for other, block in enumerate(blocks[1:], start=1):
            self._count_direct(other, mine.nbytes + block.nbytes, purpose)
        return unpack(buffer)

    def gather(self, value: Any, purpose: str) -> list[Any] | None:
        block = pack(value)
        mine = np.array([len(block)], np.int64)
        counts = np.empty(self.size, np.int64) if self.rank == 0 else None
        MpiPending([self.comm.Igather(mine, counts, root=0)]).wait()
        if self.rank:
            self._count_direct(0, mine.nbytes, purpose)
        else:
            self.ledger.add(purpose, received=(self.size - 1) * mine.nbytes)
        blocks = self.start_gather(block, purpose, counts).wait()
        return None if blocks is None else [unpack(block) for block in blocks]

    def start_gather(self, block: np.ndarray, purpose: str, words: Sequence[int] | None = None, room: np.ndarray | None = None) -> Pending:
        block = np.ascontiguousarray(block)
        if self.rank != 0:
            self._count_direct(0, block.nbytes, purpose)
            return MpiPending([self.comm.Igatherv(_typed(block), None, root=0)])
        counts = np.asarray(words, np.int64)
        buffer = np.empty(counts.sum(), WORD) if room is None else room[: counts.sum()]
        self.ledger.add(purpose, received=buffer.nbytes - block.nbytes)
        request = self.comm.Igatherv(_typed(block), [buffer, counts, _starts(counts), MPI.UINT32_T], root=0)
        return MpiPending([request], lambda: np.split(buffer, np.cumsum(counts)[:-1]))

    def start_send(self, array: np.ndarray, destination: int, purpose: str) -> Pending:
        self._count_direct(destination, array.nbytes, purpose)
        return MpiPending([self.comm.Isend(_typed(array), dest=destination)])

    def start_receive(self, array: np.ndarray, source: int, purpose: str) -> Pending:
        self.ledger.add(purpose, received=array.nbytes)
        return MpiPending([self.comm.Irecv(_typed(array), source=source)], lambda: array)

    def sum(self, array: np.ndarray) -> None:
        MpiPending([self.comm.Iallreduce(MPI.IN_PLACE, _typed(array), op=MPI.SUM)]).wait()
        self.ledger.add("sum", array.nbytes, array.nbytes)

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        self.comm.Abort(code)
        raise SystemExit(code)

    @property
    def library(self) -> str:
        """Name and version of the MPI library."""
        return MPI.Get_library_version().split(",")[0].strip()

    def _count_direct(self, destination: int, bytes_: int, purpose: str) -> None:
        self.ledger.direct[destination] += bytes_
        self.ledger.add(purpose, sent=bytes_)


def world(smallest: int) -> MpiTransport:
    """All ranks that the launcher started; MPI starts here."""
    if not MPI.Is_initialized():
        MPI.Init_thread()
    return MpiTransport(MPI.COMM_WORLD, smallest)


@cache
def _longest_sleep_seconds() -> float:
    ranks = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", MPI.COMM_WORLD.size))
    return LONGEST_SLEEP_SECONDS * max(1.0, ranks / len(os.sched_getaffinity(0)))


def _typed(array: np.ndarray) -> list:
    assert array.flags.c_contiguous, array.flags
    return [array, array.size, KINDS[array.dtype]]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)[:-1]])
