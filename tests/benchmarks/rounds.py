"""A round against the ideal: the same local steps of all clients in 2 bare single-threaded torch processes; alternated.

python tests/benchmarks/rounds.py [CLIENT RANKS] [CLIENTS] [REPEATS] [START: plain,fork,auto] [key=value ...]

Prints, for gather and reduce (or the one that transport.collective=... names): round over ideal; seconds of a round without training
steps; seconds from launch to round 0; PSS of all processes together; CPU that ranks burn in waiting, as a share of all they use
in rounds (what is copied while they wait is in it). 6 blocks, d = 128, vocabulary 512, context 128; every client trains all
blocks for 4 steps of batch 8.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from distfl.family import FORMAT, write_weights
from distfl.files import write_json
from distfl.launching import mpirun_command
from distfl.model import ModelSpec, initial_tensors
from distfl.pretrain import train_tokenizer

SPEC = ModelSpec(depth=6, width=128, heads=4, context=128, vocabulary=512)
STEPS, BATCH, PROCESSES = 4, 8, 2
IDEAL_ROUNDS, JOB_ROUNDS = 3, 6  # the job's first round and its last one, which is evaluated, do not count
LONGEST_SECONDS = 1800

BARE = """
import sys, time
import torch
import torch.nn.functional as F
from distfl.model import ModelSpec, from_tensors, initial_tensors

torch.set_num_threads(1)
clients, rounds, steps, batch = map(int, sys.argv[1:5])
spec = ModelSpec(*map(int, sys.argv[5:10]))
pretrained = initial_tensors(spec, torch.Generator().manual_seed(1))
tokens = torch.randint(spec.vocabulary, (batch, spec.context + 1), generator=torch.Generator().manual_seed(2))

def train():
    model = from_tensors(spec, {name: tensor.clone() for name, tensor in pretrained.items()})
    model.embedding.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

train()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(rounds):
    for _ in range(clients):
        train()
"""

# A rank that also notes what it spends in rounds, and how much of that in waiting.
RANK = """
import json, os, sys, time
from pathlib import Path

def main():
    from distfl import rounds, running
    from distfl.transport.mpi import MpiPending

    spent, plain_wait = {"waiting": 0.0, "all": 0.0}, MpiPending.wait

    def wait(self):
        began = time.thread_time()
        try:
            return plain_wait(self)
        finally:
            spent["waiting"] += time.thread_time() - began

    def counted(part):
        def run(*arguments):
            spent["waiting"], began = 0.0, time.process_time()
            done = part(*arguments)
            spent["all"] = time.process_time() - began
            Path(os.environ["SPENT"], os.environ["OMPI_COMM_WORLD_RANK"]).write_text(json.dumps(spent))
            return done
        return run

    MpiPending.wait, running.work, running.serve = wait, counted(running.work), counted(running.serve)
    from distfl.cli import main
    return main()

if __name__ == "__main__":
    from distfl.allocator import restart_prepared
    restart_prepared()
    raise SystemExit(main())
