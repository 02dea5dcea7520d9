"""Caps inside the rank's own process: RLIMIT_DATA, or only a measurement.

* ``rlimit``: the kernel refuses an allocation past the limit, PyTorch raises, the process lives on. Counts
  private writable memory; shared mappings and file pages are not in it.
* ``report``: nothing is enforced, peaks are measured all the same; every output says so.

The peak is resident memory: the kernel's high-water mark, reset when a client starts. It also covers what the
limit cannot see: small blocks that reuse heap which an earlier client freed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch

from distfl.allocator import free_heap_bytes, fresh_heap, trim_heap
from distfl.caps.base import Measured, MemoryCap, Work
from distfl.caps.process import data_bytes, high_water_bytes, reset_high_water, resident_bytes
from distfl.errors import CapError


class InProcess(MemoryCap):
    """A cap on this process; made before the first client, when what is free in the heap belongs to the baseline."""

    def __init__(self) -> None:
        trim_heap()
        self._free_heap_before = free_heap_bytes()

    @abstractmethod
    def set_limit(self, bytes_: int | None) -> None:
        """Limit this process's private data to so many bytes; None lifts the limit (raises CapError)."""

    def run(
        self,
        budget_bytes: int,
        work: Work,
        charged_bytes: int = 0,
        settle: Callable[[], object] | None = None,
        attend: Callable[[], object] = lambda: None,
    ) -> Measured:
        with fresh_heap():
            resident = resident_bytes()
            # heap that earlier clients left free is not a gift to this one
            baseline = data_bytes() - max(0, free_heap_bytes() - self._free_heap_before)
            self.set_limit(baseline + max(0, budget_bytes - charged_bytes))
            try:
                reset_high_water()
                outcome = work()
            finally:
                self.set_limit(None)  # first: with nothing left, reading the peak would fail too
            return Measured(outcome, max(0, high_water_bytes() - resident) + charged_bytes)


class Rlimit(InProcess):
    """RLIMIT_DATA, soft limit only: it can be lifted again and needs no rights."""

    name, enforced = "rlimit", True

    def __init__(self) -> None:
        super().__init__()
        import resource  # not on every platform; only this mechanism needs it

        self._resource = resource
        self._soft, self._hard = resource.getrlimit(resource.RLIMIT_DATA)

    def allocate(self, bytes_: int) -> torch.Tensor:
        """Not written to: this limit counts what is mapped, touched or not."""
        return torch.empty(bytes_, dtype=torch.uint8)

    def set_limit(self, bytes_: int | None) -> None:
        try:
            self._resource.setrlimit(self._resource.RLIMIT_DATA, (self._soft if bytes_ is None else bytes_, self._hard))
        except (ValueError, OSError) as error:
            raise CapError(
                f"RLIMIT_DATA of {bytes_} bytes", f"{error}; the hard limit is {self._hard}", "raise the hard limit (ulimit -H -d)"
            ) from None


class Report(InProcess):
    """Measures, enforces nothing."""

    name, enforced = "report", False

    def set_limit(self, bytes_: int | None) -> None:
        pass
