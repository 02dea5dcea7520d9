"""How updates get from the client ranks to the server: the server's and the client's half of each way.

*Gather*: every client's blocks go to the server, unit by unit; it sees each update, and sums them up in client
order. Two units are under way at a time: while one is merged the next one arrives.

*Reduce*: every rank adds up what its own clients send, weights applied; at the end of the round the ranks that hold
sums of a unit add these up along a binomial tree, each unit from another root, and the root sends the mean to the
server. What the server takes in and holds does not depend on the number of clients. Sums in fixed point give
the same bits on any number of ranks; sums in float32 half the bytes.

*Bad blocks.* In both ways the client's rank checks its whole update (``keep``) before it is reported and before anything of it
is sent or summed up: if one block is bad the client is left out of the round altogether. Between ranks, in gather, a
block can still be garbled on its way to the server, which sees that only when it arrives, with earlier units merged and in
the last wave finished. From there on nothing more of this client is taken; what was merged stays, as good as that of a
client with a shorter window, for every unit has a mean of its own. To take it back would need all updates, or another model,
in memory, against two units under way. Sums and means carry a checksum of their own; a sum belongs to many clients that were
reported as merged, so a bad one ends the job with a WireError rather than leave some of them out unsaid.

The tree is our own and not MPI's: its partners change from round to round with the clients that trained a unit, which
would cost a communicator each; and it is known which rank sends what to whom, with every library and transport.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distfl.aggregation import FixedPointMean, UnitMean
from distfl.checksums import seal, sealed_words, unseal
from distfl.errors import WireError
from distfl.hosting import NOTHING, RankState, bad_message, check_update, decode_update
from distfl.messages import Assignment, ClientReport, Failure
from distfl.transport.base import WORD, Pending
from distfl.units import VALUE_BYTES, Unit

MeanOf = Callable[[str, Tensor], tuple[Tensor, Tensor]]  # tensor's name, old value -> mean, share
UNITS_UNDER_WAY = 2


@dataclass(frozen=True)
class Refusal:
    """From which unit on nothing of a client was taken, and why."""

    unit: int
    failure: Failure


class Exchange(ABC):
    """One round's updates. Every rank makes one at the start of the round.

    Args:
        round_weight: sum of the weights of all clients that take part.
    """

    def __init__(self, state: RankState, round_weight: float):
        self.state, self.round_weight = state, round_weight
        self.mean_units = [state.method.mean_unit(unit) for unit in state.table.trainable]
        self._refused: dict[int, Refusal] = {}

    # --- client ranks
    @abstractmethod
    def keep(self, assignment: Assignment, blocks: list[np.ndarray]) -> None:
        """Take in a hosted client's update before it is reported (raises NotFinite or WireError, nothing kept)."""

    def by_element(self) -> list[int]:
        """Units whose sums on this rank need a weight per element."""
        return []

    @abstractmethod
    def give(self, blocks: list[np.ndarray]) -> None:
        """End of a wave: a block per unit, empty ones where the rank hosted nobody."""

    @abstractmethod
    def close(self) -> None:
        """End of the round."""

    # --- server
    @property
    def layout(self) -> list[list]:
        """[unit, ranks that hold sums of it, whether with a weight per element], for every unit that ranks sum up among themselves."""
        return []

    @abstractmethod
    def take(self, hosted: list[Assignment], words: list[list[int]], by_element: set[int], last: bool) -> Iterator[tuple[Unit, MeanOf]]:
        """A wave's updates.

        Args:
            words: of each client's block of each unit; 0 where it sends none.
            by_element: units for which a rank needs a weight per element.
            last: the round's last wave.

        Yields:
            Of the last wave: every unit that somebody trained, with its mean, as soon as it is complete.
        """

    def took(self, client: int, unit: int) -> bool:
        """Whether what the client sent of a unit was taken."""
        return client not in self._refused or unit < self._refused[client].unit

    def judged(self, report: ClientReport) -> ClientReport:
        """The report as it stands after the client's update has arrived."""
        refusal = self._refused.get(report.client)
        return replace(report, ok=False, **asdict(refusal.failure)) if refusal else report


