"""FLoRA: adapters start afresh in every round, and their products are merged into the matrices they stand beside.

Source: Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
arXiv 2409.05976: stacking the factors of all clients, the weights p_c = n_c / sum n on one of them, gives the mean of products without
noise, W <- W + scale sum p_c B_c A_c, whatever their ranks. Here the server adds up the products and sends the changed matrices,
not the stack: in bytes the stack is less as long as the ranks of all clients add up to less than (inputs outputs) / (inputs + outputs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from distfl import lora, seeds
from distfl.lora import is_adapter
from distfl.messages import Assignment, Piece
from distfl.methods.base import Detail, MeanOf
from distfl.methods.lora import RankedLora
from distfl.model import TinyTransformer
from distfl.units import Unit


class Flora(RankedLora):
    """The shared adapters stay zero: a client draws its own and sends them, the matrices beside them take up what it learnt."""

    source = "arXiv 2409.05976"
    new_basis = True

    def initial(self, pretrained: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        adapters = super().initial(pretrained, seed)
        return {name: torch.zeros_like(tensor) if is_adapter(name) else tensor for name, tensor in adapters.items()}

    def receives(self, tensor: str, detail: Detail) -> bool:
        return not is_adapter(tensor)

    def changes(self, tensor: str) -> bool:
        layers = {lora.PLACES[target][0] for target in self.options.targets}
        return (self.trains(tensor) and not is_adapter(tensor)) or tensor.split(".")[2:] in [[layer, "weight"] for layer in layers]

    def hold(self, model: TinyTransformer, assignment: Assignment, seed: int) -> None:
        super().hold(model, assignment, seed)
        for name, parameter in model.named_parameters():
            # below the window B is zero, and the shared zeros do as well
            if name.endswith("_A") and 1 + int(name.split(".")[1]) in assignment.window:
                draws = seeds.generator(seed, f"flora/{name}", assignment.round, assignment.client)
                parameter.data = lora.drawn(tuple(parameter.shape), draws)

    def mean_unit(self, unit: Unit) -> Unit:
        return lora.mean_unit(unit)

    def lifted(self, unit: Unit, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {tensor.name: shared.get(tensor.name, torch.zeros(tensor.shape)) for tensor in self.mean_unit(unit).tensors}

    def restore(self, pieces: list[Piece], assignment: Assignment) -> list[Piece]:
        return lora.products(pieces)

    def finish(self, unit: Unit, shared: Mapping[str, Tensor], mean_of: MeanOf) -> Iterator[tuple[str, Tensor]]:
        changed: dict[str, Tensor] = {}
        for tensor in self.mean_unit(unit).tensors:
            mean, share = mean_of(tensor.name)
            if tensor.name in shared:
                changed[tensor.name] = mean
            elif share > 0:
                matrix, rows = lora.place_of(tensor.name, len(mean))
                changed.setdefault(matrix, shared[matrix].clone())[rows] += self.options.scale * mean
        yield from changed.items()


METHOD = Flora
