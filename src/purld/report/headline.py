"""Summarise a run in one sentence that claims no more than its results support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from purld.display.results import describe_self_comparison
from purld.display.titles import model_title
from purld.report.run_data import RunData
from purld.runs.open import FinalModel, final_model

Tone = Literal["better", "worse", "mixed", "open", "none"]

# Metrics of a difference, the most trustworthy first, with their names in a sentence.
HEADLINE_METRICS = {
    "accuracy": "right answers",
    "greedy_accuracy": "right greedy answers",
    "lc_win_rate": "length-controlled wins",
    "win_rate": "wins",
}
_SAMPLED, _GREEDY = "accuracy", "greedy_accuracy"

# How two models compare sampled, then greedy; {0} and {1} are their titles.
_BOTH_CLAIMS: dict[tuple[Tone, Tone], str] = {
    ("better", "better"): "{0} is better than {1}, sampled and greedy",
    ("better", "open"): "{0} is better than {1} sampled, and cannot be told apart from it greedy",
    ("better", "worse"): "{0} is better than {1} sampled, but worse greedy",
    ("open", "better"): "{0} cannot be told apart from {1} sampled, and is better greedy",
    ("open", "open"): "{0} and {1} cannot be told apart, sampled or greedy",
    ("open", "worse"): "{0} cannot be told apart from {1} sampled, and is worse greedy",
    ("worse", "better"): "{0} is worse than {1} sampled, but better greedy",
    ("worse", "open"): "{0} is worse than {1} sampled, and cannot be told apart from it greedy",
    ("worse", "worse"): "{0} is worse than {1}, sampled and greedy",
}
_CLAIMS: dict[Tone, str] = {
    "better": "{0} is better than {1}",
    "worse": "{0} is worse than {1}",
    "open": "{0} and {1} cannot be told apart",
}


@dataclass(frozen=True)
class Headline:
    """A claim with its tone, and the numbers behind it."""

    claim: str
    tone: Tone
    numbers: str = ""

    @property
    def text(self) -> str:
        """The claim and the numbers as one text."""
        if not self.numbers:
            return self.claim
        return f"{self.claim}{'' if self.claim.endswith('.') else ':'} {self.numbers}"


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
    own = [line.strip() for line in describe_self_comparison(run.results)]
    return replace(headline, numbers=" ".join(filter(None, [headline.numbers, *own])))


def compare_models(
    names: tuple[str, str], metrics: tuple[Mapping[str, Any], Mapping[str, Any]], difference: Mapping[str, Any]
) -> Headline | None:
    """Return whether one model is better than another on the same prompts; None if no difference was measured.

    Sampled and greedy answers are compared together where both were checked: a model may gain in one and not the other.

    Args:
        names: the titles of the two models.
        metrics: the metrics of the two models, named as in results.json.
        difference: the metrics of the first minus those of the second, with the same names.
    """
    measured = [key for key in HEADLINE_METRICS if key in difference and f"{key}_ci" in difference]
    if not measured:
        return None
    tones = {key: _tone(*difference[f"{key}_ci"]) for key in measured}
    first, *others = measured
    if others[:1] == [_GREEDY] and first == _SAMPLED:
        claim, tone = _BOTH_CLAIMS[tones[_SAMPLED], tones[_GREEDY]], _overall(tones[_SAMPLED], tones[_GREEDY])
        numbers = _both_rates(metrics, difference)
        others.remove(_GREEDY)
    else:
        claim, tone = _CLAIMS[tones[first]], tones[first]
        numbers = f"{_rates(first, *metrics)} {_with_interval(difference, first)}{_prompt_count(metrics[0])}"
    return Headline(claim.format(*names), tone, f"{numbers}{_contradiction(others, difference, tone)}.")


def _tone(low: float, high: float) -> Tone:
    return "better" if low > 0 else "worse" if high < 0 else "open"


def _overall(sampled: Tone, greedy: Tone) -> Tone:
    """Return the tone of both together: mixed if one is better and the other worse, else what either shows."""
    shown = {sampled, greedy} - {"open"}
    return "mixed" if len(shown) == 2 else shown.pop() if shown else "open"


def _both_rates(metrics: tuple[Mapping[str, Any], Mapping[str, Any]], difference: Mapping[str, Any]) -> str:
    rates = [m[_GREEDY] for m in metrics if _GREEDY in m]
    greedy = f"{format_percent(rates[0])} against {format_percent(rates[1])}, " if len(rates) == 2 else ""
    low, high = difference[f"{_GREEDY}_ci"]
    parts = (
        f"sampled, {_rates(_SAMPLED, *metrics)} {_with_interval(difference, _SAMPLED)}",
        f"greedy, {greedy}{format_points(difference[_GREEDY])} points ({format_points(low)} to {format_points(high)})",
        _prompt_count(metrics[0]).strip(),
    )
    return "; ".join(part for part in parts if part)


def _with_interval(difference: Mapping[str, Any], key: str) -> str:
    low, high = difference[f"{key}_ci"]
    return f"{format_points(difference[key])} points (95% interval {format_points(low)} to {format_points(high)})"


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
