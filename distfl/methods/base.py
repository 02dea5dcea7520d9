"""The method seam: what a federated method decides, and nothing about ranks or bytes on the wire."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import Parameter

from distfl.config import LeversConfig, TrainConfig, TrainingConfig
from distfl.costs import Cost, Costs, WholeBlock
from distfl.encoding import encoding_of
from distfl.errors import ConfigError
from distfl.fleet import MEGA, Client
from distfl.messages import Assignment, Piece, Region, cut, shape_of
from distfl.model import ModelSpec, TinyTransformer, filled, skeleton
from distfl.planner import Selection, cheapest, select, widest
from distfl.recipes import Recipe, candidates
from distfl.settings import from_dict
from distfl.training import learning_rate, state_tensors
from distfl.units import VALUE_BYTES, TensorSpec, Unit, UnitTable, Window, freeze_outside

MeanOf = Callable[[str], tuple[Tensor, Tensor]]  # tensor's name -> mean and share
Detail = dict[str, Any]  # what a method decides besides the window: a rank, a width; {} where there is nothing


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
    """One federated method. Only ``select`` and ``plan`` have no default.

    Tensors live in three places, alike unless a method says otherwise: *shared*, on the server; *held* by a client, which may be
    parts of them (``part``); and where means are taken (``mean_unit``, ``lifted``, ``restore``, ``finish``).
    """

    Options: ClassVar[type]  # frozen dataclass of method.options
    source: ClassVar[str]  # paper, section
    ignores_budgets: bool = False  # True: plans beyond them on purpose, which only memory.enforce=report allows
    new_basis: ClassVar[bool] = False  # True: what a client trains means something else in every round, so it cannot keep anything of it
    derives: ClassVar[bool] = False  # True: the server makes shared tensors of others, which only means may change
    ensemble: ClassVar[bool] = False  # True: what is scored is more than one classifier, of which the deployed model is the last

    def __init__(self, options: Any):
        self.options = options

    # --- every rank, once
    def prepare(self, model: TinyTransformer) -> None:  # noqa: B027 - most methods insert nothing
        """Insert adapters and the like."""

    def initial(self, pretrained: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Server: first values of all shared tensors; a method that inserts tensors adds theirs. Default: the pretrained ones."""
        return pretrained

    def trains(self, name: str) -> bool:
        """Whether clients ever train the shared tensor of this name. One that they never do is sent once, and no window holds it."""
        return True

    def window(self, table: UnitTable, blocks: int) -> Window:
        """The window of a client that trains so many blocks; default: the last ones, and the head."""
        return table.suffix(blocks)

    def deployed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plain model's tensors, all that the method inserted merged into them; default: as they are."""
        return tensors

    # --- what a client holds
    def details(self, spec: ModelSpec, window: Window) -> Sequence[Detail]:
        """What a client with this window may be told besides, best first; default: nothing."""
        return [{}]

    def part(self, tensor: TensorSpec, detail: Detail) -> Region:
        """The region of a shared tensor that a client holds (NOT_HELD: none of it); default: the whole."""
        return None

    def receives(self, tensor: str, detail: Detail) -> bool:
        """Whether a client is sent what it holds of the shared tensor of this name; else it makes it itself. Default: it is."""
        return True

    def changes(self, tensor: str) -> bool:
        """Whether rounds change the shared tensor of this name; default: where clients train it."""
        return self.trains(tensor)

    def sent_down(self, unit: Unit, detail: Detail) -> dict[str, int]:
        """Tensor name -> bytes of it that a client with this detail is sent when the unit has changed."""
        return {
            tensor.name: VALUE_BYTES * math.prod(shape_of(self.part(tensor, detail), tensor.shape))
            for tensor in unit.tensors
            if self.receives(tensor.name, detail)
        }

    def block(self, spec: ModelSpec, detail: Detail) -> WholeBlock:
        """What a block keeps and computes; default: a plain one."""
        return WholeBlock()

    # --- server; pure, so that `distfl plan` prints it without training
    def candidates(self, clients: Sequence[Client], workload: Workload) -> Sequence[Client]:
        """Of whom a round's clients are drawn; default: everybody."""
        return clients

    @abstractmethod
    def select(self, clients: Sequence[Client], workloads: dict[int, Workload]) -> Selection:
        """Choose the depth of the family for this fleet (raises PlanError)."""

    @abstractmethod
    def plan(self, round: int, clients: Sequence[Client], workload: Workload, limits: dict[int, int]) -> list[Assignment]:
        """One assignment for each client, in order.

        Args:
            limits: client id -> most blocks it may train, learnt from rounds in which it ran into its cap; where all blocks are
                trained or none, each block less stands for one such round.
        """

    def cost(self, client: Client, window: Window, workload: Workload, worse: int = 0) -> Cost:
        """Peak, upload and FLOPs of a client's round, by the best detail, and for that the cheapest recipe, that fit its budget.

        Args:
            worse: so many of the best details are not for this client.
        """
        blocks = workload.costs.table.trained_blocks(window)
        details, recipes = self.details(workload.costs.spec, window)[worse:], list(workload.recipes(client, blocks))
        return cheapest((self.cost_by(client, window, recipe, workload, detail) for detail in details for recipe in recipes), client.budget)

    def cost_by(self, client: Client, window: Window, recipe: Recipe, workload: Workload, detail: Detail) -> Cost:
        """The same by a given detail and recipe."""
        costs = self.held(workload.costs_for(client), detail)
        tokens = workload.sequences(client) * costs.spec.context
        return Cost(costs.peak(window, recipe), costs.upload_bytes(window), costs.flops(window, tokens, recipe), recipe, detail)

    def stable_units(self, clients: Sequence[Client], workload: Workload) -> int:
        """Leading units that none of these clients trains in any round; their outputs can be kept. Default: none is known."""
        return 0

    def held(self, costs: Costs, detail: Detail) -> Costs:
        """The formulas of what a client with this detail holds."""
        return _held(self, costs, tuple(detail.items()))

    def assignment(
        self, round: int, client: Client, window: Window, recipe: Recipe, weight: float, workload: Workload, detail: Detail
    ) -> Assignment:
        """An assignment with its predicted costs."""
        cost = self.cost_by(client, window, recipe, workload, detail)
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

    # --- client
    def hold(self, model: TinyTransformer, assignment: Assignment, seed: int) -> None:
        """Make the model of the shared tensors the one that the client holds; default: cut out the parts that its detail names.

        Args:
            seed: of the run.
        """
        if not assignment.detail:
            return
        for name, parameter in list(model.named_parameters()):
            region = self.part(TensorSpec(name, tuple(parameter.shape), 0), assignment.detail)
            if region is not None:
                owner, _, attribute = name.rpartition(".")
                held = Parameter(cut(parameter.data, region)) if math.prod(shape_of(region, parameter.shape)) else None
                setattr(model.get_submodule(owner), attribute, held)

    @contextmanager
    def attached(self, model: TinyTransformer, assignment: Assignment) -> Iterator[list[Parameter]]:
        """What the optimiser may touch of the model that the client holds; default: freeze outside the window."""
        yield freeze_outside(model, assignment.window, self.trains)

    def collect(self, tensors: dict[str, Tensor], assignment: Assignment, unit: Unit) -> list[Piece]:
        """The pieces of one unit to send; default: what the client holds of the tensors of units in the window.

        A tensor comes in one piece at most, none of its places twice, no heavier than the assignment: else it is refused.

        Args:
            tensors: of the client's model, by name.
            unit: with the shared tensors.
        """
        if unit.index not in assignment.window:
            return []
        return [
            Piece(unit.index, tensor.name, self.part(tensor, assignment.detail), tensors[tensor.name], assignment.weight)
            for tensor in unit.tensors
            if tensor.name in tensors
        ]

    # --- end of a round
    def mean_unit(self, unit: Unit) -> Unit:
        """The tensors of which means are taken in place of those of a shared unit; default: these."""
        return unit

    def lifted(self, unit: Unit, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The shared tensors of a unit where means are taken; default: as they are."""
        return shared

    def restore(self, pieces: list[Piece], assignment: Assignment) -> list[Piece]:
        """Bring the pieces of a unit to where means are taken; default: as they are."""
        return pieces

    def finish(self, unit: Unit, shared: Mapping[str, Tensor], mean_of: MeanOf) -> Iterator[tuple[str, Tensor]]:
        """New shared tensors by name, of any unit; what is not named stays. Default: the means.

        Args:
            shared: before the round.
            mean_of: weighted mean of what clients sent, equal to what is ``lifted`` where nobody sent anything, and the part of the
                round's weight behind each element, 0 to 1; a scalar tensor where it is the same for all.
        """
        for tensor in unit.tensors:
            yield tensor.name, mean_of(tensor.name)[0]


class LastBlocks(Method):
    """Every client trains the last blocks that its budget admits, the fleet the depth that lets it train most.

    ``options`` have ``allow_dropping``: clients that cannot train a single block sit out instead of being an error.
    """

    most_blocks: int | None = None  # no window is wider than this
    someone_holds_all: ClassVar[bool] = False  # True: no depth of which nobody can train every block

    def select(self, clients: Sequence[Client], workloads: dict[int, Workload]) -> Selection:
        costs = {depth: partial(self.cost_of_blocks, workload) for depth, workload in workloads.items()}
        return select(clients, costs, self.options.allow_dropping, self.most_blocks, self.someone_holds_all)

    def plan(self, round: int, clients: Sequence[Client], workload: Workload, limits: dict[int, int]) -> list[Assignment]:
        return [self._assign(round, client, workload, limits.get(client.id)) for client in clients]

    def _assign(self, round: int, client: Client, workload: Workload, limit: int | None) -> Assignment:
        admitted, depth = self.widest(client, workload), workload.costs.spec.depth
        blocks = self.possible_blocks(min(depth if limit is None else limit, self.planned_blocks(client, admitted, depth)), depth)
        weight = self.weight(client)
        if not blocks:
            return self.sits_out(round, client, weight, workload)
        cost = self.cost_of_blocks(workload, client, min(blocks, admitted))
        return self.assignment(round, client, self.window(workload.costs.table, blocks), cost.recipe, weight, workload, cost.detail)

    def planned_blocks(self, client: Client, admitted: int, depth: int) -> int:
        """How many blocks a client trains whose budget admits so many."""
        return admitted

    def possible_blocks(self, most: int, depth: int) -> int:
        """The most blocks, at most so many, that a window can have; default: so many."""
        return most

    def weight(self, client: Client) -> float:
        """Of a client's update in the mean; default: its training sequences."""
        return float(client.rows)

    def widest(self, client: Client, workload: Workload) -> int:
        """The most blocks that the client's budget admits."""
        depth = workload.costs.spec.depth
        return widest(client, min(depth, self.most_blocks or depth), partial(self.cost_of_blocks, workload))

    def stable_units(self, clients: Sequence[Client], workload: Workload) -> int:
        return min((a.window.first for a in self.plan(1, clients, workload, {}) if a.window), default=0)

    def cost_of_blocks(self, workload: Workload, client: Client, blocks: int) -> Cost:
        """Of a client's round with so many blocks."""
        return self.cost(client, self.window(workload.costs.table, blocks), workload)


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
        method.block(spec, {}),
    )


def table_of(method: Method, spec: ModelSpec) -> UnitTable:
    """The units of what the method shares."""
    shapes = {name: tuple(parameter.shape) for name, parameter in structure_of(method, spec).named_parameters()}
    return UnitTable(spec, shapes, method.trains)


@lru_cache(maxsize=2**10)
def _held(method: Method, costs: Costs, detail: tuple[tuple[str, Any], ...]) -> Costs:
    if not detail:
        return costs
    held = {tensor.name: shape_of(method.part(tensor, dict(detail)), tensor.shape) for unit in costs.table for tensor in unit.tensors}
    table = UnitTable(costs.spec, {name: shape for name, shape in held.items() if math.prod(shape)}, method.trains)
    return replace(costs, table=table, block=method.block(costs.spec, dict(detail)))
