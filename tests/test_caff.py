"""CAFF: windows under budgets, both averaging rules by hand, and what every merge must keep."""

import json
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from helpers import merge, model, same_bits, weights

from distfl.config import LeversConfig, TrainingConfig
from distfl.costs import Costs
from distfl.errors import ConfigError
from distfl.fleet import Budget, Client
from distfl.messages import Assignment
from distfl.methods.base import Workload, load_method, table_of
from distfl.model import ModelSpec
from distfl.recipes import LOSS_CHUNK_TOKENS, Recipe, candidates
from distfl.units import Window

SPEC = ModelSpec(depth=3, width=4, heads=2, context=3, vocabulary=5)
CAFF = load_method("caff", {})
RULES = {rule: load_method("caff", {"averaging": rule}) for rule in ("contributors", "participation")}
TABLE = table_of(CAFF, SPEC)
OFF = LeversConfig("off", "off", "off", "off")
WORK = Workload(Costs(TABLE, 2, 2), TrainingConfig(batch=2, epochs=1), OFF, learning_rate=0.25)
AUTO = replace(WORK, levers=LeversConfig())
PLAIN = Recipe(2)
UNLIMITED = Budget(10**12, None, None)


def peak(blocks: int, batch: int = 2, recipe: Recipe = PLAIN) -> int:
    return replace(WORK.costs, batch=batch).peak(TABLE.suffix(blocks), recipe).bytes


def client(id: int, budget: Budget = UNLIMITED, rows: int = 2, group: str = "g") -> Client:
    return Client(id, f"c{id}", group, budget, rows)


def planned(method, clients, limits=None, work=WORK) -> dict[int, int]:
    """Client -> trained blocks; 0 = sits out."""
    plan = method.plan(1, clients, work, limits or {})
    assert [assignment.client for assignment in plan] == [member.id for member in clients]
    return {a.client: 0 if a.window is None else TABLE.trained_blocks(a.window) for a in plan}


def merged(method, old: dict, updates: list[tuple[Assignment, dict]]) -> dict:
    return merge(method, TABLE, old, updates, sum(assignment.weight for assignment, _ in updates))


def filled(value: float) -> dict:
    return {name: torch.full_like(tensor, value) for name, tensor in weights(SPEC).items()}


def assign(method, *blocks_and_rows: tuple[int, int]) -> list[Assignment]:
    """Assignments of clients that train so many blocks and hold so many rows."""
    clients = [client(i, Budget(peak(blocks, min(2, rows)), None, None), rows) for i, (blocks, rows) in enumerate(blocks_and_rows)]
    plan = method.plan(1, clients, WORK, {})
    assert [TABLE.trained_blocks(a.window) for a in plan] == [blocks for blocks, _ in blocks_and_rows]
    return plan


# --- assignments -------------------------------------------------------------------------------------------------------------------


def test_the_window_is_the_widest_that_the_memory_admits():
    exact = {i: client(i, Budget(peak(i), None, None)) for i in (1, 2, 3)}
    assert planned(CAFF, list(exact.values())) == {1: 1, 2: 2, 3: 3}
    short = [replace(member, budget=replace(member.budget, memory_bytes=member.budget.memory_bytes - 1)) for member in exact.values()]
    assert planned(CAFF, short) == {1: 0, 2: 1, 3: 2}


def test_with_all_blocks_the_embedding_trains_too():
    method = load_method("caff", {"embedding": "with_all_blocks"})
    whole = WORK.costs.peak(Window(0, 5), PLAIN).bytes
    assert whole > peak(3)
    rich, short, poor = (client(i, Budget(bytes, None, None)) for i, bytes in enumerate((whole, whole - 1, peak(1))))
    assert [a.window for a in method.plan(1, [rich, short, poor], WORK, {})] == [Window(0, 5), Window(2, 5), Window(3, 5)]
    assert method.plan(1, [rich], WORK, {rich.id: 2})[0].window == Window(2, 5)  # it ran into its cap
    assert method.plan(1, [rich], WORK, {}) == load_method("fedavg", {}).plan(1, [rich], WORK, {})


def test_a_client_with_less_than_a_batch_pays_for_what_it_has():
    assert peak(2, batch=1) < peak(2)
    assert planned(CAFF, [client(0, Budget(peak(2, batch=1), None, None), rows=1)]) == {0: 2}
    assert planned(CAFF, [client(0, Budget(peak(2, batch=1), None, None), rows=2)]) == {0: 1}
    assert CAFF.plan(1, [client(0, rows=1)], WORK, {})[0].predicted_peak_bytes == peak(3, batch=1)


