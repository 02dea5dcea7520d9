"""The shell pieces: launch/, slurm/train.sbatch, .ci/run and the pinned versions. Small fakes stand in for Python, distfl and scontrol."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((ROOT / "launch").iterdir()), ROOT / "slurm" / "train.sbatch", ROOT / ".ci" / "run"]
TOOLS = "/usr/local/bin:/usr/bin:/bin"

PYTEST = "[-m] [pytest] [-n] [logical] [--maxprocesses] [4] [--dist] [worksteal]"  # the tests side by side


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


def run(command: list, folder: Path, path: str | Path = "", **variables: str) -> subprocess.CompletedProcess:
    """Run with nothing of our own environment but the basic tools; output and errors together."""
    environment = {"PATH": f"{path}:{TOOLS}" if path else TOOLS, "HOME": str(folder), **variables}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
    )


# --- every script ---


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_strict_executable_and_parses(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path]).returncode == 0


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_shellcheck_is_content():
    result = subprocess.run(["shellcheck", *SCRIPTS], text=True, capture_output=True)
    assert result.returncode == 0, result.stdout


# --- pinned versions ---


def requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower()


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", pin) for pin in pins)  # no ranges, no local versions such as +cpu
    pinned = {requirement_name(pin) for pin in pins}
    assert len(pinned) == len(pins)
    assert {requirement_name(name) for name in wanted} <= pinned


# --- launch/setup, with a Python that only pretends ---

# Knows the three calls that launch/setup makes: ask what it is, make a venv (a copy of itself), run pip (noted in "pip-calls").
PYTHON = """
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
    *ensurepip*) [ -z "${NO_ENSUREPIP:-}" ] ;;
    *version_info*2\\]*) echo 3.12 ;;
    *version_info*) [ -z "${OLD:-}" ] && printf '%s\\n' "${VERSION:-3.12.5}" /fake "${BASE:-$0}" ;;
    *"-m venv"*) mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" && echo "$0" >"${!#}/made-by" ;;
    *"-m pip"*)
        sleep "${PIP_SECONDS:-0}"
        echo "MPICC=${MPICC:-} $*" >>"$here/../../pip-calls"
        [ -z "${PIP_FAILS:-}" ] || { echo no network; exit 1; } ;;
    --version) echo Python 3.9.2 ;;
    *) exit 99 ;;
