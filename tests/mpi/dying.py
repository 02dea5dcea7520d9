"""A rank that does something fatal at a given moment: what the tests of faults start in place of ``python -m distfl``.

    dying.py PLAN train CONFIG ...

PLAN is JSON: a list of [round, moment, ranks, what]. In that round, at that moment, each of these ranks (numbers at the start, or
"client N": whoever trains that client) does what it says: KILL, STOP, USR1, INT: a signal to itself; OOM: it goes into the control group
DYING_GROUP and fills it; HOST name: it claims to live there; NAN: the client it trains has a weight that is no number; FULL: from now
on no file can grow. "gathering 3": with the third transfer of its update just begun.
"""

import json
import os
import resource
import signal
import sys
from collections import Counter
from pathlib import Path

from distfl import forking

MOMENTS = ("start", "orders", "broadcasting", "training", "reporting", "gathering", "scoring", "recovering", "shrinking", "ending")
BY_PURPOSE = {"reports": "reporting", "updates": "gathering", "sums": "gathering", "means": "gathering", "units": "broadcasting"}


def rank() -> int:
    """The rank's life, forked or by itself."""
    fates = json.loads(sys.argv.pop(1))
    assert all(moment.split()[0] in MOMENTS for _, moment, _, _ in fates)
    _Fate(int(os.environ["OMPI_COMM_WORLD_RANK"]), fates).lay()
    from distfl import __main__

    return __main__.run()


class _Fate:
    """What one rank is going to do, and where in a round it is."""

    def __init__(self, number: int, fates: list):
        self._number, self._fates, self._round, self._begun = number, fates, None, Counter()

    def lay(self) -> None:
        """Have every moment noticed."""
        from distfl import hosting, rounds
        from distfl.transport.control import Control
        from distfl.transport.mpi import MpiTransport

        for host in [what.split()[1] for _, moment, ranks, what in self._fates if moment == "start" and self._number in ranks]:
            _after(rounds, "own_place", lambda place, host=host: type(place)(host, place.process, place.namespace))
        _after(MpiTransport, "broadcast_value", self._hear)
        _before(rounds, "evaluate", lambda *_: self._meet("scoring"))
        _before(Control, "come", lambda *_: self._meet("recovering"))
        _before(Control, "shrunk", lambda *_: self._meet("shrinking"))
        _before(MpiTransport, "part", lambda *_: self._meet("ending"))
        _before(hosting, "train", lambda *arguments: self._meet("training", f"client {arguments[4].client}", arguments[1]))
        plain = MpiTransport._start

        def start(transport, purpose, *arguments):
            pending = plain(transport, purpose, *arguments)
            if moment := BY_PURPOSE.get(purpose):
                self._begun[moment] += 1
                self._meet(moment)
                self._meet(f"{moment} {self._begun[moment]}")
            return pending

        MpiTransport._start = start

    def _hear(self, value):
        if isinstance(value, dict) and "order" in value:
            self._round = value.get("round", self._round)
            self._begun.clear()
            self._meet("orders")
        return value

    def _meet(self, moment: str, client: str = "", weights=()) -> None:
        for round, of, ranks, what in self._fates:
            if (round, of) == (self._round, moment) and (self._number in ranks or client in ranks):
                _do(what, weights)


def _before(owner, name, act) -> None:
    plain = getattr(owner, name)

    def wrapped(*arguments, **more):
        act(*arguments)
        return plain(*arguments, **more)

    setattr(owner, name, wrapped)


def _after(owner, name, act) -> None:
    plain = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **more: act(plain(*arguments, **more)))


def _do(what: str, weights) -> None:
    if what == "NAN":
        weights[0].data.fill_(float("nan"))
        return
    if what == "FULL":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return
    if what != "OOM":
        os.kill(os.getpid(), getattr(signal, f"SIG{what}"))
        return
    Path(os.environ["DYING_GROUP"], "cgroup.procs").write_text(str(os.getpid()))
    hog = []
    while True:
        hog.append(b"x" * 2**20)


if __name__ == "__main__":
    code = forking.launch("dying:rank") if forking.is_asked_for() else None
    raise SystemExit(rank() if code is None else code)
