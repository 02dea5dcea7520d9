"""One client on the rank that hosts it: training under the cap, its encoded update, its report. No collectives here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import Parameter

from distfl import seeds
from distfl.allocator import collect_garbage
from distfl.caps.base import MemoryCap, Outcome, is_allocation_failure, refused_allocation
from distfl.config import TrainConfig
from distfl.costs import Costs
from distfl.encoding import Encoding
from distfl.errors import NotFinite, WireError
from distfl.features import FeatureFile, FeatureShelf, Prefix
from distfl.frozen import matrix_bytes, narrow
from distfl.messages import Assignment, ClientReport, Failure, Piece
from distfl.methods.base import Method, costs_of, load_method, structure_of
from distfl.model import ModelSpec, TinyTransformer, filled
from distfl.recipes import LOSS_CHUNK_TOKENS, Recipe
from distfl.replica import Replica
from distfl.residuals import ResidualFolder, Residuals
from distfl.shards import ShardIndex
from distfl.training import Trained, train
from distfl.transport.base import WORD, Transport
from distfl.units import Unit, UnitTable
from distfl.updates import check, frame, unframe

NOTHING = np.empty(0, WORD)


@dataclass(frozen=True)
class RankState:
    """What every rank holds during a run."""

    transport: Transport
    config: TrainConfig
    spec: ModelSpec
    shards: ShardIndex
    method: Method
    costs: Costs
    replica: Replica
    structure: TinyTransformer  # of the method's model, without memory behind its parameters
    residuals: ResidualFolder | None  # with error feedback
    shelf: FeatureShelf = field(default_factory=FeatureShelf)

    @property
    def table(self) -> UnitTable:
        return self.costs.table

    @property
    def encoding(self) -> Encoding:
        return self.costs.encoding


def rank_state(transport: Transport, config: TrainConfig, spec: ModelSpec, shards: ShardIndex) -> RankState:
    method = load_method(config.method.name, config.method.options)
    costs = costs_of(config, method, spec)
    residuals = ResidualFolder(Path(config.run.folder)) if costs.encoding.error_feedback else None
    return RankState(transport, config, spec, shards, method, costs, Replica(costs.table), structure_of(method, spec), residuals)


def host(
    state: RankState,
    cap: MemoryCap,
    assignment: Assignment,
    keep: Callable[[Assignment, list[np.ndarray]], object] = lambda *_: None,
    attend: Callable[[], object] = lambda: None,
) -> tuple[list[np.ndarray], ClientReport]:
    """One client's round under its cap.

    Args:
        keep: takes in the update before it is reported, outside of the cap; raises NotFinite or WireError where it cannot.
        attend: called by the rank before every batch, or now and then while the client's own process works; what it raises ends the work.

    Returns:
        A block for each unit that windows are made of, empty for those it does not send, and its report. Running into the cap,
        numbers that are not finite and a damaged block are results; any other error is raised.
    """
    began = time.monotonic()
    # in a control group what is written to files counts, so nothing is kept there
    files = _feature_files(state, assignment) if cap.in_this_process else {}
    residuals = state.residuals and state.residuals.load(assignment, state.method.held(state.costs, assignment.detail).table)
    limit = state.config.faults.deadline_seconds

    def may_go_on() -> bool:
        if cap.in_this_process:
            attend()
        return limit is None or time.monotonic() - began < limit

    work = partial(_try_to_work, state, assignment, files, residuals, may_go_on)
    measured = cap.run(assignment.memory_bytes, work, _charged_bytes(state, assignment), partial(rehearse, state), attend)
    collect_garbage()
    outcome = measured.outcome
    if outcome is None:
        outcome = _left_out(over_cap(assignment, measured.killed))
    failure = outcome.facts["failure"] and Failure(**outcome.facts["failure"])
    trained = Trained(**outcome.facts["trained"])
    if failure is None and measured.peak_bytes > assignment.memory_bytes and not state.method.ignores_budgets:
        failure = over_cap(assignment, f"with a peak of {measured.peak_bytes}")
    if failure is None and trained.late and (state.config.faults.late == "leave_out" or not trained.steps):
        failure = Failure("late", f"not done after {limit} s: {trained.steps} steps")
    if failure is None:
        try:
            keep(assignment, outcome.blocks)
        except NotFinite as error:
            failure = Failure("not_finite", f"{error.asked}: {error.found}; {error.change}")
        except WireError as error:
            failure = bad_message(error)
    blocks = [NOTHING] * len(state.table.trainable) if failure else outcome.blocks
    if residuals and not failure:  # else nothing of it was sent
        state.residuals.save(assignment, residuals)
    report = ClientReport(
        round=assignment.round,
        client=assignment.client,
        ok=failure is None,
        cause=failure and failure.cause,
        reason=failure.reason if failure else f"stopped after {limit} s: {trained.steps} steps" if trained.late else "",
        blocks=state.table.trained_blocks(assignment.window),
        samples=trained.sequences,
        loss=trained.loss,
        memory_bytes=assignment.memory_bytes,
        predicted_peak_bytes=assignment.predicted_peak_bytes,
        measured_peak_bytes=measured.peak_bytes,
        predicted_upload_bytes=assignment.predicted_upload_bytes,
        upload_bytes=sum(block.nbytes for block in blocks),
        predicted_flops=assignment.predicted_flops,
        flops=trained.flops,
        seconds=time.monotonic() - began,
    )
    return blocks, report


def over_cap(assignment: Assignment, how: str) -> Failure:
    """The result of a client that needed more than its budget."""
    return Failure("over_cap", f"over its memory cap of {assignment.memory_bytes} bytes: {how}")


def bad_message(error: WireError) -> Failure:
    """The result of a client whose update cannot be read."""
    return Failure("bad_message", f"{error.asked}: {error.found}")


def _left_out(failure: Failure) -> Outcome:
    return Outcome([], {"trained": asdict(Trained(0, 0, 0, None)), "failure": asdict(failure)})


def decode_update(state: RankState, block: np.ndarray, assignment: Assignment, unit: Unit) -> list[Piece]:
    """What a client sent of one unit, on any rank that still holds the shared tensors the round started from.

    Raises:
        WireError: the block is not what was expected.
    """
    shared = state.replica.tensors
    return unframe(state.encoding, block, assignment.round, assignment.client, unit, shared, assignment.weight)


def check_update(state: RankState, block: np.ndarray, assignment: Assignment, unit: Unit) -> None:
    """That what a client is to send of one unit is what it wrote (raises WireError)."""
    check(state.encoding, block, assignment.round, assignment.client, unit)


def _try_to_work(
    state: RankState,
    assignment: Assignment,
    files: dict[int, FeatureFile],
    residuals: Residuals | None,
    may_go_on: Callable[[], bool],
) -> Outcome:
    """The client's work, wherever the cap has it done."""
    try:
        return _work(state, assignment, files, residuals, may_go_on)
    except Exception as error:
        if is_allocation_failure(error):
            return _left_out(over_cap(assignment, refused_allocation(error)))
        if isinstance(error, NotFinite):
            return _left_out(Failure("not_finite", error.found))
        raise


