"""Diversity of answers, by hand."""

from __future__ import annotations

import pytest

from purld.evaluation.diagnostics import distinct_2, unique_answer_rate


def test_distinct_2_counts_pairs_within_a_text() -> None:
    """ "a b a b" has ab, ba, ab; "A B" has ab again: 2 different of 4. "b | a" over the border is no pair."""
    assert distinct_2(["a b a b", "A B"]) == 0.5


@pytest.mark.parametrize("texts", [[], [""], ["one", "two"]])
def test_without_pairs_there_is_no_share(texts: list[str]) -> None:
    assert distinct_2(texts) is None


def test_unique_answers_go_from_one_repeated_to_all_different() -> None:
    assert unique_answer_rate([["x", "x", "x"]]) == 0.0
    assert unique_answer_rate([["x", "y", "z"]]) == 1.0
    assert unique_answer_rate([["x", "x", "y"], ["x", "x", "x"]]) == 0.25
    assert unique_answer_rate([["alone"]]) is None
    assert unique_answer_rate([["alone"], ["x", "y"]]) == 1.0
