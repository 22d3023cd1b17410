"""Show the results as tables: metrics by model, and differences of models on the same prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from purld.display.titles import model_title
from purld.report.headline import HEADLINE_METRICS, format_percent, format_points
from purld.report.markup import PageSection, escape_text, wide_table
from purld.report.run_data import RunData

_RATES = {
    "accuracy": "Accuracy",
    "greedy_accuracy": "Accuracy, greedy",
    "win_rate": "Win rate",
    "lc_win_rate": "Win rate, length-controlled",
    "matched_win_rate": "Win rate, like lengths",
}
_MEASURES = {
    "n": "Prompts",
    "mean_tokens": "Mean tokens",
    "unfinished": "Cut off",
    "thinking": "With thinking",
    "unjudged": "Unjudged",
    "asked_again": "Asked again",
    "judge_thinking": "Judge thought",
    "flip_rate": "Flips with order",
    "length_ratio": "Length to opponent's",
    "overlap": "Length overlap",
    "distinct_2": "Distinct word pairs",
    "unique_answers": "Different samples",
}
_PERCENT = frozenset({"flip_rate", "overlap", "distinct_2", "unique_answers"})

# A run, the model or pair of a row, and its metrics.
_Entry = tuple[RunData, str, Mapping[str, Any]]


def results_section(runs: Sequence[RunData]) -> PageSection:
    """Return the section with a table each for rates, paired differences and other measures; empty without results."""
    entries = _entries(runs, "models")
    if not entries:
        return PageSection("results", "Results", "")
    several = len(runs) > 1
    note = (
        "Bars are 95% intervals over prompts, dots are the estimates, and p is that of McNemar's exact two-sided test."
    )
    if several:
        note += " A row that an earlier run has too, such as a shared SFT model, is not repeated."
    rates = _rates_table(entries, several) + _differences_table(runs)
    body = f'{rates}<p class="note">{note}</p>\n' if rates else ""
    return PageSection("results", "Results", body + "<h3>The answers</h3>\n" + _measures_table(entries, several))


def _rates_table(entries: Sequence[_Entry], several: bool) -> str:
    keys = [key for key in _RATES if any(key in metrics for *_, metrics in entries)]
    scales = {
        key: _scale(bound for *_, m in entries for bound in (m.get(key), *m.get(f"{key}_ci", ()))) for key in keys
    }

    def cells(metrics: Mapping[str, Any]) -> str:
        return "".join(_rate_cell(metrics, key, scales[key]) for key in keys)

    return _model_table("Models and metrics", [_RATES[key] for key in keys], entries, cells, several) if keys else ""


def _measures_table(entries: Sequence[_Entry], several: bool) -> str:
    keys = [key for key in _MEASURES if any(key in metrics for *_, metrics in entries)]

    def cells(metrics: Mapping[str, Any]) -> str:
        return "".join(_measure_cell(metrics, key) for key in keys)

    return _model_table("The answers", [_MEASURES[key] for key in keys], entries, cells, several)


def _entries(runs: Sequence[RunData], part: str) -> list[_Entry]:
    """Return the rows of a part of results.json, run by run. Rows that runs share come once, with the first run."""
    entries: list[_Entry] = []
    seen: set[str] = set()
    for run in runs:
        for name, metrics in run.results.get(part, {}).items():
            content = json.dumps([name, metrics], sort_keys=True)
            if content not in seen or run.method in name.split(" - "):
                entries.append((run, name, metrics))
            seen.add(content)
    return entries


def _model_table(
    label: str,
    headings: Sequence[str],
    entries: Sequence[_Entry],
    cells: Callable[[Mapping[str, Any]], str],
    several: bool,
) -> str:
    """Return a table with a row per model; with several runs, each group of rows has the run's name in front."""
    counts = Counter(run.name for run, *_ in entries)
    body, last = "", None
    for run, model, metrics in entries:
        first = several and run.name != last
        last = run.name
        names = _group_heading(run.name, counts[run.name]) if first else ""
        names += f'<th scope="row">{escape_text(model_title(model))}</th>'
        kind = "method" if model == run.method else "rival"
        body += f'<tr class="{kind}{" first" if first else ""}">{names}{cells(metrics)}</tr>\n'
    return wide_table(label, [*(["Run"] if several else []), "Model", *headings], body)


