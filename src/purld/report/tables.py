"""The results as tables: models against metrics, and models against each other on the same prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from purld.display.titles import model_title
from purld.report.headline import HEADLINE_METRICS, format_percent, format_points
from purld.report.markup import PageSection, escape_text, scrolling_table
from purld.report.run_data import RunData

_RATES = {
    "accuracy": "Accuracy",
    "greedy_accuracy": "Accuracy, greedy",
    "win_rate": "Win rate",
    "lc_win_rate": "Win rate, length-controlled",
    "matched_win_rate": "Win rate, like lengths",
}
_COUNTS = {
    "n": "Prompts",
    "mean_tokens": "Mean tokens",
    "unfinished": "Cut off",
    "unjudged": "Unjudged",
    "asked_again": "Asked again",
    "flip_rate": "Flips with order",
    "length_ratio": "Length to opponent's",
    "overlap": "Length overlap",
    "distinct_2": "Distinct word pairs",
    "unique_answers": "Different samples",
}
_PERCENT = frozenset({"flip_rate", "overlap", "distinct_2", "unique_answers"})

# A run, what a row is about, and its numbers.
_Entry = tuple[RunData, str, Mapping[str, Any]]


def results_section(runs: Sequence[RunData]) -> PageSection:
    """The rates, the paired differences and the rest in a table each; empty if nothing was evaluated."""
    entries = _entries(runs, "models")
    if not entries:
        return PageSection("results", "Results", "")
    several = len(runs) > 1
    note = "Bars are 95% intervals over prompts, the dot is the estimate, and p is McNemar's, exact and two-sided."
    if several:
        note += " A row that an earlier run has as well, such as an SFT model that they share, is not repeated."
    body = _rates(entries, several) + _differences(runs) + f'<p class="note">{note}</p>\n'
    return PageSection("results", "Results", body + "<h3>The answers</h3>\n" + _counts(entries, several))


def _rates(entries: Sequence[_Entry], several: bool) -> str:
    keys = [key for key in _RATES if any(key in metrics for *_, metrics in entries)]
    scales = {
        key: _scale(bound for *_, m in entries for bound in (m.get(key), *m.get(f"{key}_ci", ()))) for key in keys
    }

    def cells(metrics: Mapping[str, Any]) -> str:
        return "".join(_rate(metrics, key, scales[key]) for key in keys)

    return _models("Models and metrics", [_RATES[key] for key in keys], entries, cells, several) if keys else ""


def _counts(entries: Sequence[_Entry], several: bool) -> str:
    keys = [key for key in _COUNTS if any(key in metrics for *_, metrics in entries)]

    def cells(metrics: Mapping[str, Any]) -> str:
        return "".join(_count(metrics, key) for key in keys)

    return _models("The answers", [_COUNTS[key] for key in keys], entries, cells, several)


def _entries(runs: Sequence[RunData], part: str) -> list[_Entry]:
    """The rows of a part of results.json, run by run; what runs share comes once, with the first of them."""
    found: list[_Entry] = []
    seen: set[str] = set()
    for run in runs:
        for name, metrics in run.results.get(part, {}).items():
            same = json.dumps([name, metrics], sort_keys=True)
            if same not in seen or run.method in name.split(" - "):
                found.append((run, name, metrics))
            seen.add(same)
    return found


def _models(
    label: str,
    heads: Sequence[str],
    entries: Sequence[_Entry],
    cells: Callable[[Mapping[str, Any]], str],
    several: bool,
) -> str:
    """A table with a row per model; with several runs each has its name beside its rows."""
    counts = Counter(run.name for run, *_ in entries)
    body, last = "", None
    for run, model, metrics in entries:
        first = several and run.name != last
        last = run.name
        names = _head(run.name, counts[run.name]) if first else ""
        names += f'<th scope="row">{escape_text(model_title(model))}</th>'
        kind = "method" if model == run.method else "rival"
        body += f'<tr class="{kind}{" first" if first else ""}">{names}{cells(metrics)}</tr>\n'
    return scrolling_table(label, [*(["Run"] if several else []), "Model", *heads], body)


def _head(name: str, rows: int) -> str:
    """The head of a group of rows."""
    return f'<th scope="rowgroup" rowspan="{rows}">{escape_text(name)}</th>'


def _scale(values: Iterable[float | None]) -> tuple[float, float]:
    """The range that a column's bars are drawn over, with some air."""
    present = [v for v in values if v is not None]
    low, high = min(present), max(present)
    air = max(0.1 * (high - low), 0.01)
    return low - air, high + air


def _rate(metrics: Mapping[str, Any], key: str, scale: tuple[float, float]) -> str:
    if key not in metrics:
        return '<td class="absent">–</td>'
    interval = metrics.get(f"{key}_ci")
    if interval is None:
        return f"<td><b>{format_percent(metrics[key])}</b></td>"
    between = f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"
    return (
        f"<td><b>{format_percent(metrics[key])}</b> <small>{between}</small>{_bar(metrics[key], interval, scale)}</td>"
    )


def _count(metrics: Mapping[str, Any], key: str) -> str:
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
    def place(x: float) -> str:
        return f"{100 * (x - scale[0]) / (scale[1] - scale[0]):.2f}%"

    marks = f"--low:{place(interval[0])};--high:{place(interval[1])};--at:{place(value)}"
    line = f'<i class="zero" style="left:{place(0.0)}"></i>' if zero else ""
    return f'<span class="bar" style="{marks}" aria-hidden="true">{line}</span>'


def _differences(runs: Sequence[RunData]) -> str:
    """One model minus another on the same prompts, a row per metric."""
    pairs = [
        (run, pair, [key for key in HEADLINE_METRICS if key in found and f"{key}_ci" in found], found)
        for run, pair, found in _entries(runs, "difference")
    ]
    intervals = [found[f"{key}_ci"] for *_, keys, found in pairs for key in keys]
    if not intervals:
        return ""
    scale = _scale([0.0, *(bound for interval in intervals for bound in interval)])
    body = ""
    for run, pair, keys, found in pairs:
        names = " − ".join(model_title(model) for model in pair.split(" - "))
        for key in keys:
            head = _head(f"{run.name}: {names}" if len(runs) > 1 else names, len(keys)) if key == keys[0] else ""
            body += f"<tr{' class=first' if head else ''}>{head}{_difference(found, key, scale)}</tr>\n"
    heads = ("Difference", "Metric", "Percentage points", "")
    return "<h3>On the same prompts</h3>\n" + scrolling_table("Paired differences", heads, body)


def _difference(found: Mapping[str, Any], key: str, scale: tuple[float, float]) -> str:
    """The cells of one difference; it has a tone if its interval excludes zero."""
    low, high = interval = found[f"{key}_ci"]
    tone = "better" if low > 0 else "worse" if high < 0 else "open"
    p_value = f"; p = {found[f'{key}_p']:.2g}" if f"{key}_p" in found else ""
    return (
        f'<th scope="row">{_RATES[key]}</th><td><b class="{tone}">{format_points(found[key])}</b> '
        f"<small>{format_points(low)} to {format_points(high)}{p_value}</small></td>"
        f'<td class="wide">{_bar(found[key], interval, scale, zero=True)}</td>'
    )
