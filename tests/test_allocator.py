"""The C library's allocator: what a process must start with, and that resident memory then follows the tensors that are alive."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from live_bytes import LiveBytes, client

from distfl import allocator
from distfl.config import TrainingConfig
from distfl.model import ModelSpec
from distfl.recipes import Recipe
from distfl.units import Window

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
needs_glibc = pytest.mark.skipif(allocator._function("mallopt") is None, reason="glibc's allocator")


def clean() -> dict[str, str]:
    """This process's environment, as if nobody had prepared it."""
    return {name: value for name, value in os.environ.items() if name not in allocator.environment()}


OWN = "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"


# --- the environment ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "present, wanted",
    [
        (None, OWN),
        ("", OWN),
        ("glibc.malloc.check=3", f"glibc.malloc.check=3:{OWN}"),
        ("glibc.malloc.arena_max=1:glibc.malloc.check=3", f"glibc.malloc.check=3:{OWN}"),
        (OWN, OWN),
    ],
)
def test_the_environment_keeps_other_tunables(present, wanted, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if present is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", present)
    found = allocator.environment()
    assert found["GLIBC_TUNABLES"] == wanted
    assert os.environ.get("GLIBC_TUNABLES") == present  # it is told, not set


def test_a_process_is_prepared_by_the_whole_environment_only(monkeypatch):
    for name in allocator.environment():
        monkeypatch.delenv(name, raising=False)
    wanted = allocator.environment()
    assert not allocator.is_prepared()
    for name, value in wanted.items():
        assert not allocator.is_prepared()
        monkeypatch.setenv(name, value)
    assert allocator.is_prepared() and allocator.environment() == wanted


STARTED = """
import json, os, sys
from pathlib import Path
from distfl.allocator import restart_prepared
with open(sys.argv[1], "a") as file:
    file.write(json.dumps([os.getpid(), sys.orig_argv, sys.argv, dict(os.environ), sys.flags.utf8_mode]) + chr(10))
restart_prepared()
"""


def starts(tmp_path: Path, environment: dict[str, str], how: list[str]) -> tuple[int, list[list]]:
    """The process that was started, and what it saw each time it began."""
    script, log = tmp_path / "started.py", tmp_path / "log"
    script.write_text(STARTED)
    program = {"script": [str(script)], "text": ["-c", STARTED], "module": ["-m", "started"]}[how[-1]]
    path = os.pathsep.join([str(tmp_path), str(Path(allocator.__file__).parents[1])])
    command = [sys.executable, *how[:-1], *program, str(log), "two words", "", "--x=*"]
    process = subprocess.Popen(command, env=environment | {"PYTHONPATH": path})
    assert process.wait(60) == 0
    return process.pid, [json.loads(line) for line in log.read_text().splitlines()]


@needs_linux
@pytest.mark.parametrize("how", [["script"], ["text"], ["-X", "utf8", "-W", "error", "module"]], ids=lambda how: how[-1])
def test_a_process_restarts_once_as_itself(how, tmp_path):
    process, (first, second) = starts(tmp_path, clean() | {"GLIBC_TUNABLES": "glibc.malloc.check=0"}, how)
    assert first[0] == second[0] == process
    assert first[1:3] == second[1:3]  # interpreter options and arguments
    assert first[2][1:] == [str(tmp_path / "log"), "two words", "", "--x=*"]
    assert first[4] == second[4] == ("utf8" in how)
    changed = {name: value for name, value in second[3].items() if first[3].get(name) != value}
    assert changed == allocator.environment() | {"GLIBC_TUNABLES": f"glibc.malloc.check=0:{OWN}"}
    assert first[3].keys() <= second[3].keys()


@needs_linux
def test_a_prepared_process_does_not_restart(tmp_path):
    assert len(starts(tmp_path, clean() | allocator.environment(), ["script"])[1]) == 1


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_nothing_is_restarted(platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "execv", lambda *arguments: pytest.fail("restarted"))
    for name in allocator.environment():
        monkeypatch.delenv(name, raising=False)
    allocator.restart_prepared()
    assert not allocator.is_prepared()


# --- one heap ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, int]]:
    """What is asked of mallopt."""
    asked = []
    monkeypatch.setattr(allocator, "_function", lambda name: (lambda *arguments: asked.append(arguments)) if name == "mallopt" else None)
    return asked


def prepare(monkeypatch, prepared: bool) -> None:
    for name, value in allocator.environment().items():
        monkeypatch.setenv(name, value) if prepared else monkeypatch.delenv(name, raising=False)


def test_without_preparation_one_heap_changes_nothing(calls, monkeypatch):
    prepare(monkeypatch, False)
    with allocator.one_heap():
        pass
    assert calls == []


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
INSIDE, AFTER = {(M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)}, {(M_MMAP_MAX, 65536), (M_TRIM_THRESHOLD, 32768)}


def test_one_heap_is_left_again_also_where_the_client_fails(calls, monkeypatch):
    prepare(monkeypatch, True)
    with pytest.raises(MemoryError), allocator.one_heap():
        assert set(calls) == INSIDE
        calls.clear()
        raise MemoryError
    assert set(calls) == AFTER


def test_other_c_libraries_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(allocator, "_function", lambda name: None)
    prepare(monkeypatch, True)
    allocator.exact_allocator()
    allocator.trim_heap()
    with allocator.one_heap():
        assert allocator.free_heap_bytes() == 0


# --- resident memory ---------------------------------------------------------------------------------------------------------------

SPEC = ModelSpec(depth=6, width=128, heads=4, context=128, vocabulary=2048)
CONFIG = TrainingConfig(batch=8, steps=2, clip_norm=None)
CASES = {
    f"{blocks} blocks, {recipe.describe(8)}": (Window(SPEC.depth + 1 - blocks, SPEC.depth + 2), recipe)
    for blocks in (1, 3, 6)
    for recipe in (Recipe(8, 128), Recipe(2, 128), Recipe(8, 128, blocks))
}
MORE_STEPS = 3
MEASURED = """
import json, resource, sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from distfl.allocator import collect_garbage, exact_allocator, is_prepared
from distfl.caps.base import Outcome
from distfl.caps.rlimit import Report
import test_allocator as cases
exact_allocator()
def peak_of(case):
    work = cases.client(cases.SPEC, cases.CONFIG, *case)
    bytes_ = Report().run(10**9, lambda: work() or Outcome([], {})).peak_bytes
    collect_garbage()
    return bytes_
def faults_of(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cases.client(cases.SPEC, replace(cases.CONFIG, steps=steps), *cases.CASES["3 blocks, loss by 128 tokens"])()
    collect_garbage()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
peak_of((cases.Window(6, 8), cases.Recipe(1, 128)))  # what is made at the first use belongs to the baseline
peaks = {name: peak_of(case) for name, case in cases.CASES.items()}
json.dump([is_prepared(), peaks, faults_of(2), faults_of(2 + cases.MORE_STEPS)], sys.stdout)
"""


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, int], int, int]:
    """Bytes of resident memory that each case took at its peak, one after another in a prepared process; then page faults of
    two steps and of more."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(allocator.__file__).parents[1])])
    environment = clean() | allocator.environment() | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", MEASURED], env=environment, stdout=subprocess.PIPE, check=True, timeout=200)
    prepared, *figures = json.loads(done.stdout)
    assert prepared
    return tuple(figures)


@needs_linux
@needs_glibc
@pytest.mark.parametrize("case", CASES)
def test_resident_memory_follows_the_tensors_that_are_alive(case, measured):
    with LiveBytes() as live:
        client(SPEC, CONFIG, *CASES[case])()
    assert 0.98 <= measured[0][case] / live.peak <= 1.10


@needs_linux
@needs_glibc
def test_a_page_is_faulted_once_for_all_steps(measured):
    # the step's activations, gradients and logits are some 35 MB, 9000 pages of 4 KiB, anew in every step if they were mapped one by one
    few, more = measured[1:]
    assert few > 5000  # the first steps fault what they need
    assert (more - few) / MORE_STEPS < 500


REFUSED = """
import ctypes, resource, sys, threading
from distfl.allocator import exact_allocator, fresh_heap, one_heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.sbrk.restype = ctypes.c_void_p, [ctypes.c_size_t], ctypes.c_void_p
exact_allocator()
done = threading.Event()
other = threading.Thread(target=lambda: libc.malloc(1000) and done.wait())
other.start()
limits = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (2**28, limits[1]))
assert libc.malloc(2**29) is None
resource.setrlimit(resource.RLIMIT_DATA, limits)
with fresh_heap(), one_heap():
    before = libc.sbrk(0)
    assert libc.malloc(2**23)
    sys.stdout.write(str(libc.sbrk(0) - before))
