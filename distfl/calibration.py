"""``distfl calibrate``: clients of many shapes, windows and recipes are hosted here, and their peaks compared with the formulas.

The cases are a grid, or drawn at random. Each goes through the code of a round (``hosting.host``), on random weights
and tokens; nothing is enforced. What remains between formula and measurement is the allocator's and the
interpreter's, and is what ``memory.margin_mb`` is for.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from distfl import seeds
from distfl.caps.base import MemoryCap
from distfl.caps.rlimit import Report
from distfl.config import (
    FleetConfig,
    GroupConfig,
    LeversConfig,
    MemoryConfig,
    MethodConfig,
    RunConfig,
    TrainConfig,
    TrainingConfig,
    TransportConfig,
)
from distfl.errors import PlanError
from distfl.fleet import MEGA
from distfl.hosting import RankState, host, rank_state, rehearse
from distfl.messages import Assignment, ClientReport
from distfl.model import ModelSpec, initial_tensors
from distfl.recipes import LOSS_CHUNK_TOKENS, Recipe
from distfl.shards import TOKEN, Shard, ShardIndex
from distfl.transport.local import group

STEPS = 3
CODECS = ("exact", "bf16", "int8", "int4", "top_k")


@dataclass(frozen=True)
class Case:
    """One client: a model, how it trains, its window and recipe, the codec of its update, and the method (options as pairs)."""

    spec: ModelSpec
    batch: int
    optimizer: str
    clip: bool
    blocks: int
    recipe: Recipe
    mapped_prefix: bool
    codec: str = "exact"
    method: str = "caff"
    options: tuple[tuple[str, Any], ...] = ()
    detail: int = 0


@dataclass(frozen=True)
class Comparison:
    """One case's predicted peak (without margin) beside the measured one, in bytes above the baseline."""

    case: Case
    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """Prediction over measurement, less one: negative = too low."""
        return self.predicted_bytes / self.measured_bytes - 1


