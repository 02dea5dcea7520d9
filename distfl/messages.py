"""All that crosses ranks or reaches disk: small frozen records, and pieces of tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distfl.recipes import Recipe
from distfl.units import Window

Region = None | np.ndarray | tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Piece:
    """(Part of) one tensor on its way to the server.

    Args:
        unit: index of the unit it belongs to.
        name: the tensor's name.
        region: None = the whole tensor; a pair of index arrays = rows x columns; one index array = flat positions.
        values: float32 tensor of the region's shape.
        weight: of these values in the mean.
    """

    unit: int
    name: str
    region: Region
    values: Tensor
    weight: float


NOT_HELD = np.empty(0, np.int64)  # a region without a place


def shape_of(region: Region, full_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the values of a region of a tensor."""
    return full_shape if region is None else tuple(map(len, region)) if isinstance(region, tuple) else (len(region),)


def cut(tensor: Tensor, region: Region) -> Tensor:
    """The values of a region; a view where its places lie one after another."""
    if region is None:
        return tensor
    if isinstance(region, tuple):
        return _along(_along(tensor, 0, region[0]), 1, region[1])
    return _along(tensor.reshape(-1), 0, region)


def _along(tensor: Tensor, axis: int, places: np.ndarray) -> Tensor:
    if len(places) and np.array_equal(places, np.arange(places[0], places[0] + len(places))):
        return tensor.narrow(axis, int(places[0]), len(places))
    return tensor.index_select(axis, torch.as_tensor(places))


@dataclass(frozen=True)
class Assignment:
    """What one client does in one round. Small values, never tensors.

    Args:
        window: the units it trains; None = it cannot take part.
        weight: of its update in the mean.
        memory_bytes: its cap, above the process's baseline.
        predicted_peak_bytes: what the planner expects it to use of it.
        predicted_upload_bytes: tensor values it will send.
        predicted_flops: of its training, every sequence through all units.
        recipe: how it computes its steps.
        learning_rate: of this round.
        stable_units: leading units that no client ever trains in this run.
        detail: what else the method wants its clients to know.
    """

    round: int
    client: int
    window: Window | None
    weight: float
    memory_bytes: int
    predicted_peak_bytes: int
    predicted_upload_bytes: int
    predicted_flops: int
    recipe: Recipe
    learning_rate: float
    stable_units: int = 0
    detail: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict:
        return asdict(self) | {"window": None if self.window is None else [self.window.first, self.window.last]}

    @staticmethod
    def from_json(values: dict) -> Assignment:
        window = None if values["window"] is None else Window(*values["window"])
        return Assignment(**values | {"window": window, "recipe": Recipe(**values["recipe"])})


Cause = Literal["over_cap", "not_finite", "bad_message", "no_window", "rank_lost", "late"]


@dataclass(frozen=True)
class Failure:
    """Why a client's update is not (wholly) merged: a result, not an error."""

    cause: Cause
    reason: str


@dataclass(frozen=True)
class ClientReport:
    """What one client did in one round: predicted beside measured.

    Args:
        ok: its update was merged.
        cause, reason: why not, in a word and in a sentence; None and "" where it was. One that was merged after it was stopped at
            its deadline has a reason, too.
        blocks: trained blocks of its window.
        samples: sequences it trained on (with repetitions).
        loss: mean training loss in nats per token; None where it did not finish a step.
        memory_bytes: the cap. predicted_peak_bytes, measured_peak_bytes: above the baseline.
        predicted_upload_bytes, upload_bytes: tensor values planned; messages handed to the transport, headers included.
        predicted_flops, flops: floating-point operations of its training, planned and counted as they were done
            (analytic, multiply-add = 2); fewer where features of the frozen units were kept.
    """

    round: int
    client: int
    ok: bool
    cause: Cause | None
    reason: str
    blocks: int
    samples: int
    loss: float | None
    memory_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    predicted_upload_bytes: int
    upload_bytes: int
    predicted_flops: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Place:
    """Where a rank lives: host, process id, and the namespace that this id belongs to."""

    host: str
    process: int
    namespace: str

    def shares_processes_with(self, other: Place) -> bool:
        return (self.host, self.namespace) == (other.host, other.namespace)


@dataclass(frozen=True)
class RankStart:
    """How a rank came up: CPU seconds from its process's start until it was ready; the cap it proved, "" on the server."""

    cpu_seconds: float
    cap: str
    place: Place


@dataclass(frozen=True)
class Fault:
    """One line of ``faults.jsonl``: ranks that were lost, and what was done.

    Args:
        phase: what the server was doing when it learnt of it.
        lost: [number at the start of the job, host, process id] of each rank.
        hosted: clients that these ranks were training.
        left_out: clients that are left out from now on, for two ranks were lost that were training them.
        client_ranks: that live.
        done: what is repeated.
        seconds: of work that were lost, recovery included.
    """

    round: int
    phase: str
    lost: list[tuple[int, str, int]]
    hosted: list[int]
    left_out: list[int]
    client_ranks: int
    done: str
    seconds: float


@dataclass(frozen=True)
class Score:
    """Held-out figures of one model on some clients' test text: sums, so that scores add up."""

    loss_sum: float  # nats
    correct: int
    tokens: int

    def __add__(self, other: Score) -> Score:
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.tokens + other.tokens)

    @property
    def loss(self) -> float | None:
        return self.loss_sum / self.tokens if self.tokens else None

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.tokens if self.tokens else None


@dataclass(frozen=True)
class RoundRecord:
    """One line of ``rounds.jsonl``. Losses in nats per token; accuracy of the most likely next token, 0 to 1.

    Args:
        round: 0 is the pretrained model, before any training.
        test_loss, test_accuracy: on the union of all test shards; None where not evaluated.
        groups: budget group -> {"loss", "accuracy"} on that group's test shards.
        taking_part, merged: clients planned for this round, and those whose update was merged.
        upload_bytes, download_bytes, first_download_bytes: payload of all clients; the first transfer of the model apart.
        peak_share: largest measured peak over cap of this round's clients.
        contributors: unit name -> clients whose tensors were merged.
    """

    round: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    groups: dict[str, dict[str, float | None]]
    taking_part: int
    merged: int
    upload_bytes: int
    download_bytes: int
    first_download_bytes: int
    flops: int
    peak_share: float | None
    contributors: dict[str, int]
    learning_rate: float | None
    seconds: float


@dataclass(frozen=True)
class RoundResult:
    """What a round leaves for the records."""

    record: RoundRecord
    reports: list[ClientReport]
    traffic: dict
