"""A rank's copy of the shared tensors: one flat float32 buffer per unit, with the version it is at.

The buffers are shared anonymous mappings. RLIMIT_DATA does not count them and they are part of the
baseline of every client that the rank hosts: they stand for the node, not for the client, who pays
for its own copy of all weights out of its budget.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from distfl.units import Unit, UnitTable

NEVER = 0  # version of a unit that was never received


class Replica:
    """Flat buffers, tensor views of them, and versions."""

    def __init__(self, table: UnitTable):
        self.table = table
        self.buffers = [np.empty(0, np.float32)] * len(table)
        self.versions = [NEVER] * len(table)
        self.tensors: dict[str, Tensor] = {}
        for unit in table:
            self._lay_out(unit)

    def _lay_out(self, unit: Unit) -> None:
        """A buffer for a unit, and views of its tensors."""
        buffer = np.frombuffer(mmap.mmap(-1, unit.bytes) if unit.bytes else bytearray(), np.float32)
        self.buffers[unit.index], flat = buffer, torch.from_numpy(buffer)
        for tensor in unit.tensors:
            self.tensors[tensor.name] = flat[tensor.offset : tensor.offset + tensor.elements].view(tensor.shape)

    def spoil(self, units: Iterable[int]) -> None:
        """These are about to be overwritten: until their versions are set they are at none."""
        for unit in units:
            self.versions[unit] = NEVER

    def renew_spoilt(self) -> None:
        """Other memory for the units that are at no version: a transfer that was cut short may still write into the old one."""
        for unit in self.table:
            if self.versions[unit.index] == NEVER:
                self._lay_out(unit)

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy values in; every unit is then at version 1."""
        for name, view in self.tensors.items():
            view.copy_(tensors[name])
        self.versions = [NEVER + 1] * len(self.table)

    def copy(self) -> dict[str, Tensor]:
        """Private copies of all tensors."""
        return {name: view.clone() for name, view in self.tensors.items()}
