"""AllSmall: FedAvg on the deepest model of the family that every client can train wholly.

The comparison that subset techniques must win (Pfeiffer et al., "Aggregating Capacity in FL through Successive Layer
Training for Computationally-Constrained Devices", arXiv 2305.17005): the weakest client decides the size of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distfl.errors import PlanError
from distfl.fleet import Client
from distfl.methods.base import Workload
from distfl.methods.fedavg import WholeModel
from distfl.planner import Selection


@dataclass(frozen=True)
class Options:
    """There are none."""


class AllSmall(WholeModel):
    """The largest common model."""

    Options = Options
    source = "arXiv 2305.17005, the baseline of this name"

    def select(self, clients: Sequence[Client], workloads: dict[int, Workload]) -> Selection:
        common = [depth for depth, workload in workloads.items() if all(self.blocks(workload, client) for client in clients)]
        if not common:
            shallowest = min(workloads)
            raise PlanError(
                f"a depth of {sorted(workloads)} that every client can train wholly",
                f"not even {shallowest}: {self.needs(clients, workloads[shallowest])}",
                "raise these budgets of fleet.groups, lower training.batch, or add shallower depths to the family",
            )
        return self.selection(max(common), "is the deepest that every client can train wholly", clients, workloads)


METHOD = AllSmall
