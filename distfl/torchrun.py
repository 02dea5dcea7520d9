"""torchrun on this host as ``--ranks`` needs it: ``python -m distfl.torchrun RANKS PROGRAM ARGUMENT...``.

What torchrun itself does not do: it ends with the exit code of the rank that failed, in place of a report and code 1; it
passes SIGUSR1 on; it ends when its parent does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from distfl.launching import say
from distfl.signals import end_with_parent, hold_signals

LOOPBACK = "127.0.0.1"


def main(ranks: str, program: list[str]) -> int:
    """Run a program on so many ranks; returns the exit code, 128 + the signal's number where one ended it."""
    end_with_parent(signal.SIGTERM)
    hold_signals()
    threading.Thread(target=_pass_on_usr1, daemon=True).start()
    logging.disable(logging.CRITICAL)  # of this process: the ranks have said what there is to say
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this host, whatever its name resolves to
    flags = ["--standalone", "--local-addr", LOOPBACK, "--max-restarts", "0", "--nproc-per-node", ranks, "--no-python"]
    try:
        run(parse_args([*flags, *program]))
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        say(f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}; the whole job was ended")
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval


def _pass_on_usr1() -> None:
    """Every SIGUSR1 goes to the ranks, which hold it until they can handle it; none gets lost before there are ranks."""
    while True:
        signal.sigwait({signal.SIGUSR1})
        while not (ranks := _children()):
            time.sleep(0.1)
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGUSR1)


def _children() -> list[int]:
    """Processes that this one has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(status.parent.name))
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
