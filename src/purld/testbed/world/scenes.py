"""Scenes: a board of three by three cells, some of which hold a thing of one shape and one colour."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "blue", "green", "yellow", "purple", "black")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
# The cells in reading order.
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
THING_COUNTS = range(3, 6)


@dataclass(frozen=True)
class Thing:
    """A coloured shape in a cell."""

    colour: str
    shape: str
    place: str

    @property
    def name(self) -> str:
        """The colour and shape in words."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A board: its things in reading order."""

    things: tuple[Thing, ...]

    def thing_at(self, place: str) -> Thing | None:
        """Return the thing in a cell, or None if the cell is empty."""
        return next((thing for thing in self.things if thing.place == place), None)

    def describe(self) -> str:
        """Return the whole scene in words."""
        return ", ".join(f"a {thing.name} at the {thing.place}" for thing in self.things)


def draw_scene(rng: random.Random, thing_counts: Sequence[int] = THING_COUNTS) -> Scene:
    """Draw a random scene of one of `thing_counts` things. Shapes and colours repeat often enough to be counted."""
    indices = sorted(rng.sample(range(len(PLACES)), rng.choice(thing_counts)))
    shapes, colours = rng.sample(SHAPES, 3), rng.sample(COLOURS, 4)
    return Scene(tuple(Thing(rng.choice(colours), rng.choice(shapes), PLACES[index]) for index in indices))