class Gather(Exchange):
    """Blocks to the server."""

    def __init__(self, state: RankState, round_weight: float):
        super().__init__(state, round_weight)
        self._means: dict[int, UnitMean] = {}
        self._rooms = deque([NOTHING] * UNITS_UNDER_WAY)  # what arrives next comes into the one that was used first

    def keep(self, assignment: Assignment, blocks: list[np.ndarray]) -> None:
        for unit, block in zip(self.state.table.trainable, blocks):
            if len(block):
                check_update(self.state, block, assignment, unit)

    def give(self, blocks: list[np.ndarray]) -> None:
        for _ in _pipelined(blocks, lambda block: self.state.transport.start_gather(block, "updates")):
            pass

    def close(self) -> None:
        """All is with the server already."""

    def take(self, hosted: list[Assignment], words: list[list[int]], by_element: set[int], last: bool) -> Iterator[tuple[Unit, MeanOf]]:
        for unit, blocks, next_ones in _pipelined(self.state.table.trainable, lambda unit: self._start(unit.index, words)):
            self._add(unit, hosted, blocks[1:], next_ones)
            if last and unit.index in self._means:
                mean = self._means.pop(unit.index)
                yield unit, lambda name, old, mean=mean: mean.mean(name, old, self.round_weight)

    def _start(self, unit: int, words: list[list[int]]) -> Pending:
        idle = self.state.transport.size - 1 - len(words)
        lengths = [0, *(of_client[unit] for of_client in words), *[0] * idle]
        room = self._rooms.popleft()
        if len(room) < sum(lengths):
            room = np.empty(sum(lengths), WORD)
        self._rooms.append(room)
        return self.state.transport.start_gather(NOTHING, "updates", lengths, room)

    def _add(self, unit: Unit, hosted: list[Assignment], blocks: Sequence[np.ndarray], next_ones: Sequence[Pending]) -> None:
        for assignment, block in zip(hosted, blocks):
            if len(block) and self.took(assignment.client, unit.index):
                try:
                    pieces = pieces_of(self.state, assignment, unit, block)
                except WireError as error:
                    self._refused[assignment.client] = Refusal(unit.index, bad_message(error))
                else:
                    self._means.setdefault(unit.index, UnitMean(self.mean_units[unit.index])).add(pieces)
            for pending in next_ones:
                pending.advance()


class Reduce(Exchange):
    """Sums along a tree, means to the server."""

    def __init__(self, state: RankState, round_weight: float):
        super().__init__(state, round_weight)
        self._means: dict[int, UnitMean] = {}
        self._ranks: dict[int, set[int]] = {}
        self._by_element: set[int] = set()

    @property
    def layout(self) -> list[list]:
        return [[unit, sorted(self._ranks[unit]), unit in self._by_element] for unit in sorted(self._ranks)]

    def keep(self, assignment: Assignment, blocks: list[np.ndarray]) -> None:
        sent = [
            (unit, pieces_of(self.state, assignment, unit, block)) for unit, block in zip(self.state.table.trainable, blocks) if len(block)
        ]
        means = [self._means.get(unit.index) or self._mean(unit) for unit, _ in sent]
        for mean, (_, pieces) in zip(means, sent):
            mean.check(pieces)
        for mean, (unit, pieces) in zip(means, sent):
            mean.add(pieces)
            self._means[unit.index] = mean

    def _mean(self, unit: Unit) -> UnitMean:
        taken = self.mean_units[unit.index]
        return FixedPointMean(taken, self.round_weight) if self.state.config.transport.sums == "fixed" else UnitMean(taken)

    def by_element(self) -> list[int]:
        return [unit for unit, mean in self._means.items() if mean.by_element]

    def give(self, blocks: list[np.ndarray]) -> None:
        """Kept until the round ends."""

    def close(self) -> None:
        transport, sent = self.state.transport, deque()
        for unit, ranks, by_element in transport.broadcast_value(purpose="layout"):
            if transport.rank not in ranks:
                continue
            mean = self._means.pop(unit)
            old = self.state.method.lifted(self.state.table[unit], self.state.replica.tensors)
            parent, children = tree(ranks, transport.rank, unit)
            total = mean.partial(by_element, old, self.round_weight)
            words = sealed_words(len(total), total.dtype)
            for child in children:
                message = transport.start_receive(np.empty(words, WORD), child, "sums").wait()
                total += unseal(message, total.dtype, unit)
            if parent == 0:
                mean.take(total, by_element, old, self.round_weight)
                total = self._message(mean, old)
            del mean, old
            sent.append(transport.start_send(seal(total, unit), parent, "means" if parent == 0 else "sums"))
            if len(sent) == UNITS_UNDER_WAY:
                sent.popleft().wait()
        for pending in sent:
            pending.wait()

    def _message(self, mean: UnitMean, old: Mapping[str, Tensor]) -> np.ndarray:
        """float32 means of all tensors of a unit, then their shares: one of each tensor, or of each element."""
        merged = [mean.mean(tensor.name, old[tensor.name], self.round_weight) for tensor in mean.unit.tensors]
        return torch.cat([part.reshape(-1) for part in (*(m for m, _ in merged), *(share for _, share in merged))]).numpy()

    def take(self, hosted: list[Assignment], words: list[list[int]], by_element: set[int], last: bool) -> Iterator[tuple[Unit, MeanOf]]:
        for rank, of_client in enumerate(words, start=1):
            for unit, length in enumerate(of_client):
                if length:
                    self._ranks.setdefault(unit, set()).add(rank)
        self._by_element |= by_element
        if not last:
            return
        layout = self.layout
        self.state.transport.broadcast_value(layout, "layout")
        for (unit, _, of_elements), message, _ in _pipelined(layout, lambda entry: self._start(*entry)):
            means = unseal(message, np.dtype(np.float32), unit)
            yield self.state.table[unit], _message_reader(self.mean_units[unit], means, of_elements)

    def _start(self, unit: int, ranks: list[int], by_element: bool) -> Pending:
        tensors, elements = self.mean_units[unit].tensors, self.mean_units[unit].elements
        message = np.empty(sealed_words(elements * 2 if by_element else elements + len(tensors), np.float32), WORD)
        return self.state.transport.start_receive(message, order_in_tree(ranks, unit)[0], "means")