def test_upload_and_flops_bind_too():
    # one block 12*16 + 13*4 = 244 values, head 2*4 + 5*4 = 28 values: 1 088 bytes for one block, 2 064 for two
    # 5 rows * 3 tokens, F = 24 d^2 + 4 T d = 432, head 6*4*5 = 120: 15 * ((3 + 2 t) * 432 + 120) = 34 200 for t = 1, 47 160 for t = 2
    budgets = [
        Budget(10**12, 1087, None),
        Budget(10**12, 2063, None),
        Budget(10**12, 2064, None),
        Budget(10**12, None, 34199),
        Budget(10**12, None, 47159),
        Budget(10**12, None, 47160),
    ]
    assert planned(CAFF, [client(i, budget, rows=5) for i, budget in enumerate(budgets)]) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2}


def test_steps_limit_the_data_that_flops_are_counted_for():
    assert WORK.sequences(client(0, rows=5)) == 5
    assert replace(WORK, training=TrainingConfig(batch=2, epochs=3)).sequences(client(0, rows=5)) == 15
    steps = replace(WORK, training=TrainingConfig(batch=4, steps=3))
    assert (steps.sequences(client(0, rows=5)), steps.sequences(client(0, rows=2))) == (12, 6)  # no batch is larger than the data


def test_an_assignment_carries_budget_prediction_weight_and_rate():
    # two blocks 2 064 bytes; 9 rows * 3 tokens, F = 432, head 120 (see above): 27 * ((3 + 2 * 2) * 432 + 120) = 84 888
    work = replace(WORK, stable_units=2)
    found = CAFF.plan(7, [client(4, Budget(peak(2) + 5, None, None), rows=9)], work, {})[0]
    assert found == Assignment(7, 4, Window(2, 5), 9.0, peak(2) + 5, peak(2), 2064, 84888, PLAIN, 0.25, stable_units=2)
    assert RULES["participation"].plan(7, [client(4, rows=9)], WORK, {})[0].weight == 1.0
    assert Assignment.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_client_that_sits_out_costs_nothing_and_computes_nothing():
    found = CAFF.plan(7, [client(4, Budget(1, None, None), rows=9)], WORK, {})[0]
    assert (found.window, found.predicted_peak_bytes, found.predicted_flops, found.weight) == (None, 0, 0, 9.0)
    assert Assignment.from_json(json.loads(json.dumps(found.to_json()))) == found


def leanest(blocks: int) -> int:
    """Lowest peak of all recipes."""
    return min(peak(blocks, recipe=recipe) for recipe in candidates(AUTO.levers, AUTO.training, 2, blocks))


def test_levers_admit_more_blocks_to_the_byte():
    for blocks in (1, 2, 3):
        assert leanest(blocks) < peak(blocks)
        budget = Budget(leanest(blocks), None, None)
        assert planned(CAFF, [client(0, budget)], work=AUTO) == {0: blocks}
        assert planned(CAFF, [client(0, replace(budget, memory_bytes=budget.memory_bytes - 1))], work=AUTO) == {0: blocks - 1}


def test_the_recipe_is_the_cheapest_in_time_that_fits():
    work = replace(AUTO, training=TrainingConfig(batch=2, epochs=1, clip_norm=None))
    everything = list(candidates(work.levers, work.training, 2, 3))
    assert everything[0] == Recipe(2, LOSS_CHUNK_TOKENS)
    leaner = [r for i, r in enumerate(everything) if all(peak(3, recipe=r) < peak(3, recipe=earlier) for earlier in everything[:i])]
    assert len(leaner) >= 3 and any(recipe.fused_update for recipe in leaner)
    for recipe in leaner:  # each is the first in time with so low a peak
        found = CAFF.plan(1, [client(0, Budget(peak(3, recipe=recipe), None, None))], work, {})[0]
        assert (found.window, found.recipe, found.predicted_peak_bytes) == (Window(1, 5), recipe, peak(3, recipe=recipe))


def test_recomputation_counts_its_flops_against_the_budget():
    # 2 rows * 3 tokens, F = 432, head 120: 6 * ((3 + 2 * 3) * 432 + 120) = 24 048; each recomputed block 6 * 432 = 2 592 more
    on = replace(WORK, levers=replace(OFF, recompute="on"))
    memory = peak(3, recipe=Recipe(2, recomputed=3))
    for more, blocks in ((7776, 3), (7775, 2)):
        member = client(0, Budget(10**12, None, 24048 + more))
        assert planned(CAFF, [member], work=on) == {0: blocks}
    found = CAFF.plan(1, [client(0, Budget(memory, None, None))], on, {})[0]
    assert (found.recipe, found.predicted_peak_bytes, found.predicted_flops) == (Recipe(2, recomputed=3), memory, 24048 + 7776)


