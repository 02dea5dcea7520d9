"""Outputs of the frozen prefix: computed, or read back where they were computed before.

Frozen units do not change within a round, and those below the deepest window of the fleet never do. Their
outputs for a client's sequences are kept in files without a name in the node's temporary folder (``TMPDIR``):
they take no memory of the client, and vanish with the process. Features are those of sequences computed one by
one, so that a stored one has the very bits of a computed one.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distfl.model import TinyTransformer
from distfl.steps import features_of


class Prefix:
    """The frozen units ``0 .. first - 1`` of one client's model.

    Args:
        files: by number of leading units, rising, where their outputs are kept; may be empty.

    ``computed`` counts sequences by the units they were computed through.
    """

    def __init__(self, model: TinyTransformer, first: int, files: dict[int, FeatureFile]):
        self._model, self._first = model, first
        self._files = {units: file for units, file in files.items() if units <= first}
        self.computed: Counter[range] = Counter()

    def __call__(self, rows: list[int], inputs: Tensor) -> Tensor:
        """Features of the given rows of the client's data, whose (B, T) tokens are ``inputs``: (B, T, d); the tokens without a prefix."""
        if self._first == 0:
            return inputs
        if not self._files:
            return self._compute(range(self._first), inputs)
        out = torch.empty(*inputs.shape, self._model.spec.width)
        for place, row in enumerate(rows):
            self._one(row, inputs[place : place + 1], out[place])
        return out

    def _one(self, row: int, tokens: Tensor, out: Tensor) -> None:
        """Start from the deepest stored output of this row and store what is computed on the way."""
        known = max((units for units, file in self._files.items() if file.read(row, out)), default=0)
        x = out[None] if known else tokens
        for level in (*(units for units in self._files if units > known), self._first):
            if level > known:
                x, known = self._compute(range(known, level), x), level
                if level in self._files:
                    self._files[level].write(row, x[0])
        out.copy_(x[0])

    def _compute(self, units: range, x: Tensor) -> Tensor:
        self.computed[units] += len(x)
        return features_of(self._model, units, x)


class FeatureFile:
    """Outputs of one client's leading units, one (T, d) float32 entry per row of its data and a byte that says whether it is there.

    Args:
        versions: of these units; a file is of no use once one of them has changed.
    """

    def __init__(self, rows: int, context: int, width: int, versions: tuple[Any, ...]):
        self.versions = versions
        self._entry_bytes = context * width * np.dtype(np.float32).itemsize
        self._file = tempfile.TemporaryFile(prefix="distfl-features-")
        self._present_at = rows * self._entry_bytes

    def read(self, row: int, out: Tensor) -> bool:
        """Read a row's entry into ``out`` if it is there."""
        if os.pread(self._file.fileno(), 1, self._present_at + row) != b"\1":
            return False
        view = memoryview(out.numpy()).cast("B")
        if os.preadv(self._file.fileno(), [view], row * self._entry_bytes) != len(view):
            raise OSError(f"features of row {row} are cut short")
        return True

    def write(self, row: int, features: Tensor) -> None:
        """Keep a row's entry; where the disk is full it is simply not kept."""
        view = memoryview(features.numpy()).cast("B")
        try:
            if os.pwrite(self._file.fileno(), view, row * self._entry_bytes) == len(view):
                os.pwrite(self._file.fileno(), b"\1", self._present_at + row)
        except OSError:
            return

    def close(self) -> None:
        self._file.close()


class FeatureShelf:
    """The feature files of one rank: of each client it hosted last, by number of leading units."""

    def __init__(self, most_files: int = 128) -> None:
        self._on_disk = not _is_in_memory(Path(tempfile.gettempdir()).resolve())
        self._files: dict[tuple[int, int], FeatureFile] = {}  # used last comes last
        self._most_files = most_files

    def files(self, client: int, levels: list[int], rows: int, context: int, width: int, versions: list[Any]) -> dict[int, FeatureFile]:
        """The client's files of these levels; one whose units have changed since starts empty. Where none can be
        made, features are not kept."""
        found = {}
        for units in levels if self._on_disk else ():
            key, current = (client, units), tuple(versions[:units])
            file = self._files.pop(key, None)
            if file is not None and file.versions != current:
                file.close()
                file = None
            try:
                found[units] = self._files[key] = file or FeatureFile(rows, context, width, current)
            except OSError:  # no room, no rights, too many open files
                continue
        while len(self._files) > self._most_files:
            self._files.pop(next(iter(self._files))).close()
        return found


def _is_in_memory(folder: Path) -> bool:
    """Whether files in this folder take memory, which no budget would pay for."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    around = [(len(place), kind) for place, kind in mounts if folder.is_relative_to(place)]
    return max(around, default=(0, ""))[1] in ("tmpfs", "ramfs")
