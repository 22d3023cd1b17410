"""Counting and probability word problems: six families, their worked answers and the usual mistakes.

A family is a few templates, a way to draw their slots, the right working and the near-misses that a learner makes.
Answers are not simplified ("4/12"), so checks must compare values.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from purld.testbed.world.slots import Slots, parse_slots

PEOPLE = ("Mia", "Ben", "Ana", "Leo", "Zoe", "Sam", "Eva", "Tom", "Ida", "Max", "Amy", "Jon")
COLOURS = ("red", "blue", "green", "white", "black", "pink")
BEADS = ("marbles", "beads", "buttons", "balls", "tickets", "stones")
DISHES = ("soups", "pies", "salads", "cakes", "drinks", "breads")
THINGS = ("caps", "scarves", "books", "pens", "mugs", "coats", "rings", "maps")
GROUPS = ("guests", "players", "friends", "pilots", "judges", "bakers")
CLUBS = ("chess", "book", "film", "choir", "garden", "hiking")


@dataclass(frozen=True)
class Working:
    """One way through a problem: a calculation, its answer, and a sentence that says it in words."""

    step: str
    answer: str
    sentence: str


@dataclass(frozen=True)
class CountingFamily:
    """Word problems that are solved in the same way.

    `solve` raises LookupError for slots that make no problem (a colour that is not in the jar).
    """

    name: str
    templates: tuple[str, ...]
    draw_slots: Callable[[random.Random], Slots]
    solve: Callable[[Slots], Working]
    mistakes: Callable[[Slots], list[Working]]


def draw_question(rng: random.Random) -> str:
    """Draw a random question."""
    family = rng.choice(FAMILIES)
    return rng.choice(family.templates).format_map(family.draw_slots(rng))


def parse_question(question: str) -> tuple[CountingFamily, Slots] | None:
    """Return the family and slots of a question, or None if it is not a counting problem."""
    for family in FAMILIES:
        for template in family.templates:
            slots = parse_slots(template, question)
            if slots is not None and _makes_sense(family, slots):
                return family, slots
    return None


def _makes_sense(family: CountingFamily, slots: Slots) -> bool:
    try:
        return Fraction(family.solve(slots).answer) > 0
    except LookupError:
        return False


def list_phrasings(working: Working) -> tuple[str, ...]:
    """Return the same working in different words. All but the last show how the answer comes about."""
    return (
        f"{working.step}, so the answer is {working.answer}.",
        f"{working.step}. The answer is {working.answer}.",
        f"{working.sentence}, so the answer is {working.answer}.",
        f"{working.sentence}. The answer is {working.answer}.",
        f"The answer is {working.answer}.",
    )


_NUMBER = r"(?P<numerator>[0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*(?P<denominator>[0-9]+))?"
_STATED_ANSWER = re.compile(r"answer(?:\s+is|:)\s*" + _NUMBER, re.IGNORECASE)
_ANY_NUMBER = re.compile(_NUMBER)


def final_answer(text: str) -> Fraction | None:
    """Return the value that an answer commits itself to.

    That is the last "answer is X" or "answer: X"; without one, the last number, "a/b" or "a out of b". None if there is
    no number or it divides by zero.
    """
    matches = list(_STATED_ANSWER.finditer(text)) or list(_ANY_NUMBER.finditer(text))
    if not matches:
        return None
    # Longer digit strings are never answers here, and Python refuses to parse very long ones.
    numerator, denominator = matches[-1]["numerator"][:20], (matches[-1]["denominator"] or "1")[:20]
    return None if int(denominator) == 0 else Fraction(numerator) / int(denominator)


def _numbers(slots: Slots) -> list[int]:
    return [int(slots[name]) for name in sorted(slots) if name.startswith("n")]


# --- draw one from a jar -----------------------------------------------------------------------------------------


def _draw_jar(rng: random.Random) -> Slots:
    c1, c2, c3 = rng.sample(COLOURS, 3)
    slots = {"who": rng.choice(PEOPLE), "things": rng.choice(BEADS), "c1": c1, "c2": c2, "c3": c3}
    slots |= {f"n{i}": str(rng.randint(1, 6)) for i in (1, 2, 3)}
    return slots | {"asked": rng.choice((c1, c2))}


def _jar_parts(slots: Slots) -> dict[str, int]:
    return {slots[f"c{name[1]}"]: int(slots[name]) for name in sorted(slots) if name.startswith("n")}


def _jar_working(slots: Slots, parts: list[int], wanted: int, total: int) -> Working:
    step = f"{' + '.join(map(str, parts))} = {total}"
    sentence = f"There are {total} {slots['things']} and {wanted} are {slots['asked']}"
    return Working(step, f"{wanted}/{total}", sentence)


def _solve_jar(slots: Slots) -> Working:
    parts = _jar_parts(slots)
    total = sum(parts.values())
    return _jar_working(slots, list(parts.values()), parts[slots["asked"]], total)


def _jar_mistakes(slots: Slots) -> list[Working]:
    parts = _jar_parts(slots)
    counts, asked, total = list(parts.values()), parts[slots["asked"]], sum(parts.values())
    others = [count for colour, count in parts.items() if colour != slots["asked"]]
    slips = [_jar_working(slots, counts, asked, t) for t in (total - 1, total + 1)]
    swapped = [_jar_working(slots, counts, other, total) for other in others]
    odds = _jar_working(slots, others, asked, sum(others))
    return [*slips, *swapped, odds, odds]


# --- one of each, one of either ----------------------------------------------------------------------------------


def _draw_meals(rng: random.Random) -> Slots:
    first, second = rng.sample(DISHES, 2)
    return {"who": rng.choice(PEOPLE), "n1": _digit(rng), "n2": _digit(rng), "a": first, "b": second}


def _digit(rng: random.Random) -> str:
    return str(rng.randint(2, 9))


def _meals_working(step: str, answer: int) -> Working:
    return Working(f"{step} = {answer}", str(answer), f"One of each makes {step} = {answer}")


def _solve_meals(slots: Slots) -> Working:
    a, b = _numbers(slots)
    return _meals_working(f"{a} * {b}", a * b)


def _meals_mistakes(slots: Slots) -> list[Working]:
    a, b = _numbers(slots)
    slips = [_meals_working(f"{a} * {b}", a * b + slip) for slip in (-1, 1, -a, b)]
    return [*slips, *[_meals_working(f"{a} + {b}", a + b)] * 3, _meals_working(f"{b} * {b}", b * b)]


def _draw_pick(rng: random.Random) -> Slots:
    first, second = rng.sample(THINGS, 2)
    return {"who": rng.choice(PEOPLE), "n1": _digit(rng), "n2": _digit(rng), "a": first, "b": second}


def _pick_working(step: str, answer: int) -> Working:
    return Working(f"{step} = {answer}", str(answer), f"Only one is taken: {step} = {answer}")


def _solve_pick(slots: Slots) -> Working:
    a, b = _numbers(slots)
    return _pick_working(f"{a} + {b}", a + b)


def _pick_mistakes(slots: Slots) -> list[Working]:
    a, b = _numbers(slots)
    slips = [_pick_working(f"{a} + {b}", a + b + slip) for slip in (-1, 1, 10)]
    wrong = _pick_working(f"{a} * {b}", a * b) if a * b < 100 else _pick_working(f"{a} + {a}", a + a)
    return [*slips, wrong, wrong]


# --- pairs from a group ------------------------------------------------------------------------------------------


def _draw_hands(rng: random.Random) -> Slots:
    return {"who": rng.choice(PEOPLE), "n1": str(rng.randint(3, 9)), "group": rng.choice(GROUPS)}


def _hands_working(step: str, answer: int) -> Working:
    return Working(f"{step} = {answer}", str(answer), f"Each pair shakes once: {step} = {answer}")


def _solve_hands(slots: Slots) -> Working:
    (n,) = _numbers(slots)
    return _hands_working(f"{n} * {n - 1} / 2", n * (n - 1) // 2)


def _hands_mistakes(slots: Slots) -> list[Working]:
    (n,) = _numbers(slots)
    right = n * (n - 1) // 2
    slips = [_hands_working(f"{n} * {n - 1} / 2", right + slip) for slip in (-1, 1)]
    unhalved = _hands_working(f"{n} * {n - 1}", n * (n - 1))
    return [*slips, unhalved, unhalved, _hands_working(f"{n} * {n} / 2", n * n // 2)]


def _draw_posts(rng: random.Random) -> Slots:
    return {"who": rng.choice(PEOPLE), "n1": str(rng.randint(3, 9)), "club": rng.choice(CLUBS)}


def _posts_working(step: str, answer: int) -> Working:
    return Working(f"{step} = {answer}", str(answer), f"The second is one of the rest: {step} = {answer}")


def _solve_posts(slots: Slots) -> Working:
    (n,) = _numbers(slots)
    return _posts_working(f"{n} * {n - 1}", n * (n - 1))


def _posts_mistakes(slots: Slots) -> list[Working]:
    (n,) = _numbers(slots)
    slips = [_posts_working(f"{n} * {n - 1}", n * (n - 1) + slip) for slip in (-1, 1)]
    again, halved = _posts_working(f"{n} * {n}", n * n), _posts_working(f"{n} * {n - 1} / 2", n * (n - 1) // 2)
    return [*slips, again, again, halved]


# --- a die with many sides ---------------------------------------------------------------------------------------


def _draw_die(rng: random.Random) -> Slots:
    sides = rng.randint(4, 12)
    return {"who": rng.choice(PEOPLE), "n1": str(sides), "n2": str(rng.randint(1, sides - 1))}


def _die_working(step: str, wanted: int, sides: int) -> Working:
    sentence = f"There are {step} = {wanted} such sides"
    return Working(f"{step} = {wanted}", f"{wanted}/{sides}", sentence)


def _solve_die(slots: Slots) -> Working:
    sides, bound = _numbers(slots)
    return _die_working(f"{sides} - {bound}", sides - bound, sides)


def _die_mistakes(slots: Slots) -> list[Working]:
    sides, bound = _numbers(slots)
    at_least = _die_working(f"{sides} - {bound - 1}", sides - bound + 1, sides)
    below = _die_working(f"{bound} - 1", bound - 1, sides)
    slip = _die_working(f"{sides} - {bound}", abs(sides - bound - 1), sides)
    return [at_least, at_least, below, slip, _die_working(f"{sides} - {bound}", bound, sides)]


FAMILIES: tuple[CountingFamily, ...] = (
    CountingFamily(
        "jar",
        (
            "{who} has a jar with {n1} {c1} and {n2} {c2} {things} and draws one at random. "
            "What is the probability that it is {asked}?",
            "A jar holds {n1} {c1}, {n2} {c2} and {n3} {c3} {things}. {who} draws one at random. "
            "What is the probability that it is {asked}?",
        ),
        _draw_jar,
        _solve_jar,
        _jar_mistakes,
    ),
    CountingFamily(
        "meals",
        (
            "{who} can choose from {n1} {a} and {n2} {b}. How many meals of one of each are there?",
            "A menu has {n1} {a} and {n2} {b}. In how many ways can {who} order one of each?",
        ),
        _draw_meals,
        _solve_meals,
        _meals_mistakes,
    ),
    CountingFamily(
        "pick",
        (
            "{who} has {n1} {a} and {n2} {b} and takes a single thing. How many choices are there?",
            "There are {n1} {a} and {n2} {b} on a shelf. In how many ways can {who} take just one?",
        ),
        _draw_pick,
        _solve_pick,
        _pick_mistakes,
    ),
    CountingFamily(
        "handshakes",
        (
            "{who} watches {n1} {group} shake hands, each with every other once. How many handshakes are there?",
            "At a party of {n1} {group} every pair shakes hands once. How many handshakes does {who} count?",
        ),
        _draw_hands,
        _solve_hands,
        _hands_mistakes,
    ),
    CountingFamily(
        "posts",
        (
            "The {club} club of {who} has {n1} members. In how many ways can it pick a president and a secretary?",
            "{who} and others make a {club} club of {n1} members. How many choices of president and secretary "
            "are there?",
        ),
        _draw_posts,
        _solve_posts,
        _posts_mistakes,
    ),
    CountingFamily(
        "die",
        (
            "{who} rolls a die with {n1} sides. What is the probability that it shows more than {n2}?",
            "A die has sides from 1 to {n1}. {who} rolls it once. What is the probability of more than {n2}?",
        ),
        _draw_die,
        _solve_die,
        _die_mistakes,
    ),
)
