"""The parent of a node's ranks: imports once, forks a rank for every launcher, watches both (see ``forking.py``)."""

from __future__ import annotations

import ctypes
import gc
import importlib
import marshal
import os
import select
import signal
import socket
import sys
from typing import Any

from distfl import allocator
from distfl.forking import LENGTH_BYTES, SECONDS_TO_ASK, peer_is_ours

SHARED_IMPORTS = ("distfl.cli", "distfl.running", "distfl.transport.mpi", "numpy.random", "torch.utils._device")
Handed = tuple[dict[str, Any], list[int]]  # what a launcher hands over: values, and streams with the working folder
SECONDS_BETWEEN_RANKS = 3  # a parent without ranks waits so long for a launcher that is still to come
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(listening: int, key: str) -> None:
    """Import once, fork ranks until none is left; returns in none of them."""
    for number in _open_files().keys() - {0, 1, 2, listening}:
        if os.get_inheritable(number):
            os.close(number)  # inherited through its launcher, which is one of many
    listener = socket.socket(fileno=listening)
    parent = Parent(listener, key, _prepare())
    try:
        forked = parent.serve()
    except BaseException:
        os._exit(1)  # its ranks die with it, and their launchers after them
    if forked is None:
        os._exit(0)
    request, streams = forked
    _become(request, streams)
    raise SystemExit(_call(request["entry"]))


def _prepare() -> str:
    """Import all that ranks share; returns what forbids to fork, if anything does."""
    try:
        for name in SHARED_IMPORTS:
            importlib.import_module(name)
        _rehearse()
    except BaseException as error:  # a rank that is started plainly will say more
        return f"{type(error).__name__}: {error}"
    allocator.exact_allocator()  # its free blocks are shared, too, until one is used
    gc.collect()
    gc.freeze()  # a collection in a rank would write to every object, and so copy it
    if len(os.listdir("/proc/self/task")) > 1:
        return "an import has started threads, which do not live in forked ranks"
    if any(name.startswith("/dev/nvidia") for name in _open_files().values()):
        return "an import has opened the GPU, which forked ranks cannot use"
    return ""


def _rehearse() -> None:
    """What every rank does first, once for all: what is made at the first use and lives on is shared then.

    A backward pass looks for GPUs where PyTorch is built with CUDA; there a part of it stays each rank's own.
    """
    import torch

    from distfl import settings
    from distfl.cli import command_line
    from distfl.config import TrainConfig
    from distfl.hosting import rank_state, rehearse
    from distfl.model import ModelSpec

    command_line()
    fleet = {"groups": [{"name": "", "memory_mb": 1, "count": 1}]}
    config = settings.from_dict(TrainConfig, {"fleet": fleet, "training": {"steps": 1, "batch": 2, "learning_rate": 1.0}})
    torch.set_num_threads(1)  # more of them would be started now, and not live in the ranks
    state = rank_state(None, config, ModelSpec(2, 64, 2, 32, 512), _Shards())
    if not torch.backends.cuda.is_built():
        rehearse(state)


class _Shards:
    """A client's data that lies in no file."""

    def train(self, client: int, context: int):
        import numpy as np

        from distfl.shards import TOKEN, Sequences

        return Sequences(np.zeros(4 * context, TOKEN), context)


def _open_files() -> dict[int, str]:
    """Names of this process's open files, by descriptor."""
    names = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            names[number] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # that of the listing itself
            pass
    return names


