"""Scorers that need no model: agreement with the anchor's result, and the teacher."""

from purld.clients.base import Reply
from purld.config.schema import Data
from purld.records import Prompt
from purld.tasks.checks import find_check
from purld.training.scoring import AgreementScorer, GroupToScore, TeacherScorer

MATH, CHOICE = (find_check(Data(prompts="unused", check=name)) for name in ("math", "choice"))


def group(anchor, *candidates, **fields):
    return GroupToScore(Prompt.from_text("How many?", **fields), anchor, candidates)


def test_a_candidate_agrees_if_its_result_is_the_anchors():
    (scores,) = AgreementScorer(MATH)(
        [group("7 + 3 = 10. The answer is 10.", "It is $\\boxed{10}$.", "7 + 3 = 9. The answer is 9.", "I cannot say.")]
    )
    assert (scores.anchor, scores.candidates) == (1.0, [1.0, 0.0, 0.0])


def test_gold_is_not_read():
    """The anchor is wrong here; a candidate that agrees with gold does not agree with the anchor."""
    (scores,) = AgreementScorer(MATH)([group("The answer is 11.", "The answer is 10.", "It is 11.", reference="10")])
    assert scores.candidates == [0.0, 1.0]


def test_an_anchor_without_a_result_leaves_its_group_unscored():
    scored = AgreementScorer(MATH)([group("I will not answer this.", "10", "11"), group("10", "10", "11")])
    assert (scored[0].anchor, scored[0].candidates) == (None, [None, None])
    assert (scored[1].anchor, scored[1].candidates) == (1.0, [1.0, 0.0])


def test_a_candidate_gains_nothing_by_repeating_a_refusal():
    refusal = "I'm sorry, I can't help with that."
    (scores,) = AgreementScorer(MATH)([group(refusal, refusal, "The answer is 10.")])
    assert (scores.anchor, scores.candidates) == (None, [None, None])


def test_an_anchor_that_chooses_no_option_leaves_its_group_unscored():
    choices = {"choices": ["ten", "eleven"]}
    groups = [group(anchor, "A", "eleven", metadata=choices) for anchor in ("I cannot say.", "The answer is A.")]
    scored = AgreementScorer(CHOICE)([*groups, group("The answer is A.", "A")])
    assert [s.candidates for s in scored] == [[None, None], [1.0, 0.0], [None]]


class Replying:
    """A teacher's client with replies of its own."""

    def __init__(self, *replies):
        self.replies = replies

    def ask(self, prompts, on_reply=None):
        assert len(prompts) == len(self.replies)
        return list(self.replies)


def test_a_teachers_number_that_its_limit_cuts_is_no_score():
    texts = ["**Score**: 0.", "Score: 1 out of 1", "<think>It is.</think>\n0.8", "0.8 because the", "0.8"]
    replies = [Reply("truncated", text, "length") for text in texts[:4]] + [Reply("answered", texts[4], "stop")]
    (scores,) = TeacherScorer(Replying(*replies))([group("10", *"abcde")])
    assert scores.candidates == [None, None, None, 0.8, 0.8]
