"""One step under every recipe: the gradients of one plain backward, the same updates, and no more tensors alive than predicted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import model, same_bits, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes, client, costs_of

from distfl import costs
from distfl.config import TrainingConfig
from distfl.features import Prefix
from distfl.messages import Assignment
from distfl.model import IGNORED_TARGET, ModelSpec, next_token_loss
from distfl.recipes import Recipe
from distfl.shards import TOKEN, Sequences
from distfl.steps import add_gradients, count_targets, features_of
from distfl.training import Trained, train
from distfl.units import Window, freeze_outside

BATCH, CONTEXT = 5, 6
SPEC = ModelSpec(depth=3, width=16, heads=2, context=CONTEXT, vocabulary=40)
PLAIN = Recipe(micro_batch=BATCH)


# --- gradients ---------------------------------------------------------------------------------------------------------------------


def padded_targets(batch: int = BATCH) -> torch.Tensor:
    """Row 1 ends early and row 2 has no target at all."""
    targets = tokens(batch, CONTEXT, SPEC.vocabulary, seed=1)
    targets[1 % batch, 2:] = IGNORED_TARGET
    targets[2 % batch] = IGNORED_TARGET
    return targets


def by_autograd(spec: ModelSpec, first: int, inputs, targets) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients of the units from ``first`` on, by one backward."""
    network = model(spec)
    freeze_outside(network, Window(first, spec.depth + 2))
    loss = next_token_loss(network(inputs, first), targets)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def by_recipe(spec: ModelSpec, first: int, inputs, targets, recipe: Recipe) -> tuple[float, dict[str, torch.Tensor]]:
    network = model(spec)
    freeze_outside(network, Window(first, spec.depth + 2))
    loss = 0.0
    for start in range(0, len(inputs), recipe.micro_batch):
        part = slice(start, start + recipe.micro_batch)
        features = features_of(network, range(first), inputs[part])
        loss += add_gradients(network, first, features, targets[part], 1 / max(1, count_targets(targets)), recipe, lambda unit: None)
    return loss, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_same_gradients(first: int, inputs, targets, recipe: Recipe, spec: ModelSpec = SPEC) -> None:
    loss, gradients = by_recipe(spec, first, inputs, targets, recipe)
    wanted_loss, wanted = by_autograd(spec, first, inputs, targets)
    assert loss == pytest.approx(wanted_loss, rel=2e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("first", range(SPEC.depth + 2))  # 0 = the whole model, 4 = the head alone
@pytest.mark.parametrize(
    "recipe",
    [
        PLAIN,
        *(Recipe(size) for size in (1, 2, 3, 4)),  # of 5 sequences: 1 divides them, 2, 3 and 4 leave a rest
        *(Recipe(BATCH, chunk) for chunk in (1, 7, 15, 30, 999)),  # of 30 tokens: 7 leaves a rest of 2
        *(Recipe(BATCH, None, blocks) for blocks in (1, 2, 3, 9)),  # 9 = more than there are
        Recipe(BATCH, 7, 2),
        Recipe(2, 5, 3),  # chunks of 12 or 6 tokens
        Recipe(1, 4, 1),
    ],
    ids=lambda recipe: recipe.describe(BATCH),
)
def test_gradients_are_those_of_one_backward(first, recipe):
    assert_same_gradients(first, tokens(BATCH, CONTEXT, SPEC.vocabulary), padded_targets(), recipe)


@st.composite
def steps(draw) -> tuple:
    depth = draw(st.integers(1, 3))
    batch, length = draw(st.integers(1, 5)), draw(st.integers(1, CONTEXT))
    seed = draw(st.integers(0, 99))
    targets = tokens(batch, length, SPEC.vocabulary, seed)
    for row in range(batch):
        targets[row, draw(st.integers(0, length)) :] = IGNORED_TARGET
    targets[draw(st.integers(0, batch - 1)), 0] = 1  # the mean over no target is not a number
    recipe = Recipe(
        draw(st.integers(1, batch + 1)),
        draw(st.none() | st.integers(1, batch * length + 1)),
        draw(st.integers(0, depth + 1)),
        draw(st.booleans()),
    )
    return depth, draw(st.integers(0, depth + 1)), tokens(batch, length, SPEC.vocabulary, seed + 100), targets, recipe


@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps())
def test_gradients_are_those_of_one_backward_whatever_the_shape(case):
    depth, first, inputs, targets, recipe = case
    assert_same_gradients(first, inputs, targets, recipe, replace(SPEC, depth=depth))


