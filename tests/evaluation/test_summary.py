"""Test the metrics of results.json on small cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from purld.evaluation.summary import EvaluatedModel, model_difference, model_metrics
from purld.records import Generation, Outcome, Verdict


def evaluated(outcomes: list[Outcome], length: int = 10, correct: list[bool] | None = None) -> EvaluatedModel:
    answers = [Generation(str(i), 0, "x" * length, tokens=length, finished=True) for i in range(len(outcomes))]
    verdicts = [Verdict(str(i), 0, outcome, "", True) for i, outcome in enumerate(outcomes)]
    return EvaluatedModel(answers, None if correct is None else np.array(correct)[:, None], None, verdicts)


def opponents(n: int, length: int = 10) -> dict[str, str]:
    return {str(i): "y" * length for i in range(n)}


def test_rates_lengths_and_their_names() -> None:
    metrics = model_metrics(evaluated(["win", "loss", "win", "unjudged"], length=12), opponents(4), seed=0)
    assert metrics["n"] == 4
    assert (metrics["judged"], metrics["unjudged"], metrics["asked_again"]) == (3, 1, 0)
    assert metrics["win_rate"] == pytest.approx(2 / 3, abs=1e-6)
    assert metrics["matched"] == 3  # 12 against 10 characters is within the band
    assert metrics["matched_win_rate"] == metrics["win_rate"]
    assert metrics["length_ratio"] == 1.2
    assert metrics["overlap"] == 0.0  # every answer is longer than the opponent's
    assert "accuracy" not in metrics


def test_no_comparable_pair_no_matched_rate() -> None:
    metrics = model_metrics(evaluated(["win", "loss"], length=100), opponents(2), seed=0)
    assert not {"matched", "matched_win_rate", "matched_win_rate_ci"} & metrics.keys()


def test_nothing_judged_is_absent() -> None:
    metrics = model_metrics(evaluated(["unjudged"] * 3), opponents(3), seed=0)
    assert metrics["unjudged"] == 3
    assert not {"win_rate", "lc_win_rate", "overlap", "flip_rate"} & metrics.keys()


def test_diversity_needs_something_to_differ() -> None:
    samples = [Generation("p", i, text, 2, True) for i, text in enumerate(["a b", "a b", "c d"])]
    metrics = model_metrics(EvaluatedModel(samples), {}, seed=0)
    assert metrics["distinct_2"] == pytest.approx(2 / 3, abs=1e-4)
    assert metrics["unique_answers"] == 0.5
    assert "unique_answers" not in model_metrics(EvaluatedModel(samples[:1]), {}, seed=0)


def test_a_difference_drops_prompts_that_either_side_lacks() -> None:
    """Prompts 0 and 3 are judged on both sides: one is won by us and lost by them, one tied by both: (1 + 0) / 2."""
    ours = evaluated(["win", "unjudged", "loss", "tie"])
    theirs = evaluated(["loss", "win", "unjudged", "tie"])
    difference = model_difference(ours, theirs, opponents(4), seed=0)
    assert difference["judged_both"] == 2
    assert difference["win_rate"] == 0.5
    assert difference["lc_win_rate"] == pytest.approx(0.5, abs=0.01)  # equal lengths: nothing to control for
    assert difference["win_rate_ci"][0] <= 0.5 <= difference["win_rate_ci"][1]


def test_models_that_were_not_judged_differ_in_nothing_but_gold() -> None:
    ours, theirs = evaluated(["unjudged"] * 8, correct=[True] * 8), evaluated(["win"] * 8, correct=[False] * 8)
    difference = model_difference(ours, theirs, opponents(8), seed=0)
    assert difference["accuracy"] == 1.0
    assert difference["accuracy_p"] == pytest.approx(2 / 2**8, rel=1e-3)
    assert "win_rate" not in difference


def test_a_model_does_not_differ_from_itself() -> None:
    model = evaluated(["win", "loss", "tie", "win"] * 5, correct=[True, False] * 10)
    difference: dict[str, Any] = model_difference(model, model, opponents(20), seed=0)
    assert (difference["win_rate"], difference["lc_win_rate"], difference["accuracy"]) == (0, 0, 0)
    assert difference["lc_win_rate_ci"][0] < 0 < difference["lc_win_rate_ci"][1]
