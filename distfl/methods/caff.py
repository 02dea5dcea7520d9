"""CAFF: freeze the first blocks, train the last ones that each client can afford, average layer by layer.

Source: Pfeiffer, Ahmed, Khalili, Henkel, "Efficient Federated Finetuning of Tiny Transformers with
Resource-Constrained Devices", arXiv 2411.07826. Not read in the paper, hence options or our
decision: the exact weights of the mean, what happens to a client that cannot train a block, ties
between depths (the deeper wins), whether the embedding ever trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distfl.errors import ConfigError
from distfl.fleet import Client
from distfl.methods.base import LastBlocks, MeanOf, Workload
from distfl.planner import Selection
from distfl.units import Unit, UnitTable, Window


@dataclass(frozen=True)
class Options:
    """Args:
    averaging: ``contributors``: mean over the clients that trained a block, weighted by their training
        sequences; ``participation`` (CoCoFL's rule, arXiv 2203.05468): unweighted mean, moved towards by the
        share of this round's clients that trained the block.
    embedding: ``frozen``; or ``with_all_blocks``: to train all blocks is to train the whole model, embedding included, and a client
        whose budget does not admit that trains one block less.
    allow_dropping: clients that cannot train a single block sit out instead of being an error.
    extra_blocks: budget group -> blocks trained beyond the plan; for seeing the cap at work.
    """

    averaging: Literal["contributors", "participation"] = "contributors"
    embedding: Literal["frozen", "with_all_blocks"] = "frozen"
    allow_dropping: bool = False
    extra_blocks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group, blocks in self.extra_blocks.items():
            if type(blocks) is not int or blocks < 0:
                raise ConfigError(f"extra_blocks.{group} = {blocks!r}", "not a number of blocks", "give 0 or more")


class Caff(LastBlocks):
    """The main method."""

    Options = Options
    source = "arXiv 2411.07826"

    def select(self, clients: Sequence[Client], workloads: dict[int, Workload]) -> Selection:
        unknown = set(self.options.extra_blocks) - {client.group for client in clients}
        if unknown:
            raise ConfigError(
                f"extra_blocks of {sorted(unknown)}",
                f"groups are {sorted({client.group for client in clients})}",
                "name existing fleet.groups",
            )
        return super().select(clients, workloads)

    def window(self, table: UnitTable, blocks: int) -> Window:
        if self.options.embedding == "with_all_blocks" and blocks == table.spec.depth:
            return Window(0, table.spec.depth + 2)
        return super().window(table, blocks)

    def planned_blocks(self, client: Client, admitted: int, depth: int) -> int:
        return min(depth, admitted + self.options.extra_blocks.get(client.group, 0)) if admitted else 0

    def weight(self, client: Client) -> float:
        return float(client.rows) if self.options.averaging == "contributors" else 1.0

    def finish(self, unit: Unit, shared: Mapping[str, Tensor], mean_of: MeanOf) -> Iterator[tuple[str, Tensor]]:
        if self.options.averaging == "contributors":
            yield from super().finish(unit, shared, mean_of)
            return
        for tensor in unit.tensors:
            yield tensor.name, torch.lerp(shared[tensor.name], *mean_of(tensor.name))  # exact where the mean is the old value


METHOD = Caff
