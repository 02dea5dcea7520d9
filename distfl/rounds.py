"""The round loop: the server's half and the clients' half, in the same order.

Every collective stands once in ``serve`` and its helpers and once in ``work`` and its helpers:

    server                                    client rank
    introduce: config, shards      ------->   join
    prove: gather proofs           <-------   prove: of every budget it may host
    order "train"                  ------->
    distribute: changed units      ------->   distribute
    per wave: scatter assignments  ------->   host: train under the cap
              gather reports       <-------         predicted beside measured
              exchange.take        <-------         exchange.give: its window, unit by unit
                                              exchange.close: what ranks have added up
    order "close"                  ------->
    distribute, if it is scored    ------->   distribute
    score: gather scores           <------>   score: both evaluate their share
    gather ledgers                 <-------   what was counted in this round

Each order can be given again when a rank was lost (``recovery.py``); round 0 has only the second.
With more clients than client ranks a round has several waves. Sums run in client order, or in fixed point, whatever the
number of ranks, so the merged model is the same, bit for bit (but for ``transport.sums=float``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from distfl import settings
from distfl.allocator import collect_garbage, renew_room
from distfl.caps.base import MemoryCap
from distfl.caps.choice import make_cap
from distfl.caps.process import Peak
from distfl.checkpoints import ServerState
from distfl.config import TrainConfig
from distfl.errors import DistflError, RankLost, StartError
from distfl.exchange import Exchange, MeanOf, make_exchange
from distfl.fleet import waves_of
from distfl.hosting import NOTHING, RankState, host, rank_state, rehearse
from distfl.messages import Assignment, ClientReport, Fault, Place, RankStart, RoundResult, Score
from distfl.model import ModelSpec, filled
from distfl.recovery import REPEAT, BeforeMerge, Recovery, lost_ranks, own_place
from distfl.results import NOBODY, Merged, download_of, record_of, sent_when_changed, sits_out
from distfl.server_optimizer import ServerOptimizer
from distfl.shards import ShardIndex
from distfl.training import evaluate
from distfl.transport.base import WORD, Dismissed, Transport
from distfl.units import Unit

if TYPE_CHECKING:
    from distfl.jobs import Job  # client ranks prepare nothing

T = TypeVar("T")


# --- introduction and proof ------------------------------------------------------------------


def introduce(job: Job, state: RankState) -> list[RankStart]:
    """Server: tell every rank what this run is.

    Returns:
        How each rank came up.

    Raises:
        StartError: a rank could not prove its cap or read its data; all ranks have been told that there will be no run.
    """
    transport = state.transport
    budgets = sorted({client.budget.memory_bytes for client in job.clients})
    mark = state.residuals and state.residuals.announce()
    transport.broadcast_value(
        {
            "config": settings.to_dict(job.config),
            "spec": asdict(job.spec),
            "shards": asdict(job.shards),
            "budgets": budgets,
            "mark": mark,
        },
        "start",
    )
    own = {"cpu_seconds": time.process_time(), "cap": "", "place": asdict(own_place()), "failure": None}
    ready = transport.gather(own, "start")
    failed = {rank: message["failure"] for rank, message in enumerate(ready) if message["failure"]}
    transport.broadcast_value(not failed, "start")
    if failed:
        rank, (kind, asked, found, change) = next(iter(failed.items()))
        raise StartError(f"{asked} (rank {rank}, the first of {sorted(failed)} that fail)", f"{kind}: {found}", change)
    return [RankStart(round(message["cpu_seconds"], 3), message["cap"], Place(**message["place"])) for message in ready]


def refuse(transport: Transport) -> None:
    """Server: tell every rank that there will be no run."""
    transport.broadcast_value(None, "start")


def join(transport: Transport) -> tuple[RankState, MemoryCap] | None:
    """Client rank: learn what this run is and prove the cap; None where there will be no run."""
    message = transport.broadcast_value(purpose="start")
    if message is None:
        return None
    config = settings.from_dict(TrainConfig, message["config"])
    state = rank_state(transport, config, ModelSpec(**message["spec"]), ShardIndex.from_json(message["shards"]))
    failure, cap = None, None
    try:
        lost_ranks(config.faults, transport)  # refuses what it cannot be
        if state.residuals:
            state.residuals.check(message["mark"])
        renew_room()  # before the cap counts what is free
        cap = make_cap(config.memory.enforce)
        for budget in message["budgets"]:
            cap.prove(budget)
        if cap.in_this_process:  # else every client's process rehearses for itself
            rehearse(state)
    except DistflError as error:
        failure = [type(error).__name__, error.asked, error.found, error.change]
    except OSError as error:  # the token shards, or /proc
        failure = [
            type(error).__name__,
            "token shards and memory figures on every client rank",
            str(error),
            "set data.cache to a folder that all nodes see",
        ]
    own = {"cpu_seconds": time.process_time(), "cap": cap.name if cap else "", "place": asdict(own_place()), "failure": failure}
    transport.gather(own, "start")
    return (state, cap) if transport.broadcast_value(purpose="start") else None


# --- the server's half -----------------------------------------------------------------------


def serve(
    job: Job,
    state: RankState,
    server: ServerState,
    ranks: list[RankStart],
    record: Callable[[RoundResult], None],
    record_fault: Callable[[Fault], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Server: run rounds until the last, or until ``should_stop``; calls ``record`` after each. Round 0 trains nobody.

    Args:
        ranks: how they came up.
        record_fault: called as soon as ranks are lost and the others go on.

    Returns:
        True if the last round is done, False if stopped early.
    """
    optimizer = ServerOptimizer(job.config.server)
    optimizer.state = server.optimizer
    recovery = Recovery(state, optimizer, ranks, record_fault)
    for round in range(server.round + 1, job.config.rounds + 1):
        if should_stop():
            break
        result = _serve_round(job, state, server, optimizer, recovery, round)
        server.round = round
        record(result)
    return server.round == job.config.rounds


