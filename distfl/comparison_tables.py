"""Tables of a comparison: Markdown, a row for each method in each scenario, and CSV, a line for each run."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

from distfl.comparison import Comparison, label
from distfl.errors import ConfigError
from distfl.files import write_atomically
from distfl.fleet import MEGA
from distfl.methods.base import load_method
from distfl.standings import Differences, Result, Standing, deviation

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
    "upload/cap",
    "FLOP/cap",
    "slack",
    "took part",
    "over cap",
    "up MB",
    "down MB",
    "first MB",
    "TFLOP",
    "lowest group",
    "gap",
    "lowest gain",
    "gain gap",
    "rate",
    "s",
    "seeds",
)


def markdown(found: Sequence[Standing], reference: str) -> str:
    """A table for each scenario; columns in which nothing is known of any method are left out."""
    parts = []
    for scenario in dict.fromkeys(standing.scenario for standing in found):
        rows = [_row(standing, reference) for standing in found if standing.scenario == scenario]
        known = [column for column in range(len(HEAD)) if column < 2 or any(row[column] not in ("", "-") for row in rows)]
        lines = [f"| {' | '.join(row[column] for column in known)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)]
        parts.append("\n".join([f"### {scenario}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _legend(comparison: Comparison) -> str:
    """What labels do not say: of methods that were given something, or whose score is an ensemble's."""
    lines = []
    for contender in comparison.config.methods:
        said = [f"{key} {value}" for key, value in contender.options.items()] + list(contender.overrides)
        if load_method(contender.method, contender.options).ensemble:
            said.append("its accuracy is that of an ensemble of classifiers")
        if said or label(contender) != contender.method:
            named = [] if label(contender) == contender.method else [contender.method]
            lines.append(f"`{label(contender)}`: {', '.join([*named, *said])}")
    return "; ".join(lines) + ".\n\n" if lines else ""


def _row(standing: Standing, reference: str) -> list[str]:
    if not standing.results:
        why = f"cannot take part: {standing.refusal}" if standing.refusal else "no finished run"
        return [standing.method, why, *[""] * (len(HEAD) - 2)]
    mean, results = standing.mean, standing.results
    same = standing.method == reference
    enforced = all(result.enforced_by != "report" for result in results)
    return [
        standing.method if enforced else f"{standing.method} (caps NOT enforced)",
        _percent(mean("accuracy"), standing.deviation("accuracy")),
        *(["", ""] if same else _above(standing.accuracy_above, 100, 2)),
        f"{mean('loss'):.4f}",
        *(["", ""] if same else _above(standing.loss_above, 1, 4)),
        ", ".join(dict.fromkeys(f"{result.depth}: {result.blocks}" for result in results)),
        *(_percent(standing.largest(f"{what}_share")) for what in ("peak", "upload", "flops")),
        _percent(mean("slack_share")),
        _percent(mean("part_share")),
        str(sum(result.over_cap for result in results)),
        f"{mean('upload_bytes') / MEGA:.1f}",
        f"{mean('download_bytes') / MEGA:.1f}",
        f"{mean('first_download_bytes') / MEGA:.1f}",
        f"{mean('flops') / 1e12:.2f}",
        *(_percent(mean(key), standing.deviation(key)) for key in ("lowest_group", "group_gap", "lowest_gain", "gain_gap")),
        ", ".join(dict.fromkeys(f"{result.learning_rate:g}" for result in results)),
        f"{mean('seconds'):.0f}",
        str(len(results)),
    ]


def _above(differences: Differences, scale: float, digits: int) -> list[str]:
    """Mean and sample deviation, then p; empty where there is nothing to say."""
    values = [scale * value for value in differences.values]
    if not values:
        return ["", ""]
    spread = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    p = "" if differences.p_value is None else f"{differences.p_value:.3f}"
    return [f"{statistics.mean(values):+.{digits}f}{spread}", p]


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


def read_results(path: Path) -> list[Result]:
    """What ``comma_separated`` wrote.

    Raises:
        ConfigError: there is no such file, or it is no such table.
    """
    change = "give a comparison.csv that distfl compare has written"
    try:
        with path.open(newline="") as lines:
            rows = csv.DictReader(lines)
            columns = [field.name for field in fields(Result)]
            if rows.fieldnames != columns:
                raise ConfigError(f"results from {path}", f"its columns are {rows.fieldnames}, not {columns}", change)
            results = [_result(row) for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"results from {path}", str(error), change) from None
    if not results:
        raise ConfigError(f"results from {path}", "not a single run", change)
    return results


def _result(row: dict[str, str]) -> Result:
    """Of one line, in which an empty place stands for None where that can be."""
    if None in row or None in row.values():  # where csv puts what is too much or too little
        raise ValueError(f"a line of other than {len(fields(Result))} values: {row}")
    hints = get_type_hints(Result)
    kinds = {key: get_args(hint) or (hint,) for key, hint in hints.items()}
    return Result(**{key: None if text == "" and NoneType in kinds[key] else kinds[key][0](text) for key, text in row.items()})


def text(comparison: Comparison, found: Sequence[Standing]) -> str:
    """All tables, and what their columns and labels mean."""
    head = (
        "Accuracies, parts of caps, slack (of the cap that is closest) and shares of clients in percent; bytes and FLOPs of all clients\n"
        'and rounds, "first" being whole models for clients that take part for the first time; means over seeds ± sample deviations, of\n'
        "parts of caps the largest of all client rounds, of client rounds over a cap the number;\n"
        f'"to reference": less {comparison.config.reference} with the same seed; p: of a paired t-test, not corrected for their number.\n\n'
    )
    sources = {result.source_checksum for standing in found for result in standing.results}
    if len(sources) > 1:
        head += f"The runs were made by {len(sources)} versions of the package (source_checksum of each run).\n\n"
    return head + _legend(comparison) + markdown(found, comparison.config.reference)


def write(comparison: Comparison, found: Sequence[Standing]) -> list[Path]:
    """comparison.md and comparison.csv; returns their paths."""
    write_atomically(comparison.output / "comparison.md", text(comparison, found))
    write_atomically(comparison.output / "comparison.csv", comma_separated(found))
    return [comparison.output / "comparison.md", comparison.output / "comparison.csv"]
