"""The memory cap: baseline, impose, prove, measure the peak, lift. One class per mechanism.

The *baseline* is what the process holds before the client's first tensor exists (imports, MPI, a
warm-up step, the node's replica). The budget counts everything above it. A mechanism is only used
after it was proven in this very process: an allocation just under the budget succeeds, one just
past it fails.

* ``rlimit``: RLIMIT_DATA. The kernel refuses an allocation past it, PyTorch raises, the process
  lives on. Counts private writable memory; shared mappings and file pages are not in it.
* ``report``: nothing is enforced, peaks are measured all the same; every output says so.

The peak is resident memory: the kernel's high-water mark, reset when a client starts. It also covers what the
limit cannot see: blocks below ``MMAP_THRESHOLD_BYTES`` that reuse heap which an earlier client freed. A client
whose peak in training is over its budget is left out, whichever of the two noticed.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from distfl.errors import CapError

PROOF_STEP_BYTES = 2 * 2**20  # the proof stops this far under the budget, then asks for twice as much
MMAP_THRESHOLD_BYTES = 32 * 1024

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # glibc's malloc.h

_ALLOCATION_FAILURES = (
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "could not create a memory",
    "out of memory",
    "could not create a primitive",
    "could not execute a primitive",
)


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an exception says that memory was refused (PyTorch raises RuntimeError, NumPy and Python MemoryError)."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # a memory-mapped shard
    refused = isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILURES)
    return refused or isinstance(error, MemoryError)


def refused_allocation(error: BaseException) -> str:
    """What an allocation failure asked for, in a few words."""
    size = re.search(r"allocate (\d+) bytes", str(error))
    return f"{size[1]} bytes more were refused" if size else f"{type(error).__name__}: {str(error)[:100]}"


class Meter:
    """Peak of one client, in bytes above its baseline."""

    def __init__(self, cap: MemoryCap, budget_bytes: int):
        self._cap, self._budget = cap, budget_bytes
        self._peak = 0

    def start(self) -> None:
        """Read the baseline and impose the cap."""
        trim_heap()
        self._resident_before = resident_bytes()
        # heap that earlier clients left free is not a gift to this one
        self._limit = data_bytes() - max(0, free_heap_bytes() - self._cap.free_heap_before) + self._budget
        self._cap.set_limit(self._limit)
        reset_high_water()

    def stop(self) -> None:
        """Lift the cap and take the peak."""
        self._cap.set_limit(None)  # first: with nothing left, reading the peak would fail too
        self._take()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Lift the cap for something that is not the client's (a collective's own buffers); what it keeps moves the baseline."""
        self._cap.set_limit(None)
        self._take()
        resident, data = resident_bytes(), data_bytes()
        try:
            yield
        finally:
            self._resident_before += resident_bytes() - resident
            self._limit += data_bytes() - data
            self._cap.set_limit(self._limit)
            reset_high_water()

    def _take(self) -> None:
        self._peak = max(self._peak, high_water_bytes() - self._resident_before)

    def read(self) -> int:
        """The peak up to now."""
        self._take()
        return self.peak_bytes

    @property
    def peak_bytes(self) -> int:
        return max(0, self._peak)


