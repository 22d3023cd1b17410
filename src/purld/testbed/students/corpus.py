"""Draw the lessons of the student that reads text: answers that are often wrong, and judgements of answers.

The base student must know its tasks only partly, so that sampling has something to choose from: the harder a problem,
the more often the taught answer is a near-miss. Judgements are labelled by the world's own check. Only questions of the
training split are used.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from purld.testbed.students.lessons import (
    Candidates,
    Lesson,
    Phase,
    Sample,
    make_comparison_lesson,
    make_judgement_lesson,
)
from purld.testbed.world import counting, writing
from purld.testbed.world.world import TEXT_TASKS, Problem, Task, draw_problem, split_of

_WORDS = writing.SUBJECTS + writing.OBJECTS + writing.PLACES

# How often the base answers wrongly, by family in counting and by constraint in writing. The model's own mistakes add
# to these.
COUNTING_ERROR_RATES = {"jar": 0.40, "meals": 0.35, "pick": 0.30, "handshakes": 0.45, "posts": 0.40, "die": 0.40}
LARGE_ANSWER_ERROR_RATE = 0.06
WRITING_ERROR_RATES = {"subject": 0.10, "use": 0.28, "end": 0.28}

TOKENIZER_TEXTS = 6000
LESSONS_PER_STEP, MICRO_BATCHES = 64, 2
OWN_SAMPLES = 384
# A single round: one rise and fall of the learning rate.
CURRICULUM = (
    (
        Phase("compare", 600, judging=1.0, bare=1.0),
        Phase("judge", 600, judging=0.75, bare=0.25),
        Phase("mixed", 700, judging=0.5, bare=0.05, own=0.3),
        Phase("settle", 500, judging=0.4, own=0.5),
    ),
)


def draw_lessons(phase: Phase, n: int, own: Sequence[Sample], rng: random.Random) -> list[Lesson]:
    """Draw the `n` lessons of one step; `own` are samples to judge."""
    batch = []
    for index in range(n):
        if index >= round(phase.judging * n):
            batch.append(draw_answer_lesson(rng))
        elif rng.random() < phase.bare:
            batch.append(draw_comparison_lesson(rng))
        else:
            sample = rng.choice(own) if own and rng.random() < phase.own else None
            batch.append(draw_judgement_lesson(rng, sample))
    return batch


def draw_problems(n: int, rng: random.Random) -> list[tuple[Problem, None]]:
    """Draw training problems; they have no images."""
    return [(draw_training_problem(rng.choice(TEXT_TASKS), rng), None) for _ in range(n)]


def draw_training_problem(task: Task, rng: random.Random) -> Problem:
    """Draw a problem of the training split."""
    while True:
        problem = draw_problem(task, rng)
        if split_of(problem) == "train":
            return problem


def draw_answer_lesson(rng: random.Random) -> Lesson:
    """Draw a question with the answer that a student of partial knowledge gives."""
    problem = draw_training_problem(rng.choice(TEXT_TASKS), rng)
    return Lesson("answer", problem.question, draw_base_answer(problem, rng))


def draw_judgement_lesson(rng: random.Random, own: Sample | None = None) -> Lesson:
    """Draw a candidate to score against an anchor; the candidate is `own` if given."""
    problem = own.problem if own else draw_training_problem(rng.choice(TEXT_TASKS), rng)
    return make_judgement_lesson(problem, CANDIDATES, rng, own)


def draw_comparison_lesson(rng: random.Random) -> Lesson:
    """Draw a bare comparison: are two numbers or words the same, is a word present, is it the last."""
    return rng.choice((_compare_numbers, _compare_words, _compare_word_present, _compare_last_word))(rng)


def _compare_numbers(rng: random.Random) -> Lesson:
    number = rng.randint(0, 99)
    other = number if rng.random() < 0.5 else rng.choice((number + 1, max(number - 1, 0), rng.randint(0, 99)))
    denominator = f"/{rng.randint(2, 27)}" if rng.random() < 0.4 else ""
    opening = rng.choice(("", "The answer is ", "so the answer is "))
    return make_comparison_lesson(
        "Compare.", f"{opening}{number}{denominator}.", f"{opening}{other}{denominator}.", number == other
    )


def _compare_words(rng: random.Random) -> Lesson:
    word = rng.choice(_WORDS)
    other = word if rng.random() < 0.5 else rng.choice(_WORDS)
    return make_comparison_lesson("Compare.", f"The {word}.", f"The {other}.", word == other)


def _compare_word_present(rng: random.Random) -> Lesson:
    words = rng.sample(_WORDS, rng.randint(1, 6))
    asked = rng.choice(words) if rng.random() < 0.5 else rng.choice(_WORDS)
    question = writing.CONSTRAINTS["use"].format(use=asked)
    return make_comparison_lesson(question, f"The {asked}.", f"The {' '.join(words)}.", asked in words)


def _compare_last_word(rng: random.Random) -> Lesson:
    words = rng.sample(_WORDS, rng.randint(1, 6))
    asked = words[-1] if rng.random() < 0.5 else rng.choice(words[:-1] or _WORDS)
    question = writing.CONSTRAINTS["end"].format(end=asked)
    return make_comparison_lesson(question, f"The {asked}.", f"The {' '.join(words)}.", asked == words[-1])


def draw_base_answer(problem: Problem, rng: random.Random) -> str:
    """Draw an answer of the base student: right or a near-miss, more often a miss if the problem is hard."""
    if problem.task == "writing":
        return writing.compose_piece(_change_brief(_parse_brief(problem), WRITING_ERROR_RATES, rng), rng)
    truth = Fraction(problem.truth)
    errors = COUNTING_ERROR_RATES[problem.family] + LARGE_ANSWER_ERROR_RATE * (truth.numerator >= 10)
    if rng.random() < errors:
        return draw_near_miss(problem, rng)
    family, slots = _parse_counting_problem(problem)
    return rng.choice(counting.list_phrasings(family.solve(slots)))


def draw_near_miss(problem: Problem, rng: random.Random) -> str:
    """Draw a wrong answer of the right form: a slip, a wrong operation, a swapped part, a dropped constraint."""
    if problem.task == "counting":
        family, slots = _parse_counting_problem(problem)
        wrong = [m for m in family.mistakes(slots) if Fraction(m.answer) != Fraction(problem.truth)]
        return rng.choice(counting.list_phrasings(rng.choice(wrong)))
    brief = _parse_brief(problem)
    while True:
        # A piece may use the dropped word by chance, so draw until it is wrong.
        text = writing.compose_piece(_change_brief(brief, {rng.choice(list(WRITING_ERROR_RATES)): 1.0}, rng), rng)
        if not writing.fulfils_brief(brief, text):
            return text


def _change_brief(brief: writing.Brief, errors: dict[str, float], rng: random.Random) -> writing.Brief:
    """Return the brief with parts replaced by something else, each with its own probability."""
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


def draw_tokenizer_texts(rng: random.Random, n: int) -> Iterator[str]:
    """Draw the texts from which the tokenizer learns its pieces."""
    yield from ["system\nuser\nassistant\n"] * 20
    for _ in range(n):
        problem = draw_training_problem(rng.choice(TEXT_TASKS), rng)
        yield problem.question
        yield draw_base_answer(problem, rng)


CANDIDATES = Candidates(
    (8, 22, 32, 26, 6, 6),
    draw_base_answer,
    draw_near_miss,
    lambda problem, rng: draw_training_problem(problem.task, rng),
)


def _parse_counting_problem(problem: Problem) -> tuple[counting.CountingFamily, dict[str, str]]:
    parsed = counting.parse_question(problem.question)
    assert parsed is not None
    return parsed


def _parse_brief(problem: Problem) -> writing.Brief:
    parsed = writing.parse_question(problem.question)
    assert parsed is not None
    return parsed[1]
