"""torch.distributed transport: gloo among all ranks, NCCL beside it where every rank has a GPU of its own.

Messages between two ranks (scatter, gather, sends) always go by gloo: several of them are under way at once, to and from
the same rank, and NCCL, which works them off in the order of a GPU stream, would wait for ever where two ranks send to
one another. Broadcasts of arrays and sums go by NCCL where it is used, staged through the rank's GPU.

The only module of a rank that imports torch.distributed.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from distfl import launching
from distfl.errors import RankLost, TransportError
from distfl.transport.base import WORD, Arrived, Ledger, Pending, Transport, pack, unpack

MEETING_SECONDS = 300
# A client may train for as long as it likes, so that waiting has no limit of its own: a rank that ends closes its connections,
# and that is seen at once. torch's 30 minutes would end jobs that are well.
LONGEST_WAIT = timedelta(days=365)
FAREWELL_SECONDS = 60
_SCATTER, _GATHER, _SEND = 1, 2, 3  # tags: these three do not overtake one another's order


class _Waiter:
    """Waits in a thread of its own, so that a signal reaches the thread that asked, and the process can end meanwhile."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[Callable[[], Any], Future]] = SimpleQueue()
        threading.Thread(target=self._serve, name="transport", daemon=True).start()

    def start(self, blocking: Callable[[], Any]) -> Future:
        """Call it, after all that was started before."""
        future: Future = Future()
        self._asked.put((blocking, future))
        return future

    def _serve(self) -> None:
        while True:
            blocking, future = self._asked.get()
            try:
                future.set_result(blocking())
            except Exception as error:
                future.set_exception(error)


class TorchPending:
    """A transfer, which gloo moves on in a thread of its own."""

    def __init__(self, waiter: _Waiter, start: Callable[[], dist.Work], bring: Callable[[], Any] = lambda: None):
        with _broken_connections():
            self._work = start()
        self._waiter, self._bring = waiter, bring

    def wait(self) -> Any:
        with _broken_connections():
            self._waiter.start(self._work.wait).result()
        return self._bring()

    def advance(self) -> None:
        pass