def test_units_below_every_window_are_stable():
    exact = [client(i, Budget(peak(blocks), None, None)) for i, blocks in enumerate((1, 2))]
    assert CAFF.stable_units(exact, WORK) == 2  # embedding and block 0; client 1 trains blocks 1 and 2
    assert CAFF.stable_units(exact[:1], WORK) == 3
    assert CAFF.stable_units([*exact, client(2)], WORK) == 1
    assert CAFF.stable_units([*exact, client(2, Budget(1, None, None))], WORK) == 2  # who sits out trains nothing
    assert CAFF.stable_units([client(2, Budget(1, None, None))], WORK) == 0


def test_limits_shrink_windows_and_can_end_participation():
    clients = [client(i) for i in range(4)]
    assert planned(CAFF, clients, {0: 2, 1: 0, 2: 99}) == {0: 2, 1: 0, 2: 3, 3: 3}


def test_extra_blocks_widen_a_groups_windows_up_to_the_depth():
    method = load_method("caff", {"extra_blocks": {"bold": 1}})
    budget = Budget(peak(2), None, None)
    clients = [client(0, budget, group="bold"), client(1, budget), client(2, group="bold"), client(3, Budget(1, None, None), group="bold")]
    assert planned(method, clients) == {0: 3, 1: 2, 2: 3, 3: 0}  # nobody who cannot train at all is pushed
    bold = method.plan(1, clients, WORK, {})[0]
    assert bold.predicted_peak_bytes == peak(3) > bold.memory_bytes == peak(2)
    lean = client(4, Budget(leanest(2), None, None), group="bold")
    pushed, own = method.plan(1, [lean], AUTO, {})[0], CAFF.plan(1, [lean], AUTO, {})[0]
    assert pushed.window == Window(1, 5) and own.window == Window(2, 5)
    assert pushed.recipe == own.recipe and pushed.predicted_peak_bytes > pushed.memory_bytes  # no levers of their own
    assert planned(method, clients, {0: 2})[0] == 2  # what was learnt from running into the cap stands above it


def test_select_takes_the_depth_that_trains_most():
    works = {depth: replace(WORK, costs=Costs(table_of(CAFF, replace(SPEC, depth=depth)), 2, 2)) for depth in (1, 2, 3)}
    assert CAFF.select([client(0)], works).depth == 3
    weak = client(1, Budget(works[1].costs.peak(works[1].costs.table.suffix(1), PLAIN).bytes, None, None))
    chosen = CAFF.select([client(0), weak], works)
    assert (chosen.depth, chosen.blocks) == (1, {0: 1, 1: 1})
    chosen = load_method("caff", {"allow_dropping": True}).select([client(0), weak], works)
    assert (chosen.depth, chosen.blocks) == (3, {0: 3, 1: 0})


# --- options -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, hint",
    [
        ({"averagin": "contributors"}, "averaging"),
        ({"averaging": "participations"}, "participation"),
        ({"allow_droping": True}, "allow_dropping"),
    ],
)
def test_a_mistyped_option_is_answered_with_the_nearest(options, hint):
    with pytest.raises(ConfigError) as refused:
        load_method("caff", options)
    assert f"did you mean '{hint}'" in refused.value.found and "method.options of caff" in refused.value.asked


@pytest.mark.parametrize("extra", [-1, "many", 1.5])
def test_extra_blocks_must_be_a_number_of_blocks(extra):
    with pytest.raises(ConfigError, match="extra_blocks.g"):
        load_method("caff", {"extra_blocks": {"g": extra}})


def test_extra_blocks_of_a_group_that_is_not_there_are_refused():
    with pytest.raises(ConfigError, match="typo"):
        load_method("caff", {"extra_blocks": {"typo": 1}}).select([client(0)], {3: WORK})


def test_an_unknown_method_is_answered_with_the_known_ones():
    for name in ("cafff", "base", "__init__", "../caff"):
        with pytest.raises(ConfigError) as refused:
            load_method(name, {})
        assert name in refused.value.asked and "caff" in refused.value.found


# --- merging -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, block_1, block_2",
    [
        # Before: 2 everywhere. Client 0 (1 row) trains block 2 and comes to 4; client 1 (3 rows) trains blocks 1 and 2 and comes to 8.
        ("contributors", 8.0, 7.0),  # block 1: client 1 alone; block 2: (1*4 + 3*8) / 4
        ("participation", 5.0, 6.0),  # block 1: half of the clients, 1/2*8 + 1/2*2; block 2: all of them, (4 + 8) / 2
    ],
)
def test_two_clients_merge_as_worked_by_hand(rule, block_1, block_2):
    method = RULES[rule]
    new = merged(method, filled(2.0), list(zip(assign(method, (1, 1), (2, 3)), (filled(4.0), filled(8.0)))))
    expected = {"embedding": 2.0, "blocks.0": 2.0, "blocks.1": block_1, "blocks.2": block_2, "head": block_2}
    for name, tensor in new.items():
        value = next(value for prefix, value in expected.items() if name.startswith(prefix + "."))
        assert torch.equal(tensor, torch.full_like(tensor, value)), name


