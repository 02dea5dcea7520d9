"""The forking start: the same run as by a plain start, and nothing that hangs or stays behind however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distfl import forking
from distfl.caps import choice
from distfl.errors import CapError
from distfl.launching import mpirun_command

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(240)]
SECONDS_TO_END = 20


@pytest.fixture
def start(distfl, monkeypatch):
    """Start or run a train command on ranks, forked or plain."""

    def start(how, *arguments, ranks=3, wait=True):
        monkeypatch.setenv(forking.START, how)
        command = mpirun_command(ranks, [], own_flags=("-x", forking.START))
        program = [*command[: command.index(sys.executable)], sys.executable, "-m", "distfl"]
        return distfl("train", *arguments, program=program) if wait else distfl.start("train", *arguments, program=program)

    return start


class Family:
    """The processes of one job, found by its run folder in their environment or arguments."""

    def __init__(self, run: Path):
        self._run = str(run).encode()

    def _pids(self, *words: bytes) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                arguments, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self._run in arguments + environment and all(word in arguments for word in words) and state != "Z":
                found.append(int(folder.name))
        return sorted(found)

    def launchers(self) -> list[int]:
        return [pid for pid in self._pids(b"-m\0distfl\0train") if b"mpirun" not in _arguments(pid) and b"prterun" not in _arguments(pid)]

    def ranks(self) -> list[int]:
        parents = self._pids(b"distfl-parent-of-ranks")
        return [pid for pid in parents if _parent_of(pid) in parents]

    def parents(self) -> list[int]:
        return [pid for pid in self._pids(b"distfl-parent-of-ranks") if pid not in self.ranks()]

    def wait_for_the_end(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_END
        while left := self._pids():  # the socket is theirs and goes with them
            assert time.monotonic() < deadline, [_arguments(pid) for pid in left]
            time.sleep(0.05)


def _arguments(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.fixture
def family_of(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTFL_TEST", str(tmp_path))
    return Family(tmp_path)


def _lines(out: str) -> list[str]:
    """Without what differs from run to run: seconds, peaks and the folder."""
    return [line.split(",")[0] for line in out.splitlines() if line.startswith(("round", "caff", "payload", "client rounds"))]


def test_a_forked_run_is_the_plain_run(distfl, config, tmp_path, start, family_of):
    done = {how: start(how, config, f"run.folder={tmp_path / how}") for how in ("plain", "fork")}
    assert [one.returncode for one in done.values()] == [0, 0], done
    assert distfl.model(tmp_path / "plain") == distfl.model(tmp_path / "fork")
    assert _lines(done["plain"].stdout) == _lines(done["fork"].stdout)
    peaks = [[report["measured_peak_bytes"] for report in distfl.reports(tmp_path / how)] for how in done]
    assert max(abs(plain - forked) for plain, forked in zip(*peaks)) < 1.3e6, peaks
    plain, forked = (_start_up_seconds(tmp_path / how)[1] for how in done)
    assert forked < plain / 3
    family_of.wait_for_the_end()


def _start_up_seconds(run: Path) -> list[float]:
    """CPU time of every rank before its first round."""
    return json.loads((run / "manifest.json").read_text())["starts"][0]["start_up_cpu_seconds_by_rank"]


def test_a_refusal_is_said_once(config, start, family_of):
    done = start("fork", config, "model.depths=[3]")
    assert done.returncode == 2 and done.stderr.count("asked:") == 1, done
    family_of.wait_for_the_end()


@pytest.fixture
def script(monkeypatch):
    """Run a function of forked_ranks.py on ranks; what mpirun did, and the lines of its ranks in order."""
    monkeypatch.setenv("TOLD", "of all ranks")

    def run(function, how, ranks, *flags):
        command = mpirun_command(ranks, [], flags)
        program = [*command[: command.index(sys.executable)], sys.executable, str(Path(__file__).with_name("forked_ranks.py"))]
        done = subprocess.run([*program, function, how], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        return done.returncode, sorted(done.stdout.splitlines()), done.stderr

    return run


def test_a_forked_rank_is_what_its_launcher_is(script, family_of):
    plain, forked = (script("facts", how, 2) for how in ("plain", "fork"))
    assert plain[0] == forked[0] == 0, forked
    assert len(plain[1]) == 2 and [line.replace('"fork"', '"plain"') for line in forked[1]] == plain[1]
    family_of.wait_for_the_end()


def test_the_others_outlive_a_killed_forked_rank(script, family_of):
    code, lines, err = script("outlive", "fork", 4, "--with-ft", "ulfm")
    assert (code, lines) == (0, ["outlived 3 3"] * 3), err
    family_of.wait_for_the_end()


def test_sigusr1_reaches_the_ranks_and_a_waiting_rank_holds_little(distfl, config, tmp_path, start, family_of):
    process = start("fork", config, "rounds=4", wait=False)
    distfl.wait_for_round(tmp_path / "run", 1, process)
    ranks = family_of.ranks()
    assert len(ranks) == 3 and len(family_of.launchers()) == 3 and len(family_of.parents()) == 1
    private = sorted(_private_mb(rank) for rank in ranks)
    assert private[0] < 60, private  # in the middle of training; a plain one: 170
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "continue with --resume" in err, err
    family_of.wait_for_the_end()
    done = start("fork", config, "rounds=4", "--resume")
    assert done.returncode == 0 and "resuming after round" in done.stderr and "round 4/4" in done.stdout, done
    family_of.wait_for_the_end()


def _private_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6


@pytest.mark.parametrize("victim", ["ranks", "launchers", "parents"])
def test_a_kill_ends_the_job_and_nothing_stays(distfl, config, tmp_path, start, family_of, victim):
    process = start("fork", config, "rounds=200", wait=False)
    distfl.wait_for_round(tmp_path / "run", 0, process)
    os.kill(getattr(family_of, victim)()[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=SECONDS_TO_END)
    assert process.returncode not in (0, 2, 75), err
    assert "signal 9" in err or "Killed" in err, err
    family_of.wait_for_the_end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_mpirun_ends_all(distfl, config, tmp_path, start, family_of, number):
    process = start("fork", config, "rounds=200", wait=False)
    distfl.wait_for_round(tmp_path / "run", 0, process)
    process.send_signal(number)
    process.communicate(timeout=SECONDS_TO_END)
    assert process.returncode not in (0, 2, 75)
    family_of.wait_for_the_end()


def test_ctrl_c_interrupts_ranks_that_the_command_forked(distfl, config, tmp_path, family_of):
    process = distfl.start("train", config, "rounds=200", "launch.start=fork", ranks=3)
    distfl.wait_for_round(tmp_path / "run", 0, process)
    assert len(family_of.parents()) == 1
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS_TO_END)
    assert process.returncode == 130 and "interrupted" in err, err
    family_of.wait_for_the_end()


def test_an_audit_of_forked_ranks_explains_every_byte(distfl, config, tmp_path, family_of):
    done = distfl("audit", config, "rounds=1", "launch.start=fork", ranks=3)
    assert done.returncode == 0, done
    assert max(_start_up_seconds(tmp_path / "run")[1:]) < 1  # importing alone takes longer
    family_of.wait_for_the_end()


def test_control_groups_cap_the_clients_of_forked_ranks(distfl, config, tmp_path, start, family_of):
    try:
        choice.make_cap("cgroup")
    except CapError as error:
        pytest.skip(error.found)
    done = start("fork", config, "rounds=1", "memory.enforce=cgroup", "method.options.extra_blocks={weak: 1}")
    assert done.returncode == 0, done
    reports = distfl.reports(tmp_path / "run")
    assert {report["cause"] for report in reports} == {None, "over_cap"}
    # what forked ranks share is nobody's: pages of Python's own that a client copies are few
    beyond = [report["measured_peak_bytes"] - report["predicted_peak_bytes"] for report in reports if report["ok"]]
    assert max(beyond) < 1e6, beyond
    family_of.wait_for_the_end()


def test_a_killed_mpirun_takes_all_with_it(distfl, config, tmp_path, start, family_of):
    process = start("fork", config, "rounds=200", wait=False)
    distfl.wait_for_round(tmp_path / "run", 0, process)
    process.kill()
    process.communicate(timeout=SECONDS_TO_END)
    family_of.wait_for_the_end()


def test_a_parent_that_cannot_import_leaves_the_ranks_to_start_plainly(config, tmp_path, start, family_of, monkeypatch):
    folder = tmp_path / "shadow"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import sys\nif 'distfl-parent-of-ranks' in sys.orig_argv: sys.modules['torch'] = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    done = start("fork", config, "rounds=1")
    assert done.returncode == 0 and "round 1/1" in done.stdout, done
    family_of.wait_for_the_end()
