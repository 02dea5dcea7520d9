"""What the job tests share: a small corpus, a small random family, and the command run with real ranks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from distfl.family import write_weights
from distfl.files import write_json
from distfl.forking import START
from distfl.model import ModelSpec, initial_tensors
from distfl.pretrain import train_tokenizer

WORDS = ("the of and to in that it was his he with as for had is at on her by not be which she you from said all but have him").split()
PLAIN = dict.fromkeys(("micro_batches", "loss_chunks", "recompute", "fused_update"), "off")
AUTO = [f"levers.{lever}=auto" for lever in PLAIN]
SHAPE = {"width": 64, "heads": 2, "context": 64, "vocabulary": 512}


@pytest.fixture(autouse=True)
def start_of_ranks(request, monkeypatch):
    """Forked, which takes a third of the time, but where a test file says START_OF_RANKS = "plain"."""
    monkeypatch.setenv(START, getattr(request.module, "START_OF_RANKS", "fork"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """JSON lines: 12 clients, each with a vocabulary of its own taste."""
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    draws = np.random.default_rng(0)
    with open(path, "w") as file:
        for client in range(12):
            taste = draws.dirichlet(np.full(len(WORDS), 0.5))
            for _ in range(12):
                text = " ".join(draws.choice(WORDS, 90, p=taste))
                file.write(json.dumps({"text": text, "who": f"client-{client:02d}"}) + "\n")
    return path


@pytest.fixture(scope="session")
def family(tmp_path_factory, corpus):
    """Random weights of depths 2 and 4 with a real tokenizer."""
    folder = tmp_path_factory.mktemp("family")
    docstrings = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    source = [path.read_text(errors="ignore") for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py"))[:30]]
    (folder / "tokenizer.json").write_text(train_tokenizer(docstrings + source, SHAPE["vocabulary"]).to_str())
    for depth in (2, 4):
        tensors = initial_tensors(ModelSpec(depth, **SHAPE), torch.Generator().manual_seed(depth))
        write_weights(folder / f"depth-{depth:02d}.safetensors", tensors, torch.float32)
    write_json(
        folder / "family.json",
        {"format": 1, "architecture": SHAPE, "depths": {str(d): {"file": f"depth-{d:02d}.safetensors"} for d in (2, 4)}},
    )
    return folder


@pytest.fixture
def config(tmp_path, corpus, family):
    """A config file of 12 clients in two budget groups; by plain steps, so that one block more than planned costs 4.6 MB."""
    values = {
        "rounds": 2,
        "seed": 3,
        "run": {"folder": str(tmp_path / "run"), "picture": False},
        "data": {
            "corpus": "json",
            "path": str(corpus),
            "client_column": "who",
            "minimum_characters": 100,
            "cache": str(corpus.parent / "cache"),
        },
        "model": {"family": str(family), "depths": [4]},
        "fleet": {"groups": [{"name": "weak", "memory_mb": 14, "share": 0.5}, {"name": "strong", "memory_mb": 40, "share": 0.5}]},
        "training": {"batch": 16, "steps": 2, "learning_rate": 1e-3},
        "levers": PLAIN,
        "memory": {"margin_mb": 1.0},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def hear_sigint() -> None:
    """A shell starts what it sends to the background with SIGINT ignored; what is tested here must hear it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Distfl:
    """The command, as a user runs it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, *arguments: str, ranks: int | None = None, program: list[str] | None = None) -> subprocess.Popen:
        command = [*(program or [sys.executable, "-m", "distfl"]), *map(str, arguments), *(["--ranks", str(ranks)] if ranks else [])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=hear_sigint)

    def __call__(
        self, *arguments: str, ranks: int | None = None, timeout: float = 120, program: list[str] | None = None
    ) -> subprocess.CompletedProcess:
        process = self.start(*arguments, ranks=ranks, program=program)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill(process)
            out, err = process.communicate()
            pytest.fail(f"still running after {timeout} s\n{out}\n{err}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @staticmethod
    def kill(process: subprocess.Popen) -> None:
        """SIGKILL for a process and all its descendants, at once; mpirun has a process group of its own."""
        listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
        children: dict[int, list[int]] = {}
        for line in listing.splitlines():
            child, parent = map(int, line.split())
            children.setdefault(parent, []).append(child)
        family, frontier = [process.pid], [process.pid]
        while frontier:
            frontier = [child for parent in frontier for child in children.get(parent, [])]
            family += frontier
        for member in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)

    def model(self, run: Path) -> bytes:
        """The newest merged model of a run, as bytes."""
        return (sorted((run / "checkpoints").glob("round-*"))[-1] / "model.safetensors").read_bytes()

    def reports(self, run: Path) -> list[dict]:
        return [json.loads(line) for line in (run / "clients.jsonl").read_text().splitlines()]

    def wait_for_round(self, run: Path, round: int, process: subprocess.Popen, seconds: float = 60) -> None:
        """Until the checkpoint of a round lies there."""
        deadline = time.monotonic() + seconds
        while not (run / "checkpoints" / f"round-{round:05d}").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the round did not come"
            time.sleep(0.02)


@pytest.fixture
def distfl(tmp_path):
    return Distfl(tmp_path)
