"""One client on the rank that hosts it: training under the cap, its encoded update, its report. No collectives here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from distfl import seeds
from distfl.codecs.base import Codec, frame, load_codec
from distfl.config import TrainConfig
from distfl.costs import Costs
from distfl.errors import NotFinite
from distfl.memory_cap import Meter, collect_garbage, is_allocation_failure, refused_allocation
from distfl.messages import Assignment, ClientReport, Failure
from distfl.methods.base import Method, build_model, costs_of, load_method
from distfl.model import ModelSpec
from distfl.replica import Replica
from distfl.shards import ShardIndex
from distfl.training import Trained, train
from distfl.transport.base import WORD, Transport
from distfl.units import Unit, UnitTable

NOTHING = np.empty(0, WORD)


@dataclass(frozen=True)
class RankState:
    """What every rank holds during a run."""

    transport: Transport
    config: TrainConfig
    spec: ModelSpec
    shards: ShardIndex
    method: Method
    codec: Codec
    costs: Costs
    replica: Replica

    @property
    def table(self) -> UnitTable:
        return self.costs.table


def rank_state(transport: Transport, config: TrainConfig, spec: ModelSpec, shards: ShardIndex) -> RankState:
    method = load_method(config.method.name, config.method.options)
    costs = costs_of(config, method, spec)
    return RankState(transport, config, spec, shards, method, load_codec(config.transport.codec), costs, Replica(costs.table))


def try_to_train(state: RankState, assignment: Assignment) -> tuple[dict[str, torch.Tensor] | None, Trained, Failure | None]:
    """Train; running into the cap or into numbers that are not finite is a result, any other error is not caught."""
    try:
        tensors, trained = _train(state, assignment)
        return tensors, trained, None
    except Exception as error:
        if is_allocation_failure(error):
            failure = over_cap(assignment, f"in training: {refused_allocation(error)}")
        elif isinstance(error, NotFinite):
            failure = Failure("not_finite", error.found)
        else:
            raise
    collect_garbage()
    return None, Trained(0, 0, None), failure


def over_cap(assignment: Assignment, where: str) -> Failure:
    """The result of a client that needed more than its budget."""
    return Failure("over_cap", f"over its memory cap of {assignment.memory_bytes} bytes {where}")


def _train(state: RankState, assignment: Assignment) -> tuple[dict[str, torch.Tensor], Trained]:
    """The client's own copy of the model, trained; only its tensors are left when this returns."""
    model = build_model(state.method, state.spec, state.replica.copy())
    data = state.shards.train(assignment.client, state.spec.context)
    with state.method.attached(model, assignment) as parameters:
        trained = train(model, parameters, assignment.window.first, data, state.config.training, assignment, state.config.seed)
    tensors = state.method.shared(model)
    for unit in assignment.window.units:
        for tensor in state.table[unit].tensors:
            if not torch.isfinite(tensors[tensor.name]).all():
                raise NotFinite(f"update of client {assignment.client}", f"{tensor.name} is not finite", "lower training.learning_rate")
    return tensors, trained


def try_to_frame(
    state: RankState, tensors: dict[str, torch.Tensor] | None, assignment: Assignment, unit: Unit
) -> tuple[np.ndarray, Failure | None]:
    """One unit's block; empty where there is nothing to send or no room to encode it."""
    if tensors is None:
        return NOTHING, None
    draws = seeds.generator(state.config.seed, f"codec/{unit.index}", assignment.round, assignment.client)
    try:
        return frame(state.codec, state.method.collect(tensors, assignment, unit), assignment.round, assignment.client, draws), None
    except Exception as error:
        if not is_allocation_failure(error):
            raise
        return NOTHING, over_cap(assignment, f"in encoding {unit.name}")


def report_of(
    state: RankState, assignment: Assignment, meter: Meter, trained: Trained, failure: Failure | None, uploaded: int, seconds: float
) -> ClientReport:
    """What the client did, predicted beside measured."""
    return ClientReport(
        round=assignment.round,
        client=assignment.client,
        ok=failure is None,
        cause=failure and failure.cause,
        reason=failure.reason if failure else "",
        blocks=state.table.trained_blocks(assignment.window),
        samples=trained.sequences,
        loss=trained.loss,
        memory_bytes=assignment.memory_bytes,
        predicted_peak_bytes=assignment.predicted_peak_bytes,
        measured_peak_bytes=meter.peak_bytes,
        upload_bytes=uploaded,
        flops=state.costs.flops(assignment.window, trained.sequences * state.spec.context),
        seconds=seconds,
    )


def rehearse(state: RankState) -> None:
    """One step and one update of a two-block model of the same width, through the very code of a round: library
    pages, kernels' caches and whatever else is made at the first use belong to the baseline, not to the first client."""
    training = replace(state.config.training, epochs=None, steps=1)
    small = rank_state(state.transport, replace(state.config, training=training), replace(state.spec, depth=2), state.shards)
    assignment = Assignment(0, 0, small.table.suffix(1), 1.0, 0, 0, learning_rate=0.0)
    tensors, _ = _train(small, assignment)
    for unit in small.table:
        try_to_frame(small, tensors, assignment, unit)
