"""A synthetic world with known truth: problems, their teacher, their check.

Everything follows from a question's text and from the pixels of its picture, so a check, a teacher and a judge need
nothing else. Which split a question belongs to is a property of the same: training and held-out problems cannot meet.
No model is known here.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from purld.data.images import open_image, read_image
from purld.errors import UserError
from purld.records import IMAGE, Image, Prompt, content_hash
from purld.runs.files import write_rows
from purld.testbed.world import counting, scene_image, seeing, writing
from purld.testbed.world.scenes import Scene, draw_scene

Task = Literal["counting", "writing", "scenes-mc", "scenes-rationale"]
Split = Literal["train", "heldout"]
TEXT_TASKS: tuple[Task, ...] = ("counting", "writing")
SCENE_TASKS: tuple[Task, ...] = ("scenes-mc", "scenes-rationale")
TASKS = TEXT_TASKS + SCENE_TASKS

# One question in this many is held out.
_HELD_OUT_SHARE = 5
# So many draws in a row without a new question mean that the world has run out of them.
_PATIENCE = 2000


@dataclass(frozen=True)
class Problem:
    """A question with what is known of it.

    `truth` is the answer of a counting problem ("4/12"), what a piece of writing must do, or what a picture is asked
    for ("blue"). `scene` is what stands at the question's IMAGE.
    """

    task: Task
    family: str
    question: str
    truth: str
    scene: Scene | None = None

    def asked(self) -> seeing.SceneQuestion:
        """The question about the scene."""
        assert self.scene is not None
        question = seeing.parse(self.question.replace(IMAGE, ""), self.scene)
        assert question is not None
        return question


def split_of(problem: Problem) -> Split:
    """The split a problem belongs to, from a hash of its question and of what its picture shows."""
    return "heldout" if int(_identity(problem), 16) % _HELD_OUT_SHARE == 0 else "train"


def _identity(problem: Problem) -> str:
    """A hash of all that is asked."""
    if problem.scene is None:
        return content_hash(problem.question)
    return content_hash([problem.question, problem.scene.describe()])


def generate_problems(task: Task, split: Split, n: int, seed: int) -> list[Problem]:
    """`n` distinct problems; the same arguments give the same problems.

    Raises:
        UserError: the world does not have so many.
    """
    rng = random.Random(f"{task}/{split}/{seed}")
    found: dict[str, Problem] = {}
    failures = 0
    while len(found) < n:
        problem = draw_problem(task, rng)
        identity = _identity(problem)
        if split_of(problem) != split or identity in found:
            failures += 1
            if failures > _PATIENCE:
                raise UserError(f"testbed: task {task} has no {n} distinct problems in split {split}.")
            continue
        failures = 0
        found[identity] = problem
    return list(found.values())


def draw_problem(task: Task, rng: random.Random) -> Problem:
    """A random problem of either split."""
    if task in SCENE_TASKS:
        return scene_problem(task, draw_scene(rng), rng)
    problem = recognise_problem(writing.draw(rng) if task == "writing" else counting.draw(rng))
    assert problem is not None
    return problem


def scene_problem(task: Task, scene: Scene, rng: random.Random) -> Problem:
    """A random problem about a scene."""
    problem = recognise_problem(IMAGE + seeing.draw(scene, task == "scenes-mc", rng), scene)
    assert problem is not None
    return problem


def recognise_problem(question: str, scene: Scene | None = None) -> Problem | None:
    """The problem that a text asks, about a scene if its one IMAGE shows one; None if it is not of this world."""
    question = question.strip()
    if scene is not None:
        seen = seeing.parse(question.replace(IMAGE, "", 1).strip(), scene)
        if seen is None:
            return None
        return Problem(
            "scenes-mc" if seen.options else "scenes-rationale", seen.ask.family, question, seen.value, scene
        )
    if counted := counting.parse(question):
        family, slots = counted
        return Problem("counting", family.name, question, family.solve(slots).answer)
    if written := writing.parse(question):
        name, brief = written
        return Problem("writing", name, question, brief.describe())
    return None


def problem_image(problem: Problem) -> bytes:
    """The problem's picture as a PNG: always the same one."""
    assert problem.scene is not None
    return scene_image.encode(scene_image.draw(problem.scene, random.Random(f"picture/{_identity(problem)}")))


