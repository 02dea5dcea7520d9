"""A rank that does something fatal at a given moment: what the tests of faults start in place of ``python -m distfl``.

    dying.py PLAN train CONFIG ...

PLAN is JSON: a list of [round, moment, ranks, what]. In that round, at that moment, each of these ranks (numbers at the start, or
"client N": whichever rank trains that client) does what it says: "KILL", "STOP", "USR1", "INT": a signal to itself; "OOM": it goes into a
control group and fills it; "host NAME": it claims to live there.
"""

import json
import os
import signal
import sys
from pathlib import Path

from distfl import forking

MOMENTS = ("start", "orders", "broadcasting", "training", "reporting", "gathering", "scoring", "recovering", "shrinking", "ending")
OOM_LIMIT_BYTES = 48 * 2**20


def rank() -> int:
    """The rank's life, once it is forked or by itself."""
    plan = json.loads(sys.argv.pop(1))
    number = int(os.environ["OMPI_COMM_WORLD_RANK"])
    _Fate(number, plan).lay()
    from distfl import __main__

    return __main__.run()


class _Fate:
    def __init__(self, number: int, plan: list):
        assert all(moment in MOMENTS for _, moment, _, _ in plan)
        self._number, self._plan, self._round = number, plan, None

    def lay(self) -> None:
        """Have every moment noticed."""
        from distfl import hosting, rounds
        from distfl.transport.control import Control
        from distfl.transport.mpi import MpiTransport

        for _, moment, ranks, what in self._plan:
            if moment == "start" and what.startswith("host ") and self._number in ranks:
                self._after(rounds, "own_place", lambda place, name=what[5:]: type(place)(name, place.process, place.namespace))
        self._after(MpiTransport, "broadcast_value", self._hear)
        self._before(rounds, "evaluate", lambda *_: self._meet("scoring"))
        self._before(Control, "come", lambda *_: self._meet("recovering"))
        self._before(Control, "shrunk", lambda *_: self._meet("shrinking"))
        self._before(MpiTransport, "part", lambda *_: self._meet("ending"))
        self._before(hosting, "train", lambda *arguments: self._meet("training", f"client {arguments[4].client}"))
        moments = {"reports": "reporting", "updates": "gathering", "sums": "gathering", "means": "gathering", "units": "broadcasting"}
        plain = MpiTransport._start

        def start(transport, purpose, *arguments):
            pending = plain(transport, purpose, *arguments)
            self._meet(moments.get(purpose))  # with the transfer just begun
            return pending

        MpiTransport._start = start

    def _hear(self, value):
        if isinstance(value, dict) and "order" in value:
            self._round = value.get("round", self._round)
            self._meet("orders")
        return value

    def _meet(self, moment: str | None, client: str = "") -> None:
        for entry in self._plan:
            round, of, ranks, what = entry
            if (round, of) == (self._round, moment) and (self._number in ranks or client in ranks):
                _do(what)

    @staticmethod
    def _before(owner, name, act) -> None:
        plain = getattr(owner, name)

        def wrapped(*arguments, **more):
            act(*arguments)
            return plain(*arguments, **more)

        setattr(owner, name, wrapped)

    @staticmethod
    def _after(owner, name, act) -> None:
        plain = getattr(owner, name)
        setattr(owner, name, lambda *arguments, **more: act(plain(*arguments, **more)))


def _do(what: str) -> None:
    if what != "OOM":
        os.kill(os.getpid(), getattr(signal, f"SIG{what}"))
        return
    group = Path(os.environ["DYING_GROUP"])
    (group / "cgroup.procs").write_text(str(os.getpid()))
    hog = []
    while True:
        hog.append(bytearray(os.urandom(1) * 2**20))


if __name__ == "__main__":
    code = forking.launch("dying:rank") if forking.is_asked_for() else None
    raise SystemExit(rank() if code is None else code)
