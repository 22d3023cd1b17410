"""Test the sentence at the top of the page: what it may claim from which results."""

from __future__ import annotations

from typing import Any

import pytest
from synthetic import Build

from purld.report.headline import write_headline
from purld.report.run_data import RunData, read_run
from purld.runs.files import read_json, write_json
from purld.runs.run_dir import RunDir


def judged(run: RunDir, **difference: Any) -> RunData:
    """Return the run with the given difference to SFT."""
    results = read_json(run.results)
    write_json(run.results, results | {"difference": {"ldl_grpo - sft": difference} if difference else {}})
    return read_run(run)


def test_better_only_when_the_interval_excludes_zero(build: Build) -> None:
    sentence = write_headline(judged(build(), accuracy=0.062, accuracy_ci=[0.031, 0.095]))
    assert sentence.tone == "better"
    assert sentence.text == (
        "LDL-GRPO is better than SFT: 74.5% right answers against 68.3%, a difference of +6.2 points "
        "(95% interval +3.1 to +9.5) over 300 held-out prompts."
    )


def test_an_interval_with_zero_in_it_claims_nothing(build: Build) -> None:
    sentence = write_headline(judged(build(), accuracy=0.02, accuracy_ci=[-0.01, 0.05]))
    assert sentence.tone == "open"
    assert sentence.text.startswith("LDL-GRPO and SFT cannot be told apart: ")
    assert "−1.0 to +5.0" in sentence.text


def test_an_interval_that_touches_zero_claims_nothing(build: Build) -> None:
    assert write_headline(judged(build(), accuracy=0.02, accuracy_ci=[0.0, 0.05])).tone == "open"


def test_a_loss_is_called_a_loss(build: Build) -> None:
    sentence = write_headline(judged(build(), accuracy=-0.1, accuracy_ci=[-0.15, -0.05]))
    assert sentence.tone == "worse"
    assert sentence.text.startswith("LDL-GRPO is worse than SFT: ")
    assert "−10.0 points" in sentence.text


def test_a_second_metric_that_disagrees_is_not_left_out(build: Build) -> None:
    sentence = write_headline(
        judged(
            build(),
            accuracy=0.06,
            accuracy_ci=[0.03, 0.09],
            greedy_accuracy=-0.05,
            greedy_accuracy_ci=[-0.08, -0.02],
        )
    )
    assert sentence.tone == "mixed"
    assert sentence.claim == "LDL-GRPO is better than SFT sampled, but worse greedy"
    assert sentence.numbers == (
        "sampled, 74.5% right answers against 68.3%, a difference of +6.0 points (95% interval +3.0 to +9.0); greedy, "
        "88.0% against 85.7%, −5.0 points (−8.0 to −2.0); over 300 held-out prompts."
    )
    assert sentence.text == f"{sentence.claim}: {sentence.numbers}"


_INTERVALS = {"better": [0.01, 0.05], "open": [-0.01, 0.05], "worse": [-0.05, -0.01]}


@pytest.mark.parametrize("greedy", _INTERVALS)
@pytest.mark.parametrize("sampled", _INTERVALS)
def test_sampled_and_greedy_are_claimed_together(build: Build, sampled: str, greedy: str) -> None:
    difference = {"accuracy": 0.02, "accuracy_ci": _INTERVALS[sampled]}
    difference |= {"greedy_accuracy": 0.02, "greedy_accuracy_ci": _INTERVALS[greedy]}
    sentence = write_headline(judged(build(held_out=1, groups=1, logged=False), **difference))
    word = {"better": "better", "open": "cannot be told apart", "worse": "worse"}
    before, _, after = sentence.claim.partition("sampled")
    if sampled == greedy:
        assert word[sampled] in before and "greedy" in after and sentence.tone == sampled
    else:
        assert word[sampled] in before and word[greedy] in after and "greedy" in after
        assert sentence.tone == ("mixed" if "open" not in (sampled, greedy) else ({sampled, greedy} - {"open"}).pop())


def test_judged_wins_that_contradict_are_not_left_out(build: Build) -> None:
    difference = {"accuracy": 0.06, "accuracy_ci": [0.03, 0.09], "win_rate": -0.05, "win_rate_ci": [-0.08, -0.02]}
    assert write_headline(judged(build(), **difference)).text.endswith("; but −5.0 points in wins (−8.0 to −2.0).")


def test_win_rates_speak_where_there_is_no_gold(build: Build) -> None:
    sentence = write_headline(judged(build(), lc_win_rate=0.05, lc_win_rate_ci=[0.01, 0.09]))
    assert sentence.tone == "better"
    assert "41.4% length-controlled wins against 35.5%" in sentence.text


def test_without_a_paired_difference_no_claim_is_made(build: Build) -> None:
    sentence = write_headline(judged(build()))
    assert sentence.tone == "open"
    assert "was not measured" in sentence.text
    assert "LDL-GRPO 74.5% (70.4% to 78.3%), SFT 68.3%" in sentence.text


def test_sft_alone_is_compared_with_the_base(build: Build) -> None:
    run = build()
    results = read_json(run.results)
    del results["models"]["ldl_grpo"], results["difference"]["ldl_grpo - sft"]
    write_json(run.results, results | {"method": "sft"})
    assert write_headline(read_run(run)).text.startswith("SFT is better than Base: 68.3% right answers against 41.2%")


@pytest.mark.parametrize("models", [{}, {"ldl_grpo": {"n": 5}}])
def test_nothing_measured_nothing_said(build: Build, models: dict[str, Any]) -> None:
    run = build()
    write_json(run.results, {"method": "ldl_grpo", "models": models})
    sentence = write_headline(read_run(run))
    assert sentence.tone == "none"
    assert "better" not in sentence.text
