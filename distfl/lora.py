"""Low-rank adapters beside frozen matrices: the layer, merging it away, and what a block with adapters costs.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1: W' = W + (alpha / r) B A,
A (r, inputs) random, B (outputs, r) zero. Equal to the ``peft`` library's LoRA layer on the same tensors (a test compares them);
written here because importing ``peft`` imports ``transformers``: 3.4 s and 108 MB on every client rank.

LoRA saves gradients, optimiser state and upload, not activations: the gradient of A needs the layer's input, which is
what the gradient of W would have needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from distfl import seeds
from distfl.costs import WholeBlock
from distfl.messages import Piece
from distfl.model import Linear, ModelSpec, TinyTransformer
from distfl.units import Unit, one_after_another

# target -> the layer it is part of, and which of the layer's equal parts of output rows: queries, keys, values are one layer's thirds
PLACES = {"q": ("qkv", 0, 3), "k": ("qkv", 1, 3), "v": ("qkv", 2, 3), "proj": ("proj", 0, 1), "fc1": ("fc1", 0, 1), "fc2": ("fc2", 0, 1)}
TARGETS = tuple(PLACES)
ATTENTION_INPUTS = frozenset("qkv")


class Adapted(Linear):
    """A linear layer with adapters: x W^T + b, and (alpha / r) (x A^T) B^T on the output rows of each target.

    Parameters ``<target>_A`` (r, inputs) and ``<target>_B`` (outputs of the target, r), on the layer's torch device.
    """

    def __init__(self, layer: Linear, targets: tuple[str, ...], rank: int, scale: float):
        outputs, inputs = layer.weight.shape
        super().__init__(inputs, outputs, device="meta")
        self.weight, self.bias, self.targets, self.scale = layer.weight, layer.bias, targets, scale
        for target in targets:
            rows = outputs // PLACES[target][2]
            self.register_parameter(f"{target}_A", Parameter(torch.empty(rank, inputs, device=layer.weight.device)))
            self.register_parameter(f"{target}_B", Parameter(torch.empty(rows, rank, device=layer.weight.device)))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        starts = [PLACES[target][1] * (len(weight) // PLACES[target][2]) for target in self.targets]
        pairs = [self.get_parameter(f"{target}_{factor}") for target in self.targets for factor in "AB"]
        return _Product.apply(x, weight, self.bias, self.scale, starts, *pairs)

    @property
    def keeps_input(self) -> bool:
        return any(self.get_parameter(f"{target}_A").requires_grad for target in self.targets)

    @property
    def kept_columns(self) -> int:
        return self.out_features + sum(len(self.get_parameter(f"{target}_A")) for target in self.targets)


class _Product(torch.autograd.Function):
    """The layer as one operation: adapters are added where the matrix's product lies, forward and backward, so that no second
    tensor of an input's or output's size exists, and x is kept only where some A trains."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, scale: float, starts: list[int], *pairs: Tensor) -> Tensor:
        out = F.linear(x, weight, bias)
        rows, out_rows, narrow = x.view(-1, x.shape[-1]), out.view(-1, len(weight)), []  # (N, inputs), (N, outputs)
        for start, down, up in zip(starts, pairs[::2], pairs[1::2]):
            narrow.append(rows @ down.T)  # (N, r)
            out_rows[:, start : start + len(up)].addmm_(narrow[-1], up.T, alpha=scale)
        wanted = ctx.needs_input_grad
        ctx.scale, ctx.starts, ctx.shape = scale, starts, x.shape
        ctx.save_for_backward(
            x if any(wanted[5::2]) else None,
            weight if wanted[0] else None,
            *(part if needed else None for part, needed in zip(narrow, wanted[6::2])),
            *pairs,
        )
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight, *rest = ctx.saved_tensors
        count = len(ctx.starts)
        narrow, pairs = rest[:count], rest[count:]
        gradient = gradient.reshape(-1, gradient.shape[-1])  # (N, outputs)
        of_input = None if weight is None else gradient @ weight
        of_pairs: list[Tensor | None] = []
        for index, start in enumerate(ctx.starts):
            down, up = pairs[2 * index : 2 * index + 2]
            part = gradient[:, start : start + len(up)]
            wants_down, wants_up = ctx.needs_input_grad[5 + 2 * index : 7 + 2 * index]
            of_narrow = (part @ up).mul_(ctx.scale) if wants_down or weight is not None else None  # (N, r)
            of_pairs.append(of_narrow.T @ x.view(-1, x.shape[-1]) if wants_down else None)
            of_pairs.append((part.T @ narrow[index]).mul_(ctx.scale) if wants_up else None)
            if of_input is not None:
                of_input.addmm_(of_narrow, down)
        return None if of_input is None else of_input.view(ctx.shape), None, None, None, None, *of_pairs


