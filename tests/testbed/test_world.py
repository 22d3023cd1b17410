"""The world's promises: splits never meet, questions read back, the teacher is right, near-misses are wrong."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purld.errors import UserError
from purld.records import Prompt
from purld.testbed.students.corpus import draw_near_miss
from purld.testbed.students.lessons import spoil_answer
from purld.testbed.world import counting, world, writing
from purld.testbed.world.world import TEXT_TASKS, Problem

SEEDS = st.integers(0, 2**32)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any problem of either task and split."""
    return world.draw_problem(draw(st.sampled_from(TEXT_TASKS)), random.Random(draw(SEEDS)))


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_splits_are_disjoint_distinct_and_repeatable(task: world.Task) -> None:
    train = [p.question for p in world.generate_problems(task, "train", 1500, 1)]
    held_out = [p.question for p in world.generate_problems(task, "heldout", 500, 2)]
    assert len(set(train)) == 1500
    assert not set(train) & set(held_out)
    assert train == [p.question for p in world.generate_problems(task, "train", 1500, 1)]
    assert train[:500] != [p.question for p in world.generate_problems(task, "train", 500, 2)]


def test_every_family_occurs() -> None:
    for task, families in (("counting", {f.name for f in counting.FAMILIES}), ("writing", {writing.FAMILY})):
        assert {p.family for p in world.generate_problems(task, "heldout", 200, 0)} == families


def test_asking_for_more_problems_than_exist_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.writing, "SUBJECTS", ["fox"])
    monkeypatch.setattr(world.writing, "OBJECTS", ["rope"])
    monkeypatch.setattr(world.writing, "PLACES", ["mill"])
    with pytest.raises(UserError, match="no 5000 distinct problems"):
        world.generate_problems("writing", "heldout", 5000, 0)


@given(problems())
def test_a_question_reads_back_and_its_teacher_is_right(problem: Problem) -> None:
    assert world.recognise_problem(problem.question) == problem
    answer = world.teacher_answer(problem)
    assert answer == world.teacher_answer(problem)
    assert world.check_answer(Prompt.from_text(problem.question), answer)
    assert world.answer_quality(problem, answer) >= 1


@given(problems(), SEEDS)
def test_near_misses_are_wrong_and_worth_nothing(problem: Problem, seed: int) -> None:
    wrong = draw_near_miss(problem, random.Random(seed))
    assert not world.is_right(problem, wrong)
    assert world.answer_quality(problem, wrong) == 0


@given(problems(), SEEDS, st.text(max_size=60))
def test_no_text_makes_the_check_fail(problem: Problem, seed: int, noise: str) -> None:
    spoiled = spoil_answer(world.teacher_answer(problem), random.Random(seed))
    for text in (noise, spoiled, spoiled + noise):
        assert world.is_right(problem, text) in (True, False)


@given(st.text())
def test_other_text_is_not_recognised(text: str) -> None:
    assert world.recognise_problem(text) is None


def test_a_prompt_from_elsewhere_cannot_be_checked() -> None:
    with pytest.raises(UserError, match="not a question of the testbed's world"):
        world.check_answer(Prompt.from_text("Why is the sky blue?"), "Rayleigh scattering.")


@pytest.mark.parametrize(
    "question",
    [
        "Ana has a jar with 7 pink and 1 black beads and draws one at random. What is the probability that it is red?",
        "Ana rolls a die with 4 sides. What is the probability that it shows more than 9?",
        "Describe the fox. Use the word rope. Use the word rope.",
        "Describe the fox. Use the word rope. Write exactly nine sentences.",
        "Describe the fox. Use the word rope.",
    ],
)
def test_questions_without_sense_are_not_recognised(question: str) -> None:
    assert world.recognise_problem(question) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7, so the answer is 3/7.", "3/7"),
        ("There are 7 marbles and 3 are red: 3 out of 7.", "3/7"),
        ("The answer is 15, because 6 * 5 / 2 = 15.", "15"),
        ("Each pair shakes once: 6 * 5 / 2 = 15.", "15"),
        ("The answer is 9. No, wait, the answer is 12", "12"),
        ("ANSWER: 6/14", "3/7"),
        ("0.25", "1/4"),
        ("seven", None),
        ("5/0", None),
        ("9" * 9000, "9" * 20),
    ],
)
def test_the_final_answer_is_what_the_text_commits_to(text: str, value: str | None) -> None:
    found = counting.final_answer(text)
    assert found == (None if value is None else counting.Fraction(value))


def test_counting_answers_are_checked_by_value() -> None:
    question = (
        "Ana has a jar with 2 pink and 4 black beads and draws one at random. What is the probability that it is pink?"
    )
    prompt = Prompt.from_text(question)
    assert world.check_answer(prompt, "It is 1/3.")
    assert not world.check_answer(prompt, "2 + 4 = 6, so the answer is 2/4.")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The fox found the rope by the mill.", True),
        ("They slept by the old rope. The fox slept near the mill.", True),
        ("  The fox found the ROPE by the mill.\n", True),
        ("The fox found the kite by the mill.", False),  # no rope
        ("The dog found the rope by the mill.", False),  # no fox
        ("By the mill the fox found the rope.", False),  # ends otherwise
        ("The fox found the rope. The mill.", False),  # a stub
        ("The fox found the rope by the mill", False),  # no period
        ("The fox found the rope by the the the mill.", False),  # a stutter
        ("The fox had the rope. " * 3 + "It slept near the mill.", False),  # four sentences
        ("The fox found the rope near " + "a very old " * 40 + "mill.", False),  # too long
    ],
)
def test_writing_is_checked_by_rule(text: str, right: bool) -> None:
    question = "Describe the fox. Use the word rope. End with the word mill."
    assert world.check_answer(Prompt.from_text(question), text) is right


def test_the_judge_prefers_shown_work_and_richer_pieces() -> None:
    counted = world.recognise_problem(
        "Ana can choose from 3 soups and 4 pies. How many meals of one of each are there?"
    )
    assert counted is not None
    shown = world.answer_quality(counted, "3 * 4 = 12, so the answer is 12.")
    assert shown > world.answer_quality(counted, "Answer: 12.") > world.answer_quality(counted, "3 + 4 = 7.")
    written = world.recognise_problem("Describe the fox. End with the word mill. Use the word rope.")
    assert written is not None
    short = "The fox hid the rope by the mill."
    assert world.answer_quality(written, f"At dawn the fox danced near the old harbor. {short}") > world.answer_quality(
        written, short
    )


def test_prompt_rows_hold_what_training_and_evaluation_need(tmp_path) -> None:
    problems = world.generate_problems("counting", "train", 5, 0)
    world.write_prompts(tmp_path / "prompts.jsonl", problems)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [p.question for p in problems]
    assert all(set(row) == {"prompt", "reference", "task", "family"} for row in rows)
