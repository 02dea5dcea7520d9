"""Frozen units in fewer bits: their matrices are stored in bf16 or int8 and widened one at a time when they are used.

The idea is CoCoFL's (Pfeiffer et al. 2023, arXiv 2203.05468: frozen layers quantised to int8); the arithmetic here stays
float32, only the storage shrinks, so what changes is the rounding of the frozen weights. int8: symmetric, one
scale for each output row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from distfl.model import Linear, TinyTransformer
from distfl.units import VALUE_BYTES, UnitTable, Window

Precision = Literal["fp32", "bf16", "int8"]

SCALE_BYTES = torch.float32.itemsize
_LARGEST = torch.iinfo(torch.int8).max


class Narrow(nn.Module):
    """A frozen linear layer whose matrix is stored in fewer bits; whatever else it holds stays as it is."""

    def __init__(self, layer: Linear, precision: Precision):
        super().__init__()
        weight = layer.weight.detach()
        layer.weight = None
        self.layer = layer
        self.scale: Tensor | None = None
        if precision == "int8":
            self.scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / _LARGEST  # (out, 1)
            self.stored = (weight / self.scale).round_().to(torch.int8)
        else:
            self.stored = weight.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.stored.to(x.dtype)
        if self.scale is not None:
            weight *= self.scale
        return self.layer.product(x, weight)

    def of(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self(function(x))


def narrow(model: TinyTransformer, window: Window, precision: Precision) -> None:
    """Replace every linear layer of the blocks below the window."""
    if precision == "fp32":
        return
    for unit, block in enumerate(model.blocks, start=1):
        if unit < window.first:
            for name, layer in list(block.named_children()):
                if isinstance(layer, Linear):
                    setattr(block, name, Narrow(layer, precision))


def matrix_bytes(table: UnitTable, window: Window) -> int:
    """float32 bytes of all matrices that ``narrow`` would store."""
    return sum(VALUE_BYTES * tensor.elements for tensor in _matrices(table, window))


def stored_bytes(table: UnitTable, window: Window, precision: Precision) -> int:
    """Bytes they take once stored, scales included."""
    if precision == "fp32":
        return matrix_bytes(table, window)
    each = 2 if precision == "bf16" else 1
    rows = 0 if precision == "bf16" else SCALE_BYTES
    return sum(each * tensor.elements + rows * tensor.shape[0] for tensor in _matrices(table, window))


def _matrices(table: UnitTable, window: Window):
    return [
        tensor
        for part in range(1, min(window.first, table.spec.depth + 1))
        for tensor in table.tensors_of(part)
        if len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    ]
