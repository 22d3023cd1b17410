"""Look up figures of cells in the rows of `results.jsonl`, and compute paired differences over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mini import plan
from mini.cells import ANCHORS, Cell, stage_two_cell
from mini.plan import CellOfSeed
from mini.stats import Mean, over_seeds
from purld.evaluation.accuracy import paired_difference
from purld.evaluation.intervals import Interval
from purld.evaluation.winrate import length_controlled_rate
from purld.testbed.world.world import Task

Row = Mapping[str, Any]


class Results:
    """The finished cells.

    Args:
        rows: by cell id.
    """

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self._rows = rows
        self._figures: dict[tuple[str, str], float] = {}
        self.chosen = plan.choose_settings(rows)
        self.chosen_by_accuracy = plan.choose_settings(rows, "right")

    def __contains__(self, cell: Cell) -> bool:
        return cell.id in self._rows

    def row(self, cell: Cell) -> Row:
        """Return the row of a finished cell."""
        return self._rows[cell.id]

    def figure(self, cell: Cell, name: str) -> float:
        """Return one figure of a finished cell; `name` is a key of FIGURES."""
        key = (cell.id, name)
        if key not in self._figures:
            self._figures[key] = FIGURES[name](self.row(cell))
        return self._figures[key]

    def of_method(self, task: Task, method: str, **fields: Any) -> CellOfSeed:
        """Return a method at its chosen setting; `fields` are fields of `Cell`, and `settings` in it override."""
        if method == "sft":
            return lambda seed: Cell(task, seed, "test", "sft", anchors=fields.get("anchors", ANCHORS))
        if self.chosen is None:
            raise ValueError("the settings are not chosen yet")
        settings = self.chosen[task][method] | fields.pop("settings", {})
        return lambda seed: stage_two_cell(task, seed, "test", method, settings, **fields)

    def noisy(self, task: Task, method: str, deviation: float, **settings: Any) -> CellOfSeed:
        """Return a method on noisy scores, at the rate that all methods have under noise."""
        return self.of_method(task, method, settings={**plan.NOISE_RATE, **settings}, noise=deviation)

    def seeds(self, *cells: CellOfSeed, among: Sequence[int] = plan.SEEDS) -> list[int]:
        """Return the seeds on which all of `cells` are done."""
        return [seed for seed in among if all(cell(seed) in self for cell in cells)]

    def mean(self, cell: CellOfSeed, name: str) -> Mean | None:
        """Return a figure over seeds; None if no seed is done."""
        values = [self.figure(cell(seed), name) for seed in self.seeds(cell)]
        return over_seeds(values) if values else None

    def difference(self, a: CellOfSeed, b: CellOfSeed, name: str, among: Sequence[int] = plan.SEEDS) -> Mean | None:
        """Return how much more of a figure `a` has than `b`, paired by seed; None if they share no seed."""
        seeds = self.seeds(a, b, among=among)
        values = [self.figure(a(seed), name) - self.figure(b(seed), name) for seed in seeds]
        return over_seeds(values) if values else None

    def within_seed(self, a: Cell, b: Cell, name: str) -> tuple[float, Interval]:
        """Return the difference on one seed with its bootstrap interval over problems, for the models as trained."""
        own, other = (self.row(cell)["measured"][PER_PROMPT[name]] for cell in (a, b))
        difference = paired_difference(own, other, seed=a.seed)
        return difference.mean, difference.interval


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
"""The per-prompt column of a row that a figure averages."""


@dataclass(frozen=True)
class Comparison:
    """One of the paper's claims that method `a` beats method `b` on a task in the figure `name`.

    `finding` is the paper's number of the claim, or "ablation".
    """

    finding: str
    task: Task
    a: str
    b: str
    name: str

    @property
    def test(self) -> str:
        """The identity of the test: equal for claims of several findings that say the same."""
        return f"{self.task} {self.a}-{self.b} {self.name}"


NON_ANCHOR = ("sft", "sft_sft", "singlepair_dpo", "self_ppo")


def list_comparisons(best_baseline: Mapping[str, str], best_non_anchor: Mapping[str, str]) -> list[Comparison]:
    """Return the paper's claims: finding 3 is about LC, the others about Raw."""
    claims = []
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
        claims += [Comparison(finding, task, a, b, "lc" if finding == "3" else "raw") for finding, a, b in pairs]
    return list(dict.fromkeys(claims))


def best_on_validation(results: Results, among: Sequence[str]) -> dict[str, str]:
    """Return, by task, the method with the highest validation win rate at its chosen setting; p_sft included."""
    assert results.chosen is not None
    best: dict[str, str] = {}
    for task in plan.TASKS:
        rates = {}
        for method in among:
            cell = Cell(task, plan.TUNING_SEED, "validation", "sft")
            if method != "sft":
                cell = stage_two_cell(task, plan.TUNING_SEED, "validation", method, results.chosen[task][method])
            rates[method] = results.figure(cell, "raw")
        best[task] = max(rates, key=lambda m: rates[m])
    return best