class Parent:
    """The process that ranks are forked from.

    Args:
        forbidden: why it may not fork; then every launcher is told to go on by itself.
    """

    def __init__(self, listener: socket.socket, key: str, forbidden: str):
        self._listener, self._key, self._forbidden = listener, key, forbidden
        self._launchers: dict[int, socket.socket] = {}  # by the process id of their ranks
        self._poll = select.poll()
        self._expected = self._served = 0
        self._pid = os.getpid()

    def serve(self) -> Handed | None:
        """Fork ranks and watch them and their launchers.

        Returns:
            In a rank what was handed over to it; in the parent None, when the last rank has ended.
        """
        woken, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        for number in (self._listener.fileno(), woken):
            self._poll.register(number, select.POLLIN)
        while self._launchers or self._served < self._expected or not self._served:
            ready = self._poll.poll(None if self._launchers else SECONDS_BETWEEN_RANKS * 1000)
            if not ready:
                break  # launchers that have died before they came
            for number, _ in ready:
                if number == self._listener.fileno():
                    if (handed := self._welcome()) is not None:
                        os.close(woken)
                        os.close(waking)
                        return handed
                elif number == woken:
                    os.read(woken, 4096)
                    self._reap()
                else:
                    self._hear(number)
        return None

    def _welcome(self) -> Handed | None:
        """Fork a rank for the next launcher; returns in the rank what it is to be."""
        launcher, _ = self._listener.accept()
        self._served += 1
        handed = _receive(launcher) if peer_is_ours(launcher) else None
        if handed is None:
            launcher.close()
            return None
        request, streams = handed
        self._expected = int(request["environment"].get(b"OMPI_COMM_WORLD_LOCAL_SIZE", b"0"))
        refused = self._forbidden or ("" if request["key"] == self._key else "their parent was started otherwise")
        rank = 0
        if not refused:
            try:
                rank = self._fork(request["cores"])
            except OSError as error:
                refused = str(error)
        if not refused and rank == 0:
            _die_with(self._pid)
            self._listener.close()
            for other in (launcher, *self._launchers.values()):
                other.close()
            return handed
        for number in streams:
            os.close(number)
        if refused:
            _tell(launcher, refused)
            launcher.close()
            return None
        _tell(launcher, "started")
        self._launchers[rank] = launcher
        self._poll.register(launcher.fileno(), select.POLLIN)
        return None

    def _fork(self, cores: list[int]) -> int:
        """Fork a rank that may run on its launcher's cores; where these are not ours to give (a group of its own) no rank."""
        own = os.sched_getaffinity(0)
        if cores == sorted(own):
            return os.fork()
        try:
            os.sched_setaffinity(0, cores)
            if sorted(os.sched_getaffinity(0)) != cores:
                raise OSError("this rank has cores that its node's parent may not use")
            return os.fork()
        finally:
            if os.getpid() == self._pid:
                os.sched_setaffinity(0, own)

    def _hear(self, number: int) -> None:
        """A launcher passes a signal on, or has ended before its rank."""
        rank, launcher = next(((rank, one) for rank, one in self._launchers.items() if one.fileno() == number), (0, None))
        if launcher is None:  # reaped a moment ago
            return
        try:
            signals = launcher.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:  # meant for one that was reaped a moment ago, whose number it has taken
            return
        except OSError:
            signals = b""
        if not signals:
            self._poll.unregister(number)
        for one in signals or [signal.SIGKILL]:
            os.kill(rank, one)  # it is not reaped yet: the number is its own

    def _reap(self) -> None:
        """Tell the launchers of ranks that have ended how they ended."""
        while self._launchers:
            rank, status = os.waitpid(-1, os.WNOHANG)
            if rank == 0:
                return
            if (launcher := self._launchers.pop(rank, None)) is not None:
                _tell(launcher, str(os.waitstatus_to_exitcode(status)))
                try:
                    self._poll.unregister(launcher.fileno())
                except KeyError:  # the launcher had ended before
                    pass
                launcher.close()


def _tell(launcher: socket.socket, word: str) -> None:
    try:
        launcher.sendall(f"{word}\n".encode())
    except OSError:  # it has ended; the connection says so, too
        pass


def _receive(launcher: socket.socket) -> Handed | None:
    """What a launcher hands over, and its open files; None if it ends before."""
    launcher.settimeout(SECONDS_TO_ASK)
    streams: list[int] = []
    try:
        head, streams, _, _ = socket.recv_fds(launcher, LENGTH_BYTES, 4)
        with launcher.makefile("rb") as stream:
            length = int.from_bytes(head, "little")
            words = stream.read(length)
        launcher.settimeout(None)
        if length and len(words) == length and len(streams) == 4:
            return marshal.loads(words), streams
    except OSError:
        pass
    for number in streams:
        os.close(number)
    return None


# --- the rank --------------------------------------------------------------------------------


def _die_with(parent: int) -> None:
    """A rank whose parent is killed must not train on as an orphan."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Make this process what its launcher is."""
    for place, number in enumerate(streams[:3]):  # first: from here on a traceback is seen
        os.dup2(number, place)
    os.fchdir(streams[3])
    for number in streams:
        os.close(number)
    _open_streams()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.setpgid(0, 0)
    _take_environment(request["environment"])
    os.environ.update(allocator.environment())  # what the parent was started with
    sys.argv, sys.orig_argv = request["arguments"], request["original"]
    os.umask(request["umask"])


def _take_environment(wanted: dict[bytes, bytes]) -> None:
    """Change only what differs from the parent's: pages that are not written to stay shared."""
    for name in os.environb.keys() - wanted.keys():
        del os.environb[name]
    for name, value in wanted.items():
        if os.environb.get(name) != value:
            os.environb[name] = value


def _open_streams() -> None:
    """Python's own view of the standard streams, as at its start."""
    sys.stdin = sys.__stdin__ = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        new = open(number, "w", encoding=old.encoding, errors=old.errors, closefd=False)
        new.reconfigure(line_buffering=number == 2 or new.isatty(), write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def _call(entry: str) -> int:
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)()
