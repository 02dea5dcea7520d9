"""Links under a real mpirun: what Open MPI's monitoring counted between two ranks is what the collectives asked for imply, exactly."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distfl.errors import TransportError
from distfl.launching import mpirun_path
from distfl.links import (
    Links,
    broadcast_links,
    differences,
    ledger_links,
    monitoring_flags,
    read_profiles,
)

ROOT = Path(__file__).parents[2]
SIZES = [0, 4, 4004, 16384, 65532, 65536, 524288, 1048580]  # around the sizes at which libnbc and the shared memory change their ways


def has_monitoring() -> bool:
    """Whether the mpirun to use is of an Open MPI with the component."""
    try:
        found = Path(mpirun_path()).with_name("ompi_info")
    except TransportError:
        return False
    info = str(found) if found.exists() else shutil.which("ompi_info")
    return bool(info) and "pml:monitoring" in subprocess.run([info, "--parsable"], capture_output=True, text=True, timeout=60).stdout


pytestmark = [pytest.mark.mpi, pytest.mark.skipif(not has_monitoring(), reason="this MPI has no component pml monitoring")]

# Every collective at every size, from two roots; blocks of another length from every rank; and a message of the program's own.
PRIMITIVES = """
import sys, time
import numpy as np
from mpi4py import MPI

world, sizes = MPI.COMM_WORLD, [int(size) // 4 for size in sys.argv[1].split(",")]
rank, ranks = world.rank, world.size

def words(count):
    return np.zeros(count, np.float32)

def wait(request):
    while not request.Test():
        time.sleep(1e-4)

for root in (0, ranks - 1):
    first = rank == root
    for size in sizes:
        wait(world.Ibcast(words(size), root))
        wait(world.Igather(words(size), words(size * ranks) if first else None, root))
        wait(world.Iscatter(words(size * ranks) if first else None, words(size), root))
        counts = [size // (r + 1) for r in range(ranks)]
        wait(world.Igatherv(words(counts[rank]), [words(sum(counts)), counts] if first else None, root))
        wait(world.Iscatterv([words(sum(counts)), counts] if first else None, words(counts[rank]), root))
if rank == ranks - 1:
    wait(world.Isend(words(3), 0))
elif rank == 0:
    wait(world.Irecv(words(3), ranks - 1))
"""

# All verbs of the transport; the ledgers go to files, so that reporting them moves nothing.
VERBS = """
import json, sys
from pathlib import Path
import numpy as np
from distfl.transport.base import WORD
from distfl.transport.mpi import world

transport = world(smallest=2)
rank, size, first = transport.rank, transport.size, transport.rank == 0
for length in (0, 7, 200_000):
    transport.broadcast([np.zeros(length, np.float32), np.zeros(length, np.int64)], "units")
    transport.broadcast_value("b" * length if first else None, "orders")
    transport.scatter(["s" * (length + r) for r in range(size)] if first else None, "assignments")
    transport.gather("g" * (length + 5 * rank), "reports")
    words = [length // (r + 1) for r in range(size)]
    transport.start_gather(np.zeros(words[rank], WORD), "updates", words if first else None).wait()
    if rank == size - 1:
        transport.start_send(np.zeros(length, np.int64), 0, "sums").wait()
    elif first:
        transport.start_receive(np.zeros(length, np.int64), size - 1, "sums").wait()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(transport.ledger.whole_run()))
"""


def mpirun(ranks: int, flags: list[str], script: str, *arguments: str) -> None:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    shared = ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    command = [mpirun_path(), "-n", str(ranks), *root, *shared, *flags, sys.executable, "-c", script, *arguments]
    # a user's own settings must not matter: other algorithms of libnbc, another component that broadcasts along a chain
    settings = {
        "libnbc_ibcast_skip_dt_decision": "false",
        "libnbc_ibcast_algorithm": "3",
        "adapt_priority": "80",
        "adapt_bcast_algorithm": "4",
    }
    environment = {f"OMPI_MCA_coll_{name}": value for name, value in settings.items()}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ | environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ranks", [2, 3, 5, 9])
def test_every_primitive_moves_what_it_must_on_every_link(tmp_path, ranks):
    mpirun(ranks, monitoring_flags(tmp_path / "links"), PRIMITIVES, ",".join(map(str, SIZES)))
    expected = Links()
    for size in SIZES:
        for root in (0, ranks - 1):
            blocks = [size // 4 // (rank + 1) * 4 for rank in range(ranks)]
            for bytes_of_rank in ([size] * ranks, blocks):
                for rank in set(range(ranks)) - {root}:  # one message each, straight to the root and straight from it
                    expected.add(rank, root, bytes_of_rank[rank])
                    expected.add(root, rank, bytes_of_rank[rank])
            expected += broadcast_links(ranks, size, root)
    profile = read_profiles(tmp_path / "links", ranks)
    assert differences(profile.collective.bytes, expected.bytes) == {}
    assert differences(profile.collective.messages, expected.messages) == {}
    assert (profile.point_to_point.bytes, profile.point_to_point.messages) == ({(ranks - 1, 0): 12}, {(ranks - 1, 0): 1})
    assert profile.total.bytes.total() == expected.bytes.total() + 12  # and nothing from starting and ending MPI


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_transports_ledgers_explain_every_byte(tmp_path, ranks):
    mpirun(ranks, monitoring_flags(tmp_path / "links"), VERBS, str(tmp_path))
    ledgers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    counted = read_profiles(tmp_path / "links", ranks).total.bytes
    assert differences(counted, ledger_links(ledgers)) == {}
    assert counted.total() > (ranks - 1) * 3_000_000
    ledgers[ranks - 1]["direct"]["0"] -= 4  # a word that nobody told the ledger of
    assert differences(counted, ledger_links(ledgers)) == {(ranks - 1, 0): 4}


def test_without_the_flags_there_is_nothing_to_read(tmp_path):
    mpirun(2, [], "from mpi4py import MPI")
    with pytest.raises(TransportError, match="pml monitoring"):
        read_profiles(tmp_path / "links", 2)
