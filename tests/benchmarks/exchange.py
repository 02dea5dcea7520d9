"""Seconds of a round without training steps: one unit under way or two, gather or reduce, fixed or float sums; alternated.

python tests/benchmarks/exchange.py [RANKS] [REPEATS] [CONFIG] [key=value ...]
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from distfl.launching import mpirun_command

WAYS = {
    "gather, one unit under way": (1, ["transport.collective=gather"]),
    "gather, two": (2, ["transport.collective=gather"]),
    "reduce, fixed sums": (2, ["transport.collective=reduce"]),
    "reduce, float sums": (2, ["transport.collective=reduce", "transport.sums=float"]),
}
NO_TRAINING = ["rounds=12", "training.epochs=null", "training.steps=0", "evaluation.every=1000", "run.checkpoint_every=1000"]
PROGRAM = """
import sys
from distfl.allocator import restart_prepared
restart_prepared()
from distfl import cli, exchange
exchange.UNITS_UNDER_WAY = int(sys.argv.pop(1))
raise SystemExit(cli.main(sys.argv[1:]))
"""


def round_seconds(ranks: int, units_under_way: int, arguments: list[str]) -> float:
    """Median over the rounds of one job, but for the first one and the last one, which is evaluated."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = mpirun_command(ranks, [])
        program = [sys.executable, "-c", PROGRAM, str(units_under_way), "train", *arguments, f"run.folder={run}"]
        subprocess.run([*command[: command.index(sys.executable)], *program], capture_output=True, check=True)
        rounds = [json.loads(line)["seconds"] for line in (run / "rounds.jsonl").read_text().splitlines()]
    return statistics.median(rounds[2:-1])


def main(ranks: int = 9, repeats: int = 3, config: str = "configs/quickstart.yaml", *overrides: str) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(int(repeats)):
        for way, (units_under_way, arguments) in WAYS.items():
            seconds[way].append(round_seconds(int(ranks), units_under_way, [config, *NO_TRAINING, *arguments, *overrides]))
    base = statistics.median(seconds["gather, two"])
    for way, found in seconds.items():
        middle = statistics.median(found)
        print(f"{way:28} {middle:.3f} s a round ({min(found):.3f} to {max(found):.3f}), {middle / base:.2f} of gather's")


if __name__ == "__main__":
    main(*sys.argv[1:])
