"""What a client's round costs: peak bytes, upload bytes, FLOPs. Formulas only, nothing is run.

Peak memory counts, above the process's baseline, what is alive at the fullest moment of a training
step. N = tokens of a micro-batch (plain: of the batch); d, f, H, V as in ``model.py``; s = optimiser
tensors per parameter. Elements kept by autograd per token of a trained block (eager PyTorch, fused
attention, no dropout), its input included:

    8d + 2f + H + 4      LN1 in, LN1 out, q k v, attention out, LN2 in, LN2 out | fc1 out, GELU out | log-sum-exp, norm statistics

This is ``WholeBlock``; a method that trains blocks in another way brings formulas of its own. A frozen prefix runs
under no-grad and keeps nothing; a recomputed block keeps its input, d. The peak is
the largest of the round's moments (``Peak.moments``): weights, optimiser state, residuals of error feedback,
gradients where they add up, plus what that moment needs; the last moment is that of encoding the update. This
is the account of CAFF (arXiv 2411.07826, weights + optimiser state + activations) with the moments it leaves
out and the levers of ``recipes.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from distfl.allocator import MAPPED_FROM_BYTES
from distfl.encoding import Encoding
from distfl.frozen import Precision, matrix_bytes, stored_bytes
from distfl.model import ModelSpec
from distfl.recipes import Recipe
from distfl.units import VALUE_BYTES, UnitTable, Window

PAGE_BYTES = 4096
TOKEN_BYTES = 16  # an input and a target, int64 each


@dataclass(frozen=True)
class Peak:
    """Peak bytes above the baseline and what they are made of.

    Args:
        weights: all units, frozen ones too.
        optimizer: state of the trained tensors.
        residuals: what error feedback keeps from round to round.
        gradients: that outlive a micro-batch, because they add up.
        activations: kept for backward by the trained blocks.
        transient: what the fullest moment adds to these (other gradients, logits, temporaries, the batch).
        margin: allocator and page rounding, from the config.
        moments: total of every moment, by name.
    """

    weights: int
    optimizer: int
    residuals: int
    gradients: int
    activations: int
    transient: int
    margin: int
    moments: dict[str, int]

    @property
    def bytes(self) -> int:
        return self.weights + self.optimizer + self.residuals + self.gradients + self.activations + self.transient + self.margin


@dataclass(frozen=True)
class Cost:
    """Everything a budget limits, for one client and round, and what it takes for that.

    Args:
        recipe: how its steps are computed.
        detail: the method's choice besides the window: a rank, a width.
    """

    peak: Peak
    upload_bytes: int
    flops: int
    recipe: Recipe
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WholeBlock:
    """A block that trains with all its tensors, per token; subclasses train it in another way.

    ``leading``: nothing below the block trains, so that no gradient of its input is needed.
    """

    def kept(self, spec: ModelSpec, leading: bool) -> int:
        """Elements kept for backward, the block's input included."""
        return 8 * spec.width + 2 * spec.feedforward + spec.heads + 4

    def hole(self, spec: ModelSpec, leading: bool) -> int:
        """Elements of heap that its forward leaves behind it and nothing fits into."""
        return 0

    def forward_transient(self, spec: ModelSpec) -> int:
        """Elements beside what it keeps when its forward ends: its output, and what it does not keep of its last layer's input."""
        return spec.width

    def backward_transient(self, spec: ModelSpec) -> int:
        """Elements beside what it keeps when its backward begins: gradients of its output and of its GELU output."""
        return spec.width + self.widest(spec)

    def widest(self, spec: ModelSpec) -> int:
        """Elements of its widest tensor: the feed-forward layer's."""
        return spec.feedforward

    def forward_flops(self, spec: ModelSpec) -> int:
        """8 d^2 + 4 d f + 4 T d (attention counted in full)."""
        return 8 * spec.width**2 + 4 * spec.width * spec.feedforward + 4 * spec.context * spec.width

    def backward_flops(self, spec: ModelSpec, leading: bool) -> int:
        """Gradients of inputs and of matrices: twice the forward."""
        return 2 * self.forward_flops(spec)