def _pipelined(items: Iterable[Any], start: Callable[[Any], Pending]) -> Iterator[tuple[Any, Any, list[Pending]]]:
    """Start a transfer for each item, in order, ``UNITS_UNDER_WAY`` at a time.

    Yields:
        The item, what its transfer brought, and the transfers under way meanwhile.
    """
    under_way: deque[tuple[Any, Pending]] = deque()

    def first() -> tuple[Any, Any, list[Pending]]:  # a frame of its own: no name here may hold on to what has arrived
        item, pending = under_way.popleft()
        return item, pending.wait(), [other for _, other in under_way]

    for item in items:
        under_way.append((item, start(item)))
        if len(under_way) == UNITS_UNDER_WAY:
            yield first()
    while under_way:
        yield first()


def pieces_of(state: RankState, assignment: Assignment, unit: Unit, block: np.ndarray) -> list[Any]:
    """A client's block as pieces in the space where means are taken."""
    return state.method.restore(decode_update(state, block, assignment, unit), assignment)


def order_in_tree(ranks: list[int], unit: int) -> list[int]:
    """The ranks from the tree's root on: another root for every unit, so that the work is spread."""
    first = unit % len(ranks)
    return ranks[first:] + ranks[:first]


def tree(ranks: list[int], rank: int, unit: int) -> tuple[int, list[int]]:
    """Whom a rank sends a unit's sums to (0: it is the root, and sends to the server) and from whom it takes some.

    A binomial tree over ``order_in_tree``: position p sends to p without its lowest set bit.
    """
    order = order_in_tree(ranks, unit)
    position = order.index(rank)
    lowest_bit = position & -position or len(order)
    children, step = [], 1
    while step < lowest_bit and position + step < len(order):
        children.append(order[position + step])
        step *= 2
    return (order[position - lowest_bit] if position else 0), children


def _message_reader(unit: Unit, message: np.ndarray, by_element: bool) -> MeanOf:
    """Means and shares out of what ``Reduce._message`` made."""
    values, elements = torch.from_numpy(message), unit.bytes // VALUE_BYTES
    places = {tensor.name: (number, tensor) for number, tensor in enumerate(unit.tensors)}

    def read(name: str, old: Tensor) -> tuple[Tensor, Tensor]:
        number, tensor = places[name]
        mean = values[tensor.offset : tensor.offset + tensor.elements].view(tensor.shape)
        if by_element:
            return mean, values[elements + tensor.offset : elements + tensor.offset + tensor.elements].view(tensor.shape)
        return mean, values[elements + number]

    return read


def make_exchange(state: RankState, round_weight: float) -> Exchange:
    """The exchange that the config names; ``auto`` was settled before the ranks were told."""
    return {"gather": Gather, "reduce": Reduce}[state.config.transport.collective](state, round_weight)


def choose(assignments: Sequence[Assignment], mean_bytes: Sequence[int]) -> tuple[str, str]:
    """What ``transport.collective=auto`` means for a fleet.

    Args:
        assignments: of one round.
        mean_bytes: of the mean of each unit.

    Returns:
        "gather" or "reduce", and why.
    """
    gathered = sum(assignment.predicted_upload_bytes for assignment in assignments)
    trained = {unit for assignment in assignments if assignment.window for unit in assignment.window.units}
    reduced = sum(mean_bytes[unit] for unit in trained)
    figures = f"the server would take in {gathered / 1e6:.1f} MB a round by gather, {reduced / 1e6:.1f} MB by reduce"
    if gathered <= 2 * reduced:
        return "gather", f"{figures}: not worth giving up the sum in client order"
    return "reduce", figures
