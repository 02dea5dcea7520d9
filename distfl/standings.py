"""What a comparison found: means and deviations over seeds, differences to the reference paired by seed.

Every number comes from run folders, or from the table of them that an earlier report has written.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distfl.comparison import Comparison, Trial
from distfl.errors import CheckpointError
from distfl.fleet import MEGA
from distfl.reporting import Run

QUADRATURE_POINTS = 20_001
GIGA = 1e9


@dataclass(frozen=True)
class Result:
    """One finished run.

    Args:
        accuracy, loss: of the last evaluation, on all clients' held-out text.
        before: accuracy before any training.
        peak_share, upload_share, flops_share: largest of all client rounds over its cap; None where nobody has such a cap.
        slack_share: part of the cap it came closest to that a client that took part left unused, mean over client rounds.
        part_share: part of the clients whose budgets let them take part.
        over_cap: client rounds that ran into their cap.
        upload_bytes, download_bytes, flops: of all clients and rounds.
        first_download_bytes: the model that a client is sent when it takes part for the first time; not in download_bytes.
        lowest_group, group_gap: accuracy of the budget group that is worst off, and how far it lies below the best; None where all
            clients are of one group, and so are the next two.
        lowest_gain, gain_gap: the same of what groups gained over the pretrained model, whose accuracy differs between their texts.
        torch, library, enforced_by, tokens_checksum, weights_checksum, source_checksum: of its manifest; where it was resumed, of
            its last start.
        folder: of the run, seen from the comparison's output: tables are passed on, and say nothing of the machine they were made on.
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
    upload_share: float | None
    flops_share: float | None
    slack_share: float | None
    part_share: float
    over_cap: int
    upload_bytes: int
    download_bytes: int
    first_download_bytes: int
    flops: int
    seconds: float
    lowest_group: float | None
    group_gap: float | None
    lowest_gain: float | None
    gain_gap: float | None
    torch: str
    library: str
    enforced_by: str
    tokens_checksum: str
    weights_checksum: str
    source_checksum: str
    folder: str


def result_of(trial: Trial, run: Run, output: Path) -> Result:
    """What one run of the comparison in ``output`` showed."""
    first, last = run.evaluated[0], run.evaluated[-1]
    took_part = [report for report in run.clients if report["blocks"] or report["ok"]]
    used = [_used(run, report) for report in took_part]
    blocks = sorted({report["blocks"] for report in took_part})
    start = run.manifest["starts"][-1]
    scores = [
        (first["groups"][name]["accuracy"], score["accuracy"]) for name, score in last["groups"].items() if score["accuracy"] is not None
    ]
    after, gains, unlike = [end for _, end in scores], [end - begin for begin, end in scores], len(scores) > 1
    return Result(
        scenario=trial.scenario,
        method=trial.contender,
        seed=trial.seed,
        learning_rate=run.config.training.learning_rate,
        depth=run.manifest["depth"],
        blocks="-".join(map(str, sorted({blocks[0], blocks[-1]}))) if blocks else "-",
        accuracy=last["test_accuracy"],
        before=first["test_accuracy"],
        loss=last["test_loss"],
        **{f"{what}_share": max((shares[what] for shares in used if what in shares), default=None) for what in ("peak", "upload", "flops")},
        slack_share=1 - statistics.mean(max(shares.values()) for shares in used) if used else None,
        part_share=run.manifest["able"] / len(run.manifest["groups"]),
        over_cap=sum(report["cause"] == "over_cap" for report in run.clients),
        upload_bytes=sum(record["upload_bytes"] for record in run.rounds),
        download_bytes=sum(record["download_bytes"] for record in run.rounds),
        first_download_bytes=sum(record["first_download_bytes"] for record in run.rounds),
        flops=sum(record["flops"] for record in run.rounds),
        seconds=sum(record["seconds"] for record in run.rounds),
        lowest_group=min(after) if unlike else None,
        group_gap=max(after) - min(after) if unlike else None,
        lowest_gain=min(gains) if unlike else None,
        gain_gap=max(gains) - min(gains) if unlike else None,
        torch=start["torch"],
        library=start["library"],
        enforced_by=start["memory_enforced_by"],
        tokens_checksum=run.manifest["tokens_checksum"],
        weights_checksum=run.manifest["weights_checksum"],
        source_checksum=start["source_checksum"],
        folder=trial.folder.relative_to(output).as_posix(),
    )


