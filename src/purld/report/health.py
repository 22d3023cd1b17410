"""Judge a running Stage II by what it logs: a green, amber or red light per signal, with the reason.

`RULES` is the one table of thresholds; docs/watch.md shows it. A signal that the method does not have has no light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from purld.evaluation.recorded import Row
from purld.methods.label_limits import UNIFORM_ENTROPY
from purld.report.run_data import RunData
from purld.training.limits import (
    COLLAPSED_SPREAD,
    MOST_TRUNCATED,
    UNMOVED_KL,
    label_uniformity,
    loses_spread_by_success,
)

Colour = Literal["green", "amber", "red", "grey"]

_WINDOW = 0.1  # of the steps logged so far are averaged, at the start and at the end
_MIN_WINDOW = 5  # steps; a comparison with the start needs twice as many


@dataclass(frozen=True)
class Bound:
    """The limits on one side of a signal, with what it means to be beyond them and what to do.

    Attributes:
        amber: the limit of amber.
        red: the limit of red; None if this side is never red.
        reason: a clause for the page.
    """

    amber: float
    red: float | None
    reason: str


@dataclass(frozen=True)
class HealthRule:
    """A row of the table: a signal, how it is measured, and its limits.

    Attributes:
        name: the signal's name on the page.
        metric: the logged metric without which the rule has no light.
        unit: what the value is, after the number.
        measure: returns the value from the logged steps and the configuration; None if it cannot be told yet.
        low: the limits below; None if a low value is never bad.
        high: the limits above; None if a high value is never bad.
        why: why the limits are where they are, for the docs.
    """

    name: str
    metric: str
    unit: str
    measure: Callable[[Sequence[Row], Mapping[str, Any]], float | None]
    low: Bound | None
    high: Bound | None
    why: str


@dataclass(frozen=True)
class Light:
    """One signal's light on the page: its colour, the value in words, and the reason."""

    name: str
    colour: Colour
    value: str
    reason: str


@dataclass(frozen=True)
class GoldAuc:
    """The AUC within prompts of the newest groups' scores against gold, with its 95% interval."""

    value: float
    low: float
    high: float
    groups: int


