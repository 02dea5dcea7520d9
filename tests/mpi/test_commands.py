"""The commands around a run: plan, report, evaluate, export; and a run that is continued in unusual ways."""

import json
import re
import signal
import sys

import pytest
import yaml

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(240)]
START_OF_RANKS = "plain"


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_plan_names_depth_windows_and_slack_and_trains_nothing(distfl, config, tmp_path):
    done = distfl("plan", config, "model.depths=[2, 4]")
    assert done.returncode == 0, done.stderr
    assert "<- chosen" in done.stdout and "slack MB" in done.stdout and "fullest moment" in done.stdout
    weak = next(line.split() for line in done.stdout.splitlines() if line.startswith("weak"))
    assert weak[2] == "1" and float(weak[6]) == pytest.approx(float(weak[5]) - float(weak[4]), abs=0.011)
    assert not (tmp_path / "run").exists()


def test_a_run_can_be_reported_scored_and_exported(distfl, config, tmp_path):
    run = tmp_path / "run"
    done = distfl("train", config, "run.picture=true")
    assert done.returncode == 0, done.stderr
    table = (run / "summary.txt").read_text()
    assert table in done.stdout
    (run / "summary.png").unlink()
    again = distfl("report", run)
    assert again.returncode == 0 and table.strip() in again.stdout and (run / "summary.png").stat().st_size > 10_000
    last = lines(run / "rounds.jsonl")[-1]
    score = json.loads(distfl("evaluate", run).stdout)
    assert (score["loss"], score["accuracy"]) == (pytest.approx(last["test_loss"], rel=1e-9), last["test_accuracy"])
    assert score["groups"].keys() == {"weak", "strong"}
    assert "one process" in table and "left out: 0 over their cap" in table
    refused = distfl("export", run, tmp_path / "hf", "--depth", 2)
    assert refused.returncode == 2 and "leave --depth away" in refused.stderr
    assert distfl("export", run, tmp_path / "hf").returncode == 0
    script = "import sys; from transformers import AutoModelForCausalLM as M; print(M.from_pretrained(sys.argv[1]).config.n_layer)"
    assert distfl(tmp_path / "hf", program=[sys.executable, "-c", script]).stdout.strip() == "4"


def test_traffic_is_counted_per_client_and_unit_and_first_models_stand_apart(distfl, config, tmp_path):
    assert distfl("train", config, "fleet.participants=6", "rounds=3", ranks=3).returncode == 0
    traffic, rounds, reports = (lines(tmp_path / "run" / name) for name in ("traffic.jsonl", "rounds.jsonl", "clients.jsonl"))
    met: set[str] = set()
    for entry, record in zip(traffic[1:], rounds[1:]):
        up = {client: sum(units.values()) for client, units in entry["payload"]["up"].items()}
        assert up == {str(r["client"]): r["upload_bytes"] for r in reports if r["round"] == record["round"]}
        assert sum(up.values()) == record["upload_bytes"]
        for client, sent in entry["payload"]["down"].items():
            assert ("first" in sent) == (client not in met)
            met.add(client)
        server, *workers = entry["mpi"]
        assert server["received"]["updates"] == sum(worker["sent"]["updates"] for worker in workers) == record["upload_bytes"]


def test_resume_refuses_other_data_and_goes_on_where_nothing_was_saved_yet(distfl, config, tmp_path, corpus):
    run = tmp_path / "run"
    process = distfl.start("train", config, "rounds=16", "run.checkpoint_every=7")
    distfl.wait_for_round(run, 0, process)
    process.send_signal(10)  # SIGUSR1: saves although round 7 is not reached
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    last = max(record["round"] for record in lines(run / "rounds.jsonl"))
    assert (run / "checkpoints" / f"round-{last:05d}").is_dir()
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("the", "THE"))
    original, moved = config.read_text(), config.read_text().replace(str(corpus), str(other))
    config.write_text(moved)
    saved = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(saved.replace(str(corpus), str(other)))  # the same path, other content behind it
    refused = distfl("train", config, "rounds=16", "run.checkpoint_every=7", "--resume")
    assert refused.returncode == 2 and "tokens_checksum" in refused.stderr
    config.write_text(original)
    (run / "config.yaml").write_text(saved)
    for checkpoint in (run / "checkpoints").iterdir():  # as if killed in round 0
        checkpoint.rename(checkpoint.with_name("set-aside-" + checkpoint.name))
    lost = distfl("train", config, "rounds=16", "run.checkpoint_every=7", "--resume")
    assert lost.returncode == 2 and "no checkpoint" in lost.stderr  # not silently from the start
    (run / "rounds.jsonl").write_text((run / "rounds.jsonl").read_text().splitlines()[0] + "\n")
    done = distfl("train", config, "rounds=16", "run.checkpoint_every=7", "--resume")
    assert done.returncode == 0 and "resuming before round 0" in done.stderr, done.stderr
    assert [record["round"] for record in lines(run / "rounds.jsonl")] == list(range(17))
    assert len(json.loads((run / "manifest.json").read_text())["starts"]) == 2


