"""DepthFL: every client trains the first blocks that it can afford, with classifiers on the way that learn from each other.

Source: Kim, Yu, Kim, Moon 2023, "DepthFL: Depthwise Federated Learning for Heterogeneous Clients", ICLR 2023 (openreview pf8RIZTMU58): the
model is cut into stages with a classifier behind each; a client holds the first ones that it can afford; its loss is the sum of
their cross-entropies and of the mean divergence from each other's answers; each stage becomes the mean over those who hold it;
inference takes the mean of all classifiers. Left out: FedDyn's regulariser, a copy of the model that every client would keep from round to
round; this is what the paper compares with as DepthFL (FedAvg).

The opposite of windows of last blocks: weights and FLOPs fall too, but weak clients never see the deep blocks. Classifiers begin as
copies of the pretrained head. What is scored is the ensemble, what is exported the deepest classifier alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distfl.messages import NOT_HELD, Assignment, Region
from distfl.methods.base import Detail, LastBlocks
from distfl.model import Head, ModelSpec, TinyTransformer
from distfl.settings import require
from distfl.units import TensorSpec, UnitTable, Window


@dataclass(frozen=True)
class Options:
    """Args:
    stages: equal parts of the model, as far as its depth can be divided; a classifier stands behind each.
    distillation: how much the divergence from each other's answers counts in the loss.
    allow_dropping: clients that cannot train the first stage sit out instead of being an error.
    """

    stages: int = 4
    distillation: float = 1.0
    allow_dropping: bool = False

    def __post_init__(self) -> None:
        require(self.stages >= 1, "stages", self.stages, "at least 1")
        require(self.distillation >= 0, "distillation", self.distillation, "not below 0")


class DepthFl(LastBlocks):
    """The first stages. The detail says how many blocks the client holds, and whether the head."""

    Options = Options
    source = "ICLR 2023, openreview pf8RIZTMU58"
    ensemble = True
    someone_holds_all = True  # else classifiers that nobody trains would count in the ensemble

    def ends(self, depth: int) -> list[int]:
        """Blocks up to the end of each stage."""
        stages = min(self.options.stages, depth)
        return [round(depth * (stage + 1) / stages) for stage in range(stages)]

    def window(self, table: UnitTable, blocks: int) -> Window:
        """All units up to the end of the stage that the last of so many blocks belongs to; the head belongs to the last stage."""
        end = min(end for end in self.ends(table.spec.depth) if end >= blocks)
        return Window(0, 1 + end + (end == table.spec.depth))

    def possible_blocks(self, most: int, depth: int) -> int:
        return max((end for end in self.ends(depth) if end <= most), default=0)

    def details(self, spec: ModelSpec, window: Window) -> Sequence[Detail]:
        return [{"blocks": min(spec.depth, window.last - 1), "head": window.last == spec.depth + 2}]

    def part(self, tensor: TensorSpec, detail: Detail) -> Region:
        part, place, *_ = tensor.name.split(".")
        if not detail or part == "embedding":
            return None
        held = int(place) < detail["blocks"] if part == "blocks" else detail["head"]
        return None if held else NOT_HELD

    def prepare(self, model: TinyTransformer) -> None:
        model.mutual = self.options.distillation
        with torch.device("meta"):
            for end in self.ends(model.spec.depth)[:-1]:
                model.blocks[end - 1].exit = Head(model.spec)

    def initial(self, pretrained: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        depth = 1 + max(int(name.split(".")[1]) for name in pretrained if name.startswith("blocks."))
        head = {name.removeprefix("head."): tensor for name, tensor in pretrained.items() if name.startswith("head.")}
        copies = {f"blocks.{end - 1}.exit.{name}": tensor.clone() for end in self.ends(depth)[:-1] for name, tensor in head.items()}
        return pretrained | copies

    def deployed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if ".exit." not in name}

    def hold(self, model: TinyTransformer, assignment: Assignment, seed: int) -> None:
        model.blocks = model.blocks[: assignment.detail["blocks"]]
        if not assignment.detail["head"]:
            model.head = None


METHOD = DepthFl