def to_prompt(problem: Problem) -> Prompt:
    """The problem as a model is asked it."""
    shown = () if problem.scene is None else (read_image(problem_image(problem), Path()),)
    return Prompt.from_text(problem.question, images=shown, reference=problem.truth)


@functools.lru_cache(maxsize=4096)
def read_scene(image: Image) -> Scene | None:
    """What a picture shows, or None if it is none of this world's.

    Raises:
        UserError: its file is gone, or is another one than was read.
    """
    return scene_image.read(open_image(image))


def check_answer(prompt: Prompt, text: str) -> bool:
    """Whether `text` is a right answer to a prompt of this world.

    Raises:
        UserError: the prompt is not of this world.
    """
    scene = read_scene(prompt.images[0]) if len(prompt.images) == 1 else None
    problem = recognise_problem(prompt.question, scene)
    if problem is None:
        raise UserError(f"prompt {prompt.id}: is not a question of the testbed's world.")
    return is_right(problem, text)


def is_right(problem: Problem, text: str) -> bool:
    """Whether `text` answers the problem: by value in counting, by rule in writing."""
    if problem.scene is not None:
        return seeing.is_right(problem.asked(), text)
    if problem.task == "counting":
        return counting.final_answer(text) == Fraction(problem.truth)
    return writing.fulfils(_brief(problem), text)


def teacher_answer(problem: Problem) -> str:
    """The teacher's answer: always right, in words that depend on the question alone."""
    return right_answer(problem, random.Random(_identity(problem)))


def right_answer(problem: Problem, rng: random.Random) -> str:
    """A right answer in randomly chosen words; in counting one that shows how it comes about."""
    if problem.scene is not None:
        return seeing.right_answer(problem.asked(), rng)
    if problem.task == "writing":
        return writing.compose(_brief(problem), rng)
    parsed = counting.parse(problem.question)
    assert parsed is not None
    family, slots = parsed
    return rng.choice(counting.phrasings(family.solve(slots))[:-1])


def answer_quality(problem: Problem, text: str) -> float:
    """How good an answer is, for a judge: 0 if wrong, else between 1 and 2.

    Among right answers the judge prefers a calculation that is shown and then concluded, a piece with more different
    words, a choice that is stated and then concluded, a rationale that gives its reason and sees more than was asked.
    """
    if not is_right(problem, text):
        return 0.0
    if problem.task == "scenes-rationale":
        return 1.0 + 0.5 * ("because" in text) + 0.25 * ("also" in text)
    if problem.task == "scenes-mc":
        return 1.0 + 0.5 * ("answer is" in text) + 0.25 * (len(text.split()) > 4)
    if problem.task == "counting":
        return 1.0 + 0.5 * ("=" in text) + 0.25 * ("answer is" in text)
    return 1.0 + min(len(set(writing.words_of(text))) // 5, 4) / 4


def write_prompts(path: Path, problems: Iterable[Problem]) -> None:
    """Write problems as prompt rows: `prompt`, `images`, `reference` (the truth), `task`, `family`.

    Pictures become PNG files in the folder `pictures` beside `path`; `images` are relative to that of `path`.
    """
    write_rows(path, [_row(problem, path.parent) for problem in problems])


def _row(problem: Problem, folder: Path) -> dict[str, Any]:
    row = {"prompt": problem.question, "reference": problem.truth, "task": problem.task, "family": problem.family}
    if problem.scene is None:
        return row
    name = f"pictures/{_identity(problem)}.png"
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(problem_image(problem))
    return row | {"prompt": problem.question.replace(IMAGE, ""), "images": [name]}


def _brief(problem: Problem) -> writing.Brief:
    parsed = writing.parse(problem.question)
    assert parsed is not None
    return parsed[1]
