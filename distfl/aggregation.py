"""Streaming weighted mean of pieces, one unit at a time. Tensor maths only.

Two number systems. Sums in float64, taken in the order of the calls: the same pieces in the same order give
the same bits, and a mean of equal values is that value. Sums in fixed point (64-bit integers, resolution
2^-47 of a value): the same bits in any order and any grouping, so that partial sums may be added up along
whatever tree ranks form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from distfl.errors import NotFinite
from distfl.messages import Piece
from distfl.units import TensorSpec, Unit

FIXED_BITS = 47
PART_ELEMENTS = 2**14  # of whole tensors, added up at a time
LARGEST_FIXED = 2.0**15  # of a value: shares of the weight sum to 1, so sums stay below 2^62


class UnitMean:
    """Running sums of one unit's tensors in float64; whole pieces need no weight per element."""

    dtype = torch.float64

    def __init__(self, unit: Unit):
        self.unit = unit
        self._shapes = {tensor.name: tensor.shape for tensor in unit.tensors}
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._widened = torch.empty(PART_ELEMENTS, dtype=torch.float64)

    def check(self, pieces: list[Piece]) -> None:
        """Refuse what cannot be summed up (raises NotFinite)."""

    def add(self, pieces: list[Piece]) -> None:
        """Add one client's pieces of this unit."""
        for piece in pieces:
            shape = self._shapes[piece.name]
            if piece.name not in self._sums:
                self._sums[piece.name] = torch.zeros(shape, dtype=self.dtype)
                self._weights[piece.name] = torch.zeros((), dtype=self.dtype)
            total, weight = self._sums[piece.name], self._weights[piece.name]
            if piece.region is None:
                self._add_whole(total.view(-1), piece.values.reshape(-1), piece.weight)
                weight += self._counted(piece.weight)
                continue
            if weight.ndim == 0:
                weight = self._weights[piece.name] = weight.expand(shape).clone()
            if isinstance(piece.region, tuple):
                where = (torch.as_tensor(piece.region[0])[:, None], torch.as_tensor(piece.region[1])[None, :])
            else:
                total, weight = total.view(-1), weight.view(-1)
                where = torch.as_tensor(piece.region)
            total[where] += self._weighted(piece.values, piece.weight)
            weight[where] += self._counted(piece.weight)

    def _add_whole(self, total: Tensor, values: Tensor, weight: float) -> None:
        """Part by part: what is converted stays in the processor's cache, and no page is faulted for it."""
        for part, of_total in zip(values.split(PART_ELEMENTS), total.split(PART_ELEMENTS)):
            self._add_part(of_total, self._widened[: len(part)].copy_(part), weight)

    def _add_part(self, total: Tensor, widened: Tensor, weight: float) -> None:
        total.add_(widened, alpha=weight)

    def _weighted(self, values: Tensor, weight: float) -> Tensor:
        return values.double() * weight

    def _counted(self, weight: float) -> float:
        """The weight as it is summed up."""
        return weight

    def _share(self, weight: Tensor, round_weight: float) -> Tensor:
        """Part of the round's weight that a sum of weights is."""
        return weight / round_weight

    def mean(self, name: str, old: Tensor, round_weight: float) -> tuple[Tensor, Tensor]:
        """Mean and share of one tensor.

        Args:
            old: value kept where nobody sent anything.
            round_weight: sum of the weights of all clients that take part in this round.

        Returns:
            float32 mean of old's shape, and the share of the round's weight behind each element (a scalar where it is the same for all).
        """
        if name not in self._sums:
            return old.clone(), torch.zeros(())
        total, weight = self._sums[name].double(), self._weights[name].double()
        share = self._share(weight, round_weight).float()
        if weight.ndim == 0:
            return ((total / weight).float() if weight > 0 else old.clone()), share
        return torch.where(weight > 0, total / weight.clamp_min(torch.finfo(torch.float64).tiny), old.double()).float(), share

    # --- partial sums of several ranks

    @property
    def by_element(self) -> bool:
        """Whether any tensor needs a weight per element."""
        return any(weight.ndim for weight in self._weights.values())

    def partial(self, by_element: bool, old: Mapping[str, Tensor], round_weight: float) -> np.ndarray:
        """All sums and weights as one array that can be added to those of another rank (1-D).

        In float32, so not the sums themselves, but how far they lie from the old values, as shares of the round's weight: what
        did not change is exact, and what did loses bits of the change only.

        Args:
            by_element: with a weight for each element, because some rank needs that; else one for each tensor.
            old: the shared tensors that the round started from.
        """
        parts = []
        for tensor in self.unit.tensors:
            total, weight = self._of(tensor.name)
            change = (total - weight * old[tensor.name]) / round_weight
            parts.append(change.expand(tensor.shape).float().reshape(-1))
        for tensor in self.unit.tensors:
            share = (self._of(tensor.name)[1] / round_weight).float()
            parts.append(share.expand(tensor.shape).reshape(-1) if by_element else share.reshape(1))
        return torch.cat(parts).numpy()

    def take(self, partial: np.ndarray, by_element: bool, old: Mapping[str, Tensor], round_weight: float) -> None:
        """Replace all sums and weights by those of an array that ``partial`` made."""
        for tensor, change, share in self._split(partial, by_element):
            share = share.double()
            self._sums[tensor.name] = (change + share * old[tensor.name]) * round_weight
            self._weights[tensor.name] = share * round_weight

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        """Sum and weight of one tensor; zeros where there is none."""
        nothing = torch.zeros((), dtype=self.dtype)
        return self._sums.get(name, nothing), self._weights.get(name, nothing)

    def _split(self, partial: np.ndarray, by_element: bool) -> Iterator[tuple[TensorSpec, Tensor, Tensor]]:
        """Every tensor with its part of the sums, in its shape, and of the weights."""
        values, position = torch.from_numpy(partial), 0
        weights = values[sum(tensor.elements for tensor in self.unit.tensors) :]
        for number, tensor in enumerate(self.unit.tensors):
            whole = slice(position, position + tensor.elements)
            yield tensor, values[whole].view(tensor.shape), weights[whole].view(tensor.shape) if by_element else weights[number]
            position += tensor.elements


