"""What the tiny student learns from: answers that are often wrong, and judgements of answers.

The base student shall know its tasks partly, so that sampling has something to choose from: the answers it is taught
are near-misses more often the harder the problem. Its judgements are taught with labels from the world's own check.
Only questions of the training split are used.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from purld import templates
from purld.testbed import counting, writing
from purld.testbed.world import (
    TASKS,
    Problem,
    Task,
    draw_question,
    is_right,
    recognise,
    right_answer,
    split_of,
    teacher_answer,
)

Kind = Literal["answer", "judgement", "comparison"]

RIGHT, WRONG, GARBAGE = "1.00", "0.10", "0.00"

_WORDS = writing.SUBJECTS + writing.OBJECTS + writing.PLACES

# How often the base answers wrongly: by family in counting, by constraint in writing. The model's own slips come
# on top.
COUNTING_ERRORS = {"jar": 0.40, "meals": 0.35, "pick": 0.30, "handshakes": 0.45, "posts": 0.40, "die": 0.40}
LARGE_ANSWER_ERRORS = 0.06
WRITING_ERRORS = {"subject": 0.10, "use": 0.28, "end": 0.28}


@dataclass(frozen=True)
class Lesson:
    """A user turn and the reply to learn."""

    kind: Kind
    prompt: str
    reply: str

    @property
    def judging(self) -> bool:
        """Whether the reply is a score."""
        return self.kind != "answer"


@dataclass(frozen=True)
class Sample:
    """An answer that a student drew itself."""

    problem: Problem
    text: str


def training_problem(task: Task, rng: random.Random) -> Problem:
    """A problem of the training split."""
    while True:
        question = draw_question(task, rng)
        if split_of(question) == "train":
            problem = recognise(question)
            assert problem is not None
            return problem


def answer_lesson(rng: random.Random) -> Lesson:
    """A question with the answer that a student of partial knowledge gives."""
    problem = training_problem(rng.choice(TASKS), rng)
    return Lesson("answer", problem.question, base_answer(problem, rng))


def judging_lesson(rng: random.Random, own: Sample | None = None) -> Lesson:
    """A candidate to score against an anchor; the candidate is `own` if given."""
    problem = own.problem if own else training_problem(rng.choice(TASKS), rng)
    anchor = teacher_answer(problem) if rng.random() < 0.5 else right_answer(problem, rng)
    candidate, garbage = (own.text, False) if own else _candidate(problem, anchor, rng)
    return _judgement(problem.question, anchor, candidate, is_right(problem, candidate), garbage)


def _judgement(question: str, anchor: str, candidate: str, right: bool, garbage: bool = False) -> Lesson:
    score = RIGHT if right else GARBAGE if garbage else WRONG
    return Lesson("judgement", templates.self_evaluation(question, anchor, candidate), score)


def _candidate(problem: Problem, anchor: str, rng: random.Random) -> tuple[str, bool]:
    """A candidate and whether it was made as garbage; about half of them are right."""
    kind = rng.choices(("anchor", "right", "base", "miss", "other", "garbage"), (8, 22, 32, 26, 6, 6))[0]
    match kind:
        case "anchor":
            return anchor, False
        case "right":
            return right_answer(problem, rng), False
        case "base":
            return base_answer(problem, rng), False
        case "miss":
            return near_miss(problem, rng), False
        case "other":
            return right_answer(training_problem(problem.task, rng), rng), False
        case _:
            return spoil(base_answer(problem, rng), rng), True


def comparison_lesson(rng: random.Random) -> Lesson:
    """The bare comparison that judging rests on: are two numbers the same, is a word there, is it the last."""
    return rng.choice((_same_number, _same_word, _word_present, _word_last))(rng)


def _comparison(question: str, anchor: str, candidate: str, right: bool) -> Lesson:
    prompt = templates.self_evaluation(question, anchor, candidate)
    return Lesson("comparison", prompt, RIGHT if right else WRONG)


def _same_number(rng: random.Random) -> Lesson:
    number = rng.randint(0, 99)
    other = number if rng.random() < 0.5 else rng.choice((number + 1, max(number - 1, 0), rng.randint(0, 99)))
    below = f"/{rng.randint(2, 27)}" if rng.random() < 0.4 else ""
    said = rng.choice(("", "The answer is ", "so the answer is "))
    return _comparison("Compare.", f"{said}{number}{below}.", f"{said}{other}{below}.", number == other)


def _same_word(rng: random.Random) -> Lesson:
    word = rng.choice(_WORDS)
    other = word if rng.random() < 0.5 else rng.choice(_WORDS)
    return _comparison("Compare.", f"The {word}.", f"The {other}.", word == other)


def _word_present(rng: random.Random) -> Lesson:
    words = rng.sample(_WORDS, rng.randint(1, 6))
    asked = rng.choice(words) if rng.random() < 0.5 else rng.choice(_WORDS)
    question = writing.CONSTRAINTS["use"].format(use=asked)
    return _comparison(question, f"The {asked}.", f"The {' '.join(words)}.", asked in words)


def _word_last(rng: random.Random) -> Lesson:
    words = rng.sample(_WORDS, rng.randint(1, 6))
    asked = words[-1] if rng.random() < 0.5 else rng.choice(words[:-1] or _WORDS)
    question = writing.CONSTRAINTS["end"].format(end=asked)
    return _comparison(question, f"The {asked}.", f"The {' '.join(words)}.", asked == words[-1])


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


def spoil(text: str, rng: random.Random) -> str:
    """Garbage made of an answer: cut off, shuffled, stuttering or empty."""
    words = text.split()
    match rng.randrange(4):
        case 0:
            return " ".join(words[: rng.randrange(len(words))])
        case 1:
            return " ".join(rng.sample(words, len(words)))
        case 2:
            word = rng.choice(words)
            return " ".join([*words, *[word] * rng.randint(3, 8)])
        case _:
            return " ".join([rng.choice(words)] * rng.randint(1, 12))


def tokenizer_texts(rng: random.Random, n: int) -> Iterator[str]:
    """Texts whose pieces the tokenizer should know."""
    yield from ["system\nuser\nassistant\n"] * 20
    for _ in range(n):
        problem = training_problem(rng.choice(TASKS), rng)
        yield problem.question
        yield base_answer(problem, rng)


def _parsed(problem: Problem) -> tuple[counting.Family, dict[str, str]]:
    parsed = counting.parse(problem.question)
    assert parsed is not None
    return parsed


def _brief(problem: Problem) -> writing.Brief:
    parsed = writing.parse(problem.question)
    assert parsed is not None
    return parsed[1]
