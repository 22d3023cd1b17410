"""What a tiny student is taught, one lesson at a time, whatever the domain."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from PIL.Image import Image

from purld import templates
from purld.testbed.world import Problem

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
    `captions` for all of it; the rest are answers, wrong `errors` times as often as the base's shall be.
    """

    name: str
    steps: int
    judging: float
    own: float = 0.0
    bare: float = 0.0
    lookups: float = 0.0
    captions: float = 0.0
    errors: float = 1.0


def judgement(
    question: str, anchor: str, candidate: str, right: bool, garbage: bool = False, picture: Image | None = None
) -> Lesson:
    """A candidate to score against an anchor."""
    score = RIGHT if right else GARBAGE if garbage else WRONG
    return Lesson("judgement", templates.self_evaluation(question, anchor, candidate), score, picture)


def comparison(question: str, anchor: str, candidate: str, right: bool, picture: Image | None = None) -> Lesson:
    """A bare comparison in the words of the self-evaluation prompt."""
    prompt = templates.self_evaluation(question, anchor, candidate)
    return Lesson("comparison", prompt, RIGHT if right else WRONG, picture)


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
