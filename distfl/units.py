"""Units and windows: which tensors belong together, how many bytes they are, what trains.

A *unit* is the embedding (index 0), a block (1 .. L) or the head (L + 1). A *window* is a run of
contiguous units that train. Where a method never trains some tensors of a part of the model, these lie
in a unit of their own behind all others, which no window reaches: it is sent once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
        trains: whether clients may ever train the tensor of this name; by default any.
    """

    def __init__(
        self, spec: ModelSpec, shapes: dict[str, tuple[int, ...]] | None = None, trains: Callable[[str], bool] = lambda name: True
    ):
        self.spec = spec
        if shapes is None:
            shapes = {name: tuple(parameter.shape) for name, parameter in skeleton(spec).named_parameters()}
        parts: list[tuple[list, list]] = [([], []) for _ in range(spec.depth + 2)]  # trained and never trained; either may be empty
        for name, shape in shapes.items():
            parts[self.part_of(name)][not trains(name)].append((name, shape))
        self.trainable = tuple(Unit(part, self._name(part), one_after_another(trained)) for part, (trained, _) in enumerate(parts))
        self._frozen = {
            part: Unit(len(parts) + place, f"{self._name(part)}.frozen", one_after_another(parts[part][1]))
            for place, part in enumerate(part for part, (_, never) in enumerate(parts) if never)
        }
        self.units = (*self.trainable, *self._frozen.values())
        self.place = {tensor.name: unit.index for unit in self.units for tensor in unit.tensors}

    def part_of(self, tensor: str) -> int:
        """The embedding, a block or the head that a tensor belongs to, by its name."""
        part, _, rest = tensor.partition(".")
        return {"embedding": 0, "head": self.spec.depth + 1}[part] if part != "blocks" else 1 + int(rest.partition(".")[0])

    def _name(self, part: int) -> str:
        return "embedding" if part == 0 else "head" if part == self.spec.depth + 1 else f"block.{part - 1}"

    def tensors_of(self, part: int) -> tuple[TensorSpec, ...]:
        """All tensors of the embedding, a block or the head, never trained ones too."""
        return self.units[part].tensors + (self._frozen[part].tensors if part in self._frozen else ())

    def versions_of(self, part: int, versions: Sequence[int]) -> list[int]:
        """Of the embedding, a block or the head: one, or two where some of its tensors never train."""
        return [versions[part], *([versions[self._frozen[part].index]] if part in self._frozen else [])]

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self):
        return iter(self.units)

    def __getitem__(self, index: int) -> Unit:
        return self.units[index]

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)

    def classifiers(self, part: int) -> tuple[TensorSpec, ...]:
        """Those tensors of a trainable unit that are a classifier's: the head's, or a block's exit's."""
        return tuple(t for t in self.trainable[part].tensors if t.name.startswith("head.") or ".exit." in t.name)

    def exits(self) -> list[int]:
        """Blocks' units whose outputs a classifier sees, in order."""
        seen = [part for part in range(1, self.spec.depth + 1) if any(".exit." in t.name for t in self.tensors_of(part))]
        return seen + [self.spec.depth] * bool(self.tensors_of(self.spec.depth + 1))

    def suffix(self, blocks: int) -> Window:
        """The window of the last ``blocks`` blocks and the head."""
        return Window(1 + self.spec.depth - blocks, self.spec.depth + 2)

    def trained_blocks(self, window: Window) -> int:
        """Number of blocks inside a window."""
        return sum(1 <= unit <= self.spec.depth for unit in window.units)

    def window_bytes(self, window: Window) -> int:
        """Bytes of the tensors inside a window."""
        return sum(self.units[unit].bytes for unit in window.units)


def one_after_another(tensors: list[tuple[str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
    """Tensors of these names and shapes as they lie in a unit's buffer."""
    placed: list[TensorSpec] = []
    for name, shape in tensors:
        placed.append(TensorSpec(name, shape, placed[-1].offset + placed[-1].elements if placed else 0))
    return tuple(placed)


def freeze_outside(model: TinyTransformer, window: Window, trains: Callable[[str], bool] = lambda name: True) -> list[torch.nn.Parameter]:
    """Let only the window's tensors take gradients; parts of the model outside it go into eval mode.

    Args:
        trains: whether the tensor of this name may train at all.

    Returns:
        The trainable parameters, in the model's order. Nothing else may reach the optimiser.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainable = []
    for index, part in enumerate(model.parts()):
        part.train(index in window)
        for parameter in part.parameters():
            parameter.requires_grad_(index in window and trains(names[id(parameter)]))
            if parameter.requires_grad:
                trainable.append(parameter)
    return trainable