class FixedPointMean(UnitMean):
    """The same in fixed point.

    Args:
        round_weight: sum of the weights of all clients that take part in this round.
    """

    dtype = torch.int64

    def __init__(self, unit: Unit, round_weight: float):
        super().__init__(unit)
        self._scale = 2.0**FIXED_BITS / round_weight
        self._rounded = torch.empty(PART_ELEMENTS, dtype=torch.int64)

    def check(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.values.numel() and not all(abs(float(end)) < LARGEST_FIXED for end in torch.aminmax(piece.values)):  # nor NaN
                raise NotFinite(
                    f"{piece.name} summed in fixed point",
                    f"values of {LARGEST_FIXED:.0f} or more",
                    "lower training.learning_rate, or set transport.sums=float",
                )

    def _add_part(self, total: Tensor, widened: Tensor, weight: float) -> None:
        total += self._rounded[: len(total)].copy_(widened.mul_(weight * self._scale).round_())

    def _weighted(self, values: Tensor, weight: float) -> Tensor:
        return values.double().mul_(weight * self._scale).round_().long()

    def _counted(self, weight: float) -> int:
        return round(weight * self._scale)

    def _share(self, weight: Tensor, round_weight: float) -> Tensor:
        return weight / 2.0**FIXED_BITS

    def partial(self, by_element: bool, old: Mapping[str, Tensor], round_weight: float) -> np.ndarray:
        parts = [self._of(tensor.name)[0].expand(tensor.shape).reshape(-1) for tensor in self.unit.tensors]
        for tensor in self.unit.tensors:
            weight = self._of(tensor.name)[1]
            parts.append(weight.expand(tensor.shape).reshape(-1) if by_element else weight.reshape(1))
        return torch.cat(parts).numpy()

    def take(self, partial: np.ndarray, by_element: bool, old: Mapping[str, Tensor], round_weight: float) -> None:
        for tensor, total, weight in self._split(partial, by_element):
            self._sums[tensor.name], self._weights[tensor.name] = total, weight
