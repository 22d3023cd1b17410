"""Make pairs of answers of which one is known to be worse, without gold: an answer and a spoiled copy of it.

Spoiling changes the text a little, as a wrong answer differs from a right one. A way of spoiling that does not apply to
a text (no number in it, a single sentence) gives None. The words are English; the other ways work in any language.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

_NUMBER = re.compile(r"\d+")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+")  # a capitalised word within a sentence
_VERB = re.compile(r"\b(is|are|was|were|can|could|will|would|should|has|have|does|do|did)\b(?! not)")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]+\s*")
_OTHER_NAMES = ("Robin", "Tuesday", "Vienna", "Amazon", "Kepler")


def change_number(text: str, rng: random.Random) -> str | None:
    """Replace one number by a near one, wherever it stands."""
    numbers = sorted(set(_NUMBER.findall(text)))
    if not numbers:
        return None
    number = rng.choice(numbers)
    value = int(number[:18])
    other = str(max(0, value + rng.choice([-2, -1, 1, 2, 10])))
    if other == number:
        other = str(value + 1)
    return re.sub(rf"(?<!\d){number}(?!\d)", other, text)


def change_name(text: str, rng: random.Random) -> str | None:
    """Replace one name within a sentence by another."""
    names = sorted(set(_NAME.findall(text)))
    if not names:
        return None
    name = rng.choice(names)
    return re.sub(rf"\b{name}\b", rng.choice([other for other in _OTHER_NAMES if other != name]), text)


def insert_negation(text: str, rng: random.Random) -> str | None:
    """Put "not" after one verb."""
    verbs = list(_VERB.finditer(text))
    if not verbs:
        return None
    end = rng.choice(verbs).end()
    return f"{text[:end]} not{text[end:]}"


def swap_sentences(text: str, rng: random.Random) -> str | None:
    """Exchange two neighbouring sentences that differ."""
    sentences = [match.group() for match in _SENTENCE.finditer(text if text.endswith("\n") else text + "\n")]
    places = [i for i in range(len(sentences) - 1) if sentences[i].strip() != sentences[i + 1].strip()]
    if not places:
        return None
    i = rng.choice(places)
    sentences[i], sentences[i + 1] = sentences[i + 1].strip() + " ", sentences[i].strip() + " "
    return "".join(sentences).strip()


def cut_end(text: str, rng: random.Random) -> str | None:
    """Drop the last third to half of the words."""
    words = list(re.finditer(r"\S+", text))
    if len(words) < 4:
        return None
    kept = rng.randint(len(words) // 2, 2 * len(words) // 3)
    return text[: words[kept - 1].end()]


SPOILERS: dict[str, Callable[[str, random.Random], str | None]] = {
    "number": change_number,
    "name": change_name,
    "negation": insert_negation,
    "order": swap_sentences,
    "end": cut_end,
}
"""The ways to spoil an answer, by name; each is (text, random generator) -> the spoiled text, or None."""


def spoil_answer(text: str, seed: str) -> dict[str, str]:
    """Spoil a text in every way that applies and changes it; the same seed gives the same texts."""
    spoiled: dict[str, str] = {}
    for name, spoiler in SPOILERS.items():
        changed = spoiler(text, random.Random(f"{seed}/{name}"))
        if changed is not None and changed.strip() and changed != text:
            spoiled[name] = changed
    return spoiled
