"""Define lessons, phases and candidates: what a tiny student is taught, in any domain."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL.Image import Image as PilImage

from purld import templates
from purld.testbed.world.scenes import THING_COUNTS
from purld.testbed.world.world import Problem, is_right, right_answer, teacher_answer

Kind = Literal["answer", "caption", "lookup", "judgement", "comparison"]

RIGHT, WRONG, GARBAGE = "1.00", "0.10", "0.00"


@dataclass(frozen=True)
class Lesson:
    """A prompt and the reply to learn; `image` is the image at the prompt's IMAGE."""

    kind: Kind
    prompt: str
    reply: str
    image: PilImage | None = None

    @property
    def judging(self) -> bool:
        """True if the reply is a score."""
        return self.kind in ("judgement", "comparison")

    @property
    def bare(self) -> bool:
        """True if the reply is only a word or a number."""
        return self.judging or self.kind == "lookup"


@dataclass(frozen=True)
class Sample:
    """An answer that a student sampled itself, with its problem and image."""

    problem: Problem
    text: str
    image: PilImage | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of the curriculum.

    Attributes:
        name: for the build log.
        steps: number of optimizer steps.
        judging: share of judgements among the lessons.
        own: share of judgements whose candidate the student sampled itself.
        bare: share of bare comparisons among the judgements.
        lookups: share of the other lessons that ask for one word about an image.
        captions: share of the other lessons that ask for all that an image shows; the rest are answers.
        errors: factor on the base's error rate in answers.
        thing_counts: how many things a scene may hold.
    """

    name: str
    steps: int
    judging: float
    own: float = 0.0
    bare: float = 0.0
    lookups: float = 0.0
    captions: float = 0.0
    errors: float = 1.0
    thing_counts: Sequence[int] = THING_COUNTS


@dataclass(frozen=True)
class Candidates:
    """A domain's sources of candidates to judge; about half of the candidates are right.

    `weights` are those of the anchor itself, a right answer, the base's answer, a near-miss, an answer to another
    problem, and garbage.
    """

    weights: tuple[int, int, int, int, int, int]
    base_answer: Callable[[Problem, random.Random], str]
    near_miss: Callable[[Problem, random.Random], str]
    other_problem: Callable[[Problem, random.Random], Problem]

    def draw_candidate(self, problem: Problem, anchor: str, rng: random.Random) -> tuple[str, bool]:
        """Draw a candidate; also return whether it was made as garbage."""
        match rng.choices(("anchor", "right", "base", "miss", "other", "garbage"), self.weights)[0]:
            case "anchor":
                return anchor, False
            case "right":
                return right_answer(problem, rng), False
            case "base":
                return self.base_answer(problem, rng), False
            case "miss":
                return self.near_miss(problem, rng), False
            case "other":
                return right_answer(self.other_problem(problem, rng), rng), False
            case _:
                return spoil_answer(self.base_answer(problem, rng), rng), True


def make_judgement_lesson(
    problem: Problem,
    candidates: Candidates,
    rng: random.Random,
    own: Sample | None = None,
    image: PilImage | None = None,
) -> Lesson:
    """Make a lesson that scores a candidate against an anchor; the candidate is `own` if given, else drawn."""
    anchor = teacher_answer(problem) if rng.random() < 0.5 else right_answer(problem, rng)
    candidate, garbage = (own.text, False) if own else candidates.draw_candidate(problem, anchor, rng)
    score = RIGHT if is_right(problem, candidate) else GARBAGE if garbage else WRONG
    return Lesson("judgement", templates.self_evaluation_turn(problem.question, anchor, candidate), score, image)


def make_comparison_lesson(
    question: str, anchor: str, candidate: str, right: bool, image: PilImage | None = None
) -> Lesson:
    """Make a bare comparison in the words of the self-evaluation prompt."""
    prompt = templates.self_evaluation_turn(question, anchor, candidate)
    return Lesson("comparison", prompt, RIGHT if right else WRONG, image)


def spoil_answer(text: str, rng: random.Random) -> str:
    """Make garbage of an answer: cut off, shuffled, stuttering or empty."""
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
