"""The fleet: sizes of budget groups, who takes part, who is hosted when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distfl.config import FleetConfig, GroupConfig
from distfl.errors import ConfigError
from distfl.fleet import Budget, build_fleet, group_sizes, participants, waves_of


def shares(*values: float) -> tuple[GroupConfig, ...]:
    return tuple(GroupConfig(f"g{i}", 10.0, share=value) for i, value in enumerate(values))


def counts(*values: int) -> tuple[GroupConfig, ...]:
    return tuple(GroupConfig(f"g{i}", 10.0 * (i + 1), count=value) for i, value in enumerate(values))


def members(count: int):
    return build_fleet(FleetConfig(counts(count)), [f"c{i}" for i in range(count)], [1] * count, seed=1)


@pytest.mark.parametrize(
    "parts, clients, expected",
    [
        ((1, 1, 1), 9, [3, 3, 3]),
        ((1, 1, 1), 10, [4, 3, 3]),  # 3.33 each: one is left over, the first of equals gets it
        ((0.5, 0.3, 0.2), 11, [6, 3, 2]),  # 5.5, 3.3, 2.2: the largest remainder gets the last
        ((1, 2), 3, [1, 2]),  # shares need not add up to 1
        ((0.98, 0.01, 0.01), 10, [8, 1, 1]),  # 9.8, 0.1, 0.1: nobody is left empty
        ((1, 1), 2, [1, 1]),
    ],
)
def test_shares_become_sizes(parts, clients, expected):
    assert group_sizes(shares(*parts), clients) == expected


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 60))
def test_sizes_always_add_up_and_no_group_is_empty(parts, more):
    clients = len(parts) + more
    sizes = group_sizes(shares(*parts), clients)
    assert sum(sizes) == clients and min(sizes) >= 1


def test_counts_are_taken_as_they_are():
    assert group_sizes(counts(2, 5, 1), 8) == [2, 5, 1]


@pytest.mark.parametrize("clients", [7, 9])
def test_counts_that_do_not_add_up_are_refused(clients):
    with pytest.raises(ConfigError, match="add up to 8") as refused:
        group_sizes(counts(2, 5, 1), clients)
    assert str(clients) in refused.value.found


@pytest.mark.parametrize("groups", [shares(1, 1, 1), counts(1, 1, 1)])
def test_more_groups_than_clients_are_refused(groups):
    with pytest.raises(ConfigError, match="3 budget groups"):
        group_sizes(groups, 2)


def test_clients_dealt_in_order_get_their_groups_budget_in_bytes():
    groups = (GroupConfig("weak", 1.5, upload_mb=0.25, count=1), GroupConfig("strong", 20, gflops=2, count=2))
    fleet = build_fleet(FleetConfig(groups, deal="in_order"), ["ann", "bob", "cat"], [4, 5, 6], seed=1)
    assert [(c.id, c.name, c.group, c.rows) for c in fleet] == [(0, "ann", "weak", 4), (1, "bob", "strong", 5), (2, "cat", "strong", 6)]
    assert [c.budget for c in fleet] == [Budget(1_500_000, 250_000, None)] + 2 * [Budget(20_000_000, None, 2_000_000_000)]


def test_shuffled_dealing_keeps_sizes_and_ids_and_depends_on_the_seed_alone():
    def dealt(seed: int) -> list[str]:
        fleet = build_fleet(FleetConfig(counts(10, 20)), [str(i) for i in range(30)], [1] * 30, seed)
        assert [client.id for client in fleet] == list(range(30))
        return [client.group for client in fleet]

    assert dealt(1) == dealt(1) != dealt(2)
    assert dealt(1).count("g0") == dealt(2).count("g0") == 10
    assert dealt(1) != sorted(dealt(1))


def test_more_participants_than_clients_are_refused():
    with pytest.raises(ConfigError, match="participants = 4"):
        build_fleet(FleetConfig(counts(3), participants=4), ["a", "b", "c"], [1, 1, 1], seed=1)


def test_participants_are_drawn_by_seed_and_round_and_come_in_client_order():
    clients = members(20)
    drawn = {(seed, round): [c.id for c in participants(clients, 5, seed, round)] for seed in (1, 2) for round in (1, 2)}
    assert drawn[1, 1] == [c.id for c in participants(clients, 5, 1, 1)]
    assert len(set(map(tuple, drawn.values()))) == 4
    assert all(ids == sorted(set(ids)) and len(ids) == 5 for ids in drawn.values())


def test_everybody_takes_part_without_a_number():
    clients = members(4)
    assert participants(clients, None, 1, 1) == participants(clients, 4, 1, 1) == clients


def test_everybody_takes_part_some_time():
    clients = members(10)
    assert {c.id for round in range(40) for c in participants(clients, 2, 1, round)} == set(range(10))


@given(st.integers(0, 200), st.integers(1, 70))
def test_waves_cover_all_positions_in_order_for_any_number_of_workers(count, workers):
    waves = waves_of(count, workers)
    assert [position for wave in waves for position in wave] == list(range(count))
    assert all(1 <= len(wave) <= workers for wave in waves)
    assert len(waves) == -(-count // workers)  # no more waves than needed
