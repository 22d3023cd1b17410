"""List the cells in order of importance: tuning, the tables, noise, then one key at a time.

Tuned settings are chosen from the rows of the tuning cells, so later cells are known once those are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mini.cells import ANCHORS, DEFAULTS, VARIANTS, Cell, format_settings, stage_two_cell
from purld.testbed.world.world import Task

TASKS: tuple[Task, ...] = ("writing", "counting")
SEEDS = (0, 1, 2, 3, 4)
FEW_SEEDS = (0, 1, 2)
SWEEP_SEEDS = (0, 1)
TUNING_SEED = 1000  # not a table's seed; its problems are of the training split, so no table is measured on them

TUNED = ("ldl_grpo", "anchorrank_dpo", "anchor_grpo", "self_ppo", "singlepair_dpo", "sft_sft", *VARIANTS)
METHODS = (*TUNED, "teacher_judge_grpo")
# Three rates for each method; its other settings stay as published (see `cells.DEFAULTS`).
RATES = (1.5e-5, 5e-5, 1.5e-4)
# Tried where the first or the last rate was chosen, to show what a wider grid would have given.
RATES_BEYOND = (5e-6, 4.5e-4)

NOISE = (0.5, 2.0)
# Both methods use it under noise, whatever was chosen for them: AdamW's steps are equally large for any loss, so the
# effect of noise on a method shows only at the same rate.
NOISE_RATE = {"learning_rate": RATES[1]}
# In one arm Anchor-GRPO has LDL-GRPO's KL weight, to separate the effect of the labels from that of the KL term.
HELD_SETTINGS = {"beta": DEFAULTS["ldl_grpo"]["beta"]}
# One key at a time around the settings of the tables, for ldl_grpo.
SWEEPS: Mapping[str, Sequence[Any]] = {
    "learning_rate": RATES,
    "steps": (128,),
    "gamma": (1.0, 5.0),
    "candidates": (2, 32),
    "beta": (0.0, 1.0),
    "tau": (0.6, 1.5),
    "score": ("verbal",),
}
ANCHOR_COUNTS = (50, 2000)

GRID: Sequence[Mapping[str, Any]] = tuple({"learning_rate": rate} for rate in RATES)
"""The settings that are tried for every tuned method."""

Chosen = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Settings by task and method."""
CellOfSeed = Callable[[int], Cell]
"""An experiment as a function of the seed."""


def tuning_cells() -> list[Cell]:
    """Return the grids of all methods on validation problems."""
    p_sft = [Cell(task, TUNING_SEED, "validation", "sft") for task in TASKS]
    return p_sft + [
        stage_two_cell(task, TUNING_SEED, "validation", method, setting)
        for method in TUNED
        for task in TASKS
        for setting in GRID
    ]


def choose_settings(
    rows: Mapping[str, Mapping[str, Any]], by: Literal["wins", "right"] = "wins"
) -> dict[str, dict[str, dict[str, Any]]] | None:
    """Return the best setting on validation problems, by task and method; None until all grids are done.

    Args:
        rows: finished cells by id.
        by: what the best one has most of: answers that the judge prefers (Raw), or right answers.
    """
    if any(cell.id not in rows for cell in tuning_cells()):
        return None
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for task in TASKS:
        chosen[task] = {}
        for method in TUNED:
            cells = {i: stage_two_cell(task, TUNING_SEED, "validation", method, s) for i, s in enumerate(GRID)}
            best = max(cells, key=lambda i: float(np.mean(rows[cells[i].id]["measured"][by])))
            chosen[task][method] = dict(GRID[best])
        # Anchor-GRPO with another scorer, included for its cost in teacher calls: it takes Anchor-GRPO's setting.
        chosen[task]["teacher_judge_grpo"] = chosen[task]["anchor_grpo"]
    return chosen


