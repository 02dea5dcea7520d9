"""How ranks start: forked from one parent per node, or each by itself; and the proof that forking works here."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path

from distfl import allocator, forking, launching

PROOF_SECONDS = 120
PROOF_BYTES = 16 * 10**6
WORKS = "works"
RANK = "import sys; from distfl import forking; code = forking.launch('distfl.starting:meet'); sys.exit(3 if code is None else code)"


def flags(start: str) -> list[str]:
    """What mpirun must be told for ``launch.start``; auto forks where ``distfl doctor`` has proven it."""
    if start == "auto":
        start = os.environ.get(forking.START) or ("fork" if _record().is_file() and _record().read_text() == WORKS else "plain")
    return ["-x", f"{forking.START}={start}"]


def prove() -> str:
    """Have two forked ranks meet under their caps, and remember how it went; "" or what stood in the way."""
    why = _try()
    record = _record()
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(why or WORKS)
    return why


def _record() -> Path:
    """Where the proof for this installation and kernel is kept."""
    mpirun = launching.mpirun_path()
    about = [sys.executable, sys.version, platform.release(), platform.node(), mpirun, os.stat(mpirun).st_mtime, forking.__file__]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "distfl" / f"forking-{zlib.crc32(repr(about).encode()):08x}"


def _try() -> str:
    command = launching.mpirun_command(2, [], flags("fork"))
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
