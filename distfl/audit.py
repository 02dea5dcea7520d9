"""Traffic seen three ways, and every byte of difference explained.

*Payload* is what clients hand over and are sent, per client, round and unit: what a deployment would move. *MPI* is what
every rank handed to and took from the transport, by purpose. *Links* is what Open MPI's monitoring counted between
each pair of ranks. Between two views a table says what was expected, what was counted and what it is. Expected bytes are
worked out anew from the records: windows, merged units, reports, the collectives' algorithms. Only of the small messages whose
numbers are nowhere else (orders, versions, scores, the start) there is no more than a bound.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distfl.errors import TransportError
from distfl.files import write_atomically
from distfl.fleet import waves_of
from distfl.links import Link, differences, ledger_links, read_profiles
from distfl.reporting import Run, read_run, table
from distfl.transport.base import WORD, pack
from distfl.units import VALUE_BYTES

FIXED_BYTES = 8  # a value summed up in fixed point
CHECKSUM_BYTES = 4  # of a unit's sums or means
LENGTH_BYTES = 8  # goes before every small record
BROADCASTS = ("units", "orders", "versions", "layout", "start")  # handed over once for all; "start" and "versions" are also answered
LONGEST_HEADER = {"block": 96, "tensor": 48}  # bytes, of whole tensors


@dataclass(frozen=True)
class Row:
    """One comparison of two views.

    Args:
        expected, counted: bytes in all.
        unexplained: bytes that differ, each place by itself, whatever its sign.
        explanation: what the expected bytes are.
    """

    what: str
    expected: int
    counted: int
    unexplained: int
    explanation: str


def exactly(what: str, expected: int, counted: int, explanation: str) -> Row:
    return Row(what, expected, counted, abs(counted - expected), explanation)


def at_most(what: str, bound: int, counted: int, explanation: str) -> Row:
    return Row(f"{what} (at most)", bound, counted, max(0, counted - bound), explanation)


def place_by_place(what: str, expected: Mapping[Any, int], counted: Mapping[Any, int], explanation: str) -> Row:
    apart = sum(abs(expected.get(place, 0) - counted.get(place, 0)) for place in expected.keys() | counted.keys())
    return Row(what, sum(expected.values()), sum(counted.values()), apart, explanation)


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

    @property
    def rounds(self) -> list[dict]:
        """Traffic of the training rounds."""
        return self.traffic[1:]

    @property
    def units(self) -> dict[str, dict]:
        """Unit's name -> its bytes and number of tensors, from the input to the output."""
        return self.run.manifest["units"]

    @property
    def collective(self) -> str:
        return self.run.manifest["starts"][-1]["collective"]

    @cached_property
    def sent(self) -> Counter[str]:
        """Bytes handed to the transport by all ranks together, by purpose."""
        return sum((Counter(ledger["sent"]) for ledger in self.ledgers), Counter())

    @cached_property
    def headers(self) -> int:
        """Bytes of the merged blocks besides encoded values."""
        return sum(report["upload_bytes"] - report["predicted_upload_bytes"] for report in self.run.clients if report["upload_bytes"])

    # --- records against payload

    def records_to_payload(self) -> list[Row]:
        """What clients sent and were sent, by the records of rounds and clients, against the payload's own count."""
        up = {(entry["round"], int(c)): sum(sent.values()) for entry in self.rounds for c, sent in entry["payload"]["up"].items()}
        reported = {(report["round"], report["client"]): report["upload_bytes"] for report in self.run.clients if report["ok"]}
        blocks = [(unit, entry) for entry in self.rounds for sent in entry["payload"]["up"].values() for unit, entry in sent.items()]
        longest = sum(LONGEST_HEADER["block"] + LONGEST_HEADER["tensor"] * self.units[unit]["tensors"] for unit, _ in blocks)
        down = Counter()
        for entry in self.rounds:
            for client, sent in entry["payload"]["down"].items():
                down.update({(entry["round"], int(client), unit): bytes_ for unit, bytes_ in sent.items() if unit != "assignment"})
        rows = [
            place_by_place("up", reported, up, "as reported by every client whose update was merged"),
            at_most("of it headers", longest, self.headers, "more than the encoded values that were planned"),
            place_by_place("down", self._downloads(), down, "units newer than the client's copy, the whole model the first time"),
        ]
        records = self.run.rounds[1:]
        rows.append(exactly("up, all rounds", sum(up.values()), sum(r["upload_bytes"] for r in records), "rounds.jsonl"))
        whole = sum(down.values()) + sum(sent["assignment"] for entry in self.rounds for sent in entry["payload"]["down"].values())
        recorded = sum(r["download_bytes"] + r["first_download_bytes"] for r in records)
        return [*rows, exactly("down, all rounds", whole, recorded, "rounds.jsonl, assignment records included")]

    def _downloads(self) -> dict[tuple[int, int, str], int]:
        """(round, client, unit) -> bytes that the client lacks, worked out from windows and merged units."""
        version = dict.fromkeys(self.units, 1)
        copies: dict[int, dict[str, int | None]] = {}
        expected = {}
        for entry in self.rounds:
            held = dict(version)
            for name, (first, last) in entry["payload"]["windows"].items():
                client = int(name)
                sent = entry["payload"]["held"].get(name) or {unit: about["bytes"] for unit, about in self.units.items() if about["bytes"]}
                if client not in copies:
                    expected[entry["round"], client, "first"] = sum(sent.values())
                else:
                    newer = (unit for unit in sent if copies[client][unit] != held[unit])
                    expected |= {(entry["round"], client, unit): sent[unit] for unit in newer}
                own = list(self.units)[first:last]
                copies[client] = {unit: None if unit in own else held[unit] for unit in self.units}
            for unit in entry["payload"]["changed"]:
                version[unit] += 1
        return expected

    # --- payload against MPI

    def payload_to_mpi(self) -> list[Row]:
        """What clients sent and were sent, and the records about it, against what the ranks handed to the transport."""
        moved = sum(self.units[unit]["bytes"] for entry in self.rounds for unit in entry["payload"]["changed"])
        first = self.traffic[0]["mpi"][0]["sent"]["units"]
        return [
            *self._updates(),
            exactly("first distribution", sum(unit["bytes"] for unit in self.units.values()), first, "the model, once for all ranks"),
            exactly("units", moved, self.sent["units"] - first, "each changed unit, once for all ranks"),
            exactly("assignments", self._assignment_bytes(), self.sent["assignments"], "their records, lengths, 4 for an idle rank"),
            exactly("reports", self._report_bytes(), self.sent["reports"], "reports, lengths of blocks, 4 for an idle rank"),
            exactly("layout", self._layout_bytes(), self.sent["layout"], "which ranks hold sums of which unit"),
            exactly("ledgers", self._ledger_bytes(), self.sent["ledgers"], "these counts themselves"),
            *self._bounded(),
        ]

    def _updates(self) -> list[Row]:
        if self.collective == "gather":
            up = sum(sum(sent.values()) for entry in self.rounds for sent in entry["payload"]["up"].values())
            return [exactly("updates", up, self.sent["updates"], f"blocks of the clients, {self.headers} of it headers")]
        fixed = FIXED_BYTES if self.run.config.transport.sums == "fixed" else VALUE_BYTES
        units, sums, means = list(self.units.values()), 0, 0
        for entry in self.rounds:
            for unit, ranks, by_element in entry["layout"]:
                mean = units[unit]["mean"]
                numbers = mean["elements"] * 2 if by_element else mean["elements"] + mean["tensors"]
                sums += (len(ranks) - 1) * (numbers * fixed + CHECKSUM_BYTES)
                means += numbers * VALUE_BYTES + CHECKSUM_BYTES
        return [
            exactly("sums", sums, self.sent["sums"], "per unit: from every rank of its tree but the root, with weights and a checksum"),
            exactly("means", means, self.sent["means"], "per unit: from its root to the server, with shares and a checksum"),
        ]

    def _with_idle(self, clients: int, bytes_: int) -> int:
        """Bytes of one record for each client of a round, with a length each and a null for every rank that hosts nobody."""
        waves = len(waves_of(clients, self.ranks - 1))
        places = waves * (self.ranks - 1)
        return bytes_ + places * LENGTH_BYTES + (places - clients) * pack(None).nbytes

    def _assignment_bytes(self) -> int:
        records = [[sent["assignment"] for sent in entry["payload"]["down"].values()] for entry in self.rounds]
        return sum(self._with_idle(len(of_round), sum(of_round)) for of_round in records)

    def _report_bytes(self) -> int:
        bytes_ = 0
        for entry in self.rounds:
            reports = [r for r in self.run.clients if r["round"] == entry["round"] and r["cause"] != "no_window"]
            summed = {unit for unit, _, by_element in entry["layout"] if by_element}
            of_round = 0
            for report in reports:
                sent = entry["payload"]["up"].get(str(report["client"]), {})
                message = {
                    "report": {key: value for key, value in report.items() if key not in ("name", "group")},
                    "words": [sent.get(unit, 0) // WORD.itemsize for unit, about in self.units.items() if about["mean"]],
                    "by_element": sorted(summed.intersection(number for number, unit in enumerate(self.units) if unit in sent)),
                }
                of_round += pack(message).nbytes
            bytes_ += self._with_idle(len(reports), of_round)
        return bytes_

    def _layout_bytes(self) -> int:
        trained = [entry["layout"] for entry in self.rounds if entry["payload"]["windows"]]
        return sum(pack(layout).nbytes + LENGTH_BYTES for layout in trained) if self.collective == "reduce" else 0

    def _ledger_bytes(self) -> int:
        return sum(pack(ledger).nbytes + LENGTH_BYTES for entry in self.traffic for ledger in entry["mpi"][1:])

    def _bounded(self) -> list[Row]:
        rounds, units, clients = len(self.traffic), len(self.units), len(self.run.manifest["groups"])
        evaluated = len(self.run.evaluated)
        distributions = rounds + evaluated
        answers = distributions * (self.ranks - 1) * (16 + 8 * units)
        return [
            at_most(
                "versions", distributions * (64 + 16 * units) + answers, self.sent["versions"], "which units every rank holds, which come"
            ),
            at_most("orders", 192 * (rounds + 1), self.sent["orders"], "which round, how many waves, evaluate or not"),
            at_most("scores", evaluated * (96 * clients + 16 * self.ranks), self.sent["scores"], "evaluation: three sums per client"),
            at_most(
                "start", 2**13 + 128 * clients + 256 * self.ranks, self.sent["start"], "config and shards to all, how each rank came up"
            ),
        ]

    # --- MPI against itself and against links

    def mpi_to_mpi(self) -> list[Row]:
        """For every purpose: what all ranks took in, against what they handed over."""
        received = sum((Counter(ledger["received"]) for ledger in self.ledgers), Counter())
        root = self.ledgers[0]["sent"]
        rows = []
        for purpose in sorted(self.sent | received):
            copies = root.get(purpose, 0) * (self.ranks - 2) if purpose in BROADCASTS else 0
            rows.append(
                exactly(purpose, self.sent[purpose] + copies, received[purpose], "a broadcast counts for every rank"[: 99 * bool(copies)])
            )
        return rows

    def mpi_to_links(self) -> list[Row]:
        """For every kind of link: what monitoring counted, against what the ledgers and the collectives' algorithms imply."""
        handed_on = "broadcasts handed on" + (", sums along trees" if self.sent["sums"] else "")
        kinds = {
            "into the server": (lambda link: link[1] == 0, "gathers and means: straight from every rank"),
            "out of the server": (
                lambda link: link[0] == 0,
                f"scatters straight to every rank, broadcasts to {len(self.first_hops())} of {self.ranks - 1}",
            ),
            "among clients": (lambda link: 0 not in link, handed_on),
        }
        rows = []
        for kind, (of_kind, explanation) in kinds.items():
            expected, counted = (
                {link: bytes_ for link, bytes_ in view.items() if of_kind(link)} for view in (self._expected_links, self.links)
            )
            rows.append(place_by_place(kind, expected, counted, explanation))
        return rows

    @cached_property
    def _expected_links(self) -> Counter[Link]:
        return ledger_links(self.ledgers)

    def first_hops(self) -> set[int]:
        """Ranks that the server itself sends broadcasts to."""
        nothing_else = [{"direct": {}, "broadcast_bytes": 1}, *[{"direct": {}, "broadcast_bytes": 0}] * (self.ranks - 1)]
        return {destination for source, destination in ledger_links(nothing_else) if source == 0}

    @cached_property
    def tables(self) -> dict[str, list[Row]]:
        return {
            "records against payload": self.records_to_payload(),
            "payload against MPI, whole run": self.payload_to_mpi(),
            "MPI: taken in against handed over, all ranks": self.mpi_to_mpi(),
            "MPI against links": self.mpi_to_links(),
        }

    @property
    def unexplained_bytes(self) -> int:
        return sum(row.unexplained for rows in self.tables.values() for row in rows)

    # --- a round

    def per_round(self) -> dict[str, float]:
        """Mean bytes of a training round that ranks took in, by purpose; block headers apart from the values of updates."""
        received: Counter[str] = Counter()
        for entry in self.rounds:
            for ledger in entry["mpi"]:
                received.update(ledger["received"])
        if "updates" in received:
            received["headers"] = self.headers
            received["updates"] -= self.headers
        return {purpose: bytes_ / len(self.rounds) for purpose, bytes_ in received.items()}

    def overhead(self) -> float:
        """Share of a training round's bytes that is not tensor values."""
        by_purpose = self.per_round()
        values = sum(by_purpose.get(purpose, 0) for purpose in ("updates", "sums", "means", "units"))
        return 1 - values / sum(by_purpose.values())

    def text(self) -> str:
        """All tables, and the verdict."""
        start, shares = self.run.manifest["starts"][-1], self.per_round()
        largest_first = sorted(shares.items(), key=lambda entry: -entry[1])
        parts = [[purpose, f"{bytes_:.0f}", f"{100 * bytes_ / sum(shares.values()):.3f}"] for purpose, bytes_ in largest_first]
        rounds = sum(sum(ledger["received"].values()) for entry in self.rounds for ledger in entry["mpi"])
        lines = [
            f"{self.run.config.method.name}, {self.ranks} ranks, {len(self.rounds)} rounds, codec {self.run.config.transport.codec}, "
            f"{self.collective} ({start['collective_reason']})",
            "",
            "what a deployment would move, bytes per client, all rounds",
            table([["client", "up", "down", "first model"], *self._clients()]),
            "",
            f"moved on this cluster: {self.links.total()} bytes, {rounds} of them in training rounds,",
            "the rest at the start: config, first distribution, first score",
        ]
        for title, rows in self.tables.items():
            cells = [[row.what, str(row.expected), str(row.counted), str(row.unexplained), row.explanation] for row in rows]
            lines += ["", title, table([["", "expected", "counted", "unexplained", "what"], *cells])]
        lines += [
            f"link {source} -> {destination}: {difference:+d} bytes"
            for (source, destination), difference in differences(self.links, self._expected_links).items()
        ]
        return "\n".join(
            [
                *lines,
                "",
                "mean training round, bytes that ranks took in",
                table([["purpose", "bytes", "%"], *parts]),
                f"not tensor values: {100 * self.overhead():.3f} % of a round's bytes",
                f"unexplained: {self.unexplained_bytes} bytes",
            ]
        )

    def _clients(self) -> list[list[str]]:
        totals: dict[int, Counter[str]] = {}
        for entry in self.rounds:
            for way in ("up", "down"):
                for client, sent in entry["payload"][way].items():
                    of_client = totals.setdefault(int(client), Counter())
                    for unit, bytes_ in sent.items():
                        of_client["first" if unit == "first" else way] += bytes_
        rows = [[str(client), *(str(totals[client][way]) for way in ("up", "down", "first"))] for client in sorted(totals)]
        return [*rows, ["all", *(str(sum(of[way] for of in totals.values())) for way in ("up", "down", "first"))]]


def links_prefix(folder: Path) -> Path:
    """Where the ranks of an audited run write their profiles: a folder that they make themselves, before MPI ends."""
    return folder / "ledgers" / "links"


def read_audit(folder: Path) -> Audit:
    """Read an audited run.

    Raises:
        DistflError: it is none, or ledgers or profiles are missing.
    """
    run = read_run(folder)
    starts = run.manifest["starts"]
    if len(starts) > 1 or not (folder / "finished").is_file():
        raise TransportError(
            f"an audit of {folder}",
            f"the run was started {len(starts)} times" if len(starts) > 1 else "the run is not finished",
            "delete it and let distfl audit CONFIG run through: ledgers and profiles are of the last start alone",
        )
    ranks = starts[-1]["ranks"]
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
