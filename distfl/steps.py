"""One optimiser step under a recipe: the window's units one after another, so that each lever is a line here.

Every unit of the window is a graph of its own: its input is a leaf, and backward goes from unit to unit by
hand. Gradients are those of one backward over the whole model (a test compares them), up to the order of
sums where a lever splits one. The frozen prefix always runs one sequence at a time: its temporaries stay
small, and a sequence's features are the same bits whatever batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward, get_gradient_edge

from distfl.model import IGNORED_TARGET, TinyTransformer
from distfl.recipes import Recipe

UnitDone = Callable[[int], None]  # called with a unit's index when backward is through with it


@dataclass
class _Segment:
    """One unit between its forward and its backward."""

    unit: int
    layer: nn.Module
    input: Tensor
    output: _Output | None  # None = recompute


class _Output:
    """The way back from a tensor, without the tensor: it is only kept where somebody needs it."""

    def __init__(self, tensor: Tensor):
        self._edge = get_gradient_edge(tensor)

    def backward(self, gradient: Tensor) -> None:
        """Go back from the tensor with its gradient; once.

        Straight to the engine: ``torch.autograd.backward``, given a gradient, imports sympy to compare two shapes,
        0.3 s of CPU and 35 MB on every client rank.
        """
        _engine_run_backward((self._edge,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def features_of(model: TinyTransformer, units: range, x: Tensor) -> Tensor:
    """Outputs of frozen units, without gradient, one sequence at a time.

    Args:
        units: contiguous units below the head.
        x: (B, T) token ids where ``units`` starts at 0, else (B, T, d) features of the units before.

    Returns:
        (B, T, d) features; ``x`` itself where there are no units.
    """
    if not units:
        return x
    layers = model.trunk()[units.start : units.stop]
    out = torch.empty(*x.shape[:2], model.spec.width, device=x.device)
    with torch.no_grad():
        for row in range(len(x)):
            y = x[row : row + 1]
            for layer in layers:
                y = layer(y)
            out[row] = y[0]
    return out


def add_gradients(
    model: TinyTransformer, first: int, features: Tensor, targets: Tensor, scale: float, recipe: Recipe, done: UnitDone
) -> float:
    """Forward and backward of one micro-batch; gradients are added to those already there.

    Args:
        first: unit whose input the features are; this and all later units are differentiated.
        features: (B, T, d) float, or (B, T) token ids where ``first`` is 0.
        targets: (B, T) int64.
        scale: of the loss: one over the number of targets of the whole batch.

    Returns:
        Cross-entropy in nats, summed over this micro-batch, times ``scale``.
    """
    layers, classifiers = model.trunk(), model.classifiers()
    segments, x, inputs = [], features, {}
    for unit in range(first, len(layers)):
        entry = x.detach().requires_grad_(unit > first)
        if 1 <= unit and unit - max(first, 1) < recipe.recomputed:
            x, output = features_of(model, range(unit, unit + 1), entry), None  # small temporaries leave no large holes
        else:
            x = layers[unit](entry)
            output = _Output(x)
        segments.append(_Segment(unit, layers[unit], entry, output))
        if unit in classifiers:
            inputs[unit] = x.detach()
        del entry, output
    inputs = inputs or {len(layers) - 1: x.detach()}
    del x
    heads = [classifiers[unit] for unit in inputs]
    chunk = recipe.chunk_of(targets.numel())
    loss, found = _head_gradients(heads, list(inputs.values()), targets, scale, chunk, bool(segments), model.mutual)
    gradients = dict(zip(inputs, found))
    del inputs, found
    gradient = gradients.pop(len(layers) - 1)
    done(len(layers))
    while segments:
        segment = segments.pop()
        if segment.unit in gradients:
            gradient += gradients.pop(segment.unit)
        output = segment.output or _Output(segment.layer(segment.input))
        output.backward(gradient)
        if segment.input.grad is not None:  # into the same place: a gradient left where backward made it would split the heap
            gradient.copy_(segment.input.grad)
        unit = segment.unit
        del segment, output
        done(unit)
    return loss


def _head_gradients(
    heads: list[nn.Module], inputs: list[Tensor], targets: Tensor, scale: float, chunk: int, wanted: bool, mutual: float
) -> tuple[float, list[Tensor | None]]:
    """Loss of the last classifier, and gradients of all of them, chunk of tokens by chunk; those of their inputs (B, T, d) where wanted."""
    shape, targets = inputs[0].shape, targets.flatten()
    rows = [x.flatten(0, 1) for x in inputs]
    in_chunks = wanted and chunk < len(targets)
    # before the chunks: what they free stays in one piece
    loss, gradients = 0.0, [torch.empty_like(x) if in_chunks else None for x in rows]
    for start in range(0, len(targets), chunk):
        parts = [x[start : start + chunk].detach().requires_grad_(wanted) for x in rows]
        loss += _backward_of_loss(heads, parts, targets[start : start + chunk], scale, mutual)
        for place in range(len(parts)):  # no name for a part: its gradient would live on and split the heap for the next chunk
            if in_chunks:
                gradients[place][start : start + chunk] = parts[place].grad
            else:
                gradients[place] = parts[place].grad
    return loss, [gradient.view(shape) if wanted else None for gradient in gradients]


def _backward_of_loss(heads: list[nn.Module], parts: list[Tensor], targets: Tensor, scale: float, mutual: float) -> float:
    """Cross-entropy of the last classifier summed over (N, V) logits, times ``scale``, and backward through all of them.

    By softmax - one-hot: autograd would hold three tensors of the logits' size; here their log-softmax becomes the gradient in place.
    Each of n classifiers also learns from the others' answers p_j, taken as given: the mean over them of KL(p_j, p_i) has the gradient
    p_i - p_j at the logits of i, and counts ``mutual`` times.
    """
    outputs, answers = [], []
    for head, part in zip(heads, parts):
        logits = head(part)
        outputs.append(_Output(logits))
        with torch.no_grad():
            answers.append(F.log_softmax(logits, -1))
        del logits  # nobody else holds a reference: one such tensor for each classifier, and one more
    others = len(heads) - 1
    share = mutual / others if others else 0.0
    with torch.no_grad():
        loss = F.nll_loss(answers[-1], targets, ignore_index=IGNORED_TARGET, reduction="sum").item() * scale
        counted = targets != IGNORED_TARGET
        for answer in answers:
            answer.exp_()
        total = None
        if share:
            total = torch.zeros_like(answers[0])
            for answer in answers:
                total += answer
    for output in outputs:
        with torch.no_grad():
            gradient = answers.pop(0)
            if share:
                gradient.mul_(1 + share * len(heads)).sub_(total, alpha=share)
            gradient[torch.arange(len(targets)), targets.where(counted, 0)] -= 1
            gradient *= (counted * scale)[:, None]
        output.backward(gradient)
    return loss


def count_targets(targets: Tensor) -> int:
    """Positions that the loss counts."""
    return int((targets != IGNORED_TARGET).sum())
