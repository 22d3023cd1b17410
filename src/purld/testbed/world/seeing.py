"""Questions about a scene in two forms, as A-OKVQA asks them: with options to choose from, or for a free sentence.

Five families: the colour of a shape, the shape of a colour, the place of a thing, what a cell holds, how many there
are. A choice is right if it commits itself to the right option. A rationale is right if every statement in it is true
of the scene and its first sentence says what was asked and where it can be seen.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from purld.testbed.world.claims import KINDS, NUMBERS, is_of, listing, plural, read_claims
from purld.testbed.world.scenes import COLOURS, PLACES, SHAPES, Scene, Thing

OPTIONS, MOST = 4, 3
# How often a rationale says something more of the scene than it was asked.
EXTRAS = 0.2


@dataclass(frozen=True)
class Family:
    """Questions about one thing: templates with the slots c (colour), s (shape) and p (place).

    Attributes:
        asks: questions; their slots say which thing is meant.
        value: what is asked, as an option says it.
        statement: a sentence, without its period, that says it.
        rationales: sentences that say all that is known of the thing.
    """

    asks: tuple[str, ...]
    value: str
    statement: str
    rationales: tuple[str, ...]


_BARE = ("There is a {c} {s} at the {p}.", "I see a {c} {s} at the {p}.")
FAMILIES = {
    "colour": Family(
        ("What colour is the {s}?", "Which colour does the {s} have?"),
        "{c}",
        "The {s} is {c}",
        (*_BARE, "The {s} at the {p} is {c}.", "It is {c}, because the {s} at the {p} is {c}."),
    ),
    "shape": Family(
        ("Which shape is {c}?", "What is the shape of the {c} thing?"),
        "{s}",
        "The {c} shape is a {s}",
        (*_BARE, "The {c} shape at the {p} is a {s}.", "It is a {s}, because the {c} shape at the {p} is a {s}."),
    ),
    "place": Family(
        ("Where is the {c} {s}?", "At which place is the {c} {s}?"),
        "{p}",
        "The {c} {s} is at the {p}",
        (*_BARE, "The {c} {s} is at the {p}.", "It is at the {p}, because the {c} {s} is at the {p}."),
    ),
    "cell": Family(
        ("What is at the {p}?", "Which thing is at the {p}?"),
        "{c} {s}",
        "There is a {c} {s} at the {p}",
        (*_BARE, "The shape at the {p} is a {c} {s}.", "It is a {c} {s}, because the shape at the {p} is a {c} {s}."),
    ),
}
COUNT = "count"
_COUNT_ASKS = ("How many {kinds} are there?", "How many {kinds} can you see?")
_COUNT_RATIONALES = ("There {are} {n} {kinds}, {list}.", "I count {n} {kinds}: {list}.", "I see {n} {kinds}, {list}.")
_CHOICES = (
    "The answer is {v}.",
    "{statement}.",
    "{statement}, so the answer is {v}.",
    "{statement}. The answer is {v}.",
)
_PARTS = {"c": ("colour", COLOURS), "s": ("shape", SHAPES), "p": ("place", PLACES)}


@dataclass(frozen=True)
class Ask:
    """What a question asks: about the things that have all `given` parts, or about how many are of a `kind`."""

    family: str
    given: tuple[tuple[str, str], ...] = ()
    kind: str = ""

    def targets(self, scene: Scene) -> tuple[Thing, ...]:
        """The things that are meant."""
        if self.kind:
            return tuple(thing for thing in scene.things if is_of(thing, self.kind))
        return tuple(t for t in scene.things if all(getattr(t, part) == value for part, value in self.given))

    def fits(self, scene: Scene) -> bool:
        """Whether it has one answer: something to count, MOST at most, or one thing that is meant."""
        return len(self.targets(scene)) in (range(1, MOST + 1) if self.kind else (1,))

    def value(self, things: Sequence[Thing]) -> str:
        """The answer in a word or two if `things` are those that are meant."""
        return NUMBERS[len(things)] if self.kind else _fill(FAMILIES[self.family].value, things[0])

    def statement(self, things: Sequence[Thing]) -> str:
        """The answer as a statement without its period."""
        if self.kind:
            return f"There {_are(things)} {self.value(things)} {_kinds(self.kind, things)}"
        return _fill(FAMILIES[self.family].statement, things[0])


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene; without options it asks for a rationale."""

    ask: Ask
    options: tuple[str, ...]
    scene: Scene

    @property
    def value(self) -> str:
        """The right answer in a word or two."""
        return self.ask.value(self.ask.targets(self.scene))


