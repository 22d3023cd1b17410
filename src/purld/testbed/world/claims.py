"""Parse sentences about a scene into claims, word for word, so that every statement can be checked.

A sentence that cannot be parsed makes its whole text unparsable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from purld.testbed.world.scenes import COLOURS, PLACES, SHAPES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five")
# The kinds of things that can be counted.
KINDS = (*SHAPES, *(f"{colour} shape" for colour in COLOURS))
MAX_SENTENCES = 3


@dataclass(frozen=True)
class Claim:
    """The content of one sentence about a scene.

    Attributes:
        things: the things that it says are there; if it counts, those that it counts.
        value: what it says that "it" is.
        number: how many things of `kind` it says there are.
        kind: the kind that it counts ("circle", "red shape").
    """

    things: tuple[Thing, ...]
    value: str | None = None
    number: int | None = None
    kind: str | None = None

    def is_true_of(self, scene: Scene) -> bool:
        """Tell whether the claim holds in a scene. What "it" refers to is not known here, so `value` is not checked."""
        if not set(self.things) <= set(scene.things):
            return False
        if self.kind is None:
            return True
        counted = [thing for thing in scene.things if is_of_kind(thing, self.kind)]
        return len(self.things) == self.number and set(self.things) == set(counted)


def parse_claims(text: str) -> list[Claim] | None:
    """Parse one to MAX_SENTENCES sentences, each closed by a period; return None if one cannot be parsed."""
    text = text.strip().lower()
    sentences = text[:-1].split(". ")
    if not text.endswith(".") or len(sentences) > MAX_SENTENCES:
        return None
    claims = [_parse_sentence(sentence) for sentence in sentences]
    known_claims = [claim for claim in claims if claim is not None]
    return known_claims if len(known_claims) == len(claims) else None


def is_of_kind(thing: Thing, kind: str) -> bool:
    """Tell whether a thing is of one of the KINDS."""
    return kind in (thing.shape, f"{thing.colour} shape")


def pluralize_kind(kind: str) -> str:
    """Return the plural of a kind."""
    return kind + ("es" if kind.endswith("ss") else "s")


def list_things(things: Sequence[Thing]) -> str:
    """List things in words: "a red circle at the top left and a blue ring at the top center"."""
    *first, last = (f"a {thing.name} at the {thing.place}" for thing in things)
    return f"{', '.join(first)} and {last}" if first else last


_C, _S, _P, _N = ("|".join(words) for words in (COLOURS, SHAPES, PLACES, NUMBERS))
_THING = f"a (?:{_C}) (?:{_S}) at the (?:{_P})"
_LIST = f"(?P<list>{_THING}(?:(?:, | and |, and ){_THING})*)"
_SINGULAR = {kind: kind for kind in KINDS} | {pluralize_kind(kind): kind for kind in KINDS}
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


def _parse_sentence(sentence: str) -> Claim | None:
    match = next((m for pattern in _PATTERNS if (m := pattern.fullmatch(sentence))), None)
    if match is None:
        return None
    parts = match.groupdict()
    if "list" not in parts:
        return Claim((Thing(parts["c"], parts["s"], parts["p"]),), parts["value"])
    things = tuple(Thing(*words) for words in _LISTED.findall(parts["list"]))
    if "n" not in parts:
        return Claim(things, parts["value"])
    return Claim(things, parts["value"], NUMBERS.index(parts["n"]), _SINGULAR[parts["kind"]])
