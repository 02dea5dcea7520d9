"""Every fault that a job must survive, injected into real jobs: when, what the log said, how it ended, time lost. A Markdown table.

python tests/benchmarks/dying_ranks.py [CONFIG] [key=value ...]

8 client ranks and the server. Rank 3 dies (or 3, 5 and 7), always in round 3; what is stopped by its death is started again with
``--resume``. Time lost: of the whole job, against the mean of two undisturbed ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distfl.caps.cgroup import open_cgroup
from distfl.errors import CapError
from distfl.launching import mpirun_command
from distfl.reporting import read_run

HERE = Path(__file__).parents[1] / "mpi"
RANKS, ROUND, OOM_BYTES, LONGEST_SECONDS = 9, 3, 300 * 2**20, 300
LENGTH = ["rounds=5", "training.epochs=null", "training.steps=4"]
THREE = [3, 5, 7]
FAULTS: list[tuple[str, list, list[str]]] = [
    *(
        (f"SIGKILL of {len(ranks)} of 8 while {moment}", [[ROUND, moment, ranks, "KILL"]], [])
        for moment in ("training", "gathering", "broadcasting", "scoring")
        for ranks in ([3], THREE)
    ),
    ("out of memory: killed by its control group while training", [[ROUND, "training", [3], "OOM"]], ["memory.enforce=report"]),
    (
        "SIGSTOP while training, deadline 5 s, grace 3 s",
        [[ROUND, "training", [3], "STOP"]],
        ["faults.deadline_seconds=5", "faults.grace_seconds=3"],
    ),
    ("a client's weights are not numbers", [[ROUND, "training", [3], "NAN"]], []),
    ("a client's disk is full", [[ROUND, "training", [3], "FULL"]], []),
    ("server killed while gathering", [[ROUND, "gathering", [0], "KILL"]], []),
    ("all client ranks killed", [[ROUND, "training", [*range(1, RANKS)], "KILL"]], []),
    ("SIGUSR1 to the server", [[ROUND, "gathering", [0], "USR1"]], []),
    ("Ctrl-C", [[ROUND, "gathering", [0], "INT"]], []),
]


@dataclass
class Job:
    """What came of one job, with what it took to finish it."""

    seconds: float
    codes: list[int]
    said: list[str]
    accuracy: float
    model: bytes
    left_out: int


def run(config: str, fates: list, folder: Path, *overrides: str) -> Job:
    """The job with its fates; again with ``--resume`` until it is finished."""
    began, codes, said = time.monotonic(), [], []
    while not (folder / "finished").exists():
        if len(codes) > 2:
            raise SystemExit(f"it does not finish: {codes}\n{said}")
        command = mpirun_command(RANKS, [], ["--with-ft", "ulfm"])
        program = [*command[: command.index(sys.executable)], sys.executable, str(HERE / "dying.py"), json.dumps([] if codes else fates)]
        program += ["train", config, f"run.folder={folder}", *LENGTH, *overrides]
        if (folder / "config.yaml").exists():
            program.append("--resume")
        done = subprocess.run(program, capture_output=True, text=True, timeout=LONGEST_SECONDS)
        codes.append(done.returncode)
        told = [line.removeprefix("distfl: ") for line in done.stderr.splitlines() if line.startswith("distfl: ")]
        said += [line for line in told if any(word in line for word in ("lost", "answered", "gone", "interrupted", "stopped", "left out"))]
        said += [line.strip() for line in done.stdout.splitlines() if "left out: " in line and "client rounds" not in line]
    read = read_run(folder)
    newest = sorted((folder / "checkpoints").glob("round-*"))[-1]
    left_out = sum(not report["ok"] for report in read.clients)
    return Job(
        time.monotonic() - began,
        codes,
        said,
        read.evaluated[-1]["test_accuracy"],
        (newest / "model.safetensors").read_bytes(),
        left_out,
    )


@contextmanager
def out_of_memory(fates: list) -> Iterator[None]:
    """A small control group of version 1 for the rank that is to fill it (raises CapError where none can be made)."""
    if fates[0][3] != "OOM":
        yield
        return
    group = open_cgroup(1).root / f"distfl-dying-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(OOM_BYTES))
        os.environ["DYING_GROUP"] = str(group)
        yield
    finally:
        group.rmdir()


def main(config: str = "configs/quickstart.yaml", *overrides: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = [run(config, [], folder / f"undisturbed-{number}", *overrides) for number in range(2)]
        seconds = sum(job.seconds for job in undisturbed) / 2
        print(f"undisturbed: {seconds:.1f} s, accuracy {undisturbed[0].accuracy:.4f}\n")
        print(
            "| injected in round 3 | what the log said | exit codes | model | accuracy | time lost |\n|---|---|---|---|---|---|", flush=True
        )
        for number, (what, fates, more) in enumerate(FAULTS):
            try:
                with out_of_memory(fates):
                    job = run(config, fates, folder / str(number), *more, *overrides)
            except CapError as error:
                print(f"| {what} | not run: {error.found} | | | | |")
                continue
            same = "same bits" if job.model == undisturbed[0].model else f"{job.left_out} client rounds left out"
            said = "; ".join(dict.fromkeys(job.said)).replace("|", "/")[:200]
            codes = ", then ".join(map(str, job.codes))
            print(f"| {what} | {said} | {codes} | {same} | {job.accuracy:.4f} | {job.seconds - seconds:+.1f} s |", flush=True)


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    main(*sys.argv[1:])
