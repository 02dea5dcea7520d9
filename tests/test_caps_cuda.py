"""The cap on a CUDA device, against something that keeps books like PyTorch's caching allocator."""

from types import SimpleNamespace

import pytest

from distfl.caps import choice
from distfl.caps.base import Outcome, is_allocation_failure
from distfl.caps.cuda import Cuda
from distfl.errors import CapError

MEGA = 10**6
TOTAL = 1000 * MEGA
DONE = Outcome([], {"done": True})


class Device:
    """``torch.cuda`` of one device: memory is reserved when it is needed, kept when it is freed, refused past the fraction.

    Args:
        bites: False = fractions are taken and ignored.
    """

    def __init__(self, total: int = TOTAL, bites: bool = True):
        self.total, self.bites, self.fraction = total, bites, 1.0
        self.allocated = self.reserved = self.peak = 0
        self.calls: list[str] = []
        self.fractions: list[float] = []

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 3

    def get_device_properties(self, device: int) -> SimpleNamespace:
        assert device == 3
        return SimpleNamespace(total_memory=self.total)

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self.reserved = self.allocated

    def memory_reserved(self) -> int:
        return self.reserved

    def max_memory_reserved(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.reserved

    def set_per_process_memory_fraction(self, fraction: float) -> None:
        assert 0 <= fraction <= 1
        self.fraction = fraction
        self.fractions.append(fraction)

    def allocate(self, bytes_: int) -> None:
        needed = max(0, self.allocated + bytes_ - self.reserved)  # first what lies in the cache
        if self.bites and self.reserved + needed > round(self.fraction * self.total):
            raise RuntimeError(f"CUDA out of memory. Tried to allocate {bytes_} bytes")
        self.allocated += bytes_
        self.reserved += needed
        self.peak = max(self.peak, self.reserved)

    def free(self, bytes_: int) -> None:
        self.allocated -= bytes_


class Capped(Cuda):
    """Takes memory from the device above instead of a real one."""

    def take(self, bytes_: int) -> bool:
        try:
            self._cuda.allocate(bytes_)
        except RuntimeError as error:
            assert is_allocation_failure(error)
            return False
        self._cuda.free(bytes_)
        return True


def test_the_limit_is_what_is_reserved_and_the_budget_without_what_is_charged():
    device, seen = Device(), []
    device.allocate(100 * MEGA)
    Cuda(device).run(300 * MEGA, lambda: seen.append(device.fraction) or DONE, charged_bytes=50 * MEGA)
    assert seen == [pytest.approx(0.35)]  # (100 + 300 - 50) of 1000 MB
    assert device.fractions[-1] == 1.0


def test_what_earlier_clients_left_in_the_cache_is_no_gift():
    device = Device()
    device.allocate(400 * MEGA)
    device.free(300 * MEGA)  # 400 MB reserved, 100 MB alive
    cap = Capped(device)
    assert cap.run(150 * MEGA, lambda: Outcome([], {"had": cap.take(160 * MEGA)})).outcome.facts == {"had": False}
    assert cap.run(150 * MEGA, lambda: Outcome([], {"had": cap.take(150 * MEGA)})).outcome.facts == {"had": True}


def test_more_charged_than_there_is_leaves_nothing():
    device = Device()
    device.allocate(100 * MEGA)
    cap = Capped(device)
    assert cap.run(30 * MEGA, lambda: Outcome([], {"had": cap.take(1)}), charged_bytes=40 * MEGA).outcome.facts == {"had": False}


def test_the_peak_is_what_was_reserved_above_the_baseline_and_what_was_charged():
    device = Device()
    device.allocate(700 * MEGA)  # an earlier peak that is not this client's
    device.free(600 * MEGA)

    def work() -> Outcome:
        device.allocate(120 * MEGA)
        device.free(120 * MEGA)
        device.allocate(30 * MEGA)  # from the cache
        device.free(30 * MEGA)
        return DONE

    measured = Cuda(device).run(300 * MEGA, work, charged_bytes=50 * MEGA)
    assert measured.peak_bytes == 170 * MEGA  # 120 above the 100 that stay, and 50
    assert measured.outcome is DONE and measured.killed == ""
    assert Cuda(device).run(300 * MEGA, lambda: DONE).peak_bytes == 0


def test_the_device_has_finished_before_memory_is_counted():
    device = Device()
    Cuda(device).run(MEGA, lambda: device.calls.append("work") or DONE)
    assert device.calls == ["synchronize", "empty_cache", "work", "synchronize"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()])
def test_the_limit_is_lifted_when_the_work_fails(error):
    device = Device()

    def fail() -> Outcome:
        assert device.fraction == pytest.approx(0.3)
        raise error

    with pytest.raises(type(error)):
        Cuda(device).run(300 * MEGA, fail)
    assert device.fraction == 1.0


def test_a_budget_above_the_device_is_refused_before_any_work():
    device = Device()
    device.allocate(100 * MEGA)
    with pytest.raises(CapError) as refusal:
        Cuda(device).run(901 * MEGA, lambda: pytest.fail("worked"))
    assert refusal.value.found.startswith("the device has 1000000000, 100000000 ")
    assert device.fractions == []
    assert Cuda(device).run(900 * MEGA, lambda: DONE).outcome is DONE  # all that is left
    assert Cuda(device).run(950 * MEGA, lambda: DONE, charged_bytes=50 * MEGA).outcome is DONE


@pytest.mark.parametrize("megabytes", [1, 16, 500])
def test_a_device_that_enforces_is_proven(megabytes):
    device = Device()
    device.allocate(40 * MEGA)
    Capped(device).prove(megabytes * MEGA)
    assert device.fraction == 1.0


def test_a_device_that_does_not_enforce_is_found_out():
    with pytest.raises(CapError, match="does not bite"):
        Capped(Device(bites=False)).prove(16 * MEGA)


def test_a_device_that_refuses_too_early_is_found_out():
    device = Device(total=TOTAL)
    device.set_per_process_memory_fraction = lambda fraction: setattr(device, "fraction", fraction - 0.01)  # 10 MB too little
    with pytest.raises(CapError, match="under it failed"):
        Capped(device).prove(16 * MEGA)


def test_without_a_device_it_is_refused(monkeypatch):
    missing = SimpleNamespace(is_available=lambda: False)
    with pytest.raises(CapError, match="finds no CUDA device"):
        Cuda(missing)
    monkeypatch.setattr(choice, "Cuda", lambda: Cuda(missing))
    with pytest.raises(CapError, match="memory.enforce = cuda"):
        choice.make_cap("cuda")


def test_it_is_a_cap_in_this_process():
    assert (Cuda.name, Cuda.enforced, Cuda.in_this_process) == ("cuda", True, True)
