"""The C library's allocator, set so that what a process holds follows what is alive.

glibc's defaults waste up to a third of a small budget and cost page faults where they do not. These settings
together leave nearly nothing of either (``tests/benchmarks/allocator.py`` measures it):

* long-lived tensors (weights, optimiser state, gradients that add up) are mapped one by one, so that they go
  wholly when they are freed;
* inside a step everything comes from one heap that is kept until the client ends: no page is faulted twice, and
  the next tensor takes the hole that the last one left;
* small blocks have a place of their own, filled with free blocks of every small size: one of them between two
  tensors, left there for a moment too long, makes a hole that nothing fits into;
* one heap needs freed slivers to merge with their neighbours at once: an aligned allocation leaves one on each
  side, and as long as the thread cache or a fast bin holds it, a hole of a tensor's own size is too small for it;
* what libraries keep (MKL's buffers for packed matrices) must not lie in the middle of that heap: it is made before,
  in the rehearsal, at its full size. Under a cap it could not be had safely either: MKL, refused its buffer, takes
  another way without a word, whose sums round differently.

All threads share that one heap. With more than one, glibc hands a thread whose allocation was refused over to another
heap for good, and those come in pieces of 64 MB.

The thread cache and further heaps can only be turned off when a process starts (``environment``).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

MAPPED_FROM_BYTES = 32 * 1024
SMALLEST_PLUG_BYTES = 64 * 1024
ROOM_BYTES = 96 * 1024  # for small blocks of each size
SLIVERS = {32: 1024, 48: 256, 64: 256, 80: 256}  # sizes of what is left free beside an aligned tensor: blocks that a client needs
SPARED_BYTES = 2**20  # for other threads, while the holes are looked for
LARGE_PAGE_BYTES = 2 * 2**20
LARGE_PAGES_FROM_BYTES = 16 * 2**20  # their rounding would show in a smaller client's peak
_MADV_HUGEPAGE = 14  # linux/mman.h
MOST_PLUGGED_BYTES = 2**30  # beyond this much of holes they are used rather than passed over
TUNABLES = ("glibc.malloc.tcache_count=0", "glibc.malloc.arena_max=1")

_M_MXFAST, _M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = 1, -1, -2, -3, -4  # glibc's malloc.h
_HEADER_BYTES = 8
# glibc keeps a list for each size up to 1 KB, and ranges of sizes above
_SMALL_SIZES = [*range(32, 1024, 16), *(2**power // 4 * quarter + 16 for power in range(10, 16) for quarter in range(4, 8))]
_NEVER_TRIM, _MAPPINGS = 2**31 - 1, 65536


def environment() -> dict[str, str]:
    """What a process must find in its environment when it starts."""
    own = [tunable for tunable in os.environ.get("GLIBC_TUNABLES", "").split(":") if tunable and tunable not in TUNABLES]
    threads = os.environ.get("DISTFL_THREADS", "1")
    return {"GLIBC_TUNABLES": ":".join([*own, *TUNABLES]), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def is_prepared() -> bool:
    """Whether this process started with that environment."""
    return all(os.environ.get(name) == value for name, value in environment().items())


def restart_prepared() -> None:
    """Replace this process by itself with the environment set; returns where it is already, or where glibc does not rule.

    To be called before anything is imported that is slow, and before MPI starts.
    """
    if not is_prepared() and sys.platform.startswith("linux"):
        os.environ.update(environment())
        os.execv(sys.executable, sys.orig_argv)


@cache
def exact_allocator() -> None:
    """Map large blocks one by one, merge freed small ones at once, and give small ones a place of their own; once
    for the process. Other C libraries are left as they are."""
    if (mallopt := _function("mallopt")) is None:
        return
    mallopt(_M_TOP_PAD, 0)  # else the heap grows ahead of need, and large blocks are cut from that
    mallopt(_M_MXFAST, 0)
    mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
    mallopt(_M_TRIM_THRESHOLD, MAPPED_FROM_BYTES)
    _make_room_for_small_blocks({size: max(4, ROOM_BYTES // size) for size in _SMALL_SIZES})


def renew_room() -> None:
    """Make up for what MPI's start has taken for good of the room for the smallest blocks.

    Where no other block of such a size is left, one beside a tensor is taken, and the tensors' holes no longer merge. To be
    called once, when nothing but clients is still to come: every rank holds what is made here for itself.
    """
    if is_prepared() and _function("malloc") is not None:
        _make_room_for_small_blocks(SLIVERS)


def _make_room_for_small_blocks(counts: dict[int, int]) -> None:
    """Leave so many free blocks of these sizes in the heap, which never merge."""
    malloc, free = _malloc_and_free()
    blocks = []
    for size, count in counts.items():
        for _ in range(count):
            blocks.append(malloc(size - _HEADER_BYTES))
            malloc(1)  # stays
    for block in blocks:
        free(block)


def _malloc_and_free():
    malloc, free = _function("malloc"), _function("free")
    malloc.restype, malloc.argtypes, free.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], None, [ctypes.c_void_p]
    return malloc, free


def _heap_end() -> int:
    sbrk = _function("sbrk")
    sbrk.restype, sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    return sbrk(0)


@contextmanager
def fresh_heap() -> Iterator[None]:
    """Inside, the heap's larger holes are taken, so that what is made comes from its end, in one piece.

    Something small that a library made late in the step before may still lie far up in the heap; the room below
    it is never cut to the next step's measure.
    """
    trim_heap()
    plugs = []
    if is_prepared():
        malloc, free = _malloc_and_free()
        end, size, left = _heap_end(), MOST_PLUGGED_BYTES, MOST_PLUGGED_BYTES
        with _no_more_memory():
            while SMALLEST_PLUG_BYTES <= size <= left:
                plug = malloc(size)
                if plug and plug < end:
                    plugs.append(plug)
                    left -= size
                    continue
                if plug:  # no hole: the heap has grown for it, and what is spared is not for us
                    free(plug)
                size //= 2
        trim_heap()
    try:
        yield
    finally:
        for plug in plugs:
            free(plug)


@contextmanager
def _no_more_memory() -> Iterator[None]:
    """Inside, the C library finds next to nothing but what it has already."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    mallopt = _function("mallopt")
    with open("/proc/self/statm") as file:
        present = int(file.read().split()[5]) * resource.getpagesize()
    mallopt(_M_MMAP_MAX, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (present + SPARED_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        mallopt(_M_MMAP_MAX, _MAPPINGS)


@contextmanager
def one_heap(expected_bytes: int = 0) -> Iterator[None]:
    """Inside, everything comes from one heap that does not shrink; without the prepared environment nothing changes.

    Args:
        expected_bytes: that will surely be used of it. They come in large pages, where the system has some: one by one the small
            ones of a client take longer to be made than its smaller steps.
    """
    mallopt = _function("mallopt") if is_prepared() else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
    _large_pages(expected_bytes)
    try:
        yield
    finally:
        mallopt(_M_MMAP_MAX, _MAPPINGS)
        mallopt(_M_TRIM_THRESHOLD, MAPPED_FROM_BYTES)
        trim_heap()  # at once: what is made next and lives on must not lie at the far end of a large empty heap


def _large_pages(bytes_: int) -> None:
    """Let the next so many bytes of the heap be made in large pages; only whole ones, so that nothing more becomes resident."""
    if bytes_ < LARGE_PAGES_FROM_BYTES:
        return
    malloc, free = _malloc_and_free()
    if (start := malloc(bytes_)) is None:  # refused: its client will not get far
        return
    free(start)
    first, last = -(-start // LARGE_PAGE_BYTES), (start + bytes_) // LARGE_PAGE_BYTES
    if last > first and (madvise := _function("madvise")) is not None:
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(first * LARGE_PAGE_BYTES, (last - first) * LARGE_PAGE_BYTES, _MADV_HUGEPAGE)  # without them nothing is lost


def trim_heap() -> None:
    """Give freed heap pages back, so that a client cannot live on the slack of the one before it."""
    if (malloc_trim := _function("malloc_trim")) is not None:
        malloc_trim(0)


def collect_garbage() -> None:
    """Drop what a failed client's exception still referred to."""
    gc.collect()
    trim_heap()


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2: ten counters, the ninth is the free bytes inside the heap."""

    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(10)]


def free_heap_bytes() -> int:
    """Bytes of the heap that are mapped but free: allocations could take them unseen by any limit."""
    if (mallinfo2 := _function("mallinfo2")) is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    return mallinfo2().field8


@cache
def _function(name: str):
    """A function of the C library, or None where it has none of this name."""
    return getattr(ctypes.CDLL(None), name, None)
