"""MPI transport: mpi4py's buffer collectives, waited for without eating the core.

Every collective is started in its non-blocking form and tested with growing sleeps, so that with
more ranks than cores the ranks that wait leave the cores to those that train. The only module that
imports mpi4py.
"""

from __future__ import annotations

import sys
import time
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from distfl.errors import TransportError
from distfl.transport.base import WORD, Ledger, Transport, pack, unpack

EAGER_TESTS = 50  # tests without sleep: what is under way on the same node is there by then
LONGEST_SLEEP_SECONDS = 2e-3


class MpiTransport(Transport):
    """Ranks of an MPI communicator.

    Raises:
        TransportError: fewer ranks than ``smallest``.
    """

    def __init__(self, comm: MPI.Intracomm, smallest: int):
        self.comm, self.rank, self.size, self.ledger = comm, comm.rank, comm.size, Ledger()
        if self.size < smallest:
            raise TransportError(
                f"at least {smallest} ranks",
                f"MPI started {self.size}",
                "start more: mpirun -n N distfl ... or distfl ... --ranks N; srun needs --mpi=pmix, else every task is a job",
            )

    def broadcast(self, array: np.ndarray) -> None:
        self._wait(self.comm.Ibcast(_typed(array), root=0))
        self.ledger.add("broadcast", array.nbytes if self.rank == 0 else 0, array.nbytes if self.rank else 0)

    def broadcast_value(self, value: Any = None) -> Any:
        words = pack(value) if self.rank == 0 else None
        length = np.array([len(words) if words is not None else 0], np.int64)
        self._wait(self.comm.Ibcast(length, root=0))
        buffer = words.copy() if words is not None else np.empty(length[0], WORD)
        self._wait(self.comm.Ibcast(_typed(buffer), root=0))
        moved = length.nbytes + buffer.nbytes
        self.ledger.add("broadcast_value", moved if self.rank == 0 else 0, moved if self.rank else 0)
        return unpack(buffer)

    def scatter(self, values: list[Any] | None = None) -> Any:
        blocks = [pack(value) for value in values] if values is not None else []
        assert self.rank != 0 or len(blocks) == self.size, (len(blocks), self.size)
        counts = np.array([len(block) for block in blocks], np.int64)
        mine = np.empty(1, np.int64)
        self._wait(self.comm.Iscatter(counts if self.rank == 0 else None, mine, root=0))
        buffer = np.empty(mine[0], WORD)
        send = [np.concatenate(blocks), counts, _starts(counts), MPI.UINT32_T] if self.rank == 0 else None
        self._wait(self.comm.Iscatterv(send, _typed(buffer), root=0))
        others = int(counts.sum() - mine[0]) * WORD.itemsize + (self.size - 1) * mine.nbytes if self.rank == 0 else 0
        self.ledger.add("scatter", others, mine.nbytes + buffer.nbytes if self.rank else 0)
        return unpack(buffer)

    def gather(self, value: Any) -> list[Any] | None:
        blocks = self._gather("gather", pack(value))
        return None if blocks is None else [unpack(block) for block in blocks]

    def gather_blocks(self, block: np.ndarray) -> list[np.ndarray] | None:
        return self._gather("gather_blocks", block)

    def _gather(self, verb: str, block: np.ndarray) -> list[np.ndarray] | None:
        mine = np.array([len(block)], np.int64)
        counts = np.empty(self.size, np.int64) if self.rank == 0 else None
        self._wait(self.comm.Igather(mine, counts, root=0))
        if self.rank != 0:
            self._wait(self.comm.Igatherv(_typed(np.ascontiguousarray(block)), None, root=0))
            self.ledger.add(verb, mine.nbytes + block.nbytes, 0)
            return None
        buffer = np.empty(int(counts.sum()), WORD)
        self._wait(self.comm.Igatherv(_typed(block), [buffer, counts, _starts(counts), MPI.UINT32_T], root=0))
        self.ledger.add(verb, 0, buffer.nbytes - block.nbytes + counts.nbytes - mine.nbytes)
        return np.split(buffer, np.cumsum(counts)[:-1])

    def sum(self, array: np.ndarray) -> None:
        self._wait(self.comm.Iallreduce(MPI.IN_PLACE, _typed(array), op=MPI.SUM))
        self.ledger.add("sum", array.nbytes, array.nbytes)

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        self.comm.Abort(code)
        raise SystemExit(code)

    @staticmethod
    def _wait(request: MPI.Request) -> None:
        tests, pause = 0, 2e-5
        while not request.Test():
            tests += 1
            if tests > EAGER_TESTS:
                time.sleep(pause)
                pause = min(pause * 1.5, LONGEST_SLEEP_SECONDS)


def world(smallest: int) -> MpiTransport:
    """All ranks that the launcher started."""
    return MpiTransport(MPI.COMM_WORLD, smallest)


def library() -> str:
    """Name and version of the MPI library."""
    return MPI.Get_library_version().split(",")[0].strip()


def _typed(array: np.ndarray) -> list:
    kinds = {"f": MPI.FLOAT, "u": MPI.UINT32_T, "i": MPI.INT32_T}
    assert array.itemsize == WORD.itemsize and array.flags.c_contiguous, (array.dtype, array.flags)
    return [array, array.size, kinds[array.dtype.kind]]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)[:-1]])
