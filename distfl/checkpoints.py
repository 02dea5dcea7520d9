"""What the server must remember between rounds, and checkpoints of it: whole or absent, never pickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from distfl.errors import CheckpointError
from distfl.files import sha256, write_json
from distfl.replica import NEVER, Replica
from distfl.run_folder import checkpoint_folders


@dataclass
class ServerState:
    """Everything a round depends on besides the config.

    Args:
        round: last finished round; -1 before round 0, which trains nobody.
        replica: the shared tensors and their versions.
        optimizer: state of the server optimiser, by name.
        limits: client id -> most blocks it may train, learnt from its over-budget rounds.
        copies: client id -> version of each unit that the client holds (NEVER: none or spoilt by its own training).
    """

    round: int
    replica: Replica
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    copies: dict[int, list[int]] = field(default_factory=dict)

    def now_holds(self, client: int, spoilt: range) -> None:
        """After a round: the client holds what it was sent, except the units it trained itself."""
        self.copies[client] = [NEVER if unit in spoilt else version for unit, version in enumerate(self.replica.versions)]


def save(state: ServerState, folder: Path, keep: int) -> None:
    """Write ``folder/round-NNNNN`` and delete all but the newest ``keep``.

    Raises:
        CheckpointError: it could not be written, for instance on a full disk; earlier ones are as they were.
    """
    temporary = folder / f".round-{state.round:05d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write(state, temporary)
        whole = folder / temporary.name[1:]
        shutil.rmtree(whole, ignore_errors=True)
        os.rename(temporary, whole)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # it fills the disk
        raise CheckpointError(
            f"a checkpoint of round {state.round} in {folder}",
            f"{type(error).__name__}: {error}",
            "make room or mend the folder, then continue with --resume from the checkpoint before",
        ) from None
    for old in checkpoint_folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _write(state: ServerState, folder: Path) -> None:
    from safetensors import SafetensorError  # only the server rank writes
    from safetensors.torch import save_file

    files = {"model.safetensors": {n: t.clone() for n, t in state.replica.tensors.items()}, "optimizer.safetensors": state.optimizer}
    for file, tensors in files.items():
        try:
            save_file(tensors, folder / file)
        except SafetensorError as error:
            raise OSError(str(error)) from None  # what it is: the library's own type says no more
        _sync(folder / file)
    values = {
        "round": state.round,
        "versions": state.replica.versions,
        "limits": state.limits,
        "copies": state.copies,
        "checksums": {file: sha256(folder / file) for file in files},
    }
    text = json.dumps(values)
    write_json(folder / "state.json", {"state": text, "checksum": hashlib.sha256(text.encode()).hexdigest()})
    _sync(folder)


def load(folder: Path, replica: Replica) -> ServerState:
    """The newest checkpoint, read into ``replica``.

    Raises:
        CheckpointError: there is none, or it is damaged; older ones are named.
    """
    from safetensors.torch import load_file  # see save

    found = checkpoint_folders(folder)
    if not found:
        raise CheckpointError(
            f"the newest model in {folder}",
            "no checkpoint lies there: the run has not ended a round yet",
            "let it go on (distfl train ... --resume), or name another run folder",
        )
    newest = found[-1]
    try:
        signed = json.loads((newest / "state.json").read_text())
        if hashlib.sha256(signed["state"].encode()).hexdigest() != signed["checksum"]:
            raise ValueError("state.json differs from its checksum")
        values = json.loads(signed["state"])
        for file, checksum in values["checksums"].items():
            if sha256(newest / file) != checksum:
                raise ValueError(f"{file} differs from its checksum")
        replica.fill(load_file(newest / "model.safetensors"))
        replica.versions = values["versions"]
        return ServerState(
            values["round"],
            replica,
            load_file(newest / "optimizer.safetensors"),
            {int(k): v for k, v in values["limits"].items()},
            {int(k): v for k, v in values["copies"].items()},
        )
    except Exception as error:  # safetensors, JSON and file errors alike: it cannot be continued from
        older = ", ".join(path.name for path in found[:-1]) or "none"
        raise CheckpointError(
            f"checkpoint {newest}",
            f"damaged: {type(error).__name__}: {error}; older ones: {older}",
            f"delete {newest} to continue from an older one, or start anew in another run.folder",
        ) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
