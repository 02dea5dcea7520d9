"""Memory of this process, as the kernel counts it: what is resident, its high-water mark, what RLIMIT_DATA counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distfl.errors import CapError


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
    """Let the high-water mark start again from the present (raises CapError)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise CapError(
            "the peak of one client", f"/proc/self/clear_refs: {error}", "run where it can be written; some containers hide it"
        ) from None


class Peak:
    """Most memory that this process held during some stretches of work, above what it held when this was made.

    ``bytes`` is None where high-water marks cannot be reset: it measures, it guards nothing.
    """

    def __init__(self) -> None:
        self._before = resident_bytes()
        self.bytes: int | None = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """One stretch."""
        try:
            reset_high_water()
        except CapError:
            self.bytes = None
        yield
        if self.bytes is not None:
            self.bytes = max(self.bytes, high_water_bytes() - self._before)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise CapError(f"{key} of this process", "/proc/self/status does not name it", "use Linux, where memory can be measured")
