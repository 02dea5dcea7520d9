"""MPI transport: mpi4py's buffer collectives, waited for without eating the core.

Every transfer is started in its non-blocking form and tested with growing sleeps, so that with
more ranks than cores the ranks that wait leave the cores to those that train. The only module that
imports mpi4py. MPI itself starts in ``world``: this module may be loaded before a rank is forked.

*Losses.* Where the MPI library reports dead ranks (ULFM: Open MPI under ``mpirun --with-ft ulfm``), every verb raises RankLost once
a rank that it needs has died, or another rank has seen that. ``recover`` then brings all living ranks together: whoever comes first
revokes the communicator, so that nobody goes on waiting in it; each rank tells the server that it has come, on the control
communicator, and waits for its word, asleep; then both communicators are shrunk, which is short, for all are there. A run ends
in the same way, because MPI's own end may wait for a dead rank: the ranks meet, and each ends without it.

Buffers of transfers that a loss has cut short are kept for good: the library may still read or write them.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import mpi4py
import numpy as np

mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
from mpi4py import MPI  # noqa: E402

from distfl.errors import RankLost, TransportError  # noqa: E402
from distfl.launching import end_daemon_later, mpi_reports_losses, mpirun_path  # noqa: E402
from distfl.messages import Place  # noqa: E402
from distfl.transport.base import WORD, Dismissed, Ledger, Pending, Transport, pack, unpack  # noqa: E402
from distfl.transport.control import Control, Watch  # noqa: E402

EAGER_TESTS = 50  # tests without sleep: what is under way on the same node is there by then
SHORTEST_SLEEP_SECONDS = 2e-5
SLEEP_OF_WAITED = 1 / 20  # of the time waited so far: so much later at most than it could is a transfer noticed
LONGEST_SLEEP_SECONDS = 1e-3  # with a core for each rank; more ranks sleep longer, so that all tests together cost the same
ATTENTION_SECONDS = 0.05  # between two looks at the control communicator
MEETING_SECONDS = 600  # where MPI reports dead ranks nobody ends the others if one dies before MPI has started in all
BTL = "OMPI_MCA_btl"  # which of Open MPI's byte transfer layers there are to be
UNHEARD = -1  # in place of a length
GO_ON, STOPPED, FINISHED = 0, 1, 2  # what the server says to those who have come
KINDS = {
    np.dtype(np.float32): MPI.FLOAT,
    np.dtype(np.int32): MPI.INT32_T,
    np.dtype(np.int64): MPI.INT64_T,
    WORD: MPI.UINT32_T,
}


class MpiPending:
    """One request.

    Args:
        buffers: what the library may use until it is done, whatever becomes of this object.
    """

    def __init__(self, transport: MpiTransport, purpose: str, start: Callable[[], MPI.Request], buffers: Any, bring: Callable[[], Any]):
        self._transport, self._purpose, self._buffers, self._bring = transport, purpose, buffers, bring
        with transport.losses(purpose):
            self._request = start()
        transport.under_way.add(self)

    def wait(self) -> Any:
        for _ in range(EAGER_TESTS):
            if self._is_done():
                return self._bring()
        self._transport.waits_since = began = time.monotonic()
        longest = _longest_sleep_seconds()
        while not self._is_done():
            waited = time.monotonic() - began
            time.sleep(min(longest, max(SHORTEST_SLEEP_SECONDS, waited * SLEEP_OF_WAITED)))
            self._transport.attend(self._purpose)
        return self._bring()

    def advance(self) -> None:
        self._is_done()

    def _is_done(self) -> bool:
        with self._transport.losses(self._purpose):
            is_done = self._request.Test()
        if is_done:
            self._transport.under_way.discard(self)
        return is_done


class MpiTransport(Transport):
    """Ranks of an MPI communicator.

    Args:
        recovers: the library reports dead ranks.

    Raises:
        TransportError: fewer ranks than ``smallest``.
    """

    name = "mpi"

    def __init__(self, comm: MPI.Intracomm, smallest: int, recovers: bool = False):
        self.comm, self.rank, self.size, self.ledger, self.recovers = comm, comm.rank, comm.size, Ledger(), recovers
        if self.size < smallest:
            raise TransportError(
                f"at least {smallest} ranks",
                f"MPI started {self.size}",
                "start more: mpirun -n N distfl ... or distfl ... --ranks N; srun needs --mpi=pmix, else every task is a job",
            )
        self.under_way: set[MpiPending] = set()
        self.numbers = list(range(self.size))
        self._everybody = comm.group
        self._kept: list[MpiPending] = []  # what a loss has cut short
        self._control = Control(comm.Dup(), self.numbers) if recovers else None
        self.waits_since = self._looked = 0.0
        self._broken = self._has_parted = False

    # --- the verbs

    def broadcast(self, arrays: Sequence[np.ndarray], purpose: str) -> None:
        for pending in [self._broadcast(array, purpose) for array in arrays]:
            pending.wait()

    def _broadcast(self, array: np.ndarray, purpose: str) -> Pending:
        self.ledger.broadcast_bytes += array.nbytes
        self.ledger.add(purpose, array.nbytes if self.rank == 0 else 0, array.nbytes if self.rank else 0)
        return self._start(purpose, lambda: self.comm.Ibcast(_typed(array), root=0), array)

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
        lengths = counts if self.rank == 0 else None
        self._start(purpose, lambda: self.comm.Iscatter(lengths, mine, root=0), (lengths, mine)).wait()
        buffer = np.empty(mine[0], WORD)
        send = [np.concatenate(blocks), counts, _starts(counts), MPI.UINT32_T] if self.rank == 0 else None
        self._start(purpose, lambda: self.comm.Iscatterv(send, _typed(buffer), root=0), (send, buffer)).wait()
        if self.rank:
            self.ledger.add(purpose, received=mine.nbytes + buffer.nbytes)
        for other, block in enumerate(blocks[1:], start=1):
            self._count_direct(other, mine.nbytes + block.nbytes, purpose)
        return unpack(buffer)

    def gather(self, value: Any, purpose: str) -> list[Any] | None:
        block = pack(value)
        mine = np.array([len(block)], np.int64)
        counts = np.full(self.size, UNHEARD) if self.rank == 0 else None
        try:
            self._start(purpose, lambda: self.comm.Igather(mine, counts, root=0), (mine, counts)).wait()
        except RankLost as error:
            if counts is not None:  # the library fills it rank by rank
                error.answered = frozenset(number for number, count in zip(self.numbers, counts) if count != UNHEARD)
            raise
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
            return self._start(purpose, lambda: self.comm.Igatherv(_typed(block), None, root=0), block)
        counts = np.asarray(words, np.int64)
        buffer = np.empty(counts.sum(), WORD) if room is None else room[: counts.sum()]
        self.ledger.add(purpose, received=buffer.nbytes - block.nbytes)
        into = [buffer, counts, _starts(counts), MPI.UINT32_T]
        bring = lambda: np.split(buffer, np.cumsum(counts)[:-1])  # noqa: E731
        return self._start(purpose, lambda: self.comm.Igatherv(_typed(block), into, root=0), (block, into), bring)

    def start_send(self, array: np.ndarray, destination: int, purpose: str) -> Pending:
        self._count_direct(destination, array.nbytes, purpose)
        return self._start(purpose, lambda: self.comm.Isend(_typed(array), dest=destination), array)

    def start_receive(self, array: np.ndarray, source: int, purpose: str) -> Pending:
        self.ledger.add(purpose, received=array.nbytes)
        return self._start(purpose, lambda: self.comm.Irecv(_typed(array), source=source), array, lambda: array)

    def sum(self, array: np.ndarray) -> None:
        self._start("sum", lambda: self.comm.Iallreduce(MPI.IN_PLACE, _typed(array), op=MPI.SUM), array).wait()
        self.ledger.add("sum", array.nbytes, array.nbytes)

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        if self.recovers:
            end_daemon_later()
        if self.recovers and self.size == 1:  # nobody is left to end, and mpirun would end with 0
            os._exit(code)
        MPI.COMM_WORLD.Abort(code)
        raise SystemExit(code)

    @property
    def library(self) -> str:
        """Name and version of the MPI library."""
        return MPI.Get_library_version().split(",")[0].strip()

    def _start(self, purpose: str, start: Callable[[], MPI.Request], buffers: Any, bring: Callable[[], Any] = lambda: None) -> Pending:
        return MpiPending(self, purpose, start, buffers, bring)

    def _count_direct(self, destination: int, bytes_: int, purpose: str) -> None:
        self.ledger.direct[self.numbers[destination]] += bytes_
        self.ledger.add(purpose, sent=bytes_)

    # --- losses

    @contextmanager
    def losses(self, purpose: str) -> Iterator[None]:
        """Errors of the library as RankLost, where that is what they mean."""
        try:
            yield
        except MPI.Exception as error:
            if not self.recovers:
                raise
            self._broken = True
            raise _loss(str(error), purpose) from None

    def attend(self, purpose: str = "") -> None:
        if not self.recovers or time.monotonic() - self._looked < ATTENTION_SECONDS:
            return
        self._looked = time.monotonic()
        with self.losses(purpose):
            if self.rank == 0:
                self._control.call_roll(self.waits_since)
            else:
                self._control.answer()
            if self.comm.Is_revoked():
                raise _loss("another rank has seen it", purpose)

    def watch(self, places: list[Place], deadline_seconds: float, grace_seconds: float) -> None:
        if self.recovers:
            self._control.watch = Watch(places, deadline_seconds, grace_seconds)

    def recover(self) -> list[int]:
        before = self.numbers
        self._kept += self.under_way
        self.under_way.clear()
        met = False
        while not met:
            self.comm.Revoke()
            self._meet(GO_ON)
            self.comm, self._control = self.comm.Shrink(), self._control.shrunk(self._everybody)
            met = self.comm.size == self._control.comm.size  # else one has died in between
        self.rank, self.size, self._broken = self.comm.rank, self.comm.size, False
        self.numbers = self.comm.group.Translate_ranks(None, self._everybody)
        if self.size == 1:
            raise _loss("no client rank is left")
        return sorted({*before} - {*self.numbers})

    def part(self, finished: bool) -> None:
        if not self.recovers:
            return
        if self._broken:
            self.comm.Revoke()  # whoever could not hear that the run ends comes now, too
        self._meet(FINISHED if finished else STOPPED)
        self._has_parted = True

    def leave(self, code: int) -> int:
        if self._has_parted:  # MPI's own end may wait for ever for a rank that has died
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    def _meet(self, word: int) -> None:
        """All living ranks come together, the server says the word.

        Raises:
            RankLost: the server is dead.
            Dismissed: it has said that the run ends, but this rank is still in it.
        """
        if self.rank == 0:
            self._control.welcome(word)
            return
        said = self._control.come()
        if said is None:
            raise _loss("the server rank is gone")
        if said != word:
            self._has_parted = True
            raise Dismissed(said == FINISHED)


def world(smallest: int) -> MpiTransport:
    """All ranks that the launcher started; MPI starts here."""
    reports = mpi_reports_losses()
    if not MPI.Is_initialized():
        _leave_out_ofi()
        if reports:
            faulthandler.dump_traceback_later(MEETING_SECONDS, exit=True)
        MPI.Init_thread()
        faulthandler.cancel_dump_traceback_later()
    return MpiTransport(MPI.COMM_WORLD, smallest, reports)


def _leave_out_ofi() -> None:
    """Have Open MPI start a second earlier: its BTL over libfabric sleeps for that long when it closes, as it does wherever it is of
    no use. Messages take its MTL there, and nothing here is one-sided. Whoever chooses BTLs is obeyed."""
    if not any(re.search(r"^\s*btl\s*=", file.read_text(), re.MULTILINE) for file in _parameter_files() if file.is_file()):
        os.environ.setdefault(BTL, "^ofi")


def _parameter_files() -> list[Path]:
    """Where Open MPI looks for parameters that are not in the environment."""
    name = "openmpi-mca-params.conf"
    files = [Path(os.path.expanduser("~/.openmpi/mca-params.conf")), Path("/etc/openmpi", name)]
    with suppress(TransportError):
        files.append(Path(mpirun_path()).parents[1] / "etc" / name)
    return files


def _loss(found: str, purpose: str = "") -> RankLost:
    return RankLost("a transfer between ranks", found, "continue with --resume", purpose)


@cache
def _longest_sleep_seconds() -> float:
    ranks = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", MPI.COMM_WORLD.size))
    return LONGEST_SLEEP_SECONDS * max(1.0, ranks / len(os.sched_getaffinity(0)))


def _typed(array: np.ndarray) -> list:
    assert array.flags.c_contiguous, array.flags
    return [array, array.size, KINDS[array.dtype]]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)[:-1]])
