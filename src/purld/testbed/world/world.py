"""Problems, their teacher and their check, for all tasks.

Everything follows from a question's text and from the pixels of its image, so check, teacher and judge need nothing
else. The split of a problem is a hash of the same content, so training and held-out problems cannot overlap. No model
is used here.
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

# One problem in this many is held out.
_HELD_OUT_SHARE = 5
# After this many draws in a row without a new problem the world counts as exhausted.
_MAX_FAILURES = 2000


@dataclass(frozen=True)
class Problem:
    """A question with its known answer.

    Attributes:
        task: the task that it belongs to.
        family: the kind of question within the task.
        question: the text, with an IMAGE where the image is.
        truth: the answer of a counting problem ("4/12"), what a piece of writing must do, or what is asked about a
            scene ("blue").
        scene: what the image shows, if there is one.
    """

    task: Task
    family: str
    question: str
    truth: str
    scene: Scene | None = None

    def scene_question(self) -> seeing.SceneQuestion:
        """Return the parsed question about the scene."""
        assert self.scene is not None
        question = seeing.parse_question(self.question.replace(IMAGE, ""), self.scene)
        assert question is not None
        return question


def split_of(problem: Problem) -> Split:
    """Return the split of a problem, from a hash of its question and of its scene."""
    return "heldout" if int(_identity(problem), 16) % _HELD_OUT_SHARE == 0 else "train"


def _identity(problem: Problem) -> str:
    """Return a hash of the question and the scene."""
    if problem.scene is None:
        return content_hash(problem.question)
    return content_hash([problem.question, problem.scene.describe()])


def generate_problems(task: Task, split: Split, n: int, seed: int) -> list[Problem]:
    """Return `n` distinct problems; the same arguments give the same problems.

    Raises:
        UserError: the world has fewer than `n`.
    """
    rng = random.Random(f"{task}/{split}/{seed}")
    problems: dict[str, Problem] = {}
    failures = 0
    while len(problems) < n:
        problem = draw_problem(task, rng)
        identity = _identity(problem)
        if split_of(problem) != split or identity in problems:
            failures += 1
            if failures > _MAX_FAILURES:
                raise UserError(f"testbed: task {task} has no {n} distinct problems in split {split}.")
            continue
        failures = 0
        problems[identity] = problem
    return list(problems.values())


def draw_problem(task: Task, rng: random.Random) -> Problem:
    """Draw a random problem of either split."""
    if task in SCENE_TASKS:
        return draw_scene_problem(task, draw_scene(rng), rng)
    problem = recognise_problem(writing.draw_question(rng) if task == "writing" else counting.draw_question(rng))
    assert problem is not None
    return problem


def draw_scene_problem(task: Task, scene: Scene, rng: random.Random) -> Problem:
    """Draw a random problem about a scene."""
    problem = recognise_problem(IMAGE + seeing.draw_question(scene, task == "scenes-mc", rng), scene)
    assert problem is not None
    return problem


def recognise_problem(question: str, scene: Scene | None = None) -> Problem | None:
    """Return the problem that a text asks, or None if it is not of this world.

    Args:
        question: the text, with an IMAGE if it is about an image.
        scene: what its only image shows.
    """
    question = question.strip()
    if scene is not None:
        asked = seeing.parse_question(question.replace(IMAGE, "", 1).strip(), scene)
        if asked is None:
            return None
        return Problem(
            "scenes-mc" if asked.options else "scenes-rationale", asked.query.family, question, asked.value, scene
        )
    if counted := counting.parse_question(question):
        family, slots = counted
        return Problem("counting", family.name, question, family.solve(slots).answer)
    if written := writing.parse_question(question):
        name, brief = written
        return Problem("writing", name, question, brief.describe())
    return None


def problem_image(problem: Problem) -> bytes:
    """Return the problem's image as a PNG, always the same one."""
    assert problem.scene is not None
    rng = random.Random(f"picture/{_identity(problem)}")
    return scene_image.encode_png(scene_image.render_scene(problem.scene, rng))


def to_prompt(problem: Problem) -> Prompt:
    """Return the problem as a prompt for a model."""
    images = () if problem.scene is None else (read_image(problem_image(problem), Path()),)
    return Prompt.from_text(problem.question, images=images, reference=problem.truth)


@functools.lru_cache(maxsize=4096)
def read_scene(image: Image) -> Scene | None:
    """Return the scene of an image, or None if the image is not of this world.

    Raises:
        UserError: the image's file is missing or has changed since it was read.
    """
    return scene_image.recognise_scene(open_image(image))


def check_answer(prompt: Prompt, text: str) -> bool:
    """Tell whether `text` is a right answer to a prompt of this world.

    Raises:
        UserError: the prompt is not of this world.
    """
    scene = read_scene(prompt.images[0]) if len(prompt.images) == 1 else None
    problem = recognise_problem(prompt.question, scene)
    if problem is None:
        raise UserError(f"prompt {prompt.id}: is not a question of the testbed's world.")
    return is_right(problem, text)


def is_right(problem: Problem, text: str) -> bool:
    """Tell whether `text` answers the problem: by value in counting, by rule in the other tasks."""
    if problem.scene is not None:
        return seeing.is_right(problem.scene_question(), text)
    if problem.task == "counting":
        return counting.final_answer(text) == Fraction(problem.truth)
    return writing.fulfils_brief(_brief(problem), text)


def teacher_answer(problem: Problem) -> str:
    """Return the teacher's answer: always right, in words that depend on the problem alone."""
    return right_answer(problem, random.Random(_identity(problem)))


def right_answer(problem: Problem, rng: random.Random) -> str:
    """Draw a right answer in random words; in counting one that shows the calculation."""
    if problem.scene is not None:
        return seeing.right_answer(problem.scene_question(), rng)
    if problem.task == "writing":
        return writing.compose_piece(_brief(problem), rng)
    parsed = counting.parse_question(problem.question)
    assert parsed is not None
    family, slots = parsed
    return rng.choice(counting.list_phrasings(family.solve(slots))[:-1])


def answer_quality(problem: Problem, text: str) -> float:
    """Rate an answer for the judge: 0 if wrong, else between 1 and 2.

    Among right answers the judge prefers a calculation that is shown and then concluded, a piece with more different
    words, a choice that is stated and then concluded, a rationale that gives its reason and adds a true remark.
    """
    if not is_right(problem, text):
        return 0.0
    if problem.task == "scenes-rationale":
        return 1.0 + 0.5 * ("because" in text) + 0.25 * ("also" in text)
    if problem.task == "scenes-mc":
        return 1.0 + 0.5 * ("answer is" in text) + 0.25 * (len(text.split()) > 4)
    if problem.task == "counting":
        return 1.0 + 0.5 * ("=" in text) + 0.25 * ("answer is" in text)
    return 1.0 + min(len(set(writing.split_words(text))) // 5, 4) / 4


def write_prompts(path: Path, problems: Iterable[Problem]) -> None:
    """Write problems as prompt rows: `prompt`, `images`, `reference` (the truth), `task`, `family`.

    Images become PNG files in the folder `pictures` next to `path`; rows name them relative to the folder of `path`.
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
    parsed = writing.parse_question(problem.question)
    assert parsed is not None
    return parsed[1]
