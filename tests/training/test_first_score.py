"""A stage in which nothing gets a score ends early, and one in which anything has does not."""

import pytest

from purld import ranks
from purld.config.methods import LdlGrpo, SelfPpo, TeacherJudgeGrpo
from purld.errors import UserError
from purld.methods.table import METHODS
from purld.model.self_evaluation import GroupScores
from purld.training.first_score import FirstScore
from purld.training.scoring import awaits_scores

TEACHER = TeacherJudgeGrpo(method="teacher_judge_grpo")
VERBAL = SelfPpo(method="self_ppo", score="verbal")


def unscored(count):
    return [GroupScores(None, [None] * count)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (TEACHER, "purld ledger RUN --export FILE writes what it said, or that it did not answer"),
        (VERBAL, "align.score=expected"),
        (LdlGrpo(score="reference"), "align.score=expected"),
        (LdlGrpo(score="expected"), "align.score=in_context"),
    ],
)
def test_thirty_two_without_a_score_end_the_stage(settings, words):
    first = FirstScore(settings, awaited=True)
    first.note(unscored(31))
    with pytest.raises(UserError, match=words):
        first.note(unscored(1))


def test_after_a_single_score_nothing_ends_it():
    first = FirstScore(TEACHER, awaited=True)
    first.note([*unscored(30), GroupScores(None, [None, 0.0])])  # zero is a score
    first.note(unscored(100))


def test_a_stage_that_goes_on_counts_what_it_has_logged():
    again = FirstScore(TEACHER, awaited=True)
    again.continue_from([{"step": 1, "unscored": 16.0}, {"step": 1, "eval_score": 0.5}, {"step": 2, "unscored": 8.0}])
    again.note(unscored(7))
    with pytest.raises(UserError, match="no candidate got a score from the teacher"):
        again.note(unscored(1))
    scored = FirstScore(TEACHER, awaited=True)
    scored.continue_from([{"step": 1, "unscored": 40.0, "score": 0.5}])
    scored.note(unscored(100))


def test_candidates_of_all_ranks_count_and_a_score_of_any(monkeypatch):
    others = [False] * 24
    monkeypatch.setattr(ranks, "gather_rows", lambda rows: [*rows, *others])
    with pytest.raises(UserError, match="no candidate got a score from the teacher"):
        FirstScore(TEACHER, awaited=True).note(unscored(8))
    others[3] = True
    first = FirstScore(TEACHER, awaited=True)
    first.note(unscored(8))
    first.note(unscored(100))


@pytest.mark.parametrize(
    ("settings", "awaits"),
    [
        (TEACHER, True),
        (VERBAL, True),
        (LdlGrpo(score="verbal"), True),
        (LdlGrpo(score="agreement"), False),  # some anchors without a result say nothing of the others
    ],
)
def test_scores_are_awaited_where_candidates_are_asked_about_one_by_one(settings, awaits):
    assert awaits_scores(METHODS[settings.method].stage_two, settings) is awaits
    FirstScore(settings, awaited=False).note(unscored(100))


@pytest.mark.parametrize("method", ["sft_sft", "singlepair_dpo", "self_distillation"])
def test_a_method_without_a_scorer_awaits_none(method):
    assert not awaits_scores(METHODS[method].stage_two, LdlGrpo())