"""


@dataclass
class Job:
    """What one job showed: seconds of every round, from launch to round 0, PSS of all processes, share of CPU burnt in waiting."""

    seconds: list[float]
    start_seconds: float
    pss_mb: float
    waiting_share: float


def prepare(folder: Path, clients: int) -> Path:
    """A random family, as much text for everybody as all steps need, and the config of the job."""
    source = [path.read_text(errors="ignore") for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py"))[:30]]
    tokenizer = train_tokenizer(source, SPEC.vocabulary)
    family = folder / "family"
    family.mkdir()
    (family / "tokenizer.json").write_text(tokenizer.to_str())
    write_weights(family / "depth-06.safetensors", initial_tensors(SPEC, torch.Generator().manual_seed(1)), torch.float32)
    shape = {"width": SPEC.width, "heads": SPEC.heads, "context": SPEC.context, "vocabulary": SPEC.vocabulary}
    write_json(family / "family.json", {"format": FORMAT, "architecture": shape, "depths": {"6": {"file": "depth-06.safetensors"}}})
    draws = np.random.default_rng(0)
    words = sorted({word for text in source for word in text.split() if word.isalpha()})
    with open(folder / "train.jsonl", "w") as file:
        for client in range(clients):
            text = " ".join(draws.choice(words, 4000))
            file.write(json.dumps({"text": text, "who": f"client-{client:02d}"}) + "\n")
    config = folder / "config.yaml"
    settings = {
        "rounds": JOB_ROUNDS,
        "run": {"checkpoint_every": 1000},
        "data": {"corpus": "json", "path": str(folder / "train.jsonl"), "client_column": "who", "cache": str(folder / "cache")},
        "model": {"family": str(family)},
        "fleet": {"groups": [{"name": "all", "memory_mb": 200, "share": 1}]},
        "training": {"batch": BATCH, "steps": STEPS, "learning_rate": 1e-3},
        "evaluation": {"every": 1000},
    }
    config.write_text(yaml.safe_dump(settings))
    return config


def ideal_seconds(clients: int) -> float:
    """Of a round: two bare processes share the clients, and begin together."""
    shape = (SPEC.depth, SPEC.width, SPEC.heads, SPEC.context, SPEC.vocabulary)
    processes = []
    for number in range(PROCESSES):
        own = len(range(number, clients, PROCESSES))
        arguments = [str(value) for value in (own, IDEAL_ROUNDS, STEPS, BATCH, *shape)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-c", BARE, *arguments]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment))
    for process in processes:
        process.stdout.readline()
    began = time.monotonic()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        if process.wait():
            raise SystemExit("a bare process has failed")
    return (time.monotonic() - began) / IDEAL_ROUNDS


def run_job(folder: Path, config: Path, ranks: int, start: str, *overrides: str) -> Job:
    """The real thing, with ``ranks`` client ranks."""
    run, spent = folder / f"run-{time.monotonic_ns()}", folder / f"spent-{time.monotonic_ns()}"
    spent.mkdir()
    (folder / "benchmarked_rank.py").write_text(RANK)
    flags = ["-x", f"SPENT={spent}", "-x", f"PYTHONPATH={folder}:{os.environ.get('PYTHONPATH', '')}", "-x", f"DISTFL_START={start}"]
    command = mpirun_command(ranks + 1, [], flags)
    program = [sys.executable, "-m", "benchmarked_rank"]
    if start == "fork":
        launch = (
            "import sys; from distfl import forking; code = forking.launch('benchmarked_rank:main'); sys.exit(3 if code is None else code)"
        )
        program = [sys.executable, "-c", launch]
    command = [*command[: command.index(sys.executable)], *program, "train", str(config), f"run.folder={run}", *overrides]
    with open(folder / "log", "w") as log:
        began, process = time.monotonic(), subprocess.Popen(command, stdout=log, stderr=log)
        started, pss_mb = None, 0.0
        while process.poll() is None:
            if started is None and (run / "config.yaml").exists():
                started = time.monotonic() - began
            if started is not None and not counted_rounds_began(run):  # to look at 64 processes costs much
                pss_mb = max(pss_mb, total_pss_mb(str(run)))
            if time.monotonic() - began > LONGEST_SECONDS:
                process.terminate()
            time.sleep(0.01 if started is None else 1)
    if process.returncode:
        raise SystemExit((folder / "log").read_text())
    seconds = [json.loads(line)["seconds"] for line in (run / "rounds.jsonl").read_text().splitlines()]
    used = [json.loads(path.read_text()) for path in spent.iterdir()]
    share = sum(one["waiting"] for one in used) / sum(one["all"] for one in used)
    return Job(seconds[2:-1], started, pss_mb, share)


def counted_rounds_began(run: Path) -> bool:
    """Whether the first round has ended, which does not count."""
    return (run / "rounds.jsonl").exists() and len((run / "rounds.jsonl").read_text().splitlines()) > 1


def total_pss_mb(run: str) -> float:
    """Proportional share of memory of all processes that were started for this run, mpirun among them."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if run.encode() in (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes():
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1e3


def main(ranks: int, clients: int, repeats: int, start: str, *overrides: str) -> None:
    given = [value for key, _, value in (override.partition("=") for override in overrides) if key == "transport.collective"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare(folder, clients)
        ways = [way for way in ("gather", "reduce") if not given or way in given]
        found: dict[str, list[Job]] = {way: [] for way in ways}
        idle: dict[str, list[float]] = {way: [] for way in ways}
        ratios: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, jobs in found.items():
                own = [*overrides, f"transport.collective={way}"]
                before = ideal_seconds(clients)
                jobs.append(run_job(folder, config, ranks, start, *own))
                ideal = (before + ideal_seconds(clients)) / 2
                ratios[way].append(statistics.median(jobs[-1].seconds) / ideal)
                print(f"{way}: ideal {ideal:.2f} s, round {statistics.median(jobs[-1].seconds):.2f} s", flush=True)
                idle[way] += run_job(folder, config, ranks, start, *own, "training.steps=0").seconds
        print(f"{ranks} client ranks and the server, {clients} clients, start {start}, {os.cpu_count()} cores; median of {repeats}")
        for way, jobs in found.items():
            print(
                f"{way}: round over ideal {statistics.median(ratios[way]):.3f} ({min(ratios[way]):.3f} to {max(ratios[way]):.3f}); "
                f"without training {statistics.median(idle[way]):.3f} s; "
                f"to round 0 {statistics.median(job.start_seconds for job in jobs):.1f} s; "
                f"PSS {max(job.pss_mb for job in jobs):.0f} MB; "
                f"waiting {100 * statistics.median(job.waiting_share for job in jobs):.1f} % of CPU"
            )


if __name__ == "__main__":
    given = [*sys.argv[1:5], *("2", "16", "3", "plain")[len(sys.argv[1:5]) :]]
    main(*map(int, given[:3]), given[3], *sys.argv[5:])