class TorchTransport(Transport):
    """All ranks that torchrun, or srun with MASTER_ADDR and MASTER_PORT, started.

    Args:
        backend: "auto", "gloo" or "nccl"; that of rank 0 counts.

    Raises:
        TransportError: fewer ranks than ``smallest``, ranks that do not come, or NCCL where it cannot be used.
    """

    name = "torch"

    def __init__(self, smallest: int, backend: str = "auto"):
        self.rank, self.size = launching.launched_rank(), launching.launched_size()
        if self.size < smallest:
            raise TransportError(
                f"at least {smallest} ranks", f"{self.size} was started", "start more: torchrun --nproc-per-node N, or distfl ... --ranks N"
            )
        self._waiter = _Waiter()
        dist.init_process_group("gloo", store=_meet(self.rank, self.size), rank=self.rank, world_size=self.size, timeout=LONGEST_WAIT)
        self.ledger = Ledger()
        self._device, self._group = self._choose(backend)
        self.ledger = Ledger()  # what it took to choose is not the run's

    def _choose(self, backend: str) -> tuple[torch.device | None, dist.ProcessGroup | None]:
        """Where broadcasts and sums are staged, and the group that moves them; (None, None): by gloo from where they are."""
        backend = self.broadcast_value(backend, "start")
        if backend == "gloo":
            return None, None
        device, identity = _gpu()
        places = self.gather([socket.gethostname(), identity], "start")
        reason = self.broadcast_value(places and why_not_nccl(places), "start")
        if not reason:
            torch.cuda.set_device(device)
            return device, dist.new_group(backend="nccl", timeout=LONGEST_WAIT)
        if backend == "nccl":
            dist.destroy_process_group()
            raise TransportError("transport.backend = nccl", reason, "start one rank per GPU, or set transport.backend=auto")
        return None, None

    @property
    def library(self) -> str:
        """What moves the bytes."""
        return f"{'gloo' if self._device is None else 'gloo and nccl'} of torch {torch.__version__}"

    def broadcast(self, arrays: Sequence[np.ndarray], purpose: str) -> None:
        for pending in [self._broadcast(array, purpose, self._device) for array in arrays]:
            pending.wait()

    def _broadcast(self, array: np.ndarray, purpose: str, device: torch.device | None = None) -> Pending:
        self.ledger.broadcast_bytes += array.nbytes
        self.ledger.add(purpose, array.nbytes if self.rank == 0 else 0, array.nbytes if self.rank else 0)
        if not array.size:
            return Arrived()
        tensor = _tensor(array)
        if device is None:
            return self._pending(lambda: dist.broadcast(tensor, 0, async_op=True))
        staged = tensor.to(device, copy=True)
        return self._pending(lambda: dist.broadcast(staged, 0, self._group, async_op=True), lambda: tensor.copy_(staged))

    def broadcast_value(self, value: Any = None, purpose: str = "orders") -> Any:
        words = pack(value).copy() if self.rank == 0 else None
        length = np.array([len(words) if words is not None else 0], np.int64)
        self._broadcast(length, purpose).wait()
        buffer = words if words is not None else np.empty(length[0], WORD)
        self._broadcast(buffer, purpose).wait()
        return unpack(buffer)

    def scatter(self, values: list[Any] | None, purpose: str) -> Any:
        if self.rank:
            buffer = np.empty(self._receive(np.empty(1, np.int64), 0, _SCATTER, purpose).wait()[0], WORD)
            return unpack(self._receive(buffer, 0, _SCATTER, purpose).wait())
        assert len(values) == self.size, (len(values), self.size)
        sent = []
        for other, value in enumerate(values[1:], start=1):
            block = pack(value)
            sent += [self._send(part, other, _SCATTER, purpose) for part in (np.array([len(block)], np.int64), block)]
        for pending in sent:
            pending.wait()
        return unpack(pack(values[0]))

    def gather(self, value: Any, purpose: str) -> list[Any] | None:
        block = pack(value)
        mine = np.array([len(block)], np.int64)
        if self.rank:
            self._send(mine, 0, _GATHER, purpose).wait()
            return self.start_gather(block, purpose).wait()
        lengths = [self._receive(np.empty(1, np.int64), other, _GATHER, purpose) for other in range(1, self.size)]
        counts = [len(block), *(int(length.wait()[0]) for length in lengths)]
        return [unpack(block) for block in self.start_gather(block, purpose, counts).wait()]

    def start_gather(self, block: np.ndarray, purpose: str, words: Sequence[int] | None = None, room: np.ndarray | None = None) -> Pending:
        if self.rank:
            return self._send(np.ascontiguousarray(block), 0, _GATHER, purpose)
        coming = [self._receive(np.empty(words[other], WORD), other, _GATHER, purpose) for other in range(1, self.size)]
        return _Several([Arrived(block.copy()), *coming])

    def start_send(self, array: np.ndarray, destination: int, purpose: str) -> Pending:
        return self._send(array, destination, _SEND, purpose)

    def start_receive(self, array: np.ndarray, source: int, purpose: str) -> Pending:
        return self._receive(array, source, _SEND, purpose)

    def sum(self, array: np.ndarray) -> None:
        tensor = _tensor(array)
        staged = tensor if self._device is None else tensor.to(self._device)
        self._pending(lambda: dist.all_reduce(staged, group=self._group, async_op=True), lambda: tensor.copy_(staged)).wait()
        self.ledger.add("sum", array.nbytes, array.nbytes)

    def leave(self, code: int) -> int:
        """The server goes last and only its code counts: a launcher ends all ranks as soon as one exits with anything but 0."""
        if self.rank:
            # gloo's threads do not survive the end of the interpreter in good order; and the system shall close the connections
            atexit.register(os._exit, 0)
            return 0
        wait([self._waiter.start(partial(_until_it_ends, other)) for other in range(1, self.size)], FAREWELL_SECONDS)
        dist.destroy_process_group()
        return code

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # whoever started the ranks ends the others, and they see their connections closed

    def _send(self, array: np.ndarray, destination: int, tag: int, purpose: str) -> Pending:
        self.ledger.direct[destination] += array.nbytes
        self.ledger.add(purpose, sent=array.nbytes)
        return self._pending(lambda: dist.isend(_tensor(array), destination, tag=tag)) if array.size else Arrived()

    def _receive(self, array: np.ndarray, source: int, tag: int, purpose: str) -> Pending:
        self.ledger.add(purpose, received=array.nbytes)
        return self._pending(lambda: dist.irecv(_tensor(array), source, tag=tag), lambda: array) if array.size else Arrived(array)

    def _pending(self, start: Callable[[], dist.Work], bring: Callable[[], Any] = lambda: None) -> TorchPending:
        return TorchPending(self._waiter, start, bring)


