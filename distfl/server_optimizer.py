"""What the server does with the averaged update: take it, or feed it to momentum or Adam.

FedAvg takes the mean itself; FedAvgM and FedAdam treat (mean - old) as a negative gradient
(Reddi et al. 2021, "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distfl.config import ServerConfig

DEFAULT_RATES = {"average": 1.0, "momentum": 1.0, "adam": 0.01}  # Adam's steps have the size of the rate, not of the update


class ServerOptimizer:
    """Keeps its state per tensor name; ``state`` is what a checkpoint must hold."""

    def __init__(self, config: ServerConfig):
        self.config = config
        self.rate = DEFAULT_RATES[config.optimizer] if config.learning_rate is None else config.learning_rate
        self.state: dict[str, Tensor] = {}

    def step(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        """The next value of one tensor, given the method's new one."""
        kind = self.config.optimizer
        return new if kind == "average" else self._momentum(name, old, new) if kind == "momentum" else self._adam(name, old, new)

    def states_of(self, name: str) -> dict[str, Tensor]:
        """What is kept for one tensor, by name."""
        return {key: tensor for key, tensor in self.state.items() if key.partition("/")[2] == name}

    def _momentum(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        velocity = self._state(f"velocity/{name}", old).mul_(self.config.momentum).add_(new - old)
        return old + self.rate * velocity

    def _adam(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        update, (first, second) = new - old, self.config.betas
        mean = self._state(f"mean/{name}", old).mul_(first).add_(update, alpha=1 - first)
        square = self._state(f"square/{name}", old).mul_(second).addcmul_(update, update, value=1 - second)
        return old + self.rate * mean / (square.sqrt() + self.config.epsilon)

    def _state(self, name: str, like: Tensor) -> Tensor:
        return self.state.setdefault(name, torch.zeros_like(like))
