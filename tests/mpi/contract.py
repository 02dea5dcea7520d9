"""What every transport must do, as scripts that real ranks run, and what their output must be.

A test file says how a rank opens its transport (``opening``: Python that defines ``world(smallest)``) and how ranks are started
(``run(ranks, script, *arguments)``).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

Run = Callable[..., subprocess.CompletedProcess]

START = """
import json, sys, time
import numpy as np
from distfl.transport.base import WORD, pack

transport = world(int(sys.argv[1]))
rank, size, first = transport.rank, transport.size, transport.rank == 0
"""

# Every rank checks its own values and counts what it must have sent and received; the root prints all ledgers and counts.
VERBS = (
    START
    + """
sent, received = {}, {}

def moved(verb, out, into):
    if out: sent[verb] = out
    if into: received[verb] = into

array = np.arange(6, dtype=np.float32).reshape(2, 3) * (rank == 0)
transport.broadcast([array], "units")
assert array.tolist() == [[0, 1, 2], [3, 4, 5]], array
moved("units", 24 * first, 24 * (not first))

value = {"ä": [1, None, "x" * 1000]}
assert transport.broadcast_value(value if first else None, "orders") == value
bytes_ = 8 + pack(value).nbytes  # an int64 length goes before it
moved("orders", bytes_ * first, bytes_ * (not first))

values = [["for", r, "y" * 10 * r] for r in range(size)]
assert transport.scatter(values if first else None, "assignments") == values[rank]
of_rank = [8 + pack(v).nbytes for v in values]
moved("assignments", sum(of_rank[1:]) * first, of_rank[rank] * (not first))

values = [{"rank": r, "z": "z" * r} for r in range(size)]
assert transport.gather(values[rank], "reports") == (values if first else None)
of_rank = [8 + pack(v).nbytes for v in values]
moved("reports", of_rank[rank] * (not first), sum(of_rank[1:]) * first)

total_sent = total_received = 0
all_lengths = ([3, 0, 5], [0, 0, 0], [0, 7, 1], [2, 5_000_000, 0])  # the last one holds a block of 20 MB
started = []
for lengths in all_lengths:  # all of them under way at once
    lengths = lengths[:size]
    started.append(transport.start_gather(np.arange(lengths[rank], dtype=WORD) * (rank + 1), "updates", lengths if first else None))
for lengths, pending in zip(all_lengths, started):
    pending.advance()
    found = pending.wait()
    if first:
        blocks = [np.arange(n, dtype=WORD) * (r + 1) for r, n in enumerate(lengths[:size])]
        assert len(found) == size and all(f.dtype == WORD and np.array_equal(f, b) for f, b in zip(found, blocks))
        found[0][...] = 9  # they can be written
        total_received += sum(b.nbytes for b in blocks[1:])
    else:
        assert found is None
        total_sent += 4 * lengths[rank]
moved("updates", total_sent, total_received)

if size > 1:  # everyone to the next rank: sums first, then means
    sums, means = np.full(300_000, rank, np.int64), np.full(5, rank, np.float32)
    there, back = (rank + 1) % size, (rank - 1) % size
    going = [transport.start_send(sums, there, "sums"), transport.start_send(means, there, "means")]
    coming = [transport.start_receive(np.empty_like(array), back, purpose) for array, purpose in ((sums, "sums"), (means, "means"))]
    assert all((pending.wait() == back).all() for pending in coming)
    assert [pending.wait() for pending in going] == [None, None]
    moved("sums", 2_400_000, 2_400_000)
    moved("means", 20, 20)

array = np.array([1, 10 * rank], np.float32)
transport.sum(array)
assert array.tolist() == [size, 10 * sum(range(size))], array
moved("sum", 8, 8)

counted = transport.ledger.take()
everything = transport.gather([counted, {"sent": sent, "received": received}], "ledgers")
if first:
    print(json.dumps(everything), flush=True)
transport.leave(0)
"""
)

WAIT = (
    START
    + """
transport.broadcast_value(0, "start")  # all are there
began, cpu = time.monotonic(), time.process_time()
if first:
    time.sleep(2)
array = np.zeros(1000, np.float32)
transport.broadcast([array], "units")
used = [time.monotonic() - began, time.process_time() - cpu]
everything = transport.gather(used, "reports")
if first:
    print(json.dumps(everything), flush=True)
transport.leave(0)
"""
)

ABORT = (
    START
    + """
if rank == 1:
    transport.abort(3)
transport.gather(None, "reports")
time.sleep(60)
"""
)


def check_verbs(run: Run, opening: str, ranks: int) -> None:
    """The right values arrive, and the ledgers count their bytes."""
    done = run(ranks, opening + VERBS, "1")
    assert done.returncode == 0, done.stderr
    everything = json.loads(done.stdout)
    assert len(everything) == ranks
    for counted, expected in everything:
        assert counted == expected
    sums = [
        sum(sum(ledger[way].get(verb, 0) for verb in ("assignments", "reports", "updates", "sums", "means")) for ledger, _ in everything)
        for way in ("sent", "received")
    ]
    assert sums[0] == sums[1]  # nothing got lost on the way
    if ranks > 1:
        assert everything[1][0]["sent"]["updates"] > 20_000_000


def check_waiting(run: Run, opening: str) -> None:
    """A rank that waits leaves the core to others."""
    done = run(3, opening + WAIT, "1")
    assert done.returncode == 0, done.stderr
    for waited, cpu_seconds in json.loads(done.stdout)[1:]:
        assert waited > 1.9
        assert cpu_seconds < 0.3
