"""What it costs that MPI reports dead ranks: seconds of a start and of a round without training steps, with ULFM and without; alternated.

python tests/benchmarks/faults.py [RANKS] [REPEATS] [CONFIG] [key=value ...]
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from exchange import NO_TRAINING, PROGRAM

from distfl.launching import mpirun_command
from distfl.reporting import read_run

WAYS = {"without": [], "with ULFM": ["--with-ft", "ulfm"]}


def seconds_of(ranks: int, flags: list[str], arguments: list[str]) -> tuple[float, float]:
    """Of one job: seconds until all ranks have met and proven their caps; median over its rounds, but for the first and the last one."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = mpirun_command(ranks, [], flags)
        program = [sys.executable, "-c", PROGRAM, "2", "train", *arguments, f"run.folder={run}"]
        began = time.time()
        subprocess.run([*command[: command.index(sys.executable)], *program], capture_output=True, check=True)
        rounds = [record["seconds"] for record in read_run(run).rounds]
        return (run / "manifest.json").stat().st_mtime - began, statistics.median(rounds[2:-1])


def main(ranks: int = 9, repeats: int = 3, config: str = "configs/quickstart.yaml", *overrides: str) -> None:
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(int(repeats)):
        for way, flags in WAYS.items():
            found[way].append(seconds_of(int(ranks), flags, [config, *NO_TRAINING, *overrides]))
    for way, pairs in found.items():
        for what, seconds in zip(("start", "round"), zip(*pairs)):
            print(f"{way:10} {what}: {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
