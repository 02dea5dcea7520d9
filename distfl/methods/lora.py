"""LoRA by federated averaging: adapters of low rank train beside frozen matrices, A and B are averaged apart.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; with FedAvg for instance in
Zhang et al. 2023, "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644.

The mean of the factors is not the mean of the updates: mean(B_c) mean(A_c) != mean(B_c A_c). Its knob under a budget is the number
of adapted blocks, counted from the output: the rank saves no activations. Merged, an adapter is part of its matrix, so
a client runs the adapters below its window as it received them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from distfl import lora
from distfl.lora import AdaptedBlock
from distfl.messages import Region
from distfl.methods.base import Detail, LastBlocks
from distfl.model import ModelSpec, TinyTransformer
from distfl.settings import require
from distfl.units import TensorSpec, Window


@dataclass(frozen=True)
class AdapterOptions:
    """Args:
    targets: matrices with an adapter: queries, keys, values, the attention's output, the two of the feed-forward layer.
    blocks: no client trains adapters of more blocks, counted from the output; None = all that its budget admits. Depths that admit
        as many to everybody tie, and of these the deepest is taken.
    head: the final norm and the output layer train too.
    allow_dropping: clients that cannot train the adapters of a single block sit out instead of being an error.
    """

    targets: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = lora.TARGETS
    blocks: int | None = None
    head: bool = True
    allow_dropping: bool = False

    def __post_init__(self) -> None:
        require(0 < len(self.targets) == len(set(self.targets)), "targets", self.targets, "at least one target, none of them twice")
        require(self.blocks is None or self.blocks >= 1, "blocks", self.blocks, "at least 1")


@dataclass(frozen=True)
class Options(AdapterOptions):
    """Args:
    rank: r of every adapter.
    alpha: numerator of the scale alpha / r; None = 2 r, so that the scale is the same whatever the rank.
    """

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "above 0")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class RankedOptions(AdapterOptions):
    """Args:
    ranks: a client's adapters are of the largest of these that its budget admits with the most blocks it admits.
    scale: alpha / r, the same for all ranks: else factors cut or padded to another rank would say something else.
    """

    ranks: tuple[int, ...] = (2, 4, 8, 16)
    scale: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        apart = 0 < len(self.ranks) == len(set(self.ranks)) and min(self.ranks) >= 1
        require(apart, "ranks", self.ranks, "at least one rank, each at least 1, none of them twice")
        require(self.scale > 0, "scale", self.scale, "above 0")

    @property
    def rank(self) -> int:
        """Of the shared adapters."""
        return max(self.ranks)


class Lora(LastBlocks):
    """A and B train."""

    Options: type[AdapterOptions] = Options
    source = "arXiv 2106.09685, section 4.1; arXiv 2305.05644"
    trained_factors: tuple[str, ...] = ("_A", "_B")

    @property
    def most_blocks(self) -> int | None:
        return self.options.blocks

    def block(self, spec: ModelSpec, detail: Detail) -> AdaptedBlock:
        return AdaptedBlock(detail.get("rank", self.options.rank), self.options.targets, "_A" in self.trained_factors)

    def prepare(self, model: TinyTransformer) -> None:
        require(self.options.rank <= model.spec.width, "rank", self.options.rank, f"at most the model's width, {model.spec.width}")
        lora.adapt(model, self.options.targets, self.options.rank, self.options.scale)

    def initial(self, pretrained: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        return pretrained | lora.initial_adapters(pretrained, self.options.targets, self.options.rank, seed)

    def trains(self, name: str) -> bool:
        return name.endswith(self.trained_factors) or (self.options.head and name.startswith("head."))

    def deployed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return lora.merged(tensors, self.options.scale)


class RankedLora(Lora):
    """Clients hold the first ``detail["rank"]`` rows of A and columns of B."""

    Options = RankedOptions

    def details(self, spec: ModelSpec, window: Window) -> Sequence[Detail]:
        return [{"rank": rank} for rank in sorted(self.options.ranks, reverse=True)]

    def part(self, tensor: TensorSpec, detail: Detail) -> Region:
        if not detail or not lora.is_adapter(tensor.name):
            return None
        rows, columns = map(np.arange, tensor.shape)
        rank = detail["rank"]
        return (rows[:rank], columns) if tensor.name.endswith("_A") else (rows, columns[:rank])


METHOD = Lora
