"""What clients are sent in a round, what its training leaves on the server, and what becomes of it in the records."""

from __future__ import annotations

from dataclasses import dataclass

from distfl.checkpoints import ServerState
from distfl.hosting import RankState
from distfl.messages import Assignment, Cause, ClientReport, RoundRecord
from distfl.transport.base import pack


@dataclass(frozen=True)
class Merged:
    """What training and merging left, once the server has taken it over.

    Args:
        downloads, uploads: client -> what it was sent and sent -> bytes.
        contributors: unit name -> clients whose tensors were merged.
        changed: units that have new tensors now, in order; a method may have changed others than those that clients sent.
        traffic: for the records.
    """

    planned: list[Assignment]
    reports: list[ClientReport]
    downloads: dict[int, dict[str, int]]
    uploads: dict[int, dict[str, int]]
    contributors: dict[str, int]
    changed: list[int]
    learning_rate: float | None
    traffic: dict


NOBODY = Merged([], [], {}, {}, {}, [], None, {"payload": {}, "layout": []})  # of round 0


def download_of(state: RankState, server: ServerState, assignment: Assignment) -> dict[str, int]:
    """Bytes that this client, were it deployed, is sent in this round: unit name -> bytes for units newer than its copy,
    "assignment", or, if it never took part before, the whole model as "first"."""
    copy, message = server.copies.get(assignment.client), {"assignment": pack(assignment.to_json()).nbytes}
    sent = sent_when_changed(state, assignment)
    if copy is None:
        return message | {"first": sum(sent.values())}
    stale = [unit.name for unit in state.table if copy[unit.index] != state.replica.versions[unit.index]]
    return message | {name: sent[name] for name in stale if name in sent}


def sent_when_changed(state: RankState, assignment: Assignment) -> dict[str, int]:
    """Unit name -> bytes that this client is sent of it; units it holds nothing of are not named."""
    sent = {unit.name: sum(state.method.sent_down(unit, assignment.detail).values()) for unit in state.table}
    return {name: bytes_ for name, bytes_ in sent.items() if bytes_}


def sits_out(assignment: Assignment, cause: Cause, reason: str) -> ClientReport:
    """Of a client that was planned for and did nothing."""
    return ClientReport(
        round=assignment.round,
        client=assignment.client,
        ok=False,
        cause=cause,
        reason=reason,
        blocks=0,
        samples=0,
        loss=None,
        memory_bytes=assignment.memory_bytes,
        predicted_peak_bytes=0,
        measured_peak_bytes=0,
        predicted_upload_bytes=0,
        upload_bytes=0,
        predicted_flops=0,
        flops=0,
        seconds=0.0,
    )


def record_of(round: int, merged: Merged, score: tuple, seconds: float) -> RoundRecord:
    """The round's line.

    Args:
        score: in all, None where it was not scored, and by budget group.
    """
    total, groups = score
    losses = [report.loss for report in merged.reports if report.ok and report.loss is not None]
    shares = [report.measured_peak_bytes / report.memory_bytes for report in merged.reports if report.blocks]
    downloads = [(name, bytes_) for sent in merged.downloads.values() for name, bytes_ in sent.items()]
    return RoundRecord(
        round=round,
        train_loss=sum(losses) / len(losses) if losses else None,
        test_loss=total and total.loss,
        test_accuracy=total and total.accuracy,
        groups=groups,
        taking_part=len(merged.planned),
        merged=sum(report.ok for report in merged.reports),
        upload_bytes=sum(sum(units.values()) for units in merged.uploads.values()),
        download_bytes=sum(bytes_ for name, bytes_ in downloads if name != "first"),
        first_download_bytes=sum(bytes_ for name, bytes_ in downloads if name == "first"),
        flops=sum(report.flops for report in merged.reports),
        peak_share=max(shares, default=None),
        contributors=merged.contributors,
        learning_rate=merged.learning_rate,
        seconds=seconds,
    )
