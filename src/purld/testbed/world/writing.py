"""Short pieces about a given subject under two constraints that a rule can check.

The rules look at form only: the subject is named, the constraints hold, the sentences are sentences. Literary quality
is not judged.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from purld.testbed.world.slots import Slots, parse_slots

# fmt: off
SUBJECTS = (
    "fox", "sailor", "baker", "farmer", "horse", "owl", "painter", "singer",
    "doctor", "king", "queen", "monk", "wolf", "rabbit", "teacher", "poet",
)
OBJECTS = (
    "lantern", "ladder", "basket", "kite", "hammer", "candle", "letter", "apple",
    "feather", "mirror", "drum", "blanket", "crown", "rope", "wagon", "compass",
)
PLACES = (
    "harbor", "garden", "bridge", "forest", "tower", "market", "meadow", "lake",
    "village", "castle", "mill", "field", "barn", "station", "valley", "church",
)
# fmt: on
TAKING_VERBS = ("found", "carried", "dropped", "sold", "mended", "hid")
RESTING_VERBS = ("waited", "slept", "sang", "danced", "walked", "worked")
PREPOSITIONS = ("near the", "by the", "behind the", "beyond the")
TIMES = ("At dawn", "At noon", "In winter", "In summer", "One day", "Last night")
ADJECTIVES = ("old", "heavy", "bright", "broken", "little", "golden")
MAX_SENTENCES = 3
MAX_CHARACTERS = 400

OPENINGS = (
    "Write a short piece about the {subject}.",
    "Tell me about the {subject}.",
    "Describe the {subject}.",
)
CONSTRAINTS = {
    "use": "Use the word {use}.",
    "end": "End with the word {end}.",
}
FAMILY = "+".join(CONSTRAINTS)


@dataclass(frozen=True)
class Brief:
    """The requirements of a piece: name the subject, use a word, end with a word."""

    subject: str
    use: str
    end: str

    def describe(self) -> str:
        """Return the brief as a short text."""
        return f"names {self.subject}; uses {self.use}; ends with {self.end}"


def draw_question(rng: random.Random) -> str:
    """Draw a random question."""
    names = rng.sample(list(CONSTRAINTS), len(CONSTRAINTS))
    text = " ".join([rng.choice(OPENINGS), *(CONSTRAINTS[name] for name in names)])
    return text.format(subject=rng.choice(SUBJECTS), use=rng.choice(OBJECTS), end=rng.choice(PLACES))


def parse_question(question: str) -> tuple[str, Brief] | None:
    """Return the family and brief of a question, or None if it is not a writing problem."""
    sentences = re.findall(r"\S[^.]*\.", question)
    if len(sentences) != 3 or " ".join(sentences) != question:
        return None
    parts = [_first_match(OPENINGS, sentences[0])]
    parts += [_first_match(CONSTRAINTS.values(), sentence) for sentence in sentences[1:]]
    slots = {key: value for part in parts for key, value in (part or {}).items()}
    if slots.keys() != {"subject", *CONSTRAINTS}:
        return None
    return FAMILY, Brief(slots["subject"], slots["use"], slots["end"])


def _first_match(choices: Iterable[str], text: str) -> Slots | None:
    matches = (parse_slots(choice, text) for choice in choices)
    return next((slots for slots in matches if slots is not None), None)


def fulfils_brief(brief: Brief, text: str) -> bool:
    """Tell whether `text` does what the brief asks and consists of sane sentences.

    Sane: one to three sentences that each end with a period and have at least four words, no word three times in a
    row, at most MAX_CHARACTERS.
    """
    text = text.strip()
    sentences = [split_words(sentence) for sentence in text.split(".")[:-1]]
    words = [word for sentence in sentences for word in sentence]
    sane = (
        len(text) <= MAX_CHARACTERS
        and text.endswith(".")
        and 1 <= len(sentences) <= MAX_SENTENCES
        and all(len(sentence) >= 4 for sentence in sentences)
        and not any(a == b == c for a, b, c in zip(words, words[1:], words[2:]))
    )
    return sane and brief.subject.lower() in words and brief.use.lower() in words and words[-1] == brief.end.lower()


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[a-z']+", text.lower())


def compose_piece(brief: Brief, rng: random.Random) -> str:
    """Compose a random piece that fulfils the brief."""
    count = rng.choice((1, 2))
    use_index = rng.randrange(count)
    sentences = []
    for index in range(count):
        place = brief.end if index == count - 1 else rng.choice(PLACES)
        item = brief.use if index == use_index else None
        sentences.append(_sentence(brief.subject, item, place, index == 0, rng))
    return " ".join(sentences)


def _sentence(subject: str, item: str | None, place: str, first: bool, rng: random.Random) -> str:
    preposition = rng.choice(PREPOSITIONS)
    resting_verb, taking_verb = rng.choice(RESTING_VERBS), rng.choice(TAKING_VERBS)
    who = f"the {subject}" if first or rng.random() < 0.3 else "they"
    if item is None and rng.random() < 0.4:
        return f"{rng.choice(TIMES)} {who} {resting_verb} {preposition} {place}."
    item = item or rng.choice(OBJECTS)
    if first or rng.random() < 0.6:
        return f"{who.capitalize()} {taking_verb} the {item} {preposition} {place}."
    return f"They saw the {rng.choice(ADJECTIVES)} {item} {preposition} {place}."