esac
"""


class Project:
    """A copy of launch/ with a fake python3 on PATH."""

    def __init__(self, folder: Path):
        self.root = folder / "the project"  # with a blank, on purpose
        self.root.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        self.bin = folder / "bin"
        self.python = script(self.bin / "python3", PYTHON)

    def setup(self, **variables: str) -> subprocess.CompletedProcess:
        return run([self.root / "launch" / "setup"], self.root.parent, self.bin, BASE=str(self.python), **variables)

    def pip_calls(self) -> list[str]:
        calls = self.root / "pip-calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def change(self) -> None:
        with (self.root / "constraints.txt").open("a") as file:
            file.write("# changed\n")


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_setup_installs_once(project):
    first = project.setup()
    assert first.returncode == 0, first.stdout
    assert len(project.pip_calls()) == 1
    assert "--constraint constraints.txt --editable .[mpi,test]" in project.pip_calls()[0]
    began = time.monotonic()
    second = project.setup()
    assert time.monotonic() - began < 1
    assert second.stdout == "setup: ready: .venv, Python 3.12.5, MPI: pypi\n"
    assert len(project.pip_calls()) == 1


def test_setup_updates_in_place_when_the_pins_change(project):
    project.setup()
    (project.root / ".venv" / "kept").touch()
    project.change()
    assert "updating" in project.setup().stdout
    assert len(project.pip_calls()) == 2
    assert (project.root / ".venv" / "kept").exists()


def test_setup_starts_over_for_another_python_or_after_a_move(project):
    project.setup()
    marker = project.root / ".venv" / "kept"
    marker.touch()
    assert project.setup(DISTFL_PYTHON=str(project.python), VERSION="3.13.1").returncode == 0
    assert not marker.exists() and len(project.pip_calls()) == 2
    moved = project.root.with_name("moved")
    project.root.rename(moved)  # the scripts in .venv/bin name the old place
    project.root = moved
    assert "making .venv" in project.setup().stdout


def test_setup_survives_failure_and_says_why(project):
    failed = project.setup(PIP_FAILS="1")
    assert failed.returncode == 2
    assert "no network" in failed.stdout and "setup.log" in failed.stdout
    project.change()
    assert "making .venv" in project.setup().stdout  # an unfinished .venv is not updated, but made anew
    assert project.setup(PIP_FAILS="1").returncode == 0  # nothing left to install


def test_setup_interrupted_in_an_update_starts_over(project):
    project.setup()
    project.change()
    assert project.setup(PIP_FAILS="1").returncode == 2
    assert "making .venv" in project.setup().stdout


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock")
def test_two_setups_at_once_install_once(project):
    command = [project.root / "launch" / "setup"]
    environment = {"PATH": f"{project.bin}:{TOOLS}", "PIP_SECONDS": "1", "BASE": str(project.python)}
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert len(project.pip_calls()) == 1


def test_setup_leaves_a_foreign_venv_alone(project):
    (project.root / ".venv").mkdir()
    (project.root / ".venv" / "precious").touch()
    result = project.setup()
    assert result.returncode == 2 and "not made by launch/setup" in result.stdout
    assert (project.root / ".venv" / "precious").exists()


def test_setup_with_the_system_mpi(project):
    mpirun = script(project.bin / "mpirun", "")
    missing = project.setup(DISTFL_MPI="system", PATH=f"{project.bin}:/bin") if not shutil.which("mpicc", path=TOOLS) else None
    assert missing is None or (missing.returncode == 2 and "no mpicc" in missing.stdout)
    mpicc = script(project.bin / "mpicc", "")
    assert project.setup(DISTFL_MPI="system").returncode == 0
    compiled, rest = project.pip_calls()
    assert f"MPICC={mpicc}" in compiled and "--no-cache-dir --no-binary mpi4py mpi4py" in compiled
    assert "--editable .[test]" in rest
    assert project.setup().stdout.endswith(f"MPI: system {mpirun}\n")  # unset keeps the choice
    assert len(project.pip_calls()) == 2
    project.setup(DISTFL_MPI="pypi")
    assert "--editable .[mpi,test]" in project.pip_calls()[-1]


def test_setup_ignores_its_own_activated_venv(project):
    project.setup()
    script(project.root / ".venv" / "bin" / "mpirun", "")
    activated = f"{project.root}/.venv/bin:{project.bin}:{TOOLS}"
    result = project.setup(DISTFL_MPI="system", PATH=activated)
    assert shutil.which("mpirun", path=TOOLS) or (result.returncode == 2 and "no mpirun on PATH" in result.stdout)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"OLD": "1", "PATH": "FAKE_ONLY"}, "no Python 3.11 or later"),
        ({"NO_ENSUREPIP": "1", "PATH": "FAKE_ONLY"}, "apt-get install python3.12-venv"),
        ({"DISTFL_PYTHON": "/no/python"}, "DISTFL_PYTHON=/no/python is not a Python 3.11"),
        ({"DISTFL_MPI": "mpich"}, "DISTFL_MPI=mpich is not known; use pypi or system"),
    ],
)
def test_setup_refuses(project, variables, message):
    if variables.get("PATH") == "FAKE_ONLY":  # a PATH on which every Python is the fake one
        for name in ("python3.11", "python3.12", "python3.13"):
            script(project.bin / name, PYTHON)
        variables = {**variables, "PATH": f"{project.bin}:{TOOLS}"}
    result = project.setup(**variables)
    assert result.returncode == 2
    assert message in result.stdout
    assert not (project.root / ".venv").exists()


# --- the other launchers ---


@pytest.fixture
def launchers(project):
    """launch/ with a setup that does nothing and a distfl and python that tell their arguments."""
    script(project.root / "launch" / "setup", "")
    for name in ("distfl", "python"):
        script(project.root / ".venv" / "bin" / name, f'echo "{name} in $PWD:$(printf " [%s]" "$@")"; exit 7\n')
    return project.root


def test_launchers_pass_arguments_and_exit_code_on(launchers, tmp_path):
    def told(*command: str, **variables: str) -> str:
        result = run([launchers / command[0], *command[1:]], tmp_path, **variables)
        assert result.returncode == 7
        return result.stdout.strip()

    config = launchers / "configs" / "quickstart.yaml"
    quickstart = re.escape(f"distfl in {tmp_path}: [train] [--ranks] [9] [{config}] [run.folder=runs/quickstart-")
    assert re.fullmatch(quickstart + r"[\d-]+\] \[run\.folder=a b\]", told("launch/quickstart", "run.folder=a b"))
    assert told("launch/mpirun", "4", "plan", "x.yaml") == f"distfl in {tmp_path}: [plan] [x.yaml] [--ranks] [4]"
    assert told("launch/torchrun", "4", "train", "x.yaml") == f"distfl in {tmp_path}: [train] [x.yaml] [transport.name=torch] [--ranks] [4]"
    assert told("launch/check") == f"distfl in {tmp_path}: [doctor]"
    pytest_ = f"python in {launchers}: {PYTEST}"
    assert told("launch/test", "-k", "a b") == f"{pytest_} [-k] [a b]"
    assert told("launch/test", CI="true") == f"{pytest_} [--color=no] [-p] [no:cacheprovider]"


def test_launchers_work_through_a_link(launchers, tmp_path):
    (tmp_path / "quick").symlink_to(launchers / "launch" / "quickstart")
    assert run([tmp_path / "quick"], tmp_path).returncode == 7


@pytest.mark.parametrize("arguments", [[], ["train", "x.yaml"], ["-4", "train"]])
@pytest.mark.parametrize("name", ["mpirun", "torchrun"])
def test_a_launcher_wants_a_number_first(launchers, tmp_path, name, arguments):
    result = run([launchers / "launch" / name, *arguments], tmp_path)
    assert result.returncode == 2 and result.stdout.startswith(f"usage: launch/{name} RANKS")


def test_ci_runs_the_tests_from_anywhere(launchers, tmp_path):
    shutil.copytree(ROOT / ".ci", launchers / ".ci")
    result = run([launchers / ".ci" / "run"], tmp_path)
    assert result.returncode == 7
    assert f"python in {launchers}: {PYTEST} [--color=no]" in result.stdout


# --- slurm/train.sbatch, with a fake distfl and scontrol (test_slurm.py does it with a real Slurm) ---

# What FAKE says: finish; vanish (status 0, no mark); checkpoint (status 75 on USR1); else a number is the exit code.
DISTFL = """
echo "distfl:$(printf ' [%s]' "$@")"
for argument in "$@"; do case $argument in run.folder=*) folder=${argument#*=} ;; esac; done
mkdir -p "$folder"
case $FAKE in
    finish) touch "$folder/finished" ;;
    vanish) ;;
    checkpoint)
        touch "$folder/config.yaml"
        trap 'mkdir "$folder/checkpoints"; touch "$folder/checkpoints/1"; exit 75' USR1
        touch "$folder/waiting"
        while :; do sleep 0.05; done ;;
    *) exit "$FAKE" ;;
