"""Garbled messages with real ranks: the client is left out and named, the job goes on; garbled sums end it."""

import json
import sys

import pytest
from test_job import _mpirun

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(240)]

# Rank 2 harms one block of its first client in round 1: on its way to the server the first one or the last one, in
# the client's hands the last one; or it leaves that client out for another reason; or it harms the first sums it sends.
SABOTAGE = """
import sys
from mpi4py import MPI
from distfl import exchange, hosting
from distfl.errors import NotFinite
from distfl.transport.mpi import MpiTransport

what, done = sys.argv.pop(1), []

def harmed(array, here):
    if not here or done:
        return array
    done.append(1)
    array = array.copy()
    array[-1] ^= 1
    return array

def wrap(owner, name, change):
    plain = getattr(owner, name)
    setattr(owner, name, lambda *arguments: change(plain, *arguments))

def start_gather(plain, transport, block, purpose, words=None):
    calls.append(purpose) if purpose == "updates" else None
    here = len(block) and purpose == "updates" and (what == "first" or calls.count("updates") == 6)
    return plain(transport, harmed(block, here), purpose, words)

def start_send(plain, transport, array, destination, purpose):
    return plain(transport, harmed(array, purpose == "sums"), destination, purpose)

def frame(plain, encoding, pieces, round, client, unit, *more):
    block = plain(encoding, pieces, round, client, unit, *more)
    return harmed(block, round == 1 and unit.name == "head")

def keep(plain, self, assignment, blocks):
    if not done:
        done.append(1)
        raise NotFinite("an update", "planted", "")
    return plain(self, assignment, blocks)

calls = []
if MPI.COMM_WORLD.rank == 2:
    if what in ("first", "last"):
        wrap(MpiTransport, "start_gather", start_gather)
    elif what == "in the client's hands":
        wrap(hosting, "frame", frame)
    elif what == "not finite":
        wrap(exchange.Gather, "keep", keep)
        wrap(exchange.Reduce, "keep", keep)
    elif what == "sums":
        wrap(MpiTransport, "start_send", start_send)

from distfl.cli import main
sys.exit(main())
"""


@pytest.fixture
def sabotaged(distfl, config, tmp_path):
    def run(what: str, *overrides: str, rounds: int = 2):
        script, folder = tmp_path / "sabotage.py", tmp_path / what
        script.write_text(SABOTAGE)
        program = [*_mpirun(4), sys.executable, str(script), what]
        return folder, distfl("train", config, f"rounds={rounds}", f"run.folder={folder}", *overrides, program=program)

    return run


@pytest.mark.parametrize("collective, ways", [("gather", ["first", "in the client's hands"]), ("reduce", ["in the client's hands"])])
def test_a_client_with_a_garbled_block_is_left_out_of_the_round_and_named(distfl, sabotaged, collective, ways):
    overrides = [f"transport.collective={collective}", "memory.enforce=rlimit"]
    plain, done = sabotaged("not finite", *overrides)
    assert done.returncode == 0, done.stderr
    for what in ways:
        run, done = sabotaged(what, *overrides)
        assert done.returncode == 0, done.stderr
        (bad,) = [report for report in distfl.reports(run) if not report["ok"]]
        assert (bad["round"], bad["cause"]) == (1, "bad_message")
        assert "a block of unit " in bad["reason"] and f"from client {bad['client']}: " in bad["reason"]
        assert f"left out: {bad['reason']}" in done.stdout
        assert "1 with a bad message" in (run / "summary.txt").read_text()
        rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        assert [record["merged"] for record in rounds] == [0, 11, 12]
        assert (bad["upload_bytes"] > 0) == (what == "first")  # it was on its way
        # just what remains of the round when that client is left out for another reason
        assert distfl.model(run) == distfl.model(plain)
        contributors = [record["contributors"] for record in rounds]
        assert contributors == [json.loads(line)["contributors"] for line in (plain / "rounds.jsonl").read_text().splitlines()]


def test_what_came_before_a_block_garbled_on_its_way_stays_and_every_byte_is_counted(distfl, sabotaged):
    run, done = sabotaged("last", "transport.collective=gather", "fleet.groups=[{name: all, memory_mb: 40, share: 1}]", rounds=1)
    assert done.returncode == 0, done.stderr
    (bad,) = [report for report in distfl.reports(run) if not report["ok"]]
    assert bad["cause"] == "bad_message" and bad["blocks"] == 4 and "a block of unit head" in bad["reason"]
    record = json.loads((run / "rounds.jsonl").read_text().splitlines()[1])
    assert record["merged"] == 11 and record["contributors"]["head"] == 11
    assert {count for unit, count in record["contributors"].items() if unit.startswith("block")} == {12}
    server = json.loads((run / "traffic.jsonl").read_text().splitlines()[1])["mpi"][0]
    assert server["received"]["updates"] == record["upload_bytes"] == sum(report["upload_bytes"] for report in distfl.reports(run))


def test_garbled_sums_end_the_job_by_name(sabotaged):
    run, done = sabotaged("sums", "transport.collective=reduce", rounds=1)
    assert done.returncode not in (0, 75)
    assert "WireError" in done.stderr and "sums or means of unit" in done.stderr
    assert not (run / "finished").exists()
