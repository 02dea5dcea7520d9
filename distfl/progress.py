"""What a person sees of a run on the server rank."""

from __future__ import annotations

import shutil
import sys
import time

from distfl.fleet import MEGA, Client
from distfl.launching import launched_size
from distfl.messages import ClientReport, RoundRecord


class Progress:
    """A bar where one process runs in a terminal; a line per round elsewhere.

    mpirun hands on whole lines only: a bar under it would stay invisible until the end.
    """

    def __init__(self, rounds: int, last: int, clients: list[Client]):
        from tqdm import tqdm  # only the server rank shows anything

        self._bar = None
        if launched_size() is None and sys.stderr.isatty():
            form = "round {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(total=rounds, initial=max(last, 0), bar_format=form, ncols=shutil.get_terminal_size().columns, file=sys.stderr)
        self._rounds, self._clients = rounds, clients
        self._began, self._trained = time.monotonic(), 0

    def show(self, record: RoundRecord, reports: list[ClientReport]) -> None:
        """One round, and whom it left out."""
        lines = [f"round {report.round}: {self._name(report)} left out: {report.reason}" for report in reports if _left_out(report)]
        if idle := sum(report.cause == "no_window" for report in reports):
            lines.append(f"round {record.round}: {idle} clients sit out: no window fits their budget")
        if self._bar is None:
            print("\n".join([self._line(record), *lines]), flush=True)
            return
        for line in lines:
            self._bar.write(line, file=sys.stderr)
        self._bar.set_postfix_str(_short(record))
        self._bar.update(record.round > 0)

    def _name(self, report: ClientReport) -> str:
        return f"client {report.client} ({self._clients[report.client].name})"

    def _line(self, record: RoundRecord) -> str:
        figures = _scores(record, 4)
        if not record.round:
            self._began = time.monotonic()  # round 0 trains nobody and says nothing about the others
            return f"round 0/{self._rounds}: {figures}, {record.seconds:.1f} s"
        figures += f", up {record.upload_bytes / MEGA:.2f} MB, down {record.download_bytes / MEGA:.2f} MB"
        if record.first_download_bytes:
            figures += f" + {record.first_download_bytes / MEGA:.2f} MB first models"
        figures += f", peak/cap {_number(record.peak_share)}, merged {record.merged}/{record.taking_part}, {record.seconds:.1f} s"
        self._trained += 1
        if left := self._rounds - record.round:
            figures += f", {_duration((time.monotonic() - self._began) / self._trained * left)} left"
        return f"round {record.round}/{self._rounds}: {figures}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _left_out(report: ClientReport) -> bool:
    return not report.ok and report.cause != "no_window"


def _scores(record: RoundRecord, digits: int) -> str:
    if record.test_loss is None:
        return f"train loss {_number(record.train_loss, digits)}"
    return f"test loss {record.test_loss:.{digits}f}, accuracy {record.test_accuracy:.{digits}f}"


def _short(record: RoundRecord) -> str:
    """What fits beside the bar in 80 columns."""
    scores = f"train loss {_number(record.train_loss, 2)}"
    if record.test_loss is not None:
        scores = f"loss {record.test_loss:.2f}, acc {record.test_accuracy:.3f}"
    share = f", {record.peak_share:.0%} of cap" if record.peak_share is not None else ""
    return f"{scores}, {record.upload_bytes / MEGA:.1f} MB up{share}" if record.round else scores


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