esac
"""
SCONTROL = """
case $1 in
    show) printf '   JobState=RUNNING\\n   Command=%s\\n' "$COMMAND" ;;
    requeue) echo "requeue $2"; [ -z "${NO_REQUEUE:-}" ] ;;
esac
"""


class Batch:
    """A project folder, a folder to submit from, and the copy of the batch script that Slurm would run."""

    def __init__(self, folder: Path):
        self.home, self.submit, self.bin = folder / "home", folder / "sub mit", folder / "bin"
        self.submit.mkdir()
        script(self.home / ".venv" / "bin" / "distfl", DISTFL)
        script(self.bin / "scontrol", SCONTROL)
        (self.home / "configs").mkdir()
        (self.home / "configs" / "quickstart.yaml").touch()
        shutil.copy(ROOT / "pyproject.toml", self.home)
        self.original = self.home / "slurm" / "train.sbatch"
        self.original.parent.mkdir()
        shutil.copy(ROOT / "slurm" / "train.sbatch", self.original)
        self.spooled = folder / "spool" / "slurm_script"
        self.spooled.parent.mkdir()
        shutil.copy(self.original, self.spooled)
        self.run_folder = self.submit / "runs" / "slurm-12"

    def command(self, *arguments: str, **variables: str) -> dict:
        environment = {
            "PATH": f"{self.bin}:{TOOLS}", "SLURM_JOB_ID": "12", "SLURM_NTASKS": "3", "SLURM_SUBMIT_DIR": str(self.submit),
            "COMMAND": " ".join([str(self.original), *arguments]), **variables,
        }  # fmt: skip
        return {"args": ["bash", self.spooled, *arguments], "cwd": self.submit, "env": environment, "text": True}

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(**self.command(*arguments, **variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)


@pytest.fixture
def batch(tmp_path):
    return Batch(tmp_path)


def test_batch_resources_stand_on_top():
    lines = (ROOT / "slurm" / "train.sbatch").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines[:first_command] if line.startswith("#SBATCH --"))
    assert {"nodes", "ntasks", "cpus-per-task", "mem-per-cpu", "time", "requeue", "output"} <= set(options)
    assert options["signal"].startswith("B:USR1@")  # without B: the signal would kill mpirun's daemons
    assert options["open-mode"] == "append"
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # Slurm would ignore it


def test_batch_finished(batch):
    result = batch.run("rounds=3", "note=a b", FAKE="finish")
    assert result.returncode == 0, result.stdout
    config = batch.home / "configs" / "quickstart.yaml"
    assert f"distfl: [train] [{config}] [run.folder={batch.run_folder}] [rounds=3] [note=a b] [--ranks] [3]\n" in result.stdout
    again = batch.run(FAKE="5")
    assert again.returncode == 0 and "nothing to do" in again.stdout


def test_batch_does_not_trust_status_0(batch):
    result = batch.run(FAKE="vanish")
    assert result.returncode == 1
    assert "killed from outside" in result.stdout
    assert f"RUN_FOLDER='{batch.run_folder}' sbatch {batch.original}" in result.stdout


@pytest.mark.parametrize("status", [1, 2, 137])
def test_batch_passes_failures_on(batch, status):
    result = batch.run(FAKE=str(status))
    assert result.returncode == status
    assert ("RUN_FOLDER=" in result.stdout) == (status != 2)  # a refused job cannot be resumed
    assert "requeue 12" not in result.stdout


def test_batch_resumes_what_has_begun_with_or_without_a_checkpoint(batch):
    (batch.run_folder / "checkpoints").mkdir(parents=True)
    assert "--resume" not in batch.run(FAKE="1").stdout
    (batch.run_folder / "config.yaml").touch()
    for restarts in ("0", "2"):
        assert "[--ranks] [3] [--resume]" in batch.run(FAKE="1", SLURM_RESTART_COUNT=restarts).stdout
    assert not list(batch.submit.rglob("*.start-*"))  # what can be continued is not moved away


def test_batch_restarted_before_its_run_began(batch):
    batch.run_folder.mkdir(parents=True)
    (batch.run_folder / "old").touch()
    result = batch.run(FAKE="finish", SLURM_RESTART_COUNT="2")
    assert result.returncode == 0 and "--resume" not in result.stdout
    assert (batch.submit / "runs" / "slurm-12.start-2" / "old").exists()
    assert not (batch.run_folder / "old").exists()


def signalled(batch: Batch, **variables: str) -> tuple[int, str]:
    """Run, send SIGUSR1 to the batch shell alone once distfl waits for it, and give status and output."""
    process = subprocess.Popen(**batch.command(FAKE="checkpoint", **variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 30
    while not list(batch.submit.rglob("waiting")) and process.poll() is None:
        assert time.monotonic() < deadline, "the fake distfl has not started"
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def test_batch_requeues_after_usr1(batch):
    status, output = signalled(batch)
    assert status == 75
    assert output.count("requeue 12") == 1 and "asking Slurm to queue" in output
    assert "[--resume]" in batch.run(FAKE="finish", SLURM_RESTART_COUNT="1").stdout


def test_batch_requeues_only_its_own_array_task(batch):
    status, output = signalled(batch, SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="4")
    assert status == 75 and "requeue 12_4" in output
    assert (batch.submit / "runs" / "slurm-12_4" / "checkpoints").exists()


def test_batch_that_may_not_requeue(batch):
    status, output = signalled(batch, NO_REQUEUE="1")
    assert status == 75 and "does not let this job" in output and "RUN_FOLDER=" in output


def test_batch_does_not_requeue_for_ever(batch):
    status, output = signalled(batch, MAX_RESTARTS="3", SLURM_RESTART_COUNT="3")
    assert status == 75 and "requeue 12" not in output and "MAX_RESTARTS=3" in output


def test_batch_array_tasks_have_run_folders_of_their_own(batch):
    array = {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "1", "FAKE": "finish"}
    assert f"[run.folder={batch.submit}/runs/slurm-10_1]" in batch.run(**array).stdout
    assert f"[run.folder={batch.submit}/mine/1]" in batch.run(**array, RUN_FOLDER="mine").stdout


def test_batch_finds_the_project(batch, tmp_path):
    found = f"[{batch.home}/configs/quickstart.yaml]"
    relative = os.path.relpath(batch.original, batch.submit)
    assert found in batch.run("a=b c", FAKE="finish", COMMAND=f"{relative} a=b c").stdout  # as typed: sbatch ../home/slurm/train.sbatch
    lost = batch.run(FAKE="finish", COMMAND="(null)")
    assert lost.returncode == 2 and "set DISTFL_HOME=" in lost.stdout
    assert found in batch.run(FAKE="finish", COMMAND="(null)", DISTFL_HOME="../home", RUN_FOLDER="a").stdout
    inside = batch.home / "configs"
    assert found in batch.run(FAKE="finish", COMMAND="(null)", SLURM_SUBMIT_DIR=str(inside), RUN_FOLDER="b").stdout


def test_batch_config_is_found_from_both_places(batch):
    (batch.submit / "mine.yaml").touch()
    assert f"[{batch.submit}/mine.yaml]" in batch.run(FAKE="1", CONFIG="mine.yaml").stdout
    missing = batch.run(FAKE="1", CONFIG="none.yaml")
    assert missing.returncode == 2 and f"no file {batch.home}/none.yaml" in missing.stdout


@pytest.mark.parametrize("argument", ["run.folder=x", "transport.name=local", "--ranks=4", "--resume"])
def test_batch_keeps_its_own_arguments(batch, argument):
    result = batch.run(argument, FAKE="finish")
    assert result.returncode == 2 and argument in result.stdout and "distfl:" not in result.stdout


def test_batch_with_torch_has_srun_start_the_ranks(batch):
    script(batch.bin / "srun", 'printf "srun %s:%s" "$MASTER_ADDR" "$MASTER_PORT"; printf " [%s]" "$@"; echo; exec "${@:5}"')
    result = batch.run("a=b c", FAKE="finish", TRANSPORT="torch")
    assert result.returncode == 0 and "finished: " in result.stdout
    assert f"srun {socket.gethostname()}:10012 [--mpi=none] [--ntasks=3] [--distribution=block] [--kill-on-bad-exit=1]" in result.stdout
    config = f"{batch.home}/configs/quickstart.yaml"
    assert f"distfl: [train] [{config}] [run.folder={batch.run_folder}] [a=b c] [transport.name=torch]" in result.stdout
    unknown = batch.run(TRANSPORT="tcp", RUN_FOLDER="other")
    assert unknown.returncode == 2 and "use mpi or torch" in unknown.stdout


def test_batch_outside_slurm(batch):
    result = batch.run(SLURM_JOB_ID="")
    assert result.returncode == 2 and "start it with: sbatch" in result.stdout


def test_batch_without_setup(batch):
    shutil.rmtree(batch.home / ".venv")
    result = batch.run()
    assert result.returncode == 2 and f"run {batch.home}/launch/setup once" in result.stdout
