"""The memory cap: it bites, is lifted again, charges the client alone, and measures what was used.

Limits are per process, so every scenario runs in a process of its own, forked from one that has imported torch and nothing else.
"""

import multiprocessing
import resource
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from distfl.errors import CapError
from distfl.memory_cap import Report, Rlimit, collect_garbage, data_bytes, exact_allocator, is_allocation_failure, make_cap, resident_bytes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts mappings only on Linux")
MEGA = 10**6


def run(scenario: Callable, *arguments):
    """What ``scenario`` returned in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "distfl.memory_cap"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, scenario, arguments))
    process.start()
    there.close()
    try:
        assert here.poll(60), "no answer in a minute"
        return here.recv()
    except EOFError:
        raise AssertionError(f"{scenario.__name__} ended without an answer, see its traceback") from None
    finally:
        process.kill()
        process.join()


def _child(pipe, scenario, arguments) -> None:
    torch.set_num_threads(1)
    exact_allocator()
    with Rlimit().imposed(4 * MEGA):  # library pages touched at the first use belong to the baseline
        failure_of(lambda: [take(1), take_in_pieces(1, 1024), np.ones(1000), take(8)])
    collect_garbage()
    pipe.send(scenario(*arguments))


def take(megabytes: float) -> torch.Tensor:
    """A tensor whose pages are all touched."""
    return torch.ones(round(megabytes * MEGA / 4))


def take_in_pieces(megabytes: float, piece_bytes: int) -> list[torch.Tensor]:
    return [torch.ones(piece_bytes // 4) for _ in range(round(megabytes * MEGA / piece_bytes))]


def failure_of(work: Callable[[], object]) -> str | None:
    """None if the work succeeds, "refused" if memory was refused; anything else is raised."""
    try:
        work()
    except Exception as error:
        if not is_allocation_failure(error):
            raise
        return "refused"
    return None


# --- proof -------------------------------------------------------------------------------------------------------------------------


def prove_many() -> str:
    cap = make_cap("auto")
    for megabytes in (4, 5, 8, 16, 48, 110, 500):
        for _ in range(2):
            cap.prove(megabytes * MEGA)
    return cap.name


def test_the_cap_is_proven_for_budgets_of_4_to_500_megabytes():
    assert run(prove_many) == "rlimit"


class Loose(Rlimit):
    """Sabotaged: says yes and does nothing."""

    def set_limit(self, bytes_):
        pass


class Tight(Rlimit):
    """Sabotaged: takes 8 MB more than it should."""

    def set_limit(self, bytes_):
        super().set_limit(None if bytes_ is None else bytes_ - 8 * MEGA)


def prove_sabotaged(kind) -> str:
    try:
        kind().prove(20 * MEGA)
    except CapError as error:
        return error.found
    return "proven"


@pytest.mark.parametrize("kind, found", [(Loose, "past it succeeded"), (Tight, "under it failed"), (Rlimit, "proven"), (Report, "proven")])
def test_a_cap_that_does_not_bite_is_found_out(kind, found):
    assert found in run(prove_sabotaged, kind)


def prove_under_a_hard_limit() -> str:
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + 10 * MEGA,) * 2)
    return prove_sabotaged(Rlimit)


def test_a_hard_limit_below_the_budget_is_a_cap_error():
    assert "the hard limit is" in run(prove_under_a_hard_limit)


@pytest.mark.parametrize("enforce", ["auto", "rlimit"])
def test_elsewhere_than_linux_a_cap_is_refused_with_the_way_out(enforce, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CapError, match="memory.enforce=report"):
        make_cap(enforce)
    assert make_cap("report").enforced is False


# --- one client --------------------------------------------------------------------------------------------------------------------


def grow(allocate) -> list:
    """Pieces of 1 MB until memory is refused, under a budget of 20 MB; then whether 100 MB can be had again."""
    held, refused = [], None
    with Rlimit().imposed(20 * MEGA):
        try:
            while len(held) < 40:
                held.append(allocate())
        except Exception as error:
            refused = [type(error).__name__, is_allocation_failure(error)]
        inside = len(held)
    held.append(take(100))
    return [inside, refused]


def megabyte_of_torch():
    return take(1)


def megabyte_of_numpy():
    return np.ones(MEGA // 4, np.float32)


def megabyte_of_python():
    return bytearray(MEGA)


@pytest.mark.parametrize(
    "allocate, error", [(megabyte_of_torch, "RuntimeError"), (megabyte_of_numpy, "MemoryError"), (megabyte_of_python, "MemoryError")]
)
def test_an_allocation_past_the_budget_raises_and_the_process_lives_on(allocate, error):
    inside, refused = run(grow, allocate)
    assert 17 <= inside <= 20  # page tables and mapping overhead
    assert refused[0].endswith(error) or refused[0] == "_ArrayMemoryError"
    assert refused[1] is True


def escape() -> list:
    """An allocation failure that leaves the with block; the limit is gone all the same."""
    before, seen = resource.getrlimit(resource.RLIMIT_DATA), []
    try:
        with Rlimit().imposed(20 * MEGA):
            seen.append(resource.getrlimit(resource.RLIMIT_DATA) != before)
            take(50)
    except RuntimeError as error:
        seen.append(is_allocation_failure(error))
    return [*seen, resource.getrlimit(resource.RLIMIT_DATA) == before, failure_of(lambda: take(50))]


def test_the_limit_is_lifted_when_the_client_fails():
    assert run(escape) == [True, True, True, None]


def exhaust() -> list:
    """Nothing at all is left when the with block ends: not even the file object that reads the peak."""
    before, held, piece = resource.getrlimit(resource.RLIMIT_DATA), [], 1 << 20
    try:
        with Rlimit().imposed(20 * MEGA):
            while True:
                try:
                    held.append(bytearray(piece))
                except MemoryError:
                    if piece == 64:
                        raise
                    piece //= 2
    except MemoryError:
        pass
    return [resource.getrlimit(resource.RLIMIT_DATA) == before, failure_of(lambda: take(50))]


def test_the_limit_is_lifted_when_nothing_at_all_is_left():
    assert run(exhaust) == [True, None]


def pause() -> list:
    """A budget of 20 MB: 5 MB of the client's, 40 MB of somebody else's, 5 MB more of the client's, then 12 MB too many."""
    with Rlimit().imposed(20 * MEGA) as meter:
        first = take(5)
        with meter.paused():
            passing, kept = take(30), take(10)
            del passing
        second = take(5)
        too_many = failure_of(lambda: take(12))
        del first, second, kept
    return [meter.peak_bytes / MEGA, too_many]