def _latest(rows: Sequence[Row], key: str) -> float | None:
    """Return the mean of the last steps that logged `key`."""
    values = [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    window = values[-max(_MIN_WINDOW, int(_WINDOW * len(values))) :]
    return sum(window) / len(window) if window else None


def _against_start(rows: Sequence[Row], key: str) -> float | None:
    """Return the mean of the last steps over that of the first; None before there are enough of both."""
    values = [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    size = max(_MIN_WINDOW, int(_WINDOW * len(values)))
    if len(values) < 2 * size:
        return None
    start, end = sum(values[:size]), sum(values[-size:])
    return end / start if start else (0.0 if end == 0 else None)  # scores that never differed have lost everything


def _label_entropy(rows: Sequence[Row], align: Mapping[str, Any]) -> float | None:
    group = align.get("candidates", 0) + align.get("anchor_in_group", False)  # the anchor has a label of its own
    return _latest([{"share": label_uniformity(row, group)} for row in rows], "share")


def _kl_per_token(rows: Sequence[Row], align: Mapping[str, Any]) -> float | None:
    divergence, length = _latest(rows, "kl"), _latest(rows, "length")
    return divergence / length if divergence is not None and length else None


def _movement(rows: Sequence[Row], align: Mapping[str, Any]) -> float | None:
    """Return the size of KL(θ‖SFT) per answer once a quarter of the steps are done; it begins at zero."""
    if not rows or rows[-1]["step"] < align.get("steps", 0) / 4 or len(rows) < 2 * _MIN_WINDOW:
        return None
    divergence = _latest(rows, "kl")
    return None if divergence is None else abs(divergence)


def _gain(rows: Sequence[Row], align: Mapping[str, Any]) -> float | None:
    """Return the gain over the SFT model in the last quarter of the steps, at least ten, over the scores' spread."""
    measured = [row for row in rows if row.get("gain") is not None and row.get("score_spread") is not None]
    last = measured[-max(2 * _MIN_WINDOW, len(measured) // 4) :]
    spread = sum(row["score_spread"] for row in last)
    return sum(row["gain"] for row in last) / spread if spread > 0 and len(last) >= 2 * _MIN_WINDOW else None


def _score_spread(rows: Sequence[Row], align: Mapping[str, Any]) -> float | None:
    return None if loses_spread_by_success(align.get("score")) else _against_start(rows, "score_spread")


def _truncated_share(rows: Sequence[Row], align: Mapping[str, Any]) -> float | None:
    cut, drawn = _latest(rows, "truncated"), _latest(rows, "drawn")
    if drawn is None:  # a run of an earlier version; of a small pool a step has fewer prompts than this
        drawn = align.get("candidates", 0) * align.get("prompts_per_step", 0)
    return None if cut is None or not drawn else cut / drawn


RULES = (
    HealthRule(
        "Entropy of D",
        "entropy_labels",
        "of ln K",
        _label_entropy,
        low=Bound(0.2, 0.05, "the labels name a single candidate; lower align.gamma or raise align.tau"),
        high=Bound(0.99, UNIFORM_ENTROPY, "the labels hardly tell the candidates apart, so there is little to learn"),
        why="Red above: the probe refuses to start from labels this uniform. In the demo, which learns, the entropy "
        "goes from 0.91 to 0.97. Below, the update copies one candidate per prompt, whatever the others are worth.",
    ),
    HealthRule(
        "KL from SFT",
        "kl",
        "nats per token",
        _kl_per_token,
        low=None,
        high=Bound(0.1, 0.3, "the policy is leaving the SFT model; lower align.learning_rate or raise align.beta"),
        why="Demo runs end between 0.003 and 0.007. A run that collapsed on its shortest candidate had 25 nats on an "
        "answer of a dozen tokens, 2 per token.",
    ),
    HealthRule(
        "Movement",
        "kl",
        "nats per answer",
        _movement,
        low=Bound(UNMOVED_KL, None, "the policy has hardly moved from SFT; raise align.learning_rate"),
        high=None,
        why="The limit of the warning at the end of the stage. Judged from a quarter of the steps on, because it "
        "begins at zero.",
    ),
    HealthRule(
        "Gain",
        "gain",
        "of the scores' spread",
        _gain,
        low=Bound(0.0, -0.1, "the candidates score less than the SFT model's would; lower align.learning_rate"),
        high=None,
        why="Ten demos, which gained 0.02 to 0.08 in accuracy, ended at 0.13 to 0.35; those in counting began between "
        "-0.03 and 0.05. A real student that too high a rate led astray was at -0.5 after ten steps.",
    ),
    HealthRule(
        "Answer length",
        "length",
        "of the length at the start",
        lambda rows, _: _against_start(rows, "length"),
        low=Bound(0.7, 0.5, "answers are getting shorter; see whether they still answer"),
        high=Bound(1.4, 2.0, "answers are getting longer; see whether the additions are worth it"),
        why="The demo stays within a tenth. The limits are a choice: a drift by two fifths is worth a look at the "
        "answers, and a factor of two has to be meant.",
    ),
    HealthRule(
        "Score spread",
        "score_spread",
        "of the spread at the start",
        _score_spread,
        low=Bound(0.3, COLLAPSED_SPREAD, "the candidates' scores grow alike, so there is less to learn from"),
        high=None,
        why="Red is the limit of the warning at the end of the stage. Demo runs keep 0.76 to 1: as more answers "
        "are right, their scores grow alike. Agreement with the anchor has no light: where nearly all agree, it has no "
        "spread.",
    ),
    HealthRule(
        "Cut off",
        "truncated",
        "of the candidates",
        _truncated_share,
        low=None,
        high=Bound(
            0.02, MOST_TRUNCATED, "candidates meet the limit of align.max_new_tokens, and are scored without their end"
        ),
        why="Red is the limit of the warning at the end of the stage.",
    ),
)


def health_lights(run: RunData, gold: GoldAuc | None = None) -> list[Light]:
    """Return the lights of a run's Stage II, in the order of the table; empty before its first step.

    Args:
        run: the run.
        gold: how well the newest scores agree with gold, where there is gold.
    """
    rows = [row for row in run.stage_metrics("align") if "objective" in row or "dropped_groups" in row]
    if not rows:
        return []
    align = run.config.get("align") or {}
    lights = [_judge(rule, rule.measure(rows, align)) for rule in RULES if any(rule.metric in r for r in rows)]
    return [*lights, _gold_light(gold)] if gold is not None else lights


def _judge(rule: HealthRule, value: float | None) -> Light:
    """Return the light of a value, with the reason of the side on which it is beyond its limits."""
    if value is None:
        return Light(rule.name, "grey", "–", "too early to say")
    shown = f"{value:.2g} {rule.unit}"
    if rule.low is not None and value < rule.low.amber:
        red = rule.low.red is not None and value < rule.low.red
        return Light(rule.name, "red" if red else "amber", shown, rule.low.reason)
    if rule.high is not None and value > rule.high.amber:
        red = rule.high.red is not None and value > rule.high.red
        return Light(rule.name, "red" if red else "amber", shown, rule.high.reason)
    return Light(rule.name, "green", shown, _limits(rule))


def _limits(rule: HealthRule) -> str:
    """Return the range of green in words."""
    if rule.low is not None and rule.high is not None:
        return f"between {rule.low.amber:g} and {rule.high.amber:g}"
    return f"above {rule.low.amber:g}" if rule.low is not None else f"below {rule.high.amber:g}" if rule.high else ""


GOLD_WHY = "Chance is 0.5: red if the whole 95% interval is below it, amber if it holds it, green if it is above."


def _gold_light(gold: GoldAuc) -> Light:
    shown = f"{gold.value:.2f} [{gold.low:.2f}, {gold.high:.2f}] within prompts"
    if gold.high < 0.5:
        return Light("AUC against gold", "red", shown, "right candidates score below wrong ones; change align.score")
    if gold.low <= 0.5:
        reason = "not told apart from chance on the newest groups"
        return Light("AUC against gold", "amber", shown, reason)
    return Light("AUC against gold", "green", shown, f"above chance on the newest {gold.groups} groups")
