"""HetLoRA: every client trains adapters of a rank of its own, cut out of shared ones of the largest rank.

Source: Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", arXiv 2401.06432: a client is
sent the first r_c rows of A and columns of B, the server pads what comes back with zeros to the largest rank and takes a mean with the
norms ||B_c A_c|| as weights, so that who learnt more counts more. Only the abstract was read; the exact weights
are ours: the norm is that of all adapters in the client's window, what the server sent of them included, and numbers of samples do not
count besides. Left out: the paper's clients may also prune ranks
of their own in training.

The rank saves upload and optimiser state, hardly any memory: a client trains as many blocks, counted from the output, as its budget
admits by any rank, and those by the largest rank that fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distfl.fleet import Client
from distfl.lora import is_adapter
from distfl.messages import Assignment, Piece
from distfl.methods.base import MeanOf
from distfl.methods.lora import RankedLora, RankedOptions
from distfl.units import Unit

LARGEST_NORM = 2.0**10  # of an update; larger ones count as this


@dataclass(frozen=True)
class Options(RankedOptions):
    """Args:
    padding: ``zeros``: what a client of a lower rank does not hold counts as zero in the mean, which shrinks the later rows (the
        paper's rule); ``none``: every row is the mean over those who hold it.
    """

    padding: Literal["zeros", "none"] = "zeros"


class HetLora(RankedLora):
    """Ranks by budget, weights by norm."""

    Options = Options
    source = "arXiv 2401.06432, abstract"

    def weight(self, client: Client) -> float:
        return LARGEST_NORM

    def collect(self, tensors: dict[str, Tensor], assignment: Assignment, unit: Unit) -> list[Piece]:
        norm = min(LARGEST_NORM, update_norm(tensors, assignment))
        pieces = super().collect(tensors, assignment, unit)
        return [replace(piece, weight=norm) if is_adapter(piece.name) else piece for piece in pieces]

    def finish(self, unit: Unit, shared: Mapping[str, Tensor], mean_of: MeanOf) -> Iterator[tuple[str, Tensor]]:
        for tensor in unit.tensors:
            mean, share = mean_of(tensor.name)
            if self.options.padding == "zeros" and share.ndim and is_adapter(tensor.name):
                # the first row or column is held by all who train the unit
                mean = torch.where(share > 0, mean * (share / share.max().clamp_min(torch.finfo(share.dtype).tiny)), mean)
            yield tensor.name, mean


def update_norm(tensors: dict[str, Tensor], assignment: Assignment) -> float:
    """Frobenius norm of B A over all adapters in the client's window: the trace of (B^T B) (A A^T), which is r by r."""
    total = 0.0
    for name, down in tensors.items():
        if name.endswith("_A") and 1 + int(name.split(".")[1]) in assignment.window:
            up = tensors[name.removesuffix("_A") + "_B"].double()
            total += ((up.T @ up) * (down.double() @ down.double().T)).sum().item()
    return math.sqrt(max(0.0, total))


METHOD = HetLora
