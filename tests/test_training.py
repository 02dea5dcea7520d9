"""Local training and evaluation: which rows, which rate, which tensors move, and figures that can be worked out by hand."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SPEC, TEXTS, model, same_bits, tokenizer, tokens, weights

from distfl.config import TrainingConfig
from distfl.costs import Costs
from distfl.errors import NotFinite
from distfl.features import FeatureFile, Prefix
from distfl.messages import Assignment, Score
from distfl.model import IGNORED_TARGET, from_tensors, next_token_loss
from distfl.optimizers import SGD, AdamW
from distfl.recipes import Recipe
from distfl.shards import TOKEN, Sequences
from distfl.training import Trained, batches, evaluate, learning_rate, optimizer_for, state_tensors, train
from distfl.units import UnitTable, Window, freeze_outside

PLAIN = TrainingConfig(batch=2, steps=3, optimizer="sgd", learning_rate=99.0, clip_norm=None)  # 99: the assignment's rate must be used
PLAIN_STEP = Recipe(99)  # any batch at once


def assignment(rate: float, round: int = 1, client: int = 3, first: int = 0, recipe: Recipe = PLAIN_STEP) -> Assignment:
    return Assignment(round, client, Window(first, SPEC.depth + 2), 1.0, 0, 0, 0, 0, recipe, rate)


def costs(config: TrainingConfig) -> Costs:
    return Costs(UnitTable(SPEC), config.batch, state_tensors(config))


def run(network, config: TrainingConfig, order: Assignment, data: Sequences | None = None, seed: int = 1) -> Trained:
    """Train what the assignment's window holds."""
    parameters = freeze_outside(network, order.window)
    prefix = Prefix(network, order.window.first, {})
    return train(network, parameters, data or text(), config, order, prefix, costs(config), seed)


def text() -> Sequences:
    ids = [token for line in TEXTS for token in (*tokenizer().encode(line).ids, 0)]
    return Sequences(np.array(ids[:-2], TOKEN), SPEC.context)  # without the last two the last row is short


def values(network) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.named_tensors().items()}


# --- batches -----------------------------------------------------------------------------------------------------------------------


def chosen(rows: int, seed: int = 1, round: int = 1, client: int = 0, **settings) -> list[list[int]]:
    return list(batches(TrainingConfig(**settings), rows, seed, round, client))


@pytest.mark.parametrize("rows, batch", [(1, 4), (4, 4), (5, 2), (10, 3), (12, 4)])
def test_each_epoch_visits_each_row_once(rows, batch):
    steps, per_epoch = chosen(rows, batch=batch, epochs=3), math.ceil(rows / batch)
    assert len(steps) == 3 * per_epoch
    for epoch in range(3):
        part = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(itertools.chain(*part)) == list(range(rows))
        assert [len(step) for step in part[:-1]] == [batch] * (per_epoch - 1)


def test_epochs_have_orders_of_their_own():
    steps = chosen(20, batch=20, epochs=2)
    assert steps[0] != steps[1] and steps[0] != list(range(20))


@pytest.mark.parametrize("rows, batch, size", [(5, 2, 2), (10, 3, 3), (3, 8, 3), (4, 4, 4), (1, 8, 1)])
def test_fixed_steps_are_full_batches(rows, batch, size):
    steps = chosen(rows, batch=batch, steps=7)
    assert [len(step) for step in steps] == [size] * 7  # all rows where the client has fewer than a batch
    per_pass = rows // size
    for start in range(0, 7, per_pass):  # within a pass no row comes twice
        part = list(itertools.chain(*steps[start : start + per_pass]))
        assert len(set(part)) == len(part) and set(part) <= set(range(rows))


def test_fixed_steps_reach_every_row():
    assert set(itertools.chain(*chosen(5, batch=2, steps=40))) == set(range(5))