@dataclass(frozen=True)
class Costs:
    """The formulas for one model and one way of training.

    Args:
        table: the units.
        batch: sequences per step.
        state_tensors: optimiser tensors per trained parameter: AdamW 2, SGD with momentum 1, SGD 0.
        margin_bytes: added to every peak.
        frozen_precision: how matrices below the window are stored.
        encoding: how updates become bytes.
        block: what a block in the window keeps and computes.
    """

    table: UnitTable
    batch: int
    state_tensors: int
    margin_bytes: int = 0
    frozen_precision: Precision = "fp32"
    encoding: Encoding = Encoding()
    block: WholeBlock = WholeBlock()

    @property
    def spec(self) -> ModelSpec:
        return self.table.spec

    def weights(self, window: Window) -> int:
        """Bytes of all weights a client holds or maps."""
        narrower = matrix_bytes(self.table, window) - stored_bytes(self.table, window, self.frozen_precision)
        return self.table.bytes - narrower

    def upload_bytes(self, window: Window) -> int:
        """Payload of the window's update as it is encoded, without block headers."""
        return self.encoding.upload_bytes(self.table, window)

    def peak(self, window: Window, recipe: Recipe) -> Peak:
        """Peak of a client's round with this window (see the module docstring)."""
        return _peak(self, window, recipe)

    def prefix_flops(self, units: range) -> int:
        """Forward of frozen units, per token."""
        return sum(1 <= unit <= self.spec.depth for unit in units) * self.block.forward_flops(self.spec)

    def window_flops(self, window: Window, recipe: Recipe) -> int:
        """Of the window, per token: forward and backward, recomputed blocks forward once more; every classifier's output layer
        2 d V each for its output, its input's gradient and, where it trains, its matrix's."""
        spec, trained = self.spec, self.table.trained_blocks(window)
        blocks = (trained + recipe.recomputed) * self.block.forward_flops(spec)
        blocks += sum(self.block.backward_flops(spec, leading=window.first > 0 and place == 0) for place in range(trained))
        train = any(self.table.classifiers(unit) for unit in window.units)
        return blocks + len(self.table.exits()) * (6 if train else 4) * spec.width * spec.vocabulary

    def flops(self, window: Window, tokens: int, recipe: Recipe) -> int:
        """Training on ``tokens`` positions, every one of them through the prefix."""
        return tokens * (self.prefix_flops(range(window.first)) + self.window_flops(window, recipe))