def test_a_batch_without_any_target_has_no_loss_and_no_gradient():
    # the mean of nothing is not a number; a sum of nothing is 0
    loss, gradients = by_recipe(SPEC, 0, tokens(2, CONTEXT, 40), torch.full((2, CONTEXT), IGNORED_TARGET), Recipe(1, 4, 1))
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("recipe", [PLAIN, Recipe(BATCH, 7, 2)])
def test_gradients_are_added_to_those_already_there(recipe):
    inputs, targets = tokens(BATCH, CONTEXT, 40), padded_targets()
    network, once = model(SPEC), by_recipe(SPEC, 2, inputs, targets, recipe)[1]
    freeze_outside(network, Window(2, 5))
    features = features_of(network, range(2), inputs)
    before = features.clone()
    for _ in range(2):
        add_gradients(network, 2, features, targets, 1 / count_targets(targets), recipe, lambda unit: None)
    for name, gradient in once.items():
        torch.testing.assert_close(network.get_parameter(name).grad, 2 * gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
    assert torch.equal(features, before)  # blocks add in place, but not on what they are given


def test_the_plain_loss_is_that_of_the_model():
    inputs, targets = tokens(BATCH, CONTEXT, 40), padded_targets()
    for first in range(SPEC.depth + 2):
        assert by_recipe(SPEC, first, inputs, targets, PLAIN)[0] == pytest.approx(
            next_token_loss(model(SPEC)(inputs), targets).item(), abs=1e-6
        )


def test_targets_are_counted_without_padding():
    assert count_targets(padded_targets()) == 3 * 6 + 2  # rows 0, 3, 4 whole; two of row 1; none of row 2


@pytest.mark.parametrize("first", range(SPEC.depth + 2))
def test_a_unit_is_done_when_its_gradients_are_complete(first):
    inputs, targets, network = tokens(BATCH, CONTEXT, 40), padded_targets(), model(SPEC)
    freeze_outside(network, Window(first, SPEC.depth + 2))
    layers, seen = [*network.trunk(), network.head], []

    def done(unit: int) -> None:
        seen.append((unit, [p.grad.clone() for p in layers[unit].parameters()]))
        assert all(p.grad is None for layer in layers[:unit] for p in layer.parameters())  # units below are still to come

    add_gradients(network, first, features_of(network, range(first), inputs), targets, 0.1, Recipe(BATCH, 7, 1), done)
    assert [unit for unit, _ in seen] == list(range(SPEC.depth + 1, first - 1, -1))  # from the head down
    for unit, gradients in seen:
        assert all(torch.equal(then, p.grad) for then, p in zip(gradients, layers[unit].parameters()))


# How often a sequence passes each unit of the trunk within add_gradients: once what is in the window, once more what is
# recomputed; and forward calls of the head.
@pytest.mark.parametrize(
    "first, recomputed, chunk, passes, heads",
    [
        (0, 0, None, [1, 1, 1, 1], 1),
        (0, 1, None, [1, 2, 1, 1], 1),  # the embedding is no block
        (0, 3, None, [1, 2, 2, 2], 1),
        (1, 2, None, [0, 2, 2, 1], 1),
        (2, 1, None, [0, 0, 2, 1], 1),
        (2, 9, None, [0, 0, 2, 2], 1),
        (4, 9, None, [0, 0, 0, 0], 1),
        (3, 0, 7, [0, 0, 0, 1], 5),  # 30 tokens by 7
    ],
)
def test_the_first_blocks_of_the_window_are_computed_twice(first, recomputed, chunk, passes, heads):
    network, inputs = model(SPEC), tokens(BATCH, CONTEXT, 40)
    freeze_outside(network, Window(first, SPEC.depth + 2))
    features, sequences, head_calls = features_of(network, range(first), inputs), [0] * (SPEC.depth + 1), []

    def passing(unit: int, x: torch.Tensor) -> None:
        sequences[unit] += len(x)
        assert unit > first or not x.requires_grad  # nobody needs the gradient of the features

    for unit, layer in enumerate(network.trunk()):
        layer.register_forward_pre_hook(lambda _, given, unit=unit: passing(unit, given[0]))
    network.head.register_forward_pre_hook(lambda _, given: head_calls.append(given[0].numel() // SPEC.width))
    add_gradients(network, first, features, padded_targets(), 0.1, Recipe(BATCH, chunk, recomputed), lambda unit: None)
    assert sequences == [BATCH * times for times in passes]
    assert len(head_calls) == heads and sum(head_calls) == BATCH * CONTEXT


# --- frozen units ------------------------------------------------------------------------------------------------------------------


def test_features_have_the_same_bits_whatever_batch_a_sequence_is_in():
    network, inputs = model(WIDE), tokens(8, 64, WIDE.vocabulary)
    together = features_of(network, range(4), inputs)
    for rows in ([0], [7, 3], [5, 4, 3, 2, 1], list(range(8))):
        assert torch.equal(features_of(network, range(4), inputs[rows]), together[rows])
    x = inputs
    for layer in network.trunk()[:4]:
        x = layer(x)
    torch.testing.assert_close(together, x.detach(), rtol=1e-4, atol=1e-4)


def test_frozen_units_run_one_sequence_at_a_time_and_keep_nothing():
    network, sizes = model(SPEC), []
    for layer in network.trunk():
        layer.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    features = features_of(network, range(3), tokens(4, CONTEXT, 40))
    assert sizes == [1] * 12  # 4 sequences through 3 units
    assert features.shape == (4, CONTEXT, 16) and not features.requires_grad


def test_features_of_features_are_those_of_all_units():
    network, inputs = model(SPEC), tokens(4, CONTEXT, 40)
    half = features_of(network, range(2), inputs)
    assert torch.equal(features_of(network, range(2, 4), half), features_of(network, range(4), inputs))
    assert features_of(network, range(0), inputs) is inputs
    assert features_of(network, range(2, 2), half) is half


# --- steps of training -------------------------------------------------------------------------------------------------------------

ADAMW = TrainingConfig(batch=BATCH, epochs=3, optimizer="adamw", weight_decay=0.1, clip_norm=None)
SGD = TrainingConfig(batch=BATCH, epochs=3, optimizer="sgd", momentum=0.9, weight_decay=0.1, clip_norm=None)


def trained(config: TrainingConfig, first: int, recipe: Recipe, rate: float = 0.05) -> tuple[dict[str, torch.Tensor], Trained]:
    """13 rows, the last one short: three steps an epoch, the third of 3 rows."""
    network, window = model(SPEC), Window(first, SPEC.depth + 2)
    data = Sequences(tokens(1, 12 * CONTEXT + 4, 40)[0].numpy().astype(TOKEN), CONTEXT)
    assignment = Assignment(1, 0, window, 1.0, 0, 0, 0, 0, recipe, rate)
    parameters = freeze_outside(network, window)
    done = train(network, parameters, data, config, assignment, Prefix(network, first, {}), costs_of(SPEC, config), seed=1)
    assert done.steps == 9 and done.sequences == 39
    return network.named_tensors(), done


@pytest.mark.parametrize("first", [0, 1, 3, 4])
@pytest.mark.parametrize("config", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("recipe", [PLAIN, Recipe(BATCH, 7, 2)], ids=["plain", "levers"])
def test_the_fused_update_leaves_the_very_bits_of_the_update_after_backward(first, config, recipe):
    after, fused = (trained(config, first, replace(recipe, fused_update=fused)) for fused in (False, True))
    assert same_bits(after[0], fused[0]) and after[1] == fused[1]
    moved = {name for name, tensor in model(SPEC).named_tensors().items() if not torch.equal(tensor, after[0][name])}
    assert moved == {p for unit in range(first, 5) for p in names_of(unit)}


def names_of(unit: int) -> list[str]:
    return [tensor.name for tensor in costs_of(SPEC, SGD).table[unit].tensors]


@pytest.mark.parametrize("first", [0, 2, 4])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(
    "recipe", [Recipe(1), Recipe(2, 5), Recipe(3, None, 3), Recipe(BATCH, 7, 2), Recipe(2, 4, 3)], ids=lambda r: r.describe(5)
)
def test_after_nine_steps_with_levers_the_model_is_that_without(first, clip_norm, recipe):
    # by gradient descent: Adam turns the rounding of a gradient that is zero (biases of keys) into a whole step
    config = replace(SGD, clip_norm=clip_norm)
    with_levers, without = (trained(config, first, which) for which in (recipe, PLAIN))
    assert with_levers[1].loss == pytest.approx(without[1].loss, rel=1e-5)
    for name, tensor in without[0].items():
        torch.testing.assert_close(with_levers[0][name], tensor, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_adding_up_starts_from_zero_at_every_step():
    config = replace(ADAMW, clip_norm=1.0)
    assert trained(config, 2, Recipe(2), 1e-3)[1].loss == pytest.approx(trained(config, 2, PLAIN, 1e-3)[1].loss, rel=1e-4)


# --- memory ------------------------------------------------------------------------------------------------------------------------

WIDE = ModelSpec(depth=4, width=64, heads=4, context=64, vocabulary=600)
MEMORY = TrainingConfig(batch=8, steps=2, clip_norm=None)


def test_live_bytes_follow_tensors_until_they_are_freed():
    before = torch.ones(50)
    with LiveBytes() as live:
        x = torch.zeros(1000, requires_grad=True)  # 4000 bytes
        y = (x.view(10, 100) + before[0]).exp()  # the sum is freed, exp keeps its output for backward
        assert (live.now, live.peak) == (8000, 12000)
        z = y.sum()
        del y
        assert live.now == 8004  # the graph holds it
        z.backward()
        del z
        assert live.now == 8000  # x and its gradient
        del x
        assert live.now == 0
        kept = torch.from_numpy(np.ones(7, np.float32)).clone()
        assert live.now == kept.nbytes


@pytest.fixture
def tensors_alone(monkeypatch):
    """Predictions without what is no tensor: pages of mappings, holes in the heap."""
    monkeypatch.setattr(costs, "PAGE_BYTES", 0)
    monkeypatch.setattr(costs, "_holes", lambda *sizes: (0, 0))
    costs._peak.cache_clear()
    yield
    costs._peak.cache_clear()


@pytest.mark.parametrize("first", [0, 1, 3, 4])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(8),
        Recipe(8, 128),
        Recipe(8, 100),
        Recipe(4),
        Recipe(1, 32),
        Recipe(8, 128, 1),
        Recipe(8, None, 4),
        Recipe(2, 64, 4),
        Recipe(8, None, 0, True),
        Recipe(8, 128, 2, True),
    ],
    ids=lambda recipe: recipe.describe(8),
)
def test_tensors_alive_at_the_peak_are_as_many_bytes_as_predicted(first, recipe, tensors_alone):
    assert_predicted(MEMORY, first, recipe)


@pytest.mark.parametrize("optimizer", [{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}], ids=["sgd", "momentum"])
@pytest.mark.parametrize("recipe", [Recipe(8), Recipe(2, 64), Recipe(8, 128, 4, True)], ids=lambda recipe: recipe.describe(8))
def test_the_prediction_follows_the_optimizer(optimizer, recipe, tensors_alone):
    assert_predicted(replace(MEMORY, **optimizer), 2, recipe)


@pytest.mark.parametrize("recipe", [Recipe(8), Recipe(2), Recipe(8, None, 0, True)], ids=lambda recipe: recipe.describe(8))
def test_the_head_alone_needs_what_is_predicted(recipe, tensors_alone):
    assert_predicted(MEMORY, WIDE.depth + 1, recipe)


def assert_predicted(config: TrainingConfig, first: int, recipe: Recipe) -> None:
    window = Window(first, WIDE.depth + 2)
    with LiveBytes() as live:
        client(WIDE, config, window, recipe)()
    assert 0.98 <= live.peak / costs_of(WIDE, config).peak(window, recipe).bytes <= 1.02
