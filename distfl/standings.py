"""What a comparison found: means and deviations over seeds, differences to the reference paired by seed, tables, pictures.

Every number comes from run folders.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from distfl.comparison import Comparison, Trial
from distfl.files import write_atomically
from distfl.fleet import MEGA
from distfl.reporting import Run

QUADRATURE_POINTS = 20_001


@dataclass(frozen=True)
class Result:
    """One finished run.

    Args:
        accuracy, loss: of the last evaluation, on all clients' held-out text.
        before: accuracy before any training.
        peak_share: largest measured peak over cap of all client rounds.
        slack_share: part of its cap that a client that took part left unused, mean over client rounds.
        part_share: part of the clients whose budgets let them take part.
        over_cap: client rounds that ran into their cap.
        upload_bytes, download_bytes, flops: of all clients and rounds; the first distribution of the model is in neither.
        lowest_group, group_gap: accuracy of the budget group that is worst off, and how far it lies below the best.
        torch, library, enforced_by, tokens_checksum, weights_checksum: of its manifest; where it was resumed, of its last start.
    """

    scenario: str
    method: str
    seed: int
    learning_rate: float
    depth: int
    blocks: str
    accuracy: float
    before: float
    loss: float
    peak_share: float | None
    slack_share: float | None
    part_share: float
    over_cap: int
    upload_bytes: int
    download_bytes: int
    flops: int
    seconds: float
    lowest_group: float
    group_gap: float
    torch: str
    library: str
    enforced_by: str
    tokens_checksum: str
    weights_checksum: str
    folder: str


def result_of(trial: Trial, run: Run) -> Result:
    """What one run showed."""
    last = run.evaluated[-1]
    took_part = [report for report in run.clients if report["blocks"] or report["ok"]]
    shares = [report["measured_peak_bytes"] / report["memory_bytes"] for report in took_part]
    blocks = sorted({report["blocks"] for report in took_part})
    start = run.manifest["starts"][-1]
    groups = [score["accuracy"] for score in last["groups"].values() if score["accuracy"] is not None]
    return Result(
        scenario=trial.scenario,
        method=trial.contender,
        seed=trial.seed,
        learning_rate=run.config.training.learning_rate,
        depth=run.manifest["depth"],
        blocks="-".join(map(str, sorted({blocks[0], blocks[-1]}))) if blocks else "-",
        accuracy=last["test_accuracy"],
        before=run.evaluated[0]["test_accuracy"],
        loss=last["test_loss"],
        peak_share=max(shares, default=None),
        slack_share=1 - statistics.mean(shares) if shares else None,
        part_share=run.manifest["able"] / len(run.manifest["groups"]),
        over_cap=sum(report["cause"] == "over_cap" for report in run.clients),
        upload_bytes=sum(record["upload_bytes"] for record in run.rounds),
        download_bytes=sum(record["download_bytes"] for record in run.rounds),
        flops=sum(record["flops"] for record in run.rounds),
        seconds=sum(record["seconds"] for record in run.rounds),
        lowest_group=min(groups),
        group_gap=max(groups) - min(groups),
        torch=start["torch"],
        library=start["library"],
        enforced_by=start["memory_enforced_by"],
        tokens_checksum=run.manifest["tokens_checksum"],
        weights_checksum=run.manifest["weights_checksum"],
        folder=str(trial.folder),
    )


@dataclass(frozen=True)
class Differences:
    """A figure less the reference's with the same seed, for the seeds that both have finished."""

    values: tuple[float, ...]

    @property
    def p_value(self) -> float | None:
        """Two-sided, of a paired t-test; None with fewer than two pairs."""
        if len(self.values) < 2:
            return None
        mean, deviation = statistics.mean(self.values), statistics.stdev(self.values)
        if deviation == 0:
            return 1.0 if mean == 0 else 0.0
        return two_sided_p(mean / (deviation / math.sqrt(len(self.values))), len(self.values) - 1)

    def cells(self, scale: float, digits: int) -> list[str]:
        """Mean and sample deviation, then p; empty where there is nothing to say."""
        if not self.values:
            return ["", ""]
        spread = f" ± {scale * statistics.stdev(self.values):.{digits}f}" if len(self.values) > 1 else ""
        p = "" if self.p_value is None else f"{self.p_value:.3f}"
        return [f"{scale * statistics.mean(self.values):+.{digits}f}{spread}", p]


@dataclass(frozen=True)
class Standing:
    """One method in one scenario.

    Args:
        results: of its finished runs, by seed.
        refusal: why it cannot take part; None where it can.
        accuracy_above, loss_above: the reference's; below 0 is worse in accuracy, better in loss.
    """

    scenario: str
    method: str
    results: tuple[Result, ...]
    refusal: str | None
    accuracy_above: Differences
    loss_above: Differences

    def mean(self, key: str) -> float | None:
        """Over seeds; None where nothing is known."""
        known = [getattr(result, key) for result in self.results if getattr(result, key) is not None]
        return statistics.mean(known) if known else None

    def deviation(self, key: str) -> float | None:
        """Sample standard deviation over seeds; None with fewer than two."""
        known = [getattr(result, key) for result in self.results]
        return statistics.stdev(known) if len(known) > 1 else None