def test_what_happens_while_paused_is_not_the_clients():
    peak, too_many = run(pause)
    assert abs(peak - 10) < 1
    assert too_many == "refused"


def pause_after_peak() -> float:
    with Rlimit().imposed(30 * MEGA) as meter:
        take(20)
        with meter.paused():
            take(50)
        take(3)
    return meter.peak_bytes / MEGA


def test_the_peak_before_a_pause_is_remembered():
    assert abs(run(pause_after_peak) - 20) < 1


def peak_of(kind, megabytes: float) -> float:
    with kind().imposed(100 * MEGA) as meter:
        take(megabytes)  # let go at once
        take(megabytes / 2)
    return meter.peak_bytes / MEGA


@pytest.mark.parametrize("kind", [Rlimit, Report])
def test_the_peak_of_20_megabytes_is_20_megabytes(kind):
    assert abs(run(peak_of, kind, 20) - 20) < 1
    assert run(peak_of, kind, 0) < 1


def report_past_the_budget() -> float:
    with Report().imposed(5 * MEGA) as meter:
        take(30)
    return meter.peak_bytes / MEGA


def test_report_measures_and_never_fails():
    assert abs(run(report_past_the_budget) - 30) < 1


# --- one client after another ------------------------------------------------------------------------------------------------------


def second_after_first(first_mb: float, second_mb: float, piece_bytes: int) -> list:
    """Clients with 30 MB and 10 MB, one after the other, in tensors of one size; something small outlives the first."""
    cap, stays = Rlimit(), []
    with cap.imposed(40 * MEGA) as meter:
        held = take_in_pieces(first_mb, piece_bytes)
        stays.append(torch.ones(100))
        del held
    collect_garbage()
    with cap.imposed(10 * MEGA) as second:
        refused = failure_of(lambda: take_in_pieces(second_mb, piece_bytes))
    return [meter.peak_bytes / MEGA, refused, second.peak_bytes / MEGA]


@pytest.mark.parametrize("piece_bytes", [512 * 1024, 4 * MEGA])
def test_a_second_client_cannot_live_on_what_the_first_freed(piece_bytes):
    first, refused, peak = run(second_after_first, 30, 20, piece_bytes)
    assert first > 28 and refused == "refused" and peak <= 10.5
    assert run(second_after_first, 30, 8, piece_bytes)[1] is None  # what it may use, it can


def test_small_tensors_in_heap_that_the_first_freed_are_refused_or_seen_in_the_peak():
    _, refused, peak = run(second_after_first, 30, 20, 16 * 1024)
    assert refused == "refused" or peak > 10  # the job then leaves the client out: its peak is over its budget


def repeat() -> list[float]:
    """The same client eight times: what its process holds afterwards."""
    held, cap = [], Rlimit()
    for _ in range(8):
        with cap.imposed(40 * MEGA):
            take_in_pieces(20, 64 * 1024)
            failure_of(lambda: take(60))
        collect_garbage()
        held.append(resident_bytes() / MEGA)
    return held


def test_the_baseline_does_not_grow_from_client_to_client():
    held = run(repeat)
    assert abs(held[-1] - held[1]) < 0.5


# --- what counts as refused memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, expected",
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_allocation_failures_are_told_from_other_errors(error, expected):
    assert is_allocation_failure(error) is expected
