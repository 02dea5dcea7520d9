"""CPU seconds of a client rank from process start to its first round, against bare `import torch, mpi4py.MPI`, alternated.

python tests/benchmarks/start_up.py [PAIRS] [CONFIG] [key=value ...]
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from distfl.launching import mpirun_command

RANKS = 3
BARE = "import time, torch; from mpi4py import MPI; print(MPI.COMM_WORLD.rank, time.process_time())"


def bare_seconds() -> float:
    """Mean over the client ranks of a job that only imports."""
    command = mpirun_command(RANKS, [])
    lines = subprocess.run(
        [*command[: command.index(sys.executable)], sys.executable, "-c", BARE], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    by_rank = dict(line.split() for line in lines)
    return statistics.mean(float(by_rank[str(rank)]) for rank in range(1, RANKS))


def client_seconds(config: str, overrides: list[str]) -> float:
    """Mean over the client ranks of a real run, as its manifest records it."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = ["train", config, f"run.folder={run}", "rounds=1", *overrides]
        subprocess.run(mpirun_command(RANKS, arguments), capture_output=True, check=True)
        return statistics.mean(json.loads((run / "manifest.json").read_text())["starts"][-1]["start_up_cpu_seconds_by_rank"][1:])


def main(pairs: int = 5, config: str = "configs/smoke.yaml", overrides: list[str] = ()) -> None:
    ratios = []
    for pair in range(pairs):
        bare, client = bare_seconds(), client_seconds(config, list(overrides))
        ratios.append(client / bare)
        print(f"pair {pair}: bare {bare:.3f} s, client rank {client:.3f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} (bar: 1.3)")


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:2]), *sys.argv[2:3], *([sys.argv[3:]] if len(sys.argv) > 3 else []))
