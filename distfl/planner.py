"""Which depth, which windows: the selection of CAFF (arXiv 2411.07826; summarised in README).

For every depth l of the family and every client c, ``t_c(l)`` is the largest number of last blocks
(with the head) whose peak, upload and FLOPs lie within the client's budget. The depth with the
largest average of t_c over the fleet is taken; ties go to the deeper model, whose frozen features
are better. A depth is admissible only if every client can train at least one block, unless
dropping clients is allowed; then a dropped client counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from distfl.costs import Cost
from distfl.errors import PlanError
from distfl.fleet import GIGA, MEGA, Budget, Client

CostOf = Callable[[Client, int], Cost]  # (client, trained blocks) -> cost of its round


def fits(cost: Cost, budget: Budget) -> bool:
    """Whether a round with this cost stays within a budget."""
    return (
        cost.peak.bytes <= budget.memory_bytes
        and (budget.upload_bytes is None or cost.upload_bytes <= budget.upload_bytes)
        and (budget.flops is None or cost.flops <= budget.flops)
    )


def cheapest(costs: Iterable[Cost], budget: Budget) -> Cost:
    """Of one window's costs, cheapest in time first: the first that fits a budget, else the one with the lowest peak."""
    leanest = None
    for cost in costs:
        if fits(cost, budget):
            return cost
        if leanest is None or cost.peak.bytes < leanest.peak.bytes:
            leanest = cost
    return leanest


def widest(client: Client, most: int, cost_of: CostOf) -> int:
    """t_c: how many of at most so many last blocks this client can train, with the levers it may use; 0 where not even one."""
    return next((blocks for blocks in range(most, 0, -1) if fits(cost_of(client, blocks), client.budget)), 0)


@dataclass(frozen=True)
class Selection:
    """The depth taken and why.

    Args:
        reason: in words, behind "depth so-and-so".
        blocks: client id -> trained blocks at the chosen depth.
        averages: depth -> mean trained blocks over the fleet.
        excluded: depth -> clients that cannot train one block of it.
    """

    depth: int
    reason: str
    blocks: dict[int, int]
    averages: dict[int, float]
    excluded: dict[int, int]


def select(
    clients: Sequence[Client],
    costs: Mapping[int, CostOf],
    allow_dropping: bool,
    most_blocks: int | None = None,
    someone_holds_all: bool = False,
) -> Selection:
    """Choose the depth.

    Args:
        clients: the fleet.
        costs: depth -> cost function of that depth's model.
        most_blocks: no window is wider than this; None = the depth.
        someone_holds_all: a depth is admissible only if a client can train, and so hold, all of its blocks.

    Raises:
        PlanError: no depth is admissible; says the smallest budgets that would do.
    """
    blocks = {
        depth: of_clients(clients, partial(widest, most=min(depth, most_blocks or depth), cost_of=cost_of))
        for depth, cost_of in costs.items()
    }
    averages = {depth: sum(of.values()) / len(clients) for depth, of in blocks.items()}
    excluded = {depth: sum(t == 0 for t in of.values()) for depth, of in blocks.items()}
    admissible = [depth for depth in costs if averages[depth] > 0 and (allow_dropping or excluded[depth] == 0)]
    if not admissible:
        raise _nothing_fits(clients, costs, blocks)
    if someone_holds_all:
        most = {depth: max(blocks[depth].values()) for depth in admissible}
        admissible = [depth for depth in admissible if most[depth] == depth]
        if not admissible:
            raise PlanError(
                f"a depth of {sorted(costs)} of which some client can train every block",
                "; ".join(f"of depth {depth}, {trained} at most" for depth, trained in most.items()),
                "raise a budget of fleet.groups, lower training.batch, or add shallower depths to the family",
            )
    depth = max(admissible, key=lambda candidate: (averages[candidate], candidate))
    reason = f"lets {len(clients)} clients train most blocks on average (ties go to the deeper model)"
    return Selection(depth, reason, blocks[depth], averages, excluded)


def of_clients(clients: Sequence[Client], blocks_of: Callable[[Client], int]) -> dict[int, int]:
    """Blocks that every client can train; clients alike in budget and data size are computed once."""
    known: dict[tuple[Budget, int], int] = {}
    for client in clients:
        if (client.budget, client.rows) not in known:
            known[client.budget, client.rows] = blocks_of(client)
    return {client.id: known[client.budget, client.rows] for client in clients}


def _nothing_fits(clients: Sequence[Client], costs: Mapping[int, CostOf], blocks: dict[int, dict[int, int]]) -> PlanError:
    """Say, for the depth that asks least, which groups fail and what would let them train one block."""
    depth = min(costs, key=lambda candidate: max(costs[candidate](client, 1).peak.bytes for client in clients))
    lacking = [client for client in clients if blocks[depth][client.id] == 0]
    return PlanError(
        f"a window for every client at one of the depths {sorted(costs)}",
        f"no depth admits all; least demanding is depth {depth}: {needs(clients, lacking, lambda client: costs[depth](client, 1))}",
        "raise these budgets of fleet.groups, lower training.batch, or set method.options.allow_dropping=true",
    )


def needs(clients: Sequence[Client], lacking: Sequence[Client], cost_of: Callable[[Client], Cost]) -> str:
    """The smallest budgets that would do for every group with a client that lacks something."""
    found = []
    for group in sorted({client.group for client in lacking}):
        members = [client for client in clients if client.group == group]
        least = [cost_of(client) for client in members]
        budget = members[0].budget
        parts = [_need("memory_mb", max(cost.peak.bytes for cost in least), budget.memory_bytes, MEGA)]
        if budget.upload_bytes is not None:
            parts.append(_need("upload_mb", max(cost.upload_bytes for cost in least), budget.upload_bytes, MEGA))
        if budget.flops is not None:
            parts.append(_need("gflops", max(cost.flops for cost in least), budget.flops, GIGA))
        found.append(f"{group} needs at least {', '.join(parts)}")
    return "; ".join(found)


def _need(key: str, least: int, has: int, unit: int) -> str:
    """A setting's smallest sufficient value, rounded up so that following it is enough."""
    return f"{key} {math.ceil(least / unit * 1000) / 1000:.3f} (has {has / unit:.3f})"
