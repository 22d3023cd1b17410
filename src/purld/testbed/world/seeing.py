"""Questions about a scene in two forms, as in A-OKVQA: with options to choose from, or for a free rationale.

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

from purld.testbed.world.claims import KINDS, NUMBERS, is_of_kind, list_things, parse_claims, pluralize_kind
from purld.testbed.world.scenes import COLOURS, PLACES, SHAPES, Scene, Thing

OPTION_COUNT, MAX_COUNT = 4, 3
# Share of right rationales that add a true remark about another thing.
EXTRA_RATE = 0.2


@dataclass(frozen=True)
class SceneFamily:
    """Questions about one thing, as templates with the slots c (colour), s (shape) and p (place).

    Attributes:
        questions: questions whose slots say which thing is meant.
        value: the answer, as an option says it.
        statement: a sentence, without its period, that says the answer.
        rationales: sentences that say everything about the thing.
    """

    questions: tuple[str, ...]
    value: str
    statement: str
    rationales: tuple[str, ...]


_BARE = ("There is a {c} {s} at the {p}.", "I see a {c} {s} at the {p}.")
FAMILIES = {
    "colour": SceneFamily(
        ("What colour is the {s}?", "Which colour does the {s} have?"),
        "{c}",
        "The {s} is {c}",
        (*_BARE, "The {s} at the {p} is {c}.", "It is {c}, because the {s} at the {p} is {c}."),
    ),
    "shape": SceneFamily(
        ("Which shape is {c}?", "What is the shape of the {c} thing?"),
        "{s}",
        "The {c} shape is a {s}",
        (*_BARE, "The {c} shape at the {p} is a {s}.", "It is a {s}, because the {c} shape at the {p} is a {s}."),
    ),
    "place": SceneFamily(
        ("Where is the {c} {s}?", "At which place is the {c} {s}?"),
        "{p}",
        "The {c} {s} is at the {p}",
        (*_BARE, "The {c} {s} is at the {p}.", "It is at the {p}, because the {c} {s} is at the {p}."),
    ),
    "cell": SceneFamily(
        ("What is at the {p}?", "Which thing is at the {p}?"),
        "{c} {s}",
        "There is a {c} {s} at the {p}",
        (*_BARE, "The shape at the {p} is a {c} {s}.", "It is a {c} {s}, because the shape at the {p} is a {c} {s}."),
    ),
}
COUNT = "count"
_COUNT_QUESTIONS = ("How many {kinds} are there?", "How many {kinds} can you see?")
_COUNT_RATIONALES = ("There {are} {n} {kinds}, {list}.", "I count {n} {kinds}: {list}.", "I see {n} {kinds}, {list}.")
_CHOICES = (
    "The answer is {v}.",
    "{statement}.",
    "{statement}, so the answer is {v}.",
    "{statement}. The answer is {v}.",
)
_ATTRIBUTES = {"c": ("colour", COLOURS), "s": ("shape", SHAPES), "p": ("place", PLACES)}


@dataclass(frozen=True)
class Query:
    """The content of a question, independent of its words.

    Attributes:
        family: a key of FAMILIES, or COUNT.
        given: (attribute, value) pairs of the thing that is meant.
        kind: the kind to count, empty for the other families.
    """

    family: str
    given: tuple[tuple[str, str], ...] = ()
    kind: str = ""

    def targets(self, scene: Scene) -> tuple[Thing, ...]:
        """Return the things that are meant."""
        if self.kind:
            return tuple(thing for thing in scene.things if is_of_kind(thing, self.kind))
        return tuple(t for t in scene.things if all(getattr(t, attribute) == value for attribute, value in self.given))

    def has_one_answer(self, scene: Scene) -> bool:
        """Tell whether the scene has one answer: one to MAX_COUNT things to count, or a single thing that is meant."""
        return len(self.targets(scene)) in (range(1, MAX_COUNT + 1) if self.kind else (1,))

    def value(self, things: Sequence[Thing]) -> str:
        """Return the answer in a word or two if `things` are those that are meant."""
        return NUMBERS[len(things)] if self.kind else _fill(FAMILIES[self.family].value, things[0])

    def statement(self, things: Sequence[Thing]) -> str:
        """Return the answer as a statement without its period."""
        if self.kind:
            return f"There {_are(things)} {self.value(things)} {_kinds(self.kind, things)}"
        return _fill(FAMILIES[self.family].statement, things[0])


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene; without options it asks for a rationale."""

    query: Query
    options: tuple[str, ...]
    scene: Scene

    @property
    def value(self) -> str:
        """The right answer in a word or two."""
        return self.query.value(self.query.targets(self.scene))