done.set()
"""


@needs_linux
@needs_glibc
def test_a_refused_allocation_does_not_move_a_thread_to_another_heap():
    environment = clean() | allocator.environment() | {"PYTHONPATH": str(Path(allocator.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert int(done.stdout) >= 2**23 - 2**20  # the one heap has grown for it


EATEN = """
import ctypes, sys
from distfl.allocator import exact_allocator, fresh_heap, one_heap, renew_room
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.aligned_alloc.restype, libc.aligned_alloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t, ctypes.c_size_t]
libc.sbrk.restype = ctypes.c_void_p
exact_allocator()
SIZES, LARGE = (24, 40), 2**18
for size in SIZES:
    for _ in range(20_000):
        libc.malloc(size)
if "renewed" in sys.argv:
    renew_room()
with fresh_heap(), one_heap():
    tensors = []
    for _ in range(50):
        tensors.append(libc.aligned_alloc(64, LARGE))
        for size in SIZES:
            libc.malloc(size)
    full = libc.sbrk(0)
    for tensor in tensors:
        libc.free(tensor)
    libc.malloc(50 * LARGE - 2**16)
    sys.stdout.write(str(libc.sbrk(0) - full))
"""


@needs_linux
@needs_glibc
def test_small_blocks_stay_out_of_the_tensors_heap_though_their_room_was_used_before():
    environment = clean() | allocator.environment() | {"PYTHONPATH": str(Path(allocator.__file__).parents[1])}
    grown = [
        int(subprocess.run([sys.executable, "-c", EATEN, *words], env=environment, capture_output=True, check=True, timeout=60).stdout)
        for words in ([], ["renewed"])
    ]
    assert grown[0] > 10 * 2**20 and grown[1] == 0
