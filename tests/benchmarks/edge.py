"""Does the planner's window fit, and does one block more hit the cap?  python tests/benchmarks/edge.py [rlimit|cgroup-v1|...] [pairs]

For every (model, budget) pair the planner's widest window is trained under the real cap, then the same with one
block more and the same levers. Prints a line per pair and the totals.
"""

import itertools
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from distfl.allocator import restart_prepared

restart_prepared()

import torch  # noqa: E402

from distfl.allocator import exact_allocator  # noqa: E402
from distfl.calibration import Case, hosted, rank_of  # noqa: E402
from distfl.caps.choice import make_cap  # noqa: E402
from distfl.config import LeversConfig, MemoryConfig, TrainingConfig  # noqa: E402
from distfl.costs import Cost, Costs  # noqa: E402
from distfl.fleet import MEGA, Budget  # noqa: E402
from distfl.hosting import rehearse  # noqa: E402
from distfl.model import ModelSpec  # noqa: E402
from distfl.planner import cheapest, fits  # noqa: E402
from distfl.recipes import Recipe, candidates  # noqa: E402
from distfl.units import UnitTable  # noqa: E402

OFF = LeversConfig("off", "off", "off", "off")
MODELS = [ModelSpec(depth, width, width // 32, 128, 2048) for depth in (6, 12) for width in (128, 256)]
MARGIN = round(MemoryConfig().margin_mb * MEGA)


def plan(spec: ModelSpec, levers: LeversConfig, budget_bytes: int, most_blocks: int | None = None) -> tuple[int, Recipe] | None:
    """Widest window that fits, and how."""
    costs, budget = Costs(UnitTable(spec), 16, 2, MARGIN), Budget(budget_bytes, None, None)
    for blocks in range(most_blocks or spec.depth, 0, -1):
        window = costs.table.suffix(blocks)
        cost = cheapest((Cost(costs.peak(window, r), 0, 0, r) for r in candidates(levers, TrainingConfig(steps=1), 16, blocks)), budget)
        if fits(cost, budget):
            return blocks, cost.recipe
    return None


def pairs():
    """Budgets in whole MB, spread over what each model can use up to all blocks but one."""
    for spec, levers in itertools.product(MODELS, (LeversConfig(), OFF)):
        costs = Costs(UnitTable(spec), 16, 2, MARGIN)
        lean = Recipe(16) if levers is OFF else Recipe(1, None, 0)
        low, high = (costs.peak(costs.table.suffix(blocks), lean).bytes for blocks in (1, spec.depth - 1))
        for part in range(6):
            budget = round((low + (high - low) * (part + 0.3) / 6) / MEGA) * MEGA
            found = plan(spec, levers, budget)
            if found and found[0] < spec.depth:
                yield spec, levers, budget


def main() -> None:
    mechanism, count = (sys.argv[1:] + ["rlimit"])[0], int((sys.argv[2:] + ["40"])[0])
    torch.set_num_threads(1)
    exact_allocator()
    chosen = list(pairs())
    chosen = chosen[:: max(1, len(chosen) // count)][:count]
    trained = hit = 0
    for spec, levers, budget in chosen:
        blocks, recipe = plan(spec, levers, budget)
        results = []
        for more in (0, 1):
            case = Case(spec, 16, "adamw", True, blocks + more, recipe, mapped_prefix=True)
            with TemporaryDirectory() as folder:
                state = rank_of(case, Path(folder))
                cap = make_cap(mechanism)
                cap.prove(budget)
                rehearse(state) if cap.in_this_process else None
                results.append(hosted(state, case, cap, budget))
        trained, hit = trained + results[0].ok, hit + (results[1].cause == "over_cap")
        print(
            f"depth {spec.depth:2} width {spec.width} budget {budget / MEGA:7.2f} MB: {blocks:2} blocks "
            f"{'train' if results[0].ok else 'FAIL '} at {results[0].measured_peak_bytes / MEGA:7.2f}, {blocks + 1:2} "
            f"{'hit the cap' if results[1].cause == 'over_cap' else 'ALSO TRAIN '} ({recipe.describe(16)})",
            flush=True,
        )
    print(f"{mechanism}: {len(chosen)} pairs, planned window trains in {trained}, one block more hits the cap in {hit}")


if __name__ == "__main__":
    main()
