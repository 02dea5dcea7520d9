"""Caps inside a rank's own process, and the choice of one: they bite, are lifted again, charge the client alone, and measure what was used.

Limits are per process, so every scenario runs in a process of its own, forked from one that has imported torch and nothing else.
"""

import errno
import multiprocessing
import resource
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from distfl.allocator import collect_garbage, exact_allocator
from distfl.caps import choice
from distfl.caps.base import Measured, Outcome, is_allocation_failure, refused_allocation
from distfl.caps.choice import make_cap
from distfl.caps.process import data_bytes, resident_bytes
from distfl.caps.rlimit import Report, Rlimit
from distfl.errors import CapError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts mappings only on Linux")
MEGA = 10**6


def run(scenario: Callable, *arguments):
    """What ``scenario`` returned in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "distfl.caps.choice"])
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
    under(Rlimit(), 4, lambda: failure_of(lambda: [take(1), take_in_pieces(1, 1024), np.ones(1000), take(8)]))
    collect_garbage()  # library pages touched at the first use belong to the baseline
    pipe.send(scenario(*arguments))


def under(cap, megabytes: float, work: Callable[[], object], charged_mb: float = 0) -> tuple[object, float]:
    """What the work returned and its peak in MB, under a budget."""
    measured = cap.run(round(megabytes * MEGA), lambda: Outcome([], {"result": work()}), round(charged_mb * MEGA))
    assert measured.killed == ""
    return measured.outcome.facts["result"], measured.peak_bytes / MEGA


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


class Blind(Rlimit):
    """Sabotaged: lets an allocation succeed that is not."""

    def take(self, bytes_):
        return True


def prove_sabotaged(kind) -> str:
    try:
        kind().prove(20 * MEGA)
    except CapError as error:
        return error.found
    return "proven"


@pytest.mark.parametrize(
    "kind, found",
    [(Loose, "past it succeeded"), (Blind, "past it succeeded"), (Tight, "under it failed"), (Rlimit, "proven"), (Report, "proven")],
)
def test_a_cap_that_does_not_bite_is_found_out(kind, found):
    assert found in run(prove_sabotaged, kind)


def prove_under_a_hard_limit() -> str:
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + 10 * MEGA,) * 2)
    return prove_sabotaged(Rlimit)


def test_a_hard_limit_below_the_budget_is_a_cap_error():
    assert "the hard limit is" in run(prove_under_a_hard_limit)


@pytest.mark.parametrize("enforce", ["auto", "rlimit", "cgroup", "cgroup-v1", "cgroup-v2"])
def test_elsewhere_than_linux_a_cap_is_refused_with_the_way_out(enforce, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CapError, match="memory.enforce=report"):
        make_cap(enforce)
    assert make_cap("report").enforced is False


# --- which one ---------------------------------------------------------------------------------------------------------------------


def provable(*names: str) -> Callable[[str], object]:
    """Stands for the mechanisms of a machine where only some can be proven; the second version of groups cannot even be had."""

    class Mechanism:
        def __init__(self, name):
            self.name = name

        def prove(self, budget_bytes):
            assert budget_bytes > 0
            if self.name not in names:
                raise CapError("a cap", f"no {self.name} here", "nothing")

    def named(name):
        if name == "cgroup-v2" and name not in names:
            raise CapError("a group", "no folder", "nothing")
        return Mechanism(name)

    return named


@pytest.mark.parametrize(
    "there, taken",
    [
        (["rlimit", "cgroup-v2", "cgroup-v1"], "rlimit"),
        (["cgroup-v1", "cgroup-v2"], "cgroup-v2"),
        (["cgroup-v1"], "cgroup-v1"),
    ],
)
def test_auto_takes_the_strictest_that_can_be_proven(there, taken, monkeypatch):
    monkeypatch.setattr(choice, "_named", provable(*there))
    assert make_cap("auto").name == taken


def test_auto_never_falls_back_to_measuring_only(monkeypatch):
    monkeypatch.setattr(choice, "_named", provable())
    with pytest.raises(CapError, match="memory.enforce=report") as refused:
        make_cap("auto")
    assert refused.value.found == "rlimit: no rlimit here; cgroup-v2: no folder; cgroup-v1: no cgroup-v1 here"


@pytest.mark.parametrize("has_v2, opened", [(True, [2]), (False, [2, 1])])
def test_cgroup_prefers_the_second_version(has_v2, opened, monkeypatch):
    asked = []

    def open_(version):
        asked.append(version)
        if version == 2 and not has_v2:
            raise CapError("a group", "none", "nothing")
        return f"version {version}"

    monkeypatch.setattr(choice, "open_cgroup", open_)
    assert make_cap("cgroup") == f"version {opened[-1]}" and asked == opened
    asked.clear()
    assert make_cap("cgroup-v1") == "version 1" and asked == [1]


# --- one client --------------------------------------------------------------------------------------------------------------------


def grow(allocate) -> list:
    """Pieces of 1 MB until memory is refused, under a budget of 20 MB; then whether 100 MB can be had again."""
    held, refused = [], []

    def work() -> int:
        try:
            while len(held) < 40:
                held.append(allocate())
        except Exception as error:
            refused.extend([type(error).__name__, is_allocation_failure(error)])
        return len(held)

    inside, _ = under(Rlimit(), 20, work)
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
    """An allocation failure that leaves the client's work; the limit is gone all the same."""
    before, seen = resource.getrlimit(resource.RLIMIT_DATA), []

    def work() -> None:
        seen.append(resource.getrlimit(resource.RLIMIT_DATA) != before)
        take(50)

    try:
        under(Rlimit(), 20, work)
    except RuntimeError as error:
        seen.append(is_allocation_failure(error))
    return [*seen, resource.getrlimit(resource.RLIMIT_DATA) == before, failure_of(lambda: take(50))]