class MemoryCap(ABC):
    """One mechanism; made before the first client, when what is free in the heap belongs to the baseline."""

    name: str
    enforced: bool

    def __init__(self) -> None:
        trim_heap()
        self.free_heap_before = free_heap_bytes()

    @abstractmethod
    def set_limit(self, bytes_: int | None) -> None:
        """Limit this process's private data to so many bytes; None lifts the limit (raises CapError)."""

    @contextmanager
    def imposed(self, budget_bytes: int) -> Iterator[Meter]:
        """Everything allocated inside counts against the budget."""
        meter = Meter(self, budget_bytes)
        meter.start()
        try:
            yield meter
        finally:
            meter.stop()

    def prove(self, budget_bytes: int) -> None:
        """Show that the cap bites at this budget, in this process (raises CapError)."""
        if not self.enforced:
            return
        step = min(PROOF_STEP_BYTES, budget_bytes // 2)
        with self.imposed(budget_bytes):
            under = _can_allocate(budget_bytes - step)
            past = _can_allocate(budget_bytes + step)
        if not under:
            raise CapError(
                f"a cap of {budget_bytes} bytes by {self.name}",
                f"an allocation {step} bytes under it failed",
                "raise the limits of this process (ulimit -d, ulimit -v, the job's memory)",
            )
        if past:
            raise CapError(
                f"a cap of {budget_bytes} bytes by {self.name}",
                f"an allocation {step} bytes past it succeeded: the limit does not bite here",
                "see `distfl doctor`; memory.enforce=report measures without enforcing",
            )


class Rlimit(MemoryCap):
    """RLIMIT_DATA, soft limit only: it can be lifted again and needs no rights."""

    name, enforced = "rlimit", True

    def __init__(self) -> None:
        super().__init__()
        import resource  # not on every platform; only this mechanism needs it

        self._resource = resource
        self._soft, self._hard = resource.getrlimit(resource.RLIMIT_DATA)

    def set_limit(self, bytes_: int | None) -> None:
        try:
            self._resource.setrlimit(self._resource.RLIMIT_DATA, (self._soft if bytes_ is None else bytes_, self._hard))
        except (ValueError, OSError) as error:
            raise CapError(
                f"RLIMIT_DATA of {bytes_} bytes", f"{error}; the hard limit is {self._hard}", "raise the hard limit (ulimit -H -d)"
            ) from None


class Report(MemoryCap):
    """Measures, enforces nothing."""

    name, enforced = "report", False

    def set_limit(self, bytes_: int | None) -> None:
        pass


def make_cap(enforce: str) -> MemoryCap:
    """The mechanism that ``memory.enforce`` asks for; ``auto`` is the strictest this platform has.

    Raises:
        CapError: the mechanism does not exist here.
    """
    if enforce == "report":
        return Report()
    if not sys.platform.startswith("linux"):
        raise CapError(
            f"memory.enforce = {enforce}",
            f"platform {sys.platform}; RLIMIT_DATA counts mappings only on Linux",
            "set memory.enforce=report to measure only",
        )
    return Rlimit()


def exact_allocator() -> None:
    """Make what the process holds follow what is alive: large blocks are mapped and unmapped one by one.

    glibc would otherwise raise its mapping threshold and keep freed blocks, up to a third of a
    small budget. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_TOP_PAD, 0)  # else the heap grows ahead of need, and large blocks are cut from that
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, MMAP_THRESHOLD_BYTES)


def trim_heap() -> None:
    """Give freed heap pages back, so that a client cannot live on the slack of the one before it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def collect_garbage() -> None:
    """Drop what a failed client's exception still referred to."""
    gc.collect()
    trim_heap()


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2: ten counters, the ninth is the free bytes inside the heap."""

    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(10)]


def free_heap_bytes() -> int:
    """Bytes of the heap that are mapped but free: allocations could take them unseen by any limit."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _Mallinfo2
    return libc.mallinfo2().field8


def resident_bytes() -> int:
    """Resident memory of this process."""
    return _status("VmRSS")


def high_water_bytes() -> int:
    """Most resident memory since the last reset."""
    return _status("VmHWM")


def data_bytes() -> int:
    """What RLIMIT_DATA counts."""
    return _status("VmData")


def reset_high_water() -> None:
    """Let the high-water mark start again from the present."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise CapError(
            "the peak of one client", f"/proc/self/clear_refs: {error}", "run where it can be written; some containers hide it"
        ) from None


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise CapError(f"{key} of this process", "/proc/self/status does not name it", "use Linux, where memory can be measured")


def _can_allocate(bytes_: int) -> bool:
    try:
        torch.empty(bytes_, dtype=torch.uint8)
        return True
    except Exception as error:
        if is_allocation_failure(error):
            return False
        raise
