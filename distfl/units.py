"""Units and windows: which tensors belong together, how many bytes they are, what trains.

A *unit* is the embedding (index 0), a block (1 .. L) or the head (L + 1). A *window* is a run of
contiguous units that train.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from distfl.model import ModelSpec, TinyTransformer, skeleton

VALUE_BYTES = torch.float32.itemsize  # every shared tensor is float32


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of one tensor, and where it starts in its unit's flat buffer (in elements)."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """One unit; its tensors lie one after another in a flat float32 buffer."""

    index: int
    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        return self.elements * VALUE_BYTES


@dataclass(frozen=True)
class Window:
    """Units ``first .. last - 1`` train, all others are frozen."""

    first: int
    last: int

    def __contains__(self, unit: int) -> bool:
        return self.first <= unit < self.last

    @property
    def units(self) -> range:
        return range(self.first, self.last)


class UnitTable:
    """The units of a model, in order from the input to the output.

    Args:
        spec: the model's shape.
        shapes: tensor name -> shape of what is shared, if that is not just the model's own tensors.
    """

    def __init__(self, spec: ModelSpec, shapes: dict[str, tuple[int, ...]] | None = None):
        self.spec = spec
        if shapes is None:
            shapes = {name: tuple(parameter.shape) for name, parameter in skeleton(spec).named_parameters()}
        by_unit: list[list[TensorSpec]] = [[] for _ in range(spec.depth + 2)]  # a unit may share nothing
        for name, shape in shapes.items():
            tensors = by_unit[self._unit_of(name)]
            offset = tensors[-1].offset + tensors[-1].elements if tensors else 0
            tensors.append(TensorSpec(name, shape, offset))
        self.units = tuple(Unit(index, self._name(index), tuple(by_unit[index])) for index in range(len(by_unit)))

    def _unit_of(self, tensor: str) -> int:
        part, _, rest = tensor.partition(".")
        return {"embedding": 0, "head": self.spec.depth + 1}[part] if part != "blocks" else 1 + int(rest.partition(".")[0])

    def _name(self, index: int) -> str:
        return "embedding" if index == 0 else "head" if index == self.spec.depth + 1 else f"block.{index - 1}"

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self):
        return iter(self.units)

    def __getitem__(self, index: int) -> Unit:
        return self.units[index]

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)

    def suffix(self, blocks: int) -> Window:
        """The window of the last ``blocks`` blocks and the head."""
        return Window(1 + self.spec.depth - blocks, self.spec.depth + 2)

    def trained_blocks(self, window: Window) -> int:
        """Number of blocks inside a window."""
        return sum(1 <= unit <= self.spec.depth for unit in window.units)

    def window_bytes(self, window: Window) -> int:
        """Bytes of the tensors inside a window."""
        return sum(self.units[unit].bytes for unit in window.units)


def freeze_outside(model: TinyTransformer, window: Window) -> list[torch.nn.Parameter]:
    """Let only the window's tensors take gradients; units outside it go into eval mode.

    Returns:
        The trainable parameters, in the model's order. Nothing else may reach the optimiser.
    """
    trainable = []
    for index, part in enumerate([model.embedding, *model.blocks, model.head]):
        part.train(index in window)
        part.requires_grad_(index in window)
        if index in window:
            trainable.extend(part.parameters())
    return trainable
