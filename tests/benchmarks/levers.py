"""How many blocks does a budget buy, and at what time per step?  python tests/benchmarks/levers.py

At equal budgets: the widest window with levers off and on, twice the blocks of the former with levers on, and the CPU
time of a step of each, in alternating runs.
"""

import math
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from edge import MARGIN, OFF, plan  # restarts this process prepared

import torch  # noqa: E402  isort:skip

from distfl.allocator import exact_allocator  # noqa: E402
from distfl.calibration import Case, hosted, rank_of  # noqa: E402
from distfl.caps.rlimit import Rlimit  # noqa: E402
from distfl.config import LeversConfig  # noqa: E402
from distfl.costs import Costs  # noqa: E402
from distfl.fleet import MEGA  # noqa: E402
from distfl.hosting import rehearse  # noqa: E402
from distfl.model import ModelSpec  # noqa: E402
from distfl.recipes import Recipe  # noqa: E402
from distfl.units import UnitTable  # noqa: E402

RUNS = 3
STEPS = 4


def step_seconds(spec: ModelSpec, blocks: int, recipe, budget: int) -> float:
    """CPU seconds of a step: the difference of a long and a short run under the cap, so that start and end fall out."""
    case = Case(spec, 16, "adamw", True, blocks, recipe, mapped_prefix=True)
    used = []
    with TemporaryDirectory() as folder:
        for steps in (STEPS, 2 * STEPS):
            state = rank_of(case, Path(folder), steps)
            rehearse(state)
            began = time.process_time()
            report = hosted(state, case, Rlimit(), budget)
            used.append(time.process_time() - began)
            assert report.ok, report.reason
    return (used[1] - used[0]) / STEPS


def widths_and_budgets():
    """Round budgets, and the smallest that trains three blocks plainly."""
    for width in (128, 256):
        spec = ModelSpec(12, width, width // 32, 128, 2048)
        costs = Costs(UnitTable(spec), 16, 2, MARGIN)
        three = costs.peak(costs.table.suffix(3), Recipe(16)).bytes / MEGA
        yield from ((spec, budget) for budget in (48, 64, 96, math.ceil(three), 128))


def main() -> None:
    torch.set_num_threads(1)
    exact_allocator()
    print(f"{'width':>5} {'budget MB':>9} {'levers':>7} {'blocks':>6} {'ms/step':>8} {'time':>6}  how")
    for spec, budget in widths_and_budgets():
        plans = {"off": plan(spec, OFF, budget * MEGA), "widest": plan(spec, LeversConfig(), budget * MEGA)}
        if plans["off"] and plans["widest"][0] > 2 * plans["off"][0]:
            plans["twice"] = plan(spec, LeversConfig(), budget * MEGA, 2 * plans["off"][0])
        plans = {name: found for name, found in plans.items() if found}
        seconds = {name: [] for name in plans}
        for _ in range(RUNS):
            for name, (blocks, recipe) in plans.items():
                seconds[name].append(step_seconds(spec, blocks, recipe, budget * MEGA))
        for name in plans:
            blocks, recipe = plans[name]
            median = statistics.median(seconds[name])
            ratio = f"{median / statistics.median(seconds['off']):6.2f}" if "off" in seconds else "     -"
            print(f"{spec.width:5} {budget:9} {name:>7} {blocks:6} {1000 * median:8.0f} {ratio}  {recipe.describe(16)}", flush=True)


if __name__ == "__main__":
    main()
