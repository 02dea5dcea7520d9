"""The main job with real ranks: same bits anywhere, caps that bite, resume, signals, bad input."""

import json
import os
import re
import signal
import socket
import sys
import time

import pytest
from conftest import AUTO

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(240)]


def test_local_and_2_4_and_9_ranks_give_the_same_model_bit_for_bit(distfl, config, tmp_path):
    models, scores = set(), set()
    for ranks in (None, 2, 4, 9):
        run = tmp_path / f"run-{ranks}"
        done = distfl("train", config, f"run.folder={run}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert (run / "finished").exists()
        models.add(distfl.model(run))
        scores.add(tuple(json.loads(line)["test_loss"] for line in (run / "rounds.jsonl").read_text().splitlines()))
    assert len(models) == 1
    assert len(scores) == 1  # evaluation is spread over the ranks and still sums in client order


def test_fixed_sums_give_the_same_model_bit_for_bit_on_any_ranks(distfl, config, tmp_path):
    models = {}
    for sums, ranks in (("fixed", None), ("fixed", 2), ("fixed", 4), ("float", 4)):
        run = tmp_path / f"{sums}-{ranks}"
        done = distfl("train", config, "transport.collective=reduce", f"transport.sums={sums}", f"run.folder={run}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        models.setdefault(sums, set()).add(distfl.model(run))
    assert len(models["fixed"]) == 1
    assert models["float"] != models["fixed"]


def test_levers_and_kept_features_give_the_same_model_bit_for_bit_on_any_ranks(distfl, config, tmp_path):
    # Two and three blocks of four, where not even one would fit by plain steps; nobody ever trains block 0.
    # 10 steps of 16 rows pass a client's rows again and again, and round 2 those of round 1.
    common = [*AUTO, "fleet.groups.0.memory_mb=4.6", "fleet.groups.1.memory_mb=5.3", "training.steps=10"]
    kept = ["levers.mapped_prefix=on", "levers.prefix_features=on"]
    not_kept = ["levers.mapped_prefix=off", "levers.prefix_features=off"]
    models, losses, flops = set(), set(), {}
    for name, ranks, more in (("plainly", None, not_kept), ("local", None, kept), ("two", 2, kept), ("four", 4, kept)):
        run = tmp_path / name
        done = distfl("train", config, *common, *more, f"run.folder={run}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        reports = distfl.reports(run)
        assert len(reports) == 24 and all(report["ok"] for report in reports)
        assert {report["blocks"] for report in reports} == {2, 3}
        models.add(distfl.model(run))
        losses.add(tuple(json.loads(line)["test_loss"] for line in (run / "rounds.jsonl").read_text().splitlines()))
        flops[name] = [sum(report["flops"] for report in reports if report["round"] == round) for round in (1, 2)]
        predicted = [sum(report["predicted_flops"] for report in reports if report["round"] == round) for round in (1, 2)]
        assert (flops[name] == predicted) if name == "plainly" else all(f < p for f, p in zip(flops[name], predicted))
    assert len(models) == len(losses) == 1
    assert flops["local"] == flops["two"] == flops["four"]


def test_100_clients_10_per_round_do_not_depend_on_the_number_of_ranks(distfl, config, tmp_path):
    models = set()
    for ranks in (5, 11):
        run = tmp_path / f"run-{ranks}"
        done = distfl(
            "train",
            config,
            f"run.folder={run}",
            "data.partition=iid",
            "data.clients=100",
            "fleet.participants=10",
            "training.steps=1",
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr
        rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        assert [record["merged"] for record in rounds] == [0, 10, 10]
        models.add(distfl.model(run))
    assert len(models) == 1


# By plain steps 14 MB admit one block of four and 40 MB all; with levers 4.6 MB admit two and 12 MB all.
@pytest.mark.parametrize(
    "overrides, blocks",
    [([], {1, 4}), ([*AUTO, "fleet.groups.0.memory_mb=4.6", "fleet.groups.1.memory_mb=12"], {2, 4})],
    ids=["plain", "levers"],
)
def test_every_peak_is_under_its_cap_and_near_its_prediction(distfl, config, tmp_path, overrides, blocks):
    done = distfl("train", config, *overrides, ranks=3)
    assert done.returncode == 0, done.stderr
    reports = distfl.reports(tmp_path / "run")
    assert len(reports) == 24 and all(report["ok"] for report in reports)
    for report in reports:
        assert report["measured_peak_bytes"] <= report["memory_bytes"]
        assert -2.0e6 < report["measured_peak_bytes"] - report["predicted_peak_bytes"] < 0  # the prediction has a margin of 1 MB
    assert {report["blocks"] for report in reports} == blocks  # weak and strong clients train different windows


def test_window_one_block_too_wide_hits_the_cap_is_recorded_and_shrinks(distfl, config, tmp_path):
    done = distfl("train", config, "method.options.extra_blocks={weak: 1}", ranks=4)
    assert done.returncode == 0, done.stderr
    first, second = ([r for r in distfl.reports(tmp_path / "run") if r["round"] == n] for n in (1, 2))
    over = [report for report in first if not report["ok"]]
    assert len(over) == 6 and all(report["blocks"] == 2 and "over its memory cap" in report["reason"] for report in over)
    assert all(report["upload_bytes"] == 0 for report in over)
    assert all(report["ok"] for report in second)  # one block less, and the round is whole again
    assert sorted(report["blocks"] for report in second) == [1] * 6 + [4] * 6


SABOTAGE = "import resource, sys\nresource.setrlimit = lambda *a: None\nfrom distfl.cli import main\nsys.exit(main())\n"


def test_without_a_limit_the_proof_fails_and_nothing_starts(distfl, config, tmp_path):
    script = tmp_path / "sabotage.py"
    script.write_text(SABOTAGE)
    done = distfl("train", config, "memory.enforce=rlimit", program=[*_mpirun(3), sys.executable, str(script)])
    assert done.returncode == 2
    assert "CapError" in done.stderr and "the limit does not bite" in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_a_limit_auto_takes_another_mechanism_or_nothing_starts(distfl, config, tmp_path):
    script = tmp_path / "sabotage.py"
    script.write_text(SABOTAGE)
    done = distfl("train", config, "rounds=1", program=[*_mpirun(3), sys.executable, str(script)])
    if done.returncode == 0:  # control groups can be made here
        (start,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["starts"]
        assert start["memory_enforced_by"] in ("cgroup-v1", "cgroup-v2")
        assert len(distfl.reports(tmp_path / "run")) == 12
    else:
        assert done.returncode == 2 and "rlimit: an allocation" in done.stderr and "does not bite" in done.stderr
        assert not (tmp_path / "run").exists()


def test_resume_after_kill_9_of_the_whole_job_gives_the_same_bits(distfl, config, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = (
        "rounds=6",
        "server.optimizer=adam",
        "server.learning_rate=0.01",
        "fleet.participants=6",
        "training.schedule=cosine",
        "training.final_learning_rate=0",
    )
    assert distfl("train", config, *common, f"run.folder={whole}").returncode == 0
    process = distfl.start("train", config, *common, f"run.folder={broken}", ranks=3)
    distfl.wait_for_round(broken, 2, process)
    distfl.kill(process)
    process.communicate(timeout=30)
    assert not (broken / "finished").exists()
    done = distfl("train", config, *common, f"run.folder={broken}", "--resume", ranks=4)
    assert done.returncode == 0, done.stderr
    assert distfl.model(broken) == distfl.model(whole)
    for name in ("rounds.jsonl", "clients.jsonl", "traffic.jsonl"):
        rounds = [json.loads(line)["round"] for line in (broken / name).read_text().splitlines()]
        assert rounds == sorted(rounds) and set(rounds) >= set(range(1, 7))
    assert len(json.loads("[" + ",".join((broken / "rounds.jsonl").read_text().splitlines()) + "]")) == 7


def test_with_error_feedback_resume_after_kill_9_and_any_ranks_give_the_same_bits(distfl, config, tmp_path):
    whole, broken, wide = tmp_path / "whole", tmp_path / "broken", tmp_path / "wide"
    common = (
        "rounds=6",
        "transport.codec=top_k",
        "transport.codec_options.density=0.05",
        "fleet.participants=6",
        "run.checkpoint_every=2",
        "memory.margin_mb=1.5",
        "fleet.groups.0.memory_mb=16",
    )
    assert distfl("train", config, *common, f"run.folder={whole}").returncode == 0
    done = distfl("train", config, *common, f"run.folder={wide}", ranks=4)
    assert done.returncode == 0, done.stderr
    process = distfl.start("train", config, *common, f"run.folder={broken}", ranks=3)
    distfl.wait_for_round(broken, 4, process)
    distfl.kill(process)
    process.communicate(timeout=30)
    assert not (broken / "finished").exists() and list((broken / "residuals").glob("client-*/unit-*"))
    done = distfl("train", config, *common, f"run.folder={broken}", "--resume", ranks=4)
    assert done.returncode == 0, done.stderr
    assert distfl.model(broken) == distfl.model(whole) == distfl.model(wide)
    assert all(report["ok"] for report in distfl.reports(broken))


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_by_every_codec_any_ranks_give_the_same_bits_within_the_planned_bytes(distfl, config, tmp_path, codec):
    models = set()
    for ranks in (None, 4):
        run = tmp_path / f"run-{ranks}"
        done = distfl("train", config, f"transport.codec={codec}", f"run.folder={run}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        models.add(distfl.model(run))
        for report in distfl.reports(run):
            assert report["ok"] and report["measured_peak_bytes"] <= report["predicted_peak_bytes"]
            assert 0 < report["upload_bytes"] - report["predicted_upload_bytes"] < 250 * (report["blocks"] + 1)
    assert len(models) == 1


def test_sigusr1_checkpoints_and_leaves_with_the_requeue_code(distfl, config, tmp_path):
    run = tmp_path / "run"
    process = distfl.start("train", config, "rounds=14", ranks=3)
    distfl.wait_for_round(run, 1, process)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "continue with --resume" in err
    assert not (run / "finished").exists()
    last = max(int(path.name[6:]) for path in (run / "checkpoints").iterdir())
    done = distfl("train", config, "rounds=14", "--resume", ranks=3)
    assert done.returncode == 0 and last < 14, done.stderr


def test_a_programming_error_on_one_rank_ends_the_job_within_seconds_with_its_traceback(distfl, config, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\nimport distfl.rounds as rounds\nfrom mpi4py import MPI\n"
        "def boom(*a):\n    raise ZeroDivisionError('planted')\n"
        "if MPI.COMM_WORLD.rank == 2:\n    rounds._host = boom\n"
        "from distfl.cli import main\nsys.exit(main())\n"
    )
    began = time.monotonic()
    done = distfl("train", config, program=[*_mpirun(4), sys.executable, str(script)], timeout=60)
    assert done.returncode not in (0, 2, 75)
    assert "planted" in done.stderr and "ZeroDivisionError" in done.stderr
    assert time.monotonic() - began < 45


def test_a_client_rank_imports_no_more_than_it_trains_with(distfl, config, tmp_path):
    script = tmp_path / "imports.py"
    script.write_text(
        "import sys\nfrom distfl.cli import main\ncode = main()\nfrom mpi4py import MPI\n"
        "heavy = [m for m in ('transformers', 'datasets', 'tensorboard', 'pandas', 'pyarrow', 'tokenizers', 'safetensors', 'yaml',"
        " 'matplotlib', 'torch._dynamo', 'sympy') if m in sys.modules]\n"
        "print('RANK', MPI.COMM_WORLD.rank, heavy, flush=True)\nsys.exit(code)\n"
    )
    done = distfl("train", config, program=[*_mpirun(3), sys.executable, str(script)])
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"RANK (\d) (\[.*?\])", done.stdout))  # two ranks' may stand in one
    assert lines["1"] == lines["2"] == "[]"
    assert "tensorboard" in lines["0"]  # the list would show it


BAD = {
    "unknown key": (["training.batchh=4"], "did you mean 'batch'"),
    "wrong type": (["training.batch=many"], "training.batch"),
    "negative budget": (["fleet.groups.0.memory_mb=-3"], "memory_mb"),
    "too small a budget": (["fleet.groups.0.memory_mb=2"], "needs at least memory_mb"),
    "missing data": (["data.path=/nowhere/train.jsonl"], "/nowhere"),
    "missing column": (["data.client_column=speaker"], "speaker"),
    "missing depth": (["model.depths=[4, 5]"], "depth 5"),
    "missing family": (["model.family=/nowhere"], "/nowhere"),
    "more groups than clients": (["data.clients=1"], "groups"),
    "unknown method": (["method.name=caf"], "caff"),
    "unknown codec": (["transport.codec=int9"], "int8"),
    "unknown option of a codec": (["transport.codec=top_k", "transport.codec_options.densty=0.1"], "did you mean 'density'"),
    "top_k of whole weights": (["transport.codec=top_k", "transport.deltas=off"], "set transport.deltas"),
    "more participants than clients": (["fleet.participants=50"], "participants"),
}


@pytest.mark.parametrize("overrides, text", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_error(distfl, config, tmp_path, overrides, text):
    done = distfl("train", config, *overrides, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("asked:") == 1 and text in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_bad_input_under_mpirun_is_said_once_and_ends_all_ranks(distfl, config, tmp_path):
    done = distfl("train", config, "model.depths=[3]", program=[*_mpirun(4), sys.executable, "-m", "distfl"], timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("asked:") == 1
    assert not (tmp_path / "run").exists()


def test_one_rank_under_mpirun_is_refused(distfl, config):
    done = distfl("train", config, program=[*_mpirun(1), sys.executable, "-m", "distfl"], timeout=60)
    assert done.returncode == 2 and "at least 2 ranks" in done.stderr


def test_a_run_folder_is_never_overwritten_and_a_damaged_checkpoint_is_refused(distfl, config, tmp_path):
    run = tmp_path / "run"
    process = distfl.start("train", config, "rounds=30")
    distfl.wait_for_round(run, 2, process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    before = (run / "rounds.jsonl").read_text()
    again = distfl("train", config, "rounds=30", timeout=60)
    assert again.returncode == 2 and "not empty" in again.stderr
    other = distfl("train", config, "rounds=31", "--resume", timeout=60)
    assert other.returncode == 2 and "rounds" in other.stderr
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "model.safetensors").write_bytes(b"garbage")
    damaged = distfl("train", config, "rounds=30", "--resume", timeout=60)
    assert damaged.returncode == 2 and "damaged" in damaged.stderr
    assert (run / "rounds.jsonl").read_text() == before


@pytest.mark.parametrize("ranks", [None, 3])
def test_a_run_that_is_interrupted_says_how_to_go_on_and_keeps_others_out_while_it_lives(distfl, config, tmp_path, ranks):
    run = tmp_path / "run"
    process = distfl.start("train", config, "rounds=40", ranks=ranks)
    distfl.wait_for_round(run, 1, process)
    second = distfl("train", config, "rounds=40", "--resume", timeout=60)
    assert second.returncode == 2 and "another run is writing here" in second.stderr
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    last = max(int(path.name[6:]) for path in (run / "checkpoints").glob("round-*"))
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1] == f"distfl: interrupted after round {last}; continue with --resume"
    assert "round 1/40: " in out
    resumed = distfl.start("train", config, "rounds=40", "--resume")
    distfl.wait_for_round(run, last + 1, resumed)
    resumed.send_signal(signal.SIGINT)
    assert f"resuming after round {last} of 40" in resumed.communicate(timeout=30)[1]


def test_of_two_starts_at_once_one_is_refused(distfl, config, tmp_path):
    both = [distfl.start("train", config) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    assert (tmp_path / "run" / "finished").exists()
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 3


def test_what_a_killed_mpirun_left_behind_does_not_stop_another_of_its_number(distfl, config, tmp_path, monkeypatch):
    # Open MPI names the folder of its own files after its process number, and fails where its file is there already
    temporary = tmp_path / "tmp"
    for number in range(os.getpid() + 1, os.getpid() + 3000):
        left = temporary / f"ompi.{number}"
        left.mkdir(parents=True)
        (left / f"pmix.{socket.gethostname().partition('.')[0]}.tool").touch()
    monkeypatch.setenv("TMPDIR", str(temporary))
    done = distfl("train", config, "rounds=1", ranks=2)
    assert done.returncode == 0, done.stderr
    assert not list(temporary.glob("distfl-*"))


@pytest.mark.parametrize("ranks", [None, 3])
def test_sigusr1_soon_after_the_start_is_not_lost(distfl, config, ranks):
    process = distfl.start("train", config, "rounds=40", ranks=ranks)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped on request" in err, err


def _mpirun(ranks: int) -> list[str]:
    from distfl.launching import mpirun_command

    command = mpirun_command(ranks, [])
    return command[: command.index(sys.executable)]