def middle_settings() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the middle of every grid, for the quick slice where no full run has chosen."""
    return {task: {method: {"learning_rate": RATES[1]} for method in METHODS} for task in TASKS}


def main_cells(chosen: Chosen, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """Return the cells of Tables 1 and 2, seed by seed: every method and task; teacher-judge GRPO last."""
    runs = [(task, seed) for seed in seeds for task in TASKS]
    cells = [
        cell
        for task, seed in runs
        for cell in [
            Cell(task, seed, "test", "sft"),
            *(stage_two_cell(task, seed, "test", method, chosen[task][method]) for method in TUNED),
        ]
    ]
    method = "teacher_judge_grpo"
    return cells + [stage_two_cell(task, seed, "test", method, chosen[task][method]) for task, seed in runs]


def accuracy_cells(by_accuracy: Chosen) -> list[Cell]:
    """Return the methods of Tables 1 and 2 at the settings with the most right answers, seed by seed."""
    return [
        stage_two_cell(task, seed, "test", method, by_accuracy[task][method])
        for seed in SEEDS
        for task in TASKS
        for method in TUNED
    ]


def noise_cells() -> list[Cell]:
    """Return LDL-GRPO and Anchor-GRPO on scores with noise, and without noise at the same rate."""
    return [
        stage_two_cell(task, seed, "test", method, NOISE_RATE, noise=noise)
        for seed in FEW_SEEDS
        for noise in (0.0, *NOISE)
        for task in TASKS
        for method in ("ldl_grpo", "anchor_grpo")
    ] + [
        stage_two_cell(task, seed, "test", "anchor_grpo", {**NOISE_RATE, **HELD_SETTINGS}, noise=NOISE[-1])
        for seed in FEW_SEEDS
        for task in TASKS
    ]


def edge_cells(chosen: Chosen) -> list[Cell]:
    """Return validation cells at the rate beyond every chosen rate that is the first or last of the grid."""
    edges = {RATES[0]: RATES_BEYOND[0], RATES[-1]: RATES_BEYOND[1]}
    return [
        stage_two_cell(task, TUNING_SEED, "validation", method, {"learning_rate": edges[rate]})
        for method in TUNED
        for task in TASKS
        if (rate := chosen[task][method]["learning_rate"]) in edges
    ]


def form_cells(chosen: Chosen) -> list[Cell]:
    """Return the other forms of q."""
    return [
        stage_two_cell(task, seed, "test", "ldl_grpo", {**chosen[task]["ldl_grpo"], "q": q})
        for seed in FEW_SEEDS
        for task in TASKS
        for q in ("likelihood", "mean")
    ]


@dataclass(frozen=True)
class Point:
    """One change to the settings of the tables.

    Attributes:
        key: the key that is varied, empty for a change that is not a value of a key.
        value: the key's value.
        label: a label for people.
        cell: the experiment.
        start: the p_sft that it starts from.
    """

    key: str
    value: Any
    label: str
    cell: CellOfSeed
    start: CellOfSeed


def sweep_points(chosen: Mapping[str, Mapping[str, Any]], task: Task) -> list[Point]:
    """Return LDL-GRPO with one key varied at a time, its own value included, then the changes that are no key.

    Args:
        chosen: the task's settings by method.
    """

    def p_sft(anchors: int = ANCHORS) -> CellOfSeed:
        return lambda seed: Cell(task, seed, "test", "sft", anchors=anchors)

    def experiment(method: str, changed: Mapping[str, Any] | None = None, **fields: Any) -> CellOfSeed:
        settings = {**chosen[method], **(changed or {})}
        return lambda seed: stage_two_cell(task, seed, "test", method, settings, **fields)

    defaults = {**DEFAULTS["ldl_grpo"], **chosen["ldl_grpo"]}
    points = []
    for key, values in SWEEPS.items():
        own_value = [defaults[key]] if key in defaults else []
        for value in sorted({*own_value, *values}):
            points.append(
                Point(key, value, format_settings({key: value}), experiment("ldl_grpo", {key: value}), p_sft())
            )
    for n in sorted({ANCHORS, *ANCHOR_COUNTS}):
        points.append(Point("anchors", n, f"N={n}", experiment("ldl_grpo", anchors=n), p_sft(n)))
    other_points = {
        "other prompts than Stage I's": experiment("ldl_grpo", pool="other"),
        "evaluator moving": experiment("ldl_grpo", evaluator="moving"),
        "SFT→SFT": experiment("sft_sft"),
        "SFT→SFT, other prompts than Stage I's": experiment("sft_sft", pool="other"),
        "AnchorRank-DPO": experiment("anchorrank_dpo"),
        "AnchorRank-DPO, pairs of clearly different scores, margin=0.3": experiment("anchorrank_dpo", {"margin": 0.3}),
        "Anchor-GRPO": experiment("anchor_grpo"),
        "Anchor-GRPO, evaluator moving": experiment("anchor_grpo", evaluator="moving"),
        "Anchor-GRPO, two updates per rollout: half the prompts and candidates": experiment(
            "anchor_grpo", {"updates_per_rollout": 2}
        ),
    }
    return points + [Point("", None, label, cell, p_sft()) for label, cell in other_points.items()]


def sweep_cells(chosen: Chosen) -> list[Cell]:
    """Return the cells of all points, seed by seed."""
    pairs = [
        (point.start(seed), point.cell(seed))
        for seed in SWEEP_SEEDS
        for of_tasks in zip(*(sweep_points(chosen[task], task) for task in TASKS), strict=True)
        for point in of_tasks
    ]
    return list(dict.fromkeys(cell for pair in pairs for cell in pair))


def all_cells(rows: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """Return all cells that are known to be needed given the finished rows, most important first."""
    chosen, by_accuracy = choose_settings(rows), choose_settings(rows, "right")
    if chosen is None or by_accuracy is None:
        return tuning_cells()
    tables = main_cells(chosen) + accuracy_cells(by_accuracy)
    others = noise_cells() + form_cells(chosen) + edge_cells(chosen) + sweep_cells(chosen)
    return list(dict.fromkeys(tuning_cells() + tables + others))
