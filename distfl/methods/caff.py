"""CAFF: freeze the first blocks, train the last ones that each client can afford, average layer by layer.

Source: Pfeiffer, Ahmed, Khalili, Henkel, "Efficient Federated Finetuning of Tiny Transformers with
Resource-Constrained Devices", arXiv 2411.07826. Not read in the paper, hence options or our
decision: the exact weights of the mean, what happens to a client that cannot train a block, ties
between depths (the deeper wins), the embedding (always frozen).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from distfl.costs import Cost
from distfl.errors import ConfigError
from distfl.fleet import Client
from distfl.messages import Assignment
from distfl.methods.base import Method, Workload
from distfl.planner import Selection, select, widest
from distfl.units import Unit


@dataclass(frozen=True)
class Options:
    """Args:
    averaging: ``contributors``: mean over the clients that trained a block, weighted by their training
        sequences; ``participation`` (CoCoFL's rule, arXiv 2203.05468): unweighted mean, moved towards by the
        share of this round's clients that trained the block.
    allow_dropping: clients that cannot train a single block sit out instead of being an error.
    extra_blocks: budget group -> blocks trained beyond the plan; for seeing the cap at work.
    """

    averaging: Literal["contributors", "participation"] = "contributors"
    allow_dropping: bool = False
    extra_blocks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group, blocks in self.extra_blocks.items():
            if type(blocks) is not int or blocks < 0:
                raise ConfigError(f"extra_blocks.{group} = {blocks!r}", "not a number of blocks", "give 0 or more")


class Caff(Method):
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
        return select(
            clients, {depth: partial(self._cost_of_suffix, workload) for depth, workload in workloads.items()}, self.options.allow_dropping
        )

    def plan(self, round: int, clients: Sequence[Client], workload: Workload, limits: dict[int, int]) -> list[Assignment]:
        return [self._assign(round, client, workload, limits.get(client.id)) for client in clients]

    def _assign(self, round: int, client: Client, workload: Workload, limit: int | None) -> Assignment:
        depth, table = workload.costs.spec.depth, workload.costs.table
        planned = widest(client, depth, partial(self._cost_of_suffix, workload))
        blocks = min(depth, planned + self.options.extra_blocks.get(client.group, 0)) if planned else 0
        blocks = blocks if limit is None else min(blocks, limit)
        weight = float(client.rows) if self.options.averaging == "contributors" else 1.0
        if not blocks:
            return self.sits_out(round, client, weight, workload)
        recipe = self._cost_of_suffix(workload, client, min(blocks, planned)).recipe  # extra blocks get no levers of their own
        return self.assignment(round, client, table.suffix(blocks), recipe, weight, workload)

    def stable_units(self, clients: Sequence[Client], workload: Workload) -> int:
        return min((a.window.first for a in self.plan(1, clients, workload, {}) if a.window), default=0)

    def _cost_of_suffix(self, workload: Workload, client: Client, blocks: int) -> Cost:
        return self.cost(client, workload.costs.table.suffix(blocks), workload)

    def finish(self, unit: Unit, old: Tensor, mean: Tensor, share: Tensor) -> Tensor:
        if self.options.averaging == "contributors":
            return mean
        return torch.lerp(old, mean, share)  # exact where mean equals old


METHOD = Caff
