"""A scaling study: the same config on growing numbers of ranks, every byte audited, gathered into a table and a picture."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from distfl import settings
from distfl.audit import Audit, read_audit
from distfl.config import TrainConfig
from distfl.errors import CheckpointError, ConfigError
from distfl.files import write_atomically
from distfl.fleet import MEGA
from distfl.reporting import table
from distfl.units import VALUE_BYTES


@dataclass(frozen=True)
class Point:
    """One run of the study. Bytes are those of a mean training round, as monitoring counted them on the links.

    Args:
        round_seconds: median over the training rounds without evaluation, or over all where each has one.
        into_server_bytes, out_of_server_bytes: on the server's links.
        all_links_bytes: on all links together.
        upload_bytes: payload of all clients, what a deployment would move.
        merge_peak_bytes: most memory of the server while it takes in and merges updates, above what it held before.
        bound_bytes: two of the largest units that train for each client in gather, four in reduce. Beside these the server holds
            float64 sums in gather: of the unit being merged, or of all where a round has several waves.
        unexplained_bytes: of the audit of the whole run.
    """

    ranks: int
    collective: str
    clients: int
    round_seconds: float
    into_server_bytes: int
    out_of_server_bytes: int
    all_links_bytes: int
    upload_bytes: int
    merge_peak_bytes: int
    bound_bytes: int
    unexplained_bytes: int


def point_of(audit: Audit) -> Point:
    """What an audited run tells."""
    rounds = audit.traffic[1:]
    links = {"into": lambda s, d: d == 0, "out": lambda s, d: s == 0, "all": lambda s, d: True}
    counted = {kind: sum(bytes_ for link, bytes_ in audit.links.items() if of_kind(*link)) for kind, of_kind in links.items()}
    outside = _outside_rounds(audit)
    per_round = {kind: (counted[kind] - outside[kind]) // len(rounds) for kind in counted}
    collective = audit.run.manifest["starts"][-1]["collective"]
    training = audit.run.rounds[1:]
    timed = [record["seconds"] for record in training if record["test_loss"] is None] or [record["seconds"] for record in training]
    clients = statistics.mean(len(entry["payload"]["up"]) for entry in rounds)
    units = audit.run.manifest["units"]
    merged = {unit for record in audit.run.rounds for unit, of in record["contributors"].items() if of}
    largest = VALUE_BYTES * max((units[unit]["mean"]["elements"] for unit in merged), default=0)
    return Point(
        ranks=audit.ranks,
        collective=collective,
        clients=round(clients),
        round_seconds=statistics.median(timed),
        into_server_bytes=per_round["into"],
        out_of_server_bytes=per_round["out"],
        all_links_bytes=per_round["all"],
        upload_bytes=round(statistics.mean(record["upload_bytes"] for record in audit.run.rounds[1:])),
        merge_peak_bytes=max(entry["merge_peak_bytes"] or 0 for entry in rounds),
        bound_bytes=round((2 * clients if collective == "gather" else 4) * largest),
        unexplained_bytes=audit.unexplained_bytes,
    )


def _outside_rounds(audit: Audit) -> dict[str, int]:
    """Bytes on links that belong to no training round: start, first distribution, first score, end.

    What ranks take in is what the links carry, and what the server hands out is on its own links as often as a rank gets it from there.
    """
    whole = [sum(ledger["received"].values()) for ledger in audit.ledgers]
    inside = [sum(sum(entry["mpi"][rank]["received"].values()) for entry in audit.traffic[1:]) for rank in range(audit.ranks)]
    outside = [of_run - of_rounds for of_run, of_rounds in zip(whole, inside)]
    broadcast = audit.ledgers[0]["broadcast_bytes"] - sum(_broadcast_bytes(entry["mpi"][0]["sent"]) for entry in audit.traffic[1:])
    sent_straight = (
        sum(audit.ledgers[0]["sent"].values()) - sum(sum(entry["mpi"][0]["sent"].values()) for entry in audit.traffic[1:]) - broadcast
    )
    return {"into": outside[0], "out": sent_straight + broadcast * len(audit.first_hops()), "all": sum(outside)}


def _broadcast_bytes(sent: dict[str, int]) -> int:
    return sum(bytes_ for purpose, bytes_ in sent.items() if purpose != "assignments")


def study(
    ranks: Sequence[int],
    collectives: Sequence[str],
    output: Path,
    config_of: Callable[[int, str, Path], TrainConfig],
    start: Callable[[int, str, Path], int],
    say: Callable[[str], None],
) -> list[Point]:
    """Make the runs that ``output`` does not hold yet, and read all of them.

    Args:
        config_of: what such a run is made with: (ranks, collective, run folder).
        start: makes one audited run -> exit code.

    Raises:
        ConfigError: a number of ranks or a collective that cannot be.
        CheckpointError: a run failed, or a folder holds half of one, or one of another config.
    """
    if not ranks or min(ranks) < 2:
        raise ConfigError(f"--ranks {','.join(map(str, ranks))}", "a run needs at least 2 ranks", "give numbers such as 3,5,9")
    if unknown := set(collectives) - {"gather", "reduce"}:
        raise ConfigError(f"--collectives {','.join(collectives)}", f"{sorted(unknown)} is not known", "give gather, reduce or both")
    points = []
    for number in ranks:
        for collective in collectives:
            folder = output / f"{collective}-{number:03d}"
            if not (folder / "finished").is_file():
                if folder.exists():
                    raise CheckpointError(f"a run in {folder}", "it was cut short", f"delete {folder} and start again: the others are kept")
                say(f"{number} ranks, {collective}")
                if code := start(number, collective, folder):
                    raise CheckpointError(
                        f"{number} ranks, {collective}", f"exit code {code}, see above", f"mend it, delete {folder} and start again"
                    )
            audit = read_audit(folder)
            _check_same(audit, number, config_of(number, collective, folder))
            points.append(point_of(audit))
    return points


def _check_same(audit: Audit, ranks: int, config: TrainConfig) -> None:
    """Refuse a run that lies where another one should (raises CheckpointError)."""
    found, wanted = settings.to_dict(audit.run.config), settings.to_dict(config)
    different = [key for key in wanted if key != "run" and found[key] != wanted[key]]
    if different or audit.ranks != ranks:
        raise CheckpointError(
            f"{ranks} ranks, {config.transport.collective}, from {audit.run.folder}",
            f"a run of {audit.ranks} ranks" + (f" whose {different} differ" if different else ""),
            "set --output to a folder of its own, or delete this one",
        )


def text(points: Sequence[Point]) -> str:
    """The study as a table."""
    head = ["collective", "ranks", "clients", "s per round", "into server MB", "out of server MB", "all links MB", "payload up MB"]
    rows = [[*head, "merge peak MB", "of MB", "unexplained"]]
    for point in sorted(points, key=lambda p: (p.collective, p.ranks)):
        megas = (point.into_server_bytes, point.out_of_server_bytes, point.all_links_bytes, point.upload_bytes)
        memory = (point.merge_peak_bytes, point.bound_bytes)
        rows.append(
            [
                point.collective,
                str(point.ranks),
                str(point.clients),
                f"{point.round_seconds:.2f}",
                *(f"{bytes_ / MEGA:.2f}" for bytes_ in megas),
                *(f"{bytes_ / MEGA:.1f}" for bytes_ in memory),
                str(point.unexplained_bytes),
            ]
        )
    return table(rows)


def write(points: Sequence[Point], output: Path) -> Path:
    """scaling.txt, scaling.csv, scaling.json and scaling.png; returns the picture's path."""
    write_atomically(output / "scaling.txt", text(points) + "\n")
    write_atomically(output / "scaling.json", json.dumps([asdict(point) for point in points], indent=1) + "\n")
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    write_atomically(output / "scaling.csv", lines.getvalue())
    return _picture(points, output / "scaling.png")


def _picture(points: Sequence[Point], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    figure, panels = plot.subplots(1, 3, figsize=(16, 4.6), constrained_layout=True)
    values = (
        ("Into the server, per round", "MB on its links", lambda p: p.into_server_bytes / MEGA),
        ("Server's memory for merging", "MB above what it held", lambda p: p.merge_peak_bytes / MEGA),
        ("Time of a round", "seconds", lambda p: p.round_seconds),
    )
    for axes, (title, unit, value) in zip(panels, values):
        for collective in sorted({point.collective for point in points}):
            line = sorted((point.ranks, value(point)) for point in points if point.collective == collective)
            axes.plot(*zip(*line), marker="o", label=collective)
        axes.set(title=title, xlabel="ranks", ylabel=unit, ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=110)
    plot.close(figure)
    return path
