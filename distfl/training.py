"""One client's local training, and evaluation of a model on clients' test text. Nothing distributed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from distfl import seeds
from distfl.allocator import one_heap
from distfl.config import TrainingConfig
from distfl.costs import Costs
from distfl.errors import NotFinite
from distfl.features import Prefix
from distfl.messages import Assignment, Score
from distfl.model import IGNORED_TARGET, TinyTransformer, next_token_loss
from distfl.optimizers import SGD, AdamW, clip_gradients
from distfl.shards import Sequences
from distfl.steps import add_gradients, count_targets

SURELY_USED = 0.85  # of the predicted peak, what is made and let go within steps


@dataclass(frozen=True)
class Trained:
    """What local training did: steps taken, sequences seen (repetitions count), FLOPs, mean loss in nats per token; whether it was
    stopped before it was done."""

    steps: int
    sequences: int
    flops: int
    loss: float | None
    late: bool = False


def learning_rate(config: TrainingConfig, round: int, rounds: int) -> float:
    """Of one round (1 .. rounds): constant, or from the first to the final rate along a line or a half cosine."""
    first = config.learning_rate
    last = first if config.final_learning_rate is None else config.final_learning_rate
    progress = (round - 1) / max(1, rounds - 1)
    bend = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[config.schedule]
    return first + (last - first) * bend


def optimizer_for(config: TrainingConfig, parameters: list[Parameter]) -> AdamW | SGD:
    """A fresh local optimiser: its state never outlives the round."""
    if config.optimizer == "adamw":
        return AdamW(parameters, config.betas, config.weight_decay)
    return SGD(parameters, config.momentum, config.weight_decay)


def state_tensors(config: TrainingConfig) -> int:
    """Optimiser tensors per trained parameter."""
    return 2 if config.optimizer == "adamw" else 1 if config.momentum else 0


def batches(config: TrainingConfig, rows: int, seed: int, round: int, client: int) -> Iterator[list[int]]:
    """Row numbers of every step: each pass in its own random order, the last batch of a pass may be short."""
    if rows == 0:
        return
    draws = seeds.generator(seed, "batches", round, client)
    step, epoch = 0, 0
    while epoch < config.epochs if config.epochs is not None else step < config.steps:
        order = draws.permutation(rows)
        for start in range(0, rows, config.batch):
            if config.steps is not None and step == config.steps:
                return
            chosen = order[start : start + config.batch]
            if config.steps is not None and len(chosen) < min(config.batch, rows):
                break  # with a fixed number of steps every step is full
            yield chosen.tolist()
            step += 1
        epoch += 1


def train(
    model: TinyTransformer,
    parameters: list[Parameter],
    data: Sequences,
    config: TrainingConfig,
    assignment: Assignment,
    prefix: Prefix,
    costs: Costs,
    seed: int,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Trained:
    """Local steps of one client in one round, computed by its assignment's recipe.

    Args:
        parameters: what the optimiser may touch.
        prefix: the frozen units below the window.
        costs: to count FLOPs with.
        may_go_on: asked before every batch; False stops it there.

    Raises:
        NotFinite: the loss is not a number.
    """
    plan = batches(config, len(data), seed, assignment.round, assignment.client)
    if (first := next(plan, None)) is None:
        return Trained(0, 0, 0, None)
    step = _Step(model, parameters, config, assignment, prefix, len(data))
    total, steps, sequences, late = 0.0, 0, 0, False
    peak = costs.peak(assignment.window, assignment.recipe)
    with one_heap(int(SURELY_USED * (peak.activations + peak.transient))):
        for rows in chain([first], plan):
            if late := not may_go_on():
                break
            loss = step(rows, *data.batch(rows))
            steps, sequences, total = steps + 1, sequences + len(rows), total + loss
            if not math.isfinite(loss):
                raise NotFinite(
                    f"training of client {assignment.client}",
                    f"loss {loss} at step {steps}",
                    "lower training.learning_rate or set training.clip_norm",
                )
    for parameter in parameters:
        parameter.grad = None  # the message will need the room
    context = data.context
    flops = sequences * context * costs.window_flops(assignment.window, assignment.recipe)
    flops += context * sum(count * costs.prefix_flops(units) for units, count in prefix.computed.items())
    return Trained(steps, sequences, flops, total / steps if steps else None, late)


class _Step:
    """One optimiser step; what outlives it is made here, before the first activation exists."""

    def __init__(
        self, model: TinyTransformer, parameters: list[Parameter], config: TrainingConfig, assignment: Assignment, prefix: Prefix, rows: int
    ):
        self._model, self._parameters, self._config, self._assignment, self._prefix = model, parameters, config, assignment, prefix
        trained = {id(parameter) for parameter in parameters}
        by_unit = {unit: [p for p in part.parameters() if id(p) in trained] for unit, part in enumerate(model.parts())}
        self._optimizers = {unit: optimizer_for(config, own) for unit, own in by_unit.items() if own}
        batch, recipe = min(config.batch, rows), assignment.recipe
        added_up: Iterable[nn.Module] = ()
        if recipe.keeps_gradients(batch):
            added_up = [model]
        elif recipe.keeps_head_gradients(batch, model.spec.context):
            added_up = model.classifiers().values()
        self._kept = {id(parameter) for module in added_up for parameter in module.parameters()} & trained
        for parameter in parameters:
            if id(parameter) in self._kept:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self, rows: list[int], inputs: Tensor, targets: Tensor) -> float:
        """Returns the loss in nats per target."""
        recipe, first = self._assignment.recipe, self._assignment.window.first
        loss, scale = 0.0, 1 / max(1, count_targets(targets))
        for start in range(0, len(rows), recipe.micro_batch):
            part = slice(start, start + recipe.micro_batch)
            features = self._prefix(rows[part], inputs[part])
            loss += add_gradients(self._model, first, features, targets[part], scale, recipe, self._unit_done)
            del features
        if not recipe.fused_update:
            if self._config.clip_norm is not None:
                clip_gradients(self._parameters, self._config.clip_norm)
            for unit in self._optimizers:
                self._update(unit)
        return loss

    def _unit_done(self, unit: int) -> None:
        if self._assignment.recipe.fused_update and unit in self._optimizers:
            self._update(unit)

    def _update(self, unit: int) -> None:
        optimizer = self._optimizers[unit]
        optimizer.step(self._assignment.learning_rate)
        for parameter in optimizer.parameters:
            if id(parameter) in self._kept:
                parameter.grad.zero_()
            else:
                parameter.grad = None


def evaluate(model: TinyTransformer, batches_of_text: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Held-out loss and accuracy over batches of (inputs, targets)."""
    score = Score(0.0, 0, 0)
    model.eval()
    with torch.no_grad():
        for inputs, targets in batches_of_text:
            logits = model(inputs)
            score += Score(
                next_token_loss(logits, targets, "sum").item(),
                int((logits.argmax(-1) == targets).sum()),
                int((targets != IGNORED_TARGET).sum()),
            )
    return score
