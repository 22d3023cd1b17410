"""From answers and verdicts to the numbers of results.json. A metric that was not measured is absent."""

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
    """One model's answers to the held-out prompts and what is known of them.

    Attributes:
        generations: prompt by prompt, sample by sample.
        correct: (prompts, samples) whether each is right; None without a check.
        greedy_correct: (prompts, 1) the same for greedy answers.
        verdicts: the judge's, on the first sample of each prompt.
    """

    generations: Sequence[Generation]
    correct: NDArray[np.bool_] | None = None
    greedy_correct: NDArray[np.bool_] | None = None
    verdicts: Sequence[Verdict] = field(default_factory=tuple)


def model_metrics(model: EvaluatedModel, opponents: Mapping[str, str], seed: int) -> dict[str, Any]:
    """The row of one model in results.json."""
    metrics: dict[str, Any] = {
        "n": len({g.prompt_id for g in model.generations}),
        "mean_tokens": round(float(np.mean([g.tokens for g in model.generations])), 2),
        "unfinished": sum(not g.finished for g in model.generations),
        **_diversity(model.generations),
    }
    for name, correct in (("accuracy", model.correct), ("greedy_accuracy", model.greedy_correct)):
        if correct is not None:
            metrics |= with_interval(name, *accuracy_with_interval(correct))
    if model.verdicts:
        metrics |= _win_rates(model, opponents, seed)
    return metrics


def model_difference(
    ours: EvaluatedModel, theirs: EvaluatedModel, opponents: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """How much better one model is than another on the same prompts, with paired intervals.

    `accuracy_p` is McNemar's, where there is one answer per prompt. Win rates are compared on the prompts that
    were judged on both sides, `judged_both` of them.

    Args:
        ours, theirs: two models' answers to the same prompts in the same order.
        opponents: the answers that both were judged against, by prompt id.
        seed: of the bootstrap.
    """
    found: dict[str, Any] = {}
    pairs = {
        "accuracy": (ours.correct, theirs.correct),
        "greedy_accuracy": (ours.greedy_correct, theirs.greedy_correct),
    }
    for name, (a, b) in pairs.items():
        if a is not None and b is not None:
            paired = paired_difference(a, b, seed)
            found |= with_interval(name, paired.mean, paired.interval)
            if paired.p_value is not None:
                found[f"{name}_p"] = float(f"{paired.p_value:.4g}")
    return found | _win_rate_difference(ours, theirs, opponents, seed)


def with_interval(name: str, value: float, interval: Interval) -> dict[str, Any]:
    """A number and its interval under the names that results.json gives them."""
    return {name: round(value, 6), f"{name}_ci": [round(bound, 6) for bound in interval]}


def _diversity(generations: Sequence[Generation]) -> dict[str, float]:
    samples: dict[str, list[str]] = defaultdict(list)
    for generation in generations:
        samples[generation.prompt_id].append(generation.text)
    found = {
        "distinct_2": distinct_2([g.text for g in generations]),
        "unique_answers": unique_answer_rate(list(samples.values())),
    }
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def _win_rates(model: EvaluatedModel, opponents: Mapping[str, str], seed: int) -> dict[str, Any]:
    said = average_preferences(model.verdicts)
    found: dict[str, Any] = {
        "judged": sum(w is not None for w in said.wins.values()),
        "unjudged": said.unjudged,
        "asked_again": said.asked_again,
    }
    if said.flip_rate is not None:
        found["flip_rate"] = round(said.flip_rate, 4)
    if not found["judged"]:
        return found
    wins = {prompt_id: won for prompt_id, won in said.wins.items() if won is not None}
    lengths = _lengths(model)
    rates = summarize(list(wins.values()), [len(opponents[i]) for i in wins], [lengths[i] for i in wins], seed=seed)
    found |= with_interval("win_rate", rates.win_rate, rates.win_rate_ci)
    found |= with_interval("lc_win_rate", rates.lc_win_rate, rates.lc_win_rate_ci)
    if rates.matched is not None:
        found["matched"] = rates.matched.n
        found |= with_interval("matched_win_rate", rates.matched.win_rate, rates.matched.win_rate_ci)
    if rates.length_ratio is not None:
        found["length_ratio"] = round(rates.length_ratio, 4)
    return found | {"overlap": round(rates.overlap, 4)}


def _win_rate_difference(
    ours: EvaluatedModel, theirs: EvaluatedModel, opponents: Mapping[str, str], seed: int
) -> dict[str, Any]:
    a, b = average_preferences(ours.verdicts).wins, average_preferences(theirs.verdicts).wins
    both = [i for i, wins in a.items() if wins is not None and b.get(i) is not None]
    if not both:
        return {}
    our_wins, their_wins = np.array([a[i] for i in both], float), np.array([b[i] for i in both], float)
    paired = paired_difference(our_wins, their_wins, seed)
    our_lengths, their_lengths = _lengths(ours), _lengths(theirs)
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


def _lengths(model: EvaluatedModel) -> dict[str, int]:
    """By prompt id, the characters of the answer that was judged."""
    return {g.prompt_id: len(g.text) for g in model.generations if g.sample == 0}
