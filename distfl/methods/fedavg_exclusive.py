"""FedAvg of the strong: clients that cannot train the whole model at the deepest depth sit out.

FedAvg (arXiv 1602.05629) as papers on constrained devices compare with it, for instance the authors of CoCoFL
(arXiv 2203.05468): who takes part trains and sends everything. What only the others' data holds is never learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from distfl.errors import PlanError
from distfl.fleet import Client
from distfl.methods.base import Workload
from distfl.methods.fedavg import WholeModel
from distfl.planner import Selection, of_clients


@dataclass(frozen=True)
class Options:
    """There are none."""


class FedAvgExclusive(WholeModel):
    """Weak clients are dropped; rounds are filled with the others."""

    Options = Options
    source = "arXiv 1602.05629, algorithm 1, over the clients that can"

    def select(self, clients: Sequence[Client], workloads: dict[int, Workload]) -> Selection:
        depth = max(workloads)
        chosen = self.selection(depth, "is the deepest; clients that cannot train all of it sit out", clients, workloads)
        if chosen.excluded[depth] == len(clients):
            raise PlanError(
                f"the whole model of depth {depth} on at least one client",
                self.needs(clients, workloads[depth]),
                "raise one of these budgets of fleet.groups, lower training.batch, or set model.depths to shallower ones",
            )
        return chosen

    def candidates(self, clients: Sequence[Client], workload: Workload) -> Sequence[Client]:
        able = of_clients(clients, partial(self.blocks, workload))
        return [client for client in clients if able[client.id]]


METHOD = FedAvgExclusive