def test_help_names_every_command(distfl):
    text = distfl("--help").stdout
    for command in ("train", "plan", "pretrain", "evaluate", "export", "import", "report", "doctor"):
        assert f"    {command} " in text or f"    {command}\n" in text


def test_doctor_finds_all_that_a_run_needs(distfl):
    done = distfl("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILS" not in done.stdout and "memory cap" in done.stdout


def test_a_reader_that_has_enough_is_no_error(distfl, config):
    done = distfl(program=["bash", "-c", f"set -o pipefail; {sys.executable} -m distfl plan {config} | true"])
    assert done.returncode in (0, 141) and "Traceback" not in done.stderr


def test_a_run_in_which_nothing_trained_says_so(distfl, config, tmp_path):
    done = distfl("train", config, "rounds=1", "training.learning_rate=1e30", "training.clip_norm=null", "training.optimizer=sgd")
    assert done.returncode == 0, done.stderr
    assert "12 not finite" in done.stdout and "WARNING: nothing was trained" in done.stdout


@pytest.mark.parametrize("method", ["caff", "lora", "flora"])
def test_a_plan_tells_the_downloads_that_a_round_then_counts(distfl, config, tmp_path, method):
    own = ["model.depths=[4]", f"method.name={method}", *(['method.options={"targets": ["q", "v"]}'] if method != "caff" else [])]
    planned = distfl("plan", config, *own)
    assert planned.returncode == 0, planned.stderr
    head, *rows = [re.split(r"\s{2,}", line.strip()) for line in planned.stdout.splitlines() if re.match(r"(group|weak|strong)\s", line)]
    downloads = {row[0]: float(row[head.index("download MB")]) for row in rows[:2]}
    run = tmp_path / "run"
    done = distfl("train", config, *own, f"run.folder={run}", "rounds=2")
    assert done.returncode == 0, done.stderr
    *_, last = map(json.loads, (run / "traffic.jsonl").read_text().splitlines())
    groups = {str(report["client"]): report["group"] for report in distfl.reports(run)}
    assert len(last["payload"]["down"]) == 12
    for client, sent in last["payload"]["down"].items():
        units = sum(bytes_ for unit, bytes_ in sent.items() if unit != "assignment")
        assert units / 1e6 == pytest.approx(downloads[groups[client]], abs=6e-4)


def test_methods_are_compared_and_a_comparison_goes_on_where_it_was_asked_to_stop(distfl, config, tmp_path):
    compare, out = tmp_path / "compare.yaml", tmp_path / "out"
    plan = {"train": config.name, "output": str(out), "seeds": [1], "methods": [{"method": "caff"}, {"method": "lora"}]}
    plan |= {"scenarios": [{"name": "only", "overrides": ["rounds=1"]}], "tuning": {"learning_rates": [1e-3]}}
    compare.write_text(yaml.safe_dump(plan))
    early = distfl("compare", compare, "--stage", "runs")
    assert early.returncode == 2 and "run the tuning first" in early.stderr
    process = distfl.start("compare", compare, "--stage", "tuning")
    distfl.wait_for_round(out / "tuning/only/caff/seed-1000-rate-0.001", 0, process)
    process.send_signal(signal.SIGUSR1)
    told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert not (out / "tuning/only/lora").exists()
    done = distfl("compare", compare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| lora | " in done.stdout and "NOT enforced" not in done.stdout
    assert {path.name for path in out.glob("*.*")} == {"comparison.md", "comparison.csv", "comparison.png", "rounds.png"}
    listed = distfl("compare", compare, "--stage", "list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["finished"] * 4
    refused = distfl("compare", compare, 'methods.1.options={"rnak": 3}')
    assert refused.returncode == 2 and "rnak" in refused.stderr
