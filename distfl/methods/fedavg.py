"""FedAvg: everyone trains the whole model at the deepest depth, and sends all of it.

Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", arXiv 1602.05629, algorithm 1: W <- sum n_c W_c / sum n_c over the clients of a round.

A fleet with a client that cannot afford it is refused: leaving such clients out is ``fedavg_exclusive``, a shallower
model ``allsmall``. With ``ignore_budgets`` it is the unconstrained upper bound.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from distfl.costs import Cost
from distfl.errors import PlanError
from distfl.fleet import Budget, Client
from distfl.messages import Assignment
from distfl.methods.base import Method, Workload
from distfl.planner import Selection, cheapest, fits, needs, of_clients
from distfl.units import UnitTable, Window

UNLIMITED = Budget(sys.maxsize, None, None)


@dataclass(frozen=True)
class Options:
    """Args:
    ignore_budgets: every client trains, by the quickest steps, whatever its budget; only with memory.enforce=report, and every output
        shows by how much budgets are overrun.
    """

    ignore_budgets: bool = False


class WholeModel(Method):
    """Clients train the whole model, embedding and head included, or not at all."""

    def window(self, table: UnitTable, blocks: int) -> Window:
        return Window(0, table.spec.depth + 2)

    def plan(self, round: int, clients: Sequence[Client], workload: Workload, limits: dict[int, int]) -> list[Assignment]:
        return [self._assign(round, client, workload, limits) for client in clients]

    def _assign(self, round: int, client: Client, workload: Workload, limits: dict[int, int]) -> Assignment:
        table, weight = workload.costs.table, float(client.rows)
        depth = table.spec.depth
        window = self.window(table, depth)
        details, best = self.details(table.spec, window), self.cost(client, window, workload).detail
        worse = details.index(best) + depth - limits.get(client.id, depth)  # the next detail for each time that it ran into its cap
        if worse >= len(details) or not self.blocks(workload, client, worse):
            return self.sits_out(round, client, weight, workload)
        cost = self.cost(client, window, workload, worse)
        return self.assignment(round, client, window, cost.recipe, weight, workload, cost.detail)

    def blocks(self, workload: Workload, client: Client, worse: int = 0) -> int:
        """All, or none where the client cannot afford the whole model, by any but so many of the best details."""
        depth = workload.costs.spec.depth
        window = self.window(workload.costs.table, depth)
        return depth if self.ignores_budgets or fits(self.cost(client, window, workload, worse), client.budget) else 0

    def selection(self, depth: int, reason: str, clients: Sequence[Client], workloads: dict[int, Workload]) -> Selection:
        """Of this depth, beside what the others would have been."""
        blocks = {each: of_clients(clients, partial(self.blocks, workload)) for each, workload in workloads.items()}
        averages = {each: sum(of.values()) / len(clients) for each, of in blocks.items()}
        return Selection(depth, reason, blocks[depth], averages, {each: sum(b == 0 for b in of.values()) for each, of in blocks.items()})

    def needs(self, clients: Sequence[Client], workload: Workload) -> str:
        """The smallest budgets with which every client could train the whole model of a depth."""
        window = self.window(workload.costs.table, workload.costs.spec.depth)
        lacking = [client for client in clients if not self.blocks(workload, client)]
        return needs(clients, lacking, lambda client: self.cost(client, window, workload))


class CommonDepth(WholeModel):
    """Of the depths at which every client can train by some detail, and one by the best, the deepest: what no client holds would be
    scored untrained."""

    someone_holds_all: ClassVar[bool] = True  # False: the parts that clients hold change from round to round

    def select(self, clients: Sequence[Client], workloads: dict[int, Workload]) -> Selection:
        common = [depth for depth, workload in workloads.items() if all(of_clients(clients, partial(self.blocks, workload)).values())]
        held = [depth for depth in common if not self.someone_holds_all or self.somebody_holds_all(clients, workloads[depth])]
        if not held:
            if common:
                least = needs(clients, clients, partial(self.cost_of_all, workloads[min(common)]))
                found = f"of {min(common)} all can hold parts, none holds all; one group of these would do: {least}"
            else:
                found = f"not even {min(workloads)}: {self.needs(clients, workloads[min(workloads)])}"
            raise PlanError(
                f"a depth of {sorted(workloads)} that every client can train, and one can hold wholly",
                found,
                "raise these budgets of fleet.groups, lower training.batch, or add shallower depths to the family",
            )
        reason = "is the deepest that every client can train" + ", and one can hold wholly" * self.someone_holds_all
        return self.selection(max(held), reason, clients, workloads)

    def somebody_holds_all(self, clients: Sequence[Client], workload: Workload) -> bool:
        """Whether some client's budget admits the best detail."""
        return any(of_clients(clients, lambda client: fits(self.cost_of_all(workload, client), client.budget)).values())

    def cost_of_all(self, workload: Workload, client: Client) -> Cost:
        """Of the best detail."""
        spec, window = workload.costs.spec, self.window(workload.costs.table, workload.costs.spec.depth)
        best = self.details(spec, window)[0]
        return cheapest(
            (self.cost_by(client, window, recipe, workload, best) for recipe in workload.recipes(client, spec.depth)), client.budget
        )


class FedAvg(WholeModel):
    """Everybody trains everything."""

    Options = Options
    source = "arXiv 1602.05629, algorithm 1"

    @property
    def ignores_budgets(self) -> bool:
        return self.options.ignore_budgets

    def cost(self, client: Client, window: Window, workload: Workload, worse: int = 0) -> Cost:
        return super().cost(replace(client, budget=UNLIMITED) if self.ignores_budgets else client, window, workload, worse)

    def select(self, clients: Sequence[Client], workloads: dict[int, Workload]) -> Selection:
        depth = max(workloads)
        chosen = self.selection(depth, "is the deepest; every client trains all of it", clients, workloads)
        if chosen.excluded[depth]:
            raise PlanError(
                f"the whole model of depth {depth} on every client",
                self.needs(clients, workloads[depth]),
                "raise these budgets of fleet.groups, lower training.batch, take method.name=fedavg_exclusive (they sit out) or allsmall "
                "(a shallower model), or measure the unconstrained upper bound by method.options.ignore_budgets=true memory.enforce=report",
            )
        return chosen


METHOD = FedAvg
