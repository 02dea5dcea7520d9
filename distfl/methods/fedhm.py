"""FedHM: weak clients train the factors of matrices that were cut off by their singular values, the server multiplies them back.

Source: Yao et al. 2021, "FedHM: Efficient Federated Learning for Heterogeneous Models via Low-rank Factorization", arXiv 2111.14655: a
client is sent W ~ (U_r sqrt(S_r)) (sqrt(S_r) V_r^T), or W itself, trains and sends that; the mean is one of whole matrices, and is
factored anew. Weights, optimiser state, upload and FLOPs fall with r < inputs outputs / (inputs + outputs); activations do not.

What a factored client is not sent is gone from what it sends: where few clients hold whole matrices the mean loses what lies beyond
the ranks of the others, which hurts a pretrained model. (For those the authors' code factors the difference to the pretrained
matrices: LoRA with singular values, which here is ``flexlora``.) The mean is weighted by numbers of samples, the authors' is not. No rank
spares anything of a square matrix from half its width on. Left out: the authors' code adds the server's last model as one more
member where no client held whole matrices, and decays products in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from distfl.costs import WholeBlock
from distfl.messages import NOT_HELD, Assignment, Piece, Region
from distfl.methods.base import Detail, MeanOf
from distfl.methods.fedavg import CommonDepth
from distfl.model import Linear, ModelSpec, TinyTransformer
from distfl.settings import require
from distfl.singular import truncated
from distfl.units import TensorSpec, Unit, Window, one_after_another

MATRICES = ("qkv", "proj", "fc1", "fc2")
FACTORS = (".left", ".right")
LEAST_SHARE = 1e-7  # of the largest singular value: a column of nothing but zeros in both factors would never learn


@dataclass(frozen=True)
class Options:
    """Args:
    ratios: ranks of factored matrices, as shares of the width. A client holds whole matrices if its budget admits that, else
        factors of the largest of these ranks that it admits.
    """

    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)

    def __post_init__(self) -> None:
        apart = 0 < len(self.ratios) == len(set(self.ratios)) and 0 < min(self.ratios) <= max(self.ratios) <= 1
        require(apart, "ratios", self.ratios, "at least one share above 0, none above 1, none of them twice")

    def rank(self, ratio: float, width: int) -> int:
        """Of every matrix: the smaller side of each of them is the width."""
        return max(1, round(ratio * width))


class FedHm(CommonDepth):
    """Ranks of whole matrices by budget. ``detail["rank"]`` = 0: whole."""

    Options = Options
    source = "arXiv 2111.14655"
    new_basis = True
    derives = True

    def details(self, spec: ModelSpec, window: Window) -> Sequence[Detail]:
        ratios = sorted(self.options.ratios, reverse=True)
        return [{"rank": 0}, *({"rank": self.options.rank(ratio, spec.width)} for ratio in ratios)]

    def prepare(self, model: TinyTransformer) -> None:
        rank = self.options.rank(max(self.options.ratios), model.spec.width)
        for block in model.blocks:
            for name in MATRICES:
                setattr(block, name, Factored(getattr(block, name), rank))

    def initial(self, pretrained: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        shared = dict(pretrained)
        for name, weight in pretrained.items():
            if name.startswith("blocks.") and len(weight.shape) == 2:
                rank = self.options.rank(max(self.options.ratios), min(weight.shape))
                shared |= zip(_factors_of(name), factored(weight, rank))
        return shared

    def deployed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(FACTORS)}

    def part(self, tensor: TensorSpec, detail: Detail) -> Region:
        rank = detail.get("rank", 0)
        if tensor.name.endswith(FACTORS):
            if not rank:
                return NOT_HELD if detail else None
            rows, columns = map(np.arange, tensor.shape)
            return (rows, columns[:rank]) if tensor.name.endswith(".left") else (rows[:rank], columns)
        return NOT_HELD if rank and tensor.name.startswith("blocks.") and len(tensor.shape) == 2 else None

    def block(self, spec: ModelSpec, detail: Detail) -> WholeBlock:
        return FactoredBlock(detail["rank"]) if detail.get("rank") else WholeBlock()

    def mean_unit(self, unit: Unit) -> Unit:
        return Unit(unit.index, unit.name, one_after_another([(t.name, t.shape) for t in unit.tensors if not t.name.endswith(FACTORS)]))

    def restore(self, pieces: list[Piece], assignment: Assignment) -> list[Piece]:
        by_name = {piece.name: piece for piece in pieces}
        found = [piece for piece in pieces if not piece.name.endswith(FACTORS)]
        for name, piece in by_name.items():
            if name.endswith(".left"):
                layer = name.removesuffix(".left")
                product = piece.values @ by_name[f"{layer}.right"].values
                found.append(Piece(piece.unit, f"{layer}.weight", None, product, piece.weight))
        return found

    def finish(self, unit: Unit, shared: Mapping[str, Tensor], mean_of: MeanOf) -> Iterator[tuple[str, Tensor]]:
        for tensor in self.mean_unit(unit).tensors:
            mean = mean_of(tensor.name)[0]
            yield tensor.name, mean
            left, right = _factors_of(tensor.name)
            if left in shared:
                yield from zip((left, right), factored(mean, shared[left].shape[1]))


def _factors_of(matrix: str) -> tuple[str, str]:
    layer = matrix.removesuffix(".weight")
    return f"{layer}.left", f"{layer}.right"


def factored(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r sqrt(S_r) (outputs, r) and sqrt(S_r) V_r^T (r, inputs) of (outputs, inputs); rank at most the smaller side."""
    u, s, v = truncated(matrix, rank)
    roots = s.clamp_min(max(LEAST_SHARE * s[0].item(), torch.finfo(torch.float32).tiny)).sqrt()
    return (u * roots).float().contiguous(), (roots[:, None] * v).float().contiguous()


class Factored(Linear):
    """A linear layer with its matrix, or the two factors it is the product of: whichever the client does not hold is None."""

    def __init__(self, layer: Linear, rank: int):
        outputs, inputs = layer.weight.shape
        super().__init__(inputs, outputs, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.left = Parameter(torch.empty(outputs, rank, device=layer.weight.device))
        self.right = Parameter(torch.empty(rank, inputs, device=layer.weight.device))

    def product(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            return super().product(x, weight)
        return F.linear(F.linear(x, self.right), self.left, self.bias)

    @property
    def keeps_input(self) -> bool:
        return True  # all of it trains


@dataclass(frozen=True)
class FactoredBlock(WholeBlock):
    """A block of four pairs of factors: it keeps the r-wide products between them besides what a whole block keeps.

    Args:
        rank: r.
    """

    rank: int

    def kept(self, spec: ModelSpec, leading: bool) -> int:
        return super().kept(spec, leading) + len(MATRICES) * self.rank

    def backward_transient(self, spec: ModelSpec) -> int:
        return super().backward_transient(spec) + self.rank

    def forward_flops(self, spec: ModelSpec) -> int:
        """2 r (inputs + outputs) for each pair, which is 32 r d, and 4 T d of attention."""
        return 32 * self.rank * spec.width + 4 * spec.context * spec.width


METHOD = FedHm
