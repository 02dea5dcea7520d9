"""Local optimisers on PyTorch's own functional kernels.

``torch.optim.AdamW(...)`` imports the whole of ``torch._dynamo`` when it is constructed: 1.1 s of
CPU and tens of MB on every client rank. The kernels behind it cost nothing, so state is kept
here and the arithmetic stays PyTorch's; a test holds both equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


class AdamW:
    """Decoupled weight decay Adam (Loshchilov and Hutter 2019), fused: no temporaries.

    State: two tensors like each parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], betas: tuple[float, float], weight_decay: float, epsilon: float = 1e-8):
        self.parameters, self.betas, self.weight_decay, self.epsilon = list(parameters), betas, weight_decay, epsilon
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [torch.zeros(()) for _ in self.parameters]

    def step(self, learning_rate: float) -> None:
        with torch.no_grad():
            adamw(
                self.parameters,
                [p.grad for p in self.parameters],
                self.means,
                self.squares,
                [],
                self.steps,
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=learning_rate,
                weight_decay=self.weight_decay,
                eps=self.epsilon,
                maximize=False,
            )


class SGD:
    """Gradient descent with optional momentum (one tensor like each parameter), fused."""

    def __init__(self, parameters: Sequence[Tensor], momentum: float, weight_decay: float):
        self.parameters, self.momentum, self.weight_decay = list(parameters), momentum, weight_decay
        self.buffers = [torch.zeros_like(p) if momentum else None for p in self.parameters]

    def step(self, learning_rate: float) -> None:
        with torch.no_grad():
            sgd(
                self.parameters,
                [p.grad for p in self.parameters],
                self.buffers,
                fused=True,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                lr=learning_rate,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


def clip_gradients(parameters: Sequence[Tensor], largest_norm: float) -> float:
    """Scale all gradients in place so that their joint norm is at most ``largest_norm``; returns the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, largest_norm))
