"""The fleet: clients with their budgets, who takes part in a round, which rank hosts whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distfl import seeds
from distfl.config import FleetConfig, GroupConfig
from distfl.errors import ConfigError

MEGA = 10**6
GIGA = 10**9


@dataclass(frozen=True)
class Budget:
    """What one client may use. ``None`` = no limit."""

    memory_bytes: int
    upload_bytes: int | None
    flops: int | None


@dataclass(frozen=True)
class Client:
    """One federated participant.

    Args:
        id: its place in the shard index and in every sum.
        group: name of its budget group.
        rows: training sequences it holds (n_c of the papers).
    """

    id: int
    name: str
    group: str
    budget: Budget
    rows: int


def build_fleet(config: FleetConfig, names: list[str], rows: list[int], seed: int) -> list[Client]:
    """Deal clients to budget groups.

    Args:
        names, rows: of every client, by id.

    Raises:
        ConfigError: groups that do not fit the number of clients, more participants than clients.
    """
    sizes = group_sizes(config.groups, len(names))
    if config.participants is not None and config.participants > len(names):
        raise ConfigError(
            f"fleet.participants = {config.participants}",
            f"the data has {len(names)} clients",
            "lower fleet.participants or raise data.clients",
        )
    order = np.arange(len(names)) if config.deal == "in_order" else seeds.generator(seed, "budget groups").permutation(len(names))
    group_of = np.empty(len(names), int)
    group_of[order] = np.repeat(np.arange(len(sizes)), sizes)
    budgets = [_budget(group) for group in config.groups]
    return [Client(i, name, config.groups[group_of[i]].name, budgets[group_of[i]], rows[i]) for i, name in enumerate(names)]


def group_sizes(groups: tuple[GroupConfig, ...], clients: int) -> list[int]:
    """Clients per group; shares are rounded by largest remainder, no group is left empty (raises ConfigError)."""
    if len(groups) > clients:
        raise ConfigError(f"{len(groups)} budget groups", f"the data has {clients} clients", "use fewer fleet.groups or raise data.clients")
    if groups[0].count is not None:
        sizes = [group.count for group in groups]
        if sum(sizes) != clients:
            raise ConfigError(
                f"fleet.groups with counts {sizes}",
                f"they add up to {sum(sizes)}, the data has {clients} clients",
                "make the counts add up, or give shares",
            )
        return sizes
    shares = np.array([group.share for group in groups], float)
    exact = shares / shares.sum() * clients
    sizes = np.maximum(1, np.floor(exact).astype(int))
    while sizes.sum() != clients:
        step = 1 if sizes.sum() < clients else -1
        distance = np.where(sizes + step >= 1, (exact - sizes) * step, -np.inf)
        sizes[int(np.argmax(distance))] += step
    return sizes.tolist()


def _budget(group: GroupConfig) -> Budget:
    scaled = [None if value is None else round(value * unit) for value, unit in ((group.upload_mb, MEGA), (group.gflops, GIGA))]
    return Budget(round(group.memory_mb * MEGA), *scaled)


def participants(clients: Sequence[Client], count: int | None, seed: int, round: int) -> list[Client]:
    """Clients of one round, in client order."""
    if count is None or count >= len(clients):
        return list(clients)
    chosen = seeds.generator(seed, "participants", round).choice(len(clients), count, replace=False)
    return [clients[i] for i in sorted(chosen)]


def waves_of(count: int, workers: int) -> list[list[int]]:
    """Waves of positions: in each wave worker w hosts the w-th entry, and positions rise over waves and workers."""
    return [list(range(start, min(start + workers, count))) for start in range(0, count, workers)]
