"""Small scenes: a board of three by three cells, some of which hold a thing of one shape and one colour."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "blue", "green", "yellow", "purple", "black")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
# In reading order.
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
THINGS = range(3, 6)


@dataclass(frozen=True)
class Thing:
    """What a cell holds."""

    colour: str
    shape: str
    place: str

    @property
    def name(self) -> str:
        """Its colour and shape."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The things on the board, in reading order."""

    things: tuple[Thing, ...]

    def at(self, place: str) -> Thing | None:
        """The thing in a cell, if there is one."""
        return next((thing for thing in self.things if thing.place == place), None)

    def describe(self) -> str:
        """The whole scene in words: the truth of a picture."""
        return ", ".join(f"a {thing.name} at the {thing.place}" for thing in self.things)


def draw_scene(rng: random.Random, things: Sequence[int] = THINGS) -> Scene:
    """A random scene of one of the numbers `things`. Shapes and colours repeat often enough to be counted."""
    places = sorted(rng.sample(range(len(PLACES)), rng.choice(things)))
    shapes, colours = rng.sample(SHAPES, 3), rng.sample(COLOURS, 4)
    return Scene(tuple(Thing(rng.choice(colours), rng.choice(shapes), PLACES[place]) for place in places))