def draw_question(scene: Scene, choice: bool, rng: random.Random) -> str:
    """Draw a random question that the scene answers, with options if `choice`."""
    while True:
        family, thing = rng.choice((*FAMILIES, COUNT)), rng.choice(scene.things)
        if family == COUNT:
            kind = rng.choice((thing.shape, f"{thing.colour} shape"))
            text = rng.choice(_COUNT_QUESTIONS).format(kinds=pluralize_kind(kind))
        else:
            text = _fill(rng.choice(FAMILIES[family].questions), thing)
        query = _QUERIES[text]
        if query.has_one_answer(scene):
            break
    text = f"Question: {text}"
    if not choice:
        return text
    options = " ".join(f"({index}) {option}" for index, option in enumerate(_draw_options(query, scene, rng)))
    return f"{text}\nOptions: {options}"


def parse_question(text: str, scene: Scene) -> SceneQuestion | None:
    """Return the question that a text asks about a scene, or None if it is not one with a single answer."""
    match = re.fullmatch(r"Question: ([^\n]+)(?:\nOptions: ([^\n]+))?", text)
    query = _QUERIES.get(match[1]) if match else None
    if match is None or query is None or not query.has_one_answer(scene):
        return None
    options = _parse_options(match[2]) if match[2] else ()
    question = SceneQuestion(query, options, scene)
    return question if not match[2] or question.value in options else None


def is_right(question: SceneQuestion, text: str) -> bool:
    """Tell whether a text answers the question."""
    return _chosen_option(question, text) == question.value if question.options else _is_grounded(question, text)


def list_phrasings(question: SceneQuestion, things: Sequence[Thing] | None = None) -> list[str]:
    """Return answers that say the same in different words: the truth, or what would be true if `things` were meant."""
    query = question.query
    things = query.targets(question.scene) if things is None else things
    if question.options:
        return [w.format(v=query.value(things), statement=query.statement(things)) for w in _CHOICES]
    if not query.kind:
        return [_fill(template, things[0]) for template in FAMILIES[query.family].rationales]
    parts = {
        "n": NUMBERS[len(things)],
        "kinds": _kinds(query.kind, things),
        "list": list_things(things),
        "are": _are(things),
    }
    return [template.format(**parts) for template in _COUNT_RATIONALES]


def right_answer(question: SceneQuestion, rng: random.Random) -> str:
    """Draw a right answer in random words."""
    text = rng.choice(list_phrasings(question))
    others = [thing for thing in question.scene.things if thing not in question.query.targets(question.scene)]
    if not question.options and others and rng.random() < EXTRA_RATE:
        text += _extra(rng.choice(others))
    return text


def draw_rationale(thing: Thing, rng: random.Random) -> str:
    """Draw a sentence that says everything about a thing."""
    return _fill(rng.choice(rng.choice(list(FAMILIES.values())).rationales), thing)


def draw_mistake(question: SceneQuestion, rng: random.Random) -> str:
    """Draw a wrong answer of the right form: another option, a neighbour, a wrong attribute, a count off by one."""
    while True:
        text = _mistaken_choice(question, rng) if question.options else _mistaken_rationale(question, rng)
        if not is_right(question, text):
            return text


def _mistaken_choice(question: SceneQuestion, rng: random.Random) -> str:
    """Draw another option, sometimes one that is not offered."""
    query, targets = question.query, question.query.targets(question.scene)
    values = [option for option in question.options if option != question.value]
    if rng.random() < 0.15:
        values = [v for v in _values(query) if v not in question.options]
    return rng.choice(list_phrasings(question, _with_value(query, targets, rng.choice(values))))


def _mistaken_rationale(question: SceneQuestion, rng: random.Random) -> str:
    """Draw a rationale with one mistake."""
    query, scene = question.query, question.scene
    targets = list(query.targets(scene))
    others = [thing for thing in scene.things if thing not in targets]
    kind = rng.choices(("asked", "any", "neighbour", "extra"), (45, 20, 25, 10))[0]
    if kind == "extra" and others:
        return rng.choice(list_phrasings(question)) + _extra(change_attribute(rng.choice(others), rng))
    if query.kind:
        if kind == "any" or (len(targets) == 1 and not others):
            index = rng.randrange(len(targets))
            targets[index] = change_attribute(targets[index], rng)
        elif others and (len(targets) == 1 or rng.random() < 0.5):
            targets.append(rng.choice(others))
        else:
            targets.remove(rng.choice(targets))
        return rng.choice(list_phrasings(question, sorted(targets, key=lambda t: PLACES.index(t.place))))
    if kind == "neighbour" and others:
        return rng.choice(list_phrasings(question, [rng.choice(others)]))
    attributes = [
        attribute for attribute in _ATTRIBUTES if kind != "asked" or f"{{{attribute}}}" in FAMILIES[query.family].value
    ]
    return rng.choice(list_phrasings(question, [change_attribute(targets[0], rng, rng.choice(attributes))]))


