"""The one contract of all methods: every file in ``distfl/methods`` is taken up by its name."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import merge, same_bits, tokens
from live_bytes import LiveBytes

from distfl import costs as costs_module
from distfl import hosting, lora, methods, rounds
from distfl.aggregation import FixedPointMean, UnitMean
from distfl.calibration import Case, rank_of
from distfl.caps.rlimit import Report
from distfl.config import (
    FleetConfig,
    GroupConfig,
    LeversConfig,
    MemoryConfig,
    MethodConfig,
    RunConfig,
    ServerConfig,
    TrainConfig,
    TrainingConfig,
    TransportConfig,
)
from distfl.costs import Cost
from distfl.errors import ConfigError, DistflError, PlanError
from distfl.fleet import Budget, Client
from distfl.jobs import prepare
from distfl.messages import Assignment
from distfl.methods import fedhm, flexlora, hetlora
from distfl.methods.base import Workload, build_model, load_method, table_of, workload
from distfl.model import IGNORED_TARGET, ModelSpec, from_tensors, initial_tensors
from distfl.planner import fits
from distfl.recipes import Recipe
from distfl.recovery import Undo
from distfl.server_optimizer import ServerOptimizer
from distfl.shards import TOKEN, Shard, ShardIndex
from distfl.steps import add_gradients
from distfl.transport.local import group
from distfl.units import TensorSpec, Unit, Window
from distfl.updates import LEAD

NAMES = sorted(path.stem for path in Path(methods.__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))
# beyond a method's defaults, what makes it plan or train something else
VARIANTS = {
    "caff": [{"averaging": "participation"}, {"embedding": "with_all_blocks"}],
    "lora": [{"targets": ["q", "v"], "rank": 3}, {"head": False, "blocks": 2}],
    "hetlora": [{"padding": "none"}],
}
CASES = [pytest.param(name, options, id=f"{name} {options or ''}".strip()) for name in NAMES for options in ({}, *VARIANTS.get(name, ()))]
DEFAULTS = [pytest.param(name, {}, id=name) for name in NAMES]

SPEC = ModelSpec(depth=3, width=16, heads=2, context=8, vocabulary=40)
GROUPS = FleetConfig((GroupConfig("all", 10, share=1.0),))
TRAINING = TrainingConfig(batch=2, steps=2, learning_rate=1e-2, weight_decay=0.1)
PLAIN = Recipe(2)
UNLIMITED = Budget(10**12, None, None)


def config_of(name: str, options: dict, tmp_path: Path = Path("."), codec: str = "exact", **training) -> TrainConfig:
    return TrainConfig(
        GROUPS,
        replace(TRAINING, **training),
        levers=LeversConfig(prefix_features="off"),
        method=MethodConfig(name, options),
        transport=TransportConfig(codec=codec, error_feedback="off" if load_method(name, options).new_basis else "auto"),
        memory=MemoryConfig("report", margin_mb=0),
        run=RunConfig(str(tmp_path / "run")),
    )


def work_of(name: str, options: dict, depth: int = 3, **training) -> Workload:
    return workload(config_of(name, options, **training), load_method(name, options), replace(SPEC, depth=depth), 1)


def client(id: int, rows: int = 4, budget: Budget = UNLIMITED) -> Client:
    return Client(id, f"c{id}", "g", budget, rows)


def pretrained(spec: ModelSpec = SPEC, seed: int = 1) -> dict[str, torch.Tensor]:
    return initial_tensors(spec, torch.Generator().manual_seed(seed))


# --- plans -------------------------------------------------------------------------------------------------------------------------


def budgets(method, work: Workload, member: Client) -> list[Budget]:
    """Exactly what each width costs by its quickest and by its leanest steps, and a byte or an operation less."""
    found = []
    for blocks in range(1, work.costs.spec.depth + 1):
        window = method.window(work.costs.table, blocks)
        recipes, details = list(work.recipes(member, blocks)), method.details(work.costs.spec, window)
        of_recipes = [method.cost_by(member, window, recipe, work, detail) for detail in details for recipe in recipes]
        leanest = min(of_recipes, key=lambda cost: cost.peak.bytes)
        for cost in (of_recipes[0], leanest):
            for less in (0, 1):
                found.append(Budget(cost.peak.bytes - less, None, None))
                found.append(Budget(cost.peak.bytes, cost.upload_bytes - less, None))
                found.append(Budget(10**12, None, cost.flops - less))
    return found


@pytest.mark.parametrize("name, options", CASES)
def test_every_plan_obeys_its_budgets(name, options):
    method, work = load_method(name, options), work_of(name, options)
    trained = 0
    for budget in budgets(method, work, client(0)):
        member = client(0, budget=budget)
        (found,) = method.plan(1, [member], work, {})
        assert (found.client, found.memory_bytes) == (0, budget.memory_bytes)
        if found.window is None:
            continue
        trained += 1
        cost = method.cost_by(member, found.window, found.recipe, work, found.detail)
        predicted = (found.predicted_peak_bytes, found.predicted_upload_bytes, found.predicted_flops)
        assert predicted == (cost.peak.bytes, cost.upload_bytes, cost.flops) and fits(cost, budget)
    assert trained  # some of them admit something


@pytest.mark.parametrize("name, options", CASES)
def test_of_details_that_a_budget_admits_the_best_is_taken(name, options):
    method, work, blocks = load_method(name, options), work_of(name, options), options.get("blocks", SPEC.depth)
    window = method.window(work.costs.table, blocks)
    for detail in method.details(SPEC, window):
        cost = leanest(method, work, window, detail)
        (found,) = method.plan(1, [client(0, budget=Budget(cost.peak.bytes, cost.upload_bytes, None))], work, {})
        assert found.window == window and found.detail.items() >= detail.items()


def leanest(method, work: Workload, window: Window, detail: dict) -> Cost:
    """By the recipe of the lowest peak."""
    recipes = work.recipes(client(0), work.costs.table.trained_blocks(window))
    return min((method.cost_by(client(0), window, recipe, work, detail) for recipe in recipes), key=lambda cost: cost.peak.bytes)


@pytest.mark.parametrize("name", ["heterofl", "fedhm", "fedrolex"])
def test_what_nobody_holds_is_not_scored(name):
    """No fleet that can train but parts of a model takes it, but where parts roll and all are held in turn."""
    method, work = load_method(name, {}), work_of(name, {})
    window = method.window(work.costs.table, SPEC.depth)
    details = method.details(SPEC, window)
    small, large = (Budget(leanest(method, work, window, detail).peak.bytes, None, None) for detail in (details[-1], details[0]))
    weak, strong = client(0, budget=small), client(1, budget=large)
    assert method.select([weak, strong], {3: work}).depth == 3
    if name == "fedrolex":
        assert method.select([weak, weak], {3: work}).depth == 3
        return
    with pytest.raises(PlanError) as refused:
        method.select([weak, weak], {3: work})
    assert (
        "one can hold wholly" in refused.value.asked and "all can hold parts" in refused.value.found and "memory_mb" in refused.value.found
    )


def test_depthfl_takes_no_depth_whose_last_stage_nobody_trains():
    method, works = load_method("depthfl", {}), {depth: work_of("depthfl", {}, depth) for depth in (2, 4)}
    two = Budget(method.cost(client(0), method.window(works[4].costs.table, 2), works[4]).peak.bytes, None, None)
    whole = Budget(method.cost(client(0), method.window(works[2].costs.table, 2), works[2]).peak.bytes, None, None)
    weak = client(0, budget=max(two, whole, key=lambda budget: budget.memory_bytes))
    assert method.select([weak], works).depth == 2 and method.select([weak, client(1)], works).depth == 4
    with pytest.raises(PlanError, match="every block"):
        method.select([weak], {4: works[4]})


def test_heterofl_has_a_whole_width_and_fedrolex_may_do_without():
    with pytest.raises(ConfigError, match="widths"):
        load_method("heterofl", {"widths": [0.5, 0.25]})
    assert load_method("fedrolex", {"widths": [0.5, 0.25]}) and load_method("heterofl", {"widths": [1.0, 0.3]})


def test_rounds_of_the_strong_are_filled_with_the_strong():
    method, work = load_method("fedavg_exclusive", {}), work_of("fedavg_exclusive", {})
    fleet = [client(i, budget=UNLIMITED if i % 3 == 0 else Budget(1000, None, None)) for i in range(12)]
    assert [c.id for c in method.candidates(fleet, work)] == [0, 3, 6, 9]
    assert method.candidates(fleet, work) != load_method("caff", {}).candidates(fleet, work_of("caff", {})) == fleet


@pytest.mark.parametrize("name, refused", [("flexlora", True), ("fedhm", True), ("flora", False), ("lora", False)])
def test_a_server_optimizer_is_refused_where_shared_tensors_are_made_of_others(name, refused):
    assert load_method(name, {}).derives == refused
    if refused:
        config = replace(config_of(name, {}), server=ServerConfig("momentum"))
        with pytest.raises(ConfigError, match="server.optimizer"):
            prepare(config)


@pytest.mark.parametrize("name, options", [("lora", {"rank": 17}), ("flexlora", {"ranks": [2, 17]}), ("flora", {"ranks": [32]})])
def test_a_rank_above_the_width_is_refused(name, options):
    with pytest.raises(ConfigError, match="width, 16"):
        work_of(name, options)


@pytest.mark.parametrize("name, options", CASES)
def test_a_chosen_depth_can_be_planned_and_what_nobody_can_train_is_refused(name, options):
    method = load_method(name, options)
    works = {depth: work_of(name, options, depth) for depth in (1, 2, 3)}
    window = method.window(works[3].costs.table, 2)
    strong, middle = client(0), client(1, budget=Budget(method.cost(client(1), window, works[3]).peak.bytes, None, None))
    chosen = method.select([strong, middle], works)
    plan = method.plan(1, [strong, middle], works[chosen.depth], {})
    table = works[chosen.depth].costs.table
    assert chosen.blocks == {a.client: table.trained_blocks(a.window) if a.window else 0 for a in plan}
    assert chosen.averages.keys() == chosen.excluded.keys() == works.keys() and chosen.reason
    with pytest.raises(PlanError) as refused:
        method.select([client(0, budget=Budget(10, None, None))], works)
    assert "memory_mb" in refused.value.found


@pytest.mark.parametrize("name, options", CASES)
def test_a_client_that_ran_into_its_cap_trains_less_or_sits_out(name, options):
    method, work = load_method(name, options), work_of(name, options)
    (before,) = method.plan(1, [client(0)], work, {})
    trained = work.costs.table.trained_blocks(before.window)
    (after,) = method.plan(2, [client(0)], work, {0: trained - 1})
    details = method.details(work.costs.spec, before.window)
    if after.window and work.costs.table.trained_blocks(after.window) == trained:  # the whole model, by the next detail
        assert after.detail.items() >= details[1].items() and before.detail.items() >= details[0].items()
        second = client(0, budget=Budget(leanest(method, work, before.window, details[1]).peak.bytes, None, None))
        for limit, detail in ((trained, details[1]), (trained - 1, details[2])):
            (found,) = method.plan(2, [second], work, {0: limit})
            assert found.window and found.detail.items() >= detail.items()
        (last,) = method.plan(2, [client(0)], work, {0: trained - len(details)})
        assert last.window is None
    else:
        assert len(details) == 1 or name in ("hetlora", "flexlora", "flora")
        assert after.window is None or work.costs.table.trained_blocks(after.window) == trained - 1


@pytest.mark.parametrize("name, options", CASES)
def test_units_called_stable_are_below_every_window(name, options):
    method, work = load_method(name, options), work_of(name, options)
    clients = [client(i, budget=budget) for i, budget in enumerate(budgets(method, work, client(0)))]
    windows = [a.window for a in method.plan(1, clients, work, {}) if a.window]
    assert method.stable_units(clients, work) <= min(window.first for window in windows)


# --- what trains and what is sent --------------------------------------------------------------------------------------------------


@pytest.fixture
def rank(tmp_path):
    """A rank that can host client 0 and 1, of 19 rows each, and its plan for them, by the smallest detail if told."""

    def make(name: str, options: dict, smallest: bool = True, **config):
        np.random.default_rng(0).integers(0, 40, 400).astype(TOKEN).tofile(tmp_path / "tokens.bin")
        shards = ShardIndex(str(tmp_path), "", (Shard("a", 0, 150, 50), Shard("b", 200, 150, 50)))
        config = config_of(name, options, tmp_path, **config)
        state = hosting.rank_state(group(1)[0], config, SPEC, shards)
        state.replica.fill(state.method.initial(pretrained(), 1))
        clients, work = [client(0, 19), client(1, 19)], workload(config, state.method, SPEC, 1)
        plan = state.method.plan(1, clients, work, {})
        if smallest:
            detail = state.method.details(SPEC, plan[0].window)[-1]
            planned = [(member, order.window, order.recipe, order.weight) for member, order in zip(clients, plan)]
            plan = [state.method.assignment(1, *of_client, work, detail) for of_client in planned]
        return state, plan

    return make


def decoded(state, blocks, assignment: Assignment) -> dict[str, torch.Tensor]:
    """What was sent, by name, as it is merged."""
    assert len(blocks) == len(state.table.trainable)
    return {
        piece.name: torch.as_tensor(piece.values).clone()
        for unit, block in zip(state.table.trainable, blocks)
        if len(block)
        for piece in hosting.decode_update(state, block, assignment, unit)
    }


def kind(name: str) -> str:
    """First factor, second factor, or neither."""
    return name[-2:] if name[-2:] in ("_A", "_B") else ""


@pytest.mark.parametrize("name, options", CASES)
def test_only_what_is_sent_was_trained_and_the_optimiser_sees_nothing_else(name, options, rank):
    state, (order, _) = rank(name, options)
    before = state.replica.copy()
    model = build_model(state.method, SPEC, state.replica.tensors)
    state.method.hold(model, order, 1)
    with state.method.attached(model, order) as parameters:
        names = {n for n, parameter in model.named_parameters() if any(parameter is p for p in parameters)}
        assert all(parameter.requires_grad == (n in names) for n, parameter in model.named_parameters())
    blocks, report = hosting.host(state, Report(), order)
    assert report.ok and report.samples == 4
    sent = decoded(state, blocks, order)
    assert sent.keys() == names
    assert sum(tensor.nbytes for tensor in sent.values()) == state.method.held(state.costs, order.detail).table.window_bytes(order.window)
    start = held(state.method, before, order)
    assert {kind(n) for n in sent} == {kind(n) for n, tensor in sent.items() if not torch.equal(tensor, start[n])}
    assert same_bits(state.replica.tensors, before)  # the node's copy is nobody's to train


@pytest.mark.parametrize("codec", ["exact", "int8", "top_k"])
@pytest.mark.parametrize("name, options", CASES)
def test_upload_and_flops_are_those_that_were_predicted(name, options, codec, rank):
    state, (order, _) = rank(name, options, codec=codec)
    blocks, report = hosting.host(state, Report(), order)
    headers = sum(4 * (LEAD + int(block[2])) for block in blocks if len(block))
    assert report.ok and report.upload_bytes - headers == order.predicted_upload_bytes
    assert report.flops == order.predicted_flops


@pytest.mark.parametrize("name, options", CASES)
def test_levers_change_a_trained_model_only_by_rounding(name, options, rank):
    state, (order, _) = rank(name, options, steps=4, optimizer="sgd", clip_norm=None, learning_rate=0.1)
    blocks = state.table.trained_blocks(order.window)
    plain = decoded(state, hosting.host(state, Report(), replace(order, recipe=PLAIN))[0], order)
    for recipe in (Recipe(1), Recipe(2, 5), Recipe(2, None, blocks), Recipe(1, 3, 1), Recipe(2, 5, blocks, True)):
        found = decoded(state, hosting.host(state, Report(), replace(order, recipe=recipe))[0], order)
        for tensor, wanted in zip(found.values(), plain.values()):
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=2e-5)


# --- models ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", CASES)
def test_before_any_training_the_model_is_the_pretrained_one(name, options):
    method, x = load_method(name, options), tokens(2, 8, 40)
    shared = method.initial(pretrained(), 1)
    assert {n: tuple(t.shape) for n, t in shared.items()} == {t.name: t.shape for unit in table_of(method, SPEC) for t in unit.tensors}
    if method.ensemble:
        exits = [n for n in shared if ".exit." in n]
        assert exits and all(torch.equal(shared[n], shared["head." + n.partition(".exit.")[2]]) for n in exits)
    else:
        assert torch.allclose(outputs(method, shared, x), from_tensors(SPEC, pretrained())(x), atol=1e-5)
    deployed = method.deployed(shared)
    assert deployed.keys() == pretrained().keys() and all(torch.equal(deployed[n], t) for n, t in pretrained().items())
    assert same_bits(method.initial(pretrained(), 1), shared)


@pytest.mark.parametrize("name, options", CASES)
def test_a_deployed_model_is_a_plain_one_that_computes_the_same(name, options):
    method, table, plan = plan_of(name, options, 1, 3)
    shared, x = moved(method, table, plan), tokens(2, 8, 40)
    assert not torch.allclose(outputs(method, shared, x), outputs(method, method.initial(pretrained(), 1), x), atol=1e-2)
    if not method.ensemble:
        torch.testing.assert_close(outputs(method, shared, x), from_tensors(SPEC, method.deployed(shared))(x), rtol=1e-4, atol=1e-5)


# --- merging -----------------------------------------------------------------------------------------------------------------------


def plan_of(name: str, options: dict, *rows: int):
    """Method, table and a plan of unlimited clients with so many rows."""
    method, work = load_method(name, options), work_of(name, options)
    return method, work.costs.table, method.plan(1, [client(i, count) for i, count in enumerate(rows)], work, {})


@torch.no_grad()
def outputs(method, shared: dict, x: torch.Tensor, assignment: Assignment | None = None) -> torch.Tensor:
    """Of the shared model, or of what a client with this assignment would hold of it."""
    model = build_model(method, SPEC, shared)
    if assignment is not None:
        method.hold(model, assignment, 1)
    return model(x)


def held(method, shared: dict, assignment: Assignment) -> dict[str, torch.Tensor]:
    """Copies of what a client holds of the shared model."""
    model = build_model(method, SPEC, shared)
    method.hold(model, assignment, 1)
    return {n: tensor.clone() for n, tensor in model.named_tensors().items()}


def trained(method, shared: dict, assignment: Assignment, seed: int) -> dict[str, torch.Tensor]:
    """A client's model after local steps that moved all that it trains at random."""
    tensors, generator = held(method, shared, assignment), torch.Generator().manual_seed(seed)
    for n in sorted(trained_names(method, tensors, assignment)):
        tensors[n] += 0.1 * torch.randn(tensors[n].shape, generator=generator)
    return tensors