def dismiss(transport: Transport, finished: bool) -> None:
    """Server: let the client ranks end, once all that matters is on disk: mpirun may kill what still runs after a rank's end."""
    try:
        transport.broadcast_value({"order": "end", "finished": finished})
    except RankLost:
        if not transport.recovers:
            raise
    transport.part(finished)


def _serve_round(
    job: Job, state: RankState, server: ServerState, optimizer: ServerOptimizer, recovery: Recovery, round: int
) -> RoundResult:
    """One round; of round 0, which scores the pretrained model, what its distribution moved stands there, apart."""
    began, merged = time.monotonic(), NOBODY
    if round:

        def train(before_merge: BeforeMerge) -> Merged:
            return _serve_training(job, state, server, optimizer, recovery, round, before_merge)

        merged = recovery.repeated(round, f"round {round} is repeated", train)
        _take_over(state, server, merged)
    scored = round % job.config.evaluation.every == 0 or round == job.config.rounds
    score, ledgers = recovery.repeated(round, f"the end of round {round} is repeated", lambda _: _serve_closing(job, state, round, scored))
    record = record_of(round, merged, score, time.monotonic() - began)
    return RoundResult(record, merged.reports, {"round": round} | merged.traffic | {"mpi": ledgers})


def _serve_training(
    job: Job,
    state: RankState,
    server: ServerState,
    optimizer: ServerOptimizer,
    recovery: Recovery,
    round: int,
    before_merge: BeforeMerge,
) -> Merged:
    """Train and merge. Besides the merged units nothing of the server's state changes here: it may have to be done again."""
    transport = state.transport
    transport.broadcast_value({"order": "train", "round": round})
    workload = job.workload(round)
    planned = job.method.plan(round, job.participants(round), workload, server.limits)
    lost = [assignment for assignment in planned if assignment.client in recovery.left_out]
    active = [assignment for assignment in planned if assignment.window is not None and assignment not in lost]
    _distribute_from_server(state)
    downloads = {assignment.client: download_of(state, server, assignment) for assignment in active}
    waves, weight = waves_of(len(active), transport.size - 1), sum(assignment.weight for assignment in planned)
    transport.broadcast_value({"waves": len(waves), "weight": weight})
    exchange, merging = make_exchange(state, weight), Peak()
    reports, uploads, contributors, changed = [], {}, dict.fromkeys((unit.name for unit in state.table.trainable), 0), set()
    for number, wave in enumerate(waves):
        hosted = [active[position] for position in wave]
        recovery.hosting([assignment.client for assignment in hosted])
        of_wave, words, by_element = _serve_wave(state, hosted)
        recovery.hosting([])
        with merging.watched():
            for unit, mean in exchange.take(hosted, words, by_element, last=number == len(waves) - 1):
                changed |= _finish(state, optimizer, unit, mean, before_merge)
        reports += map(exchange.judged, of_wave)
        for assignment, of_client in zip(hosted, words):
            sent = {unit: length * WORD.itemsize for unit, length in zip(state.table.trainable, of_client) if length}
            for unit in sent:
                contributors[unit.name] += exchange.took(assignment.client, unit.index)
            if sent:
                uploads[assignment.client] = {unit.name: bytes_ for unit, bytes_ in sent.items()}
    reports += [sits_out(a, "rank_lost", "ranks were lost twice while training it") for a in lost]
    no_window = [a for a in planned if a.window is None and a not in lost]
    reports += [sits_out(a, "no_window", "no window fits its budget, or none that it did not overrun before") for a in no_window]
    payload = {
        "up": {str(client): units for client, units in uploads.items()},
        "down": {str(client): sent for client, sent in downloads.items()},
        "windows": {str(assignment.client): [assignment.window.first, assignment.window.last] for assignment in active},
        "changed": [state.table[unit].name for unit in sorted(changed)],
        "held": {str(assignment.client): sent_when_changed(state, assignment) for assignment in active if assignment.detail},
    }
    traffic = {"payload": payload, "layout": exchange.layout, "merge_peak_bytes": merging.bytes}
    return Merged(planned, reports, downloads, uploads, contributors, sorted(changed), workload.learning_rate, traffic)