def grid() -> Iterator[Case]:
    """Shapes x windows x recipes; every lever alone and several together; and every codec where its moment is the fullest."""
    shapes = (
        ModelSpec(6, 128, 4, 128, 2048),
        ModelSpec(12, 128, 4, 128, 2048),
        ModelSpec(12, 256, 8, 128, 2048),
        ModelSpec(4, 192, 6, 64, 512),
    )
    for spec in shapes:
        windows = sorted({1, spec.depth // 3, spec.depth})
        for blocks, (batch, micro_batch) in itertools.product(windows, ((16, 16), (16, 4), (16, 1))):
            for chunk, recomputed in ((None, 0), (LOSS_CHUNK_TOKENS, 0), (LOSS_CHUNK_TOKENS, blocks), (LOSS_CHUNK_TOKENS, blocks // 2)):
                if recomputed or (chunk, blocks) != (LOSS_CHUNK_TOKENS, 1):
                    yield Case(spec, batch, "adamw", True, blocks, Recipe(micro_batch, chunk, recomputed), True)
        for blocks in windows:
            yield Case(spec, 8, "adamw", False, blocks, Recipe(8, LOSS_CHUNK_TOKENS, blocks, True), True)
            yield Case(spec, 8, "sgd", True, blocks, Recipe(2, LOSS_CHUNK_TOKENS), False)
    for width, vocabulary, micro_batch in itertools.product((128, 256), (8192, 50257), (4, 1)):
        yield Case(ModelSpec(2, width, 4, 128, vocabulary), 8, "adamw", True, 1, Recipe(micro_batch, LOSS_CHUNK_TOKENS), True)
    yield from sending()


def sending() -> Iterator[Case]:
    """Clients that hold most while they encode: no optimiser state, few tokens, gradients of one unit at a time."""
    for codec, spec in itertools.product(CODECS, (ModelSpec(12, 128, 4, 32, 256), ModelSpec(4, 256, 8, 32, 8192))):
        yield Case(spec, 1, "sgd", False, spec.depth, Recipe(1, None, spec.depth, True), True, codec)


def drawn(count: int, seed: int) -> Iterator[Case]:
    """Cases drawn at random: any shape of a tiny Transformer, any window and recipe."""
    draws, codecs = seeds.generator(seed, "calibration cases"), seeds.generator(seed, "codecs of calibration cases")

    def one_of(*values):
        return values[draws.integers(len(values))]

    for _ in range(count):
        heads, depth = draws.integers(3, 9), draws.integers(2, 13)
        spec = ModelSpec(int(depth), 32 * int(heads), int(heads), one_of(64, 96, 128), 256 * int(draws.integers(2, 17)))
        batch, blocks = one_of(4, 8, 12, 16), int(draws.integers(1, spec.depth + 1))
        micro_batch = min(batch, one_of(1, 2, 3, 4, 8, 16))
        recomputed = one_of(0, 0, blocks, int(draws.integers(0, blocks + 1)))
        fused = micro_batch == batch and one_of(True, False)
        recipe = Recipe(micro_batch, one_of(None, LOSS_CHUNK_TOKENS), recomputed, fused)
        optimizer, mapped_prefix, codec = one_of("adamw", "sgd"), one_of(True, False), CODECS[codecs.integers(len(CODECS))]
        yield Case(spec, batch, optimizer, not fused, blocks, recipe, mapped_prefix, codec)


def compare(case: Case, folder: Path) -> Comparison:
    """Host one case's client and measure it; its tokens lie in ``folder``."""
    state = rank_of(case, folder)
    rehearse(state)
    report = hosted(state, case, Report(), 10**12)
    if not report.ok:
        raise PlanError(f"calibration of {case}", report.reason, "calibrate where more memory is free")
    return Comparison(case, report.predicted_peak_bytes, report.measured_peak_bytes)


def hosted(state: RankState, case: Case, cap: MemoryCap, budget_bytes: int) -> ClientReport:
    """One round of the case's client under a cap."""
    window = state.method.window(state.table, case.blocks)
    detail = state.method.details(case.spec, window)[case.detail]
    predicted = state.method.held(state.costs, detail).peak(window, case.recipe).bytes
    return host(state, cap, Assignment(1, 0, window, 1.0, budget_bytes, predicted, 0, 0, case.recipe, learning_rate=1e-3, detail=detail))[1]


def rank_of(case: Case, folder: Path, steps: int = STEPS) -> RankState:
    """A rank that can host the case's client, with random weights, and tokens in ``folder``."""
    config = TrainConfig(
        FleetConfig((GroupConfig("all", 1e6, share=1.0),)),
        TrainingConfig(batch=case.batch, steps=steps, optimizer=case.optimizer, clip_norm=1.0 if case.clip else None),
        memory=MemoryConfig("report", margin_mb=0),
        levers=LeversConfig(
            loss_chunks="auto" if case.recipe.loss_chunk else "off",
            mapped_prefix="on" if case.mapped_prefix else "off",
            prefix_features="off",
        ),
        transport=TransportConfig(codec=case.codec),
        method=MethodConfig(case.method, dict(case.options)),
        run=RunConfig(str(folder)),
    )
    count = 4 * case.batch * case.spec.context + 1
    seeds.generator(1, "calibration").integers(0, case.spec.vocabulary, count).astype(TOKEN).tofile(folder / "tokens.bin")
    state = rank_state(group(1)[0], config, case.spec, ShardIndex(str(folder), "", (Shard("client", 0, count, 0),)))
    state.replica.fill(state.method.initial(initial_tensors(case.spec, torch.Generator().manual_seed(1)), seed=1))
    return state


def calibrate(cases: Iterable[Case], output: Path, show: Callable[[str], None]) -> list[Comparison]:
    """Compare these cases; writes ``calibration.jsonl`` and ``calibration.png`` into ``output`` and shows a line per case."""
    output.mkdir(parents=True, exist_ok=True)
    found = []
    with TemporaryDirectory() as folder, open(output / "calibration.jsonl", "w") as file:
        for case in cases:
            found.append(compare(case, Path(folder)))
            show(line(found[-1]))
            file.write(json.dumps(asdict(found[-1]) | {"error": found[-1].error}) + "\n")
    return found


def picture(found: list[Comparison], path: Path) -> Path:
    """Predicted over measured peaks, and the errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = np.array([comparison.measured_bytes for comparison in found]) / MEGA
    predicted = np.array([comparison.predicted_bytes for comparison in found]) / MEGA
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    left.loglog(measured, predicted, ".", alpha=0.6)
    ends = [measured.min(), measured.max()]
    left.plot(ends, ends, "k-", linewidth=0.7)
    left.set(xlabel="measured peak, MB", ylabel="predicted peak without margin, MB")
    right.axhline(0, color="k", linewidth=0.7)
    right.semilogx(measured, 100 * (predicted / measured - 1), ".", alpha=0.6)
    right.set(xlabel="measured peak, MB", ylabel="error of the prediction, %")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def line(found: Comparison) -> str:
    """One comparison as text."""
    case = found.case
    spec = case.spec
    return (
        f"{_named(case)} depth {spec.depth:2} width {spec.width} T {spec.context} V {spec.vocabulary} "
        f"{case.optimizer} {case.codec} batch {case.batch} "
        f"blocks {case.blocks:2}: predicted {found.predicted_bytes / MEGA:7.2f} measured {found.measured_bytes / MEGA:7.2f} MB "
        f"{100 * found.error:+5.1f} %  {case.recipe.describe(case.batch, spec.context)}"
    )


def _named(case: Case) -> str:
    return " ".join([case.method, *(f"{key}={value}" for key, value in case.options)])


def verdict(found: list[Comparison]) -> str:
    """The errors in a few lines, and the margin that would have covered every case."""
    errors = np.array([comparison.error for comparison in found])
    short = max(comparison.measured_bytes - comparison.predicted_bytes for comparison in found) / MEGA
    return (
        f"{len(found)} cases: median error {100 * np.median(abs(errors)):.2f} %, within 5 %: {100 * np.mean(abs(errors) <= 0.05):.0f} %, "
        f"lowest {100 * errors.min():+.1f} %, highest {100 * errors.max():+.1f} %\n"
        f"largest shortfall {max(0.0, short):.2f} MB: memory.margin_mb={math.ceil(max(0.0, short) * 10) / 10} covers all of them"
    )
