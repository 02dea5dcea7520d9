"""Every method with real ranks: the same bits as in one process, peaks under their caps, scored and exported as a plain model."""

import json
from pathlib import Path

import pytest
from conftest import AUTO

from distfl import methods

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(240)]
NAMES = sorted(path.stem for path in Path(methods.__file__).parent.glob("*.py") if path.stem not in ("__init__", "base", "caff"))
BUDGETS = ["model.depths=[2,4]", "fleet.groups.0.memory_mb=5.5", "fleet.groups.1.memory_mb=16", *AUTO]


@pytest.mark.parametrize("name", NAMES)
def test_any_ranks_give_the_same_bits_under_caps_and_the_model_can_be_exported(distfl, config, tmp_path, name):
    models, losses = set(), set()
    overrides = [*BUDGETS, f"method.name={name}"]
    if name == "fedavg":
        overrides.append("fleet.groups.0.memory_mb=16")  # else it is refused
    for ranks in (None, 4):
        run = tmp_path / f"run-{ranks}"
        done = distfl("train", config, *overrides, f"run.folder={run}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        reports = distfl.reports(run)
        trained = [report for report in reports if report["cause"] != "no_window"]
        assert trained and all(report["ok"] for report in trained)
        assert (len(trained) < len(reports)) == (name == "fedavg_exclusive")
        for report in trained:  # the prediction has a margin of 1 MB
            assert report["measured_peak_bytes"] <= report["memory_bytes"]
            assert -2.0e6 < report["measured_peak_bytes"] - report["predicted_peak_bytes"] < 0
        models.add(distfl.model(run))
        losses.add(json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])["test_loss"])
    assert len(models) == len(losses) == 1
    scored = distfl("evaluate", run)
    assert scored.returncode == 0 and json.loads(scored.stdout)["loss"] == pytest.approx(losses.pop(), rel=1e-6)
    exported = distfl("export", run, tmp_path / "gpt2")
    assert exported.returncode == 0, exported.stderr
    depth = json.loads((run / "manifest.json").read_text())["depth"]
    assert depth == (2 if name == "allsmall" else 4)
    assert json.loads((tmp_path / "gpt2" / "config.json").read_text())["n_layer"] == depth
