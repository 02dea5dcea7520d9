"""``distfl doctor``: what works on this machine, why not where it does not, and how to mend it. Every line was tried."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from distfl import launching, starting
from distfl.errors import DistflError

RANKS_TIMEOUT_SECONDS = 120
PROOF_BYTES = 32 * 10**6
RANK_SCRIPT = "from mpi4py import MPI; c = MPI.COMM_WORLD; print(c.allreduce(c.rank), c.size, MPI.Get_library_version().split(',')[0])"

TORCH_SCRIPT = "from distfl.transport.torch_dist import TorchTransport as T; t = T(2); t.gather(0, ''); t.rank or print(t.library)"
LOSS_SCRIPT = """
import os
from distfl.errors import RankLost
from distfl.transport.mpi import world
transport = world(3)
transport.gather(None, "start")
if transport.rank == 2:
    os.kill(os.getpid(), 9)
try:
    while True:
        transport.gather(None, "start")
except RankLost:
    transport.recover()
transport.part(True)
transport.rank or print("ranks left:", transport.size)
raise SystemExit(transport.leave(0))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Args:
        works: None where it is only information.
        mend: what to do where it does not work.
    """

    name: str
    works: bool | None
    because: str
    mend: str = ""


def examine() -> int:
    """Try everything and print it; returns 0 if all that a run needs works, 1 otherwise."""
    needed: list[Callable[[], Finding]] = [_torch, _memory_meter, _memory_cap, _family, _cache, _mpi]
    mechanisms = [partial(_mechanism, name) for name in ("rlimit", "cgroup-v2", "cgroup-v1", "cuda")]
    told: list[Callable[[], Finding]] = [_machine, _allocator, *mechanisms, _torchrun, _forking, _lost_ranks, _slurm, _cuda]
    well = True
    for check in [*told[:1], *needed, *told[1:]]:
        finding = _tried(check)
        mark = {True: "works", False: "FAILS", None: "-"}[finding.works]
        print(
            f"{finding.name:<14} {mark:<6} {finding.because}" + (f"\n{'':<21} mend: {finding.mend}" if finding.works is False else ""),
            flush=True,
        )
        well = well and finding.works is not False
    print("\nAll that a run needs works here." if well else "\nMend the lines marked FAILS first.")
    return 0 if well else 1


def _tried(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except DistflError as error:
        return Finding(_name(check), False, f"{error.asked}: {error.found}", error.change)
    except Exception as error:  # a doctor reports whatever happens
        return Finding(_name(check), False, f"{type(error).__name__}: {error}", "see the message")


def _name(check: Callable[[], Finding]) -> str:
    return (check.args[0] if isinstance(check, partial) else check.__name__).strip("_")


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("machine", None, f"{platform.platform()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}")


def _torch() -> Finding:
    import torch

    return Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads")


def _memory_meter() -> Finding:
    from distfl.allocator import exact_allocator
    from distfl.caps.base import Outcome
    from distfl.caps.rlimit import Report

    exact_allocator()
    cap = Report()
    peak_bytes = cap.run(0, lambda: Outcome([], {"had": cap.take(PROOF_BYTES)})).peak_bytes
    return Finding(
        "peak meter",
        abs(peak_bytes - PROOF_BYTES) / PROOF_BYTES < 0.1,
        f"{PROOF_BYTES / 1e6:.0f} MB allocated, {peak_bytes / 1e6:.1f} MB measured as high-water mark",
        "needs /proc/self/clear_refs and /proc/self/status of Linux; some containers hide them",
    )


def _allocator() -> Finding:
    from distfl import allocator

    heap = platform.libc_ver()[0] == "glibc"
    prepared = "ranks restart themselves with it" if not allocator.is_prepared() else "this process has it"
    return Finding(
        "allocator",
        None,
        f"glibc, one heap per step: {' '.join(allocator.TUNABLES)}, {prepared}"
        if heap
        else "not glibc: left as it is, peaks may lie above predictions",
    )


def _memory_cap() -> Finding:
    from distfl.caps.choice import make_cap

    return Finding("memory cap", True, f"memory.enforce=auto takes {make_cap('auto').name}")


def _mechanism(name: str) -> Finding:
    """One way to enforce a budget: proven at three of them, or why not."""
    from distfl.caps.choice import make_cap

    label = f"cap {name}"
    try:
        cap = make_cap(name)
        for budget in (PROOF_BYTES // 4, PROOF_BYTES, PROOF_BYTES * 4):
            cap.prove(budget)
    except DistflError as error:
        return Finding(label, None, f"not here: {error.found}\n{'':<21} mend: {error.change}")
    end = "an allocation past them fails" if cap.in_this_process else "a client that goes past them is killed, its rank lives on"
    return Finding(label, True, f"just under 8, 32 and 128 MB can be had, {end}")


def _family() -> Finding:
    from distfl.family import SHIPPED, open_family

    names = sorted(path.parent.name for path in SHIPPED.glob("*/family.json"))
    described = [f"{name} (depths {list(open_family(name).depths)})" for name in names]
    return Finding(
        "family",
        bool(names),
        f"shipped: {', '.join(described) or 'none'}",
        "install distfl with its package data, or give model.family a folder",
    )


def _cache() -> Finding:
    from distfl.config import DataConfig
    from distfl.corpora import cache_folder

    folder = cache_folder(DataConfig())
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".doctor-{os.getpid()}"
    probe.write_text("x")
    probe.unlink()
    free = shutil.disk_usage(folder).free / 2**30
    return Finding(
        "data cache",
        free > 0.5,
        f"{folder}, {free:.1f} GiB free",
        "set data.cache or XDG_CACHE_HOME to a folder with space that all nodes see",
    )


def _mpi() -> Finding:
    command = launching.mpirun_command(2, [])
    command = [*command[: command.index(sys.executable)], sys.executable, "-c", RANK_SCRIPT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RANKS_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding(
            "mpi",
            False,
            f"2 ranks of {command[0]} did not end within {RANKS_TIMEOUT_SECONDS} s",
            "check that this machine resolves its own host name; try DISTFL_MPIRUN_FLAGS",
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("1 2 ")]
    if done.returncode or len(lines) != 2:
        found = (done.stderr or done.stdout).strip().splitlines()
        return Finding(
            "mpi",
            False,
            f"exit code {done.returncode}: {found[0] if found else 'no output'}",
            "mpi4py and mpirun must be of the same MPI: launch/setup, or DISTFL_MPI=system launch/setup for your module's",
        )
    return Finding("mpi", True, f"2 ranks met: {lines[0].removeprefix('1 2 ')}, {command[0]}")


def _torchrun() -> Finding:
    command = [*launching.torchrun(2), sys.executable, "-c", TORCH_SCRIPT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RANKS_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("torchrun", None, f"2 ranks did not end within {RANKS_TIMEOUT_SECONDS} s: use transport.name=mpi")
    if done.returncode or not done.stdout:
        found = (done.stderr.strip() or "no output").splitlines()
        return Finding("torchrun", None, f"exit code {done.returncode}: {found[-1]}: use transport.name=mpi")
    return Finding("torchrun", True, f"2 ranks met: {done.stdout.strip()}")


def _forking() -> Finding:
    if why := starting.prove():
        return Finding("forking start", None, f"not here, launch.start=auto starts ranks plainly: {why}")
    return Finding("forking start", True, "2 ranks forked from one parent met, their caps bite: launch.start=auto takes it")


def _lost_ranks() -> Finding:
    flags = launching.recovery_flags("auto")
    if "--with-ft" not in [*flags, *os.environ.get("DISTFL_MPIRUN_FLAGS", "").split()]:
        return Finding("lost ranks", None, "this MPI has no ULFM: a rank that dies ends the job, --resume continues it")
    command = launching.mpirun_command(3, [], flags)
    command = [*command[: command.index(sys.executable)], sys.executable, "-c", LOSS_SCRIPT]
    mend = "set faults.recover=off"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RANKS_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("lost ranks", False, f"of 3 ranks one was killed, and the others did not end within {RANKS_TIMEOUT_SECONDS} s", mend)
    if done.returncode or "ranks left: 2" not in done.stdout:
        found = (done.stderr.strip() or "no output").splitlines()
        return Finding("lost ranks", False, f"of 3 ranks one was killed, and the job ended with {done.returncode}: {found[-1]}", mend)
    return Finding(
        "lost ranks", True, "of 3 ranks one was killed, the others went on (ULFM): --ranks has rounds repeated without lost ranks"
    )


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("slurm", None, "no sbatch on PATH: slurm/train.sbatch cannot be submitted from here")
    state = subprocess.run(["sinfo", "--noheader", "--format=%P %a %D"], capture_output=True, text=True, timeout=20)
    if state.returncode:
        return Finding("slurm", None, f"sbatch is there, but the controller does not answer: {state.stderr.strip().splitlines()[:1]}")
    return Finding("slurm", None, f"partitions: {'; '.join(state.stdout.split(chr(10))).strip('; ')}")


def _cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("cuda", None, "none: runs use the CPU")
    return Finding("cuda", None, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}: not used yet, runs use the CPU")
