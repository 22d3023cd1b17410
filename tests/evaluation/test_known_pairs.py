"""Spoiled answers differ from the original in the way that their name says, and are the same for the same seed."""

import random
import re

import pytest

from purld.evaluation.known_pairs import SPOILERS, spoil_answer

TEXT = "Anna bought 7 pencils in Vienna. She had 3 pencils before. So 7 + 3 = 10 pencils are hers."


def spoil(name: str, text: str, seed: int = 0) -> str | None:
    return SPOILERS[name](text, random.Random(seed))


@pytest.mark.parametrize("seed", range(8))
def test_one_number_changes_wherever_it_stands(seed: int) -> None:
    changed = spoil("number", TEXT, seed)
    assert changed is not None
    before, after = re.findall(r"\d+", TEXT), re.findall(r"\d+", changed)
    differing = {b for b, a in zip(before, after, strict=True) if a != b}
    assert len(differing) == 1
    assert re.sub(r"\d+", "#", changed) == re.sub(r"\d+", "#", TEXT)
    assert all(a != b for b, a in zip(before, after, strict=True) if b in differing)


def test_a_number_of_any_size_changes() -> None:
    for text in ("0", "It is 5000000000000000000000000.", "1/2"):
        assert spoil("number", text) not in (None, text)


def test_a_name_within_a_sentence_changes() -> None:
    changed = spoil("name", TEXT)
    assert changed is not None and "Vienna" not in changed and changed.startswith("Anna bought 7 pencils in ")


def test_a_verb_is_negated_once() -> None:
    assert spoil("negation", "Paris is in France.") == "Paris is not in France."
    assert spoil("negation", "Paris is not in Spain.") is None


def test_two_neighbouring_sentences_swap() -> None:
    assert spoil("order", "One came. Two left.") == "Two left. One came."
    assert spoil("order", "One came.") is None


def test_the_end_is_cut_off() -> None:
    changed = spoil("end", TEXT)
    assert changed is not None and TEXT.startswith(changed) and 0.3 < len(changed) / len(TEXT) < 0.8
    assert spoil("end", "Yes it is.") is None


def test_what_does_not_apply_is_absent_and_seeds_repeat() -> None:
    assert set(spoil_answer(TEXT, "a")) == set(SPOILERS)
    assert spoil_answer("Yes.", "a") == {}
    assert spoil_answer(TEXT, "a") == spoil_answer(TEXT, "a")
    assert len({tuple(spoil_answer(TEXT, str(seed)).items()) for seed in range(20)}) > 1
