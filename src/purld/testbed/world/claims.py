"""What sentences about a scene claim: read word for word, so that every statement can be checked.

A sentence that cannot be read claims nothing that could be checked, and makes its text unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from purld.testbed.world.scenes import COLOURS, PLACES, SHAPES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five")
# Kinds of things that can be counted.
KINDS = (*SHAPES, *(f"{colour} shape" for colour in COLOURS))
MAX_SENTENCES = 3


@dataclass(frozen=True)
class Claim:
    """What one sentence says there is.

    `value` is what it says "it is"; `number` and `kind` ("circle", "red shape") what it counts, its `things` being
    those counted.
    """

    things: tuple[Thing, ...]
    value: str | None = None
    number: int | None = None
    kind: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether it is true of a scene. What "it" is is not known here."""
        if not set(self.things) <= set(scene.things):
            return False
        if self.kind is None:
            return True
        counted = [thing for thing in scene.things if is_of(thing, self.kind)]
        return len(self.things) == self.number and set(self.things) == set(counted)


def read_claims(text: str) -> list[Claim] | None:
    """A claim for each of one to MAX_SENTENCES sentences, all closed by a period; None if one cannot be read."""
    text = text.strip().lower()
    sentences = text[:-1].split(". ")
    if not text.endswith(".") or len(sentences) > MAX_SENTENCES:
        return None
    claims = [_read_sentence(sentence) for sentence in sentences]
    read = [claim for claim in claims if claim is not None]
    return read if len(read) == len(claims) else None


def is_of(thing: Thing, kind: str) -> bool:
    """Whether a thing is of one of the KINDS."""
    return kind in (thing.shape, f"{thing.colour} shape")


def plural(kind: str) -> str:
    """A kind's plural."""
    return kind + ("es" if kind.endswith("ss") else "s")


def listing(things: Sequence[Thing]) -> str:
    """Things in a row: "a red circle at the top left and a blue ring at the top center"."""
    *first, last = (f"a {thing.name} at the {thing.place}" for thing in things)
    return f"{', '.join(first)} and {last}" if first else last


_C, _S, _P, _N = ("|".join(words) for words in (COLOURS, SHAPES, PLACES, NUMBERS))
_THING = f"a (?:{_C}) (?:{_S}) at the (?:{_P})"
_LIST = f"(?P<list>{_THING}(?:(?:, | and |, and ){_THING})*)"
_SINGULAR = {kind: kind for kind in KINDS} | {plural(kind): kind for kind in KINDS}
_VALUE = rf"(?:it is (?:a |at the )?(?P<value>(?:{_C}) (?:{_S})|{_C}|{_S}|{_P}), (?:because|for) )?"
_PATTERNS = [
    re.compile(_VALUE + body)
    for body in (
        rf"(?:there is|there are|i see|i also see) {_LIST}",
        rf"(?:there is|there are|i count|i see) (?P<n>{_N}) (?P<kind>{'|'.join(_SINGULAR)})(?:, |: ){_LIST}",
        rf"the (?P<s>{_S}) at the (?P<p>{_P}) is (?P<c>{_C})",
        rf"the (?P<c>{_C}) shape at the (?P<p>{_P}) is a (?P<s>{_S})",
        rf"the (?P<c>{_C}) (?P<s>{_S}) is at the (?P<p>{_P})",
        rf"the shape at the (?P<p>{_P}) is a (?P<c>{_C}) (?P<s>{_S})",
    )
]
_LISTED = re.compile(rf"a ({_C}) ({_S}) at the ({_P})")


def _read_sentence(sentence: str) -> Claim | None:
    match = next((m for pattern in _PATTERNS if (m := pattern.fullmatch(sentence))), None)
    if match is None:
        return None
    parts = match.groupdict()
    if "list" not in parts:
        return Claim((Thing(parts["c"], parts["s"], parts["p"]),), parts["value"])
    things = tuple(Thing(*found) for found in _LISTED.findall(parts["list"]))
    if "n" not in parts:
        return Claim(things, parts["value"])
    return Claim(things, parts["value"], NUMBERS.index(parts["n"]), _SINGULAR[parts["kind"]])
