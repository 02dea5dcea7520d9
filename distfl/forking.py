"""The forking start: ranks that share one set of imports on each node.

What mpirun starts for each rank is a *launcher* that imports nothing heavy. The first one of a node and job starts the
*parent*, which imports torch and loads the MPI library without initialising it; then it forks a *rank* for every launcher,
and MPI starts in that. The launcher hands over all that makes a process this rank (environment, arguments, working
folder, standard streams, limits), passes signals on, and ends as the rank ends.

Nobody outlives the others: a launcher that dies is seen by the parent at the end of their connection, and its rank is killed;
ranks die with the parent; a launcher whose parent is gone ends by SIGKILL; the parent goes with its last rank. The socket's name
is in Linux's abstract namespace: it belongs to whoever binds it first, and no file can be left behind.

Wherever no rank can be forked the launcher goes on as the rank, as if started plainly. So this module imports next to
nothing: 64 launchers run it on the cores that the parent needs.
"""

from __future__ import annotations

import marshal
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

START = "DISTFL_START"  # fork | plain, for every rank
JOB = ("PMIX_NAMESPACE", "PMIX_SERVER_URI2")  # the first is there under Open MPI's mpirun and under srun --mpi=pmix
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_LOCAL_SIZE")
DECIDED_AT_START = ("GLIBC_TUNABLES", "DISTFL_THREADS", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")  # the parent's hold for its ranks
PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
SHARED_IMPORTS = ("distfl.cli", "distfl.running", "distfl.transport.mpi", "numpy.random", "torch.utils._device")
TRIES = 5  # a parent may be about to end, or be killed
SECONDS_TO_ASK = 30
SECONDS_BETWEEN_RANKS = 3  # a parent without ranks waits so long for a launcher that is still to come
KINDS_OF_LIMITS = 16  # RLIM_NLIMITS of Linux
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LENGTH_BYTES = 4


def is_asked_for() -> bool:
    """Whether this process is to be a launcher: it was started as a rank, and its environment says so."""
    return os.environ.get(START) == "fork" and JOB[0] in os.environ and sys.platform == "linux"


# --- the launcher's half ---------------------------------------------------------------------


def launch(entry: str) -> int | None:
    """Have this rank forked, and wait for its end.

    Args:
        entry: ``module:function`` that is called in the rank; what it returns is the exit code.

    Returns:
        The rank's exit code, after its signal was suffered here too; None where no rank could be forked.
    """
    for _ in range(TRIES):
        connection = None
        try:
            connection = _connect()
            _hand_over(connection, entry)
            answers = connection.makefile("rb")
            word = answers.readline()
        except OSError:
            word = b""
        if word == b"started\n":
            return _wait(connection, answers)
        if connection is not None:
            connection.close()
        if word:  # refused
            return None
    return None


def _key() -> str:
    """What a rank must have in common with the parent that it is forked from."""
    return repr(
        [
            *(os.environ.get(name, "") for name in (*JOB, *DECIDED_AT_START)),
            *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "mnt")),
            sys.executable,
            __file__,
        ]
    )


def _connect() -> socket.socket:
    """A connection to the parent, which is started if there is none."""
    key = _key()
    address = f"\0distfl-{os.getuid()}-{_checksum(key):08x}"
    deadline = time.monotonic() + SECONDS_TO_ASK
    while time.monotonic() < deadline:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            if _peer_is_ours(connection):
                return connection
            break
        except ConnectionRefusedError:
            connection.close()
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(address)
            except OSError:  # another launcher was first, and may not listen yet
                time.sleep(0.005)
                continue
            listener.listen(1024)
            _start_parent(listener, key)
    raise ConnectionRefusedError


def _checksum(key: str) -> int:
    import zlib

    return zlib.crc32(key.encode(errors="surrogateescape"))


def _peer_is_ours(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # pid, uid, gid
    return int.from_bytes(credentials[4:8], sys.byteorder) == os.getuid()


def _start_parent(listener: socket.socket, key: str) -> None:
    """In a session of its own: what is sent to a rank's process group is not meant for all ranks."""
    from distfl import allocator

    listener.set_inheritable(True)
    command = f"import sys; sys.path[:] = {sys.path!r}; from distfl import forking; forking.be_parent({listener.fileno()}, {key!r})"
    streams = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]
    # NumPy's library would make its threads when it is loaded
    environment = os.environ | allocator.environment() | {"OPENBLAS_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", command, "distfl-parent-of-ranks"]
    defaults = [number for number in PASSED_ON if number != signal.SIGCONT]
    os.posix_spawn(sys.executable, arguments, environment, file_actions=streams, setsid=True, setsigmask=[], setsigdef=defaults)


