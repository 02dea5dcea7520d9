"""FlexLoRA: the server takes the mean of the products B A and splits it anew, by its singular values, for every rank.

Source: Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
arXiv 2402.11505: D = sum p_c B_c A_c with p_c = n_c / sum n; of D = U S V^T a client of rank r is sent B = U_r S_r and A = V_r^T. These are
the first r columns and rows of the split for the largest rank, which is what the server keeps: that part of D which is of
a higher rank is lost, and it is the least that can be. A client of a lower rank says nothing of the others, which counts as zero: where
ranks differ, a round without any training takes something away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from distfl import lora
from distfl.lora import is_adapter
from distfl.messages import Assignment, Piece
from distfl.methods.base import MeanOf
from distfl.methods.lora import RankedLora
from distfl.singular import truncated
from distfl.units import Unit


class FlexLora(RankedLora):
    """Products are averaged, factors are not."""

    source = "arXiv 2402.11505"
    new_basis = True
    derives = True

    def mean_unit(self, unit: Unit) -> Unit:
        return lora.mean_unit(unit)

    def lifted(self, unit: Unit, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        pieces = [Piece(unit.index, tensor.name, None, shared[tensor.name], 1.0) for tensor in unit.tensors]
        return {piece.name: piece.values for piece in lora.products(pieces)}

    def restore(self, pieces: list[Piece], assignment: Assignment) -> list[Piece]:
        return lora.products(pieces)

    def finish(self, unit: Unit, shared: Mapping[str, Tensor], mean_of: MeanOf) -> Iterator[tuple[str, Tensor]]:
        for tensor in unit.tensors:
            if not is_adapter(tensor.name):
                yield tensor.name, mean_of(tensor.name)[0]
            elif tensor.name.endswith("_A"):
                product = tensor.name.removesuffix("_A")
                mean, share = mean_of(product)
                if share > 0:
                    up, down = split(mean, len(shared[tensor.name]))
                    yield f"{product}_B", up
                    yield tensor.name, down


def split(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r S_r (outputs, r) and V_r^T (r, inputs) of a matrix; where it has fewer singular values, zero columns and orthonormal rows."""
    u, s, v = truncated(product, rank)
    return (u * s).float().contiguous(), v.float().contiguous()


METHOD = FlexLora
