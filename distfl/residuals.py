"""What error feedback keeps from round to round: per client, what its updates so far lost in encoding.

A deployed client would hold its residuals itself. Here a client may be hosted by another rank in every round, so they
lie in the run folder, a file for each client, round and unit; while the client is hosted those of its window are in a
shared mapping of the rank, which no limit on private memory sees: like mapped weights they are charged to its budget.

A client goes on from its newest files of earlier rounds. Those of the present round or later come from a life of the run
that was cut short, and are removed. Older ones stay as long as a checkpoint lies there that they belong to.
"""

from __future__ import annotations

import mmap
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distfl.errors import CheckpointError, StartError
from distfl.files import write_atomically
from distfl.messages import Assignment
from distfl.run_folder import RESIDUALS, checkpoint_folders
from distfl.units import UnitTable

MARK = "mark"


class Residuals:
    """One client's, of some units: zeros in flat float32 buffers, and views of them by name."""

    def __init__(self, table: UnitTable, units: Iterable[int]):
        self.buffers: dict[int, np.ndarray] = {}
        self.tensors: dict[str, Tensor] = {}
        for unit in units:
            if not table[unit].bytes:
                continue
            buffer = self.buffers[unit] = np.frombuffer(mmap.mmap(-1, table[unit].bytes), np.float32)
            buffer[:] = 0.0  # its pages are touched here, not in the client's time
            flat = torch.from_numpy(buffer)
            for tensor in table[unit].tensors:
                self.tensors[tensor.name] = flat[tensor.offset : tensor.offset + tensor.elements].view(tensor.shape)


class ResidualFolder:
    """The files of all clients of a run.

    Args:
        run_folder: must be seen by all nodes.
    """

    def __init__(self, run_folder: Path):
        self._path, self._checkpoints = run_folder / RESIDUALS, run_folder / "checkpoints"

    def announce(self) -> str:
        """Server, at the start: leave a mark that every rank must find.

        Raises:
            CheckpointError: the folder is of a run that goes on, and its residuals are gone.
        """
        trained = [path for path in checkpoint_folders(self._checkpoints) if int(path.name[6:])]
        if trained and not self._path.is_dir():
            raise CheckpointError(
                f"--resume with error feedback, after {trained[-1].name}",
                f"there is no folder {self._path}",
                "restore it beside the checkpoints, or start anew in another run.folder",
            )
        mark = uuid.uuid4().hex
        write_atomically(self._path / MARK, mark)
        return mark

    def check(self, mark: str) -> None:
        """Every client rank: find the server's mark, and be able to write beside it (raises StartError)."""
        try:
            found = (self._path / MARK).read_text()
            if found != mark:
                raise OSError("it is another folder than the server's")
            probe = self._path / f"probe-{uuid.uuid4().hex}"
            write_atomically(probe, "")
            probe.unlink()
        except OSError as error:
            raise StartError(
                f"residuals of error feedback in {self._path}, on every client rank",
                f"{type(error).__name__}: {error}",
                "set run.folder to a folder that all nodes see and can write to, or transport.error_feedback=off",
            ) from None

    def load(self, assignment: Assignment, table: UnitTable) -> Residuals:
        """What the client holds before a round (zeros of units it never sent); files that no round can need are removed.

        Args:
            table: what it holds of the shared tensors.

        Raises:
            CheckpointError: a file cannot be read or is cut short.
        """
        residuals = Residuals(table, assignment.window.units)
        with _named(self._folder(assignment)) as folder:
            newest = self._tidied(folder, assignment.round)
            for unit, buffer in residuals.buffers.items():
                if unit in newest:
                    with open(newest[unit], "rb") as file:
                        if file.readinto(memoryview(buffer).cast("B")) != buffer.nbytes:
                            raise OSError(f"{newest[unit].name} is cut short")
        return residuals

    def save(self, assignment: Assignment, residuals: Residuals) -> None:
        """The client's update of this round is on its way: from the next round on, these hold (raises CheckpointError)."""
        with _named(self._folder(assignment)) as folder:
            for unit, buffer in residuals.buffers.items():
                write_atomically(folder / f"unit-{unit}-round-{assignment.round}", memoryview(buffer).cast("B"))

    def _folder(self, assignment: Assignment) -> Path:
        """Of a client, and of one detail: other parts of the shared tensors lose other things."""
        return self._path / "-".join([f"client-{assignment.client:05d}", *(f"{key}-{value}" for key, value in assignment.detail.items())])

    def _tidied(self, folder: Path, round: int) -> dict[int, Path]:
        """Unit -> its newest file, of those of earlier rounds; removes what no round can need."""
        folder.mkdir(parents=True, exist_ok=True)
        turn = folder / "turn"
        turn.touch()
        turn.unlink()  # now a network file system must look again, not answer from what it saw here before
        retained = checkpoint_folders(self._checkpoints)
        oldest = int(retained[0].name[6:]) if retained else 0
        newest: dict[int, Path] = {}
        oldest_kept: dict[int, int] = {}  # unit -> round
        for written, unit, path in sorted((_written(path) for path in folder.glob("unit-*-round-*")), reverse=True):
            if written >= round or oldest_kept.get(unit, round) <= oldest:
                path.unlink()
            else:
                newest.setdefault(unit, path)
                oldest_kept[unit] = written
        return newest


def _written(path: Path) -> tuple[int, int, Path]:
    """Round, unit and path of a file."""
    _, unit, _, round = path.name.split("-")
    return int(round), int(unit), path


@contextmanager
def _named(folder: Path) -> Iterator[Path]:
    """What the file system refuses is said as what it means."""
    try:
        yield folder
    except OSError as error:
        raise CheckpointError(
            f"residuals of error feedback in {folder}",
            f"{type(error).__name__}: {error}",
            "make room or mend the folder, then continue with --resume",
        ) from None