def trained_names(method, tensors: dict, assignment: Assignment) -> set[str]:
    units = table_of(method, SPEC)
    return {n for n in tensors if units.place[n] in assignment.window}


def moved(method, table, plan: list[Assignment]) -> dict[str, torch.Tensor]:
    """Shared tensors after a round of such steps."""
    old = method.initial(pretrained(), 1)
    return merged(method, table, old, [(assignment, trained(method, old, assignment, 7 + assignment.client)) for assignment in plan], plan)


def merged(method, table, old: dict, updates: list[tuple[Assignment, dict]], of: list[Assignment]) -> dict:
    """A round's server half, without the wire; ``of``: all that took part."""
    return merge(method, table, old, updates, sum(assignment.weight for assignment in of))


def close(method, left: dict, right: dict) -> bool:
    """The same plain model: bit for bit, or to rounding where another basis says the same."""
    left, right = method.deployed(left), method.deployed(right)
    same = (lambda a, b: torch.allclose(a, b, atol=1e-5)) if method.new_basis else torch.equal
    return left.keys() == right.keys() and all(same(left[n], right[n]) for n in left)


@pytest.mark.parametrize("name, options", CASES)
def test_no_local_step_changes_nothing(name, options, rank):
    state, plan = rank(name, options, smallest=False, steps=0)
    old = moved(state.method, state.table, plan)
    state.replica.fill(old)
    updates = [(order, decoded(state, hosting.host(state, Report(), order)[0], order)) for order in plan]
    new = merged(state.method, state.table, old, updates, plan)
    assert close(state.method, new, old) and close(state.method, merged(state.method, state.table, old, [], plan), old)


