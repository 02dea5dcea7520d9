"""Every method with real ranks, under caps that it has to fit into: peaks, bits, scores and exports."""

import json
from pathlib import Path

import pytest
from conftest import AUTO

from distfl import methods

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(240)]
NAMES = sorted(path.stem for path in Path(methods.__file__).parent.glob("*.py") if path.stem not in ("__init__", "base", "caff"))
BUDGETS = ["model.depths=[2,4]", "fleet.groups.0.memory_mb=5.5", "fleet.groups.1.memory_mb=16", *AUTO]
# whose merge is more than a mean of whole tensors
OTHER_MERGES = ("hetlora", "flexlora", "flora", "heterofl", "fedhm", "depthfl")
MEGA = 10**6
# bytes of heap that are now and then used after all, so that the peak is lower: the logits leave one hole, further classifiers more
HOLES = {"depthfl": 2 * MEGA}


def overrides(name: str, *more: str) -> list[str]:
    whole = name == "fedavg"  # it is refused where a client cannot train all of it
    return [*BUDGETS, f"method.name={name}", *(["fleet.groups.0.memory_mb=16"] if whole else []), *more]


@pytest.mark.parametrize("name", NAMES)
def test_clients_stay_within_their_caps_near_their_predicted_peaks_with_the_bits_of_one_process(distfl, config, tmp_path, name):
    run = tmp_path / "run"
    done = distfl("train", config, *overrides(name, "rounds=1", f"run.folder={run}"), ranks=3)
    assert done.returncode == 0, done.stderr
    reports = distfl.reports(run)
    assert all(report["ok"] for report in reports), [report["reason"] for report in reports]
    assert len(reports) == (6 if name == "fedavg_exclusive" else 12)
    for report in reports:
        assert report["measured_peak_bytes"] <= report["memory_bytes"]
        apart = report["predicted_peak_bytes"] - MEGA - report["measured_peak_bytes"]  # without the margin
        allowed = 0.05 * report["measured_peak_bytes"]  # or some dozens of pages
        assert -max(allowed, 250_000) < apart < max(allowed, HOLES.get(name, MEGA)), report
        assert 0 < report["flops"] <= report["predicted_flops"]
    depth = json.loads((run / "manifest.json").read_text())["depth"]
    assert depth == 4 or name in ("allsmall", "heterofl", "fedhm", "depthfl")
    if name in OTHER_MERGES:
        local = distfl("train", config, *overrides(name, "rounds=1", f"run.folder={tmp_path / 'local'}"))
        assert local.returncode == 0 and distfl.model(run) == distfl.model(tmp_path / "local"), local.stderr


@pytest.mark.parametrize("name", OTHER_MERGES)
def test_by_reduce_any_number_of_ranks_gives_the_same_bits(distfl, config, tmp_path, name):
    models = set()
    for ranks in (None, 4):
        run = tmp_path / f"run-{ranks}"
        done = distfl("train", config, *overrides(name, "rounds=1", "transport.collective=reduce", f"run.folder={run}"), ranks=ranks)
        assert done.returncode == 0, done.stderr
        models.add(distfl.model(run))
    assert len(models) == 1


@pytest.mark.parametrize("name", ["lora", "fedhm", "depthfl"])
def test_a_run_can_be_scored_and_exported_as_a_plain_model(distfl, config, tmp_path, name):
    run = tmp_path / "run"
    done = distfl("train", config, *overrides(name, "rounds=1", f"run.folder={run}"))
    assert done.returncode == 0, done.stderr
    scored = distfl("evaluate", run)
    last = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
    assert scored.returncode == 0 and json.loads(scored.stdout)["loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    exported = distfl("export", run, tmp_path / "gpt2")
    assert exported.returncode == 0, exported.stderr
    depth = json.loads((run / "manifest.json").read_text())["depth"]
    assert json.loads((tmp_path / "gpt2" / "config.json").read_text())["n_layer"] == depth
