"""The one contract of all methods: every file in ``distfl/methods`` is taken up by its name."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import merge, same_bits, tokens
from live_bytes import LiveBytes

from distfl import costs as costs_module
from distfl import hosting, methods
from distfl.calibration import Case, rank_of
from distfl.caps.rlimit import Report
from distfl.config import (
    FleetConfig,
    GroupConfig,
    LeversConfig,
    MemoryConfig,
    MethodConfig,
    RunConfig,
    TrainConfig,
    TrainingConfig,
    TransportConfig,
)
from distfl.errors import DistflError, PlanError
from distfl.fleet import Budget, Client
from distfl.messages import Assignment
from distfl.methods.base import Workload, build_model, load_method, table_of, workload
from distfl.model import ModelSpec, from_tensors, initial_tensors
from distfl.planner import fits
from distfl.recipes import Recipe
from distfl.shards import TOKEN, Shard, ShardIndex
from distfl.transport.local import group
from distfl.updates import LEAD

NAMES = sorted(path.stem for path in Path(methods.__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))
# beyond a method's defaults, what makes it plan or train something else
VARIANTS = {"caff": [{"averaging": "participation"}], "lora": [{"targets": ["q", "v"], "rank": 3}, {"head": False, "blocks": 2}]}
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
        transport=TransportConfig(codec=codec),
        memory=MemoryConfig("report", margin_mb=0),
        run=RunConfig(str(tmp_path / "run")),
    )


def work_of(name: str, options: dict, depth: int = 3, **training) -> Workload:
    return workload(config_of(name, options, **training), load_method(name, options), replace(SPEC, depth=depth), 1)


def client(id: int, rows: int = 4, budget: Budget = UNLIMITED) -> Client:
    return Client(id, f"c{id}", "g", budget, rows)


def pretrained(spec: ModelSpec = SPEC, seed: int = 1) -> dict[str, torch.Tensor]:
    return initial_tensors(spec, torch.Generator().manual_seed(seed))


def noise(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Random values in place of these, so that no zero hides anything."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


# --- plans -------------------------------------------------------------------------------------------------------------------------


def budgets(method, work: Workload, member: Client) -> list[Budget]:
    """Exactly what each width costs by its quickest and by its leanest steps, and a byte or an operation less."""
    found = []
    for blocks in range(1, work.costs.spec.depth + 1):
        window = method.window(work.costs.table, blocks)
        recipes, details = list(work.recipes(member, blocks)), method.details(work.costs.spec)
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
    """A rank that can host client 0 and 1, of 19 rows each, and its plan for them."""

    def make(name: str, options: dict, **config):
        np.random.default_rng(0).integers(0, 40, 400).astype(TOKEN).tofile(tmp_path / "tokens.bin")
        shards = ShardIndex(str(tmp_path), "", (Shard("a", 0, 150, 50), Shard("b", 200, 150, 50)))
        config = config_of(name, options, tmp_path, **config)
        state = hosting.rank_state(group(1)[0], config, SPEC, shards)
        state.replica.fill(state.method.initial(pretrained(), 1))
        return state, state.method.plan(1, [client(0, 19), client(1, 19)], workload(config, state.method, SPEC, 1), {})

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


@pytest.mark.parametrize("name, options", CASES)
def test_only_what_is_sent_was_trained_and_the_optimiser_sees_nothing_else(name, options, rank):
    state, (order, _) = rank(name, options)
    before = state.replica.copy()
    model = build_model(state.method, SPEC, state.replica.tensors)
    with state.method.attached(model, order) as parameters:
        names = {n for n, parameter in model.named_parameters() if any(parameter is p for p in parameters)}
        assert all(parameter.requires_grad == (n in names) for n, parameter in model.named_parameters())
    blocks, report = hosting.host(state, Report(), order)
    assert report.ok and report.samples == 4
    sent = decoded(state, blocks, order)
    assert sent.keys() == names == {t.name for unit in order.window.units for t in state.table[unit].tensors}
    assert sum(tensor.nbytes for tensor in sent.values()) == state.method.held(state.costs, order.detail).table.window_bytes(order.window)
    assert any(not torch.equal(tensor, before[n]) for n, tensor in sent.items())
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
    with torch.no_grad():
        assert torch.equal(build_model(method, SPEC, shared)(x), from_tensors(SPEC, pretrained())(x))
    deployed = method.deployed(shared)
    assert deployed.keys() == pretrained().keys() and all(torch.equal(deployed[n], t) for n, t in pretrained().items())
    assert same_bits(method.initial(pretrained(), 1), shared)


@pytest.mark.parametrize("name, options", CASES)
def test_a_deployed_model_is_a_plain_one_that_computes_the_same(name, options):
    method, x = load_method(name, options), tokens(2, 8, 40)
    shared = {n: t * 0.1 for n, t in noise(method.initial(pretrained(), 1), 2).items()}
    with torch.no_grad():
        found = from_tensors(SPEC, method.deployed(shared))(x)
        torch.testing.assert_close(found, build_model(method, SPEC, shared)(x), rtol=1e-4, atol=1e-5)


# --- merging -----------------------------------------------------------------------------------------------------------------------


def plan_of(name: str, options: dict, *rows: int):
    """Method, table and a plan of unlimited clients with so many rows."""
    method, work = load_method(name, options), work_of(name, options)
    return method, work.costs.table, method.plan(1, [client(i, count) for i, count in enumerate(rows)], work, {})


def merged(method, table, old: dict, updates: list[tuple[Assignment, dict]], of: list[Assignment]) -> dict:
    """A round's server half, without the wire; ``of``: all that took part."""
    return merge(method, table, old, updates, sum(assignment.weight for assignment in of))