# changed by a round without training where details differ, as parts of the changed tensors' norms: what clients of lower rank do not say
# of the others counts as zero (the files say so)
LOST_BETWEEN_RANKS = {"hetlora": 0.8, "flexlora": 0.8, "fedhm": 0.8}


@pytest.mark.parametrize("name, options", CASES)
def test_no_local_step_of_clients_that_hold_unlike_parts_changes_nothing(name, options):
    method, table, plan = plan_of(name, options, 1, 3, 7)
    old, details = moved(method, table, plan), method.details(SPEC, plan[0].window)
    orders = [replace(assignment, detail=details[number % len(details)]) for number, assignment in enumerate(plan)]
    new = merged(method, table, old, [(order, held(method, old, order)) for order in orders], orders)
    before, after = method.deployed(old), method.deployed(new)
    apart = max(float((after[n] - before[n]).norm() / before[n].norm()) for n in before if before[n].norm() > 0)
    if name in LOST_BETWEEN_RANKS and options.get("padding") != "none":
        assert 0.01 < apart < LOST_BETWEEN_RANKS[name]
    else:
        assert apart < 1e-6


def test_flora_draws_anew_for_every_client_and_round():
    method, table, (order,) = plan_of("flora", {}, 1)
    shared = method.initial(pretrained(), 1)

    def drawn(**changes) -> dict[str, torch.Tensor]:
        return {n: tensor for n, tensor in held(method, shared, replace(order, **changes)).items() if kind(n) == "_A"}

    first, other = drawn(), [drawn(client=1), drawn(round=2)]
    assert first and same_bits(first, drawn()) and all(tensor.std() > 0 for tensor in first.values())
    assert len({tensor.sum().item() for tensors in (first, *other) for tensor in tensors.values()}) == 3 * len(first)


