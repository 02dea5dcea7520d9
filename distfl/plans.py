"""What the planner decided, as text: depth and why, then every budget group's window and what it costs."""

from __future__ import annotations

from distfl.fleet import GIGA, MEGA, Client
from distfl.jobs import Job
from distfl.messages import Assignment
from distfl.recipes import Recipe
from distfl.reporting import block_range, table


def describe(job: Job) -> str:
    """The whole plan of a job's first round."""
    updates = f"updates reach the server by {job.config.transport.collective}: {job.collective_reason}"
    return "\n".join([_why_this_depth(job), "", _groups(job), "", _parts(job), "", updates])


def _why_this_depth(job: Job) -> str:
    chosen = job.selection
    rows = [["depth", "average trained blocks", "clients without a window", ""]]
    for depth, average in chosen.averages.items():
        rows.append([str(depth), f"{average:.3f}", str(chosen.excluded[depth]), "<- chosen" if depth == chosen.depth else ""])
    return f"{job.config.method.name}: depth {chosen.depth} {chosen.reason}\n{table(rows)}"


def _members(job: Job) -> dict[str, list[tuple[Client, Assignment]]]:
    """Budget group -> its clients with their assignments, largest data last."""
    plan = job.method.plan(1, job.clients, job.workload(1), {})
    members: dict[str, list[tuple[Client, Assignment]]] = {group.name: [] for group in job.config.fleet.groups}
    for client, assignment in zip(job.clients, plan):
        members[client.group].append((client, assignment))
    return {group: sorted(entries, key=lambda entry: entry[0].rows) for group, entries in members.items()}


def _groups(job: Job) -> str:
    """Per group: window, predicted peak against budget, upload, download, FLOPs; figures of its client with most data."""
    workload, units = job.workload(1), job.workload(1).costs.table
    members = _members(job)
    windows = [assignment.window for entries in members.values() for _, assignment in entries if assignment.window]
    trained = {part for window in windows for part in window.units}
    rows = [
        [
            "group",
            "clients",
            "blocks",
            "units",
            "peak MB",
            "of MB",
            "slack MB",
            "upload MB",
            "of",
            "download MB",
            "first MB",
            "GFLOP",
            "of",
            "time",
            "how",
        ]
    ]
    for group, entries in members.items():
        client, assignment = entries[-1]
        budget, window = client.budget, assignment.window
        if window is None:
            rows.append([group, str(len(entries)), "0", "sits out", "-", _mega(budget.memory_bytes), *["-"] * 9])
            continue
        cost = job.method.cost_by(client, window, assignment.recipe, workload, assignment.detail)
        plain = job.method.cost_by(client, window, Recipe(client.rows), workload, assignment.detail)
        sent = {unit: sum(job.method.sent_down(unit, assignment.detail).values()) for unit in units}
        stale = [unit for unit in sent if any(units.part_of(t.name) in trained and job.method.changes(t.name) for t in unit.tensors)]
        counts = sorted({units.trained_blocks(a.window) for _, a in entries if a.window})
        rows.append(
            [
                group,
                str(len(entries)),
                block_range(counts),
                f"{units[window.first].name}..{units[window.last - 1].name}",
                _mega(cost.peak.bytes),
                _mega(budget.memory_bytes),
                _slack(budget.memory_bytes - cost.peak.bytes),
                f"{cost.upload_bytes / MEGA:.3f}",
                "-" if budget.upload_bytes is None else f"{budget.upload_bytes / MEGA:.3f}",
                f"{sum(sent[unit] for unit in stale) / MEGA:.3f}",
                f"{sum(sent.values()) / MEGA:.3f}",
                f"{cost.flops / GIGA:.1f}",
                "-" if budget.flops is None else f"{budget.flops / GIGA:.1f}",
                f"x {cost.flops / plain.flops:.2f}",
                ", ".join([assignment.recipe.describe(workload.costs_for(client).batch, units.spec.context), *_told(assignment)]),
            ]
        )
    return (
        f"{table(rows)}\nall figures per client and round, of each group's client with most data; first: its first model, once; "
        "time: FLOPs over those of the same window without levers"
    )


def _told(assignment: Assignment) -> list[str]:
    """What the method tells the client besides its window."""
    return [f"{key} {value}" for key, value in assignment.detail.items()]


def _parts(job: Job) -> str:
    """The terms of each group's predicted peak."""
    rows = [
        [
            "predicted peak, MB",
            "weights",
            "optimizer",
            "residuals",
            "gradients",
            "activations",
            "transient",
            "margin",
            "total",
            "fullest moment",
        ]
    ]
    for group, entries in _members(job).items():
        client, assignment = entries[-1]
        if assignment.window is not None:
            peak = job.method.cost_by(client, assignment.window, assignment.recipe, job.workload(1), assignment.detail).peak
            parts = (
                peak.weights,
                peak.optimizer,
                peak.residuals,
                peak.gradients,
                peak.activations,
                peak.transient,
                peak.margin,
                peak.bytes,
            )
            rows.append([group, *map(_mega, parts), max(peak.moments, key=peak.moments.get)])
    return table(rows)


def _slack(bytes_: float) -> str:
    """What is left of the budget; marked where the plan goes beyond it on purpose (extra_blocks)."""
    return _mega(bytes_) if bytes_ >= 0 else f"OVER {_mega(-bytes_)}"


def _mega(bytes_: float) -> str:
    return f"{bytes_ / MEGA:.2f}"