def draw(scene: Scene, choice: bool, rng: random.Random) -> str:
    """A question about a scene that has an answer, `choice` with options."""
    while True:
        family, thing = rng.choice((*FAMILIES, COUNT)), rng.choice(scene.things)
        if family == COUNT:
            kind = rng.choice((thing.shape, f"{thing.colour} shape"))
            text = rng.choice(_COUNT_ASKS).format(kinds=plural(kind))
        else:
            text = _fill(rng.choice(FAMILIES[family].asks), thing)
        ask = _ASKS[text]
        if ask.fits(scene):
            break
    text = f"Question: {text}"
    if not choice:
        return text
    options = " ".join(f"({place}) {option}" for place, option in enumerate(_draw_options(ask, scene, rng)))
    return f"{text}\nOptions: {options}"


def parse(text: str, scene: Scene) -> SceneQuestion | None:
    """The question of a text about a scene, or None if it is not one that has an answer."""
    match = re.fullmatch(r"Question: ([^\n]+)(?:\nOptions: ([^\n]+))?", text)
    ask = _ASKS.get(match[1]) if match else None
    if match is None or ask is None or not ask.fits(scene):
        return None
    options = _read_options(match[2]) if match[2] else ()
    question = SceneQuestion(ask, options, scene)
    return question if not match[2] or question.value in options else None


def is_right(question: SceneQuestion, text: str) -> bool:
    """Whether a text answers the question."""
    return _chosen(question, text) == question.value if question.options else _is_grounded(question, text)


def wordings(question: SceneQuestion, things: Sequence[Thing] | None = None) -> list[str]:
    """Answers that say the same in different words: the truth, or what would be true if `things` were meant."""
    ask = question.ask
    things = ask.targets(question.scene) if things is None else things
    if question.options:
        return [w.format(v=ask.value(things), statement=ask.statement(things)) for w in _CHOICES]
    if not ask.kind:
        return [_fill(rationale, things[0]) for rationale in FAMILIES[ask.family].rationales]
    parts = {"n": NUMBERS[len(things)], "kinds": _kinds(ask.kind, things), "list": listing(things), "are": _are(things)}
    return [rationale.format(**parts) for rationale in _COUNT_RATIONALES]


def right_answer(question: SceneQuestion, rng: random.Random) -> str:
    """A right answer in randomly chosen words."""
    text = rng.choice(wordings(question))
    others = [thing for thing in question.scene.things if thing not in question.ask.targets(question.scene)]
    if not question.options and others and rng.random() < EXTRAS:
        text += _extra(rng.choice(others))
    return text


def rationale(thing: Thing, rng: random.Random) -> str:
    """A sentence that says all that is known of a thing."""
    return _fill(rng.choice(rng.choice(list(FAMILIES.values())).rationales), thing)


def mistake(question: SceneQuestion, rng: random.Random) -> str:
    """A wrong answer of the right form: another option, a neighbour, one part mistaken, a count that is off by one."""
    while True:
        text = _mistaken_choice(question, rng) if question.options else _mistaken_rationale(question, rng)
        if not is_right(question, text):
            return text


def _mistaken_choice(question: SceneQuestion, rng: random.Random) -> str:
    """Another option, now and then one that is not there."""
    ask, targets = question.ask, question.ask.targets(question.scene)
    values = [option for option in question.options if option != question.value]
    if rng.random() < 0.15:
        values = [v for v in _values(ask) if v not in question.options]
    return rng.choice(wordings(question, _with_value(ask, targets, rng.choice(values))))


def _mistaken_rationale(question: SceneQuestion, rng: random.Random) -> str:
    ask, scene = question.ask, question.scene
    targets = list(ask.targets(scene))
    others = [thing for thing in scene.things if thing not in targets]
    kind = rng.choices(("asked", "any", "neighbour", "extra"), (45, 20, 25, 10))[0]
    if kind == "extra" and others:
        return rng.choice(wordings(question)) + _extra(slip(rng.choice(others), rng))
    if ask.kind:
        if kind == "any" or (len(targets) == 1 and not others):
            place = rng.randrange(len(targets))
            targets[place] = slip(targets[place], rng)
        elif others and (len(targets) == 1 or rng.random() < 0.5):
            targets.append(rng.choice(others))
        else:
            targets.remove(rng.choice(targets))
        return rng.choice(wordings(question, sorted(targets, key=lambda t: PLACES.index(t.place))))
    if kind == "neighbour" and others:
        return rng.choice(wordings(question, [rng.choice(others)]))
    asked = [part for part in _PARTS if kind != "asked" or f"{{{part}}}" in FAMILIES[ask.family].value]
    return rng.choice(wordings(question, [slip(targets[0], rng, rng.choice(asked))]))