def change_attribute(thing: Thing, rng: random.Random, attribute: str | None = None) -> Thing:
    """Return the thing with another value of one attribute (c, s or p)."""
    name, values = _ATTRIBUTES[attribute or rng.choice(list(_ATTRIBUTES))]
    return replace(thing, **{name: rng.choice([v for v in values if v != getattr(thing, name)])})


def _is_grounded(question: SceneQuestion, text: str) -> bool:
    """Tell whether all claims of a rationale are true and its first sentence answers the question."""
    claims = parse_claims(text)
    if claims is None or not all(claim.is_true_of(question.scene) for claim in claims):
        return False
    first, *rest = claims
    return (
        set(first.things) == set(question.query.targets(question.scene))
        and first.kind == (question.query.kind or None)
        and first.value in (None, question.value)
        and all(claim.value is None for claim in rest)
    )


def _chosen_option(question: SceneQuestion, text: str) -> str | None:
    """Return the option that a text commits itself to: after its last "answer is", else the only one that it names."""
    text = text.strip().lower()
    values = sorted({*question.options, *_values(question.query)}, key=len, reverse=True)
    named = re.compile(rf"\b(?:{'|'.join(map(re.escape, values))})\b")
    _, stated, after = text.rpartition("answer is ")
    values_named = set(named.findall(after if stated else text))
    if not stated:
        values_named &= set(question.options)
    return values_named.pop() if len(values_named) == 1 else None


def _draw_options(query: Query, scene: Scene, rng: random.Random) -> list[str]:
    """Draw the right value among others; values that the scene shows are preferred."""
    right = query.value(query.targets(scene))
    shown = [] if query.kind else list(dict.fromkeys(query.value([thing]) for thing in scene.things))
    others = [v for v in rng.sample(shown, len(shown)) if v != right][: OPTION_COUNT - 2]
    values = _values(query)
    others += [v for v in rng.sample(values, len(values)) if v not in (right, *others)][
        : OPTION_COUNT - 1 - len(others)
    ]
    options = [right, *others]
    return sorted(options, key=NUMBERS.index) if query.kind else rng.sample(options, OPTION_COUNT)


@functools.cache
def _values(query: Query) -> list[str]:
    """Return all possible answers to a query."""
    if query.kind:
        return list(NUMBERS[1:])
    things = [Thing(c, s, p) for c in COLOURS for s in SHAPES for p in PLACES]
    return list(dict.fromkeys(query.value([thing]) for thing in things))


def _with_value(query: Query, targets: Sequence[Thing], value: str) -> Sequence[Thing]:
    """Return things that would make `value` the answer."""
    if query.kind:
        return [targets[0]] * NUMBERS.index(value)
    colour, _, shape = value.rpartition(" ")
    parts = {"colour": {"colour": value}, "shape": {"shape": value}, "place": {"place": value}}
    return [replace(targets[0], **parts.get(query.family, {"colour": colour, "shape": shape}))]


def _parse_options(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\(\d+\) (.+?)(?= \(\d+\) |$)", text))


def _extra(thing: Thing) -> str:
    return f" I also see a {thing.name} at the {thing.place}."


def _fill(template: str, thing: Thing) -> str:
    return template.format(c=thing.colour, s=thing.shape, p=thing.place)


def _kinds(kind: str, things: Sequence[Thing]) -> str:
    return kind if len(things) == 1 else pluralize_kind(kind)


def _are(things: Sequence[Thing]) -> str:
    return "is" if len(things) == 1 else "are"


def _all_queries() -> dict[str, Query]:
    """Return every possible query by the text of its question."""
    queries = {}
    for name, family in FAMILIES.items():
        for template in family.questions:
            attributes = re.findall(r"\{(\w)\}", template)
            for thing in (Thing(c, s, p) for c in COLOURS for s in SHAPES for p in PLACES):
                given = tuple(
                    (_ATTRIBUTES[attribute][0], getattr(thing, _ATTRIBUTES[attribute][0])) for attribute in attributes
                )
                queries[_fill(template, thing)] = Query(name, given)
    for template in _COUNT_QUESTIONS:
        for kind in KINDS:
            queries[template.format(kinds=pluralize_kind(kind))] = Query(COUNT, kind=kind)
    return queries


_QUERIES = _all_queries()