def _take_over(state: RankState, server: ServerState, merged: Merged) -> None:
    """The round's training is done: what the server remembers of it."""
    windows = {assignment.client: assignment.window for assignment in merged.planned}
    for report in merged.reports:
        if report.client in merged.downloads:
            server.now_holds(report.client, windows[report.client].units)
        if report.cause == "over_cap":
            server.limits[report.client] = min(server.limits.get(report.client, report.blocks), report.blocks) - 1
    for unit in merged.changed:
        state.replica.versions[unit] += 1


def _serve_closing(job: Job, state: RankState, round: int, scored: bool) -> tuple[tuple, list[dict]]:
    """The end of a round: total score and groups' scores (None and nothing where it is not scored), and all ranks' ledgers."""
    state.transport.broadcast_value({"order": "close", "round": round, "scored": scored})
    score = (None, {})
    if scored:
        _distribute_from_server(state)
        score = _score_on_server(job, state)
    return score, state.transport.gather(state.transport.ledger.of_round(round), "ledgers")


def _serve_wave(state: RankState, hosted: list[Assignment]) -> tuple[list[ClientReport], list[list[int]], set[int]]:
    """One client per rank: hand out, and hear what became of it.

    Returns:
        Reports, words of every unit's block, and units that some rank must sum up with a weight per element.
    """
    transport = state.transport
    idle = transport.size - 1 - len(hosted)
    transport.scatter([None, *(assignment.to_json() for assignment in hosted), *[None] * idle], "assignments")
    messages = transport.gather(None, "reports")[1 : 1 + len(hosted)]
    reports = [ClientReport(**message["report"]) for message in messages]
    return reports, [message["words"] for message in messages], {unit for message in messages for unit in message["by_element"]}


def _finish(state: RankState, optimizer: ServerOptimizer, unit: Unit, mean_of: MeanOf, before_merge: BeforeMerge) -> set[int]:
    """Put the new tensors that come of one unit's means in place; returns the units they lie in."""
    shared, changed = state.replica.tensors, set()
    lifted = state.method.lifted(unit, shared)
    for name, tensor in state.method.finish(unit, shared, lambda name: mean_of(name, lifted[name])):
        place = state.table.place[name]
        before_merge(state.table[place])
        shared[name].copy_(optimizer.step(name, shared[name], tensor))
        changed.add(place)
    return changed


def _distribute_from_server(state: RankState) -> None:
    """Send the units that changed since the last time; every rank ends with the server's versions."""
    stale = state.transport.gather(state.replica.versions, "versions")
    changed = [unit for unit, version in enumerate(state.replica.versions) if any(versions[unit] != version for versions in stale)]
    state.transport.broadcast_value({"units": changed, "versions": state.replica.versions}, "versions")
    state.transport.broadcast([state.replica.buffers[unit] for unit in changed], "units")


