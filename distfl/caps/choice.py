"""Which mechanism enforces the budgets here."""

from __future__ import annotations

import sys

from distfl.caps.base import MemoryCap
from distfl.caps.cgroup import open_cgroup
from distfl.caps.cuda import Cuda
from distfl.caps.rlimit import Report, Rlimit
from distfl.errors import CapError

PROOF_BYTES = 16 * 10**6


def make_cap(enforce: str) -> MemoryCap:
    """The mechanism that ``memory.enforce`` asks for (or ``cuda``, which no config may ask for while clients train on the CPU).

    ``auto`` takes the first of rlimit, cgroup v2, cgroup v1 that can be proven: the limit that refuses the very
    byte comes before those that count touched pages. It never falls back to measuring only.

    Raises:
        CapError: the mechanism cannot be had or proven here.
    """
    if enforce != "auto":
        return _named(enforce)
    failures = []
    for name in ("rlimit", "cgroup-v2", "cgroup-v1"):
        try:
            cap = _named(name)
            cap.prove(PROOF_BYTES)
            return cap
        except CapError as error:
            failures.append(f"{name}: {error.found}")
    raise CapError("memory.enforce = auto", "; ".join(failures), "see `distfl doctor`; memory.enforce=report measures without enforcing")


def _named(enforce: str) -> MemoryCap:
    if enforce == "report":
        return Report()
    if enforce == "cuda":
        return Cuda()
    if not sys.platform.startswith("linux"):
        raise CapError(
            f"memory.enforce = {enforce}",
            f"platform {sys.platform}; RLIMIT_DATA counts mappings only on Linux",
            "set memory.enforce=report to measure only",
        )
    if enforce == "rlimit":
        return Rlimit()
    if enforce == "cgroup":
        try:
            return open_cgroup(2)
        except CapError:
            return open_cgroup(1)
    return open_cgroup(int(enforce[-1]))
