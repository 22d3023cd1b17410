"""What the students that see learn from: captions, answers that are often wrong, judgements and bare comparisons.

Lessons come in pages of one picture, whose features are computed once. The learner's weaknesses are those of the
text student: the base is right about half of the time, judgements carry the labels of the world's own check, and only
problems of the training split are used.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from PIL.Image import Image

from purld.records import IMAGE
from purld.testbed.students.lessons import Candidates, Lesson, Phase, Sample, comparison_turn, judgement_turn
from purld.testbed.world import scene_image, seeing
from purld.testbed.world.claims import KINDS, NUMBERS, listing, plural
from purld.testbed.world.scenes import COLOURS, PLACES, SHAPES, Scene, Thing, draw_scene
from purld.testbed.world.world import SCENE_TASKS, Problem, Task, right_answer, scene_problem, split_of

TOKENIZER_TEXTS = 3000
# A step's lessons, computed in so many parts, and those that share a picture.
LESSONS, PARTS, LESSONS_A_PICTURE = 48, 3, 4
OWN_SAMPLES = 192
CAPTION, IN_A_WORD = "Describe the picture.", "In a word."
# How often the base answers wrongly; the model's own slips come on top.
ERRORS: dict[Task, float] = {"scenes-mc": 0.40, "scenes-rationale": 0.40}
# Three rises and falls of the learning rate: to find one thing among ever more, to judge and to answer, and both again.
CURRICULUM = (
    (
        Phase("find one", 120, judging=0.0, lookups=1.0, things=(1,)),
        Phase("find one of two", 120, judging=0.0, lookups=1.0, things=(1, 2)),
        Phase("find one of three", 120, judging=0.0, lookups=1.0, things=(2, 3)),
        Phase("find one of four", 120, judging=0.0, lookups=1.0, things=(3, 4)),
        Phase("find one of five", 720, judging=0.0, lookups=1.0),
    ),
    (
        Phase("compare", 150, judging=0.5, bare=1.0, lookups=0.5, captions=0.5),
        Phase("judge", 350, judging=0.5, bare=0.3, lookups=0.2, captions=0.2, errors=0.0),
        Phase("mixed", 350, judging=0.5, bare=0.05, own=0.3, lookups=0.1, captions=0.1),
        Phase("settle", 250, judging=0.4, own=0.5, lookups=0.05, captions=0.05),
    ),
    (
        Phase("find again", 300, judging=0.25, bare=0.2, lookups=0.5, captions=0.1, errors=0.0),
        Phase("mixed again", 350, judging=0.5, own=0.3, lookups=0.15),
        Phase("settle again", 250, judging=0.4, own=0.5, lookups=0.05),
    ),
)


def lessons(phase: Phase, n: int, own: Sequence[Sample], rng: random.Random) -> list[Lesson]:
    """The lessons of one step. `own` are samples in runs of LESSONS_A_PICTURE that share a picture."""
    batch: list[Lesson] = []
    for page in range(n // LESSONS_A_PICTURE):
        samples: Sequence[Sample] = []
        if own and rng.random() < phase.own:
            start = rng.randrange(len(own) // LESSONS_A_PICTURE) * LESSONS_A_PICTURE
            samples = own[start : start + LESSONS_A_PICTURE]
            scene, picture = samples[0].problem.scene, samples[0].picture
        else:
            scene = draw_scene(rng, phase.things)
            picture = scene_image.draw(scene, rng)
        assert scene is not None and picture is not None
        for place in range(LESSONS_A_PICTURE):
            index = place * (n // LESSONS_A_PICTURE) + page
            if index >= round(phase.judging * n):
                batch.append(_unjudged(phase, scene, picture, rng))
            elif rng.random() < phase.bare:
                batch.append(comparison_lesson(scene, picture, rng))
            else:
                batch.append(judging_lesson(scene, picture, rng, samples[place] if samples else None))
    return batch


def _unjudged(phase: Phase, scene: Scene, picture: Image, rng: random.Random) -> Lesson:
    kind = rng.random()
    if kind < phase.lookups:
        return lookup_lesson(scene, picture, rng)
    if kind < phase.lookups + phase.captions:
        return caption_lesson(scene, picture, rng)
    return answer_lesson(scene, picture, phase.errors, rng)


def problems(n: int, rng: random.Random) -> list[tuple[Problem, Image]]:
    """Training problems with their pictures, in runs of LESSONS_A_PICTURE that share one."""
    found = []
    for _ in range(n // LESSONS_A_PICTURE):
        scene = draw_scene(rng)
        picture = scene_image.draw(scene, rng)
        found += [(training_problem(rng.choice(SCENE_TASKS), scene, rng), picture) for _ in range(LESSONS_A_PICTURE)]
    return found


def training_problem(task: Task, scene: Scene, rng: random.Random) -> Problem:
    """A problem about a scene, of the training split."""
    while True:
        problem = scene_problem(task, scene, rng)
        if split_of(problem) == "train":
            return problem


def lookup_lesson(scene: Scene, picture: Image, rng: random.Random) -> Lesson:
    """A question that is answered in a word: finding a thing by one of its parts and naming another, and no more."""
    problem = training_problem("scenes-rationale", scene, rng)
    return Lesson("lookup", f"{problem.question}\n{IN_A_WORD}", f"It is {problem.truth}.", picture)


def caption_lesson(scene: Scene, picture: Image, rng: random.Random) -> Lesson:
    """All that a picture shows, in any order.

    Each sentence names some part of a thing first and goes on with what has to be looked up: the same skill as
    answering a question, several times a lesson.
    """
    said = " ".join(seeing.rationale(thing, rng) for thing in rng.sample(scene.things, len(scene.things)))
    return Lesson("caption", IMAGE + CAPTION, said, picture)


def answer_lesson(scene: Scene, picture: Image, errors: float, rng: random.Random) -> Lesson:
    """A question with the answer that a student of partial knowledge gives, wrong `errors` times as often."""
    problem = training_problem(rng.choice(SCENE_TASKS), scene, rng)
    return Lesson("answer", problem.question, base_answer(problem, rng, errors), picture)


def judging_lesson(scene: Scene, picture: Image, rng: random.Random, own: Sample | None = None) -> Lesson:
    """A candidate to score against an anchor; the candidate is `own` if given."""
    problem = own.problem if own else training_problem(rng.choice(SCENE_TASKS), scene, rng)
    return judgement_turn(problem, CANDIDATES, rng, own, picture)


def base_answer(problem: Problem, rng: random.Random, errors: float = 1.0) -> str:
    """An answer of the base student: right or a near-miss, that `errors` times as often."""
    return near_miss(problem, rng) if rng.random() < errors * ERRORS[problem.task] else right_answer(problem, rng)


def near_miss(problem: Problem, rng: random.Random) -> str:
    """A wrong answer of the right form."""
    return seeing.mistake(problem.asked(), rng)


def _about_the_same(problem: Problem, rng: random.Random) -> Problem:
    """Another problem of the same task and scene."""
    assert problem.scene is not None
    return training_problem(problem.task, problem.scene, rng)


CANDIDATES = Candidates((6, 26, 32, 26, 4, 6), base_answer, near_miss, _about_the_same)


def comparison_lesson(scene: Scene, picture: Image, rng: random.Random) -> Lesson:
    """The bare comparison that judging rests on: is it the same word, thing or list; is it what the picture shows."""
    if rng.random() < 0.2:
        thing = rng.choice(scene.things)
        other = thing if rng.random() < 0.5 else seeing.slip(thing, rng)
        said = seeing.rationale(other, rng)
        return comparison_turn(f"{IMAGE}Look.", CAPTION, said, other in scene.things, picture)
    kind = rng.choices((_same_value, _same_thing, _same_list), (5, 4, 2))[0]
    return comparison_turn("Compare.", *kind(rng))


Compared = tuple[str, str, bool]


def _same_value(rng: random.Random) -> Compared:
    values: Sequence[str] = rng.choice((COLOURS, SHAPES, PLACES, NUMBERS[1:]))
    value = rng.choice(values)
    other = value if rng.random() < 0.5 else rng.choice(values)
    said, again = (rng.choice(("", "The answer is ", "It is ")) for _ in range(2))
    return f"{said}{value}.", f"{again}{other}.", value == other


def _same_thing(rng: random.Random) -> Compared:
    thing = _random_thing(rng)
    other = thing if rng.random() < 0.5 else seeing.slip(thing, rng)
    return seeing.rationale(thing, rng), seeing.rationale(other, rng), thing == other


def _same_list(rng: random.Random) -> Compared:
    things = list(draw_scene(rng).things[: rng.randint(1, seeing.MOST)])
    others = list(things)
    if rng.random() < 0.5:
        place = rng.randrange(len(others))
        if len(others) > 1 and rng.random() < 0.3:
            del others[place]
        else:
            others[place] = seeing.slip(others[place], rng)
    kind = rng.choice(KINDS)
    said, again = (
        f"{rng.choice(('There are', 'I count', 'I see'))} {NUMBERS[len(t)]} {plural(kind)}: {listing(t)}."
        for t in (things, others)
    )
    return said, again, things == others


def _random_thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(PLACES))


def tokenizer_texts(rng: random.Random, n: int) -> Iterator[str]:
    """Texts whose pieces the tokenizer should know."""
    yield from ["system\nuser\nassistant\n"] * 20
    yield from [CAPTION, IN_A_WORD, "Look.", "Compare."] * 20
    for _ in range(n // 2):
        scene = draw_scene(rng)
        yield scene.describe()
        for task in SCENE_TASKS:
            problem = training_problem(task, scene, rng)
            yield problem.question.replace(IMAGE, "")
            yield base_answer(problem, rng)
