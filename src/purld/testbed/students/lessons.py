"""What a tiny student is taught, one lesson at a time, whatever the domain."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL.Image import Image

from purld import templates
from purld.testbed.world.scenes import THINGS
from purld.testbed.world.world import Problem, is_right, right_answer, teacher_answer

Kind = Literal["answer", "caption", "lookup", "judgement", "comparison"]

RIGHT, WRONG, GARBAGE = "1.00", "0.10", "0.00"


@dataclass(frozen=True)
class Lesson:
    """A user turn and the reply to learn; `picture` is what stands at the turn's IMAGE."""

    kind: Kind
    prompt: str
    reply: str
    picture: Image | None = None

    @property
    def judging(self) -> bool:
        """Whether the reply is a score."""
        return self.kind in ("judgement", "comparison")

    @property
    def bare(self) -> bool:
        """Whether the reply is a word or a number: nothing but what matters."""
        return self.judging or self.kind == "lookup"


@dataclass(frozen=True)
class Sample:
    """An answer that a student drew itself, to a problem with its picture."""

    problem: Problem
    text: str
    picture: Image | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of the curriculum.

    `judging` is the share of judgements among the lessons; of these, `bare` are bare comparisons and `own` have a
    candidate that the student drew itself. Of the other lessons `lookups` ask for a word of what a picture shows and
    `captions` for all of it; the rest are answers, wrong `errors` times as often as the base's shall be. `things` are
    the numbers of things that a scene may hold.
    """

    name: str
    steps: int
    judging: float
    own: float = 0.0
    bare: float = 0.0
    lookups: float = 0.0
    captions: float = 0.0
    errors: float = 1.0
    things: Sequence[int] = THINGS


@dataclass(frozen=True)
class Candidates:
    """Where a domain's candidates to judge come from; about half of them are right.

    `weights` are of the anchor itself, a right answer, the base's, a near-miss, an answer to another problem, garbage.
    """

    weights: tuple[int, int, int, int, int, int]
    base: Callable[[Problem, random.Random], str]
    miss: Callable[[Problem, random.Random], str]
    another: Callable[[Problem, random.Random], Problem]

    def draw(self, problem: Problem, anchor: str, rng: random.Random) -> tuple[str, bool]:
        """A candidate and whether it was made as garbage."""
        match rng.choices(("anchor", "right", "base", "miss", "other", "garbage"), self.weights)[0]:
            case "anchor":
                return anchor, False
            case "right":
                return right_answer(problem, rng), False
            case "base":
                return self.base(problem, rng), False
            case "miss":
                return self.miss(problem, rng), False
            case "other":
                return right_answer(self.another(problem, rng), rng), False
            case _:
                return spoil_answer(self.base(problem, rng), rng), True


def judgement_turn(
    problem: Problem,
    candidates: Candidates,
    rng: random.Random,
    own: Sample | None = None,
    picture: Image | None = None,
) -> Lesson:
    """A candidate to score against an anchor; the candidate is `own` if given."""
    anchor = teacher_answer(problem) if rng.random() < 0.5 else right_answer(problem, rng)
    candidate, garbage = (own.text, False) if own else candidates.draw(problem, anchor, rng)
    score = RIGHT if is_right(problem, candidate) else GARBAGE if garbage else WRONG
    return Lesson("judgement", templates.self_evaluation_turn(problem.question, anchor, candidate), score, picture)


def comparison_turn(question: str, anchor: str, candidate: str, right: bool, picture: Image | None = None) -> Lesson:
    """A bare comparison in the words of the self-evaluation prompt."""
    prompt = templates.self_evaluation_turn(question, anchor, candidate)
    return Lesson("comparison", prompt, RIGHT if right else WRONG, picture)


def spoil_answer(text: str, rng: random.Random) -> str:
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
