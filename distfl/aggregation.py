"""Streaming weighted mean of pieces, one unit at a time. Tensor maths only.

Sums are taken in float64 in the order of the calls, so the same pieces in the same order give the
same bits, and a mean of equal values is that value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distfl.messages import Piece
from distfl.units import Unit


class UnitMean:
    """Running sums of one unit's tensors; whole pieces need no weight per element."""

    def __init__(self, unit: Unit):
        self.unit = unit
        self.contributors = 0
        self._shapes = {tensor.name: tensor.shape for tensor in unit.tensors}
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, pieces: list[Piece]) -> None:
        """Add one client's pieces of this unit."""
        self.contributors += bool(pieces)
        for piece in pieces:
            shape = self._shapes[piece.name]
            total = self._sums.setdefault(piece.name, torch.zeros(shape, dtype=torch.float64))
            weight = self._weights.setdefault(piece.name, torch.zeros((), dtype=torch.float64))
            if piece.region is None:
                total.add_(piece.values, alpha=piece.weight)
                weight += piece.weight
                continue
            if weight.ndim == 0:
                weight = self._weights[piece.name] = weight.expand(shape).clone()
            if isinstance(piece.region, tuple):
                where = (torch.as_tensor(piece.region[0])[:, None], torch.as_tensor(piece.region[1])[None, :])
                total[where] += piece.values.double() * piece.weight
                weight[where] += piece.weight
            else:
                where = torch.as_tensor(piece.region)
                total.view(-1)[where] += piece.values.double() * piece.weight
                weight.view(-1)[where] += piece.weight

    def mean(self, name: str, old: Tensor, round_weight: float) -> tuple[Tensor, Tensor]:
        """Mean and share of one tensor.

        Args:
            old: value kept where nobody sent anything.
            round_weight: sum of the weights of all clients merged in this round.

        Returns:
            float32 mean of old's shape, and the share of the round's weight behind each element (a scalar where it is the same for all).
        """
        if name not in self._sums:
            return old.clone(), torch.zeros(())
        total, weight = self._sums[name], self._weights[name]
        share = (weight / round_weight).float()
        if weight.ndim == 0:
            return ((total / weight).float() if weight > 0 else old.clone()), share
        return torch.where(weight > 0, total / weight.clamp_min(torch.finfo(torch.float64).tiny), old.double()).float(), share

    def clear(self) -> None:
        """Let go of the sums; the number of contributors stays."""
        self._sums.clear()
        self._weights.clear()
