"""What the C library's settings hold and cost.  python tests/benchmarks/allocator.py [blocks]

12 blocks of width 256, 2048 tokens per step, vocabulary 2048, AdamW, the last 3 blocks trained, loss in chunks, nothing
recomputed. Each setting in processes of its own, alternating: resident peak above baseline of six clients in a
row (a hole too small shows in some of them only), and CPU time of a step.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from distfl import allocator

RUNS, CLIENTS, STEPS = 3, 6, 4


def defaults() -> None:
    """What every Python process has."""
    allocator.exact_allocator = lambda: None


def mapped() -> None:
    """Large blocks mapped and unmapped one by one."""
    allocator._make_room_for_small_blocks = lambda counts: None


def heap() -> None:
    """One heap inside a step, all else as it comes."""
    allocator.exact_allocator = lambda: None
    allocator.is_prepared = lambda: True


def merged() -> None:
    """One heap, thread cache and fast bins off: freed slivers merge at once."""
    allocator._make_room_for_small_blocks = lambda counts: None


def room() -> None:
    """The same with a place of their own for small blocks: what distfl does."""


PREPARED = (merged, room)


def measure(setting: str, blocks: int) -> None:
    """In a process of its own; prints peaks and seconds."""
    globals()[setting]()
    import torch

    from distfl.calibration import Case, hosted, rank_of
    from distfl.caps.rlimit import Report
    from distfl.hosting import rehearse
    from distfl.model import ModelSpec
    from distfl.recipes import LOSS_CHUNK_TOKENS, Recipe

    torch.set_num_threads(1)
    allocator.exact_allocator()
    case = Case(ModelSpec(12, 256, 8, 128, 2048), 16, "adamw", True, blocks, Recipe(16, LOSS_CHUNK_TOKENS), mapped_prefix=True)

    def client(steps: int) -> tuple[int, float]:
        with TemporaryDirectory() as folder:
            state = rank_of(case, Path(folder), steps)
            rehearse(state)
            began = time.process_time()
            report = hosted(state, case, Report(), 10**12)
            return report.measured_peak_bytes, time.process_time() - began

    peaks = [client(1)[0] for _ in range(CLIENTS)]
    short, long = client(STEPS)[1], client(2 * STEPS)[1]
    print(json.dumps([peaks, (long - short) / STEPS]))


def main(blocks: int) -> None:
    found = {setting: [] for setting in (defaults, mapped, heap, merged, room)}
    for _ in range(RUNS):
        for setting, runs in found.items():
            environment = os.environ | allocator.environment()
            if setting not in PREPARED:
                del environment["GLIBC_TUNABLES"]
            command = [sys.executable, __file__, setting.__name__, str(blocks)]
            runs.append(json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout))
    print(f"{'MB, least to most':>18} {'ms/step':>8}  setting")
    for setting, runs in found.items():
        peaks = [peak / 1e6 for peaks, _ in runs for peak in peaks]
        seconds = statistics.median(seconds for _, seconds in runs)
        print(f"{min(peaks):8.1f} to {max(peaks):6.1f} {1000 * seconds:8.0f}  {setting.__doc__}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in globals():
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        main(int((sys.argv[1:] + ["3"])[0]))