@pytest.mark.parametrize("method", RULES.values(), ids=RULES)
def test_what_nobody_trained_keeps_its_value(method):
    old = weights(SPEC, 1)
    new = merged(method, old, list(zip(assign(method, (1, 1), (1, 2)), (weights(SPEC, 2), weights(SPEC, 3)))))
    kept = {name for name in old if torch.equal(old[name], new[name])}
    assert kept == {name for name in old if name.startswith(("embedding.", "blocks.0.", "blocks.1."))}


@pytest.mark.parametrize("method", RULES.values(), ids=RULES)
def test_a_client_sends_nothing_outside_its_window(method):
    assignment = assign(method, (2, 1))[0]
    sent = {unit.name: [piece.name for piece in method.collect(weights(SPEC), assignment, unit)] for unit in TABLE}
    assert not sent["embedding"] and not sent["block.0"]
    assert all(sent[unit.name] == [tensor.name for tensor in unit.tensors] for unit in list(TABLE)[2:])


def test_a_zero_update_changes_nothing_bit_for_bit():
    old = weights(SPEC, 1)
    for method in RULES.values():
        assert same_bits(old, merged(method, old, [(a, old) for a in assign(method, (3, 1), (3, 2), (3, 7))]))
    method = RULES["contributors"]
    assert same_bits(old, merged(method, old, [(a, old) for a in assign(method, (1, 1), (2, 2), (3, 7))]))


def test_a_zero_update_changes_nothing_under_participation_with_unequal_windows():
    old, method = weights(SPEC, 1), RULES["participation"]
    assert same_bits(old, merged(method, old, [(a, old) for a in assign(method, (1, 1), (1, 2), (3, 7))]))


@pytest.mark.parametrize("method", RULES.values(), ids=RULES)
def test_equal_updates_merge_to_exactly_that_update(method):
    update = weights(SPEC, 2)
    new = merged(method, weights(SPEC, 1), [(a, update) for a in assign(method, (3, 1), (3, 3), (3, 5))])
    assert {name for name in update if torch.equal(new[name], update[name])} == {
        name for name in update if not name.startswith("embedding.")
    }


@pytest.mark.parametrize("method", RULES.values(), ids=RULES)
def test_the_order_of_clients_matters_only_to_rounding(method):
    old, updates = weights(SPEC, 1), list(zip(assign(method, (1, 1), (2, 3), (3, 7)), (weights(SPEC, seed) for seed in (2, 3, 4))))
    first = merged(method, old, updates)
    for order in permutations(updates):
        other = merged(method, old, list(order))
        for name in first:
            torch.testing.assert_close(other[name], first[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", RULES.values(), ids=RULES)
def test_a_subset_of_clients_merges_as_if_the_others_were_not_there(method):
    # Client 1 fails: the mean is that of clients 0 and 2 alone. By participation it still counts among those who took part, as in
    # CoCoFL: of three clients two trained the last block, one the others.
    old, plan = weights(SPEC, 1), assign(method, (1, 1), (2, 3), (3, 7))
    zero, two = weights(SPEC, 2), weights(SPEC, 4)
    weight = sum(order.weight for order in plan)
    new = merge(method, TABLE, old, [(plan[0], zero), (plan[2], two)], weight)
    a, b = plan[0].weight, plan[2].weight
    for name in old:
        if name.startswith("embedding."):
            mean, part = old[name].double(), 0
        elif name.startswith(("blocks.2.", "head.")):
            mean, part = (a * zero[name].double() + b * two[name].double()) / (a + b), 2 / 3
        else:
            mean, part = two[name].double(), 1 / 3
        expected = mean if method is RULES["contributors"] else torch.lerp(old[name].double(), mean, part)
        torch.testing.assert_close(new[name], expected.float(), rtol=1e-6, atol=1e-7)


def test_only_the_window_trains():
    built = model(SPEC)
    with CAFF.attached(built, assign(CAFF, (2, 1))[0]) as parameters:
        names = [name for name, parameter in built.named_parameters() if any(parameter is p for p in parameters)]
        assert names == [name for name in weights(SPEC) if name.startswith(("blocks.1.", "blocks.2.", "head."))]
        assert all(parameter.requires_grad == (name in names) for name, parameter in built.named_parameters())