def trained_names(table, assignment: Assignment) -> set[str]:
    return {tensor.name for unit in assignment.window.units for tensor in table[unit].tensors}


@pytest.mark.parametrize("name, options", CASES)
def test_no_local_step_changes_nothing_bit_for_bit(name, options, rank):
    state, plan = rank(name, options, steps=0)
    old = noise(state.replica.copy(), 3)
    state.replica.fill(old)
    updates = [(order, decoded(state, hosting.host(state, Report(), order)[0], order)) for order in plan]
    assert same_bits(old, merged(state.method, state.table, old, updates, plan))


@pytest.mark.parametrize("name, options", CASES)
def test_equal_updates_merge_to_that_update_and_what_nobody_trained_keeps_its_value(name, options):
    method, table, plan = plan_of(name, options, 1, 3, 5)
    old = method.initial(pretrained(), 1)
    update = noise(old, 2)
    new = merged(method, table, old, [(assignment, update) for assignment in plan], plan)
    trained = trained_names(table, plan[0])
    assert all(torch.equal(tensor, update[n] if n in trained else old[n]) for n, tensor in new.items())
    assert same_bits(old, merged(method, table, old, [], plan))


@pytest.mark.parametrize("name, options", CASES)
def test_the_order_of_clients_matters_only_to_rounding(name, options):
    method, table, plan = plan_of(name, options, 1, 3, 7)
    old = method.initial(pretrained(), 1)
    updates = [(assignment, noise(old, seed)) for seed, assignment in enumerate(plan, start=2)]
    first = merged(method, table, old, updates, plan)
    for order in permutations(updates):
        for n, tensor in merged(method, table, old, list(order), plan).items():
            torch.testing.assert_close(tensor, first[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, options", CASES)
def test_a_subset_of_clients_is_enough(name, options):
    method, table, plan = plan_of(name, options, 1, 3, 7)
    old = method.initial(pretrained(), 1)
    one = noise(old, 2)
    new = merged(method, table, old, [(plan[1], one)], plan)
    trained, share = trained_names(table, plan[1]), plan[1].weight / sum(assignment.weight for assignment in plan)
    for n, tensor in new.items():
        if n in trained:  # its own update, or as far towards it as its share of the round goes
            near = [one[n], torch.lerp(old[n], one[n], share)]
            assert any(torch.allclose(tensor, value, rtol=1e-5, atol=1e-6) for value in near)
        else:
            assert torch.equal(tensor, old[n])


# --- memory ------------------------------------------------------------------------------------------------------------------------

WIDE = ModelSpec(depth=3, width=96, heads=3, context=64, vocabulary=512)
RECIPES = [Recipe(8), Recipe(8, 128), Recipe(2, 64), Recipe(8, 128, 2), Recipe(2, 64, 3), Recipe(8, 128, 3, True)]


@pytest.mark.parametrize("name, options", CASES)
def test_tensors_alive_at_the_peak_are_as_many_bytes_as_predicted(name, options, tmp_path, monkeypatch):
    monkeypatch.setattr(costs_module, "PAGE_BYTES", 0)  # what is no tensor
    monkeypatch.setattr(costs_module, "_holes", lambda *sizes: (0, 0))
    costs_module._peak.cache_clear()
    for blocks in (1, 3):
        for recipe in RECIPES:
            case = Case(WIDE, 8, "adamw", not recipe.fused_update, blocks, recipe, False, "exact", name, tuple(options.items()))
            state = rank_of(case, tmp_path, steps=2)
            window = state.method.window(state.table, blocks)
            planned = replace(recipe, recomputed=min(recipe.recomputed, state.table.trained_blocks(window)))
            predicted = state.costs.peak(window, planned).bytes
            with LiveBytes() as live:
                hosting._work(state, Assignment(1, 0, window, 1.0, 10**12, 0, 0, 0, planned, 1e-3), {}, None)
            assert 0.98 <= live.peak / predicted <= 1.02, (
                blocks,
                recipe.describe(8),
                max(state.costs.peak(window, planned).moments.items()),
            )
    costs_module._peak.cache_clear()


ENFORCED = """
import json, sys
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
spec = ModelSpec(6, 192, 6, 128, 1024)
for blocks, recipe in ((6, Recipe(8, 128)), (6, Recipe(2, 128)), (3, Recipe(1, 128)), (6, Recipe(4, 128, 6)), (2, Recipe(8, None))):
    case = Case(spec, 8, "adamw", True, blocks, recipe, True, "exact", sys.argv[2], tuple(json.loads(sys.argv[3]).items()))
    state = rank_of(case, Path(sys.argv[1]))
    predicted = state.costs.peak(state.method.window(state.table, blocks), recipe).bytes
    cap.prove(predicted + 500_000)
    rehearse(state)
    report = hosted(state, case, cap, predicted + 500_000)
    print(json.dumps([blocks, recipe.describe(8), report.ok, report.reason, predicted, report.measured_peak_bytes]), flush=True)
"""


@pytest.mark.parametrize("name, options", CASES)
def test_under_an_enforced_cap_the_measured_peak_is_the_predicted_one(name, options, tmp_path):
    script = tmp_path / "enforced.py"
    script.write_text(ENFORCED)
    command = [sys.executable, str(script), str(tmp_path), name, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = [json.loads(text) for text in done.stdout.splitlines()]
    assert len(found) == 5
    for blocks, recipe, ok, reason, predicted, measured in found:
        assert ok, (blocks, recipe, reason)
        assert -0.02 < predicted / measured - 1 < 0.05 and measured <= predicted + 500_000, done.stdout


# --- pitfalls of single methods ----------------------------------------------------------------------------------------------------


def bias_of_the_mean(name: str) -> float:
    """||mean(B) mean(A) - mean(B A)|| / ||mean(B A)|| over three clients' random updates of one adapter."""
    method, table, plan = plan_of(name, {"rank": 3}, 1, 3, 7)
    old = method.initial(pretrained(), 1)
    updates = [
        (assignment, old | {n: noise(old, seed)[n] for n in trained_names(table, assignment)}) for seed, assignment in enumerate(plan)
    ]
    weight = "blocks.1.proj.weight"

    def change(tensors: dict) -> torch.Tensor:
        return (method.deployed(tensors)[weight] - tensors[weight]).double()

    found = change(merged(method, table, old, updates, plan))
    mean = sum(a.weight * change(tensors) for a, tensors in updates) / sum(a.weight for a, _ in updates)
    return ((found - mean).norm() / mean.norm()).item()


def test_the_mean_of_factors_is_not_the_mean_of_updates_unless_one_factor_is_frozen():
    for name in {"lora", "ffa_lora"} & set(NAMES):
        assert bias_of_the_mean(name) > 0.3 if name == "lora" else bias_of_the_mean(name) < 1e-5


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


def test_lora_takes_more_blocks_the_larger_the_budget_and_never_more_than_its_option():
    for options, most in (({}, 3), ({"blocks": 2}, 2)):
        method, work = load_method("lora", options), work_of("lora", options)
        peaks = [method.cost(client(0), method.window(work.costs.table, blocks), work).peak.bytes for blocks in (1, 2, 3)]
        plan = method.plan(1, [client(i, budget=Budget(peak, None, None)) for i, peak in enumerate(peaks)], work, {})
        found = [work.costs.table.trained_blocks(a.window) for a in plan]
        assert found == sorted(found) and max(found) == most
