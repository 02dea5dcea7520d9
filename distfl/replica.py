"""A rank's copy of the shared tensors: one flat float32 buffer per unit, with the version it is at.

The buffers are shared anonymous mappings. RLIMIT_DATA does not count them and they are part of the
baseline of every client that the rank hosts: they stand for the node, not for the client, who pays
for its own copy of all weights out of its budget.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

from distfl.units import UnitTable

NEVER = 0  # version of a unit that was never received


class Replica:
    """Flat buffers, tensor views of them, and versions."""

    def __init__(self, table: UnitTable):
        self.table = table
        self.buffers = [np.frombuffer(mmap.mmap(-1, unit.bytes) if unit.bytes else bytearray(), np.float32) for unit in table]
        self.versions = [NEVER] * len(table)
        self.tensors: dict[str, Tensor] = {}
        for unit, buffer in zip(table, self.buffers):
            flat = torch.from_numpy(buffer)
            for tensor in unit.tensors:
                self.tensors[tensor.name] = flat[tensor.offset : tensor.offset + tensor.elements].view(tensor.shape)

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy values in; every unit is then at version 1."""
        for name, view in self.tensors.items():
            view.copy_(tensors[name])
        self.versions = [NEVER + 1] * len(self.table)

    def copy(self) -> dict[str, Tensor]:
        """Private copies of all tensors."""
        return {name: view.clone() for name, view in self.tensors.items()}