def _work(
    state: RankState,
    assignment: Assignment,
    files: dict[int, FeatureFile],
    residuals: Residuals | None,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Train the client's own copy of what it may train, then encode it unit by unit."""
    model = filled(state.structure, state.replica.tensors)
    data = state.shards.train(assignment.client, state.spec.context)
    state.method.hold(model, assignment, state.config.seed)
    with state.method.attached(model, assignment) as parameters:
        _own(parameters)
        narrow(model, assignment.window, state.config.levers.frozen_precision)
        if state.config.levers.mapped_prefix == "off":
            trained = {id(parameter) for parameter in parameters}
            _own(parameter for parameter in model.parameters() if id(parameter) not in trained)
        prefix = Prefix(model, assignment.window.first, files)
        costs = state.method.held(state.costs, assignment.detail)
        done = train(model, parameters, data, state.config.training, assignment, prefix, costs, state.config.seed, may_go_on)
    tensors = model.named_tensors()
    blocks = []
    for unit in state.table.trainable:
        draws = seeds.generator(state.config.seed, f"codec/{unit.index}", assignment.round, assignment.client)
        pieces = state.method.collect(tensors, assignment, unit)
        shared, kept = state.replica.tensors, residuals and residuals.tensors
        blocks.append(frame(state.encoding, pieces, assignment.round, assignment.client, unit, shared, draws, kept))
    return Outcome(blocks, {"trained": asdict(done), "failure": None})


def _own(parameters: Iterable[Parameter]) -> None:
    """Give the client copies of its own of these; until then they lie where the node holds them."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def _charged_bytes(state: RankState, assignment: Assignment) -> int:
    """What the client uses where the node holds it: its residuals, and mapped weights. No limit on private memory sees them."""
    table = state.method.held(state.costs, assignment.detail).table
    residuals = state.encoding.residual_bytes(table, assignment.window)
    if state.config.levers.mapped_prefix == "off":
        return residuals
    frozen = table.bytes - table.window_bytes(assignment.window)
    if state.config.levers.frozen_precision == "fp32":
        return residuals + frozen
    return residuals + frozen - matrix_bytes(table, assignment.window)  # narrowed copies are the client's own


def _feature_files(state: RankState, assignment: Assignment) -> dict[int, FeatureFile]:
    """Where outputs of the client's frozen units are kept: of those that never change, and of its whole prefix
    if it sees a sequence more than once in this round. The embedding alone is not worth it."""
    if state.config.levers.prefix_features == "off":
        return {}
    training, first = state.config.training, assignment.window.first
    rows = len(state.shards.train(assignment.client, state.spec.context))
    again = training.epochs > 1 if training.epochs is not None else training.steps * min(training.batch, rows) > rows
    levels = {min(assignment.stable_units, first), *([first] if again else [])}
    versions = [(state.table.versions_of(part, state.replica.versions), assignment.detail) for part in range(first)]
    return state.shelf.files(assignment.client, sorted(levels - {0, 1}), rows, state.spec.context, state.spec.width, versions)


def rehearse(state: RankState) -> None:
    """A small round of a two-block model of the same width, every lever in it: library pages, kernels' caches and
    whatever else is made at the first use belong to the baseline, not to the first client. Once with all that a method lets a
    client hold and once with the least, which a method may compute by other kernels. By single sequences: what
    stays of it may lie at the heap's end, with all that was freed below it."""
    _rehearse_products(state)
    training = replace(state.config.training, epochs=None, steps=1, batch=min(2, state.config.training.batch))
    small = rank_state(state.transport, replace(state.config, training=training), replace(state.spec, depth=2), state.shards)
    recipe = Recipe(1, max(1, state.spec.context // 2), recomputed=1)
    window = small.method.window(small.table, 2)
    details = small.method.details(small.spec, window)
    for detail in [details[0], *details[1:][-1:]]:
        table = small.method.held(small.costs, detail).table
        residuals = Residuals(table, window.units) if small.encoding.error_feedback else None
        _work(small, Assignment(0, 0, window, 1.0, 0, 0, 0, 0, recipe, learning_rate=0.0, detail=detail), {}, residuals)


def _rehearse_products(state: RankState) -> None:
    """Every matrix product of a full step, forward and backward: MKL keeps what it packs operands into for good."""
    width, whole = state.spec.width, state.config.training.batch * state.spec.context
    at_head = whole if state.config.levers.loss_chunks == "off" else min(whole, LOSS_CHUNK_TOKENS)
    for inputs, outputs, rows in (
        (width, 3 * width, whole),
        (width, width, whole),
        (width, state.spec.feedforward, whole),
        (state.spec.feedforward, width, whole),
        (width, state.spec.vocabulary, at_head),
    ):
        layer = torch.nn.Parameter(torch.zeros(outputs, inputs))
        x = torch.zeros(rows, inputs, requires_grad=True)
        torch.nn.functional.linear(x, layer).sum().backward()