class _Several:
    """Transfers whose results belong into one list."""

    def __init__(self, parts: list[Pending]):
        self._parts = parts

    def wait(self) -> list[Any]:
        return [part.wait() for part in self._parts]

    def advance(self) -> None:
        pass


@contextmanager
def _broken_connections() -> Iterator[None]:
    """Errors of gloo, which have no type of their own, as RankLost."""
    try:
        yield
    except RuntimeError as error:
        found = f"the connection to a rank broke: {error}"
        raise RankLost("a transfer between ranks", found, "see what that rank said, then continue with --resume") from None


def _until_it_ends(rank: int) -> None:
    """Nothing is sent to this receive: it fails when the system closes the connections of a rank that has ended."""
    with suppress(RuntimeError):
        dist.irecv(torch.empty(1), rank, tag=_SEND).wait()


def _meet(rank: int, size: int) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, once all ranks have come there (raises TransportError)."""
    patience, here = timedelta(seconds=MEETING_SECONDS), [f"distfl/{other}" for other in range(size)]
    place = f"{size} ranks at MASTER_ADDR:MASTER_PORT = {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # torch would try for as long as it has patience
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=patience))
        store.set(here[rank], "")
    except (OSError, dist.DistError) as error:
        raise TransportError(place, str(error).splitlines()[0], "let it name rank 0's host and a port that is free there") from None
    try:
        store.wait(here, patience)
    except dist.DistStoreError:
        missing = [other for other, key in enumerate(here) if not store.check([key])]
        raise TransportError(place, f"ranks {missing} have not come within {MEETING_SECONDS} s", "see why they have not started") from None
    return store


def _gpu() -> tuple[torch.device | None, str | None]:
    """The GPU that this rank would use, and what tells it from all others; (None, None) where there is none for NCCL."""
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return None, None
    device = torch.device("cuda", launching.local_rank() % torch.cuda.device_count())
    return device, str(torch.cuda.get_device_properties(device).uuid)


def why_not_nccl(places: Sequence[tuple[str, str | None]]) -> str:
    """What keeps the ranks from using NCCL; empty where nothing does.

    Args:
        places: every rank's host, and which GPU is its own.
    """
    for rank, (host, gpu) in enumerate(places):
        if gpu is None:
            return f"rank {rank} on {host} has no GPU that its torch can use with NCCL"
        if (first := [of for _, of in places].index(gpu)) != rank:
            return f"ranks {first} and {rank} on {host} would share a GPU"
    return ""


def _tensor(array: np.ndarray) -> torch.Tensor:
    """The array's own memory; a copy of it where it cannot be written, for torch knows no such tensors."""
    assert array.flags.c_contiguous, array.flags
    words = array.view(np.int32) if array.dtype == WORD else array  # gloo has no unsigned integers
    return torch.from_numpy(words if words.flags.writeable else words.copy())
