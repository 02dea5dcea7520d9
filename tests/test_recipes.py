"""Which recipes the levers allow, in which order, and how they are told in words."""

import pytest

from distfl.config import LeversConfig, TrainingConfig
from distfl.recipes import LOSS_CHUNK_TOKENS, Recipe, candidates

FREE = TrainingConfig(batch=8, steps=1, clip_norm=None)
CLIPPED = TrainingConfig(batch=8, steps=1, clip_norm=1.0)
CHUNKS = {"auto": LOSS_CHUNK_TOKENS, "on": LOSS_CHUNK_TOKENS, "off": None}
OFF = {"micro_batches": "off", "loss_chunks": "off", "recompute": "off", "fused_update": "off"}


def of(training: TrainingConfig = FREE, batch: int = 8, blocks: int = 2, **levers: str) -> list[Recipe]:
    return list(candidates(LeversConfig(**levers), training, batch, blocks))


def test_everything_off_is_the_plain_step():
    assert of(**OFF) == [Recipe(8)]


def test_everything_on_takes_the_most_of_each():
    assert of(blocks=3, **dict.fromkeys(OFF, "on") | {"fused_update": "off"}) == [Recipe(1, LOSS_CHUNK_TOKENS, 3)]
    assert of(blocks=3, **dict.fromkeys(OFF, "on") | {"micro_batches": "off"}) == [Recipe(8, LOSS_CHUNK_TOKENS, 3, True)]


def test_all_recipes_for_a_batch_of_two_and_one_block_stand_in_order():
    # for each number of recomputed blocks: batch 2 after backward, batch 2 fused, then batch 1; chunks cost no time: auto is on
    once = [(2, False), (2, True), (1, False)]
    for switch, chunk in CHUNKS.items():
        wanted = [Recipe(micro, chunk, recomputed, fused) for recomputed in (0, 1) for micro, fused in once]
        assert of(batch=2, blocks=1, loss_chunks=switch) == wanted
    assert of(batch=2, blocks=1) == of(batch=2, blocks=1, loss_chunks="auto")


@pytest.mark.parametrize("switch, chunk", CHUNKS.items())
@pytest.mark.parametrize("training", [FREE, CLIPPED])
@pytest.mark.parametrize("batch, blocks", [(1, 1), (5, 3), (8, 6)])
def test_the_fastest_step_is_first_and_less_recomputation_comes_before_more(training, batch, blocks, switch, chunk):
    recipes = of(training, batch, blocks, loss_chunks=switch)
    assert recipes[0] == Recipe(batch, chunk)  # plain, but for what costs no time
    assert len(set(recipes)) == len(recipes)
    times = [(recipe.recomputed, -recipe.micro_batch) for recipe in recipes]
    assert times == sorted(times)
    assert {recipe.recomputed for recipe in recipes} == set(range(blocks + 1))


@pytest.mark.parametrize("batch, sizes", [(1, [1]), (2, [2, 1]), (5, [5, 3, 2, 1]), (8, [8, 4, 2, 1]), (12, [12, 6, 3, 2, 1])])
def test_micro_batches_halve_down_to_one(batch, sizes):
    assert [recipe.micro_batch for recipe in of(batch=batch, **OFF | {"micro_batches": "auto"})] == sizes
    assert [recipe.micro_batch for recipe in of(batch=batch, **OFF | {"micro_batches": "on"})] == [1]
    assert [recipe.micro_batch for recipe in of(batch=batch, **OFF)] == [batch]


@pytest.mark.parametrize(
    "lever, values",
    [
        ("loss_chunks", {"auto": [128], "on": [128], "off": [None]}),
        ("recompute", {"auto": [0, 1, 2, 3], "on": [3], "off": [0]}),
        ("fused_update", {"auto": [False, True], "on": [True], "off": [False]}),
    ],
)
def test_a_lever_is_offered_forced_or_kept_away(lever, values):
    field = {"loss_chunks": "loss_chunk", "recompute": "recomputed", "fused_update": "fused_update"}[lever]
    for switch, wanted in values.items():
        assert [getattr(recipe, field) for recipe in of(blocks=3, **OFF | {lever: switch})] == wanted


@pytest.mark.parametrize("lever", OFF)
def test_what_is_off_is_in_no_recipe_and_what_is_on_in_all(lever):
    used = {
        "micro_batches": lambda recipe: recipe.micro_batch < 8,
        "loss_chunks": lambda recipe: recipe.loss_chunk is not None,
        "recompute": lambda recipe: recipe.recomputed > 0,
        "fused_update": lambda recipe: recipe.fused_update,
    }[lever]
    assert {used(recipe) for recipe in of(**{lever: "auto"})} == ({True} if lever == "loss_chunks" else {False, True})
    assert {used(recipe) for recipe in of(**{lever: "off"})} == {False}
    assert {used(recipe) for recipe in of(**{lever: "on"})} == {True}


def test_no_fused_update_where_gradients_are_clipped_or_add_up():
    assert not any(recipe.fused_update for recipe in of(CLIPPED))
    assert {recipe.micro_batch for recipe in of(FREE) if recipe.fused_update} == {8}
    assert of(CLIPPED, fused_update="auto") == of(CLIPPED, fused_update="off")


@pytest.mark.parametrize(
    "levers", [{}, OFF, dict.fromkeys(OFF, "on") | {"fused_update": "off"}, {"recompute": "on"}, {"micro_batches": "on"}]
)
@pytest.mark.parametrize("training", [FREE, CLIPPED])
def test_there_is_always_a_recipe(training, levers):
    for batch in (1, 3, 8):
        assert of(training, batch, 0, **levers) and of(training, batch, 4, **levers)


@pytest.mark.parametrize(
    "recipe, words",
    [
        (Recipe(8), "plain"),
        (Recipe(9), "plain"),  # at least the batch
        (Recipe(4), "micro-batches of 4"),
        (Recipe(8, 128), "loss by 128 tokens"),
        (Recipe(8, None, 2), "2 recomputed"),
        (Recipe(8, None, 0, True), "fused update"),
        (Recipe(1, 64, 3), "micro-batches of 1, loss by 64 tokens, 3 recomputed"),
    ],
)
def test_a_recipe_in_words_names_what_is_not_plain(recipe, words):
    assert recipe.describe(8) == words


def test_chunks_that_hold_all_there_is_are_not_named():
    assert Recipe(1, 128).describe(8, 128) == "micro-batches of 1"
    assert Recipe(1, 128).describe(8, 129) == "micro-batches of 1, loss by 128 tokens"
    assert Recipe(99, 128).describe(1, 128) == "plain"


@pytest.mark.parametrize(
    "recipe, window, head",
    [
        (Recipe(8), False, False),
        (Recipe(4), True, True),  # the second micro-batch adds to the first one's gradients
        (Recipe(8, None, 2), True, True),
        (Recipe(8, None, 2, True), False, False),  # a unit's gradients are gone before the next one's come
        (Recipe(8, 128, 0, True), False, True),  # chunks of 128 of 256 tokens add up in the head
        (Recipe(8, 128), False, True),
        (Recipe(8, 256), False, False),  # one chunk
    ],
)
def test_gradients_are_kept_where_they_add_up(recipe, window, head):
    assert recipe.keeps_gradients(8) == window
    assert (recipe.keeps_gradients(8) or recipe.keeps_head_gradients(8, 32)) == head
