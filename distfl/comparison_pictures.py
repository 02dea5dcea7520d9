"""Pictures of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from distfl.comparison import Comparison
from distfl.fleet import MEGA
from distfl.reporting import read_run
from distfl.standings import Standing

MARKERS = "osD^v"  # colours repeat after ten methods, colour and marker after fifty


def _plot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    return plot


def _style(comparison: Comparison, method: str) -> dict[str, str]:
    """The same for a method in all panels of all pictures."""
    number = comparison.labels.index(method)
    return {"label": method, "color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)]}


def _panels(count: int):
    """A figure with so many panels, at most four beside one another."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure, panels = _plot().subplots(rows, columns, figsize=(5 * columns, 4 * rows), constrained_layout=True, squeeze=False)
    for axes in panels.flat[count:]:
        axes.remove()
    return figure, panels.flat[:count]


def _saved(figure, path: Path) -> Path:
    """With one legend beside all panels, in which is every method that is in any of them."""
    drawn = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    _plot().close(figure)
    return path


def draw_overview(comparison: Comparison, found: Sequence[Standing], path: Path) -> Path:
    """Accuracy against every axis of the scenarios, bytes sent and FLOPs; bars are deviations over seeds."""
    from matplotlib.ticker import LogLocator, NullFormatter

    scenarios = comparison.config.scenarios
    axes_of = list(dict.fromkeys(scenario.axis for scenario in scenarios if scenario.axis))
    figure, panels = _panels(len(axes_of) + 2)
    for axes, axis in zip(panels, axes_of):
        values = {scenario.name: scenario.value for scenario in scenarios if scenario.axis == axis}
        _lines(axes, comparison, [standing for standing in found if standing.scenario in values], lambda s, v=values: v[s.scenario], "-")
        axes.set(title=f"Accuracy against {axis}", xlabel=axis)
    for axes, (title, unit, value) in zip(
        panels[len(axes_of) :],
        (
            ("Accuracy against upload", "MB of all clients and rounds", lambda s: s.mean("upload_bytes") / MEGA),
            ("Accuracy against work", "TFLOP of all clients and rounds", lambda s: s.mean("flops") / 1e12),
        ),
    ):
        _lines(axes, comparison, found, value, "none")
        axes.set(title=title, xlabel=unit, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in panels:
        axes.set_ylabel("next-token accuracy on held-out text")
    return _saved(figure, path)


def _lines(axes, comparison: Comparison, found: Sequence[Standing], value: Callable[[Standing], float], style: str) -> None:
    for method in comparison.labels:
        own = [standing for standing in found if standing.method == method and standing.results]
        points = sorted((value(s), s.mean("accuracy"), s.deviation("accuracy") or 0.0) for s in own)
        if points:
            where, accuracy, deviation = zip(*points)
            axes.errorbar(where, accuracy, deviation, linestyle=style, capsize=3, **_style(comparison, method))


def draw_rounds(comparison: Comparison, found: Sequence[Standing], path: Path) -> Path:
    """Accuracy over rounds, a panel for each scenario, a line for each method: its first seed that has finished."""
    scenarios = list(dict.fromkeys(standing.scenario for standing in found))
    figure, panels = _panels(len(scenarios))
    for axes, scenario in zip(panels, scenarios):
        for standing in found:
            if standing.scenario == scenario and standing.results:
                evaluated = read_run(comparison.output / standing.results[0].folder).evaluated
                line = [(record["round"], record["test_accuracy"]) for record in evaluated]
                axes.plot(*zip(*line), **_style(comparison, standing.method))
        axes.set(title=scenario, xlabel="round", ylabel="accuracy")
    return _saved(figure, path)
