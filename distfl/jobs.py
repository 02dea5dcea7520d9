"""Everything one run needs, prepared once by the server rank: data, fleet, depth, formulas.

``distfl plan`` stops here; ``distfl train`` goes on with ``rounds.py``. Cheap refusals come first,
so that bad input costs no tokenising.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from distfl.config import TrainConfig
from distfl.corpora import cache_folder, read
from distfl.encoding import encoding_of
from distfl.errors import ConfigError
from distfl.exchange import choose
from distfl.family import Family, open_family
from distfl.fleet import Client, build_fleet, participants
from distfl.methods.base import Method, Workload, load_method, workload
from distfl.model import ModelSpec
from distfl.partition import deal
from distfl.planner import Selection
from distfl.shards import ShardIndex, build


@dataclass(frozen=True)
class Job:
    """A run that can start."""

    config: TrainConfig
    family: Family
    method: Method
    shards: ShardIndex
    clients: list[Client]
    selection: Selection
    collective_reason: str = "as configured"

    @property
    def spec(self) -> ModelSpec:
        return self.family.spec(self.selection.depth)

    def workload(self, round: int) -> Workload:
        """Formulas and learning rate of one round at the chosen depth."""
        return replace(workload(self.config, self.method, self.spec, round), stable_units=self.stable_units)

    def participants(self, round: int) -> list[Client]:
        """Clients of one round, in client order."""
        return participants(self.candidates, self.config.fleet.participants, self.config.seed, round)

    @cached_property
    def candidates(self) -> Sequence[Client]:
        """Of whom they are drawn."""
        return self.method.candidates(self.clients, workload(self.config, self.method, self.spec, 1))

    @cached_property
    def stable_units(self) -> int:
        """Leading units that nobody trains in this run."""
        return self.method.stable_units(self.clients, workload(self.config, self.method, self.spec, 1))


def prepare(config: TrainConfig) -> Job:
    """Read data, deal it, open the family, choose the depth.

    Raises:
        DistflError: anything that cannot work, before a rank trains.
    """
    method = load_method(config.method.name, config.method.options)
    if encoding_of(config.transport).error_feedback and method.new_basis:
        raise ConfigError(
            f"error feedback with the method {config.method.name}",
            "what a client trains means something else in every round, so what was lost of it cannot be added to the next",
            "set transport.error_feedback=off, or take a codec that is not biased (exact, bf16, int8, int4)",
        )
    if config.server.optimizer != "average" and method.derives:
        raise ConfigError(
            f"server.optimizer = {config.server.optimizer} with the method {config.method.name}",
            "it makes shared tensors of others, which no longer belong together once each has gone a step of its own",
            "set server.optimizer=average",
        )
    if method.ignores_budgets and config.memory.enforce != "report":
        raise ConfigError(
            f"the method {config.method.name} beyond budgets with memory.enforce = {config.memory.enforce}",
            "clients over their cap would be left out",
            "set memory.enforce=report, which measures and enforces nothing",
        )
    family = open_family(config.model.family, config.model.depths)
    depths = config.model.depths or family.depths
    shards = tokenised(config, family)
    context = family.spec(depths[0]).context
    rows = [len(shards.train(client, context)) for client in range(len(shards.shards))]
    clients = build_fleet(config.fleet, [shard.name for shard in shards.shards], rows, config.seed)
    selection = method.select(clients, {depth: workload(config, method, family.spec(depth), 1) for depth in depths})
    return _settled(Job(config, family, method, shards, clients, selection))


def _settled(job: Job) -> Job:
    """With ``transport.collective=auto`` replaced by what it means here."""
    asked = job.config.transport.collective
    if asked != "auto":
        return job
    workload = job.workload(1)
    planned = job.method.plan(1, job.participants(1), workload, {})
    collective, reason = choose(planned, [job.method.mean_unit(unit).bytes for unit in workload.costs.table.trainable])
    return replace(
        job, config=replace(job.config, transport=replace(job.config.transport, collective=collective)), collective_reason=reason
    )


def tokenised(config: TrainConfig, family: Family) -> ShardIndex:
    """The clients' token shards, from the cache where they lie there."""
    corpus = read(config.data)
    data = config.data
    key = "/".join(
        map(
            str,
            (
                corpus.checksum,
                family.tokenizer_checksum,
                data.partition,
                data.clients,
                data.selection,
                data.dirichlet_alpha,
                data.test_fraction,
                data.minimum_characters,
                config.seed,
            ),
        )
    )
    parts = ((part.name, part.train, part.test) for part in deal(corpus, data, config.seed))
    return build(parts, family.tokenizer(), key, cache_folder(data))
