"""Traffic seen three ways, and every byte of difference explained.

*Payload* is what clients hand over and are sent, per client, round and unit: what a deployment would move. *MPI* is what
every rank handed to and took from the transport, by purpose. *Links* is what Open MPI's monitoring counted between
each pair of ranks. Between two views a table says what was expected, what was counted and what the rest is made of.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path

from distfl.errors import TransportError
from distfl.files import write_atomically
from distfl.links import Link, differences, ledger_links, read_profiles
from distfl.reporting import Run, read_run, table
from distfl.units import VALUE_BYTES

FIXED_BYTES = 8  # a value summed up in fixed point
CHECKSUM_BYTES = 4  # of a unit's sums or means
LENGTH_BYTES = 8  # goes before every small record
BROADCASTS = ("units", "orders", "versions", "layout", "start")  # "start" and "versions" are answered by every rank, too
MEANINGS = {
    "start": "config, shards and budgets to every rank; how each came up",
    "orders": "which round, how many waves, evaluate or not",
    "versions": "which units every rank holds, which ones come",
    "assignments": "assignment records of the clients",
    "reports": "reports of the clients, lengths of their blocks",
    "layout": "which ranks hold sums of which unit",
    "scores": "evaluation: sums per client",
    "ledgers": "these counts themselves",
}


@dataclass(frozen=True)
class Row:
    """One comparison of two views.

    Args:
        explanation: what the expected bytes are.
    """

    what: str
    expected: int
    counted: int
    explanation: str

    @property
    def difference(self) -> int:
        return self.counted - self.expected


@dataclass(frozen=True)
class Audit:
    """A finished run whose ranks kept their ledgers and profiles.

    Args:
        traffic: lines of traffic.jsonl.
        ledgers: of every rank, whole run.
        links: bytes that monitoring counted on each link, whole run.
    """

    run: Run
    traffic: list[dict]
    ledgers: list[dict]
    links: Counter[Link]

    @property
    def ranks(self) -> int:
        return len(self.ledgers)

    @cached_property
    def sent(self) -> Counter[str]:
        """Bytes handed to the transport by all ranks together, by purpose."""
        return sum((Counter(ledger["sent"]) for ledger in self.ledgers), Counter())

    @cached_property
    def headers(self) -> int:
        """Bytes of the clients' blocks besides encoded values."""
        return sum(report["upload_bytes"] - report["predicted_upload_bytes"] for report in self.run.clients if report["upload_bytes"])

    def payload_to_mpi(self) -> list[Row]:
        """What clients sent and were sent, against what the ranks handed to the transport for it."""
        units = self.run.manifest["units"]
        moved = sum(units[unit]["bytes"] for record in self.run.rounds for unit, clients in record["contributors"].items() if clients)
        whole = sum(unit["bytes"] for unit in units.values())
        return [
            *self._updates(list(units.values())),
            Row(
                "units", whole + moved, self.ledgers[0]["sent"].get("units", 0), "the model once, then each merged unit once for all ranks"
            ),
            Row(
                "assignments",
                self._assignment_bytes(),
                self.sent["assignments"],
                "records, a length for every rank and wave, 4 for an idle one",
            ),
        ]

    def _updates(self, units: list[dict]) -> list[Row]:
        if self.run.manifest["starts"][-1]["collective"] == "gather":
            up = sum(record["upload_bytes"] for record in self.run.rounds)
            return [Row("updates", up, self.sent["updates"], f"blocks of the clients, {self.headers} of it headers")]
        fixed = FIXED_BYTES if self.run.config.transport.sums == "fixed" else VALUE_BYTES
        sums = means = 0
        for entry in self.traffic:
            for unit, ranks, by_element in entry["layout"]:
                elements = units[unit]["bytes"] // VALUE_BYTES
                numbers = elements * 2 if by_element else elements + units[unit]["tensors"]
                sums += (len(ranks) - 1) * (numbers * fixed + CHECKSUM_BYTES)
                means += numbers * VALUE_BYTES + CHECKSUM_BYTES
        return [
            Row("sums", sums, self.sent["sums"], "per unit: from every rank of its tree but the root, with weights and a checksum"),
            Row("means", means, self.sent["means"], "per unit: from its root to the server, with shares and a checksum"),
        ]

    def _assignment_bytes(self) -> int:
        bytes_ = 0
        for entry in self.traffic[1:]:
            records = [sent["assignment"] for sent in entry["payload"]["down"].values()]
            waves = ceil(len(records) / (self.ranks - 1))
            idle = waves * (self.ranks - 1) - len(records)
            bytes_ += sum(records) + waves * (self.ranks - 1) * LENGTH_BYTES + 4 * idle
        return bytes_

    def mpi_to_mpi(self) -> list[Row]:
        """For every purpose: what all ranks took in, against what they handed over."""
        received = sum((Counter(ledger["received"]) for ledger in self.ledgers), Counter())
        root = self.ledgers[0]["sent"]
        rows = []
        for purpose in sorted(self.sent | received):
            copies = root.get(purpose, 0) * (self.ranks - 2) if purpose in BROADCASTS else 0  # handed over once, taken in by each
            known = purpose in MEANINGS or purpose in ("updates", "sums", "means", "units")
            rows.append(Row(purpose, (self.sent[purpose] + copies) * known, received[purpose], MEANINGS.get(purpose, "tensors")))
        return rows

    def mpi_to_links(self) -> list[Row]:
        """For every kind of link: what monitoring counted, against what the ledgers and the collectives' algorithms imply."""
        expected = ledger_links(self.ledgers)
        kinds = {"into the server": lambda s, d: d == 0, "out of the server": lambda s, d: s == 0, "among clients": lambda s, d: s and d}
        rows = []
        for kind, of_kind in kinds.items():
            wanted, counted = (sum(bytes_ for link, bytes_ in view.items() if of_kind(*link)) for view in (expected, self.links))
            rows.append(Row(kind, wanted, counted, self._algorithm(kind)))
        return rows

    def _algorithm(self, kind: str) -> str:
        sums = "sums along trees, " if self.sent["sums"] else ""
        return {
            "into the server": "gathers and means: straight from every rank",
            "out of the server": f"scatters straight to every rank, broadcasts to {len(self.first_hops())} of {self.ranks - 1} ranks",
            "among clients": sums + "broadcasts handed on",
        }[kind]

    def first_hops(self) -> set[int]:
        """Ranks that the server itself sends broadcasts to."""
        nothing_else = [{"direct": {}, "broadcast_bytes": 1}, *[{"direct": {}, "broadcast_bytes": 0}] * (self.ranks - 1)]
        return {destination for source, destination in ledger_links(nothing_else) if source == 0}

    @property
    def unexplained_bytes(self) -> int:
        """Of all views and links; each difference counts, whatever its sign."""
        rows = [*self.payload_to_mpi(), *self.mpi_to_mpi()]
        on_links = differences(self.links, ledger_links(self.ledgers)).values()
        return sum(abs(row.difference) for row in rows) + sum(abs(difference) for difference in on_links)

    def per_round(self) -> dict[str, float]:
        """Mean bytes of a training round that ranks took in, by purpose; block headers apart from the values of updates."""
        rounds = self.traffic[1:]
        received: Counter[str] = Counter()
        for entry in rounds:
            for ledger in entry["mpi"]:
                received.update(ledger["received"])
        if "updates" in received:
            received["headers"] = self.headers
            received["updates"] -= self.headers
        return {purpose: bytes_ / len(rounds) for purpose, bytes_ in received.items()}

    def overhead(self) -> float:
        """Share of a training round's bytes that is not tensor values."""
        by_purpose = self.per_round()
        values = sum(by_purpose.get(purpose, 0) for purpose in ("updates", "sums", "means", "units"))
        return 1 - values / sum(by_purpose.values())

    def text(self) -> str:
        """All tables, and the verdict."""
        start, rounds = self.run.manifest["starts"][-1], self.run.rounds
        up, down, first = (sum(r[key] for r in rounds) for key in ("upload_bytes", "download_bytes", "first_download_bytes"))
        trained = len(self.traffic) - 1
        shares = self.per_round()
        whole = sum(shares.values())
        parts = [
            [purpose, f"{bytes_:.0f}", f"{100 * bytes_ / whole:.3f}"] for purpose, bytes_ in sorted(shares.items(), key=lambda e: -e[1])
        ]
        on_links = [
            f"link {source} -> {destination}: {difference:+d} bytes"
            for (source, destination), difference in differences(self.links, ledger_links(self.ledgers)).items()
        ]
        return "\n".join(
            [
                f"{self.run.config.method.name}, {self.ranks} ranks, {trained} rounds, codec {self.run.config.transport.codec}, "
                f"{start['collective']} ({start['collective_reason']})",
                f"payload, what a deployment would move: up {up}, down {down}, first models {first} bytes",
                f"moved on this cluster: {self.links.total()} bytes",
                "",
                "payload against MPI",
                _rows(self.payload_to_mpi()),
                "",
                "MPI: taken in against handed over, all ranks",
                _rows(self.mpi_to_mpi()),
                "",
                "MPI against links",
                _rows(self.mpi_to_links()),
                *on_links,
                "",
                "mean training round, bytes that ranks took in",
                table([["purpose", "bytes", "%"], *parts]),
                f"not tensor values: {100 * self.overhead():.3f} % of a round's bytes",
                f"unexplained: {self.unexplained_bytes} bytes",
            ]
        )


