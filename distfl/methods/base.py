"""The method seam: what a federated method decides, and nothing about ranks or bytes on the wire."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import Parameter

from distfl.config import LeversConfig, TrainConfig, TrainingConfig
from distfl.costs import Cost, Costs
from distfl.encoding import encoding_of
from distfl.errors import ConfigError
from distfl.fleet import MEGA, Client
from distfl.messages import Assignment, Piece
from distfl.model import ModelSpec, TinyTransformer, filled, skeleton
from distfl.planner import Selection, cheapest
from distfl.recipes import Recipe, candidates
from distfl.settings import from_dict
from distfl.training import learning_rate, state_tensors
from distfl.units import Unit, UnitTable, freeze_outside


@dataclass(frozen=True)
class Workload:
    """What planning needs besides the clients: the formulas of the model in use, and how clients train it.

    Args:
        costs: formulas of one depth.
        training: batch, epochs or steps.
        levers: which recipes the planner may use.
        stable_units: leading units that no client of the fleet ever trains.
        learning_rate: of the round being planned.
    """

    costs: Costs
    training: TrainingConfig
    levers: LeversConfig
    learning_rate: float
    stable_units: int = 0

    def costs_for(self, client: Client) -> Costs:
        """The formulas with the batch this client fills: one with few sequences never makes a full one."""
        return replace(self.costs, batch=min(self.costs.batch, client.rows))

    def recipes(self, client: Client, blocks: int) -> Iterator[Recipe]:
        """How a client may compute its steps, cheapest in time first."""
        return candidates(self.levers, self.training, self.costs_for(client).batch, blocks)

    def sequences(self, client: Client) -> int:
        """Training sequences (padded ones count) that a client computes in one round."""
        if self.training.epochs is not None:
            return self.training.epochs * client.rows
        return self.training.steps * min(self.training.batch, client.rows)


class Method(ABC):
    """One federated method. Only ``select`` and ``plan`` have no default."""

    Options: ClassVar[type]  # frozen dataclass of method.options
    source: ClassVar[str]  # paper, section
    needs_each_update: ClassVar[bool] = False  # True: its merge is no mean of pieces, so the server must see all updates

    def __init__(self, options: Any):
        self.options = options

    # --- every rank, once
    def prepare(self, model: TinyTransformer) -> None:  # noqa: B027 - most methods insert nothing
        """Insert adapters and the like."""

    def initial(self, pretrained: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Server: first values of all shared tensors; a method that inserts tensors adds theirs. Default: the pretrained ones."""
        return pretrained

    def shared(self, model: TinyTransformer) -> dict[str, Tensor]:
        """The tensors that the server owns, in the model's order."""
        return model.named_tensors()

    # --- server; pure, so that `distfl plan` prints it without training
    @abstractmethod
    def select(self, clients: Sequence[Client], workloads: dict[int, Workload]) -> Selection:
        """Choose the depth of the family for this fleet (raises PlanError)."""

    @abstractmethod
    def plan(self, round: int, clients: Sequence[Client], workload: Workload, limits: dict[int, int]) -> list[Assignment]:
        """One assignment for each client, in order.

        Args:
            limits: client id -> most blocks it may train, learnt from rounds in which it ran into its cap.
        """

    def cost(self, client: Client, window: Any, workload: Workload) -> Cost:
        """Peak, upload and FLOPs of a client's round, by the cheapest recipe that fits its budget; default: those of its window."""
        blocks = workload.costs.table.trained_blocks(window)
        return cheapest((self.cost_by(client, window, recipe, workload) for recipe in workload.recipes(client, blocks)), client.budget)

    def cost_by(self, client: Client, window: Any, recipe: Recipe, workload: Workload) -> Cost:
        """The same by a given recipe."""
        costs = workload.costs_for(client)
        tokens = workload.sequences(client) * costs.spec.context
        upload = self.upload_bytes(client, window, workload)
        return Cost(costs.peak(window, recipe), upload, costs.flops(window, tokens, recipe), recipe)

    def upload_bytes(self, client: Client, window: Any, workload: Workload) -> int:
        """Payload of the update as it is encoded, without block headers."""
        return workload.costs.upload_bytes(window)

    def stable_units(self, clients: Sequence[Client], workload: Workload) -> int:
        """Leading units that none of these clients trains in any round; their outputs can be kept. Default: none is known."""
        return 0

    def assignment(
        self, round: int, client: Client, window: Any, recipe: Recipe, weight: float, workload: Workload, **detail: Any
    ) -> Assignment:
        """An assignment with its predicted costs."""
        cost = self.cost_by(client, window, recipe, workload)
        return Assignment(
            round,
            client.id,
            window,
            weight,
            client.budget.memory_bytes,
            cost.peak.bytes,
            cost.upload_bytes,
            cost.flops,
            recipe,
            workload.learning_rate,
            workload.stable_units,
            detail,
        )

    def sits_out(self, round: int, client: Client, weight: float, workload: Workload) -> Assignment:
        """The assignment of a client that cannot take part."""
        return Assignment(round, client.id, None, weight, client.budget.memory_bytes, 0, 0, 0, Recipe(1), workload.learning_rate)

    def trained_bytes(self, window: Any, table: UnitTable) -> int:
        """Bytes of the tensors that a client with this window trains; all others it only reads."""
        return table.window_bytes(window)

    # --- client
    @contextmanager
    def attached(self, model: TinyTransformer, assignment: Assignment) -> Iterator[list[Parameter]]:
        """What the optimiser may touch; default: freeze outside the window."""
        yield freeze_outside(model, assignment.window)

    def collect(self, tensors: dict[str, Tensor], assignment: Assignment, unit: Unit) -> list[Piece]:
        """The pieces of one unit to send; default: the whole tensors of units in the window.

        A tensor comes in one piece at most, none of its places twice, no heavier than the assignment: else it is refused.
        """
        if unit.index not in assignment.window:
            return []
        return [Piece(unit.index, tensor.name, None, tensors[tensor.name], assignment.weight) for tensor in unit.tensors]

    # --- server, end of a round
    def restore(self, pieces: list[Piece], assignment: Assignment) -> list[Piece]:
        """Bring pieces into the space where means are taken; default: unchanged."""
        return pieces

    def finish(self, unit: Unit, old: Tensor, mean: Tensor, share: Tensor) -> Tensor:
        """The new shared tensor.

        Args:
            old: before the round.
            mean: weighted mean of what clients sent; equals ``old`` where nobody sent anything.
            share: part of the round's weight behind each element, 0 to 1; a scalar tensor where it is the same for all.
        """
        return mean


