"""A synthetic world with known truth: problems, their teacher, their check.

Everything follows from a question's text, so a check, a teacher and a judge need nothing else. Which split a question
belongs to is a property of its text too: training and held-out problems cannot meet. No model is known here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from purld.errors import UserError
from purld.records import Prompt, content_hash
from purld.rundir import write_rows
from purld.testbed import counting, writing

Task = Literal["counting", "writing"]
Split = Literal["train", "heldout"]
TASKS: tuple[Task, ...] = ("counting", "writing")

# One question in this many is held out.
_HELD_OUT_SHARE = 5
# So many draws in a row without a new question mean that the world has run out of them.
_PATIENCE = 2000


@dataclass(frozen=True)
class Problem:
    """A question with what is known of it.

    `truth` is the answer of a counting problem ("4/12") or what a piece of writing must do.
    """

    task: Task
    family: str
    question: str
    truth: str


def split_of(question: str) -> Split:
    """The split a question belongs to, from a hash of its text."""
    return "heldout" if int(content_hash(question), 16) % _HELD_OUT_SHARE == 0 else "train"


def generate(task: Task, split: Split, n: int, seed: int) -> list[Problem]:
    """`n` distinct problems; the same arguments give the same problems.

    Raises:
        UserError: the world does not have so many.
    """
    rng = random.Random(f"{task}/{split}/{seed}")
    found: dict[str, Problem] = {}
    failures = 0
    while len(found) < n:
        question = draw_question(task, rng)
        if split_of(question) != split or question in found:
            failures += 1
            if failures > _PATIENCE:
                raise UserError(f"testbed: task {task} has no {n} distinct problems in split {split}.")
            continue
        failures = 0
        problem = recognise(question)
        assert problem is not None
        found[question] = problem
    return list(found.values())


def draw_question(task: Task, rng: random.Random) -> str:
    """A random question of either split."""
    return writing.draw(rng) if task == "writing" else counting.draw(rng)


def recognise(question: str) -> Problem | None:
    """The problem a text asks, or None if it is not of this world."""
    question = question.strip()
    if counted := counting.parse(question):
        family, slots = counted
        return Problem("counting", family.name, question, family.solve(slots).answer)
    if written := writing.parse(question):
        name, brief = written
        return Problem("writing", name, question, brief.describe())
    return None


def check(prompt: Prompt, text: str) -> bool:
    """Whether `text` is a right answer to a prompt of this world.

    Raises:
        UserError: the prompt is not of this world.
    """
    problem = recognise(prompt.question)
    if problem is None:
        raise UserError(f"prompt {prompt.id}: is not a question of the testbed's world.")
    return is_right(problem, text)


def is_right(problem: Problem, text: str) -> bool:
    """Whether `text` answers the problem: by value in counting, by rule in writing."""
    if problem.task == "counting":
        return counting.final_answer(text) == Fraction(problem.truth)
    return writing.fulfils(_brief(problem), text)


def teacher_answer(problem: Problem) -> str:
    """The teacher's answer: always right, in words that depend on the question alone."""
    return right_answer(problem, random.Random(content_hash(problem.question)))


def right_answer(problem: Problem, rng: random.Random) -> str:
    """A right answer in randomly chosen words; in counting one that shows how it comes about."""
    if problem.task == "writing":
        return writing.compose(_brief(problem), rng)
    parsed = counting.parse(problem.question)
    assert parsed is not None
    family, slots = parsed
    return rng.choice(counting.phrasings(family.solve(slots))[:-1])


def quality(problem: Problem, text: str) -> float:
    """How good an answer is, for a judge: 0 if wrong, else between 1 and 2.

    Among right answers the judge prefers a calculation that is shown and then concluded, or a piece with more
    different words.
    """
    if not is_right(problem, text):
        return 0.0
    if problem.task == "counting":
        return 1.0 + 0.5 * ("=" in text) + 0.25 * ("answer is" in text)
    return 1.0 + min(len(set(writing.words_of(text))) // 5, 4) / 4


def write_prompts(path: Path, problems: Iterable[Problem]) -> None:
    """Write problems as prompt rows: `prompt`, `reference` (the truth), `task`, `family`."""
    write_rows(
        path,
        ({"prompt": p.question, "reference": p.truth, "task": p.task, "family": p.family} for p in problems),
    )


def _brief(problem: Problem) -> writing.Brief:
    parsed = writing.parse(problem.question)
    assert parsed is not None
    return parsed[1]
