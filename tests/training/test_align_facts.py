"""What Stage II says to look at afterwards."""

import math

import pytest

from purld.config.methods import LdlGrpo
from purld.training.align import AlignFacts, _facts


@pytest.mark.parametrize(("kl", "unmoved"), [(1e-4, True), (-1e-4, True), (0.2, False), (-0.05, False), (None, False)])
def test_a_policy_that_hardly_moved_is_told_and_an_estimate_below_zero_is_no_sign_of_it(kl, unmoved):
    facts = AlignFacts(4, 8, 128, 0, 0, 0, 0, 0.0, "lower the rate", kl=kl)
    assert any("hardly moved" in warning for warning in facts.warnings) is unmoved


def test_the_kl_before_the_first_update_says_nothing():
    steps = [{"step": 1, "objective": 0.5, "kl": 0.0}, *({"step": n, "objective": 0.5} for n in (2, 3, 4))]
    assert _facts(steps, LdlGrpo(), 4, 4).kl is None
    assert _facts([*steps, {"step": 5, "objective": 0.5, "kl": 0.3}], LdlGrpo(), 4, 5).kl == 0.3


def test_scores_that_agree_at_last_have_not_collapsed():
    """The spread of right and wrong goes where nearly all are right; of other scores it says that they say nothing."""
    steps = [{"step": n, "objective": 0.5, "score_spread": 0.5 if n < 5 else 0.01} for n in range(1, 9)]
    told = {
        score: any("scores collapsed" in warning for warning in _facts(steps, LdlGrpo(score=score), 4, 8).warnings)
        for score in ("agreement", "in_context")
    }
    assert told == {"agreement": False, "in_context": True}


def test_uniform_labels_are_told_whatever_number_of_candidates_has_a_score():
    """Steps of groups of 5 of 8, with the share of ln 5; a step of an earlier version has nats alone."""
    row = {"step": 1, "objective": 0.5, "entropy_labels": math.log(5)}
    facts = _facts([row | {"label_uniformity": 1.0}], LdlGrpo(candidates=8), 4, 1)
    assert facts.label_entropy == 1.0 and any("the labels stayed uniform" in warning for warning in facts.warnings)
    older = _facts([row | {"entropy_labels": 0.5 * math.log(8)}], LdlGrpo(candidates=8), 4, 1)
    assert older.label_entropy == pytest.approx(0.5)
    assert _facts([{"step": 1, "objective": 0.5}], LdlGrpo(), 4, 1).label_entropy is None
