"""The run folder: effective config, manifest, one JSON line per round, client and traffic count, checkpoints, the lock
of the run that writes there, and the mark ``finished`` that alone says that a run is done.

Imports nothing heavy: the launcher that starts the ranks checks the folder first.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import distfl
from distfl import settings
from distfl.config import TrainConfig
from distfl.errors import CheckpointError
from distfl.files import sha256, sha256_below, write_atomically, write_json

if TYPE_CHECKING:
    from distfl.fleet import Client
    from distfl.jobs import Job
    from distfl.messages import Fault, RankStart, RoundResult
    from distfl.transport.base import Transport

LINES = ("rounds.jsonl", "clients.jsonl", "traffic.jsonl")
FAULTS = "faults.jsonl"  # there only if something was lost; never cut back: it says what happened, not where the run is
LOCK = ".lock"
RESIDUALS = "residuals"  # see residuals.py


def checkpoint_folders(folder: Path) -> list[Path]:
    """``folder/round-NNNNN``, oldest first; what a crash left half-written has another name."""
    return sorted((path for path in folder.glob("round-*") if path.name[6:].isdigit()), key=lambda path: int(path.name[6:]))


@cache
def source_checksum() -> str:
    """Of this package's own files."""
    return sha256_below(Path(distfl.__file__).parent, "*.py")


def _deciding(config: TrainConfig) -> dict:
    """The settings that decide the result; a resumed run may have others of the rest."""
    values = settings.to_dict(config)
    transport = {f"transport.{key}": value for key, value in values.pop("transport").items() if key != "name"}
    return {key: value for key, value in values.items() if key not in ("run", "launch", "faults")} | transport


def _origin(job: Job) -> dict:
    """What a run's result depends on besides its config."""
    weights = job.family.folder / job.family.manifest["depths"][str(job.selection.depth)]["file"]
    return {
        "depth": job.selection.depth,
        "tokens_checksum": job.shards.checksum,
        "weights_checksum": sha256(weights),
        "tokenizer_checksum": job.family.tokenizer_checksum,
    }


