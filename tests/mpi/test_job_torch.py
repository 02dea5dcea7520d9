"""The main job under torchrun: the bits and the ledger of the other transports, signals, ends of all kinds."""

import json
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest

from distfl.launching import torchrun

pytestmark = pytest.mark.timeout(240)
PLAIN_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "3"]


def processes(word: object) -> list[int]:
    """Those that have it on their command line, the oldest first; not those that end just now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(word).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


def ranks_of(run: Path) -> list[int]:
    """Process ids of the ranks that write to this run folder, by rank."""
    ranks = {}
    for process in processes(f"run.folder={run}"):
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        values = dict(entry.partition(b"=")[::2] for entry in environment)
        if b"TORCHELASTIC_RUN_ID" in values:
            ranks[int(values[b"RANK"])] = process
    return [ranks[rank] for rank in sorted(ranks)]


def nothing_is_left(run: Path, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while processes(f"run.folder={run}") and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes(f"run.folder={run}")


def ledgers(run: Path) -> dict[tuple, int]:
    """(round, rank, way, purpose) -> bytes."""
    found = {}
    for entry in map(json.loads, (run / "traffic.jsonl").read_text().splitlines()):
        for rank, of_rank in enumerate(entry["mpi"]):
            found |= {(entry["round"], rank, way, purpose): bytes_ for way, of_way in of_rank.items() for purpose, bytes_ in of_way.items()}
    return found


@pytest.mark.mpi
def test_gather_gives_the_bits_and_the_ledger_of_mpi(distfl, config, tmp_path):
    by_mpi, by_torch = tmp_path / "run-m", tmp_path / "run-t"
    for run, transport in ((by_mpi, "mpi"), (by_torch, "torch")):
        done = distfl("train", config, f"run.folder={run}", f"transport.name={transport}", "rounds=1", ranks=3)
        assert done.returncode == 0, done.stderr
        (start,) = json.loads((run / "manifest.json").read_text())["starts"]
        assert (start["transport"], start["ranks"], start["memory_enforced_by"]) == (transport, 3, "rlimit")
    assert distfl.model(by_mpi) == distfl.model(by_torch)
    of_mpi, of_torch = ledgers(by_mpi), ledgers(by_torch)
    assert of_mpi.keys() == of_torch.keys() and {purpose for *_, purpose in of_mpi} >= {"units", "updates", "assignments", "reports"}
    for key, bytes_ in of_mpi.items():  # start and reports tell seconds, whose text is not always as long
        assert abs(of_torch[key] - bytes_) <= (100 if key[-1] in ("start", "reports") else 0), key
    peaks = [[report["measured_peak_bytes"] for report in distfl.reports(run)] for run in (by_mpi, by_torch)]
    apart = [of_torch - of_mpi for of_mpi, of_torch in zip(*peaks)]  # a client's own scatters by some 0.5 MB, under either of them
    assert abs(statistics.mean(apart)) < 0.3e6 and max(map(abs, apart)) < 1e6, peaks
    assert nothing_is_left(by_torch)


def test_reduce_gives_the_bits_of_one_process(distfl, config, tmp_path):
    models = set()
    for name, ranks in (("local", None), ("torch", 4)):
        run = tmp_path / name
        overrides = [f"run.folder={run}", f"transport.name={name}", "transport.collective=reduce", "rounds=1"]
        done = distfl("train", config, *overrides, ranks=ranks)
        assert done.returncode == 0, done.stderr
        models.add(distfl.model(run))
    assert len(models) == 1


def test_sigusr1_checkpoints_leaves_with_the_requeue_code_and_the_run_resumes(distfl, config, tmp_path):
    run = tmp_path / "run"
    arguments = ("train", config, f"run.folder={run}", "rounds=6", "transport.name=torch")
    process = distfl.start(*arguments, ranks=3)
    distfl.wait_for_round(run, 1, process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.splitlines()[-1].endswith("continue with --resume")  # torchrun's report does not bury it
    assert nothing_is_left(run) and not (run / "finished").exists()
    done = distfl("train", config, f"run.folder={run}", "rounds=6", "--resume")  # in one process
    assert done.returncode == 0 and (run / "finished").exists(), done.stderr


def test_sigusr1_soon_after_the_start_is_not_lost(distfl, config):
    process = distfl.start("train", config, "transport.name=torch", ranks=2)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "before round 0" in err, err


def test_ctrl_c_ends_all_ranks_and_says_how_to_go_on(distfl, config, tmp_path):
    run = tmp_path / "run"
    process = distfl.start("train", config, f"run.folder={run}", "rounds=40", "transport.name=torch", ranks=3)
    distfl.wait_for_round(run, 1, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("distfl: interrupted after round ")
    assert nothing_is_left(run)


def test_a_killed_rank_ends_the_job_with_a_message_and_a_killed_torchrun_its_ranks(distfl, config, tmp_path):
    run = tmp_path / "run"
    process = distfl.start("train", config, f"run.folder={run}", "rounds=40", "transport.name=torch", ranks=3)
    distfl.wait_for_round(run, 1, process)
    began = time.monotonic()
    os.kill(ranks_of(run)[2], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 137 and time.monotonic() - began < 20
    assert "rank 2 was killed by SIGKILL" in err and "Traceback" not in err, err
    assert nothing_is_left(run)
    again = distfl.start("train", config, f"run.folder={run}", "rounds=40", "transport.name=torch", "--resume", ranks=3)
    distfl.wait_for_round(run, 3, again)
    launcher = next(process for process in processes("distfl.torchrun") if process in processes(f"run.folder={run}"))
    os.kill(launcher, signal.SIGKILL)
    again.communicate(timeout=30)
    assert again.returncode == 137 and nothing_is_left(run)


def test_a_programming_error_on_one_rank_ends_the_job_within_seconds_with_its_traceback(distfl, config, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, sys\nimport distfl.rounds as rounds\n"
        "def boom(*a):\n    raise ZeroDivisionError('planted')\n"
        "if os.environ['RANK'] == '2':\n    rounds._host = boom\n"
        "from distfl.cli import main\nsys.exit(main())\n"
    )
    began = time.monotonic()
    done = distfl("train", config, program=[*torchrun(3), sys.executable, str(script)], timeout=60)
    assert done.returncode == 1 and time.monotonic() - began < 45
    assert "planted" in done.stderr and done.stderr.count("Traceback") == 1 and "RankLost" not in done.stderr


def test_a_client_rank_imports_no_more_than_it_trains_with_and_no_mpi(distfl, config, tmp_path):
    script = tmp_path / "imports.py"
    script.write_text(
        "import os, sys\nfrom distfl.cli import main\ncode = main()\n"
        "heavy = [m for m in ('mpi4py', 'transformers', 'datasets', 'tensorboard', 'tokenizers', 'safetensors', 'yaml', 'matplotlib',"
        " 'torch._dynamo', 'sympy') if m in sys.modules]\n"
        "print('RANK', os.environ['RANK'], heavy, flush=True)\nsys.exit(code)\n"
    )
    done = distfl("train", config, "rounds=1", program=[*PLAIN_TORCHRUN, str(script)])
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"RANK (\d) (\[.*?\])", done.stdout))  # two ranks' may stand in one
    assert lines["1"] == lines["2"] == "[]", done.stdout
    assert "tensorboard" in lines["0"] and "mpi4py" not in lines["0"]


def test_what_is_refused_is_said_once(distfl, config, tmp_path):
    done = distfl("train", config, "transport.name=torch", "model.depths=[3]", ranks=3, timeout=60)
    assert done.returncode == 2 and done.stderr.count("asked:") == 1, done.stderr
    other = distfl("train", config, "transport.name=mpi", program=[*PLAIN_TORCHRUN, "-m", "distfl"], timeout=60)
    assert other.returncode == 1 and other.stderr.count("asked:") == 1  # torchrun itself knows no other code
    assert "what started the ranks uses torch" in other.stderr
    assert not (tmp_path / "run").exists()
