"""The forking start: ranks that share one set of imports on each node.

What mpirun starts for each rank is a *launcher* that imports nothing heavy. The first one of a node and job starts the
*parent*, which imports torch and loads the MPI library without initialising it; then it forks a *rank* for every launcher,
and MPI starts in that. The launcher hands over all that makes a process this rank (environment, arguments, working
folder, standard streams, limits), passes signals on, and ends as the rank ends.

Nobody outlives the others: a launcher that dies is seen by the parent at the end of their connection, and its rank is killed;
ranks die with the parent; a launcher whose parent is gone ends by SIGKILL; the parent goes with its last rank. The socket's name
is in Linux's abstract namespace: it belongs to whoever binds it first, and no file can be left behind.

Here is the launcher's half, in ``parent.py`` the other. Wherever no rank can be forked the launcher goes on as the rank, as if
started plainly. This module imports next to nothing: 64 launchers run it on the cores that the parent needs.
"""

from __future__ import annotations

import marshal
import os
import resource
import signal
import socket
import sys
import time
from typing import Any, NoReturn

START = "DISTFL_START"  # fork | plain, for every rank
JOB = ("PMIX_NAMESPACE", "PMIX_SERVER_URI2")  # the first is there under Open MPI's mpirun and under srun --mpi=pmix
DECIDED_AT_START = ("GLIBC_TUNABLES", "DISTFL_THREADS", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")  # the parent's hold for its ranks
PASSED_ON = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2),
    *(signal.SIGTSTP, signal.SIGCONT),  # the rank stops and goes on, its launcher waits all the time
)
TRIES = 3  # a parent may be about to end, or be killed
SECONDS_TO_ASK = 30
KINDS_OF_LIMITS = 16  # RLIM_NLIMITS of Linux
LENGTH_BYTES = 4


def is_asked_for() -> bool:
    """Whether this process is to be a launcher: it was started as a rank, and its environment says so."""
    return os.environ.get(START) == "fork" and JOB[0] in os.environ and sys.platform == "linux"


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
        if word:
            break
    os.environ[START] = "plain"  # should this process restart itself, it need not ask again
    if os.environ.get("PMIX_RANK") == "0":
        print(f"distfl: ranks start plainly: {word.decode().strip() or 'no parent of ranks answers'}", file=sys.stderr, flush=True)
    return None


def _key() -> str:
    """What a rank must have in common with the parent that it is forked from."""
    return repr(
        [
            *(os.environ.get(name, "") for name in (*JOB, *DECIDED_AT_START)),
            *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "mnt")),
            *(resource.getrlimit(number) for number in range(KINDS_OF_LIMITS)),
            *(signal.getsignal(number) is signal.SIG_IGN for number in PASSED_ON),
            sys.executable,
            sys.path,
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
            if peer_is_ours(connection):
                return connection
            connection.close()  # another user's process has taken the name
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


def peer_is_ours(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # pid, uid, gid
    return int.from_bytes(credentials[4:8], sys.byteorder) == os.getuid()


def _start_parent(listener: socket.socket, key: str) -> None:
    """In a session of its own: what is sent to a rank's process group is not meant for all ranks."""
    from distfl import allocator

    listener.set_inheritable(True)
    command = f"import sys; sys.path[:] = {sys.path!r}; from distfl import parent; parent.main({listener.fileno()}, {key!r})"
    streams = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]
    # NumPy's library would make its threads when it is loaded
    environment = os.environ | allocator.environment() | {"OPENBLAS_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", command, "distfl-parent-of-ranks"]
    os.posix_spawn(sys.executable, arguments, environment, file_actions=streams, setsid=True, setsigmask=[])


def _hand_over(connection: socket.socket, entry: str) -> None:
    """Send what makes a process this rank."""
    umask = os.umask(0o077)
    os.umask(umask)
    request = {
        "key": _key(),
        "entry": entry,
        "environment": dict(os.environb),
        "arguments": sys.argv,
        "original": sys.orig_argv,
        "umask": umask,
        "cores": sorted(os.sched_getaffinity(0)),
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    }
    words = marshal.dumps(request)
    folder = os.open(".", os.O_PATH)  # to go there takes no right to read it
    try:
        socket.send_fds(connection, [len(words).to_bytes(LENGTH_BYTES, "little")], [0, 1, 2, folder])
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
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)
