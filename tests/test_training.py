"""Local training and evaluation: which rows, which rate, which tensors move, and figures that can be worked out by hand."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SPEC, TEXTS, model, same_bits, tokenizer, tokens, weights

from distfl.config import TrainingConfig
from distfl.errors import NotFinite
from distfl.messages import Assignment, Score
from distfl.model import IGNORED_TARGET, from_tensors, next_token_loss
from distfl.optimizers import SGD, AdamW
from distfl.shards import TOKEN, Sequences
from distfl.training import Trained, batches, evaluate, learning_rate, optimizer_for, state_tensors, train
from distfl.units import Window, freeze_outside

PLAIN = TrainingConfig(batch=2, steps=3, optimizer="sgd", learning_rate=99.0, clip_norm=None)  # 99: the assignment's rate must be used


def assignment(rate: float, round: int = 1, client: int = 3) -> Assignment:
    return Assignment(round, client, Window(0, SPEC.depth + 2), 1.0, 0, 0, rate)


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
    done = train(network, list(network.parameters()), 0, data, replace(PLAIN, steps=1), assignment(0.1), seed=1)
    (rows,) = batches(replace(PLAIN, steps=1), len(data), 1, 1, 3)
    inputs, targets = data.batch(rows)
    loss = next_token_loss(reference(inputs), targets)
    loss.backward()
    assert done == Trained(1, 2, pytest.approx(loss.item()))
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(network.get_parameter(name).detach(), parameter.detach() - 0.1 * parameter.grad, rtol=0, atol=1e-7)
    assert all(parameter.grad is None for parameter in network.parameters())  # gradients are freed between steps


def test_clipping_bounds_the_whole_step():
    network = model()
    before = values(network)
    train(network, list(network.parameters()), 0, text(), replace(PLAIN, steps=1, clip_norm=0.01), assignment(0.1), seed=1)
    moved = torch.cat([(network.get_parameter(name).detach() - tensor).flatten() for name, tensor in before.items()]).norm().item()
    assert moved == pytest.approx(0.1 * 0.01, rel=0.02)  # rate times clipped norm: the gradient is far larger


@pytest.mark.parametrize("settings", [{"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.9}], ids=["adamw", "sgd"])
def test_training_reduces_the_loss_on_its_text(settings):
    config = TrainingConfig(batch=4, steps=30, **settings)
    network, data = model(), text()
    before = evaluate(network, data.in_order(4)).loss
    done = train(network, list(network.parameters()), 0, data, config, assignment(0.01), seed=1)
    assert done.steps == 30 and done.sequences == 120
    after = evaluate(network, data.in_order(4)).loss
    assert after < before - 0.5
    assert after < done.loss < before + 0.5  # the mean over the way


def test_figures_are_of_all_steps():
    data = text()
    config = TrainingConfig(batch=4, epochs=2, learning_rate=1.0, optimizer="sgd", clip_norm=None)
    network = model()
    done = train(network, list(network.parameters()), 0, data, config, assignment(0.0), seed=1)  # rate 0: the model stays as it is
    steps = [data.batch(rows) for rows in batches(config, len(data), 1, 1, 3)]
    with torch.no_grad():
        losses = [next_token_loss(network(inputs), targets).item() for inputs, targets in steps]
    assert done == Trained(2 * math.ceil(len(data) / 4), 2 * len(data), pytest.approx(sum(losses) / len(losses), abs=1e-5))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zero_steps_change_nothing(optimizer):
    network = model()
    for settings in ({"steps": 0}, {"epochs": 0}):
        config = TrainingConfig(optimizer=optimizer, weight_decay=0.1, **settings)
        assert train(network, list(network.parameters()), 0, text(), config, assignment(1.0), seed=1) == Trained(0, 0, None)
    assert same_bits(values(network), weights())


@pytest.mark.parametrize("frozen", range(SPEC.depth + 2))
def test_only_the_window_moves(frozen):
    network = model()
    parameters = freeze_outside(network, Window(frozen, SPEC.depth + 2))
    train(network, parameters, frozen, text(), TrainingConfig(batch=2, steps=2, weight_decay=0.1), assignment(0.01), seed=1)
    moved = {name for name, tensor in network.named_tensors().items() if not torch.equal(tensor, weights()[name])}
    assert moved == {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_the_same_round_trains_to_the_same_bits():
    config = TrainingConfig(batch=2, steps=3)

    def result(seed=1, **which):
        network = model()
        train(network, list(network.parameters()), 0, text(), config, assignment(0.01, **which), seed)
        return values(network)

    assert same_bits(result(), result())
    for other in ({"seed": 2}, {"round": 2}, {"client": 4}):
        assert not same_bits(result(), result(**other))


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named(damage):
    network = model()
    with torch.no_grad():
        network.head.norm.bias[0] = damage
    with pytest.raises(NotFinite, match="(?s)client 3.*step 1.*training.learning_rate.*training.clip_norm"):
        train(network, list(network.parameters()), 0, text(), PLAIN, assignment(0.1), seed=1)


def test_a_diverging_client_is_stopped():
    network = model()
    with pytest.raises(NotFinite, match="client 3"):
        train(network, list(network.parameters()), 0, text(), replace(PLAIN, steps=20), assignment(1e20), seed=1)


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
