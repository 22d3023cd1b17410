"""The results as tables: models against metrics, and models against each other on the same prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from purld.names import title
from purld.report.markup import Section, table, text
from purld.report.read import Run
from purld.report.verdict import METRICS, percent, points

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


def results_section(runs: Sequence[Run]) -> Section:
    """Both tables; empty if nothing was evaluated."""
    rows = [(run, model, metrics) for run in runs for model, metrics in run.results.get("models", {}).items()]
    if not rows:
        return Section("results", "Results", "")
    rates = [key for key in _RATES if any(key in metrics for _, _, metrics in rows)]
    counts = [key for key in _COUNTS if any(key in metrics for _, _, metrics in rows)]
    scales = {
        key: _scale(bound for _, _, m in rows for bound in (m.get(key), *m.get(f"{key}_ci", ()))) for key in rates
    }
    heads = [*(["Run"] if len(runs) > 1 else []), "Model", *(_RATES[k] for k in rates), *(_COUNTS[k] for k in counts)]
    body = ""
    for run, model, metrics in rows:
        names = [run.name, title(model)] if len(runs) > 1 else [title(model)]
        cells = "".join(f'<th scope="row">{text(name)}</th>' for name in names)
        cells += "".join(_rate(metrics, key, scales[key]) for key in rates)
        cells += "".join(_count(metrics, key) for key in counts)
        body += f'<tr class="{"method" if model == run.method else "rival"}">{cells}</tr>\n'
    note = '<p class="note">Bars are 95% intervals over prompts; the dot is the estimate.</p>'
    return Section("results", "Results", table("Models and metrics", heads, body) + _differences(runs) + note)


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
        return f"<td><b>{percent(metrics[key])}</b></td>"
    between = f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"
    return f"<td><b>{percent(metrics[key])}</b> <small>{between}</small>{_bar(metrics[key], interval, scale)}</td>"


def _count(metrics: Mapping[str, Any], key: str) -> str:
    if key not in metrics:
        return '<td class="absent">–</td>'
    value = metrics[key]
    if key in _PERCENT:
        shown = percent(value)
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


def _differences(runs: Sequence[Run]) -> str:
    rows = [
        (run, pair, key, found[key], found[f"{key}_ci"])
        for run in runs
        for pair, found in run.results.get("difference", {}).items()
        for key in METRICS
        if key in found and f"{key}_ci" in found
    ]
    if not rows:
        return ""
    scale = _scale([0.0, *(bound for *_, interval in rows for bound in interval)])
    body = ""
    for run, pair, key, value, interval in rows:
        names = " − ".join(title(model) for model in pair.split(" - "))
        shown = f"{run.name}: {names}" if len(runs) > 1 else names
        between = f"{points(interval[0])} to {points(interval[1])}"
        body += (
            f'<tr><th scope="row">{text(shown)}<small>{_RATES[key]}</small></th>'
            f"<td><b>{points(value)}</b> <small>{between}</small></td>"
            f'<td class="wide">{_bar(value, interval, scale, zero=True)}</td></tr>\n'
        )
    heads = ("Difference", "Percentage points", "")
    return "<h3>On the same prompts</h3>\n" + table("Paired differences", heads, body)