def _rows(rows: Iterable[Row]) -> str:
    cells = [[row.what, str(row.expected), str(row.counted), str(row.difference), row.explanation] for row in rows]
    return table([["", "expected", "counted", "difference", "explained by"], *cells])


def links_prefix(folder: Path) -> Path:
    """Where the ranks of an audited run write their profiles: a folder that they make themselves, before MPI ends."""
    return folder / "ledgers" / "links"


def read_audit(folder: Path) -> Audit:
    """Read an audited run.

    Raises:
        DistflError: it is none, or ledgers or profiles are missing.
    """
    run = read_run(folder)
    ranks = run.manifest["starts"][-1]["ranks"]
    try:
        ledgers = [json.loads((folder / "ledgers" / f"{rank}.json").read_text()) for rank in range(ranks)]
        traffic = [json.loads(line) for line in (folder / "traffic.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise TransportError(
            f"ledgers of {ranks} ranks of the run in {folder}", f"{type(error).__name__}: {error}", "make the run by distfl audit CONFIG"
        ) from None
    return Audit(run, traffic, ledgers, read_profiles(links_prefix(folder), ranks).total.bytes)


def audit(folder: Path) -> int:
    """Print an audited run's tables and leave them in it. Returns 0 if every byte is explained, else 1."""
    found = read_audit(folder)
    text = found.text()
    write_atomically(folder / "audit.txt", text + "\n")
    print(text)
    return 1 if found.unexplained_bytes else 0
