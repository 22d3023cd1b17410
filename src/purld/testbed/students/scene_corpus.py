"""Draw the lessons of the students that read images: captions, often wrong answers, judgements, bare comparisons.

Lessons come in groups that share one image, whose features are computed once. As for the text student, the base is
right about half of the time, judgements are labelled by the world's own check, and only problems of the training split
are used.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from PIL.Image import Image as PilImage

from purld.records import IMAGE
from purld.testbed.students.lessons import (
    Candidates,
    Lesson,
    Phase,
    Sample,
    make_comparison_lesson,
    make_judgement_lesson,
)
from purld.testbed.world import scene_image, seeing
from purld.testbed.world.claims import KINDS, NUMBERS, list_things, pluralize_kind
from purld.testbed.world.scenes import COLOURS, PLACES, SHAPES, Scene, Thing, draw_scene
from purld.testbed.world.world import SCENE_TASKS, Problem, Task, draw_scene_problem, right_answer, split_of

TOKENIZER_TEXTS = 3000
LESSONS_PER_STEP, MICRO_BATCHES, LESSONS_PER_IMAGE = 48, 3, 4
OWN_SAMPLES = 192
CAPTION, IN_A_WORD = "Describe the picture.", "In a word."
# How often the base answers wrongly. The model's own mistakes add to these.
ERROR_RATES: dict[Task, float] = {"scenes-mc": 0.40, "scenes-rationale": 0.40}
# Three rounds, each one rise and fall of the learning rate: find one thing among more and more, judge and answer, both
# again.
CURRICULUM = (
    (
        Phase("find one", 120, judging=0.0, lookups=1.0, thing_counts=(1,)),
        Phase("find one of two", 120, judging=0.0, lookups=1.0, thing_counts=(1, 2)),
        Phase("find one of three", 120, judging=0.0, lookups=1.0, thing_counts=(2, 3)),
        Phase("find one of four", 120, judging=0.0, lookups=1.0, thing_counts=(3, 4)),
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


def draw_lessons(phase: Phase, n: int, own: Sequence[Sample], rng: random.Random) -> list[Lesson]:
    """Draw the `n` lessons of one step. `own` are samples in runs of LESSONS_PER_IMAGE that share an image."""
    batch: list[Lesson] = []
    for group in range(n // LESSONS_PER_IMAGE):
        samples: Sequence[Sample] = []
        if own and rng.random() < phase.own:
            start = rng.randrange(len(own) // LESSONS_PER_IMAGE) * LESSONS_PER_IMAGE
            samples = own[start : start + LESSONS_PER_IMAGE]
            scene, image = samples[0].problem.scene, samples[0].image
        else:
            scene = draw_scene(rng, phase.thing_counts)
            image = scene_image.render_scene(scene, rng)
        assert scene is not None and image is not None
        for position in range(LESSONS_PER_IMAGE):
            index = position * (n // LESSONS_PER_IMAGE) + group
            if index >= round(phase.judging * n):
                batch.append(_draw_unjudged_lesson(phase, scene, image, rng))
            elif rng.random() < phase.bare:
                batch.append(draw_comparison_lesson(scene, image, rng))
            else:
                batch.append(draw_judgement_lesson(scene, image, rng, samples[position] if samples else None))
    return batch


def _draw_unjudged_lesson(phase: Phase, scene: Scene, image: PilImage, rng: random.Random) -> Lesson:
    """Draw a lookup, a caption or an answer."""
    draw = rng.random()
    if draw < phase.lookups:
        return draw_lookup_lesson(scene, image, rng)
    if draw < phase.lookups + phase.captions:
        return draw_caption_lesson(scene, image, rng)
    return draw_answer_lesson(scene, image, phase.errors, rng)


def draw_problems(n: int, rng: random.Random) -> list[tuple[Problem, PilImage]]:
    """Draw training problems with their images, in runs of LESSONS_PER_IMAGE that share one."""
    problems = []
    for _ in range(n // LESSONS_PER_IMAGE):
        scene = draw_scene(rng)
        image = scene_image.render_scene(scene, rng)
        problems += [
            (draw_training_problem(rng.choice(SCENE_TASKS), scene, rng), image) for _ in range(LESSONS_PER_IMAGE)
        ]
    return problems


def draw_training_problem(task: Task, scene: Scene, rng: random.Random) -> Problem:
    """Draw a problem of the training split about a scene."""
    while True:
        problem = draw_scene_problem(task, scene, rng)
        if split_of(problem) == "train":
            return problem


def draw_lookup_lesson(scene: Scene, image: PilImage, rng: random.Random) -> Lesson:
    """Draw a question that is answered in a word: find a thing by one attribute and name another."""
    problem = draw_training_problem("scenes-rationale", scene, rng)
    return Lesson("lookup", f"{problem.question}\n{IN_A_WORD}", f"It is {problem.truth}.", image)


def draw_caption_lesson(scene: Scene, image: PilImage, rng: random.Random) -> Lesson:
    """Draw a description of everything that an image shows, in random order.

    Each sentence starts with some attribute of a thing and continues with what has to be looked up: the same skill as
    answering a question, several times a lesson.
    """
    description = " ".join(seeing.draw_rationale(thing, rng) for thing in rng.sample(scene.things, len(scene.things)))
    return Lesson("caption", IMAGE + CAPTION, description, image)


def draw_answer_lesson(scene: Scene, image: PilImage, errors: float, rng: random.Random) -> Lesson:
    """Draw a question with the answer of a student of partial knowledge, wrong `errors` times as often as the base."""
    problem = draw_training_problem(rng.choice(SCENE_TASKS), scene, rng)
    return Lesson("answer", problem.question, draw_base_answer(problem, rng, errors), image)


def draw_judgement_lesson(scene: Scene, image: PilImage, rng: random.Random, own: Sample | None = None) -> Lesson:
    """Draw a candidate to score against an anchor; the candidate is `own` if given."""
    problem = own.problem if own else draw_training_problem(rng.choice(SCENE_TASKS), scene, rng)
    return make_judgement_lesson(problem, CANDIDATES, rng, own, image)


def draw_base_answer(problem: Problem, rng: random.Random, errors: float = 1.0) -> str:
    """Draw an answer of the base student: right or a near-miss, the latter `errors` times as often as usual."""
    return (
        draw_near_miss(problem, rng)
        if rng.random() < errors * ERROR_RATES[problem.task]
        else right_answer(problem, rng)
    )


def draw_near_miss(problem: Problem, rng: random.Random) -> str:
    """Draw a wrong answer of the right form."""
    return seeing.draw_mistake(problem.scene_question(), rng)


def _draw_related_problem(problem: Problem, rng: random.Random) -> Problem:
    """Draw another problem of the same task and scene."""
    assert problem.scene is not None
    return draw_training_problem(problem.task, problem.scene, rng)


CANDIDATES = Candidates((6, 26, 32, 26, 4, 6), draw_base_answer, draw_near_miss, _draw_related_problem)


def draw_comparison_lesson(scene: Scene, image: PilImage, rng: random.Random) -> Lesson:
    """Draw a bare comparison: is it the same word, thing or list, or is it what the image shows."""
    if rng.random() < 0.2:
        thing = rng.choice(scene.things)
        other = thing if rng.random() < 0.5 else seeing.change_attribute(thing, rng)
        description = seeing.draw_rationale(other, rng)
        return make_comparison_lesson(f"{IMAGE}Look.", CAPTION, description, other in scene.things, image)
    compare = rng.choices((_compare_values, _compare_things, _compare_lists), (5, 4, 2))[0]
    return make_comparison_lesson("Compare.", *compare(rng))


# Anchor, candidate, and whether they say the same.
Comparison = tuple[str, str, bool]


def _compare_values(rng: random.Random) -> Comparison:
    values: Sequence[str] = rng.choice((COLOURS, SHAPES, PLACES, NUMBERS[1:]))
    value = rng.choice(values)
    other = value if rng.random() < 0.5 else rng.choice(values)
    opening, other_opening = (rng.choice(("", "The answer is ", "It is ")) for _ in range(2))
    return f"{opening}{value}.", f"{other_opening}{other}.", value == other


def _compare_things(rng: random.Random) -> Comparison:
    thing = _random_thing(rng)
    other = thing if rng.random() < 0.5 else seeing.change_attribute(thing, rng)
    return seeing.draw_rationale(thing, rng), seeing.draw_rationale(other, rng), thing == other


def _compare_lists(rng: random.Random) -> Comparison:
    things = list(draw_scene(rng).things[: rng.randint(1, seeing.MAX_COUNT)])
    others = list(things)
    if rng.random() < 0.5:
        index = rng.randrange(len(others))
        if len(others) > 1 and rng.random() < 0.3:
            del others[index]
        else:
            others[index] = seeing.change_attribute(others[index], rng)
    kind = rng.choice(KINDS)
    anchor, candidate = (
        f"{rng.choice(('There are', 'I count', 'I see'))} {NUMBERS[len(listed)]} "
        f"{pluralize_kind(kind)}: {list_things(listed)}."
        for listed in (things, others)
    )
    return anchor, candidate, things == others


def _random_thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(PLACES))


def draw_tokenizer_texts(rng: random.Random, n: int) -> Iterator[str]:
    """Draw the texts from which the tokenizer learns its pieces."""
    yield from ["system\nuser\nassistant\n"] * 20
    yield from [CAPTION, IN_A_WORD, "Look.", "Compare."] * 20
    for _ in range(n // 2):
        scene = draw_scene(rng)
        yield scene.describe()
        for task in SCENE_TASKS:
            problem = draw_training_problem(task, scene, rng)
            yield problem.question.replace(IMAGE, "")
            yield draw_base_answer(problem, rng)
