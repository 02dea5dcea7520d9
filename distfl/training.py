"""One client's local training, and evaluation of a model on clients' test text. Nothing distributed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from distfl import seeds
from distfl.config import TrainingConfig
from distfl.errors import NotFinite
from distfl.messages import Assignment, Score
from distfl.model import IGNORED_TARGET, TinyTransformer, next_token_loss
from distfl.optimizers import SGD, AdamW, clip_gradients
from distfl.shards import Sequences


@dataclass(frozen=True)
class Trained:
    """What local training did: steps taken, sequences seen (repetitions count), mean loss in nats per token."""

    steps: int
    sequences: int
    loss: float | None


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
    frozen_units: int,
    data: Sequences,
    config: TrainingConfig,
    assignment: Assignment,
    seed: int,
) -> Trained:
    """Local steps of one client in one round.

    Args:
        parameters: what the optimiser may touch.
        frozen_units: leading units that run without gradient.

    Raises:
        NotFinite: the loss is not a number.
    """
    optimizer = optimizer_for(config, parameters)
    total, steps, sequences = 0.0, 0, 0
    for rows in batches(config, len(data), seed, assignment.round, assignment.client):
        loss = _step(model, parameters, frozen_units, data.batch(rows), config, optimizer, assignment.learning_rate)
        steps, sequences, total = steps + 1, sequences + len(rows), total + loss
        if not math.isfinite(loss):
            raise NotFinite(
                f"training of client {assignment.client}",
                f"loss {loss} at step {steps}",
                "lower training.learning_rate or set training.clip_norm",
            )
    return Trained(steps, sequences, total / steps if steps else None)


def _step(
    model: TinyTransformer,
    parameters: list[Parameter],
    frozen_units: int,
    batch: tuple[Tensor, Tensor],
    config: TrainingConfig,
    optimizer: AdamW | SGD,
    rate: float,
) -> float:
    inputs, targets = batch
    loss = next_token_loss(model(inputs, frozen_units), targets)
    loss.backward()
    if config.clip_norm is not None:
        clip_gradients(parameters, config.clip_norm)
    optimizer.step(rate)
    for parameter in parameters:
        parameter.grad = None
    return loss.item()


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
