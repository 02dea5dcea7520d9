"""How ranks start: forked from one parent per node, or each by itself; and the proof that forking works here."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from distfl import allocator, forking, launching, parent
from distfl.files import write_atomically

PAYS_FROM_RANKS = 8  # with fewer, a plain start takes no longer than a proof
PROOF_SECONDS = 60
PROOF_BYTES = 16 * 10**6
WORKS = "works"
RANK = "import sys; from distfl import forking; code = forking.launch('distfl.starting:meet'); sys.exit(3 if code is None else code)"


def flags(start: str, ranks: int) -> list[str]:
    """What mpirun must be told for ``launch.start``.

    ``auto`` forks where that was proven to work: by ``distfl doctor``, or by the first start of many ranks, which tries it
    and pays a few seconds for it, once for each machine and installation. Where it does not work, or was not tried, ranks start plainly.
    """
    if start == "auto":
        start = os.environ.get(forking.START) or ("fork" if _is_proven(ranks) else "plain")
    return ["-x", f"{forking.START}={start}"]


def _is_proven(ranks: int) -> bool:
    record = _record()
    if not record.is_file():
        if ranks < PAYS_FROM_RANKS or not _can_be_written(record):
            return False
        launching.say("trying whether ranks can be forked from one parent here, once")
        why = prove()
        launching.say(f"no, ranks start plainly: {why}" if why else "they can (launch.start=auto)")
    return record.read_text() == WORKS


def _can_be_written(record: Path) -> bool:
    """A proof that cannot be kept would be made again at every start."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(record.parent, os.W_OK)


def prove() -> str:
    """Have two forked ranks meet under their caps, and remember how it went where that can be; "" or what stood in the way."""
    why, record = _try(), _record()
    if _can_be_written(record):
        write_atomically(record, why or WORKS)
    return why


def _record() -> Path:
    """Where the proof for this machine and installation is kept: whatever is updated there must be proven again."""
    mpirun = launching.mpirun_path()
    about = [
        *(sys.executable, sys.version, platform.release(), platform.node()),
        *(mpirun, os.environ.get("DISTFL_MPIRUN_FLAGS", "")),
        *(os.stat(path).st_mtime for path in (mpirun, sysconfig.get_path("purelib"))),
        *(Path(module.__file__).read_text() for module in (forking, parent)),
    ]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "distfl" / f"forking-{zlib.crc32(repr(about).encode()):08x}"


def _try() -> str:
    command = launching.mpirun_command(2, [], flags("fork", 2))
    command = [*command[: command.index(sys.executable)], sys.executable, "-c", RANK]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROOF_SECONDS, env=os.environ | {forking.START: "fork"})
    except subprocess.TimeoutExpired:
        return f"2 forked ranks did not end within {PROOF_SECONDS} s"
    met = [line.split() for line in done.stdout.splitlines() if line.startswith("met ")]
    if done.returncode or len(met) != 2:
        said = [line for line in done.stderr.splitlines() if line.strip("- ")]
        return f"exit code {done.returncode}: {said[0] if said else 'no output'}"
    return "" if met[0] == met[1] else "the ranks were forked from two parents"


def meet() -> int:
    """A forked rank of the proof: MPI starts, the cap bites."""
    from distfl.caps.rlimit import Rlimit
    from distfl.transport.mpi import world

    transport = world(smallest=2)
    allocator.exact_allocator()
    Rlimit().prove(PROOF_BYTES)
    transport.gather(transport.rank, "start")
    print("met", transport.size, os.getppid(), flush=True)
    return 0
