"""Templates are versioned: a change needs a new version there and a new hash here."""

from purld.records import IMAGE, content_hash
from purld.templates import JUDGE, JUDGE_VERSION, SELF_EVALUATION_VERSION, judge_turn, rating_turn, self_evaluation_turn


def test_versions_stand_for_these_words():
    words = {
        SELF_EVALUATION_VERSION: content_hash(self_evaluation_turn("{q}", "{a}", "{c}")),
        JUDGE_VERSION: content_hash(JUDGE),
    }
    assert words == {"selfeval-1": "e71e78920dcb4b8e", "judge-1": "261e988deb6f111e"}


def test_the_papers_structure():
    text = self_evaluation_turn("Q", "R", "C")
    parts = ["Question:\nQ", "Reference Answer:\nR", "Candidate Answer:\nC", "Scalar Score:"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)


def test_braces_in_texts_are_text():
    assert "{x} {0}" in self_evaluation_turn("{x} {0}", "{anchor}", "{question}")
    assert "{answer_b}" in judge_turn("{question}", "{reference}", "{answer_b}", "{}")


def test_only_the_question_brings_places_of_images():
    marked = f"a{IMAGE}b"
    for text in (self_evaluation_turn(marked, marked, marked), rating_turn(marked, marked), judge_turn(*[marked] * 4)):
        assert text.count(IMAGE) == 1
        assert text.index(IMAGE) < text.index("a b")
