"""Test the diversity measures against values computed by hand."""

from __future__ import annotations

import pytest

from purld.evaluation.diagnostics import distinct_2, unique_answer_rate


def test_distinct_2_counts_pairs_within_a_text() -> None:
    """The bigrams of "a b a b" are ab, ba, ab, that of "A B" is ab: 2 distinct of 4. Bigrams do not cross texts."""
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
