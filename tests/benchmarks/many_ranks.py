"""Seconds from launch until N ranks have proven their caps and begin round 0, plain and forked, against N bare `import torch, mpi4py`.

python tests/benchmarks/many_ranks.py [RANKS] [REPEATS] [STARTS: fork,plain] [CONFIG]

Prints private memory of the waiting client ranks, too: all of it, and without the replica, which is memory of the node.
"""

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from distfl.launching import mpirun_command

BARE = "import torch; from mpi4py import MPI; MPI.COMM_WORLD.Barrier()"
LONGEST_SECONDS = 1200


def bare_seconds(ranks: int) -> float:
    """Until all ranks have imported and met."""
    command = mpirun_command(ranks, [])
    began = time.monotonic()
    subprocess.run([*command[: command.index(sys.executable)], sys.executable, "-c", BARE], check=True, timeout=LONGEST_SECONDS)
    return time.monotonic() - began


def run_seconds(ranks: int, start: str, config: str) -> tuple[float, list[float], list[float]]:
    """Until a real run begins its first round; private MB of its client ranks then, with and without replica."""
    small = (ranks - 1) // 2
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        counts = [f"data.clients={ranks - 1}", f"fleet.groups.0.count={small}", f"fleet.groups.1.count={ranks - 1 - small}"]
        arguments = ["train", config, f"run.folder={run}", "rounds=1", *counts]
        command = mpirun_command(ranks, arguments, ["-x", f"DISTFL_START={start}"])
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while not (run / "config.yaml").exists():
                if process.poll() is not None or time.monotonic() - began > LONGEST_SECONDS:
                    raise SystemExit(process.communicate()[1])
                time.sleep(0.01)
            seconds = time.monotonic() - began
            with stopped(processes_of(str(run))) as pids:  # else they would be scoring by the time they are looked at
                memory = [private_mb(pid) for pid in pids]
            memory = sorted(memory, reverse=True)[:ranks]  # launchers hold next to nothing
            return seconds, [whole for whole, _ in memory[1:]], [own for _, own in memory[1:]]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[list[int]]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def processes_of(run: str) -> list[int]:
    """Python processes with the run's folder in their arguments, and what is forked for it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes()
            if b"PMIX_RANK=" in environment and (run.encode() in words[-2:][0] or run.encode() in b" ".join(words + [environment])):
                found.append(int(folder.name))
    return found


def private_mb(pid: int) -> tuple[float, float]:
    """Private memory of a process, all of it and without shared anonymous mappings."""
    whole = own = 0
    is_replica = False
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-", line):
                is_replica = "/dev/zero" in line
            elif line.startswith("Private_"):
                whole += int(line.split()[1])
                own += 0 if is_replica else int(line.split()[1])
    return whole * 1024 / 1e6, own * 1024 / 1e6


def main(ranks: int = 64, repeats: int = 3, starts: str = "fork,plain", config: str = "configs/smoke.yaml") -> None:
    ratios: dict[str, list[float]] = {start: [] for start in starts.split(",")}
    for repeat in range(repeats):
        bare = bare_seconds(ranks)
        print(f"{repeat}: {ranks} bare ranks {bare:.1f} s", flush=True)
        for start, found in ratios.items():
            seconds, whole, own = run_seconds(ranks, start, config)
            found.append(seconds / bare)
            held = f"private MB of client ranks: median {statistics.median(whole):.1f}, most {max(whole):.1f}"
            held += f"; without replica {statistics.median(own):.1f}, {max(own):.1f}"
            print(f"{repeat}: {start} {seconds:.1f} s, ratio {found[-1]:.3f}; {held}", flush=True)
    for start, found in ratios.items():
        print(f"{start}: median ratio {statistics.median(found):.3f} (bar: 0.25)")


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:3]), *sys.argv[3:])
