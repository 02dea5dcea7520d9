"""Costs: the worked example, the formulas against counts made by PyTorch, and the predicted peak against the measured one."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distfl import model as model_module
from distfl.config import TransportConfig
from distfl.costs import Costs
from distfl.encoding import encoding_of
from distfl.model import ModelSpec, from_tensors, initial_tensors, next_token_loss
from distfl.recipes import Recipe
from distfl.steps import add_gradients, features_of
from distfl.units import UnitTable, Window, freeze_outside

MEGA = 10**6
PLAIN = Recipe(10**6)  # any batch at once

# Peak in MB (10^6) for d=256, 8 heads, T=128, B=32, AdamW, V=96. W weights, S = 2 per trained value, A kept activations,
# X = 4 N (d + f) = 4 * 4096 * 1280 = 21.0 MB. For instance depth 3, window 2:
#   W = (3 * 789 760 + 96*256 + 128*256 + 96*256 + 512) * 4 = 9.81 MB     S = 2 * (2 * 3.159 + 0.100) = 12.84 MB
#   A = 2 * 4 * 4096 * (8*256 + 2*1024 + 8 + 4) = 134.61 MB               sum = 178.2 MB
# The worked example has W + A + X. What it leaves out stands in the test.
EXAMPLE = {
    3: {1: 105, 2: 178, 3: 252},
    6: {1: 114, 2: 188, 3: 261, 4: 335, 6: 482},
    9: {1: 124, 2: 197, 3: 271, 4: 344, 6: 492, 8: 639, 9: 713},
    12: {1: 133, 2: 207, 3: 280, 4: 354, 6: 501, 8: 648, 9: 722, 12: 943},
}


def costs(
    depth: int,
    width: int = 256,
    heads: int = 8,
    context: int = 128,
    vocabulary: int = 96,
    batch: int = 32,
    states: int = 2,
    margin: int = 0,
) -> Costs:
    return Costs(UnitTable(ModelSpec(depth, width, heads, context, vocabulary)), batch, states, margin)


@pytest.mark.parametrize("depth", EXAMPLE)
def test_the_worked_example_comes_out_cell_by_cell(depth):
    formulas = costs(depth)
    assert formulas.table[depth + 1].bytes == 100_352  # 4 * (96*256 + 512)
    found = {}
    for blocks in EXAMPLE[depth]:
        peak = formulas.peak(formulas.table.suffix(blocks), PLAIN)
        left_out = {
            "the head's gradients": 100_352,
            "fc2's gradient on its way to where it adds up": 1_048_576,  # 4 * 256 * 1024
            "the hole that the logits leave": 4 * 4096 * 96 - 4 * 256 * 96,
            "the batch: two int64 per token": 65_536,  # 4096 * 16
            # four matrices a block and the output layer's, each with two of state, are mapped by themselves
            "a page for each mapping": 4096 * 3 * (4 * blocks + 1),
        }
        found[blocks] = round((peak.bytes - sum(left_out.values())) / MEGA)
        assert peak.moments["first block backward"] == peak.bytes  # the moment whose terms these are
    assert found == EXAMPLE[depth]


def test_a_block_of_width_256_is_3_16_megabytes_and_the_head_a_tenth_of_one():
    table = costs(3).table
    assert {round(table[block].bytes / MEGA, 2) for block in (1, 2, 3)} == {3.16}
    assert round(table[4].bytes / MEGA, 2) == 0.10


@pytest.mark.parametrize("width", [4, 16, 128, 256])
def test_a_block_has_twelve_width_squared_plus_thirteen_width_parameters(width):
    # qkv 3d^2+3d | proj d^2+d | fc1 4d^2+4d | fc2 4d^2+d | two norms 4d
    assert costs(2, width, heads=2).table[1].elements == 12 * width**2 + 13 * width


def test_all_units_together_are_the_whole_model():
    # d=4, V=5, T=3, L=2: 2 * (192 + 52) + (5 + 3) * 4 + (8 + 20) = 488 + 32 + 28 = 548 values
    table = costs(2, 4, 2, 3, 5).table
    assert table.bytes == 4 * 548
    assert [unit.name for unit in table] == ["embedding", "block.0", "block.1", "head"]


EVERY_LEVER = [
    PLAIN,
    Recipe(8),
    Recipe(32, 128),
    Recipe(32, recomputed=2),
    Recipe(32, fused_update=True),
    Recipe(32, 128, 3, True),
    Recipe(1, 128, 6),
]


@pytest.mark.parametrize("recipe", EVERY_LEVER, ids=lambda recipe: recipe.describe(32))
def test_the_parts_of_a_peak_add_up_to_its_fullest_moment(recipe):
    formulas = costs(6, margin=777)
    for blocks in range(1, 7):
        peak = formulas.peak(formulas.table.suffix(blocks), recipe)
        assert peak.bytes == max(peak.moments.values())
        assert (peak.weights, peak.margin) == (formulas.table.bytes, 777)
        assert peak.bytes == peak.weights + peak.optimizer + peak.gradients + peak.activations + peak.transient + 777


# d=4, f=16, H=2, V=5, T=3, L=2, batch 2, AdamW, both blocks and the head train: the bytes of every moment beyond what is fixed.
# A block 4 * 244 = 976, head 4 * 28 = 112, all weights 2 * 976 + 112 + 4 * 32 = 2192; all gradients 2 * 976 + 112 = 2064.
# Fixed: weights 2192, state 2 * 2064 = 4128, the batch 16 * 2*3 = 96: 6416. Gradients that add up come on top: the head's make
# it 6528, all of them 8480.
# Six tokens: an input x = 4*6*4 = 96, a block's 4*6*70 = 1680 (8*4 + 2*16 + 2 + 4 = 70), logits 4*6*5 = 120, residual
# 96 + 4*6*16 = 480. A matrix's gradient on its way 4*4*16 = 256, the output layer's 4*4*5 = 80.
# The logits of three tokens leave a hole of 60, those of two tokens one of 40; that of six, 120, takes the matrix's gradient in, and
# what is left of it, 40, is too small for a block's tensors.
# All tensors are too small for a mapping.
BY_HAND = {
    "plain": (
        Recipe(2),
        6416,
        {
            "prefix": 96,  # the embedding's output
            "loss": 2 * 1680 + 96 + 96 + 2 * 120,  # kept, the head's input and its norm's output, logits twice
            "head backward": 2 * 1680 + 96 + 2 * 96 + 120 + 80,
            "optimizer": 2064,
            "first block backward": 2 * 1680 + 480 + 256 + 40 + 112,  # the head's gradients exist
            "last kept block backward": 1680 + 480 + 256 + 40 + 112 + 976,  # and those of the block above
        },
    ),
    "micro-batches of 1": (  # three tokens: half of x, block, logits and residual; all gradients add up and are in the fixed part
        Recipe(1),
        8480,
        {
            "prefix": 48,
            "loss": 2 * 840 + 48 + 48 + 2 * 60,
            "head backward": 2 * 840 + 48 + 2 * 48 + 60 + 80 + 60,
            "optimizer": 0,
            "first block backward": 2 * 840 + 240 + 256 + 60,
            "last kept block backward": 840 + 240 + 256 + 60,
        },
    ),
    "loss by 2 tokens": (  # a part 4*2*4 = 32, its logits 4*2*5 = 40; the gradient of x is there too; the head's gradients add up
        Recipe(2, 2),
        6528,
        {
            "prefix": 96,
            "loss": 2 * 1680 + 2 * 96 + 32 + 2 * 40,
            "head backward": 2 * 1680 + 2 * 96 + 2 * 32 + 40 + 80 + 40,
            "optimizer": 2 * 976,
            "first block backward": 2 * 1680 + 480 + 256 + 40,
            "last kept block backward": 1680 + 480 + 256 + 40 + 976,
        },
    ),
    "one of two recomputed": (  # gradients add up; the first block keeps x alone until it is its turn
        Recipe(2, recomputed=1),
        8480,
        {
            "prefix": 96,
            "loss": 1680 + 96 + 96 + 96 + 2 * 120,
            "head backward": 1680 + 96 + 96 + 2 * 96 + 120 + 80,
            "optimizer": 0,
            "first block backward": 1680 + 96 + 480 + 256 + 40,
            "last kept block backward": 1680 + 96 + 480 + 256 + 40,
            "first recomputation": 1680 + 480 + 256 + 40,
            "last recomputation": 1680 + 480 + 256 + 40,
        },
    ),
    "both recomputed": (
        Recipe(2, recomputed=2),
        8480,
        {
            "prefix": 96,
            "loss": 2 * 96 + 96 + 96 + 2 * 120,
            "head backward": 2 * 96 + 96 + 2 * 96 + 120 + 80,
            "optimizer": 0,
            "first recomputation": 96 + 1680 + 480 + 256 + 40,  # the input of the other one still waits
            "last recomputation": 1680 + 480 + 256 + 40,
        },
    ),
    "both recomputed, loss by 2 tokens, fused update": (
        Recipe(2, 2, 2, True),
        6528,
        {
            "prefix": 96,
            "loss": 2 * 96 + 2 * 96 + 32 + 2 * 40,
            "head backward": 2 * 96 + 2 * 96 + 2 * 32 + 40 + 80 + 40,
            "optimizer": 976,
            "first recomputation": 96 + 1680 + 480 + 256 + 40,
            "last recomputation": 1680 + 480 + 256 + 40,
        },
    ),
    "fused update": (  # gradients of one unit at a time, gone before the next one's come
        Recipe(2, fused_update=True),
        6416,
        {
            "prefix": 96,
            "loss": 2 * 1680 + 96 + 96 + 2 * 120,
            "head backward": 2 * 1680 + 96 + 2 * 96 + 120 + 80,
            "optimizer": 976,
            "first block backward": 2 * 1680 + 480 + 256 + 40,
            "last kept block backward": 1680 + 480 + 256 + 40,
        },
    ),
}


@pytest.mark.parametrize("recipe, fixed, moments", BY_HAND.values(), ids=BY_HAND)
def test_every_moment_by_hand(recipe, fixed, moments):
    formulas = costs(2, 4, 2, 3, 5, batch=2, margin=1000)
    peak = formulas.peak(formulas.table.suffix(2), recipe)
    sending = {"sending": 2192 + 2064 + 1000}  # the weights, and the message beside them
    assert peak.moments == {name: fixed + bytes_ + 1000 for name, bytes_ in moments.items()} | sending
    assert peak.gradients == fixed - 6416


def test_residuals_are_in_every_moment_and_sending_is_that_of_the_codec():
    plain, coded = costs(3), replace(costs(3), encoding=encoding_of(TransportConfig(codec="top_k")))
    window = plain.table.suffix(2)
    peaks, residuals = [formulas.peak(window, PLAIN) for formulas in (plain, coded)], plain.table.window_bytes(window)
    assert (peaks[0].residuals, peaks[1].residuals) == (0, residuals)
    assert peaks[1].bytes == peaks[0].bytes + residuals
    for moment in set(peaks[0].moments) - {"sending"}:
        assert peaks[1].moments[moment] == peaks[0].moments[moment] + residuals
    mapped = 4096 * 3 * 9  # pages, as in the worked example
    assert peaks[0].moments["sending"] == plain.table.bytes + residuals + mapped
    assert peaks[1].moments["sending"] == plain.table.bytes + residuals + mapped + coded.encoding.sending_bytes(plain.table, window)


@pytest.mark.parametrize("codec, least, most", [("exact", 1, 1), ("bf16", 2, 2), ("int8", 3.9, 4), ("int4", 7.7, 8), ("top_k", 14, 16)])
def test_uploads_are_those_of_the_codec(codec, least, most):
    formulas = replace(costs(3, 128), encoding=encoding_of(TransportConfig(codec=codec)))
    for blocks in (1, 2, 3):
        window = formulas.table.suffix(blocks)
        assert least <= formulas.table.window_bytes(window) / formulas.upload_bytes(window) <= most


def test_gradients_that_are_kept_are_mapped_too():
    # width 256: five mappings as in the worked example, of weights, two of state, and gradients
    formulas = costs(3)
    window = formulas.table.suffix(1)
    loss = [formulas.peak(window, recipe).moments["loss"] for recipe in (PLAIN, Recipe(31))]
    one_sequence = 4 * 128 * (8 * 256 + 2 * 1024 + 8 + 4) + 2 * 4 * 128 * 256 + 2 * 4 * 128 * 96  # kept, the head's input and norm, logits
    assert loss[1] - loss[0] == formulas.table.window_bytes(window) + 4096 * 5 - one_sequence


def test_a_prefix_of_blocks_runs_one_sequence_at_a_time():
    # one block below: the features of six tokens, 96, and for three tokens 4 * 3 * (3*4 + 2*16) = 528; weights and batch 2192 + 96,
    # state of the head and one block 2 * (112 + 976) = 2176
    formulas = costs(2, 4, 2, 3, 5, batch=2)
    assert formulas.peak(formulas.table.suffix(1), Recipe(2)).moments["prefix"] == 2192 + 96 + 2176 + 96 + 528
    assert formulas.peak(Window(0, 4), Recipe(2)).moments["prefix"] == 2192 + 96 + 2 * (2064 + 128)  # there is none


def test_a_recipe_asks_for_no_more_than_there_is():
    formulas = costs(3)
    window = formulas.table.suffix(2)
    assert formulas.peak(window, Recipe(99, 10**6, 0)) == formulas.peak(window, Recipe(32))
    assert formulas.peak(window, Recipe(32, recomputed=9)) == formulas.peak(window, Recipe(32, recomputed=2))


@pytest.mark.parametrize("recipe", EVERY_LEVER, ids=lambda recipe: recipe.describe(32))
@pytest.mark.parametrize("states", [0, 1, 2])
def test_optimizer_state_is_so_many_copies_of_what_trains(states, recipe):
    formulas = costs(3, states=states)
    window = formulas.table.suffix(2)
    assert formulas.peak(window, recipe).optimizer == states * (2 * formulas.table[1].bytes + formulas.table[4].bytes)


def test_a_large_vocabulary_makes_the_loss_the_fullest_moment_until_it_is_cut():
    # V = 8192, N = 4096: two tensors of 4 * 4096 * 8192 = 134 MB, far above one block's 67 MB and its 21 MB of gradients
    formulas = costs(3, vocabulary=8192)
    window = formulas.table.suffix(1)
    peak = formulas.peak(window, PLAIN)
    assert max(peak.moments, key=peak.moments.get) == "loss"
    pages = 4096 * 3 * 5  # four matrices of the block and the output layer's, with two of state each
    assert peak.transient == 4 * 4096 * (2 * 256 + 2 * 8192) + 16 * 4096 + pages
    cut = formulas.peak(window, Recipe(32, 128))  # by 128 tokens: 2 * 4.2 MB of logits, and 8.4 MB of the head's gradients
    assert max(cut.moments, key=cut.moments.get) != "loss"
    assert cut.moments["loss"] == peak.moments["loss"] - 2 * 4 * (4096 - 128) * 8192 + 4 * 128 * 256 + 4 * (8192 * 256 + 512)


def explicit_attention(query, key, value, is_causal):
    """What the flop counter can see: it reports nothing for the fused CPU kernel."""
    assert is_causal
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


class NoModules:
    """In place of the counter's hooks on modules, which a block that is computed again does not bear."""

    parents = {"Global"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


RECIPES = [Recipe(2), Recipe(1), Recipe(2, 5), Recipe(2, recomputed=1), Recipe(1, 3, 2), Recipe(2, 3, 3, True)]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_flops_are_those_that_pytorch_counts(blocks, monkeypatch):
    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", explicit_attention)
    formulas = costs(3, width=16, heads=2, context=8, vocabulary=40)
    model = from_tensors(formulas.spec, initial_tensors(formulas.spec, torch.Generator().manual_seed(1)))
    window = formulas.table.suffix(blocks)
    freeze_outside(model, window)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        next_token_loss(model(tokens, window.first), tokens).backward()
    assert counter.get_total_flops() == formulas.flops(window, 16, Recipe(2))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.describe(2))
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_flops_of_a_recipe_are_those_that_pytorch_counts(blocks, recipe, monkeypatch):
    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", explicit_attention)
    formulas = costs(3, width=16, heads=2, context=8, vocabulary=40)
    model = from_tensors(formulas.spec, initial_tensors(formulas.spec, torch.Generator().manual_seed(1)))
    recipe = replace(recipe, recomputed=min(blocks, recipe.recomputed))  # as it is planned
    window = formulas.table.suffix(blocks)
    freeze_outside(model, window)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        for rows in tokens.split(recipe.micro_batch):
            features = features_of(model, range(window.first), rows)
            add_gradients(model, window.first, features, rows, 1 / 16, recipe, lambda unit: None)
    assert counter.get_total_flops() == formulas.flops(window, 16, recipe)


def test_flops_by_hand():
    # d=4, f=16, T=3: F = 8*16 + 4*4*16 + 4*3*4 = 432; depth 2, one trained: (2 + 2*1) F = 1728; head 6*4*5 = 120; 10 tokens
    formulas = costs(2, 4, 2, 3, 5)
    assert formulas.block.forward_flops(formulas.spec) == 432
    assert formulas.flops(formulas.table.suffix(1), 10, PLAIN) == 18480
    assert formulas.flops(Window(3, 4), 10, PLAIN) == 10 * (2 * 432 + 120)  # the head alone
    # block 0 forward, block 1 three times, and once more where it is computed again
    assert formulas.prefix_flops(range(2)) == formulas.prefix_flops(range(1, 2)) == 432 and formulas.prefix_flops(range(1)) == 0
    assert formulas.window_flops(formulas.table.suffix(1), Recipe(2, recomputed=1)) == 4 * 432 + 120
    assert formulas.flops(formulas.table.suffix(1), 10, Recipe(2, recomputed=1)) == 18480 + 4320