def two_sided_p(t: float, freedom: int) -> float:
    """Probability of a Student t at least as far from 0: with t = sqrt(freedom) tan(angle) its density is cos(angle)^(freedom - 1)."""
    angles = np.linspace(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2, QUADRATURE_POINTS)
    everything = np.linspace(0, math.pi / 2, QUADRATURE_POINTS)
    return float(np.trapezoid(np.cos(angles) ** (freedom - 1), angles) / np.trapezoid(np.cos(everything) ** (freedom - 1), everything))


def standings(comparison: Comparison) -> list[Standing]:
    """All methods in all scenarios, in the order of the config, as far as their runs are finished.

    Raises:
        CheckpointError: learning rates are not tuned yet, or a folder holds another run.
    """
    found: dict[tuple[str, str], list[Result]] = {}
    refusals: dict[tuple[str, str], str] = {}
    trials = comparison.trials()
    for trial in trials:
        place = (trial.scenario, trial.contender)
        of_place = found.setdefault(place, [])
        if trial.refusal:
            refusals[place] = trial.refusal
        elif (run := trial.run()) is not None:
            of_place.append(result_of(trial, run))
    made = []
    for place, results in found.items():
        reference = found[place[0], comparison.config.reference]
        above = (_above(results, reference, key) for key in ("accuracy", "loss"))
        made.append(Standing(*place, tuple(results), refusals.get(place), *above))
    return made


def _above(results: Sequence[Result], reference: Sequence[Result], key: str) -> Differences:
    by_seed = {result.seed: getattr(result, key) for result in reference}
    return Differences(tuple(getattr(result, key) - by_seed[result.seed] for result in results if result.seed in by_seed))


# --- tables ----------------------------------------------------------------------------------

HEAD = (
    "method",
    "accuracy",
    "to reference",
    "p",
    "loss",
    "to reference",
    "p",
    "depth: blocks",
    "peak/cap",
    "slack",
    "took part",
    "over cap",
    "up MB",
    "down MB",
    "TFLOP",
    "lowest group",
    "gap",
    "rate",
    "s",
)


def markdown(found: Sequence[Standing], reference: str) -> str:
    """A table for each scenario: means over seeds, sample deviations behind the plus-minus sign."""
    parts = []
    for scenario in dict.fromkeys(standing.scenario for standing in found):
        rows = [_row(standing, reference) for standing in found if standing.scenario == scenario]
        lines = [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)]
        parts.append("\n".join([f"### {scenario}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _row(standing: Standing, reference: str) -> list[str]:
    if standing.refusal:
        return [standing.method, f"cannot take part: {standing.refusal}", *[""] * (len(HEAD) - 2)]
    if not standing.results:
        return [standing.method, "no finished run yet", *[""] * (len(HEAD) - 2)]
    mean, first = standing.mean, standing.results[0]
    same = standing.method == reference
    return [
        standing.method,
        _percent(mean("accuracy"), standing.deviation("accuracy")),
        *(["", ""] if same else standing.accuracy_above.cells(100, 2)),
        f"{mean('loss'):.4f}",
        *(["", ""] if same else standing.loss_above.cells(1, 4)),
        f"{first.depth}: {first.blocks}",
        _percent(max((r.peak_share for r in standing.results if r.peak_share is not None), default=None)),
        _percent(mean("slack_share")),
        _percent(mean("part_share")),
        str(sum(result.over_cap for result in standing.results)),
        f"{mean('upload_bytes') / MEGA:.1f}",
        f"{mean('download_bytes') / MEGA:.1f}",
        f"{mean('flops') / 1e12:.2f}",
        _percent(mean("lowest_group")),
        _percent(mean("group_gap")),
        f"{first.learning_rate:g}",
        f"{mean('seconds'):.0f}",
    ]


def _percent(share: float | None, deviation: float | None = None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


def comma_separated(found: Sequence[Standing]) -> str:
    """Every finished run, a line each."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) for standing in found for result in standing.results)
    return lines.getvalue()


def write(comparison: Comparison, found: Sequence[Standing]) -> list[Path]:
    """comparison.md and comparison.csv; returns their paths."""
    text = "Accuracies, peaks over caps, slack and shares in percent; bytes and FLOPs of all clients and rounds; mean of "
    counts = sorted({len(standing.results) for standing in found if standing.results})
    text += f"{' to '.join(map(str, dict.fromkeys(counts[:1] + counts[-1:])))} seeds ± sample deviation; "
    text += f'"to reference": less {comparison.config.reference} with the same seed; p: of a paired t-test.\n\n'
    write_atomically(comparison.output / "comparison.md", text + markdown(found, comparison.config.reference))
    write_atomically(comparison.output / "comparison.csv", comma_separated(found))
    return [comparison.output / "comparison.md", comparison.output / "comparison.csv"]