def slip(thing: Thing, rng: random.Random, part: str | None = None) -> Thing:
    """The thing with one of its parts (c, s or p) mistaken."""
    name, values = _PARTS[part or rng.choice(list(_PARTS))]
    return replace(thing, **{name: rng.choice([v for v in values if v != getattr(thing, name)])})


def _is_grounded(question: SceneQuestion, text: str) -> bool:
    claims = read_claims(text)
    if claims is None or not all(claim.holds(question.scene) for claim in claims):
        return False
    first, *rest = claims
    return (
        set(first.things) == set(question.ask.targets(question.scene))
        and first.kind == (question.ask.kind or None)
        and first.value in (None, question.value)
        and all(claim.value is None for claim in rest)
    )


def _chosen(question: SceneQuestion, text: str) -> str | None:
    """The option that a text commits itself to: after its last "answer is", else the only one that it names."""
    text = text.strip().lower()
    values = sorted({*question.options, *_values(question.ask)}, key=len, reverse=True)
    named = re.compile(rf"\b(?:{'|'.join(map(re.escape, values))})\b")
    _, stated, after = text.rpartition("answer is ")
    found = set(named.findall(after if stated else text))
    if not stated:
        found &= set(question.options)
    return found.pop() if len(found) == 1 else None


def _draw_options(ask: Ask, scene: Scene, rng: random.Random) -> list[str]:
    """The right value among others; those that the scene shows come first."""
    right = ask.value(ask.targets(scene))
    shown = [] if ask.kind else list(dict.fromkeys(ask.value([thing]) for thing in scene.things))
    others = [v for v in rng.sample(shown, len(shown)) if v != right][: OPTIONS - 2]
    values = _values(ask)
    others += [v for v in rng.sample(values, len(values)) if v not in (right, *others)][: OPTIONS - 1 - len(others)]
    options = [right, *others]
    return sorted(options, key=NUMBERS.index) if ask.kind else rng.sample(options, OPTIONS)


@functools.cache
def _values(ask: Ask) -> list[str]:
    """All answers there could be."""
    if ask.kind:
        return list(NUMBERS[1:])
    things = [Thing(c, s, p) for c in COLOURS for s in SHAPES for p in PLACES]
    return list(dict.fromkeys(ask.value([thing]) for thing in things))


def _with_value(ask: Ask, targets: Sequence[Thing], value: str) -> Sequence[Thing]:
    """Things that would make `value` the answer."""
    if ask.kind:
        return [targets[0]] * NUMBERS.index(value)
    colour, _, shape = value.rpartition(" ")
    parts = {"colour": {"colour": value}, "shape": {"shape": value}, "place": {"place": value}}
    return [replace(targets[0], **parts.get(ask.family, {"colour": colour, "shape": shape}))]


def _read_options(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\(\d+\) (.+?)(?= \(\d+\) |$)", text))


def _extra(thing: Thing) -> str:
    return f" I also see a {thing.name} at the {thing.place}."


def _fill(template: str, thing: Thing) -> str:
    return template.format(c=thing.colour, s=thing.shape, p=thing.place)


def _kinds(kind: str, things: Sequence[Thing]) -> str:
    return kind if len(things) == 1 else plural(kind)


def _are(things: Sequence[Thing]) -> str:
    return "is" if len(things) == 1 else "are"


def _all_asks() -> dict[str, Ask]:
    """Every question there is, by its text."""
    found = {}
    for name, family in FAMILIES.items():
        for template in family.asks:
            parts = re.findall(r"\{(\w)\}", template)
            for thing in (Thing(c, s, p) for c in COLOURS for s in SHAPES for p in PLACES):
                given = tuple((_PARTS[part][0], getattr(thing, _PARTS[part][0])) for part in parts)
                found[_fill(template, thing)] = Ask(name, given)
    for template in _COUNT_ASKS:
        for kind in KINDS:
            found[template.format(kinds=plural(kind))] = Ask(COUNT, kind=kind)
    return found


_ASKS = _all_asks()