def build_model(method: Method, spec: ModelSpec, tensors: dict[str, Tensor]) -> TinyTransformer:
    """The method's model whose parameters *are* the given tensors (not copies)."""
    return filled(structure_of(method, spec), tensors)


def structure_of(method: Method, spec: ModelSpec) -> TinyTransformer:
    """The method's model without memory behind its parameters."""
    model = skeleton(spec)
    method.prepare(model)
    return model


def load_method(name: str, options: dict[str, Any]) -> Method:
    """The method of this name with its options checked (raises ConfigError)."""
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))
    if name not in known:
        raise ConfigError(f"method.name = {name}", f"known methods are {', '.join(known)}", "set method.name to one of these")
    kind = importlib.import_module(f"distfl.methods.{name}").METHOD
    try:
        return kind(from_dict(kind.Options, options))
    except ConfigError as error:
        raise ConfigError(f"method.options of {name}: {error.asked}", error.found, error.change) from None


def workload(config: TrainConfig, method: Method, spec: ModelSpec, round: int) -> Workload:
    """Formulas of one depth under this config."""
    return Workload(costs_of(config, method, spec), config.training, config.levers, learning_rate(config.training, round, config.rounds))


def costs_of(config: TrainConfig, method: Method, spec: ModelSpec) -> Costs:
    """The cost formulas of one depth; every rank builds the same."""
    margin = round(config.memory.margin_mb * MEGA)
    return Costs(
        table_of(method, spec),
        config.training.batch,
        state_tensors(config.training),
        margin,
        config.levers.frozen_precision,
        encoding_of(config.transport),
    )


def table_of(method: Method, spec: ModelSpec) -> UnitTable:
    """The units of what the method shares."""
    shared = method.shared(structure_of(method, spec))
    return UnitTable(spec, {name: tuple(tensor.shape) for name, tensor in shared.items()})
