"""What a client's round costs: peak bytes, upload bytes, FLOPs. Formulas only, nothing is run.

Peak memory counts, above the process's baseline, what is alive at the fullest moment of a training
step. N = batch x context tokens; d, f, H, V as in ``model.py``; s = optimiser tensors per parameter.
Elements kept by autograd per token of a trained block (eager PyTorch, fused attention, no dropout):

    8d + 2f + H + 4      LN1 in, LN1 out, q k v, attention out, LN2 in, LN2 out | fc1 out, GELU out | log-sum-exp, norm statistics

A frozen prefix runs under no-grad and keeps nothing. The peak is the largest of the step's moments
(``Peak.moments``): weights, optimiser state and kept activations, plus either the logits and the
loss's copies of them, or the transients of the first (or last) block's backward, or the gradients
at the optimiser step, or the prefix's forward. This is the account of CAFF (arXiv 2411.07826,
weights + optimiser state + activations) with the moments it leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

from distfl.model import ModelSpec
from distfl.units import VALUE_BYTES, UnitTable, Window

TOKEN_BYTES = 16  # an input and a target, int64 each


@dataclass(frozen=True)
class Peak:
    """Peak bytes above the baseline and what they are made of.

    Args:
        weights: all units, frozen ones too.
        optimizer: state of the trained tensors.
        activations: kept for backward by the trained blocks.
        transient: what the fullest moment adds to these three (gradients, logits, temporaries, the batch).
        margin: allocator and page rounding, from the config.
        moments: total of every moment, by name.
    """

    weights: int
    optimizer: int
    activations: int
    transient: int
    margin: int
    moments: dict[str, int]

    @property
    def bytes(self) -> int:
        return self.weights + self.optimizer + self.activations + self.transient + self.margin


@dataclass(frozen=True)
class Cost:
    """Everything a budget limits, for one client and round."""

    peak: Peak
    upload_bytes: int
    flops: int


@dataclass(frozen=True)
class Costs:
    """The formulas for one model and one way of training.

    Args:
        table: the units.
        batch: sequences per step.
        state_tensors: optimiser tensors per trained parameter: AdamW 2, SGD with momentum 1, SGD 0.
        margin_bytes: added to every peak.
    """

    table: UnitTable
    batch: int
    state_tensors: int
    margin_bytes: int = 0

    @property
    def spec(self) -> ModelSpec:
        return self.table.spec

    def kept_per_token(self) -> int:
        """Elements that one trained block keeps for backward, per token."""
        return 8 * self.spec.width + 2 * self.spec.feedforward + self.spec.heads + 4

    def peak(self, window: Window) -> Peak:
        """Peak of a training step with this window (see the module docstring)."""
        spec, tokens = self.spec, self.batch * self.spec.context
        trained = self.table.trained_blocks(window)
        weights = self.table.bytes
        gradients = self.table.window_bytes(window)
        optimizer = self.state_tensors * gradients
        per_block = VALUE_BYTES * tokens * self.kept_per_token()
        head_gradient = self.table[spec.depth + 1].bytes
        values = VALUE_BYTES * tokens
        residual = values * (spec.width + spec.feedforward)  # gradients of a block's output and of its GELU output
        batch = TOKEN_BYTES * tokens
        lowest = self.table[window.first].bytes if trained else 0  # its gradients come as its activations go
        kept = trained * per_block
        moments = {  # beyond weights and optimiser state
            "prefix forward": values * (2 * spec.width + 2 * spec.feedforward) if window.first > 1 else 0,
            "loss": kept + values * (spec.width + 3 * spec.vocabulary),  # log-probabilities, their gradient, the logits' gradient
            "head backward": kept + values * (2 * spec.width + spec.vocabulary) + head_gradient,
            "first block backward": kept + residual + head_gradient,
            "last block backward": min(trained, 1) * per_block + residual + gradients - lowest,
            "optimizer": gradients,
        }
        beyond = max(moments.values()) + batch
        totals = {name: weights + optimizer + moment + batch + self.margin_bytes for name, moment in moments.items()}
        return Peak(weights, optimizer, kept, beyond - kept, self.margin_bytes, totals)

    def block_flops(self) -> int:
        """Forward of one block, per token: 8 d^2 + 4 d f + 4 T d (attention counted in full)."""
        width = self.spec.width
        return 8 * width**2 + 4 * width * self.spec.feedforward + 4 * self.spec.context * width

    def flops(self, window: Window, tokens: int) -> int:
        """Training on ``tokens`` positions: every block forward, trained blocks twice that backward, the head thrice."""
        trained = self.table.trained_blocks(window)
        head = 6 * self.spec.width * self.spec.vocabulary
        return tokens * ((self.spec.depth + 2 * trained) * self.block_flops() + head)
