"""Recipes: how one optimiser step is computed so that it needs less memory. Choices only, nothing is run.

A plain step holds the activations and logits of the whole batch and the gradients of the whole window at
once. Every lever gives the same gradient, up to the rounding of sums, for less:

* micro-batches: activations of a few sequences at a time, gradients summed (accumulation);
* loss in chunks: logits of a few tokens at a time, so that they never exist whole;
* recomputation: the first blocks of the window keep only their input and are computed again in backward
  (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174);
* fused update: the optimiser steps on a unit as soon as its gradients are complete, so that gradients of one
  unit exist at a time (Lv et al. 2023, LOMO, arXiv 2306.09782). Not together with gradient clipping, whose norm
  needs all of them, nor with micro-batches, which add them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distfl.config import LeversConfig, TrainingConfig

LOSS_CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Recipe:
    """How a step is computed.

    Args:
        micro_batch: sequences whose activations are alive at once; at least the batch = no accumulation.
        loss_chunk: tokens whose logits are alive at once; None = all of a micro-batch.
        recomputed: leading blocks of the window that are computed again in backward.
        fused_update: the optimiser steps inside backward.
    """

    micro_batch: int
    loss_chunk: int | None = None
    recomputed: int = 0
    fused_update: bool = False

    def keeps_gradients(self, batch: int) -> bool:
        """Whether gradients of the whole window are made once and added to: for micro-batches, and for recomputation
        without a fused update, where nearly all of them exist at the fullest moment anyway."""
        return self.micro_batch < batch or (self.recomputed > 0 and not self.fused_update)

    def keeps_head_gradients(self, batch: int, context: int) -> bool:
        """The same for those of the head: its chunks add up."""
        return self.keeps_gradients(batch) or self.chunk_of(min(self.micro_batch, batch) * context) < batch * context

    def chunk_of(self, tokens: int) -> int:
        """Tokens whose logits are alive at once, out of a micro-batch of so many."""
        return min(self.loss_chunk or tokens, tokens)

    def describe(self, batch: int, context: int | None = None) -> str:
        """In words; what is plain about it is not named, nor chunks that hold a whole micro-batch of this context."""
        chunked = self.loss_chunk and (context is None or self.loss_chunk < min(self.micro_batch, batch) * context)
        words = [
            f"micro-batches of {self.micro_batch}" if self.micro_batch < batch else "",
            f"loss by {self.loss_chunk} tokens" if chunked else "",
            f"{self.recomputed} recomputed" if self.recomputed else "",
            "fused update" if self.fused_update else "",
        ]
        return ", ".join(filter(None, words)) or "plain"


def candidates(levers: LeversConfig, training: TrainingConfig, batch: int, blocks: int) -> Iterator[Recipe]:
    """Every recipe the levers allow for this batch and so many trained blocks, cheapest in time first.

    Recomputation costs a forward pass of its blocks; micro-batches cost a little more time the smaller they are;
    chunks of the loss and the fused update cost nothing.
    """
    chunk = None if levers.loss_chunks == "off" else LOSS_CHUNK_TOKENS  # costs no time: auto is on
    updates = _choices(levers.fused_update, False, True)
    for recomputed in [blocks] if levers.recompute == "on" else [0] if levers.recompute == "off" else range(blocks + 1):
        for micro_batch in _micro_batches(levers.micro_batches, batch):
            for fused in updates:
                if fused and (training.clip_norm is not None or micro_batch < batch):
                    continue
                yield Recipe(micro_batch, chunk, recomputed, fused)


def _choices(switch: str, off: object, on: object) -> list:
    return [on] if switch == "on" else [off] if switch == "off" else [off, on]


def _micro_batches(switch: str, batch: int) -> list[int]:
    """The batch, halved again and again."""
    if switch != "auto":
        return [1 if switch == "on" else batch]
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes
