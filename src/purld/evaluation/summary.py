"""Turn answers and verdicts into the metrics of results.json. A metric that was not measured is absent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purld.evaluation.accuracy import accuracy_with_interval, paired_difference
from purld.evaluation.diagnostics import distinct_2, unique_answer_rate
from purld.evaluation.intervals import Interval
from purld.evaluation.judge import average_preferences
from purld.evaluation.winrate import length_controlled_difference, summarize
from purld.records import Generation, Verdict


@dataclass(frozen=True)
class EvaluatedModel:
    """One model's answers to the held-out prompts, with checks and verdicts.

    Attributes:
        generations: the answers, prompt by prompt, sample by sample.
        correct: (prompts, samples) whether each answer is right; None without a check.
        greedy_correct: (prompts, 1) the same for greedy answers.
        verdicts: the judge's verdicts on the first sample of each prompt.
    """

    generations: Sequence[Generation]
    correct: NDArray[np.bool_] | None = None
    greedy_correct: NDArray[np.bool_] | None = None
    verdicts: Sequence[Verdict] = field(default_factory=tuple)


def model_metrics(model: EvaluatedModel, opponents: Mapping[str, str], seed: int) -> dict[str, Any]:
    """Return the metrics of one model, named as in results.json.

    Args:
        model: the model's answers.
        opponents: the opponent's answers by prompt id.
        seed: seed of the bootstrap.
    """
    metrics: dict[str, Any] = {
        "n": len({g.prompt_id for g in model.generations}),
        "mean_tokens": round(float(np.mean([g.tokens for g in model.generations])), 2),
        "unfinished": sum(not g.finished for g in model.generations),
        **_diversity(model.generations),
    }
    if thinking := sum(g.thinking is not None for g in model.generations):
        metrics["thinking"] = thinking
    for name, correct in (("accuracy", model.correct), ("greedy_accuracy", model.greedy_correct)):
        if correct is not None:
            metrics |= with_interval(name, *accuracy_with_interval(correct))
    if model.verdicts:
        metrics |= _win_rates(model, opponents, seed)
    return metrics


def model_difference(
    ours: EvaluatedModel, theirs: EvaluatedModel, opponents: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """Return one model's metrics minus another's on the same prompts, with paired intervals.

    `accuracy_p` is the p-value of McNemar's test, present with one answer per prompt. Win rates are compared on the
    `judged_both` prompts that were judged for both models.

    Args:
        ours, theirs: the answers of the two models to the same prompts in the same order.
        opponents: the opponent's answers that both were judged against, by prompt id.
        seed: seed of the bootstrap.
    """
    difference: dict[str, Any] = {}
    pairs = {
        "accuracy": (ours.correct, theirs.correct),
        "greedy_accuracy": (ours.greedy_correct, theirs.greedy_correct),
    }
    for name, (a, b) in pairs.items():
        if a is not None and b is not None:
            paired = paired_difference(a, b, seed)
            difference |= with_interval(name, paired.mean, paired.interval)
            if paired.p_value is not None:
                difference[f"{name}_p"] = float(f"{paired.p_value:.4g}")
    return difference | _win_rate_difference(ours, theirs, opponents, seed)


def with_interval(name: str, value: float, interval: Interval) -> dict[str, Any]:
    """Return a value and its interval, rounded, under their names in results.json."""
    return {name: round(value, 6), f"{name}_ci": [round(bound, 6) for bound in interval]}


def _diversity(generations: Sequence[Generation]) -> dict[str, float]:
    samples: dict[str, list[str]] = defaultdict(list)
    for generation in generations:
        samples[generation.prompt_id].append(generation.text)
    diversity = {
        "distinct_2": distinct_2([g.text for g in generations]),
        "unique_answers": unique_answer_rate(list(samples.values())),
    }
    return {name: round(value, 4) for name, value in diversity.items() if value is not None}


def _win_rates(model: EvaluatedModel, opponents: Mapping[str, str], seed: int) -> dict[str, Any]:
    preferences = average_preferences(model.verdicts)
    metrics: dict[str, Any] = {
        "judged": sum(w is not None for w in preferences.wins.values()),
        "unjudged": preferences.unjudged,
        "asked_again": preferences.asked_again,
    }
    if preferences.reasons:
        metrics["unjudged_reasons"] = dict(sorted(preferences.reasons.items()))
    if preferences.thinking:
        metrics["judge_thinking"] = preferences.thinking
    if preferences.flip_rate is not None:
        metrics["flip_rate"] = round(preferences.flip_rate, 4)
    if not metrics["judged"]:
        return metrics
    wins = {prompt_id: won for prompt_id, won in preferences.wins.items() if won is not None}
    lengths = _judged_lengths(model)
    rates = summarize(list(wins.values()), [len(opponents[i]) for i in wins], [lengths[i] for i in wins], seed=seed)
    metrics |= with_interval("win_rate", rates.win_rate, rates.win_rate_ci)
    metrics |= with_interval("lc_win_rate", rates.lc_win_rate, rates.lc_win_rate_ci)
    if rates.matched is not None:
        metrics["matched"] = rates.matched.n
        metrics |= with_interval("matched_win_rate", rates.matched.win_rate, rates.matched.win_rate_ci)
    if rates.length_ratio is not None:
        metrics["length_ratio"] = round(rates.length_ratio, 4)
    return metrics | {"overlap": round(rates.overlap, 4)}


def _win_rate_difference(
    ours: EvaluatedModel, theirs: EvaluatedModel, opponents: Mapping[str, str], seed: int
) -> dict[str, Any]:
    a, b = average_preferences(ours.verdicts).wins, average_preferences(theirs.verdicts).wins
    both = [i for i, wins in a.items() if wins is not None and b.get(i) is not None]
    if not both:
        return {}
    our_wins, their_wins = np.array([a[i] for i in both], float), np.array([b[i] for i in both], float)
    paired = paired_difference(our_wins, their_wins, seed)
    our_lengths, their_lengths = _judged_lengths(ours), _judged_lengths(theirs)
    controlled = length_controlled_difference(
        our_wins,
        their_wins,
        [len(opponents[i]) for i in both],
        [our_lengths[i] for i in both],
        [their_lengths[i] for i in both],
        seed,
    )
    return {
        "judged_both": len(both),
        **with_interval("win_rate", paired.mean, paired.interval),
        **with_interval("lc_win_rate", *controlled),
    }


def _judged_lengths(model: EvaluatedModel) -> dict[str, int]:
    """Return by prompt id the length in characters of the answer that was judged."""
    return {g.prompt_id: len(g.text) for g in model.generations if g.sample == 0}
