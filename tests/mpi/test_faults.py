"""Ranks that die or hang, with real processes: the job goes on with the rest, and the model has the bits of an undisturbed run."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distfl.caps.cgroup import open_cgroup
from distfl.errors import CapError
from distfl.forking import START
from distfl.launching import mpirun_command, recovery_flags

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(240)]
HERE = Path(__file__).parent
COMMON = ["rounds=4", "training.steps=1", "memory.enforce=rlimit"]
OOM_BYTES = 64 * 2**20
SECONDS_TO_END = 20


@pytest.fixture
def dying(distfl, config, tmp_path, monkeypatch):
    """Run a job whose ranks meet their fates (see dying.py); it must leave no process behind."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv(START, "fork")  # the same, in a third of the time

    def run(ranks: int, fates: list, *overrides: str, flags: list[str] | None = None) -> tuple[Path, subprocess.CompletedProcess]:
        flags = ["--with-ft", "ulfm"] if flags is None else flags
        command = mpirun_command(ranks, [], ("-x", START, *flags))
        program = [*command[: command.index(sys.executable)], sys.executable, str(HERE / "dying.py"), json.dumps(fates)]
        folder = tmp_path / "disturbed"
        done = distfl("train", config, *COMMON, f"run.folder={folder}", *overrides, program=program)
        _wait_for_the_end(str(folder))
        return folder, done

    return run


