"""Everything that happens after a round: records, TensorBoard, checkpoint, progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distfl import checkpoints
from distfl.checkpoints import ServerState
from distfl.errors import CheckpointError
from distfl.fleet import Client
from distfl.messages import ClientReport, Fault, RoundRecord, RoundResult
from distfl.progress import Progress
from distfl.run_folder import RunFolder


class Recorder:
    """Everything that happens after a round: lines, TensorBoard, progress, checkpoint."""

    def __init__(self, folder: RunFolder, state: ServerState, clients: list[Client]):
        from torch.utils.tensorboard import SummaryWriter  # only the server rank pays for this import

        self._folder, self._state, self._clients = folder, state, clients
        self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=state.round + 1 if state.round >= 0 else None)
        self._progress = Progress(folder.config.rounds, state.round, clients)

    def __call__(self, result: RoundResult) -> None:
        """Record a round; checkpointed when due, and shown once all of it is on disk.

        Raises:
            CheckpointError: the run folder took no more.
        """
        record, run = result.record, self._folder.config.run
        with self._writing(record.round):
            self._folder.append(result, self._clients)
            self._write_board(record, result.reports)
        if record.round % run.checkpoint_every == 0 or record.round == self._folder.config.rounds:
            self.checkpoint()
        self._progress.show(record, result.reports)

    def fault(self, fault: Fault) -> None:
        """Record what was lost (raises CheckpointError)."""
        with self._writing(fault.round):
            self._folder.append_fault(fault)

    @contextmanager
    def _writing(self, round: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"records of round {round} in {self._folder.path}",
                f"{type(error).__name__}: {error}",
                "make room or mend the folder, then continue with --resume",
            ) from None

    def checkpoint(self) -> None:
        """Write a checkpoint, due or not."""
        checkpoints.save(self._state, self._folder.checkpoints, self._folder.config.run.keep_checkpoints)

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