@pytest.mark.parametrize("name, options", CASES)
def test_equal_updates_merge_to_that_update(name, options):
    """What clients of the same detail would be sent next computes what their models computed."""
    method, table, plan = plan_of(name, options, 1, 3, 5)
    old, x = moved(method, table, plan), tokens(2, 8, 40)
    for number, detail in enumerate(method.details(SPEC, plan[0].window)):
        alike = [replace(assignment, detail=detail) for assignment in plan]
        update = trained(method, old, alike[0], seed=number)
        for part in (alike, alike[1:2]):  # all of a round, and one alone
            new = merged(method, table, old, [(assignment, update) for assignment in part], part)
            found, wanted = held(method, new, alike[0]), update
            if method.new_basis:  # the same by other numbers
                model = build_model(method, SPEC, old)
                method.hold(model, alike[0], 1)
                model.load_state_dict(update, assign=True)
                with torch.no_grad():
                    torch.testing.assert_close(outputs(method, new, x, alike[0]), model(x), rtol=1e-3, atol=1e-4)
            else:
                assert same_bits(found, wanted)


@pytest.mark.parametrize("name, options", CASES)
def test_what_nobody_held_or_trained_keeps_its_value(name, options):
    method, table, plan = plan_of(name, options, 1, 3)
    old, window = moved(method, table, plan), method.window(table, 1)
    smallest = method.details(SPEC, window)[-1]
    orders = [replace(assignment, window=window, detail=smallest) for assignment in plan]
    new = merged(method, table, old, [(order, trained(method, old, order, order.client)) for order in orders], orders)
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    assert changed and {table.place[n] % (SPEC.depth + 2) for n in changed} <= set(window.units)
    for unit in table.trainable if not method.new_basis else ():
        for tensor in unit.tensors:
            region = method.part(tensor, smallest)
            if region is not None and tensor.name in changed:
                untouched = torch.ones(tensor.shape, dtype=bool)
                untouched[np.ix_(*region) if isinstance(region, tuple) else region] = False
                assert torch.equal(old[tensor.name][untouched], new[tensor.name][untouched])