@lru_cache(maxsize=2**16)
def _peak(costs: Costs, window: Window, recipe: Recipe) -> Peak:
    spec, table = costs.spec, costs.table
    micro_batch = min(recipe.micro_batch, costs.batch)
    keeps, keeps_head = recipe.keeps_gradients(costs.batch), recipe.keeps_head_gradients(costs.batch, spec.context)
    tokens = micro_batch * spec.context
    values = VALUE_BYTES * tokens
    blocks = [unit for unit in window.units if 1 <= unit <= spec.depth]
    trained, recomputed = len(blocks), min(recipe.recomputed, len(blocks))
    of_heads = {unit: VALUE_BYTES * sum(t.elements for t in table.classifiers(unit)) for unit in window.units}
    exits = table.exits()
    all_gradients, heads = table.window_bytes(window), sum(of_heads.values())
    optimizer = costs.state_tensors * all_gradients
    gradients = all_gradients if keeps else heads if keeps_head else 0
    always = TOKEN_BYTES * costs.batch * spec.context  # the batch
    entry = values * spec.width
    leading = window.first > 0
    kept_by = [values * costs.block.kept(spec, leading and place == 0) for place in range(trained)]  # input to output
    kept = recomputed * entry + sum(kept_by[recomputed:])
    left = values * costs.block.hole(spec, leading) if trained > recomputed == 0 else 0
    chunk = recipe.chunk_of(tokens)
    part, logits = VALUE_BYTES * chunk * spec.width, VALUE_BYTES * chunk * spec.vocabulary
    # a weight's gradient on its way to where it adds up
    matrix, head_matrix = (_largest(table, window.units, of_a_head) for of_a_head in (False, True))
    widest = values * costs.block.widest(spec)
    others = len(exits) - 1  # classifiers below the last
    hole_at_head, hole_below = _holes(logits, head_matrix, widest, others)
    norms = part * len(exits) if heads else 0  # the output layers' inputs, for their matrices' gradients
    at_head = kept + left + entry * (1 + others + (chunk < tokens and trained > 0))
    backward = values * costs.block.backward_transient(spec) + matrix + hole_below
    again = entry + values * costs.block.forward_transient(spec)  # beside the gradient of the block's output
    # gradients made in backward, in the order in which they come: those of all classifiers first
    coming = [table[unit].bytes - of_heads[unit] for unit in reversed(window.units)]
    of_all_heads = 0 if keeps_head else heads

    def held(units: int) -> int:
        """Gradients that exist, besides those that are kept, once so many units are through."""
        return 0 if keeps or recipe.fused_update else of_all_heads + sum(coming[:units])

    def below(place: int) -> int:
        """Gradients of classifiers' inputs, and with a fused update of classifiers, that wait below a block of the window."""
        waiting = [unit for unit in exits if unit < blocks[place]]
        return len(waiting) * entry + recipe.fused_update * (not keeps_head) * sum(of_heads[unit] for unit in waiting)

    one = VALUE_BYTES * spec.context
    widened = 0 if costs.frozen_precision == "fp32" else VALUE_BYTES * spec.width * spec.feedforward
    moments = {
        "prefix": entry * (window.first > 0) + (one * (3 * spec.width + 2 * spec.feedforward) + widened) * (window.first > 1),
        "loss": at_head - entry * others * (chunk == tokens) + norms + logits * (2 + others),
        "head backward": at_head + part * (2 + others) + logits * (1 + others + (others > 0)) + hole_at_head + head_matrix,
        "optimizer": 0 if keeps else max([of_all_heads, *coming]) if recipe.fused_update else of_all_heads + sum(coming),
    }
    if trained > recomputed:
        moments["first block backward"] = kept + left + backward + held(1) + below(trained - 1)
        lowest_kept = recomputed * entry + left + kept_by[recomputed]
        moments["last kept block backward"] = lowest_kept + backward + held(trained - recomputed) + below(recomputed)
    if recomputed:
        first = trained - recomputed + 1
        lower = (recomputed - 1) * entry + below(recomputed - 1)
        moments["first recomputation"] = lower + kept_by[recomputed - 1] + max(backward + held(first), again + held(first - 1))
        moments["last recomputation"] = kept_by[0] + max(backward + held(trained), again + held(trained - 1))
    if window.first == 0:
        moments["embedding backward"] = entry + table[0].bytes + held(trained + 1)
    # training is over, its message grows beside the weights
    moments["sending"] = costs.encoding.sending_bytes(table, window) - optimizer - gradients - always
    # every long-lived tensor that is mapped by itself takes a page more than its bytes
    mapped = sum(VALUE_BYTES * t.elements >= MAPPED_FROM_BYTES for unit in window.units for t in table[unit].tensors)
    always += PAGE_BYTES * mapped * (1 + costs.state_tensors + keeps)
    weights = costs.weights(window)
    residuals = costs.encoding.residual_bytes(table, window)
    fixed = weights + optimizer + residuals + gradients
    totals = {name: fixed + moment + always + costs.margin_bytes for name, moment in moments.items()}
    return Peak(weights, optimizer, residuals, gradients, kept, max(moments.values()) + always - kept, costs.margin_bytes, totals)


def _largest(table: UnitTable, units: Iterable[int], of_a_head: bool) -> int:
    """Bytes of the largest trained tensor of these units that is a classifier's, or a block's."""
    of_heads = {tensor.name for unit in units for tensor in table.classifiers(unit)}
    sizes = [tensor.elements for unit in units if unit > 0 for tensor in table[unit].tensors if (tensor.name in of_heads) == of_a_head]
    return VALUE_BYTES * max(sizes, default=0)


def _holes(logits: int, head_matrix: int, widest: int, others: int) -> tuple[int, int]:
    """Bytes of heap that the logits leave and nothing fits into: while the head goes backward, and below it.

    The gradient of the head's matrix takes part of that room if it is smaller; a block's largest tensor, the gradient of
    its GELU output, then needs all of what remains. What several classifiers make lies apart from each other: each leaves
    room that their largest tensor does not fit into.

    Args:
        others: classifiers below the last.
    """
    at_head, room = (0, logits - head_matrix) if head_matrix < logits else (logits, logits)
    return at_head + others * max(logits, head_matrix), room if widest > room else 0
