"""What the tiny student learns from: answers that are often wrong, and judgements of answers.

The base student shall know its tasks partly, so that sampling has something to choose from: the answers it is taught
are near-misses more often the harder the problem. Its judgements are taught with labels from the world's own check.
Only questions of the training split are used.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from purld.testbed.students.lessons import Candidates, Lesson, Phase, Sample, comparison_turn, judgement_turn
from purld.testbed.world import counting, writing
from purld.testbed.world.world import TEXT_TASKS, Problem, Task, draw_problem, split_of

_WORDS = writing.SUBJECTS + writing.OBJECTS + writing.PLACES

# How often the base answers wrongly: by family in counting, by constraint in writing. The model's own slips come
# on top.
COUNTING_ERRORS = {"jar": 0.40, "meals": 0.35, "pick": 0.30, "handshakes": 0.45, "posts": 0.40, "die": 0.40}
LARGE_ANSWER_ERRORS = 0.06
WRITING_ERRORS = {"subject": 0.10, "use": 0.28, "end": 0.28}


TOKENIZER_TEXTS = 6000
# A step's lessons, computed in so many parts.
LESSONS, PARTS = 64, 2
OWN_SAMPLES = 384
# One rise and fall of the learning rate.
CURRICULUM = (
    (
        Phase("compare", 600, judging=1.0, bare=1.0),
        Phase("judge", 600, judging=0.75, bare=0.25),
        Phase("mixed", 700, judging=0.5, bare=0.05, own=0.3),
        Phase("settle", 500, judging=0.4, own=0.5),
    ),
)


def lessons(phase: Phase, n: int, own: Sequence[Sample], rng: random.Random) -> list[Lesson]:
    """The `n` lessons of one step; `own` are samples to judge."""
    batch = []
    for index in range(n):
        if index >= round(phase.judging * n):
            batch.append(answer_lesson(rng))
        elif rng.random() < phase.bare:
            batch.append(comparison_lesson(rng))
        else:
            sample = rng.choice(own) if own and rng.random() < phase.own else None
            batch.append(judging_lesson(rng, sample))
    return batch


def problems(n: int, rng: random.Random) -> list[tuple[Problem, None]]:
    """Training problems; there are no pictures in them."""
    return [(training_problem(rng.choice(TEXT_TASKS), rng), None) for _ in range(n)]


def training_problem(task: Task, rng: random.Random) -> Problem:
    """A problem of the training split."""
    while True:
        problem = draw_problem(task, rng)
        if split_of(problem) == "train":
            return problem


def answer_lesson(rng: random.Random) -> Lesson:
    """A question with the answer that a student of partial knowledge gives."""
    problem = training_problem(rng.choice(TEXT_TASKS), rng)
    return Lesson("answer", problem.question, base_answer(problem, rng))


def judging_lesson(rng: random.Random, own: Sample | None = None) -> Lesson:
    """A candidate to score against an anchor; the candidate is `own` if given."""
    problem = own.problem if own else training_problem(rng.choice(TEXT_TASKS), rng)
    return judgement_turn(problem, CANDIDATES, rng, own)


def comparison_lesson(rng: random.Random) -> Lesson:
    """The bare comparison that judging rests on: are two numbers the same, is a word there, is it the last."""
    return rng.choice((_same_number, _same_word, _word_present, _word_last))(rng)


def _same_number(rng: random.Random) -> Lesson:
    number = rng.randint(0, 99)
    other = number if rng.random() < 0.5 else rng.choice((number + 1, max(number - 1, 0), rng.randint(0, 99)))
    below = f"/{rng.randint(2, 27)}" if rng.random() < 0.4 else ""
    said = rng.choice(("", "The answer is ", "so the answer is "))
    return comparison_turn("Compare.", f"{said}{number}{below}.", f"{said}{other}{below}.", number == other)


def _same_word(rng: random.Random) -> Lesson:
    word = rng.choice(_WORDS)
    other = word if rng.random() < 0.5 else rng.choice(_WORDS)
    return comparison_turn("Compare.", f"The {word}.", f"The {other}.", word == other)


def _word_present(rng: random.Random) -> Lesson:
    words = rng.sample(_WORDS, rng.randint(1, 6))
    asked = rng.choice(words) if rng.random() < 0.5 else rng.choice(_WORDS)
    question = writing.CONSTRAINTS["use"].format(use=asked)
    return comparison_turn(question, f"The {asked}.", f"The {' '.join(words)}.", asked in words)


def _word_last(rng: random.Random) -> Lesson:
    words = rng.sample(_WORDS, rng.randint(1, 6))
    asked = words[-1] if rng.random() < 0.5 else rng.choice(words[:-1] or _WORDS)
    question = writing.CONSTRAINTS["end"].format(end=asked)
    return comparison_turn(question, f"The {asked}.", f"The {' '.join(words)}.", asked == words[-1])


def base_answer(problem: Problem, rng: random.Random) -> str:
    """An answer of the base student: right or a near-miss, more often a miss if the problem is hard."""
    if problem.task == "writing":
        return writing.compose(_flawed(_brief(problem), WRITING_ERRORS, rng), rng)
    truth = Fraction(problem.truth)
    errors = COUNTING_ERRORS[problem.family] + LARGE_ANSWER_ERRORS * (truth.numerator >= 10)
    if rng.random() < errors:
        return near_miss(problem, rng)
    family, slots = _parsed(problem)
    return rng.choice(counting.phrasings(family.solve(slots)))


def near_miss(problem: Problem, rng: random.Random) -> str:
    """A wrong answer of the right form: a slip, a wrong operation, a swapped part, one dropped constraint."""
    if problem.task == "counting":
        family, slots = _parsed(problem)
        wrong = [m for m in family.mistakes(slots) if Fraction(m.answer) != Fraction(problem.truth)]
        return rng.choice(counting.phrasings(rng.choice(wrong)))
    brief = _brief(problem)
    while True:
        # A piece may use the dropped word by chance.
        text = writing.compose(_flawed(brief, {rng.choice(list(WRITING_ERRORS)): 1.0}, rng), rng)
        if not writing.fulfils(brief, text):
            return text


def _flawed(brief: writing.Brief, errors: dict[str, float], rng: random.Random) -> writing.Brief:
    """The brief with something else in place of what is asked, each part with its own probability."""
    others = {
        "subject": writing.SUBJECTS,
        "use": writing.OBJECTS,
        "end": writing.PLACES,
    }
    changes = {}
    for name, probability in errors.items():
        asked = getattr(brief, name)
        if rng.random() < probability:
            changes[name] = rng.choice([other for other in others[name] if other != asked])
    return replace(brief, **changes)


def tokenizer_texts(rng: random.Random, n: int) -> Iterator[str]:
    """Texts whose pieces the tokenizer should know."""
    yield from ["system\nuser\nassistant\n"] * 20
    for _ in range(n):
        problem = training_problem(rng.choice(TEXT_TASKS), rng)
        yield problem.question
        yield base_answer(problem, rng)


CANDIDATES = Candidates(
    (8, 22, 32, 26, 6, 6), base_answer, near_miss, lambda problem, rng: training_problem(problem.task, rng)
)


def _parsed(problem: Problem) -> tuple[counting.Family, dict[str, str]]:
    parsed = counting.parse(problem.question)
    assert parsed is not None
    return parsed


def _brief(problem: Problem) -> writing.Brief:
    parsed = writing.parse(problem.question)
    assert parsed is not None
    return parsed[1]
