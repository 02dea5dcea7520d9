"""Run folders -> tables and pictures. Reads files only; imports no training code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from distfl import settings
from distfl.config import TrainConfig
from distfl.errors import CheckpointError
from distfl.fleet import MEGA
from distfl.run_folder import FAULTS

CAUSES = {
    "over_cap": "over their cap",
    "not_finite": "not finite",
    "bad_message": "with a bad message",
    "no_window": "without a window",
    "rank_lost": "after their ranks were lost",
    "late": "late",
}


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    folder: Path
    config: TrainConfig
    manifest: dict
    rounds: list[dict]
    clients: list[dict]
    faults: list[dict]

    @property
    def evaluated(self) -> list[dict]:
        return [record for record in self.rounds if record["test_accuracy"] is not None]


def read_run(folder: Path) -> Run:
    """Read a run folder (raises CheckpointError where there is none)."""
    try:
        lines = {
            name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in ("rounds.jsonl", "clients.jsonl")
        }
        faults = (folder / FAULTS).read_text().splitlines() if (folder / FAULTS).exists() else []
        config, manifest = settings.load(TrainConfig, folder / "config.yaml"), json.loads((folder / "manifest.json").read_text())
        return Run(folder, config, manifest, *lines.values(), [json.loads(line) for line in faults])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the run in {folder}", f"{type(error).__name__}: {error}", "name the folder of a run that has done at least one round"
        ) from None


def summary(run: Run) -> str:
    """The table of a run: before and after, then per budget group window, cap, peak, upload and accuracy."""
    if not run.evaluated:
        return f"{run.folder}: no round was evaluated yet"
    first, last = run.evaluated[0], run.evaluated[-1]
    enforced = run.manifest["starts"][-1]["memory_enforced_by"]
    caps = "measured only, NOT enforced" if enforced == "report" else f"enforced by {enforced}"
    rows = [
        ["group", "clients", "blocks", "cap MB", "predicted MB", "peak MB", "upload MB", "GFLOP", "accuracy before", "after", "loss after"]
    ]
    groups = run.manifest["groups"]
    members: dict[str, set[int]] = {}
    for client, group in enumerate(groups.values()):
        members.setdefault(group, set()).add(client)
    for group in (entry.name for entry in run.config.fleet.groups):
        rows.append(_group_row(group, members.get(group, set()), run, first, last))
    return "\n".join(
        [
            f"{run.config.method.name}, depth {run.manifest['depth']} of family {Path(run.manifest['family']).name}, "
            f"{_ranks(run)}, caps {caps}",
            f"round {first['round']}: loss {first['test_loss']:.4f}, accuracy {first['test_accuracy']:.4f}",
            f"round {last['round']}: loss {last['test_loss']:.4f}, accuracy {last['test_accuracy']:.4f}",
            f"payload of all rounds: up {_total(run, 'upload_bytes')} MB, down {_total(run, 'download_bytes')} MB, "
            f"first distribution {_total(run, 'first_download_bytes')} MB",
            _planned_and_counted(run),
            *_left_out(run),
            *_faults(run),
            "",
            table(rows),
        ]
    )


def _ranks(run: Run) -> str:
    start = run.manifest["starts"][-1]
    return "one process" if start["transport"] == "local" else f"{start['ranks']} ranks"


def _planned_and_counted(run: Run) -> str:
    """Upload and FLOPs of the updates that were merged, as planned and as they came."""
    done = [report for report in run.clients if report["ok"]]
    up, planned_up, flops, planned_flops = (
        sum(report[key] for report in done) for key in ("upload_bytes", "predicted_upload_bytes", "flops", "predicted_flops")
    )
    return (
        f"merged updates, counted (planned): up {_mega(up)} ({_mega(planned_up)}) MB, {flops / 1e9:.1f} ({planned_flops / 1e9:.1f}) GFLOP"
    )


def _left_out(run: Run) -> list[str]:
    """How many client rounds were not merged, and why; and a warning where none was."""
    counts = {text: sum(report["cause"] == cause for report in run.clients) for cause, text in CAUSES.items()}
    lines = [f"client rounds: {len(run.clients)}, left out: " + ", ".join(f"{count} {text}" for text, count in counts.items())]
    if run.clients and not any(report["ok"] for report in run.clients):
        lines.append("WARNING: nothing was trained: no client's update was merged in any round; clients.jsonl has the reasons")
    return lines


def _faults(run: Run) -> list[str]:
    """Ranks that were lost while the others went on."""
    return [
        f"round {fault['round']}: lost "
        + ", ".join(f"rank {number} ({host}, process {process})" for number, host, process in fault["lost"])
        + f" while {fault['phase']}; {fault['done']}, client ranks left: {fault['client_ranks']}, {fault['seconds']:.1f} s lost"
        for fault in run.faults
    ]


def _total(run: Run, key: str) -> str:
    return _mega(sum(record[key] for record in run.rounds))


def _group_row(group: str, members: set[int], run: Run, first: dict, last: dict) -> list[str]:
    reports = [report for report in run.clients if report["client"] in members]
    done = [report for report in reports if report["ok"]] or reports
    blocks = sorted({report["blocks"] for report in done})
    scores = [record["groups"].get(group, {}) for record in (first, last)]
    if not reports:
        return [group, str(len(members)), *["-"] * 6, *(_fixed(score.get("accuracy")) for score in scores), _fixed(scores[1].get("loss"))]
    return [
        group,
        str(len(members)),
        block_range(blocks),
        _mega(reports[0]["memory_bytes"]),
        _mega(max(r["predicted_peak_bytes"] for r in done)),
        _mega(max(r["measured_peak_bytes"] for r in reports)),
        f"{max(r['upload_bytes'] for r in done) / MEGA:.3f}",
        f"{max(r['flops'] for r in done) / 1e9:.1f}",
        *(_fixed(score.get("accuracy")) for score in scores),
        _fixed(scores[1].get("loss")),
    ]


def block_range(blocks: list[int]) -> str:
    """The fewest and the most blocks, or the one number."""
    return "-".join(map(str, sorted({min(blocks), max(blocks)})))


def table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text; the first row is the heading, the first column is flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _mega(value: float) -> str:
    return f"{value / MEGA:.1f}"


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def picture(run: Run) -> Path:
    """One PNG: accuracy over rounds, bytes over rounds, peak against cap of every client.

    Raises:
        CheckpointError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot
    from matplotlib.ticker import MaxNLocator

    figure, (left, middle, right) = plot.subplots(1, 3, figsize=(16, 4.6), constrained_layout=True)
    rounds = [record["round"] for record in run.evaluated]
    left.plot(rounds, [record["test_accuracy"] for record in run.evaluated], color="black", linewidth=2, label="all clients")
    for group in (entry.name for entry in run.config.fleet.groups):
        left.plot(rounds, [record["groups"].get(group, {}).get("accuracy") for record in run.evaluated], linewidth=1, label=group)
    left.set(title="Accuracy on held-out text", xlabel="round", ylabel="next-token accuracy")
    left.legend()
    trained = [record for record in run.rounds if record["round"]]
    numbers = [record["round"] for record in trained]
    for key, label in (("upload_bytes", "upload"), ("download_bytes", "download"), ("first_download_bytes", "first model")):
        middle.plot(numbers, [record[key] / MEGA for record in trained], marker=".", label=label)
    middle.set(title="Payload of all clients", xlabel="round", ylabel="MB per round", ylim=(0, None))
    middle.legend()
    _peaks(right, run)
    figure.suptitle(f"{run.config.method.name}, depth {run.manifest['depth']}, {len(run.manifest['groups'])} clients")
    for axes in (left, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    path = run.folder / "summary.png"
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise CheckpointError(
            f"picture {path}", f"{type(error).__name__}: {error}", "make the run folder writable, or report a copy of it"
        ) from None
    finally:
        plot.close(figure)
    return path


def _peaks(axes, run: Run) -> None:
    """Each client's largest measured peak beside its cap and the prediction, sorted by cap."""
    by_client: dict[int, list[dict]] = {}
    for report in run.clients:
        by_client.setdefault(report["client"], []).append(report)
    order = sorted(by_client, key=lambda client: (by_client[client][0]["memory_bytes"], client))
    places = range(len(order))
    axes.bar(places, [max(r["measured_peak_bytes"] for r in by_client[c]) / MEGA for c in order], color="tab:blue", label="measured peak")
    axes.scatter(
        places,
        [max(r["predicted_peak_bytes"] for r in by_client[c]) / MEGA for c in order],
        color="tab:orange",
        marker="x",
        zorder=3,
        label="predicted",
    )
    axes.step(
        [p - 0.5 for p in places] + [len(order) - 0.5],
        [by_client[c][0]["memory_bytes"] / MEGA for c in [*order, order[-1]]] if order else [],
        where="post",
        color="tab:red",
        label="cap",
    )
    axes.set(title="Peak memory above baseline", xlabel="client (by cap)", ylabel="MB", ylim=(0, None))
    if len(order) <= 16:
        axes.set_xticks(list(places), [str(client) for client in order])
    axes.legend()
