"""Run one small cell of each kind, and test the scorers that only the experiments have."""

from __future__ import annotations

from pathlib import Path

import mini.work
import numpy as np
import pytest
import torch
from mini import plan
from mini.cells import VARIANTS, Cell, stage_two_cell
from mini.work import (
    MovingEvaluator,
    NoisyScorer,
    TestbedTeacher,
    problems_to_measure_on,
    run_cell,
    stage_one_settings,
)

from purld.model.self_evaluation import GroupScores
from purld.records import Prompt
from purld.templates import rating_turn
from purld.testbed.world.world import generate_problems, teacher_answer
from purld.training.scoring import GroupToScore

SMALL = {"steps": 3, "prompts_per_step": 2, "candidates": 3, "max_new_tokens": 16, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("miniature")


def shrink_cells(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mini.work, "HELD_OUT", 6)
    patch.setattr(mini.work, "STAGE_ONE_STEPS", 2)
    patch.setattr(mini.work, "SAMPLES", {"test": 2, "validation": 2})


@pytest.fixture
def small(monkeypatch):
    shrink_cells(monkeypatch)


@pytest.fixture(scope="module")
def p_sft(folder):
    """The row of the Stage I from which the others start; its weights are in the folder."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_cells(patch)
        return run_cell(Cell("writing", 0, "test", "sft", anchors=8), folder)


def test_a_stage_one_and_what_starts_from_it(folder, p_sft, small):
    """A row has a value per problem; a judging teacher is counted; the same cell gives the same row."""
    assert [len(p_sft["measured"][key]) for key in ("right", "wins", "length", "greedy_right")] == [6] * 4
    assert p_sft["teacher_calls"] == 8
    cell = stage_two_cell("writing", 0, "test", "teacher_judge_grpo", SMALL, anchors=8)
    judged = run_cell(cell, folder)
    assert judged["teacher_calls"] == 8 + 3 * 2 * 3
    again = run_cell(cell, folder)
    del judged["seconds"], again["seconds"], judged["measured"]["seconds"], again["measured"]["seconds"]
    assert judged == again
    assert not list((folder / "work").iterdir())


@pytest.mark.parametrize("row", VARIANTS)
def test_a_row_that_the_paper_does_not_have_runs_by_its_own_settings(row, folder, p_sft, small):
    cell = stage_two_cell("writing", 0, "test", row, SMALL, anchors=8)
    result = run_cell(cell, folder)
    objectives = [step["objective"] for step in result["curve"]]
    assert len(objectives) == 3 and all(np.isfinite(objectives)) and result["teacher_calls"] == 8
    assert (result["score"] is None) == (row == "self_distillation"), "only self-distillation scores nothing"
    assert row in cell.title


def test_noise_and_a_moving_evaluator_change_the_scores_and_nothing_before_them(folder, p_sft, small):
    plain, noisy, moving = (
        run_cell(stage_two_cell("writing", 0, "test", "ldl_grpo", SMALL, anchors=8, **more), folder)["curve"]
        for more in ({}, {"noise": 2.0}, {"evaluator": "moving"})
    )
    assert plain[0]["length"] == noisy[0]["length"] == moving[0]["length"]
    assert plain[0]["score"] == moving[0]["score"] != noisy[0]["score"]
    assert plain[2]["score"] != moving[2]["score"]  # the first step warms up, at a rate of 0


def test_a_stage_two_without_its_stage_one_is_refused(folder):
    with pytest.raises(RuntimeError, match="Stage I is missing"):
        run_cell(stage_two_cell("writing", 7, "test", "sft_sft", SMALL, anchors=8), folder)


@pytest.mark.parametrize("task", plan.TASKS)
def test_validation_problems_are_neither_trained_on_nor_tested_on(task):
    seed = plan.TUNING_SEED
    trained = {p.question for p in generate_problems(task, "train", 512, seed)}
    validation = {p.question for p in problems_to_measure_on(task, "validation", seed)}
    assert len(validation) == 200 and not validation & trained
    for table in plan.SEEDS:
        assert not validation & {p.question for p in problems_to_measure_on(task, "test", table)}


def test_more_anchors_are_read_fewer_times():
    assert stage_one_settings(256).epochs == 16.0
    assert stage_one_settings(2000).epochs == pytest.approx(240 / 113)


def group(*candidates: str) -> GroupToScore:
    return GroupToScore(Prompt.from_text("a question"), "the anchor", candidates)


def constant(groups):
    return [GroupScores(0.5, [0.5 for _ in g.candidates]) for g in groups]


def test_noise_is_the_evaluators_own_opinion():
    """The same text of the same prompt gets the same error in any group; the anchor gets one, too."""
    noisy = NoisyScorer(constant, 1.0, seed=3)
    [first] = noisy([group("a", "b", "a")])
    [second] = noisy([group("b", "the anchor")])
    assert first.candidates[0] == first.candidates[2] != first.candidates[1] == second.candidates[0]
    assert first.anchor == second.anchor == second.candidates[1] != 0.5
    assert NoisyScorer(constant, 1.0, seed=4)([group("a")])[0].candidates != first.candidates[:1]


def test_noise_has_the_deviation_it_was_given():
    [scores] = NoisyScorer(constant, 2.0, seed=0)([group(*map(str, range(4000)))])
    assert np.std(scores.candidates) == pytest.approx(2.0, rel=0.05)
    assert np.mean(scores.candidates) == pytest.approx(0.5, abs=0.15)


def test_what_has_no_score_stays_without_one():
    def nothing(groups):
        return [GroupScores(None, [None]) for _ in groups]

    assert NoisyScorer(nothing, 1.0, seed=0)([group("a")]) == [GroupScores(None, [None])]


def test_a_moving_evaluator_is_the_policy():
    policy = torch.nn.Linear(1, 1)
    with MovingEvaluator(policy).frozen() as model:
        assert model is policy


def test_the_teacher_rates_and_counts():
    problem = generate_problems("writing", "train", 1, 0)[0]
    teacher = TestbedTeacher()
    good, bad = teacher.ask(
        [Prompt.from_text(rating_turn(problem.question, t)) for t in (teacher_answer(problem), "No.")]
    )
    assert float(good.text) >= 0.5 > float(bad.text) == 0.0
    assert teacher.calls == 2
