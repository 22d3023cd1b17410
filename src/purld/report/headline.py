"""The run in one sentence, computed from its results: what it may claim and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from purld.display.titles import model_title
from purld.report.run_data import RunData

Tone = Literal["better", "worse", "open", "none"]

# What a difference may be measured in, the most trustworthy first, and how a sentence names it.
HEADLINE_METRICS = {
    "accuracy": "right answers",
    "greedy_accuracy": "right greedy answers",
    "lc_win_rate": "length-controlled wins",
    "win_rate": "wins",
}


@dataclass(frozen=True)
class Headline:
    """What to say, and whether it is good news."""

    text: str
    tone: Tone


def write_headline(run: RunData) -> Headline:
    """Whether the method is better than SFT (or SFT than the base model), as far as the run can tell."""
    models: Mapping[str, Any] = run.results.get("models", {})
    method = run.method
    if not models or method is None:
        return Headline("This run has not been evaluated yet.", "none")
    rival = "base" if method == "sft" else "sft"
    found = run.results.get("difference", {}).get(f"{method} - {rival}", {})
    metrics = models.get(method, {}), models.get(rival, {})
    return compared_models((model_title(method), model_title(rival)), metrics, found) or _uncompared(
        method, rival, models
    )


def compared_models(
    names: tuple[str, str], metrics: tuple[Mapping[str, Any], Mapping[str, Any]], found: Mapping[str, Any]
) -> Headline | None:
    """Whether one model is better than another on the same prompts; None if nothing was measured of both.

    Args:
        names: of the two.
        metrics: of the two, named as in results.json.
        found: the first minus the second, named likewise.
    """
    measured = [key for key in HEADLINE_METRICS if key in found and f"{key}_ci" in found]
    if not measured:
        return None
    key = measured[0]
    low, high = found[f"{key}_ci"]
    ours, theirs = names
    claim: str
    tone: Tone
    if low > 0:
        claim, tone = f"{ours} is better than {theirs}", "better"
    elif high < 0:
        claim, tone = f"{ours} is worse than {theirs}", "worse"
    else:
        claim, tone = f"{ours} and {theirs} cannot be told apart", "open"
    text = f"{claim}: {_levels(key, *metrics)} {format_points(found[key])} points "
    text += f"(95% interval {format_points(low)} to {format_points(high)}){_prompts(metrics[0])}"
    return Headline(text + _contradiction(measured[1:], found, tone) + ".", tone)


def _contradiction(others: list[str], found: Mapping[str, Any], tone: Tone) -> str:
    """The first other metric whose interval says something else than the sentence does."""
    for key in others:
        low, high = found[f"{key}_ci"]
        if (low > 0 and tone != "better") or (high < 0 and tone != "worse"):
            interval = f"{format_points(low)} to {format_points(high)}"
            return f"; but {format_points(found[key])} points in {HEADLINE_METRICS[key]} ({interval})"
    return ""


def _uncompared(method: str, rival: str, models: Mapping[str, Any]) -> Headline:
    key = next((k for k in HEADLINE_METRICS if k in models.get(method, {})), None)
    if key is None:
        return Headline(f"{model_title(method)} answered the held-out prompts; nothing has judged the answers.", "none")
    said = [
        f"{model_title(m)} {format_percent(models[m][key])} ({format_percent(models[m][f'{key}_ci'][0])} to "
        f"{format_percent(models[m][f'{key}_ci'][1])})"
        for m in (method, rival)
        if key in models.get(m, {}) and f"{key}_ci" in models[m]
    ]
    text = (
        f"{HEADLINE_METRICS[key].capitalize()}: {', '.join(said)}; the difference on the same prompts was not measured."
    )
    return Headline(text, "open")


def _levels(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if key not in ours or key not in theirs:
        return f"a difference in {HEADLINE_METRICS[key]} of"
    return f"{format_percent(ours[key])} {HEADLINE_METRICS[key]} against {format_percent(theirs[key])}, a difference of"


def _prompts(metrics: Mapping[str, Any]) -> str:
    return f" over {metrics['n']:,} held-out prompts" if "n" in metrics else ""


def format_percent(share: float) -> str:
    """0.7431 as 74.3%."""
    return f"{100 * share:.1f}%"


def format_points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")
