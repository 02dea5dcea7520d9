"""slurm/train.sbatch under a real Slurm: first with a fake distfl, then with the real one on the smoke config.

Needs sbatch, and in DISTFL_LOCAL_SLURM the path of a script that runs a private Slurm on this machine: ``SCRIPT start`` prints
``export SLURM_CONF=...``, ``SCRIPT stop`` ends it, and LOCAL_SLURM_DIR, _PORT and _PREFIX keep it apart from others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCAL_SLURM = os.environ.get("DISTFL_LOCAL_SLURM")

pytestmark = [
    pytest.mark.skipif(not LOCAL_SLURM, reason="DISTFL_LOCAL_SLURM is not set"),
    pytest.mark.skipif(not shutil.which("sbatch"), reason="no sbatch"),
    pytest.mark.slow,
    pytest.mark.timeout(600),  # Slurm itself waits: 10 s before a requeued job, up to 30 s to notice a time limit
]

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"}

# What FAKE says: finish; vanish (status 0, no mark); die; checkpoint (the first start waits for USR1, a resumed one finishes).
FAKE_DISTFL = """#!/usr/bin/env bash
for argument in "$@"; do case $argument in run.folder=*) folder=${argument#*=} ;; esac; done
mkdir -p "$folder"
case "$FAKE $*" in
    finish* | checkpoint*--resume*) touch "$folder/finished" ;;
    vanish*) ;;
    die*) exit 3 ;;
    checkpoint*)
        trap 'exit 75' USR1
        mkdir "$folder/checkpoints"
        touch "$folder/config.yaml" "$folder/checkpoints/1"
        while :; do sleep 0.2; done ;;
esac
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Slurm:
    """A private Slurm and the few questions that the tests ask of it."""

    def __init__(self, folder: str):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        own = {"LOCAL_SLURM_DIR": folder, "LOCAL_SLURM_PORT": str(free_port()), "LOCAL_SLURM_PREFIX": f"distfl{os.getpid()}n"}
        self.environment = {**clean, **own}
        started = subprocess.run([LOCAL_SLURM, "start"], env=self.environment, text=True, capture_output=True, timeout=120)
        assert started.returncode == 0, started.stderr
        self.environment["SLURM_CONF"] = re.search(r"SLURM_CONF=(\S+)", started.stdout)[1]

    def stop(self) -> None:
        subprocess.run([LOCAL_SLURM, "stop"], env=self.environment, capture_output=True, timeout=120)

    def command(self, *command: str | Path, folder: Path | None = None, **variables: str) -> str:
        result = subprocess.run(
            list(map(str, command)), cwd=folder, env={**self.environment, **variables}, text=True, capture_output=True, timeout=60
        )
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout

    def submit(self, folder: Path, *arguments: str | Path, **variables: str) -> str:
        """sbatch from a folder; the job's id."""
        return self.command("sbatch", "--parsable", *arguments, folder=folder, **variables).strip()

    def fields(self, job: str) -> dict[str, str]:
        """What scontrol says of a job, or of one array task (12_3)."""
        return dict(field.partition("=")[::2] for field in self.command("scontrol", "show", "job", job).split() if "=" in field)

    def ask_for_checkpoint(self, job: str) -> None:
        """The signal that Slurm sends before the time limit: to the batch shell alone."""
        self.command("scancel", "--batch", "--signal=USR1", job)

    def wait(self, job: str, seconds: float) -> dict[str, str]:
        wait_for(lambda: self.fields(job)["JobState"] in ENDED, seconds, lambda: str(self.fields(job)))
        return self.fields(job)


def wait_for(happened, seconds: float, explain=lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s: {explain()}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm():
    folder = tempfile.mkdtemp(prefix="distfl-slurm-", dir="/tmp")  # its path goes into a Unix socket's name, which must be short
    running = Slurm(folder)
    yield running
    running.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "sub mit"
    folder.mkdir()
    return folder


# --- a fake distfl: what the script does, and how Slurm takes it ---


@pytest.fixture
def batch_script(tmp_path):
    """The batch script in a project folder that holds nothing but a fake distfl."""
    home = tmp_path / "home"
    for name in ("slurm/train.sbatch", "pyproject.toml"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, home / name)
    for name, text in {".venv/bin/distfl": FAKE_DISTFL, "configs/quickstart.yaml": ""}.items():
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(text)
    (home / ".venv/bin/distfl").chmod(0o755)
    return home / "slurm" / "train.sbatch"


@pytest.mark.parametrize("fake, state, code", [("finish", "COMPLETED", "0:0"), ("die", "FAILED", "3:0"), ("vanish", "FAILED", "1:0")])
def test_job_state_tells_how_it_ended(slurm, here, batch_script, fake, state, code):
    job = slurm.submit(here, batch_script, "note=a b", FAKE=fake)
    fields = slurm.wait(job, 60)
    assert (fields["JobState"], fields["ExitCode"]) == (state, code), (here / f"distfl-{job}.out").read_text()
    assert (here / f"runs/slurm-{job}/finished").exists() == (state == "COMPLETED")


def test_time_limit_requeues_and_finishes(slurm, here, batch_script):
    job = slurm.submit(here, "--time=1", "--signal=B:USR1@50", batch_script, FAKE="checkpoint")
    fields = slurm.wait(job, 180)
    log = (here / f"distfl-{job}.out").read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    assert "asking Slurm to queue" in log and "resumed" in log


def test_job_that_may_not_requeue_fails_with_75(slurm, here, batch_script):
    job = slurm.submit(here, "--no-requeue", batch_script, FAKE="checkpoint")
    wait_for((here / f"runs/slurm-{job}/checkpoints/1").exists, 60)
    slurm.ask_for_checkpoint(job)
    fields = slurm.wait(job, 60)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "75:0")
    assert f"RUN_FOLDER='{here}/runs/slurm-{job}'" in (here / f"distfl-{job}.out").read_text()