def _group_heading(name: str, rows: int) -> str:
    """Return the heading cell of a group of rows."""
    return f'<th scope="rowgroup" rowspan="{rows}">{escape_text(name)}</th>'


def _scale(values: Iterable[float | None]) -> tuple[float, float]:
    """Return the range over which a column's bars are drawn, with a margin."""
    present = [v for v in values if v is not None]
    low, high = min(present), max(present)
    margin = max(0.1 * (high - low), 0.01)
    return low - margin, high + margin


def _rate_cell(metrics: Mapping[str, Any], key: str, scale: tuple[float, float]) -> str:
    if key not in metrics:
        return '<td class="absent">–</td>'
    interval = metrics.get(f"{key}_ci")
    if interval is None:
        return f"<td><b>{format_percent(metrics[key])}</b></td>"
    between = f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"
    return (
        f"<td><b>{format_percent(metrics[key])}</b> <small>{between}</small>{_bar(metrics[key], interval, scale)}</td>"
    )


def _measure_cell(metrics: Mapping[str, Any], key: str) -> str:
    if key not in metrics:
        return '<td class="absent">–</td>'
    value = metrics[key]
    if key in _PERCENT:
        shown = format_percent(value)
    elif key == "length_ratio":
        shown = f"{value:.2f} ×"
    else:
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    return f"<td>{shown}</td>"


def _bar(value: float, interval: Sequence[float], scale: tuple[float, float], zero: bool = False) -> str:
    def position(x: float) -> str:
        return f"{100 * (x - scale[0]) / (scale[1] - scale[0]):.2f}%"

    marks = f"--low:{position(interval[0])};--high:{position(interval[1])};--at:{position(value)}"
    line = f'<i class="zero" style="left:{position(0.0)}"></i>' if zero else ""
    return f'<span class="bar" style="{marks}" aria-hidden="true">{line}</span>'


def _differences_table(runs: Sequence[RunData]) -> str:
    """Return the table of one model minus another on the same prompts, a row per metric."""
    pairs = [
        (run, pair, [key for key in HEADLINE_METRICS if key in difference and f"{key}_ci" in difference], difference)
        for run, pair, difference in _entries(runs, "difference")
    ]
    intervals = [difference[f"{key}_ci"] for *_, keys, difference in pairs for key in keys]
    if not intervals:
        return ""
    scale = _scale([0.0, *(bound for interval in intervals for bound in interval)])
    body = ""
    for run, pair, keys, difference in pairs:
        names = " − ".join(model_title(model) for model in pair.split(" - "))
        for key in keys:
            heading = (
                _group_heading(f"{run.name}: {names}" if len(runs) > 1 else names, len(keys)) if key == keys[0] else ""
            )
            body += (
                f"<tr{' class=first' if heading else ''}>{heading}{_difference_cells(difference, key, scale)}</tr>\n"
            )
    headings = ("Difference", "Metric", "Percentage points", "")
    return "<h3>On the same prompts</h3>\n" + wide_table("Paired differences", headings, body)


def _difference_cells(difference: Mapping[str, Any], key: str, scale: tuple[float, float]) -> str:
    """Return the cells of one difference, coloured if its interval excludes zero."""
    low, high = interval = difference[f"{key}_ci"]
    tone = "better" if low > 0 else "worse" if high < 0 else "open"
    p_value = f"; p = {difference[f'{key}_p']:.2g}" if f"{key}_p" in difference else ""
    return (
        f'<th scope="row">{_RATES[key]}</th><td><b class="{tone}">{format_points(difference[key])}</b> '
        f"<small>{format_points(low)} to {format_points(high)}{p_value}</small></td>"
        f'<td class="wide">{_bar(difference[key], interval, scale, zero=True)}</td>'
    )
