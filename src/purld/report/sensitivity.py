"""Draw how the results depend on the values that a sweep varies, as in Figures 3 and C.7.

Runs form a sweep if they differ in a number. There is one figure per such number and metric, with a line per setting of
everything else that differs. Runs that differ only in their seed are one point, their mean; faint dots show the runs.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from purld.display.titles import METRIC_TITLES, model_title
from purld.report.figures import COLOURS, STYLE, ReportFigure, figure_to_svg
from purld.report.markup import PageSection, figure_grid
from purld.report.run_data import RunData

_SECTIONS = (
    "student",
    "teacher",
    "anchors",
    "sft",
    "align",
    "data",
)  # sections that can change a result; the seed is not among them
_LOCATIONS = frozenset({"path", "prompts", "eval_prompts", "base_url"})  # keys that say where data is, not what it is
_LOG_FROM = 20  # an axis is logarithmic from this ratio of largest to smallest value
_LINE_ROLES = ("policy", "labels", "stage1", "stage2")
_MARKERS = "osD^v"


@dataclass(frozen=True)
class _Point:
    """One run: x is its value of the swept key, `setting` its other differing values, y its metric with an interval."""

    x: float
    setting: tuple[tuple[str, Any], ...]
    y: float
    interval: tuple[float, float] | None = None


def sensitivity_section(runs: Sequence[RunData]) -> PageSection:
    """Return the section with the figures of a sweep; empty if the runs form no sweep."""
    return PageSection("sensitivity", "Sensitivity", figure_grid(sensitivity_figures(runs)))


def sensitivity_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """Return one figure per swept number and metric of the final models."""
    finals = [run for run in runs if run.method in run.results.get("models", {})]
    varying = _differing_keys(finals)
    figures: list[ReportFigure] = []
    for key in varying:
        values = {flatten_config(run)[key] for run in finals if key in flatten_config(run)}
        if len(values) < 2 or not all(_is_number(value) for value in values):
            continue
        for metric, label in METRIC_TITLES.items():
            points = list(_points(finals, key, [other for other in varying if other != key], metric))
            if _has_line(points):
                figure = draw_sensitivity(points, key, label, _sft_level(finals, metric))
                heading = f"{label[0].upper()}{label[1:]} against {key}"
                caption = "Lines join the means over seeds; faint dots are single runs with their 95% intervals."
                caption += " Dashed: the mean of the SFT models."
                figures.append(ReportFigure(heading, caption, figure_to_svg(figure, f"sensitivity-{len(figures)}")))
    return figures


def flatten_config(run: RunData) -> dict[str, Any]:
    """Return the values of the configuration that can change a result, by dotted key."""
    return {
        key: value
        for section in _SECTIONS
        for key, value in _flat_items(run.config.get(section, {}), section)
        if key.rpartition(".")[2] not in _LOCATIONS
    }


def draw_sensitivity(points: Sequence[_Point], key: str, label: str, sft: float | None) -> Figure:
    """Draw one metric against one key, with a line per setting."""
    lines: dict[tuple[tuple[str, Any], ...], list[_Point]] = defaultdict(list)
    for point in points:
        lines[point.setting].append(point)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(key)
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _set_x_axis(axes, sorted({point.x for point in points}))
        if sft is not None:
            axes.axhline(sft, linestyle=(0, (4, 3)), linewidth=1.2, color=COLOURS["muted"])
        for index, (setting, line_points) in enumerate(sorted(lines.items(), key=lambda pair: str(pair[0]))):
            colour = COLOURS[_LINE_ROLES[index % len(_LINE_ROLES)]]
            xs = sorted({point.x for point in line_points})
            means = [np.mean([point.y for point in line_points if point.x == x]) for x in xs]
            axes.plot(
                [p.x for p in line_points], [p.y for p in line_points], ".", color=colour, alpha=0.4, markersize=5
            )
            ranges = [(p.x, *p.interval) for p in line_points if p.interval is not None]
            if ranges:
                axes.vlines(*zip(*ranges, strict=True), color=colour, alpha=0.25, linewidth=1)
            name = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in setting)
            marker = _MARKERS[index % len(_MARKERS)]
            axes.plot(xs, means, marker=marker, markersize=4.5, linewidth=1.8, color=colour, label=name or None)
        if len(lines) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.01), ncols=2, fontsize=8)
    return figure


def _set_x_axis(axes: Axes, values: Sequence[float]) -> None:
    if values[0] > 0 and values[-1] / values[0] >= _LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [f"{value:g}" for value in values])


def _differing_keys(runs: Sequence[RunData]) -> list[str]:
    """Return the keys in which the runs differ."""
    settings = [flatten_config(run) for run in runs]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if len({str(setting.get(key)) for setting in settings}) > 1]


def _points(runs: Sequence[RunData], key: str, others: Sequence[str], metric: str) -> Iterator[_Point]:
    for run in runs:
        setting = flatten_config(run)
        metrics = run.results["models"][run.method]
        if metric in metrics and key in setting:
            names = tuple((other, _display_value(setting.get(other))) for other in others)
            yield _Point(float(setting[key]), names, metrics[metric], metrics.get(f"{metric}_ci"))


def _has_line(points: Sequence[_Point]) -> bool:
    """Return whether a line joins two values: runs that differ in several keys at once show no effect of one key."""
    values: dict[Any, set[float]] = defaultdict(set)
    for point in points:
        values[point.setting].add(point.x)
    return any(len(xs) > 1 for xs in values.values())


def _display_value(value: Any) -> Any:
    return model_title(value) if isinstance(value, str) else value


def _sft_level(runs: Sequence[RunData], metric: str) -> float | None:
    levels = [run.results["models"].get("sft", {}).get(metric) for run in runs]
    present = [level for level in levels if level is not None]
    return float(np.mean(present)) if present else None


def _flat_items(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat_items(inner, f"{prefix}.{key}")
    else:
        yield prefix, json.dumps(value) if isinstance(value, list) else value  # a list cannot be a key


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