@pytest.mark.parametrize("name, options", CASES)
def test_the_order_of_clients_matters_only_to_rounding_and_who_is_absent_does_not_count(name, options):
    method, table, plan = plan_of(name, options, 1, 3, 7)
    old, details = moved(method, table, plan), method.details(SPEC, plan[0].window)
    orders = [replace(assignment, detail=details[number % len(details)]) for number, assignment in enumerate(plan)]
    updates = [(order, trained(method, old, order, order.client)) for order in orders]
    first = method.deployed(merged(method, table, old, updates, orders))
    for shuffled in permutations(updates):
        for n, tensor in method.deployed(merged(method, table, old, list(shuffled), orders)).items():
            torch.testing.assert_close(tensor, first[n], rtol=1e-4, atol=1e-5)
    two = merged(method, table, old, updates[:2], orders[:2])
    if options.get("averaging") != "participation":  # there the share of those present counts
        among_three = method.deployed(merged(method, table, old, updates[:2], orders))
        for n, tensor in method.deployed(two).items():
            torch.testing.assert_close(tensor, among_three[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, options", [("caff", {}), ("hetlora", {}), ("flexlora", {}), ("flora", {}), ("heterofl", {}), ("fedhm", {})])
def test_partial_sums_of_ranks_say_the_same(name, options):
    """Means in fixed point, of parts and in spaces of their own, as ``transport.collective=reduce`` takes them."""
    method, table, plan = plan_of(name, options, 1, 3, 7)
    old, details, total = moved(method, table, plan), method.details(SPEC, plan[0].window), sum(assignment.weight for assignment in plan)
    orders = [replace(assignment, detail=details[number % len(details)]) for number, assignment in enumerate(plan)]
    updates = [(order, trained(method, old, order, order.client)) for order in orders]
    exact, new = merged(method, table, old, updates, orders), dict(old)
    for unit in filter(lambda unit: unit.tensors, table.trainable):
        lifted, sums = method.lifted(unit, old), [FixedPointMean(method.mean_unit(unit), total) for _ in range(2)]
        for place, (order, tensors) in enumerate(updates):
            sums[place % 2].add(method.restore(method.collect(tensors, order, unit), order))
        by_element = any(mean.by_element for mean in sums)
        both = sums[0].partial(by_element, lifted, total) + sums[1].partial(by_element, lifted, total)
        sums[0].take(both, by_element, lifted, total)
        mean_of = partial(lambda mean, lifted, n: mean.mean(n, lifted[n], total), sums[0], lifted)
        new |= dict(method.finish(unit, old, mean_of))
    for n, tensor in method.deployed(new).items():
        torch.testing.assert_close(tensor, method.deployed(exact)[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, options", CASES)
def test_a_merged_round_can_be_taken_back(name, options, rank):
    """Also what a method changes in units that nobody sends."""
    state, plan = rank(name, options, smallest=False)
    old, total = state.replica.copy(), sum(assignment.weight for assignment in plan)
    optimizer = ServerOptimizer(ServerConfig(optimizer="adam"))
    undo, changed = Undo(state, optimizer), set()
    updates = [(order, trained(state.method, old, order, order.client)) for order in plan]
    for unit in state.table.trainable:
        if unit.tensors and unit.index in plan[0].window:
            mean = UnitMean(state.method.mean_unit(unit))
            for order, tensors in updates:
                mean.add(state.method.restore(state.method.collect(tensors, order, unit), order))
            changed |= rounds._finish(state, optimizer, unit, partial(mean.mean, round_weight=total), undo.keep)
    new = state.replica.copy()
    assert changed == {state.table.place[n] for n in old if not torch.equal(old[n], new[n])}
    assert bool(changed - {unit.index for unit in state.table.trainable}) == (name == "flora")
    undo.back()
    assert same_bits(state.replica.tensors, old) and not optimizer.state


# --- memory ------------------------------------------------------------------------------------------------------------------------

WIDE = ModelSpec(depth=2, width=96, heads=3, context=64, vocabulary=512)
STEPS = [(2, Recipe(8)), (2, Recipe(2, 64)), (1, Recipe(8, 128, 1)), (2, Recipe(2, 64, 2)), (2, Recipe(8, 128, 2, True))]


@pytest.mark.parametrize("name, options", CASES)
def test_tensors_alive_at_the_peak_are_as_many_bytes_as_predicted(name, options, tmp_path, monkeypatch):
    monkeypatch.setattr(costs_module, "PAGE_BYTES", 0)  # what is no tensor
    monkeypatch.setattr(costs_module, "_holes", lambda *sizes: (0, 0))
    costs_module._peak.cache_clear()
    for number, (blocks, recipe) in enumerate(STEPS):
        case = Case(WIDE, 8, "adamw", not recipe.fused_update, blocks, recipe, False, "exact", name, tuple(options.items()))
        state = rank_of(case, tmp_path, steps=2)
        window = state.method.window(state.table, blocks)
        details = state.method.details(WIDE, window)
        detail = details[number % len(details)]
        planned = replace(recipe, recomputed=min(recipe.recomputed, state.table.trained_blocks(window)))
        peak = state.method.held(state.costs, detail).peak(window, planned)
        with LiveBytes() as live:
            hosting._work(state, Assignment(1, 0, window, 1.0, 10**12, 0, 0, 0, planned, 1e-3, detail=detail), {}, None)
        assert 0.98 <= live.peak / peak.bytes <= 1.02, (blocks, detail, recipe.describe(8), peak.moments)
    costs_module._peak.cache_clear()


ENFORCED = """
import json, sys
from dataclasses import replace
from pathlib import Path
from distfl.allocator import exact_allocator, restart_prepared
restart_prepared()
import torch
from distfl.calibration import Case, hosted, rank_of
from distfl.caps.rlimit import Rlimit
from distfl.hosting import rehearse
from distfl.model import ModelSpec
from distfl.recipes import Recipe
torch.set_num_threads(1)
exact_allocator()
cap = Rlimit()
spec = ModelSpec(4, 192, 6, 128, 1024)
for name in sys.argv[2:]:
    for blocks, recipe in ((4, Recipe(8, 128)), (2, Recipe(4, 128, 2))):
        case = Case(spec, 8, "adamw", True, blocks, recipe, True, "exact", name)
        state = rank_of(case, Path(sys.argv[1]), steps=2)
        window = state.method.window(state.table, blocks)
        details = state.method.details(spec, window)
        rehearse(state)
        for number in sorted({0, len(details) - 1}):
            predicted = state.method.held(state.costs, details[number]).peak(window, recipe).bytes
            cap.prove(predicted + 1_000_000)
            report = hosted(state, replace(case, detail=number), cap, predicted + 1_000_000)
            found = [report.ok, report.reason, predicted, report.measured_peak_bytes]
            print(json.dumps([name, details[number], recipe.describe(8), *found]), flush=True)
"""


def test_under_an_enforced_cap_the_measured_peak_is_the_predicted_one(tmp_path):
    """The cap is the prediction and the margin that a config adds by default, 1 MB."""
    script = tmp_path / "enforced.py"
    script.write_text(ENFORCED)
    done = subprocess.run([sys.executable, str(script), str(tmp_path), *NAMES], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = [json.loads(text) for text in done.stdout.splitlines()]
    assert {name for name, *_ in found} == set(NAMES)
    for name, detail, recipe, ok, reason, predicted, measured in found:
        assert ok, (name, detail, recipe, reason)
        assert -0.02 < predicted / measured - 1 < 0.05, (name, detail, recipe, predicted, measured)


# --- pitfalls of single methods ----------------------------------------------------------------------------------------------------


def bias_of_the_mean(name: str) -> float:
    """||mean(B) mean(A) - mean(B A)|| / ||mean(B A)|| over three clients' random updates of one adapter."""
    method, table, plan = plan_of(name, {}, 1, 3, 7)
    old = method.initial(pretrained(), 1)
    updates = [(order, trained(method, old, order, order.client)) for order in plan]
    weight = "blocks.1.proj.weight"

    def change(shared: dict) -> torch.Tensor:
        return (method.deployed(shared)[weight] - old[weight]).double()

    found = change(merged(method, table, old, updates, plan))
    alone = [(order.weight, lora.merged({n: t for n, t in tensors.items()}, method.options.scale)[weight]) for order, tensors in updates]
    mean = sum(share * (product - old[weight]).double() for share, product in alone) / sum(share for share, _ in alone)
    return ((found - mean).norm() / mean.norm()).item()


def test_the_mean_of_factors_is_not_the_mean_of_updates_unless_one_factor_is_frozen():
    assert bias_of_the_mean("lora") > 0.2
    assert max(bias_of_the_mean("ffa_lora"), bias_of_the_mean("flora")) < 1e-5
    assert bias_of_the_mean("flexlora") < 1e-5  # products of rank 16 at most: these are as wide


def test_fedavg_beyond_budgets_measures_the_upper_bound_and_only_where_nothing_is_enforced(rank):
    weak = client(0, budget=Budget(1000, 10, 10))
    works = {depth: work_of("fedavg", {}, depth) for depth in (2, 3)}
    with pytest.raises(PlanError, match="ignore_budgets"):
        load_method("fedavg", {}).select([weak, client(1)], works)
    beyond = load_method("fedavg", {"ignore_budgets": True})
    assert beyond.select([weak, client(1)], works).depth == 3
    (order,) = beyond.plan(1, [weak], works[3], {})
    assert order.memory_bytes == 1000 < order.predicted_peak_bytes and order.recipe == next(works[3].recipes(weak, 3))
    state, _ = rank("fedavg", {"ignore_budgets": True})
    assert hosting.host(state, Report(), order)[1].ok  # far beyond its budget, and reported so
    state, _ = rank("fedavg", {})
    assert hosting.host(state, Report(), order)[1].cause == "over_cap"


def test_budgets_are_ignored_only_where_nothing_is_enforced():
    from distfl.jobs import prepare

    config = config_of("fedavg", {"ignore_budgets": True})
    with pytest.raises(DistflError, match="memory.enforce=report"):
        prepare(replace(config, memory=MemoryConfig("auto")))


def test_whole_model_methods_leave_out_or_size_down_as_they_say():
    works = {depth: work_of("allsmall", {}, depth) for depth in (1, 2, 3)}
    small = load_method("allsmall", {})
    two = small.cost(client(0), small.window(works[2].costs.table, 2), works[2])
    weak = client(0, budget=Budget(10**12, two.upload_bytes, None))
    assert small.select([weak, client(1)], works).depth == 2
    exclusive = load_method("fedavg_exclusive", {})
    chosen = exclusive.select([weak, client(1)], works)
    assert (chosen.depth, chosen.blocks) == (3, {0: 0, 1: 3})
    assert [a.window is None for a in exclusive.plan(1, [weak, client(1)], works[3], {})] == [True, False]


def test_classifiers_learn_from_targets_and_from_each_other():
    """The gradients of one backward of sum CE_i + mutual mean_j KL(p_j, p_i), the others' answers taken as given, chunk by chunk."""
    method, x = load_method("depthfl", {"distillation": 0.7}), tokens(2, 8, 40)
    shared = moved(*plan_of("depthfl", {"distillation": 0.7}, 1))
    model = build_model(method, SPEC, shared)
    targets = x.clone()
    targets[0, :3] = IGNORED_TARGET
    seen, features = [], x
    for unit, layer in enumerate(model.trunk()):
        features = layer(features)
        seen += [model.classifiers()[unit](features).flatten(0, 1).log_softmax(-1)] if unit else []
    assert len(seen) == 3
    wanted, counted = 0.0, (targets.flatten() != IGNORED_TARGET)
    for own in seen:
        wanted += torch.nn.functional.nll_loss(own, targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum") / 13
        for other in seen:
            answers = other.detach().exp()
            wanted += 0.7 / 2 * (answers * (other.detach() - own)).sum(1)[counted].sum() / 13
    wanted.backward()
    gradients = {n: parameter.grad.clone() for n, parameter in model.named_parameters()}
    for recipe in (Recipe(2), Recipe(2, 5), Recipe(2, 5, 2)):
        model.zero_grad()
        loss = add_gradients(model, 0, x, targets, 1 / 13, recipe, lambda unit: None)
        last = -seen[-1][torch.arange(16), targets.flatten().clamp_min(0)][counted].sum() / 13
        assert loss == pytest.approx(last.item(), rel=1e-5)
        for n, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[n], rtol=1e-4, atol=1e-6)


def test_an_ensemble_answers_by_the_mean_of_its_classifiers_and_its_deepest_is_deployed():
    method, table, plan = plan_of("depthfl", {"stages": 2}, 1)
    shared, x = moved(method, table, plan), tokens(2, 8, 40)
    assert method.ends(SPEC.depth) == [2, 3] and {n.split(".")[1] for n in shared if ".exit." in n} == {"1"}
    deepest = from_tensors(SPEC, method.deployed(shared))
    with torch.no_grad():
        early = deepest.blocks[1](deepest.blocks[0](deepest.embedding(x)))
        norm, matrix = [shared[f"blocks.1.exit.norm.{kind}"] for kind in ("weight", "bias")], shared["blocks.1.exit.output.weight"]
        first = torch.nn.functional.layer_norm(early, (16,), *norm) @ matrix.T
        torch.testing.assert_close(outputs(method, shared, x), (first + deepest(x)) / 2, rtol=1e-4, atol=1e-5)


def test_stages_are_held_from_the_input_on_and_a_client_over_its_cap_holds_one_less():
    method, work = load_method("depthfl", {"stages": 2}), work_of("depthfl", {"stages": 2}, depth=4)
    table = work.costs.table
    assert [method.window(table, blocks).last for blocks in (1, 2, 3, 4)] == [3, 3, 6, 6]
    for limit, last in ((4, 6), (3, 3), (2, 3), (1, None), (0, None)):
        (order,) = method.plan(1, [client(0)], work, {0: limit})
        assert (order.window and order.window.last) == last
    short, whole = (method.cost(client(0), method.window(table, blocks), work) for blocks in (2, 4))
    assert short.peak.weights < 0.6 * whole.peak.weights and short.flops < 0.6 * whole.flops and short.upload_bytes < whole.upload_bytes


def test_a_narrow_model_sees_sums_of_the_usual_size():
    """With hidden channels that are all alike, some of them divided by their share say what all say."""
    method, table, plan = plan_of("heterofl", {"widths": [1.0, 0.5]}, 1)
    narrow, shared = replace(plan[0], detail=method.details(SPEC, plan[0].window)[1]), pretrained()
    for n, tensor in shared.items():
        if ".fc1." in n or ".fc2.weight" in n:
            tensor.copy_(tensor[:1].expand_as(tensor) if ".fc1." in n else tensor[:, :1].expand_as(tensor))
        elif ".qkv." in n:
            heads = tensor.view(3, 2, 8, *tensor.shape[1:])
            heads[:, 1] = heads[:, 0]
        elif ".proj.weight" in n:
            tensor[:, 8:] = tensor[:, :8]
    x = tokens(2, 8, 40)
    assert held(method, shared, narrow)["blocks.0.qkv.weight"].shape == (24, 16)
    torch.testing.assert_close(outputs(method, shared, x, narrow), outputs(method, shared, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("round", [1, 2, 3, 50, 65])
def test_a_rolling_model_is_the_leading_one_of_channels_that_were_rolled(round):
    still, rolling = load_method("heterofl", {"widths": [1.0, 0.25]}), load_method("fedrolex", {"widths": [0.25]})
    work, shared = work_of("fedrolex", {"widths": [0.25]}), pretrained()
    (order,) = rolling.plan(round, [client(0)], work, {})
    heads, hidden = -8 * ((round - 1) % 2), -((round - 1) % 64)  # 2 heads of 8, 64 hidden channels, of which 16 are held
    rolled = {}
    for n, tensor in shared.items():
        if ".qkv." in n:
            rolled[n] = tensor.view(3, 16, *tensor.shape[1:]).roll(heads, 1).reshape(tensor.shape)
        elif ".fc1." in n:
            rolled[n] = tensor.roll(hidden, 0)
        else:
            rolled[n] = tensor.roll({"proj.weight": heads, "fc2.weight": hidden}.get(n.partition(".")[2].partition(".")[2], 0), -1)
    leading = replace(order, detail=still.details(SPEC, order.window)[1])
    assert held(rolling, shared, order).keys() == held(still, rolled, leading).keys()
    assert all(torch.equal(tensor, held(still, rolled, leading)[n]) for n, tensor in held(rolling, shared, order).items())
    x = tokens(2, 8, 40)
    assert torch.equal(outputs(rolling, shared, x, order), outputs(still, rolled, x, leading))
    # what it sends lands where it came from
    new = merge(rolling, work.costs.table, shared, [(order, trained(rolling, shared, order, 1))], order.weight)
    again = merge(still, work.costs.table, rolled, [(leading, trained(still, rolled, leading, 1))], leading.weight)
    assert all(torch.equal(tensor, held(rolling, new, order)[n]) for n, tensor in held(still, again, leading).items())
    assert sum((new[n] != shared[n]).sum() for n in shared) == sum((again[n] != rolled[n]).sum() for n in shared) > 0


def test_hetlora_weighs_by_the_norm_of_updates_and_pads_with_zeros():
    # one adapter beside a 2 x 2 matrix; client 0 of rank 2, client 1 of rank 1, norms of B A 3 and 1
    method = load_method("hetlora", {"ranks": [1, 2]})
    unit = Unit(1, "block.0", (TensorSpec("blocks.0.proj.proj_A", (2, 2), 0), TensorSpec("blocks.0.proj.proj_B", (2, 2), 4)))
    table = SimpleNamespace(trainable=(unit,))
    orders = [Assignment(1, i, Window(1, 3), 1024.0, 1, 0, 0, 0, PLAIN, 0.1, detail={"rank": 2 - i}) for i in range(2)]
    tensors = [
        {"blocks.0.proj.proj_A": torch.eye(2), "blocks.0.proj.proj_B": torch.tensor([[3.0, 0.0], [0.0, 0.0]])},
        {"blocks.0.proj.proj_A": torch.tensor([[0.0, 1.0]]), "blocks.0.proj.proj_B": torch.tensor([[1.0], [0.0]])},
    ]
    assert [hetlora.update_norm(of, order) for of, order in zip(tensors, orders)] == [3.0, 1.0]
    old = {tensor.name: torch.full((2, 2), 9.0) for tensor in unit.tensors}
    new = merge(method, table, old, list(zip(orders, tensors)), 2048.0)
    # row 0: (3 [1 0] + 1 [0 1]) / 4; row 1: (3 [0 1] + 1 [0 0]) / 4
    assert torch.allclose(new["blocks.0.proj.proj_A"], torch.tensor([[0.75, 0.25], [0.0, 0.75]]))
    assert torch.allclose(new["blocks.0.proj.proj_B"], torch.tensor([[2.5, 0.0], [0.0, 0.0]]))
    rows = merge(load_method("hetlora", {"ranks": [1, 2], "padding": "none"}), table, old, list(zip(orders, tensors)), 2048.0)
    assert torch.allclose(rows["blocks.0.proj.proj_A"], torch.tensor([[0.75, 0.25], [0.0, 1.0]]))
    alone = merge(method, table, old, [(orders[1], tensors[1])], 2048.0)  # nobody held the second row
    assert torch.equal(alone["blocks.0.proj.proj_A"], torch.tensor([[0.0, 1.0], [9.0, 9.0]]))


def test_splits_are_the_best_of_their_rank_and_never_dead():
    for shape in ((7, 5), (5, 7)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3]
        up, down = flexlora.split(matrix, 3)
        left, right = fedhm.factored(matrix, 3)
        torch.testing.assert_close(up @ down, best, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left @ right, best, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(up[:, :2] @ down[:2], (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)  # ranks are nested
        for low in (best[:, :1] @ best[:1], torch.zeros(shape)):  # fewer singular values than the rank
            up, down = flexlora.split(low, 3)
            torch.testing.assert_close(up @ down, low, rtol=1e-4, atol=1e-5)
            left, right = fedhm.factored(low, 3)
            torch.testing.assert_close(left @ right, low, rtol=1e-4, atol=1e-4)
            assert all(torch.isfinite(tensor).all() for tensor in (up, down, left, right))
            torch.testing.assert_close(down @ down.T, torch.eye(3), rtol=0, atol=1e-5)  # rows that can still learn
            assert left.norm() > 0 and right.norm() > 0
            assert up.shape == (shape[0], 3) and down.shape == (3, shape[1])


def test_error_feedback_is_refused_where_nothing_can_be_carried_on():
    from distfl.jobs import prepare

    for name in NAMES:
        if load_method(name, {}).new_basis:
            with pytest.raises(DistflError, match="error feedback"):
                prepare(replace(config_of(name, {}), transport=TransportConfig(codec="top_k")))


def test_lora_takes_more_blocks_the_larger_the_budget_and_never_more_than_its_option():
    for options, most in (({}, 3), ({"blocks": 2}, 2)):
        method, work = load_method("lora", options), work_of("lora", options)
        peaks = [method.cost(client(0), method.window(work.costs.table, blocks), work).peak.bytes for blocks in (1, 2, 3)]
        plan = method.plan(1, [client(i, budget=Budget(peak, None, None)) for i, peak in enumerate(peaks)], work, {})
        found = [work.costs.table.trained_blocks(a.window) for a in plan]
        assert found == sorted(found) and max(found) == most
