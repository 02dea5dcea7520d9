"""distfl audit and distfl scale with real ranks: every byte explained, and a byte that is not named."""

import csv
import json

import pytest
from test_links_mpi import has_monitoring

from distfl.audit import read_audit

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not has_monitoring(), reason="this MPI has no component pml monitoring"),
]


@pytest.mark.parametrize(
    "collective, overrides",
    [
        ("gather", ["transport.codec=int8"]),
        ("reduce", ["transport.sums=float", "fleet.participants=7"]),  # waves of 3, 3 and 1: two ranks idle in the last one
        ("reduce", ["method.options.extra_blocks={weak: 2}"]),  # runs into the cap: reports without updates
    ],
    ids=["gather", "waves", "over the cap"],
)
def test_every_byte_is_explained(distfl, config, tmp_path, collective, overrides):
    done = distfl("audit", config, f"transport.collective={collective}", *overrides, ranks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unexplained: 0 bytes" in done.stdout and (tmp_path / "run" / "audit.txt").read_text().strip() in done.stdout
    reports = distfl.reports(tmp_path / "run")
    assert any(not report["ok"] for report in reports) == ("extra_blocks" in overrides[-1])
    moved = json.loads((tmp_path / "run" / "ledgers" / "0.json").read_text())["received"]
    assert (moved.get("updates", 0) > 1e5) == (collective == "gather") and (moved.get("means", 0) > 1e5) == (collective == "reduce")


def test_a_byte_that_nobody_counted_is_named(distfl, config, tmp_path):
    assert distfl("audit", config, "rounds=1", ranks=3).returncode == 0
    path = tmp_path / "run" / "ledgers" / "2.json"
    ledger = json.loads(path.read_text())
    ledger["direct"]["0"] -= 4
    path.write_text(json.dumps(ledger))
    done = distfl("audit", tmp_path / "run")
    assert done.returncode == 1
    assert "link 2 -> 0: +4 bytes" in done.stdout and "unexplained: 4 bytes" in done.stdout
    ledger["direct"]["0"] += 4
    path.write_text(json.dumps(ledger))

    def junk_report(audit):  # sender, receiver and links agree on it, but no report is that long
        audit.ledgers[2]["sent"]["reports"] += 1000
        audit.ledgers[2]["direct"]["0"] += 1000
        audit.ledgers[0]["received"]["reports"] += 1000
        audit.links[2, 0] += 1000

    def longer_orders(audit):
        for rank, ledger in enumerate(audit.ledgers):
            ledger["received" if rank else "sent"]["orders"] += 10_000
            ledger["broadcast_bytes"] += 10_000
            if rank:
                audit.links[0, rank] += 10_000

    def first(audit, way):
        return next(iter(audit.traffic[1]["payload"][way].values()))

    faults = [
        (lambda audit: None, 0),
        (lambda audit: first(audit, "up").update(head=first(audit, "up")["head"] + 100), 300),  # reports, rounds.jsonl, MPI
        (lambda audit: first(audit, "down").update(first=first(audit, "down")["first"] - 8), 16),  # recomputed, rounds.jsonl
        (lambda audit: first(audit, "down").update({"block.1": 50}), 100),
        (lambda audit: audit.run.rounds[1].update(download_bytes=audit.run.rounds[1]["download_bytes"] - 7), 7),
        (lambda audit: audit.run.clients[0].update(predicted_upload_bytes=audit.run.clients[0]["predicted_upload_bytes"] - 10**6), None),
        (lambda audit: audit.traffic[1]["payload"]["changed"].remove("head"), None),
        (junk_report, 1000),
        (longer_orders, None),
        (lambda audit: audit.ledgers[0]["received"].update(other=12), 12),
        (lambda audit: audit.links.update({(1, 2): 9}), 9),
    ]
    for plant, unexplained in faults:
        audit = read_audit(tmp_path / "run")
        plant(audit)
        assert audit.unexplained_bytes == unexplained if unexplained is not None else audit.unexplained_bytes > 5000
    path.unlink()
    done = distfl("audit", tmp_path / "run")
    assert done.returncode == 2 and "ledgers of 3 ranks" in done.stderr


def test_an_audit_needs_ranks_and_a_new_folder(distfl, config, tmp_path):
    assert "no --ranks" in distfl("audit", config).stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    assert "rounds=1" in distfl("audit", tmp_path / "run", "rounds=1").stderr  # what was run is run
    (tmp_path / "run" / "manifest.json").rename(tmp_path / "run" / "notes")
    done = distfl("audit", config, ranks=3)
    assert done.returncode == 2 and "not empty" in done.stderr and "mpirun" not in done.stderr


def test_a_scaling_study_grows_by_gather_and_stays_by_reduce(distfl, config, tmp_path):
    arguments = ["scale", config, "--output", tmp_path / "study", "rounds=1", "data.partition=iid", "data.clients={clients}"]
    done = distfl(*arguments, "--ranks", "3,5")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "study" / "scaling.csv") as file:
        points = {(point["collective"], int(point["ranks"])): {k: v for k, v in point.items()} for point in csv.DictReader(file)}
    assert points.keys() == {("gather", 3), ("gather", 5), ("reduce", 3), ("reduce", 5)}
    assert all(point["unexplained_bytes"] == "0" for point in points.values())
    into = {key: int(point["into_server_bytes"]) for key, point in points.items()}
    assert 1.9 < into["gather", 5] / into["gather", 3] < 2.1  # 2 and 4 clients, half of them narrow
    assert 0.99 < into["reduce", 5] / into["reduce", 3] < 1.01
    assert (tmp_path / "study" / "scaling.png").stat().st_size > 10_000
    again = distfl(*arguments, "--ranks", "3,5")  # what lies there is kept
    assert again.returncode == 0 and "ranks, gather" not in again.stderr
    other = distfl(*arguments, "training.steps=3", "--ranks", "3,5")
    assert other.returncode == 2 and "['training'] differ" in other.stderr
    (tmp_path / "study" / "gather-003").rename(tmp_path / "study" / "reduce-004")
    assert "3 ranks" in distfl(*arguments, "--ranks", "4", "--collectives", "reduce").stderr
    assert "at least 2 ranks" in distfl(*arguments, "--ranks", "1").stderr
    assert "3,x" in distfl(*arguments, "--ranks", "3,x").stderr
    assert "scatter" in distfl(*arguments, "--ranks", "3", "--collectives", "scatter").stderr