def test_array_task_requeues_without_the_others(slurm, here, batch_script):
    job = slurm.submit(here, "--ntasks=2", "--array=0-2", batch_script, FAKE="checkpoint")
    tasks = [f"{job}_{task}" for task in range(3)]
    wait_for(lambda: all((here / f"runs/slurm-{task}/checkpoints/1").exists() for task in tasks), 60)
    by_id = sorted(tasks, key=lambda task: slurm.fields(task)["JobId"] != job)  # first the one whose plain id is that of the whole array
    slurm.ask_for_checkpoint(by_id[0])
    assert slurm.wait(by_id[0], 90)["Restarts"] == "1"
    for task in by_id[1:]:
        fields = slurm.fields(task)
        assert (fields["JobState"], fields["Restarts"]) == ("RUNNING", "0")
    slurm.command("scancel", job)
    wait_for(lambda: all(slurm.fields(task)["JobState"] in ENDED for task in tasks), 60)


# --- the real distfl ---

ROUNDS = 12  # enough to be still running when the signal comes, seconds to minutes in all

needs_distfl = pytest.mark.skipif(not (ROOT / ".venv/bin/distfl").exists() and not shutil.which("distfl"), reason="distfl is not installed")


def rounds_of(run_folder: Path) -> list[int]:
    path = run_folder / "rounds.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # a line without its end is still being written
    return [json.loads(line)["round"] for line in lines]


def submit_smoke(slurm: Slurm, folder: Path, rounds: int, **variables: str) -> tuple[str, Path, Path]:
    """The smoke config on three ranks; job id, its own run folder, log."""
    batch_script = ROOT / "slurm" / "train.sbatch"
    job = slurm.submit(folder, "--ntasks=3", "--time=10", batch_script, f"rounds={rounds}", CONFIG="configs/smoke.yaml", **variables)
    return job, folder / f"runs/slurm-{job}", folder / f"distfl-{job}.out"


@needs_distfl
@pytest.mark.mpi
@pytest.mark.parametrize("transport", ["mpi", "torch"])
def test_smoke_run_completes(slurm, here, transport):
    job, run_folder, log = submit_smoke(slurm, here, 2, TRANSPORT=transport)
    fields = slurm.wait(job, 240)
    assert fields["JobState"] == "COMPLETED", log.read_text()
    assert (run_folder / "finished").exists()


@needs_distfl
@pytest.mark.mpi
@pytest.mark.parametrize("transport", ["mpi", "torch"])
def test_smoke_run_checkpoints_requeues_and_finishes(slurm, here, transport):
    job, run_folder, log = submit_smoke(slurm, here, ROUNDS, TRANSPORT=transport)
    wait_for(lambda: rounds_of(run_folder), 120, lambda: log.read_text() if log.exists() else "no log")
    slurm.ask_for_checkpoint(job)
    fields = slurm.wait(job, 400)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert (run_folder / "finished").exists()
    rounds = rounds_of(run_folder)
    assert rounds == list(range(ROUNDS + 1))  # each once; 0 is the evaluation before training


@needs_distfl
@pytest.mark.mpi
def test_cancelled_run_has_no_mark_and_resumes(slurm, here):
    job, run_folder, log = submit_smoke(slurm, here, ROUNDS)
    wait_for(lambda: rounds_of(run_folder), 120, lambda: log.read_text() if log.exists() else "no log")
    slurm.command("scancel", job)
    assert slurm.wait(job, 60)["JobState"] == "CANCELLED"
    assert not (run_folder / "finished").exists()
    again, _, log = submit_smoke(slurm, here, ROUNDS, RUN_FOLDER=str(run_folder))
    assert slurm.wait(again, 400)["JobState"] == "COMPLETED", log.read_text()
    assert "resumed" in log.read_text() and (run_folder / "finished").exists()


def forked_of(folder: Path) -> list[str]:
    """Processes forked, or to fork, for a job that was submitted from this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                os.fsencode(folder) in (process / "environ").read_bytes()
                and b"distfl-parent-of-ranks" in (process / "cmdline").read_bytes()
            ):
                found.append(process.name)
        except OSError:  # it has ended
            pass
    return found


@needs_distfl
@pytest.mark.mpi
def test_forked_ranks_of_a_cancelled_job_are_gone(slurm, here):
    job, run_folder, log = submit_smoke(slurm, here, ROUNDS, DISTFL_START="fork")
    wait_for(lambda: rounds_of(run_folder), 120, lambda: log.read_text() if log.exists() else "no log")
    assert len(forked_of(here)) == 4  # three ranks and their parent
    slurm.command("scancel", job)
    assert slurm.wait(job, 60)["JobState"] == "CANCELLED"
    wait_for(lambda: not forked_of(here), 20, lambda: str(forked_of(here)))
