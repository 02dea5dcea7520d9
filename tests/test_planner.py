"""The planner: the worked example of the selection, budgets of each kind, and refusals whose advice works."""

import re
from dataclasses import replace
from functools import cache, partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distfl.costs import Cost, Costs, Peak
from distfl.errors import PlanError
from distfl.fleet import GIGA, MEGA, Budget, Client
from distfl.model import ModelSpec
from distfl.planner import cheapest, fits, select, widest
from distfl.recipes import Recipe
from distfl.units import UnitTable

DEPTHS = (3, 6, 9, 12)


@cache
def table(depth: int, width: int = 256) -> UnitTable:
    return UnitTable(ModelSpec(depth, width, 8, 128, 96))


def cost_of(costs: Costs, client: Client, blocks: int) -> Cost:
    """As the worked example has it: weights, optimiser state, activations, and gradients of a block's output and of its GELU output."""
    window, spec, tokens = costs.table.suffix(blocks), costs.spec, costs.batch * costs.spec.context
    state = costs.state_tensors * costs.table.window_bytes(window)
    kept, residual = 4 * tokens * costs.block.kept(spec, leading=True) * blocks, 4 * tokens * (spec.width + spec.feedforward)
    peak = Peak(costs.table.bytes, state, 0, 0, kept, residual, 0, {})
    return replace(cost_by(costs, client, blocks, Recipe(costs.batch)), peak=peak)


def cost_by(costs: Costs, client: Client, blocks: int, recipe: Recipe) -> Cost:
    window = costs.table.suffix(blocks)
    tokens = client.rows * costs.spec.context
    return Cost(costs.peak(window, recipe), costs.table.window_bytes(window), costs.flops(window, tokens, recipe), recipe)


def family(depths=DEPTHS, batch: int = 32, width: int = 256) -> dict:
    """Depth -> cost function: batch 32, AdamW, no margin."""
    return {depth: partial(cost_of, Costs(table(depth, width), batch, 2)) for depth in depths}


def client(id: int, memory_mb: float = 1e6, upload_mb: float | None = None, gflops: float | None = None, rows: int = 32) -> Client:
    scaled = [None if value is None else round(value * unit) for value, unit in ((upload_mb, MEGA), (gflops, GIGA))]
    return Client(id, f"client {id}", f"group of {memory_mb}", Budget(round(memory_mb * MEGA), *scaled), rows)


def fleet(*memory_mb: float) -> list[Client]:
    return [client(i, budget) for i, budget in enumerate(memory_mb)]


# --- the worked example ------------------------------------------------------------------------------------------------------------

# Peaks in MB at d=256, B=32 (test_costs.py has them all): depth 9 needs 124, 197, 271, 344, 418, 492, 565, 639, 713 for 1 .. 9 blocks.


@pytest.mark.parametrize("depth, expected", [(3, (2, 3, 3)), (6, (2, 4, 6)), (9, (2, 4, 8)), (12, (1, 3, 8))])
def test_windows_of_200_350_and_700_megabytes(depth, expected):
    assert tuple(widest(member, depth, family()[depth]) for member in fleet(200, 350, 700)) == expected


def test_depth_9_wins_for_200_350_and_700_megabytes():
    chosen = select(fleet(200, 350, 700), family(), allow_dropping=False)
    # (2+3+3)/3, (2+4+6)/3, (2+4+8)/3, (1+3+8)/3
    assert chosen.averages == pytest.approx({3: 8 / 3, 6: 4.0, 9: 14 / 3, 12: 4.0})
    assert (chosen.depth, chosen.blocks) == (9, {0: 2, 1: 4, 2: 8})
    assert chosen.excluded == {3: 0, 6: 0, 9: 0, 12: 0}


def test_the_deepest_of_equal_depths_wins():
    chosen = select(fleet(280, 280), family(), allow_dropping=False)
    assert chosen.averages == {3: 3, 6: 3, 9: 3, 12: 2}  # depth 12 needs 280.3 MB for its third block
    assert chosen.depth == 9


