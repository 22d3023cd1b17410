"""Scorers that need no model: agreement with the anchor's result."""

from purld.config.schema import Data
from purld.records import Prompt
from purld.tasks.checks import find_check
from purld.training.scoring import AgreementScorer, GroupToScore

MATH = find_check(Data(prompts="unused", check="math"))


def group(anchor, *candidates, reference=None):
    return GroupToScore(Prompt.from_text("How many?", reference=reference), anchor, candidates)


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