def adapt(model: TinyTransformer, targets: tuple[str, ...], rank: int, scale: float) -> None:
    """Put adapters into every block."""
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if chosen := tuple(target for target in TARGETS if target in targets and PLACES[target][0] == name):
                setattr(block, name, Adapted(layer, chosen, rank, scale))


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name is an adapter's."""
    return name.endswith(("_A", "_B"))


def initial_adapters(tensors: dict[str, Tensor], targets: tuple[str, ...], rank: int, seed: int) -> dict[str, Tensor]:
    """First values beside the plain model's tensors: A uniform in +-1/sqrt(inputs) (as in ``peft``), B zero: nothing changes yet."""
    adapters = {}
    for name, weight in tensors.items():
        layer, _, kind = name.rpartition(".")
        for target in targets if kind == "weight" else ():
            if layer.startswith("blocks.") and layer.endswith("." + PLACES[target][0]):
                outputs, inputs = weight.shape
                adapters[f"{layer}.{target}_A"] = drawn((rank, inputs), seeds.generator(seed, f"{layer}.{target}_A"))
                adapters[f"{layer}.{target}_B"] = torch.zeros(outputs // PLACES[target][2], rank)
    return adapters


def drawn(shape: tuple[int, int], draws: np.random.Generator) -> Tensor:
    """First values of an A (r, inputs)."""
    bound = 1 / math.sqrt(shape[1])
    return torch.from_numpy(draws.uniform(-bound, bound, shape)).float()


def place_of(product: str, outputs: int) -> tuple[str, slice]:
    """The matrix that a product ``<layer>.<target>`` belongs to, and which of its rows, so many for each of the layer's parts."""
    layer, _, target = product.rpartition(".")
    start = PLACES[target][1] * outputs
    return f"{layer}.weight", slice(start, start + outputs)


def merged(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The plain model's tensors, W + (alpha / r) B A in place of every adapted W; given tensors stay as they are."""
    plain = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
    for name, down in tensors.items():
        if name.endswith("_A"):
            product = name.removesuffix("_A")
            up = tensors[f"{product}_B"]
            matrix, rows = place_of(product, len(up))
            plain[matrix] = plain[matrix].clone()
            plain[matrix][rows] += scale * (up @ down)
    return plain


def mean_unit(unit: Unit) -> Unit:
    """The unit with one tensor, of the matrix's shape, in place of every pair of factors."""
    shapes = {tensor.name: tensor.shape for tensor in unit.tensors if not is_adapter(tensor.name)}
    downs = {t.name.removesuffix("_A"): t.shape for t in unit.tensors if t.name.endswith("_A")}
    ups = {t.name.removesuffix("_B"): t.shape for t in unit.tensors if t.name.endswith("_B")}
    return Unit(unit.index, unit.name, one_after_another([*shapes.items(), *((name, (ups[name][0], downs[name][1])) for name in downs)]))


def products(pieces: list[Piece]) -> list[Piece]:
    """Of every pair of factors B A, which means something whatever their ranks; other pieces as they are."""
    by_name = {piece.name: piece for piece in pieces}
    found = [piece for piece in pieces if not is_adapter(piece.name)]
    for name, down in by_name.items():
        if name.endswith("_A"):
            product = name.removesuffix("_A")
            found.append(Piece(down.unit, product, None, by_name[f"{product}_B"].values @ down.values, down.weight))
    return found


@dataclass(frozen=True)
class AdaptedBlock(WholeBlock):
    """A block that trains only adapters, per token. Elements kept, all six targets:

        8d + 2f + 6r + H + 4        A and B train: as much as a whole block, and r for each adapter
        6d +  f + 6r + H + 4        only B trains: the two normalised inputs and the GELU output are not needed

    A leading block keeps no norm statistics and, if no adapter lies before them, no queries, keys, values and so on.

    Args:
        rank: r.
        targets: of every block.
        trains_down: whether A trains.
    """

    rank: int
    targets: tuple[str, ...]
    trains_down: bool

    def kept(self, spec: ModelSpec, leading: bool) -> int:
        width, feedforward = spec.width, spec.feedforward
        attention, proj, fc1, fc2 = self._adapted()
        elements = width + self.rank * len(self.targets)  # the input is held until the block's own backward
        crossed = not leading  # whether a gradient has to come as far down as here
        elements += 2 * crossed
        elements += width * (attention > 0 and self.trains_down)
        crossed |= attention > 0
        if crossed:
            elements += 4 * width + spec.heads  # queries, keys, values, attention's output; log-sum-exp
        elif proj and self.trains_down:
            elements += width
        crossed |= proj > 0
        elements += (width + 2) * crossed
        elements += width * (fc1 > 0 and self.trains_down)
        crossed |= fc1 > 0
        return elements + feedforward * crossed + feedforward * (fc2 > 0 and self.trains_down)

    def hole(self, spec: ModelSpec, leading: bool) -> int:
        """Where a leading block has no adapter before its attention: of its queries, keys and values, which are gone again."""
        return 3 * spec.width if leading and not self._adapted()[0] else 0

    def forward_transient(self, spec: ModelSpec) -> int:
        keeps = self.trains_down and "fc2" in self.targets
        return super().forward_transient(spec) + (0 if keeps else spec.feedforward)

    def backward_transient(self, spec: ModelSpec) -> int:
        return super().backward_transient(spec) + self.rank

    def forward_flops(self, spec: ModelSpec) -> int:
        """That of the plain block, and 2 r (inputs + outputs) for each adapter."""
        return super().forward_flops(spec) + sum(2 * self.rank * sum(self._sizes(spec, target)) for target in self.targets)

    def backward_flops(self, spec: ModelSpec, leading: bool) -> int:
        """Gradients of inputs, 8 d^2 + 4 d f + 8 T d, as far down as they are needed; of B, 2 r outputs; of x A^T, 2 r outputs, and from
        it those of A and of x, 2 r inputs each."""
        width, feedforward = spec.width, spec.feedforward
        crossed, total = not leading, 0
        inputs_of = {"qkv": 6 * width**2, "proj": 2 * width**2, "fc1": 2 * width * feedforward, "fc2": 2 * width * feedforward}
        for layer, of_input in inputs_of.items():
            total += of_input * crossed
            for target in self.targets:
                if PLACES[target][0] == layer:
                    inputs, outputs = self._sizes(spec, target)
                    total += 2 * self.rank * (outputs + outputs * (self.trains_down or crossed) + inputs * (self.trains_down + crossed))
            crossed |= any(PLACES[target][0] == layer for target in self.targets)
            total += 8 * spec.context * width * (layer == "qkv" and crossed)  # attention lies behind its inputs
        return total

    def _adapted(self) -> list[int]:
        """Adapters of attention's inputs, proj, fc1, fc2."""
        layers = [PLACES[target][0] for target in self.targets]
        return [layers.count(layer) for layer in ("qkv", "proj", "fc1", "fc2")]

    def _sizes(self, spec: ModelSpec, target: str) -> tuple[int, int]:
        """Inputs and outputs of the matrix that an adapter stands beside."""
        return (
            spec.feedforward if target == "fc2" else spec.width,
            spec.feedforward if target == "fc1" else spec.width,
        )