@pytest.mark.parametrize("settings", [{"epochs": 2}, {"steps": 9}])
def test_order_depends_on_seed_round_and_client_alone(settings):
    base = chosen(16, batch=4, **settings)
    first, second = (batches(TrainingConfig(batch=4, **settings), 16, 1, 1, client) for client in (0, 1))
    interleaved = [rows for rows, _ in itertools.zip_longest(first, second)]  # another client drawing in between
    np.random.seed(0)
    assert base == chosen(16, batch=4, **settings) == interleaved
    for other in ({"seed": 2}, {"round": 2}, {"client": 1}):
        assert chosen(16, batch=4, **settings, **other) != base


def test_no_work_is_no_batch():
    assert chosen(5, batch=2, steps=0) == chosen(5, batch=2, epochs=0) == []


# --- learning rate -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, final, wanted",
    [
        ("constant", 0.2, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", None, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.2, [1.0, 0.8, 0.6, 0.4, 0.2]),  # 0.8 to go in 4 steps of 0.2
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        # 1 - 0.8 (1 - cos(pi p)) / 2 at p = 0, 1/4, 1/2, 3/4, 1; cos(pi/4) = 0.7071: (1 - 0.7071) / 2 = 0.14645, times 0.8 is 0.11716
        ("cosine", 0.2, [1.0, 0.88284, 0.6, 0.31716, 0.2]),
    ],
)
def test_schedules_by_hand(schedule, final, wanted):
    config = TrainingConfig(steps=1, learning_rate=1.0, final_learning_rate=final, schedule=schedule)
    assert [learning_rate(config, round, 5) for round in range(1, 6)] == pytest.approx(wanted, abs=1e-5)
    assert learning_rate(config, 1, 1) == 1.0  # a single round has the first rate


# --- local steps -------------------------------------------------------------------------------------------------------------------


def test_one_step_of_gradient_descent_by_hand():
    network, reference, data = model(), model(), text()
    done = run(network, replace(PLAIN, steps=1), assignment(0.1), data)
    (rows,) = batches(replace(PLAIN, steps=1), len(data), 1, 1, 3)
    inputs, targets = data.batch(rows)
    loss = next_token_loss(reference(inputs), targets)
    loss.backward()
    # 2 rows of T = 8 tokens, d=16, f=64: F = 8*256 + 4*16*64 + 4*8*16 = 6656, head 6*16*300 = 28 800: 16 * (3*3*6656 + 28 800)
    assert done == Trained(1, 2, 1_419_264, pytest.approx(loss.item()))
    for name, parameter in reference.named_parameters():
        wanted = parameter.detach() - 0.1 * parameter.grad  # values up to 2, where neighbouring floats are 1.2e-7 apart
        torch.testing.assert_close(network.get_parameter(name).detach(), wanted, rtol=0, atol=1.3e-7)
    assert all(parameter.grad is None for parameter in network.parameters())  # gradients are freed between steps


@pytest.mark.parametrize("recipe", [Recipe(2), Recipe(1), Recipe(2, 5, 2)], ids=lambda recipe: recipe.describe(2))
def test_clipping_bounds_the_whole_step(recipe):
    network = model()
    before = values(network)
    run(network, replace(PLAIN, steps=1, clip_norm=0.01), assignment(0.1, recipe=recipe))
    moved = torch.cat([(network.get_parameter(name).detach() - tensor).flatten() for name, tensor in before.items()]).norm().item()
    assert moved == pytest.approx(0.1 * 0.01, rel=0.02)  # rate times clipped norm: the gradient is far larger


