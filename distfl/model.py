"""The tiny Transformer: GPT-2's arithmetic with an untied output layer, in one file.

Pre-norm blocks, learned positions, tanh-approximated GELU, biases everywhere but in the output
layer (Radford et al. 2019). Equal to ``transformers``' GPT-2 on the same weights; written here
because importing ``transformers`` costs a client rank 3.4 s and 108 MB.

Letters in shape comments: B sequences, T tokens of each, d width, f feed-forward width, H heads,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ModuleOf = TypeVar("ModuleOf", bound=nn.Module)
IGNORED_TARGET = -100  # positions without a target: padding


@dataclass(frozen=True)
class ModelSpec:
    """Shape of one model of a family.

    Args:
        depth: number of blocks (L).
        width: d.
        heads: H, a divisor of width.
        context: longest sequence in tokens.
        vocabulary: V.
    """

    depth: int
    width: int
    heads: int
    context: int
    vocabulary: int

    @property
    def feedforward(self) -> int:
        return 4 * self.width


class _Given:
    """Weights are always given (``from_tensors``). PyTorch's own initialisation, run on a skeleton without
    memory, would import ``torch._dynamo`` and ``sympy``: one second of CPU on every client rank."""

    def reset_parameters(self) -> None:
        pass


class Linear(_Given, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's output with a matrix that is held elsewhere."""
        return F.linear(x, weight, self.bias)

    def of(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The layer's output for ``function(x)``. Where backward does without that input, room for what it keeps is taken first:
        the input, gone soon, would leave a hole in the heap behind it."""
        room = torch.empty(x.numel() // x.shape[-1] * self.kept_columns + 256) if torch.is_grad_enabled() and not self.keeps_input else None
        given = function(x)
        del room
        return self(given)

    @property
    def keeps_input(self) -> bool:
        """Whether backward needs the layer's input."""
        return self.weight.requires_grad

    @property
    def kept_columns(self) -> int:
        """Elements that the layer makes and keeps, of each row."""
        return self.out_features


class Embedding(_Given, nn.Embedding):
    pass


class LayerNorm(_Given, nn.LayerNorm):
    pass


class Stem(nn.Module):
    """Token and position embedding."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.token = Embedding(spec.vocabulary, spec.width)
        self.position = Embedding(spec.context, spec.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]  # (B, T) -> (B, T, d)


class _Gelu(torch.autograd.Function):
    """Tanh-approximated GELU whose gradient takes the place of the gradient it is made from, which is nobody else's:
    a tensor of the same size beside it would find no room in the heap but at its end."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=gradient)


def _sum(branch: Tensor, residual: Tensor) -> Tensor:
    """Of (N, d) rows, in the branch's place: a tensor of its own would leave a hole in the heap behind every branch.
    Not under autocast, where the branch has fewer bits."""
    return branch.add_(residual) if branch.dtype == residual.dtype else branch + residual


class Block(nn.Module):
    """Causal self-attention and feed-forward layer, each on a normalised residual branch."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        width = spec.width
        self.heads = spec.heads
        self.norm1 = LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = LayerNorm(width)
        self.fc1 = Linear(width, spec.feedforward)
        self.fc2 = Linear(spec.feedforward, width)
        self.exit: nn.Module | None = None  # a classifier of this block's output

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # (N, d), N = B T; on views of (B, T, d) autograd would copy what is added in place
        rows = _sum(self.proj(self._attend(self.qkv.of(self.norm1, x)).flatten(0, 1)), rows)
        rows = _sum(self.fc2.of(_Gelu.apply, self.fc1.of(self.norm2, rows)), rows)  # (N, f) inside
        return rows.view_as(x)

    def _attend(self, qkv: Tensor) -> Tensor:
        batch, length, triple = qkv.shape
        heads = qkv.view(batch, length, 3, self.heads, triple // 3 // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, d/H), views of qkv
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, triple // 3)  # (B, T, d)


class Head(nn.Module):
    """Final norm and output layer."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.norm = LayerNorm(spec.width)
        self.output = Linear(spec.width, spec.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output.of(self.norm, x)  # (B, T, d) -> (B, T, V)


class TinyTransformer(nn.Module):
    """A decoder-only language model. A method may give blocks classifiers of their own, ``exit``, and take the head away.

    Attributes:
        mutual: how much several classifiers learn from each other in training (see ``steps.py``).
    """

    mutual: float = 0.0

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.embedding = Stem(spec)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.head: nn.Module | None = Head(spec)

    def forward(self, tokens: Tensor, frozen_units: int = 0) -> Tensor:
        """Logits of every position.

        Args:
            tokens: (B, T) int64 token ids.
            frozen_units: leading units (0 = none, 1 = embedding, 1 + k = embedding and k blocks)
                that run without gradient, so that nothing is kept for them.

        Returns:
            (B, T, V) float logits; of several classifiers their mean.
        """
        classifiers, logits, x = self.classifiers(), [], tokens
        for unit, layer in enumerate(self.trunk()):
            with torch.set_grad_enabled(torch.is_grad_enabled() and unit >= frozen_units):
                x = layer(x)
            if unit in classifiers:
                logits.append(classifiers[unit](x))
        return sum(logits[1:], start=logits[0]) / len(logits) if len(logits) > 1 else logits[0]

    def classifiers(self) -> dict[int, nn.Module]:
        """The unit whose output a classifier sees -> the classifier, in order; the head is that of the last block."""
        found = {unit: block.exit for unit, block in enumerate(self.blocks, start=1) if block.exit is not None}
        return found if self.head is None else found | {len(self.blocks): self.head}

    def trunk(self) -> list[nn.Module]:
        """All units but the head, in order."""
        return [self.embedding, *self.blocks]

    def parts(self) -> list[nn.Module]:
        """All units, in order."""
        return self.trunk() if self.head is None else [*self.trunk(), self.head]

    def named_tensors(self) -> dict[str, Tensor]:
        """Every parameter by name, detached, sharing memory with the model."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def skeleton(spec: ModelSpec) -> TinyTransformer:
    """A model without memory behind its parameters: names and shapes only."""
    with torch.device("meta"):
        return TinyTransformer(spec)


def from_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> TinyTransformer:
    """A model whose parameters *are* the given tensors (not copies)."""
    return filled(skeleton(spec), tensors)


def filled(structure: ModuleOf, tensors: Mapping[str, Tensor], prefix: str = "") -> ModuleOf:
    """Modules like these whose parameters *are* the given tensors; the ones given stay as they are.

    A tenth of what it takes to build modules and load tensors into them: a rank does it for every client.
    """
    module = object.__new__(type(structure))  # nn.Module's __init__ would make all that is copied here
    module.__dict__ = structure.__dict__.copy()
    module._parameters = {
        name: None if given is None else nn.Parameter(tensors[prefix + name]) for name, given in structure._parameters.items()
    }
    module._modules = {name: filled(child, tensors, f"{prefix}{name}.") for name, child in structure._modules.items()}
    return module


def initial_tensors(spec: ModelSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Random start as in GPT-2: normal 0.02, residual projections divided by sqrt(2 L), norms at one, biases at zero."""
    tensors = {}
    for name, parameter in skeleton(spec).named_parameters():
        tensor = torch.zeros(parameter.shape)
        if name.endswith("bias"):
            pass
        elif ".norm" in name:
            tensor.fill_(1.0)
        else:
            residual = name.endswith(("proj.weight", "fc2.weight"))
            tensor.normal_(0.0, 0.02 / (2 * spec.depth) ** 0.5 if residual else 0.02, generator=generator)
        tensors[name] = tensor
    return tensors


def next_token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats against (B, T) targets; positions with IGNORED_TARGET do not count."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction=reduction)
