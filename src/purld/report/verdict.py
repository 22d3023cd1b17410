"""The run in one sentence, computed from its results: what it may claim and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from purld.names import title
from purld.report.read import Run

Tone = Literal["better", "worse", "open", "none"]

# What a difference may be measured in, the most trustworthy first, and how a sentence names it.
METRICS = {
    "accuracy": "right answers",
    "greedy_accuracy": "right answers (greedy)",
    "lc_win_rate": "length-controlled wins",
    "win_rate": "wins",
}


@dataclass(frozen=True)
class Sentence:
    """What to say, and whether it is good news."""

    text: str
    tone: Tone


def verdict(run: Run) -> Sentence:
    """Whether the method is better than SFT (or SFT than the base model), as far as the run can tell."""
    models: Mapping[str, Any] = run.results.get("models", {})
    method = run.method
    if not models or method is None:
        return Sentence("This run has not been evaluated yet.", "none")
    rival = "base" if method == "sft" else "sft"
    found = run.results.get("difference", {}).get(f"{method} - {rival}", {})
    measured = [key for key in METRICS if key in found and f"{key}_ci" in found]
    if measured:
        return _compared(method, rival, measured, found, models)
    return _uncompared(method, rival, models)


def _compared(
    method: str, rival: str, measured: list[str], found: Mapping[str, Any], models: Mapping[str, Any]
) -> Sentence:
    key = measured[0]
    low, high = found[f"{key}_ci"]
    ours, theirs = title(method), title(rival)
    claim: str
    tone: Tone
    if low > 0:
        claim, tone = f"{ours} is better than {theirs}", "better"
    elif high < 0:
        claim, tone = f"{ours} is worse than {theirs}", "worse"
    else:
        claim, tone = f"{ours} and {theirs} cannot be told apart", "open"
    text = f"{claim}: {_levels(key, method, rival, models)}{points(found[key])} points, 95% interval "
    text += f"{points(low)} to {points(high)}{_prompts(models.get(method, {}))}"
    return Sentence(text + _contradiction(measured[1:], found, tone) + ".", tone)


def _contradiction(others: list[str], found: Mapping[str, Any], tone: Tone) -> str:
    """The first other metric whose interval says something else than the sentence does."""
    for key in others:
        low, high = found[f"{key}_ci"]
        if (low > 0 and tone != "better") or (high < 0 and tone != "worse"):
            return f"; but {points(found[key])} in {METRICS[key]} ({points(low)} to {points(high)})"
    return ""


def _uncompared(method: str, rival: str, models: Mapping[str, Any]) -> Sentence:
    key = next((k for k in METRICS if k in models.get(method, {})), None)
    if key is None:
        return Sentence(f"{title(method)} answered the held-out prompts; nothing has judged the answers.", "none")
    said = [
        f"{title(m)} {percent(models[m][key])} ({percent(models[m][f'{key}_ci'][0])} to "
        f"{percent(models[m][f'{key}_ci'][1])})"
        for m in (method, rival)
        if key in models.get(m, {}) and f"{key}_ci" in models[m]
    ]
    text = f"{METRICS[key].capitalize()}: {', '.join(said)}; the difference on the same prompts was not measured."
    return Sentence(text, "open")


def _levels(key: str, method: str, rival: str, models: Mapping[str, Any]) -> str:
    if key not in models.get(method, {}) or key not in models.get(rival, {}):
        return f"{METRICS[key]} "
    return f"{percent(models[method][key])} {METRICS[key]} against {percent(models[rival][key])}, "


def _prompts(metrics: Mapping[str, Any]) -> str:
    return f", over {metrics['n']:,} held-out prompts" if "n" in metrics else ""


def percent(share: float) -> str:
    """0.7431 as 74.3%."""
    return f"{100 * share:.1f}%"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")