@pytest.mark.parametrize("settings", [{"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.9}], ids=["adamw", "sgd"])
@pytest.mark.parametrize("recipe", [Recipe(4), Recipe(2, 7, 1)], ids=lambda recipe: recipe.describe(4))
def test_training_reduces_the_loss_on_its_text(settings, recipe):
    config = TrainingConfig(batch=4, steps=30, **settings)
    network, data = model(), text()
    before = evaluate(network, data.in_order(4)).loss
    done = run(network, config, assignment(0.01, recipe=recipe), data)
    assert done.steps == 30 and done.sequences == 120
    after = evaluate(network, data.in_order(4)).loss
    assert after < before - 0.5
    assert after < done.loss < before + 0.5  # the mean over the way


def test_figures_are_of_all_steps():
    data = text()
    config = TrainingConfig(batch=4, epochs=2, learning_rate=1.0, optimizer="sgd", clip_norm=None)
    network = model()
    done = run(network, config, assignment(0.0), data)  # rate 0: the model stays as it is
    steps = [data.batch(rows) for rows in batches(config, len(data), 1, 1, 3)]
    with torch.no_grad():
        losses = [next_token_loss(network(inputs), targets).item() for inputs, targets in steps]
    flops = 2 * len(data) * 8 * (9 * 6656 + 28_800)  # see above; padded positions are computed like all others
    assert done == Trained(2 * math.ceil(len(data) / 4), 2 * len(data), flops, pytest.approx(sum(losses) / len(losses), abs=1e-5))


def test_flops_are_those_of_the_window_its_recipe_and_the_prefix_as_it_was_computed():
    # 3 steps of 2 rows: 48 tokens; window of the last 2 blocks, so one frozen block of F = 6656 (see above); 1 block computed again
    order = assignment(0.0, first=2, recipe=Recipe(1, recomputed=1))
    done = run(model(), PLAIN, order)
    assert done.flops == 48 * (6656 + (3 * 2 + 1) * 6656 + 28_800) == costs(PLAIN).flops(order.window, 48, order.recipe)
    network = model()
    files = {2: FeatureFile(len(text()), SPEC.context, SPEC.width, (1, 1))}
    prefix = Prefix(network, 2, files)
    parameters = freeze_outside(network, order.window)
    again = [train(network, parameters, text(), PLAIN, order, prefix, costs(PLAIN), seed=1) for _ in range(2)]
    rows = len({row for batch in batches(PLAIN, len(text()), 1, 1, 3) for row in batch})
    assert [done.flops for done in again] == [rows * 8 * 6656 + 48 * (7 * 6656 + 28_800)] * 2  # each row passed the prefix once
    assert rows == 6 and again[0].loss == done.loss == again[1].loss


@pytest.mark.parametrize("recipe", [Recipe(8), Recipe(1)], ids=lambda recipe: recipe.describe(8))
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zero_steps_change_nothing(optimizer, recipe):
    network = model()
    for settings in ({"steps": 0}, {"epochs": 0}):
        config = TrainingConfig(optimizer=optimizer, weight_decay=0.1, **settings)
        assert run(network, config, assignment(1.0, recipe=recipe)) == Trained(0, 0, 0, None)
    assert same_bits(values(network), weights())


@pytest.mark.parametrize("recipe", [Recipe(2), Recipe(1), Recipe(2, 5, 2, True)], ids=lambda recipe: recipe.describe(2))
@pytest.mark.parametrize("frozen", range(SPEC.depth + 2))
def test_only_the_window_moves(frozen, recipe):
    network = model()
    config = TrainingConfig(batch=2, steps=2, weight_decay=0.1, clip_norm=None)
    run(network, config, assignment(0.01, first=frozen, recipe=recipe))
    moved = {name for name, tensor in network.named_tensors().items() if not torch.equal(tensor, weights()[name])}
    assert moved == {name for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("recipe", [Recipe(2), Recipe(1, 5, 2)], ids=lambda recipe: recipe.describe(2))
def test_the_same_round_trains_to_the_same_bits(recipe):
    config = TrainingConfig(batch=2, steps=3)

    def result(seed=1, **which):
        network = model()
        run(network, config, assignment(0.01, recipe=recipe, **which), seed=seed)
        return values(network)

    assert same_bits(result(), result())
    for other in ({"seed": 2}, {"round": 2}, {"client": 4}):
        assert not same_bits(result(), result(**other))


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", [Recipe(2), Recipe(1, 5, 2), Recipe(2, fused_update=True)], ids=lambda recipe: recipe.describe(2))
def test_a_loss_that_is_not_finite_is_named(damage, recipe):
    network = model()
    with torch.no_grad():
        network.head.norm.bias[0] = damage
    with pytest.raises(NotFinite, match="(?s)client 3.*step 1.*training.learning_rate.*training.clip_norm"):
        run(network, PLAIN, assignment(0.1, recipe=recipe))


def test_a_diverging_client_is_stopped():
    network = model()
    with pytest.raises(NotFinite, match="client 3"):
        run(network, replace(PLAIN, steps=20), assignment(1e20))


def test_optimizers_are_made_as_configured():
    parameters = list(model().parameters())
    adamw = optimizer_for(TrainingConfig(steps=1, betas=(0.5, 0.6), weight_decay=0.1), parameters)
    assert isinstance(adamw, AdamW) and (adamw.betas, adamw.weight_decay) == ((0.5, 0.6), 0.1)
    sgd = optimizer_for(TrainingConfig(steps=1, optimizer="sgd", momentum=0.7, weight_decay=0.2), parameters)
    assert isinstance(sgd, SGD) and (sgd.momentum, sgd.weight_decay) == (0.7, 0.2)


@pytest.mark.parametrize(
    "settings, count", [({"optimizer": "adamw"}, 2), ({"optimizer": "sgd"}, 0), ({"optimizer": "sgd", "momentum": 0.9}, 1)]
)
def test_state_tensors_are_as_many_as_the_optimiser_holds(settings, count):
    config = TrainingConfig(steps=1, **settings)
    assert state_tensors(config) == count
    parameter = torch.nn.Parameter(torch.ones(50))
    parameter.grad = torch.ones(50)
    optimizer = optimizer_for(config, [parameter])
    optimizer.step(0.1)
    held = [entry for state in vars(optimizer).values() if isinstance(state, list) for entry in state]
    assert sum(tensor is not parameter and tensor is not None and tensor.numel() == 50 for tensor in held) == count


# --- evaluation --------------------------------------------------------------------------------------------------------------------


def test_a_blank_model_scores_the_uniform_loss():
    # All weights zero: every logit is 0, the loss of each target ln 300, and the most likely token (the first of equals) is 0.
    blank = from_tensors(SPEC, {name: torch.zeros_like(tensor) for name, tensor in weights().items()})
    no = IGNORED_TARGET
    first = (tokens(2, 4), torch.tensor([[0, 1, 0, 2], [3, no, no, no]]))
    second = (tokens(1, 4), torch.tensor([[0, no, no, no]]))
    score = evaluate(blank, iter([first, second]))
    assert score == Score(pytest.approx(6 * math.log(300), rel=1e-6), 3, 6)  # targets that count: 5 + 1; zeros among them: 2 + 1
    assert score.loss == pytest.approx(math.log(300)) and score.accuracy == 0.5


def test_scores_are_sums_over_targets_not_means_over_batches():
    network, data = model(), text()
    total, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for row in range(len(data)):
            inputs, targets = data.batch([row])
            chances = network(inputs)[0].softmax(-1)
            for position, target in enumerate(targets[0].tolist()):
                if target != IGNORED_TARGET:
                    total -= math.log(chances[position, target])
                    correct += int(chances[position].argmax()) == target
                    count += 1
    assert (data.batch([len(data) - 1])[1] == IGNORED_TARGET).any()  # the last row is short
    for batch in (1, 3, 100):
        assert evaluate(network, data.in_order(batch)) == Score(pytest.approx(total, rel=1e-5), correct, count)
    assert count == len(data.tokens) - 1


def test_no_text_has_no_score():
    score = evaluate(model(), [])
    assert score == Score(0.0, 0, 0) and score.loss is None and score.accuracy is None


def test_evaluation_keeps_nothing_for_backward():
    network = model()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
        evaluate(network, text().in_order(4))
    assert saved == []