def _hand_over(connection: socket.socket, entry: str) -> None:
    """Send what makes a process this rank."""
    import resource

    umask = os.umask(0o077)
    os.umask(umask)
    request = {
        "key": _key(),
        "entry": entry,
        "environment": dict(os.environb),
        "arguments": sys.argv,
        "original": sys.orig_argv,
        "umask": umask,
        "cores": list(os.sched_getaffinity(0)),
        "limits": {number: resource.getrlimit(number) for number in range(KINDS_OF_LIMITS)},
        "ignored": [int(number) for number in PASSED_ON if signal.getsignal(number) is signal.SIG_IGN],
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    }
    words = marshal.dumps(request)
    folder = os.open(".", os.O_RDONLY)
    try:
        socket.send_fds(connection, [len(words).to_bytes(_LENGTH_BYTES, "little")], [0, 1, 2, folder])
        connection.sendall(words)
    finally:
        os.close(folder)


def _wait(connection: socket.socket, answers: Any) -> int:
    """Pass signals on until the rank has ended; end like it."""

    def pass_on(number: int, _frame: object) -> None:
        try:
            connection.send(bytes([number]))
        except OSError:  # it has ended
            pass

    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    try:
        answer = answers.readline()
    except OSError:
        answer = b""
    code = int(answer) if answer else -signal.SIGKILL  # without an answer the parent was killed, and its ranks with it
    if code < 0:
        _die_by(-code)
    return code


def _die_by(number: int) -> NoReturn:
    """End by the signal that ended the rank, for mpirun to see; the rank has left a core file if one is wanted."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)


# --- the parent's half -----------------------------------------------------------------------


def be_parent(listening: int, key: str) -> None:
    """Import once, fork ranks until none is left; returns in none of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(fileno=listening)
    parent = Parent(listener, key, _prepare())
    try:
        request = parent.serve()
    except BaseException:
        os._exit(1)  # its ranks die with it, and their launchers tell
    if request is None:
        os._exit(0)
    raise SystemExit(_call(request["entry"]))


def _prepare() -> str:
    """Import all that ranks share; returns what forbids to fork, if anything does."""
    import gc
    import importlib

    try:
        for name in SHARED_IMPORTS:
            importlib.import_module(name)
    except BaseException as error:  # a rank that is started plainly will say more
        return f"{type(error).__name__}: {error}"
    from distfl.allocator import exact_allocator

    exact_allocator()  # its free blocks are shared, too, until one is used
    gc.collect()
    gc.freeze()  # a collection in a rank would write to every object, and so copy it
    if len(os.listdir("/proc/self/task")) > 1:
        return "an import has started threads, which do not live in forked ranks"
    if any(name.startswith("/dev/nvidia") for name in _open_files()):
        return "an import has opened the GPU, which forked ranks cannot use"
    return ""


def _open_files() -> list[str]:
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}"))
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

    def serve(self) -> dict[str, Any] | None:
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
                    request = self._welcome()
                    if request is not None:
                        os.close(woken)
                        os.close(waking)
                        return request
                elif number == woken:
                    os.read(woken, 4096)
                    self._reap()
                else:
                    self._hear(number)
        return None

    def _welcome(self) -> dict[str, Any] | None:
        """Fork a rank for the next launcher; returns in the rank what it is to be."""
        launcher, _ = self._listener.accept()
        self._served += 1
        received = _receive(launcher) if _peer_is_ours(launcher) else None
        if received is None:
            launcher.close()
            return None
        request, streams = received
        environment = request["environment"]
        self._expected = max(int(environment.get(name.encode(), b"0")) for name in LOCAL_RANKS)
        refused = self._forbidden or ("" if request["key"] == self._key else "it was started otherwise")
        parent = os.getpid()
        rank = 0 if refused else os.fork()
        if not refused and rank == 0:
            _die_with(parent)
            self._listener.close()
            for other in (launcher, *self._launchers.values()):
                other.close()
            _become(request, streams)
            return request
        for number in streams:
            os.close(number)
        if refused:
            _tell(launcher, f"refused: {refused}")
            launcher.close()
            return None
        _tell(launcher, "started")
        self._launchers[rank] = launcher
        self._poll.register(launcher.fileno(), select.POLLIN)
        return None

    def _hear(self, number: int) -> None:
        """A launcher passes a signal on, or has ended before its rank."""
        rank, launcher = next(((rank, one) for rank, one in self._launchers.items() if one.fileno() == number), (0, None))
        if launcher is None:  # reaped a moment ago
            return
        try:
            signals = launcher.recv(64)
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


def _receive(launcher: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """What a launcher hands over, and its open files; None if it ends before."""
    launcher.settimeout(SECONDS_TO_ASK)
    streams: list[int] = []
    try:
        head, streams, _, _ = socket.recv_fds(launcher, _LENGTH_BYTES, 4)
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
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Make this process what its launcher is."""
    import resource

    from distfl import allocator

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.setpgid(0, 0)
    os.fchdir(streams[3])
    for place, number in enumerate(streams[:3]):
        os.dup2(number, place)
    for number in streams:
        os.close(number)
    os.environ.clear()
    os.environb.update(request["environment"])
    os.environ.update(allocator.environment())  # what the parent was started with
    sys.argv, sys.orig_argv = request["arguments"], request["original"]
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["cores"])
    for number, limits in request["limits"].items():
        if resource.getrlimit(number) != limits:
            resource.setrlimit(number, limits)
    _open_streams()


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
    import importlib

    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)()
