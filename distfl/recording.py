"""The run folder: effective config, manifest, one JSON line per round, client and traffic count, TensorBoard,
checkpoints, and the mark ``finished`` that alone says that a run is done."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import distfl
from distfl import checkpoints, settings
from distfl.checkpoints import ServerState
from distfl.config import TrainConfig
from distfl.errors import CheckpointError
from distfl.files import sha256, write_atomically, write_json
from distfl.fleet import MEGA, Client
from distfl.jobs import Job
from distfl.launching import progress_bar
from distfl.messages import ClientReport, RoundRecord
from distfl.rounds import RoundResult

LINES = ("rounds.jsonl", "clients.jsonl", "traffic.jsonl")


def _deciding(config: TrainConfig) -> dict:
    """The settings that decide the result; a resumed run may have others of the rest."""
    values = settings.to_dict(config)
    return {key: value for key, value in values.items() if key not in ("run", "transport")} | {"transport.codec": config.transport.codec}


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
        """Refuse to overwrite a run, or to continue one that is not there, done, or of another config (raises CheckpointError)."""
        try:
            self._check(resume)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path if self.path.exists() else self.path.parent, os.W_OK):
                raise PermissionError("it cannot be written to")
        except OSError as error:
            raise CheckpointError(
                f"run.folder = {self.path}", f"{type(error).__name__}: {error}", "set run.folder to another folder"
            ) from None

    def _check(self, resume: bool) -> None:
        saved = self.path / "config.yaml"
        if not resume:
            if self.path.exists() and any(self.path.iterdir()):
                raise CheckpointError(f"a run in {self.path}", "the folder is not empty", "set run.folder to a new folder, or add --resume")
            return
        if not saved.is_file():
            raise CheckpointError(
                f"--resume of {self.path}", "no run lies there (no config.yaml)", "start without --resume, or name the right run.folder"
            )
        if (self.path / "finished").exists():
            raise CheckpointError(f"--resume of {self.path}", "this run is finished", "set run.folder to a new folder for another run")
        before, now = (_deciding(config) for config in (settings.load(TrainConfig, saved), self.config))
        different = [key for key in now if now[key] != before[key]]
        if different:
            raise CheckpointError(
                f"--resume of {self.path}", f"sections {different} differ from {saved}", "resume with the config the run was started with"
            )

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

    def begin(self, job: Job, mpi: str, enforced_by: str, start_up_cpu_seconds: list[float], resumed_at: int | None) -> None:
        """Write config and manifest; of a resumed run, cut the line files back to the checkpoint that is continued from."""
        manifest_file, starts = self.path / "manifest.json", []
        if resumed_at is not None:
            starts = json.loads(manifest_file.read_text())["starts"]
            for name in LINES:
                self._cut(self.path / name, resumed_at)
        write_atomically(self.path / "config.yaml", settings.to_yaml(self.config))
        start = {
            "distfl": distfl.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "mpi": mpi,
            "ranks": len(start_up_cpu_seconds),
            "host": socket.gethostname(),
            "command": sys.argv,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "resumed_after_round": resumed_at,
            "memory_enforced_by": enforced_by,
            "start_up_cpu_seconds_by_rank": start_up_cpu_seconds,
        }
        groups = {client.name: client.group for client in job.clients}
        write_json(manifest_file, _origin(job) | {"family": str(job.family.folder), "groups": groups, "starts": [*starts, start]})

    @staticmethod
    def _cut(path: Path, last_round: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["round"] <= last_round]
        write_atomically(path, "".join(line + "\n" for line in kept))

    def append(self, result: RoundResult, clients: list[Client]) -> None:
        """Add one round's lines; they are on disk when this returns."""
        reports = [
            asdict(report) | {"name": clients[report.client].name, "group": clients[report.client].group} for report in result.reports
        ]
        for name, records in zip(LINES, ([asdict(result.record)], reports, [result.traffic])):
            with open(self.path / name, "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())

    def save(self, state: ServerState) -> None:
        """Write a checkpoint."""
        checkpoints.save(state, self.checkpoints, self.config.run.keep_checkpoints)

    def finish(self) -> None:
        """Write the mark; nothing is written after it."""
        write_atomically(self.path / "finished", time.strftime("%Y-%m-%dT%H:%M:%S%z") + "\n")


class Progress:
    """What a person sees on the server rank: a bar on a terminal, a line per round elsewhere."""

    def __init__(self, rounds: int, first: int, clients: list[Client]):
        from tqdm import tqdm  # only the server rank shows anything

        self._bar = None
        if (place := progress_bar()) is not None:
            self._stream, columns = place
            self._bar = tqdm(total=rounds, initial=max(first, 0), unit="round", desc="training", ncols=columns, nrows=2, file=self._stream)
        self._rounds, self._clients = rounds, clients

    def show(self, record: RoundRecord, reports: list[ClientReport]) -> None:
        scored = record.test_loss is not None
        figures = (
            f"test loss {record.test_loss:.4f}, accuracy {record.test_accuracy:.4f}"
            if scored
            else f"train loss {_number(record.train_loss)}"
        )
        if record.round:
            figures += f", up {record.upload_bytes / MEGA:.2f} MB, down {record.download_bytes / MEGA:.2f} MB"
            figures += f", peak/cap {_number(record.peak_share)}, merged {record.merged}/{record.taking_part}"
        lines = [f"round {record.round}/{self._rounds}: {figures}, {record.seconds:.1f} s"] if self._bar is None else []
        out = [report for report in reports if not report.ok and report.cause != "no_window"]
        lines += [
            f"round {report.round}: client {report.client} ({self._clients[report.client].name}) left out: {report.reason}"
            for report in out
        ]
        if idle := sum(report.cause == "no_window" for report in reports):
            lines.append(f"round {record.round}: {idle} clients sit out: no window fits their budget")
        for line in lines:
            self._bar.write(line, file=self._stream) if self._bar is not None else print(line, flush=True)
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
            self._bar.update(record.round > 0)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Recorder:
    """Everything that happens after a round: lines, TensorBoard, progress, checkpoint."""

    def __init__(self, folder: RunFolder, state: ServerState, clients: list[Client]):
        from torch.utils.tensorboard import SummaryWriter  # only the server rank pays for this import

        self._folder, self._state, self._clients = folder, state, clients
        self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=state.round + 1 if state.round >= 0 else None)
        self._progress = Progress(folder.config.rounds, state.round, clients)

    def __call__(self, result: RoundResult) -> None:
        """Record a round; checkpointed when due."""
        record = result.record
        self._folder.append(result, self._clients)
        self._write_board(record, result.reports)
        self._progress.show(record, result.reports)
        every, last = self._folder.config.run.checkpoint_every, self._folder.config.rounds
        if record.round % every == 0 or record.round == last:
            self._folder.save(self._state)

    def _write_board(self, record: RoundRecord, reports: list[ClientReport]) -> None:
        scalars = {
            "loss/train": record.train_loss,
            "loss/test": record.test_loss,
            "accuracy/test": record.test_accuracy,
            "bytes/upload": record.upload_bytes,
            "bytes/download": record.download_bytes,
            "memory/peak_over_cap": record.peak_share,
            "clients/merged": record.merged,
            "clients/over_cap": sum(report.cause == "over_cap" for report in reports),
            "learning_rate": record.learning_rate,
        }
        scalars |= {f"accuracy_by_group/{group}": score["accuracy"] for group, score in record.groups.items()}
        for name, value in scalars.items():
            if value is not None:
                self._board.add_scalar(name, value, record.round)

    def close(self) -> None:
        self._board.close()
        self._progress.close()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
