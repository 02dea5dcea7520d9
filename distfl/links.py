"""Links: bytes between pairs of ranks, as Open MPI counts them and as the collectives asked for imply them.

Open MPI's monitoring counts every message that MPI sends to another rank, where it is handed to the point-to-point layer: whole
payloads without headers, whatever carries them (shared memory, copies between processes, TCP). Starting and ending MPI is not counted.
The expected side holds for the non-blocking collectives of Open MPI 5's libnbc component, which every distfl transport call uses.

Source: Open MPI 5.0.11, ompi/mca/common/monitoring and ompi/mca/coll/libnbc; compared on 2 to 17 ranks, 0 bytes to 5 MB per call.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distfl.errors import TransportError

Link = tuple[int, int]  # (source rank, destination rank)

LINEAR_RANKS = 4  # up to so many ranks, libnbc's root sends a broadcast to each rank itself
ASKED_KINDS = ("C", "D", "O2A", "A2O", "A2A")  # what was asked of blocking and non-blocking collectives, not what moved


@dataclass
class Links:
    """What moved on each link: payload bytes, and the messages they came in."""

    bytes: Counter[Link] = field(default_factory=Counter)
    messages: Counter[Link] = field(default_factory=Counter)

    def add(self, source: int, destination: int, bytes_: int, messages: int = 1) -> None:
        self.bytes[source, destination] += bytes_
        self.messages[source, destination] += messages

    def __add__(self, other: Links) -> Links:
        return Links(self.bytes + other.bytes, self.messages + other.messages)


@dataclass
class Profile:
    """What all ranks' monitoring counted, by who caused it.

    Args:
        collective: messages that collectives consist of.
        point_to_point: the program's own sends.
        one_sided: the program's puts, and gets (on the link that the bytes took).
    """

    collective: Links = field(default_factory=Links)
    point_to_point: Links = field(default_factory=Links)
    one_sided: Links = field(default_factory=Links)

    @property
    def total(self) -> Links:
        return self.collective + self.point_to_point + self.one_sided


def monitoring_flags(prefix: Path) -> list[str]:
    """mpirun flags that make every rank write ``PREFIX.RANK.prof`` as MPI ends, and that hold libnbc to the rule of ``broadcast_links``.

    The folder must be there, and on several nodes shared: where a file cannot be written Open MPI says nothing and exits 0. No file
    comes either from ranks that were aborted, or under ``--with-ft ulfm``.
    """
    values = {
        "pml_monitoring_enable": 2,  # collectives' messages apart from the program's own
        "pml_monitoring_enable_output": 3,  # to a file
        "pml_monitoring_filename": prefix.absolute(),  # it is opened at the end, in whatever folder the rank works in then
        "coll_libnbc_priority": 100,  # above every component with broadcasts of its own (adapt, ucc, hcoll)
        "coll_libnbc_ibcast_algorithm": "ignore",  # no fixed algorithm
        "coll_libnbc_ibcast_skip_dt_decision": "true",  # choose by the number of ranks, not by size
    }
    return [word for name, value in values.items() for word in ("--mca", name, str(value))]


def read_profiles(prefix: Path, ranks: int) -> Profile:
    """What ``ranks`` ranks counted into ``PREFIX.RANK.prof``.

    Raises:
        TransportError: a rank's file is missing or damaged, or there are files of other ranks.
    """
    profile = Profile()
    wanted = [prefix.with_name(f"{prefix.name}.{rank}.prof") for rank in range(ranks)]
    found = set(prefix.parent.glob(f"{glob.escape(prefix.name)}.*.prof"))
    missing = [path.name for path in wanted if path not in found]
    if missing:
        raise TransportError(
            f"bytes that each of {ranks} ranks sent, counted by Open MPI's monitoring",
            f"no file {missing[0]} in {prefix.parent} ({len(missing)} of {ranks} are missing)",
            "use Open MPI 5 with its component pml monitoring (ompi_info lists it), without --with-ft; let every rank end by itself",
        )
    if others := sorted(path.name for path in found.difference(wanted)):
        raise TransportError(f"profiles of {ranks} ranks in {prefix.parent}", f"also {others[0]}", "give each run a prefix of its own")
    for rank, path in enumerate(wanted):
        try:
            _read(path.read_text(), rank, ranks, profile)
        except (ValueError, IndexError) as error:
            raise TransportError(f"what rank {rank} sent, from {path}", f"{error}", "run it again; is the disk full?") from error
    return profile


def _read(text: str, rank: int, ranks: int, profile: Profile) -> None:
    """Add one rank's file to a profile (raises ValueError or IndexError where it is not a whole file of that rank).

    Lines are tab-separated: kind, rank, peer, "N bytes", "N msgs sent". The first of a peer's E and I lines ends with a histogram:
    messages of both kinds by size.
    """
    kinds = {"I": profile.collective, "E": profile.point_to_point, "S": profile.one_sided, "R": profile.one_sided}
    messages: Counter[int] = Counter()
    histogram: Counter[int] = Counter()
    world, totals = None, 0
    for line in text.splitlines():
        kind, *words = line.split("\t")
        if kind in kinds:
            peer, bytes_, count = int(words[1]), _number(words[2], "bytes"), _number(words[3], "msgs sent")
            if int(words[0]) != rank or not 0 <= peer < ranks:
                raise ValueError(f"a link from rank {words[0]} to rank {peer} in rank {rank}'s file of {ranks} ranks")
            source, destination = (peer, rank) if kind == "R" else (rank, peer)  # R: fetched from the peer
            kinds[kind].add(source, destination, bytes_, count)
            if kind in "EI":
                messages[peer] += count
                histogram[peer] += sum(map(int, words[4].split(","))) if len(words) > 4 else 0
        elif kind == "D" and words[0] == "MPI_COMM_WORLD":
            world = words[1].removeprefix("procs: ")
        elif kind == "A2A":
            totals += world is not None  # the last of the lines after D
        elif kind not in ASKED_KINDS and not line.startswith("#"):
            raise ValueError(f"a line of unknown kind: {line[:60]!r}")
    if not totals or not text.endswith("\n"):
        raise ValueError("it ends too early")
    if world != ",".join(map(str, range(ranks))):
        raise ValueError(f"it is of a job of ranks {world}, not of {ranks}")
    if messages != histogram:
        raise ValueError(f"messages to each peer are {dict(messages)}, by size {dict(histogram)}")


def _number(word: str, unit: str) -> int:
    value, _, found = word.partition(" ")
    if found != unit or not value.isdecimal():
        raise ValueError(f"{word!r} is not a number of {unit}")
    return int(value)


def broadcast_links(ranks: int, bytes_: int, root: int = 0, calls: int = 1) -> Links:
    """``calls`` broadcasts (none of them empty) of ``bytes_`` bytes altogether: each rank but the root receives all of it once.

    Up to ``LINEAR_RANKS`` ranks straight from the root, above that along a binomial tree. An empty broadcast moves nothing.
    """
    links = Links()
    if bytes_:
        for parent, child in _binomial_tree(ranks) if ranks > LINEAR_RANKS else ((0, rank) for rank in range(1, ranks)):
            links.add(_swapped(parent, root), _swapped(child, root), bytes_, calls)
    return links


def ledger_links(ledgers: Sequence[Mapping[str, Any]]) -> Counter[Link]:
    """Bytes on each link that explain what the ranks' ledgers say they sent.

    Gathers and scatters, with or without counts, are linear in libnbc: one message from or to the root for every other rank.

    Args:
        ledgers: of every rank, in rank order, what ``Ledger.whole_run`` returns.
    """
    links = broadcast_links(len(ledgers), ledgers[0]["broadcast_bytes"])
    for source, ledger in enumerate(ledgers):
        for destination, bytes_ in ledger["direct"].items():
            links.add(source, int(destination), bytes_)
    return links.bytes


def _binomial_tree(ranks: int) -> Iterator[Link]:
    """(parent, child) of libnbc's broadcast from rank 0: the parent is the child's number without its highest bit."""
    for child in range(1, ranks):
        yield child - (1 << child.bit_length() - 1), child


def _swapped(rank: int, root: int) -> int:
    """The rank in a tree's place: libnbc lets rank 0 and the root change places."""
    return {0: root, root: 0}.get(rank, rank)


def differences(counted: Counter[Link], expected: Counter[Link]) -> dict[Link, int]:
    """Counted minus expected, where they differ: positive is unexplained, negative did not come."""
    return {link: counted[link] - expected[link] for link in sorted(counted | expected) if counted[link] != expected[link]}