class RunFolder:
    """Where a run leaves everything."""

    def __init__(self, config: TrainConfig):
        self.config, self.path = config, Path(config.run.folder)
        self.checkpoints = self.path / "checkpoints"

    def check(self, resume: bool) -> None:
        """Refuse to overwrite a run, or to continue one that is not there, done, still running, or of another config.

        Raises:
            CheckpointError: the folder cannot be taken.
        """
        with self._usable():
            if (self.path / LOCK).exists():
                with open(self.path / LOCK, "a") as lock:
                    self._acquire(lock)
            self._check(resume)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path if self.path.exists() else self.path.parent, os.W_OK):
                raise PermissionError("it cannot be written to")

    @contextmanager
    def claimed(self, resume: bool) -> Iterator[None]:
        """Hold the folder for this process alone; the system lets go of it however the process ends.

        Raises:
            CheckpointError: another run has it, or has begun in it since ``check``.
        """
        with self._usable():
            is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "a")
        with lock:
            self._acquire(lock)
            with self._usable():
                self._check(resume)
            try:
                yield
            finally:
                if is_new and {path.name for path in self.path.iterdir()} <= {LOCK, RESIDUALS}:  # refused before anything began
                    shutil.rmtree(self.path)

    def _acquire(self, lock: TextIO) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = (self.path / LOCK).exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / LOCK))
        except BlockingIOError:
            mine = False
        except OSError as error:  # some cluster file systems have no locks; that must not forbid runs
            print(f"distfl: no lock on {self.path} ({error}): do not start two runs there", file=sys.stderr, flush=True)
            mine = True
        if not mine:  # locked by another process, or removed by one that was refused just now
            raise CheckpointError(
                f"run.folder = {self.path}", "another run is writing here", "wait for its end, or set run.folder to another folder"
            )

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"run.folder = {self.path}", f"{type(error).__name__}: {error}", "set run.folder to another folder"
            ) from None

    def _check(self, resume: bool) -> None:
        saved = self.path / "config.yaml"
        if not resume:
            if self.path.exists() and any(path.name != LOCK for path in self.path.iterdir()):
                raise CheckpointError(f"a run in {self.path}", "the folder is not empty", "set run.folder to a new folder, or add --resume")
            return
        if not saved.is_file():
            raise CheckpointError(
                f"--resume of {self.path}", "no run lies there (no config.yaml)", "start without --resume, or name the right run.folder"
            )
        if self.is_finished:
            raise CheckpointError(
                f"--resume of {self.path}",
                "this run is finished; its number of rounds is part of its learning rate schedule and cannot be changed",
                "set run.folder to a new folder for another run",
            )
        before, now = (_deciding(config) for config in (settings.load(TrainConfig, saved), self.config))
        different = [key for key in now if now[key] != before[key]]
        if different:
            raise CheckpointError(
                f"--resume of {self.path}", f"{different} differ from {saved}", "resume with the config the run was started with"
            )
        if self.last_checkpoint() is None and (recorded := self._last_recorded()) > 0:
            raise CheckpointError(
                f"--resume of {self.path}",
                f"rounds up to {recorded} are recorded, but there is no checkpoint to continue from",
                "restore its checkpoints, or start anew in another run.folder",
            )

    def _begun_at(self) -> int | None:
        """When the run was begun or resumed last, once all ranks had proven what they must, in ns; None where it never was."""
        try:
            return (self.path / "manifest.json").stat().st_mtime_ns
        except OSError:
            return None

    def beginning(self) -> Callable[[], bool]:
        """What tells whether the run was begun or resumed after this call."""
        before = self._begun_at()
        return lambda: self._begun_at() not in (None, before)

    @property
    def is_finished(self) -> bool:
        return (self.path / "finished").exists()

    def last_checkpoint(self) -> int | None:
        """The round of the newest checkpoint, whole or damaged; None where there is none."""
        found = checkpoint_folders(self.checkpoints)
        return int(found[-1].name[6:]) if found else None

    def how_to_go_on(self) -> str:
        """Of a run that was cut short: where it was, and what to do."""
        if not (self.path / "config.yaml").is_file():
            return "before any round: nothing was recorded, start it again"
        last = self.last_checkpoint()
        return f"{'before round 0' if last is None else f'after round {last}'}; continue with --resume"

    def _last_recorded(self) -> int:
        """The last round with a whole line in the records; -1 where there is none."""
        path = self.path / LINES[0]
        whole = [line for line in (path.read_text().splitlines() if path.exists() else []) if line.endswith("}")]
        return json.loads(whole[-1])["round"] if whole else -1

    def check_same(self, job: Job) -> None:
        """Refuse to continue on other data or from another family than the run began with (raises CheckpointError)."""
        before, now = json.loads((self.path / "manifest.json").read_text()), _origin(job)
        different = [key for key in now if now[key] != before.get(key)]
        if different:
            raise CheckpointError(
                f"--resume of {self.path}",
                f"{', '.join(different)} differ from those in its manifest.json",
                "restore what it began with",
            )

    def begin(self, job: Job, transport: Transport, ranks: list[RankStart], lost_ranks: str, resumed_at: int | None) -> None:
        """Write config and manifest; of a resumed run, cut the line files back to the checkpoint that is continued from.

        Args:
            lost_ranks: what becomes of the run when a rank dies.
        """
        manifest_file, starts = self.path / "manifest.json", []
        if resumed_at is not None:
            starts = json.loads(manifest_file.read_text())["starts"]
            for name in LINES:
                self._cut(self.path / name, resumed_at)
        start = {
            "distfl": distfl.__version__,
            "source_checksum": source_checksum(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "transport": transport.name,
            "library": transport.library,
            "ranks": len(ranks),
            "host": socket.gethostname(),
            "command": sys.argv,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "resumed_after_round": resumed_at,
            "collective": job.config.transport.collective,
            "collective_reason": job.collective_reason,
            "memory_enforced_by": " and ".join(sorted({rank.cap for rank in ranks if rank.cap})),
            "start_up_cpu_seconds_by_rank": [rank.cpu_seconds for rank in ranks],
            "place_by_rank": [[rank.place.host, rank.place.process] for rank in ranks],
            "lost_ranks": lost_ranks,
        }
        groups = {client.name: client.group for client in job.clients}
        table, units = job.workload(1).costs.table, {}
        for unit in table:
            units[unit.name] = {"bytes": unit.bytes, "tensors": len(unit.tensors), "mean": None}
            if unit.index < len(table.trainable):
                mean = job.method.mean_unit(unit)
                units[unit.name]["mean"] = {"elements": mean.elements, "tensors": len(mean.tensors)}
        able = sum(blocks > 0 for blocks in job.selection.blocks.values())
        about = {"family": str(job.family.folder), "groups": groups, "able": able, "units": units, "starts": [*starts, start]}
        write_json(manifest_file, _origin(job) | about)
        write_atomically(self.path / "config.yaml", settings.to_yaml(self.config))  # last: with it there is a run to resume

    @staticmethod
    def _cut(path: Path, last_round: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["round"] <= last_round]
        write_atomically(path, "".join(line + "\n" for line in kept))

    def append_fault(self, fault: Fault) -> None:
        """Add what was lost just now; it is on disk when this returns."""
        self._append(FAULTS, [asdict(fault)])

    def append(self, result: RoundResult, clients: list[Client]) -> None:
        """Add one round's lines; they are on disk when this returns."""
        reports = [
            asdict(report) | {"name": clients[report.client].name, "group": clients[report.client].group} for report in result.reports
        ]
        for name, records in zip(LINES, ([asdict(result.record)], reports, [result.traffic])):
            self._append(name, records)

    def _append(self, name: str, records: list[dict]) -> None:
        with open(self.path / name, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the mark; nothing is written after it. What only a resumed run would need goes."""
        write_atomically(self.path / "finished", time.strftime("%Y-%m-%dT%H:%M:%S%z") + "\n")
        shutil.rmtree(self.path / RESIDUALS, ignore_errors=True)