def test_the_order_in_which_depths_are_offered_does_not_matter():
    backwards = dict(reversed(family().items()))
    assert select(fleet(280), backwards, False).depth == select(fleet(280), family(), False).depth == 9


# --- other budgets -----------------------------------------------------------------------------------------------------------------


def test_an_upload_budget_alone_gives_the_deepest_model():
    # 3.159 MB per block and 0.100 for the head: 10 MB carry 3 blocks (9.578 MB) at every depth, 4 would be 12.74 MB
    chosen = select([client(0, upload_mb=10)], family(), allow_dropping=False)
    assert chosen.averages == {3: 3, 6: 3, 9: 3, 12: 3}
    assert chosen.depth == 12


def test_a_flop_budget_alone_prefers_a_middle_depth():
    # F = 24 d^2 + 4 T d = 1 703 936 per token; 32 rows * 128 = 4096 tokens: 6.979 GFLOP per block,
    # head 4096 * 6 * 256 * 96 = 0.604.
    # (L + 2 t) * 6.979 + 0.604 <= 112.5 <=> L + 2 t <= 16.03: t = 3 of 3 (at most L), 5 of 6, 3 of 9, 2 of 12
    chosen = select([client(0, gflops=112.5)], family(), allow_dropping=False)
    assert chosen.averages == {3: 3, 6: 5, 9: 3, 12: 2}
    assert chosen.depth == 6


def test_more_data_costs_more_flops():
    cost = family()[3]
    assert widest(client(0, gflops=112.5, rows=32), 3, cost) == 3
    assert widest(client(0, gflops=112.5, rows=64), 3, cost) == 2  # twice the tokens: (L + 2 t) * 13.96 + 1.2 <= 112.5 <=> L + 2 t <= 7.97
    assert select([client(0, gflops=112.5), client(1, gflops=112.5, rows=64)], family([3]), False).blocks == {0: 3, 1: 2}


def test_a_budget_that_is_met_to_the_byte_fits():
    one = family()[6](client(0), 3)
    exactly = Budget(one.peak.bytes, one.upload_bytes, one.flops)
    assert fits(one, exactly)
    for short in (
        Budget(exactly.memory_bytes - 1, None, None),
        Budget(10**12, exactly.upload_bytes - 1, None),
        Budget(10**12, None, exactly.flops - 1),
    ):
        assert not fits(one, short)


def made_up(name: int, peak_bytes: int, upload_bytes: int = 0, flops: int = 0) -> Cost:
    return Cost(Peak(peak_bytes, 0, 0, 0, 0, 0, 0, {}), upload_bytes, flops, Recipe(name))


def test_of_a_windows_costs_the_first_that_fits_is_taken_else_the_leanest():
    offered = [made_up(1, 90), made_up(2, 50, flops=7), made_up(3, 40, flops=8), made_up(4, 30, flops=9), made_up(5, 30)]
    for memory, flops, taken in ((90, None, 1), (89, None, 2), (49, None, 3), (39, None, 4), (39, 8, 5), (29, None, 4), (0, 0, 4)):
        assert cheapest(iter(offered), Budget(memory, None, flops)).recipe.micro_batch == taken, (memory, flops)
    assert cheapest([made_up(1, 9, upload_bytes=6), made_up(2, 9, upload_bytes=5)], Budget(9, 5, None)).recipe.micro_batch == 2


def test_no_more_costs_are_looked_at_than_needed():
    offered = iter([made_up(1, 90), made_up(2, 50), made_up(3, 40)])
    assert cheapest(offered, Budget(50, None, None)).recipe.micro_batch == 2
    assert next(offered).recipe.micro_batch == 3


small_costs = Costs(table(6, 64), 4, 2)
RECIPES = [Recipe(4), Recipe(2), Recipe(1), Recipe(1, 128), Recipe(1, 128, 6)]