def _used(run: Run, report: dict) -> dict[str, float]:
    """Parts of its caps that a client used in a round."""
    (group,) = (group for group in run.config.fleet.groups if group.name == report["group"])
    shares = {"peak": report["measured_peak_bytes"] / report["memory_bytes"]}
    if group.upload_mb is not None:
        shares["upload"] = report["upload_bytes"] / (group.upload_mb * MEGA)
    if group.gflops is not None:
        shares["flops"] = report["flops"] / (group.gflops * GIGA)
    return shares


@dataclass(frozen=True)
class Differences:
    """A figure less the reference's with the same seed, for the seeds that both have finished."""

    values: tuple[float, ...]

    @property
    def p_value(self) -> float | None:
        """Two-sided, of a paired t-test; None with fewer than two pairs, or where one is not finite."""
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            return None
        mean, deviation = statistics.mean(self.values), statistics.stdev(self.values)
        if deviation == 0:
            return 1.0 if mean == 0 else 0.0
        return two_sided_p(mean / (deviation / math.sqrt(len(self.values))), len(self.values) - 1)


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

    def largest(self, key: str) -> float | None:
        """Of all seeds; None where nothing is known."""
        return max((getattr(result, key) for result in self.results if getattr(result, key) is not None), default=None)

    def deviation(self, key: str) -> float | None:
        """Sample standard deviation over seeds; None with fewer than two."""
        known = [getattr(result, key) for result in self.results if getattr(result, key) is not None]
        return deviation(known) if len(known) > 1 else None


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; not a number where some value is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def two_sided_p(t: float, freedom: int) -> float:
    """Probability of a Student t at least as far from 0: with t = sqrt(freedom) tan(angle) its density is cos(angle)^(freedom - 1)."""
    angles = np.linspace(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2, QUADRATURE_POINTS)
    everything = np.linspace(0, math.pi / 2, QUADRATURE_POINTS)
    return float(np.trapezoid(np.cos(angles) ** (freedom - 1), angles) / np.trapezoid(np.cos(everything) ** (freedom - 1), everything))


def standings(comparison: Comparison) -> list[Standing]:
    """All methods in all scenarios, in the order of the config, as far as their runs are finished.

    Raises:
        CheckpointError: learning rates are not tuned yet, a folder holds another run, or runs that are compared had other data
            or other pretrained weights.
    """
    results, refusals = [], {}
    for trial in comparison.trials():
        if (run := trial.run()) is not None:
            results.append(result_of(trial, run, comparison.output))
        elif trial.refusal:
            refusals[trial.scenario, trial.contender] = trial.refusal
    return standings_of(comparison, results, refusals)


def standings_of(comparison: Comparison, results: Sequence[Result], refusals: Mapping[tuple[str, str], str] = {}) -> list[Standing]:
    """The same of results that are known already.

    Args:
        refusals: (scenario, method) -> why it cannot take part.

    Raises:
        CheckpointError: a result is not one of this comparison, is there twice, or had other data or other pretrained weights.
    """
    found: dict[tuple[str, str], dict[int, Result]] = {place: {} for place in comparison.places}
    for result in results:
        place = (result.scenario, result.method)
        if place not in found or result.seed not in comparison.config.seeds:
            change = "leave that one out, or name the config that it was made with"
            raise CheckpointError(_name(result), "the config has no such scenario, method there, or seed", change)
        if result.seed in found[place]:
            raise CheckpointError(_name(result), "a second result of it", "leave one of them out")
        found[place][result.seed] = result
    _check_alike(results)
    made = []
    for place, by_seed in found.items():
        of_place = tuple(by_seed[seed] for seed in comparison.config.seeds if seed in by_seed)
        reference = found[place[0], comparison.config.reference].values()
        above = (_above(of_place, reference, key) for key in ("accuracy", "loss"))
        made.append(Standing(*place, of_place, refusals.get(place), *above))
    return made


def _name(result: Result) -> str:
    return f"{result.method} in {result.scenario}, seed {result.seed}"


def _check_alike(results: Sequence[Result]) -> None:
    """That what is compared started from the same text and, at the same depth, from the same weights."""
    first: dict[tuple, Result] = {}
    for result in results:
        for key, place in (("tokens_checksum", ()), ("weights_checksum", (result.depth,))):
            other = first.setdefault((key, result.scenario, result.seed, *place), result)
            if getattr(result, key) != getattr(other, key):
                raise CheckpointError(
                    f"comparing {other.folder} with {result.folder}",
                    f"their manifests' {key} differ: they were made with other data or another family",
                    "leave one of them out, or make that run again",
                )


def _above(results: Sequence[Result], reference: Iterable[Result], key: str) -> Differences:
    by_seed = {result.seed: getattr(result, key) for result in reference}
    return Differences(tuple(getattr(result, key) - by_seed[result.seed] for result in results if result.seed in by_seed))