def _wait_for_the_end(word: str) -> None:
    """No process has this among its arguments."""
    deadline = time.monotonic() + SECONDS_TO_END
    while left := [path for path in Path("/proc").glob("[0-9]*/cmdline") if _has(path, word)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _has(path: Path, word: str) -> bool:
    try:
        return word.encode() in path.read_bytes()
    except OSError:
        return False


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture
def undisturbed(distfl, config, tmp_path, models):
    """Model after every round, by one process and nothing that dies: overrides -> {round: bytes}."""

    def run(*overrides: str, program: list[str] | None = None) -> dict[int, bytes]:
        key = (overrides, program and program[-1])
        if key not in models:
            folder = tmp_path / "undisturbed"
            done = distfl("train", config, *COMMON, "run.keep_checkpoints=9", f"run.folder={folder}", *overrides, program=program)
            assert done.returncode == 0, done.stderr
            models[key] = {int(path.parent.name[6:]): path.read_bytes() for path in folder.glob("checkpoints/*/model.safetensors")}
        return models[key]

    return run


def _lines(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def _newest(run: Path) -> tuple[int, bytes]:
    folder = sorted((run / "checkpoints").glob("round-*"))[-1]
    return int(folder.name[6:]), (folder / "model.safetensors").read_bytes()


def check_recovered(run: Path, done: subprocess.CompletedProcess, lost: list[list[int]], models: dict[int, bytes], rounds: int = 4) -> None:
    """It ended well, its records are whole, and the bits are those of the undisturbed run.

    Args:
        lost: numbers of the ranks that went, fault by fault (those of one round may be seen one after another).
    """
    assert done.returncode == 0, done.stderr
    assert (run / "finished").exists() and "Traceback" not in done.stderr
    assert _newest(run) == (rounds, models[rounds])
    assert [line["round"] for line in _lines(run, "rounds.jsonl")] == [line["round"] for line in _lines(run, "traffic.jsonl")]
    assert [line["round"] for line in _lines(run, "rounds.jsonl")] == list(range(rounds + 1))
    assert [line["round"] for line in _lines(run, "clients.jsonl")] == sorted([*range(1, rounds + 1)] * 12)
    faults = _lines(run, "faults.jsonl")
    seen = {}
    for fault in faults:
        seen.setdefault(fault["round"], []).extend(number for number, _, _ in fault["lost"])
    assert [sorted(numbers) for numbers in seen.values()] == lost, faults
    assert "; round" in done.stderr or "; the end of round" in done.stderr
    summary = (run / "summary.txt").read_text()
    assert all(f"rank {number} (" in summary for numbers in lost for number in numbers)
    (start,) = json.loads((run / "manifest.json").read_text())["starts"]
    assert start["lost_ranks"] == "repeat" and "the round is repeated without them" in done.stderr
    assert len(_lines(run, "traffic.jsonl")[-1]["mpi"]) == start["ranks"] - len(sum(lost, []))


@pytest.mark.parametrize("collective", ["gather", "reduce"])
def test_one_rank_of_eight_killed_in_every_phase(dying, undisturbed, collective):
    fates = [[1, "training", [1], "KILL"], [2, "gathering 5", [2], "KILL"], [3, "broadcasting", [3], "KILL"], [4, "scoring", [4], "KILL"]]
    run, done = dying(9, fates, f"transport.collective={collective}")
    check_recovered(run, done, [[1], [2], [3], [4]], undisturbed(f"transport.collective={collective}"))
    phases = [fault["phase"] for fault in _lines(run, "faults.jsonl")]
    gathering = "gathering updates" if collective == "gather" else "summing up updates"
    assert phases == ["training", gathering, "broadcasting units", "scoring"]
    twice, once = (entry["mpi"][0]["sent"]["units"] for entry in _lines(run, "traffic.jsonl")[3:])
    assert twice > 1.5 * once  # what was sent again counts, in its round


def test_a_client_whose_weights_are_not_numbers_is_left_out_of_its_round(dying, undisturbed):
    run, done = dying(3, [[2, "training", ["client 5"], "NAN"]])
    assert done.returncode == 0 and "left out" in done.stdout, done.stderr
    bad = [report for report in _lines(run, "clients.jsonl") if not report["ok"]]
    assert [(report["round"], report["client"], report["cause"]) for report in bad] == [(2, 5, "not_finite")]
    assert _newest(run)[1] != undisturbed()[4] and (run / "finished").exists()


def test_a_disk_that_is_full_costs_work_and_no_bits(distfl, config, dying, undisturbed):
    # nobody ever trains block 0, and 10 steps of 16 rows pass a client's rows again and again: its outputs are worth being kept
    kept = [f"levers.{lever}=auto" for lever in ("micro_batches", "loss_chunks", "recompute", "fused_update")]
    kept += ["levers.prefix_features=on", "fleet.groups.0.memory_mb=4.6", "fleet.groups.1.memory_mb=5.3", "training.steps=10", "rounds=2"]
    run, done = dying(3, [[1, "training", [1, 2], "FULL"]], *kept)
    assert done.returncode == 0 and all(report["ok"] for report in _lines(run, "clients.jsonl")), done.stderr
    assert _newest(run) == (2, undisturbed(*kept)[2])
    full, roomy = (sum(report["flops"] for report in _lines(folder, "clients.jsonl")) for folder in (run, run.with_name("undisturbed")))
    assert full > roomy


@pytest.mark.parametrize(
    "collective, fates",
    [
        ("gather", [[1, "training", [2, 3, 8], "KILL"], [2, "gathering", [1, 4, 7], "KILL"]]),
        ("reduce", [[1, "training", [2, 3, 8], "KILL"], [2, "gathering", [1, 4, 7], "KILL"]]),
        ("gather", [[1, "broadcasting", [2, 3, 8], "KILL"], [2, "scoring", [1, 4, 7], "KILL"]]),
    ],
    ids=["gather", "reduce", "broadcasting and scoring"],
)
def test_three_ranks_of_eight_killed(dying, undisturbed, collective, fates):
    run, done = dying(9, fates, "rounds=2", f"transport.collective={collective}")
    check_recovered(run, done, [[2, 3, 8], [1, 4, 7]], undisturbed(f"transport.collective={collective}"), rounds=2)


def test_half_merged_units_momenta_and_residuals_are_taken_back(dying, undisturbed):
    how = ["transport.codec=top_k", "transport.codec_options.density=0.05", "server.optimizer=adam", "server.learning_rate=0.01"]
    how += ["fleet.groups.0.memory_mb=16", "memory.margin_mb=1.5", "rounds=3"]
    # 4 client ranks, 3 waves of 6 units: at the 16th block three units have been merged
    run, done = dying(5, [[2, "gathering 16", [2], "KILL"], [3, "training", [1], "KILL"]], *how)
    check_recovered(run, done, [[2], [1]], undisturbed(*how), rounds=3)


def test_deaths_among_those_that_meet_after_a_death_and_at_the_end(dying, undisturbed):
    fates = [[1, "training", [2], "KILL"], [1, "recovering", [5], "KILL"], [2, "reporting", [1], "KILL"], [2, "shrinking", [3], "KILL"]]
    run, done = dying(8, [*fates, [3, "orders", [4], "KILL"], [4, "ending", [6], "KILL"]])
    check_recovered(run, done, [[2, 5], [1, 3], [4]], undisturbed("transport.collective=gather"))


def test_a_client_that_kills_its_ranks_is_left_out(dying, undisturbed, tmp_path):
    run, done = dying(6, [[2, "training", ["client 5"], "KILL"]])
    assert done.returncode == 0, done.stderr
    assert [fault["hosted"] for fault in _lines(run, "faults.jsonl")] == [[5], [5]]
    left_out = [line for line in _lines(run, "clients.jsonl") if not line["ok"]]
    assert [(line["round"], line["client"], line["cause"]) for line in left_out] == [(round, 5, "rank_lost") for round in (2, 3, 4)]
    assert "3 after their ranks were lost" in (run / "summary.txt").read_text()
    script = tmp_path / "without.py"
    script.write_text(
        "import sys\nfrom distfl import exchange\nfrom distfl.errors import NotFinite\nplain = exchange.Gather.keep\n"
        "def keep(self, assignment, blocks):\n    if assignment.client == 5 and assignment.round > 1: raise NotFinite('', '', '')\n"
        "    plain(self, assignment, blocks)\nexchange.Gather.keep = keep\nfrom distfl.cli import main\nsys.exit(main())\n"
    )
    assert _newest(run) == (4, undisturbed(program=[sys.executable, str(script)])[4])


def test_ranks_that_hang_are_killed_by_a_process_of_their_host(dying, undisturbed):
    fates = [[0, "start", [3, 4], "HOST elsewhere"], [1, "training", [2, 3], "STOP"]]
    run, done = dying(6, fates, "rounds=2", "faults.deadline_seconds=1", "faults.grace_seconds=3")
    check_recovered(run, done, [[2, 3]], undisturbed("transport.collective=gather"), rounds=2)
    assert "rank 3 (elsewhere, process " in done.stderr and done.stderr.count("has not answered for 3 s and is killed") == 2


def test_a_rank_that_hangs_out_of_reach_ends_the_job(dying):
    fates = [[0, "start", [2], "HOST elsewhere"], [1, "training", [2], "STOP"]]
    _, done = dying(4, fates, "faults.deadline_seconds=1", "faults.grace_seconds=3")
    assert done.returncode not in (0, 2, 75)
    assert "no other rank is on elsewhere to end it" in done.stderr and "--resume" in done.stderr


def test_a_rank_that_the_kernel_kills_for_memory(dying, undisturbed, monkeypatch):
    try:
        root = open_cgroup(1).root
    except CapError as error:
        pytest.skip(str(error))
    group = root / f"distfl-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(OOM_BYTES))
        with contextlib.suppress(OSError):
            (group / "memory.swappiness").write_text("0")
        monkeypatch.setenv("DYING_GROUP", str(group))
        run, done = dying(4, [[1, "training", [2], "OOM"]], "rounds=2", "memory.enforce=report")
        assert "oom_kill 1" in (group / "memory.oom_control").read_text()
    finally:
        group.rmdir()
    check_recovered(run, done, [[2]], undisturbed("transport.collective=gather"), rounds=2)


@pytest.mark.parametrize(
    "ranks, fates, why",
    [
        (4, [[1, "training", [1], "KILL"], [3, "gathering", [0], "KILL"]], "the server rank is gone"),
        (3, [[2, "training", [1, 2], "KILL"]], "no client rank is left"),
    ],
    ids=["server", "all clients"],
)
def test_what_cannot_go_on_ends_and_resumes_to_the_same_bits(distfl, config, dying, undisturbed, ranks, fates, why):
    run, done = dying(ranks, fates)
    assert done.returncode not in (0, 2, 75)
    assert why in done.stderr and "continue with --resume" in done.stderr
    assert not (run / "finished").exists()
    resumed = distfl("train", config, *COMMON, f"run.folder={run}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert _newest(run) == (4, undisturbed("transport.collective=gather")[4])
    assert [line["round"] for line in _lines(run, "rounds.jsonl")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("what, code", [("USR1", 75), ("INT", 130)])
def test_signals_after_a_loss(dying, undisturbed, what, code):
    run, done = dying(4, [[1, "training", [1], "KILL"], [2, "gathering", [0], what]])
    assert done.returncode == code, done.stderr
    after = {"USR1": 2, "INT": 1}[what]
    assert f"after round {after}; continue with --resume" in done.stderr
    assert _newest(run) == (after, undisturbed("transport.collective=gather")[after])


def test_without_recovery_a_death_ends_the_job_and_that_is_said_at_the_start(dying):
    run, done = dying(3, [[1, "training", [1], "KILL"]], "faults.recover=auto", flags=[])
    assert done.returncode not in (0, 2, 75)
    assert "a rank that dies ends the job; continue with --resume" in done.stderr
    assert json.loads((run / "manifest.json").read_text())["starts"][0]["lost_ranks"] == "abort"
    assert [line["round"] for line in _lines(run, "rounds.jsonl")] == [0] and not (run / "faults.jsonl").exists()


def test_with_recovery_switched_off_a_death_ends_the_job_under_ulfm_too(dying):
    run, done = dying(3, [[1, "training", [1], "KILL"]], "faults.recover=off")
    assert done.returncode not in (0, 2, 75)
    assert "RankLost" in done.stderr and "continue with --resume" in done.stderr
    assert json.loads((run / "manifest.json").read_text())["starts"][0]["lost_ranks"] == "abort"


def test_a_rank_that_dies_before_all_have_met_ends_the_others(distfl, config, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('OMPI_COMM_WORLD_RANK') == '1': os.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    script = tmp_path / "hasty.py"
    script.write_text(
        "import sys\nfrom distfl import cli, launching\nlaunching.SECONDS_TO_END_TOGETHER = 1\nlaunching.START_POLL_SECONDS = 0.02\n"
        "sys.exit(cli.main())\n"
    )
    done = distfl("train", config, ranks=3, program=[sys.executable, str(script)], timeout=30)
    assert done.returncode not in (0, 2, 75) and "1 of the ranks ended before all had met" in done.stderr, done
    _wait_for_the_end(str(config))


def test_recovery_that_cannot_be_is_refused(dying):
    run, done = dying(3, [], "faults.recover=on", flags=[])
    assert done.returncode == 2 and "--with-ft ulfm" in done.stderr
    assert not (run / "config.yaml").exists()


def test_ranks_starts_mpirun_with_the_flag_unless_told_otherwise(monkeypatch):
    assert recovery_flags("auto") == recovery_flags("on") == ["--with-ft", "ulfm"]
    assert recovery_flags("off") == []
    monkeypatch.setenv("DISTFL_MPIRUN_FLAGS", "--with-ft ulfm")
    assert recovery_flags("auto") == []