def _score_on_server(job: Job, state: RankState) -> tuple[Score, dict[str, dict[str, float | None]]]:
    """Total score and per budget group, from all ranks' shares; sums run in client order."""
    gathered = dict(entry for entries in state.transport.gather(_own_scores(state), "scores") for entry in entries)
    total, by_group = Score(0.0, 0, 0), {}
    for client in job.clients:
        score = Score(*gathered[client.id])
        total += score
        by_group[client.group] = by_group.get(client.group, Score(0.0, 0, 0)) + score
    return total, {group: {"loss": score.loss, "accuracy": score.accuracy} for group, score in by_group.items()}


# --- the client ranks' half ------------------------------------------------------------------


def work(state: RankState, cap: MemoryCap) -> bool:
    """Client rank: take part in rounds until the server ends them. Returns whether the run is finished."""
    transport, goes_on = state.transport, lost_ranks(state.config.faults, state.transport) == REPEAT
    try:
        while (finished := _follow_order(state, cap, goes_on)) is None:
            pass
        transport.part(finished)
        return finished
    except Dismissed as dismissed:
        return dismissed.finished


def _follow_order(state: RankState, cap: MemoryCap, goes_on: bool) -> bool | None:
    """One order, or its part until a rank is lost; once the run ends, whether it is finished."""
    try:
        order = state.transport.broadcast_value()
        if order["order"] == "train":
            _work_training(state, cap)
        elif order["order"] == "close":
            _work_closing(state, order["round"], order["scored"])
        return order.get("finished")
    except RankLost:
        if not goes_on:
            raise
    state.transport.recover()
    state.replica.renew_spoilt()
    collect_garbage()
    return None


def _work_training(state: RankState, cap: MemoryCap) -> None:
    transport = state.transport
    _distribute_to_client(state)
    order = transport.broadcast_value()
    exchange = make_exchange(state, order["weight"])
    for _ in range(order["waves"]):
        assignment = transport.scatter(None, "assignments")
        if assignment is None:
            transport.gather(None, "reports")
            exchange.give([NOTHING] * len(state.table.trainable))
        else:
            _host(state, cap, exchange, Assignment.from_json(assignment))
    if order["waves"]:
        exchange.close()


def _work_closing(state: RankState, round: int, scored: bool) -> None:
    if scored:
        _distribute_to_client(state)
        state.transport.gather(_own_scores(state), "scores")
    state.transport.gather(state.transport.ledger.of_round(round), "ledgers")


def _host(state: RankState, cap: MemoryCap, exchange: Exchange, assignment: Assignment) -> None:
    """One client's round under its cap, then its report and its update."""
    blocks, report = host(state, cap, assignment, exchange.keep, state.transport.attend)
    words = [len(block) for block in blocks]
    state.transport.gather({"report": asdict(report), "words": words, "by_element": exchange.by_element()}, "reports")
    exchange.give(blocks)


def _distribute_to_client(state: RankState) -> None:
    state.transport.gather(state.replica.versions, "versions")
    message = state.transport.broadcast_value(purpose="versions")
    state.replica.spoil(message["units"])
    state.transport.broadcast([state.replica.buffers[unit] for unit in message["units"]], "units")
    state.replica.versions = message["versions"]


# --- both halves -----------------------------------------------------------------------------


def _own_scores(state: RankState) -> list[tuple[int, list]]:
    """(client, score) of this rank's share of the test shards: spread over all ranks by test tokens."""
    context, config = state.spec.context, state.config.evaluation
    most = math.inf if config.sequences is None else config.sequences * context
    tokens = [min(shard.test_tokens, most) for shard in state.shards.shards]
    load = [0] * state.transport.size
    mine = []
    for client in sorted(range(len(tokens)), key=lambda c: (-tokens[c], c)):
        rank = load.index(min(load))
        load[rank] += tokens[client]
        if rank == state.transport.rank:
            mine.append(client)
    model = filled(state.structure, state.replica.tensors)
    scores = []
    for client in mine:
        score = evaluate(model, _attended(state, state.shards.test(client, context).in_order(config.batch, config.sequences)))
        scores.append((client, [score.loss_sum, score.correct, score.tokens]))
    return scores


def _attended(state: RankState, batches: Iterator[T]) -> Iterator[T]:
    """Between two batches the rank answers the server."""
    for batch in batches:
        state.transport.attend()
        yield batch