def test_the_limit_is_lifted_when_the_client_fails():
    assert run(escape) == [True, True, True, None]


def exhaust() -> list:
    """Nothing at all is left when the work ends: not even the file object that reads the peak."""
    before, held = resource.getrlimit(resource.RLIMIT_DATA), []

    def work() -> None:
        piece = 1 << 20
        while True:
            try:
                held.append(bytearray(piece))
            except MemoryError:
                if piece == 64:
                    raise
                piece //= 2

    try:
        under(Rlimit(), 20, work)
    except MemoryError:
        pass
    return [resource.getrlimit(resource.RLIMIT_DATA) == before, failure_of(lambda: take(50))]


def test_the_limit_is_lifted_when_nothing_at_all_is_left():
    assert run(exhaust) == [True, None]


def charge(charged_mb: float) -> list:
    """A budget of 20 MB of which some is used up by memory that the limit does not see: 7 MB, then 8 MB more, then 6 MB too many."""
    held = []
    found, peak = under(Rlimit(), 20, lambda: [failure_of(lambda mb=mb: held.append(take(mb))) for mb in (7, 8, 6)], charged_mb)
    return [found, peak]


def test_what_is_charged_is_taken_from_the_budget_and_added_to_the_peak():
    for charged, refusals, wanted in (
        (0, [None, None, "refused"], 15),
        (4, [None, None, "refused"], 19),
        (6, [None, "refused", None], 19),  # 14 MB are left: 7 and then 6
        (14.1, ["refused", "refused", "refused"], 14.1),
    ):
        found, peak = run(charge, charged)
        assert found == refusals, charged
        assert abs(peak - wanted) < 1, charged


def more_than_everything() -> list:
    return list(under(Rlimit(), 20, lambda: failure_of(lambda: take(5)), 30))  # 5: what the baseline left free in the heap is less


def test_a_budget_that_is_used_up_leaves_nothing():
    refused, peak = run(more_than_everything)
    assert refused == "refused" and peak >= 30  # the charge alone is over the budget, and the job then leaves the client out


def settle_in_process() -> list:
    settled = []
    result = Rlimit().run(MEGA, lambda: Outcome([np.ones(3)], {}), 0, lambda: settled.append(1))
    return [settled, isinstance(result, Measured), result.outcome.blocks[0].tolist()]


def test_a_process_that_has_rehearsed_settles_no_more_and_hands_the_outcome_on():
    assert run(settle_in_process) == [[], True, [1.0, 1.0, 1.0]]
    assert Rlimit.in_this_process and Report.in_this_process


def peak_of(kind, megabytes: float) -> float:
    def work() -> None:
        take(megabytes)  # let go at once
        take(megabytes / 2)

    return under(kind(), 100, work)[1]


@pytest.mark.parametrize("kind", [Rlimit, Report])
def test_the_peak_of_20_megabytes_is_20_megabytes(kind):
    assert abs(run(peak_of, kind, 20) - 20) < 1
    assert run(peak_of, kind, 0) < 1


def report_past_the_budget() -> float:
    return under(Report(), 5, lambda: failure_of(lambda: take(30)))


def test_report_measures_and_never_fails():
    refused, peak = run(report_past_the_budget)
    assert refused is None and abs(peak - 30) < 1


# --- one client after another ------------------------------------------------------------------------------------------------------


def second_after_first(first_mb: float, second_mb: float, piece_bytes: int) -> list:
    """Clients with 30 MB and 10 MB, one after the other, in tensors of one size; something small outlives the first."""
    cap, stays = Rlimit(), []

    def first() -> None:
        held = take_in_pieces(first_mb, piece_bytes)
        stays.append(torch.ones(100))
        del held

    _, first_peak = under(cap, 40, first)
    collect_garbage()
    refused, second_peak = under(cap, 10, lambda: failure_of(lambda: take_in_pieces(second_mb, piece_bytes)))
    return [first_peak, refused, second_peak]


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
        refused = under(cap, 40, lambda: [len(take_in_pieces(20, 64 * 1024)), failure_of(lambda: take(60))])[0]
        assert refused[1] == "refused"
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
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOENT, "Cannot allocate memory"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_allocation_failures_are_told_from_other_errors(error, expected):
    assert is_allocation_failure(error) is expected


def test_a_refusal_is_told_in_a_few_words():
    torch_says = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000 bytes."
    )
    assert refused_allocation(torch_says) == "8000 bytes more were refused"
    assert refused_allocation(MemoryError("x" * 500)) == "MemoryError: " + "x" * 100
