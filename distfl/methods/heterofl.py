"""HeteroFL: every client trains a narrower model, cut out of the shared one by leading channels.

Source: Diao, Ding, Tarokh 2021, "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients",
arXiv 2010.01264 (ICLR 2021): a client of rate rho holds the first rho n channels of every hidden layer; its hidden
activations are divided by rho in training (the paper's scaler), so that the layers behind them see sums of the usual size; every entry
becomes the mean over those who hold it, weighted by training sequences here, unweighted in the authors' code. Its knob lessens
activations, weights and FLOPs alike.

Ours, for a pretrained Transformer: hidden are the attention heads and the feed-forward layer; the width of the residual stream, on
which norms and embedding were trained, stays. Left out: the loss masked to a client's own classes, which is for class labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distfl.costs import WholeBlock
from distfl.messages import Assignment, Region
from distfl.methods.base import Detail
from distfl.methods.fedavg import CommonDepth
from distfl.model import Linear, ModelSpec, TinyTransformer
from distfl.settings import require
from distfl.units import TensorSpec, Window


@dataclass(frozen=True)
class Options:
    """Args:
    widths: a client holds the largest of these shares of heads and feed-forward channels that its budget admits.
    """

    widths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)

    def __post_init__(self) -> None:
        apart = 0 < len(self.widths) == len(set(self.widths)) and 0 < min(self.widths) <= max(self.widths) <= 1
        require(apart, "widths", self.widths, "at least one share above 0, none above 1, none of them twice")


class HeteroFl(CommonDepth):
    """Widths by budget."""

    Options = Options
    source = "arXiv 2010.01264"

    def __init__(self, options: Options):
        super().__init__(options)
        whole = not self.someone_holds_all or max(options.widths) == 1
        require(whole, "widths", options.widths, "shares of which one is 1: what no client holds would be scored untrained")

    def details(self, spec: ModelSpec, window: Window) -> Sequence[Detail]:
        """``queries``: rows of queries, and of keys and of values, of whole heads; ``hidden``: channels of the feed-forward layer."""
        of_head = spec.width // spec.heads
        return [
            {"queries": of_head * max(1, round(share * spec.heads)), "hidden": max(1, round(share * spec.feedforward))}
            for share in sorted(self.options.widths, reverse=True)
        ]

    def part(self, tensor: TensorSpec, detail: Detail) -> Region:
        layer = tensor.name.rpartition(".")[0].rpartition(".")[2]
        if not detail or layer not in ("qkv", "proj", "fc1", "fc2"):
            return None
        rows = np.arange(tensor.shape[0])
        if layer == "qkv":
            rows = rows.reshape(3, -1)[:, : detail["queries"]].ravel()
        elif layer == "fc1":
            rows = rows[: detail["hidden"]]
        if len(tensor.shape) == 1:
            return rows
        columns = {"proj": detail["queries"], "fc2": detail["hidden"]}.get(layer, tensor.shape[1])
        return rows, np.arange(columns)

    def block(self, spec: ModelSpec, detail: Detail) -> WholeBlock:
        return NarrowBlock(detail["queries"], detail["hidden"]) if detail else WholeBlock()

    def hold(self, model: TinyTransformer, assignment: Assignment, seed: int) -> None:
        super().hold(model, assignment, seed)
        spec = model.spec
        for block in model.blocks:
            block.heads = len(block.qkv.bias) // 3 // (spec.width // spec.heads)
            block.proj = Scaled(block.proj, spec.width)
            block.fc2 = Scaled(block.fc2, spec.feedforward)


class Scaled(Linear):
    """A linear layer that holds but some of its input channels, divided by their share.

    Args:
        channels: all of them.
    """

    def __init__(self, layer: Linear, channels: int):
        outputs, held = layer.weight.shape
        super().__init__(held, outputs, device="meta")
        self.weight, self.bias, self.scale = layer.weight, layer.bias, channels / held

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().product(x, weight) if self.scale == 1 else _ScaledProduct.apply(x, weight, self.bias, self.scale)


class _ScaledProduct(torch.autograd.Function):
    """s x W^T + b; scaled where the products lie, so that no tensor of their size is made beside them."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight).mul_(scale).add_(bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        of_weight = (gradient.T @ x).mul_(ctx.scale)
        return (gradient @ weight).mul_(ctx.scale), of_weight, gradient.sum(0), None


@dataclass(frozen=True)
class NarrowBlock(WholeBlock):
    """A block with fewer heads and channels: 4 d + 4 q + 2 h + heads + 4 elements kept per token.

    Args:
        queries: q.
        hidden: h.
    """

    queries: int
    hidden: int

    def kept(self, spec: ModelSpec, leading: bool) -> int:
        return 4 * spec.width + 4 * self.queries + 2 * self.hidden + self.queries * spec.heads // spec.width + 4

    def widest(self, spec: ModelSpec) -> int:
        return self.hidden

    def forward_flops(self, spec: ModelSpec) -> int:
        """8 d q + 4 d h + 4 T q."""
        return 8 * spec.width * self.queries + 4 * spec.width * self.hidden + 4 * spec.context * self.queries


METHOD = HeteroFl