def plain_of(client: Client, blocks: int) -> Cost:
    return cost_by(small_costs, client, blocks, RECIPES[0])


def cheapest_of(client: Client, blocks: int) -> Cost:
    return cheapest((cost_by(small_costs, client, blocks, recipe) for recipe in RECIPES), client.budget)


@given(st.integers(0, 30 * MEGA), st.none() | st.integers(0, 2 * MEGA), st.none() | st.integers(0, 2 * GIGA), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_the_planned_window_fits_and_one_more_block_does_not(memory, upload, flops, rows):
    member = Client(0, "c", "g", Budget(memory, upload, flops), rows)
    found = []
    for cost in (plain_of, cheapest_of):
        found.append(widest(member, 6, cost))
        assert found[-1] == 0 or fits(cost(member, found[-1]), member.budget)
        assert found[-1] == 6 or not fits(cost(member, found[-1] + 1), member.budget)
    plain, levered = found
    assert levered >= plain  # levers never cost a block: the plain step is one of the recipes
    assert levered == 6 or not any(fits(cost_by(small_costs, member, levered + 1, recipe), member.budget) for recipe in RECIPES)


# --- nothing fits ------------------------------------------------------------------------------------------------------------------


def advice(error: PlanError, key: str) -> float:
    return float(re.search(rf"{key} ([\d.]+)", error.found)[1])


def test_the_refusal_names_the_depth_and_group_that_ask_least():
    with pytest.raises(PlanError) as refused:
        select(fleet(100, 350), family(), allow_dropping=False)
    assert "depth 3" in refused.value.found and "group of 100" in refused.value.found and "group of 350" not in refused.value.found
    # depth 3, one block: W 9.81, S 2 * 3.26, A 67.31, X 20.97
    assert advice(refused.value, "memory_mb") == pytest.approx(104.61, abs=0.01)
    assert "fleet.groups" in refused.value.change


def test_following_the_memory_advice_lets_the_client_train():
    for batch in range(20, 33):
        with pytest.raises(PlanError) as refused:
            select(fleet(1), family(batch=batch), allow_dropping=False)
        select(fleet(advice(refused.value, "memory_mb")), family(batch=batch), allow_dropping=False)


@pytest.mark.parametrize("key", ["upload_mb", "gflops"])
def test_following_the_other_advice_lets_the_client_train(key):
    for width in (64, 128, 192, 256, 320):
        with pytest.raises(PlanError) as refused:
            select([client(0, **{key: 1e-3})], family(width=width), allow_dropping=False)
        select([client(0, **{key: advice(refused.value, key)})], family(width=width), allow_dropping=False)


def test_dropping_counts_a_dropped_client_as_nothing():
    chosen = select(fleet(100, 350), family(), allow_dropping=True)
    # 100 MB train nothing anywhere; 350 MB train 3, 4, 4, 3: depth 9 by the tie rule
    assert chosen.averages == {3: 1.5, 6: 2, 9: 2, 12: 1.5}
    assert (chosen.depth, chosen.blocks, chosen.excluded) == (9, {0: 0, 1: 4}, {3: 1, 6: 1, 9: 1, 12: 1})


def test_dropping_everybody_is_refused():
    with pytest.raises(PlanError):
        select(fleet(10, 20), family(), allow_dropping=True)


def test_a_depth_that_excludes_somebody_is_not_taken_even_if_its_average_is_higher():
    # 130 MB admit one block of depths 3, 6, 9 but none of 12 (133 MB); 950 MB train 3, 6, 9 and all 12 blocks
    chosen = select(fleet(130, 950), family(), allow_dropping=False)
    assert (chosen.averages[9], chosen.averages[12]) == (5, 6)
    assert chosen.depth == 9
    assert select(fleet(130, 950), family(), allow_dropping=True).depth == 12
