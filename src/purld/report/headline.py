"""Summarise a run in one sentence that claims no more than its results support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from purld.display.results import describe_self_comparison
from purld.display.titles import model_title
from purld.report.run_data import RunData
from purld.runs.open import FinalModel, final_model

Tone = Literal["better", "worse", "open", "none"]

# Metrics of a difference, the most trustworthy first, with their names in a sentence.
HEADLINE_METRICS = {
    "accuracy": "right answers",
    "greedy_accuracy": "right greedy answers",
    "lc_win_rate": "length-controlled wins",
    "win_rate": "wins",
}


@dataclass(frozen=True)
class Headline:
    """A sentence and its tone."""

    text: str
    tone: Tone


def write_headline(run: RunData) -> Headline:
    """Return whether the run's final model is better than the model it was trained from."""
    models: Mapping[str, Any] = run.results.get("models", {})
    method = run.method
    if not models or method is None:
        return Headline("This run has not been evaluated yet.", "none")
    final = final_model(method)
    difference = run.results.get("difference", {}).get(f"{final.name} - {final.parent}", {})
    metrics = models.get(final.name, {}), models.get(final.parent, {})
    names = model_title(final.name), model_title(final.parent)
    headline = compare_models(names, metrics, difference) or _without_difference(final, models)
    own = describe_self_comparison(run.results)
    return Headline(" ".join([headline.text, *(line.strip() for line in own)]), headline.tone) if own else headline


def compare_models(
    names: tuple[str, str], metrics: tuple[Mapping[str, Any], Mapping[str, Any]], difference: Mapping[str, Any]
) -> Headline | None:
    """Return whether one model is better than another on the same prompts; None if no difference was measured.

    Args:
        names: the titles of the two models.
        metrics: the metrics of the two models, named as in results.json.
        difference: the metrics of the first minus those of the second, with the same names.
    """
    measured = [key for key in HEADLINE_METRICS if key in difference and f"{key}_ci" in difference]
    if not measured:
        return None
    key = measured[0]
    low, high = difference[f"{key}_ci"]
    ours, theirs = names
    claim: str
    tone: Tone
    if low > 0:
        claim, tone = f"{ours} is better than {theirs}", "better"
    elif high < 0:
        claim, tone = f"{ours} is worse than {theirs}", "worse"
    else:
        claim, tone = f"{ours} and {theirs} cannot be told apart", "open"
    text = f"{claim}: {_rates(key, *metrics)} {format_points(difference[key])} points "
    text += f"(95% interval {format_points(low)} to {format_points(high)}){_prompt_count(metrics[0])}"
    return Headline(text + _contradiction(measured[1:], difference, tone) + ".", tone)


def _contradiction(others: list[str], difference: Mapping[str, Any], tone: Tone) -> str:
    """Return a clause on the first other metric whose interval contradicts the sentence; empty if there is none."""
    for key in others:
        low, high = difference[f"{key}_ci"]
        if (low > 0 and tone != "better") or (high < 0 and tone != "worse"):
            interval = f"{format_points(low)} to {format_points(high)}"
            return f"; but {format_points(difference[key])} points in {HEADLINE_METRICS[key]} ({interval})"
    return ""


def _without_difference(final: FinalModel, models: Mapping[str, Any]) -> Headline:
    """Return a sentence with the rates of both models, for a run whose paired difference was not measured."""
    key = next((k for k in HEADLINE_METRICS if k in models.get(final.name, {})), None)
    if key is None:
        text = f"{model_title(final.name)} answered the held-out prompts, but the answers were not checked or judged."
        return Headline(text, "none")
    rates = [
        f"{model_title(m)} {format_percent(models[m][key])} ({format_percent(models[m][f'{key}_ci'][0])} to "
        f"{format_percent(models[m][f'{key}_ci'][1])})"
        for m in (final.name, final.parent)
        if key in models.get(m, {}) and f"{key}_ci" in models[m]
    ]
    listed = f"{HEADLINE_METRICS[key].capitalize()}: {', '.join(rates)}"
    text = f"{listed}; the difference on the same prompts was not measured."
    return Headline(text, "open")


def _rates(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if key not in ours or key not in theirs:
        return f"a difference in {HEADLINE_METRICS[key]} of"
    return f"{format_percent(ours[key])} {HEADLINE_METRICS[key]} against {format_percent(theirs[key])}, a difference of"


def _prompt_count(metrics: Mapping[str, Any]) -> str:
    return f" over {metrics['n']:,} held-out prompts" if "n" in metrics else ""


def format_percent(share: float) -> str:
    """Return a share as a percentage: 0.7431 as 74.3%."""
    return f"{100 * share:.1f}%"


def format_points(share: float) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")
