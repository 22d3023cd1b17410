"""Say what puts the result of an evaluation in doubt, one sentence each; the sentences stand at the top of the report.

Pure functions on results, answers and the settings that these were drawn with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from purld.config.schema import Evaluate

_UNFINISHED = 0.1  # of a model's answers
_FLIPPING = 0.5  # of the pairs; a judge that tosses a coin for each order flips as many


def result_doubts(
    results: Mapping[str, Any], answers: Mapping[str, Sequence[str]], kind: str, settings: Evaluate
) -> list[str]:
    """List what puts the results of a run in doubt.

    Args:
        results: the content of results.json, without its warnings.
        answers: by model, from the base on, its answers to the held-out prompts, in one order.
        kind: what the answers are: "greedy answers" or "drawn answers".
        settings: how answers were drawn.
    """
    return [
        *_scores_against_gold(results),
        *_unfinished_answers(results["models"], settings),
        *_unmoved_models(answers, kind),
        *_judge_by_position(results["models"]),
    ]


def _scores_against_gold(results: Mapping[str, Any]) -> list[str]:
    quality = results.get("score_quality", {})
    if "auc_within_ci" not in quality or quality["auc_within_ci"][0] > 0.5:
        return []
    low, high = quality["auc_within_ci"]
    verdict = "ranked worse than chance" if high < 0.5 else "cannot be told apart from chance"
    return [
        f"against gold, the scores of Stage II {verdict}: AUC within prompts {quality['auc_within']:.2f} "
        f"[{low:.2f}, {high:.2f}], and chance is 0.5."
    ]


def _unfinished_answers(models: Mapping[str, Mapping[str, Any]], settings: Evaluate) -> list[str]:
    """Name the trained models of which many answers met the limit on their length."""
    shares = {
        name: metrics["unfinished"] / (metrics["n"] * settings.samples)
        for name, metrics in models.items()
        if name != "base" and metrics.get("unfinished")
    }
    listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share > _UNFINISHED)
    if not listed:
        return []
    return [
        f"many answers were cut off at evaluate.max_new_tokens={settings.max_new_tokens} ({listed}) and are measured "
        "without their end; raise it, unless Stage I warned that answers will not end."
    ]


def _unmoved_models(answers: Mapping[str, Sequence[str]], kind: str) -> list[str]:
    """Name the stages after which a model gives word for word the answers that it gave before."""
    remedies = {"sft": "sft.learning_rate or sft.epochs"}
    return [
        f"all {len(answers[after])} {kind} of {after} to held-out prompts are word for word those of {before}: they "
        f"show nothing learned; raise {remedies.get(after, 'align.learning_rate or align.steps')}."
        for before, after in pairwise(answers)
        if answers[after] and list(answers[before]) == list(answers[after])
    ]


def _judge_by_position(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name the models about which a judge, asked in both orders, mostly contradicted itself."""
    flips = {name: rate for name, metrics in models.items() if (rate := metrics.get("flip_rate", 0.0)) > _FLIPPING}
    if not flips:
        return []
    listed = ", ".join(f"{name} {rate:.0%}" for name, rate in flips.items())
    return [
        f"the judge changed its verdict with the order of the two answers in most pairs ({listed}), so its win rates "
        "say little; take another judge (evaluate.judge)."
    ]
