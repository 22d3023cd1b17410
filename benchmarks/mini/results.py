"""Rows of `results.jsonl` as the tables want them: a figure of a cell, and paired differences over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mini import plan
from mini.cells import ANCHORS, Cell, stage_two
from mini.plan import OfSeed
from mini.stats import Mean, over_seeds
from purld.evaluation.accuracy import paired_difference
from purld.evaluation.intervals import Interval
from purld.evaluation.winrate import length_controlled_rate

Row = Mapping[str, Any]


class Results:
    """What is done.

    Args:
        rows: by cell id.
    """

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self._rows = rows
        self._figures: dict[tuple[str, str], float] = {}
        self.chosen = plan.choose(rows)

    def __contains__(self, cell: Cell) -> bool:
        return cell.id in self._rows

    def row(self, cell: Cell) -> Row:
        """The row of a cell that is done."""
        return self._rows[cell.id]

    def figure(self, cell: Cell, name: str) -> float:
        """One number of a cell, see `FIGURES`."""
        key = (cell.id, name)
        if key not in self._figures:
            self._figures[key] = FIGURES[name](self.row(cell))
        return self._figures[key]

    def of_method(self, task: str, method: str, **more: Any) -> OfSeed:
        """A method as the tables have it, with its chosen setting and over that `settings` of `more`."""
        if method == "sft":
            return lambda seed: Cell(task, seed, "test", "sft", anchors=more.get("anchors", ANCHORS))
        if self.chosen is None:
            raise ValueError("the settings are not chosen yet")
        settings = self.chosen[task][method] | more.pop("settings", {})
        return lambda seed: stage_two(task, seed, "test", method, settings, **more)

    def noisy(self, task: str, method: str, deviation: float, **settings: Any) -> OfSeed:
        """A method on scores with so much noise, at the rate that all have there."""
        return self.of_method(task, method, settings={**plan.NOISE_RATE, **settings}, noise=deviation)

    def seeds(self, *cells: OfSeed, among: Sequence[int] = plan.SEEDS) -> list[int]:
        """The seeds on which all of these are done."""
        return [seed for seed in among if all(of(seed) in self for of in cells)]

    def mean(self, cell: OfSeed, name: str) -> Mean | None:
        """A figure over seeds; None if no seed is done."""
        values = [self.figure(cell(seed), name) for seed in self.seeds(cell)]
        return over_seeds(values) if values else None

    def difference(self, a: OfSeed, b: OfSeed, name: str, among: Sequence[int] = plan.SEEDS) -> Mean | None:
        """How much more `a` has of a figure than `b` on the same seeds; None if they share none."""
        seeds = self.seeds(a, b, among=among)
        values = [self.figure(a(seed), name) - self.figure(b(seed), name) for seed in seeds]
        return over_seeds(values) if values else None

    def within_seed(self, a: Cell, b: Cell, name: str) -> tuple[float, Interval]:
        """The difference on one seed with its bootstrap interval over problems: training is taken as it came."""
        ours, theirs = (self.row(cell)["measured"][PER_PROMPT[name]] for cell in (a, b))
        found = paired_difference(ours, theirs, seed=a.seed)
        return found.mean, found.interval


def _lc(row: Row) -> float:
    measured = row["measured"]
    return length_controlled_rate(measured["wins"], measured["teacher_length"], measured["length"])


def _mean_of(key: str) -> Callable[[Row], float]:
    return lambda row: float(np.mean(row["measured"][key]))


# The judge never prefers a wrong answer, so Raw is accuracy times Raw among the right ones.
FIGURES: Mapping[str, Callable[[Row], float]] = {
    "raw": _mean_of("wins"),
    "lc": _lc,
    "accuracy": _mean_of("right"),
    "raw_if_right": lambda row: float(np.sum(row["measured"]["wins"]) / max(np.sum(row["measured"]["right"]), 1e-9)),
    "greedy": _mean_of("greedy_right"),
    "length": _mean_of("length"),
    "seconds": lambda row: float(row["seconds"]),
    "calls": lambda row: float(row["teacher_calls"]),
}
PER_PROMPT = {"raw": "wins", "accuracy": "right"}
"""The column of a row that a figure is the mean of."""


@dataclass(frozen=True)
class Comparison:
    """One of the paper's claims that `a` beats `b` on a task, in one figure.

    `finding` is the paper's number of it, or "ablation".
    """

    finding: str
    task: str
    a: str
    b: str
    name: str

    @property
    def test(self) -> str:
        """What is tested: the same for claims of several findings that say the same."""
        return f"{self.task} {self.a}-{self.b} {self.name}"


NON_ANCHOR = ("sft", "sft_sft", "singlepair_dpo", "self_ppo")


def comparisons(best_baseline: Mapping[str, str], best_non_anchor: Mapping[str, str]) -> list[Comparison]:
    """The paper's claims: finding 3 is about LC, the others about Raw."""
    found = []
    for task in plan.TASKS:
        pairs = [
            ("1", "ldl_grpo", best_non_anchor[task]),
            ("1", "anchorrank_dpo", best_non_anchor[task]),
            ("1", "ldl_grpo", best_baseline[task]),
            ("2", "ldl_grpo", "anchorrank_dpo"),
            ("3", "ldl_grpo", "sft"),
            ("4", "sft", "sft_sft"),
            ("4", "singlepair_dpo", "sft"),
            ("4", "self_ppo", "sft"),
            ("4", "anchor_grpo", "sft"),
            ("4", "anchorrank_dpo", "sft"),
            ("4", "ldl_grpo", "sft"),
            ("5", "anchorrank_dpo", "singlepair_dpo"),
            ("ablation", "ldl_grpo", "anchor_grpo"),
        ]
        found += [Comparison(finding, task, a, b, "lc" if finding == "3" else "raw") for finding, a, b in pairs]
    return list(dict.fromkeys(found))


def best_on_validation(results: Results, among: Sequence[str]) -> dict[str, str]:
    """By task, the method of the highest validation win rate at its chosen setting; p_sft takes part as it is."""
    assert results.chosen is not None
    found = {}
    for task in plan.TASKS:
        rates = {}
        for method in among:
            cell = Cell(task, plan.TUNING_SEED, "validation", "sft")
            if method != "sft":
                cell = stage_two(task, plan.TUNING_SEED, "validation", method, results.chosen[task][method])
            rates[method] = results.figure(cell, "raw")
        found[task] = max(rates, key=lambda m: rates[m])
    return found
