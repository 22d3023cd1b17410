"""Which cells there are, in the order in which they matter: tuning, the tables, noise, then one key at a time.

What is tuned is chosen from the rows of the tuning cells, so later cells are known once those are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mini.cells import ANCHORS, PLAIN, Cell, named, stage_two

TASKS = ("writing", "counting")
SEEDS = (0, 1, 2, 3, 4)
FEW_SEEDS = (0, 1, 2)
SWEEP_SEEDS = (0, 1)
TUNING_SEED = 1000  # of no table; its problems are of the training split, so no table is measured on them

TUNED = ("ldl_grpo", "anchorrank_dpo", "anchor_grpo", "self_ppo", "singlepair_dpo", "sft_sft")
METHODS = (*TUNED, "teacher_judge_grpo")
# Three rates for each; what else a method has stays as published (see `cells.PLAIN`).
RATES = (1.5e-5, 5e-5, 1.5e-4)
# Tried where the first or the last of them was chosen, to show what a wider grid would have said.
BEYOND = (5e-6, 4.5e-4)

NOISE = (0.5, 2.0)
# Both methods take it under noise, whatever was chosen for them: AdamW's steps are as large for one loss as for
# another, so what noise does to a method is only seen at one rate.
NOISE_RATE = {"learning_rate": RATES[1]}
# What Anchor-GRPO has of LDL-GRPO's hold on p_sft in one arm, to tell labels from hold.
HELD = {"beta": PLAIN["ldl_grpo"]["beta"]}
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
"""The settings that are tried for every method."""

Chosen = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Settings by task and method."""
OfSeed = Callable[[int], Cell]
"""The same experiment on any seed."""


def tuning_cells() -> list[Cell]:
    """All methods' grids on validation problems."""
    p_sft = [Cell(task, TUNING_SEED, "validation", "sft") for task in TASKS]
    return p_sft + [
        stage_two(task, TUNING_SEED, "validation", method, setting)
        for method in TUNED
        for task in TASKS
        for setting in GRID
    ]


def choose(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]] | None:
    """The setting of the highest validation win rate, by task and method; None until all grids are done.

    Args:
        rows: finished cells by their id.
    """
    if any(cell.id not in rows for cell in tuning_cells()):
        return None
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for task in TASKS:
        chosen[task] = {}
        for method in TUNED:
            cells = {i: stage_two(task, TUNING_SEED, "validation", method, s) for i, s in enumerate(GRID)}
            best = max(cells, key=lambda i: float(np.mean(rows[cells[i].id]["measured"]["wins"])))
            chosen[task][method] = dict(GRID[best])
        # It is Anchor-GRPO with another scorer, and there for the price: it takes that one's setting.
        chosen[task]["teacher_judge_grpo"] = chosen[task]["anchor_grpo"]
    return chosen


def middle() -> dict[str, dict[str, dict[str, Any]]]:
    """The middle of every grid: what the quick slice takes before a full run has chosen."""
    return {task: {method: {"learning_rate": RATES[1]} for method in METHODS} for task in TASKS}


def main_cells(chosen: Chosen, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """Tables 1 and 2: every method on every task and seed, seed by seed; the judging teacher, which is ours, last."""
    runs = [(task, seed) for seed in seeds for task in TASKS]
    found = [
        cell
        for task, seed in runs
        for cell in [
            Cell(task, seed, "test", "sft"),
            *(stage_two(task, seed, "test", method, chosen[task][method]) for method in TUNED),
        ]
    ]
    method = "teacher_judge_grpo"
    return found + [stage_two(task, seed, "test", method, chosen[task][method]) for task, seed in runs]


def noise_cells() -> list[Cell]:
    """LDL-GRPO and Anchor-GRPO on scores with noise, and without at the same rate."""
    return [
        stage_two(task, seed, "test", method, NOISE_RATE, noise=noise)
        for seed in FEW_SEEDS
        for noise in (0.0, *NOISE)
        for task in TASKS
        for method in ("ldl_grpo", "anchor_grpo")
    ] + [
        stage_two(task, seed, "test", "anchor_grpo", {**NOISE_RATE, **HELD}, noise=NOISE[-1])
        for seed in FEW_SEEDS
        for task in TASKS
    ]


def edge_cells(chosen: Chosen) -> list[Cell]:
    """On validation, the rate beyond every chosen one that is the first or the last of the grid."""
    edges = {RATES[0]: BEYOND[0], RATES[-1]: BEYOND[1]}
    return [
        stage_two(task, TUNING_SEED, "validation", method, {"learning_rate": edges[rate]})
        for method in TUNED
        for task in TASKS
        if (rate := chosen[task][method]["learning_rate"]) in edges
    ]


def form_cells(chosen: Chosen) -> list[Cell]:
    """The other forms of q."""
    return [
        stage_two(task, seed, "test", "ldl_grpo", chosen[task]["ldl_grpo"] | {"q": q})
        for seed in FEW_SEEDS
        for task in TASKS
        for q in ("likelihood", "mean")
    ]


@dataclass(frozen=True)
class Point:
    """One thing changed around the settings of the tables.

    Attributes:
        key: what is changed, if it is a key that has several values.
        value: of the key.
        label: for a person.
        cell: the experiment.
        start: the p_sft it starts from.
    """

    key: str
    value: Any
    label: str
    cell: OfSeed
    start: OfSeed


def points(chosen: Mapping[str, Mapping[str, Any]], task: str) -> list[Point]:
    """One key of LDL-GRPO at a time, its own value among the others; then what is no key of it.

    Args:
        chosen: the task's settings by method.
    """

    def p_sft(anchors: int = ANCHORS) -> OfSeed:
        return lambda seed: Cell(task, seed, "test", "sft", anchors=anchors)

    def of(method: str, changed: Mapping[str, Any] | None = None, **more: Any) -> OfSeed:
        settings = {**chosen[method], **(changed or {})}
        return lambda seed: stage_two(task, seed, "test", method, settings, **more)

    plain = PLAIN["ldl_grpo"] | chosen["ldl_grpo"]
    found = []
    for key, values in SWEEPS.items():
        own = [plain[key]] if key in plain else []
        for value in sorted({*own, *values}):
            found.append(Point(key, value, named({key: value}), of("ldl_grpo", {key: value}), p_sft()))
    for n in sorted({ANCHORS, *ANCHOR_COUNTS}):
        found.append(Point("anchors", n, f"N={n}", of("ldl_grpo", anchors=n), p_sft(n)))
    others = {
        "other prompts than Stage I's": of("ldl_grpo", pool="other"),
        "evaluator moving": of("ldl_grpo", evaluator="moving"),
        "SFT→SFT": of("sft_sft"),
        "SFT→SFT, other prompts than Stage I's": of("sft_sft", pool="other"),
        "AnchorRank-DPO": of("anchorrank_dpo"),
        "AnchorRank-DPO, pairs of clearly different scores, margin=0.3": of("anchorrank_dpo", {"margin": 0.3}),
        "Anchor-GRPO": of("anchor_grpo"),
        "Anchor-GRPO, evaluator moving": of("anchor_grpo", evaluator="moving"),
        "Anchor-GRPO, two updates per rollout: half the prompts and candidates": of(
            "anchor_grpo", {"updates_per_rollout": 2}
        ),
    }
    return found + [Point("", None, label, cell, p_sft()) for label, cell in others.items()]


def sweep_cells(chosen: Chosen) -> list[Cell]:
    """All points, seed by seed."""
    found = [
        (point.start(seed), point.cell(seed))
        for seed in SWEEP_SEEDS
        for both in zip(*(points(chosen[task], task) for task in TASKS), strict=True)
        for point in both
    ]
    return list(dict.fromkeys(cell for pair in found for cell in pair))


def all_cells(rows: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """Everything that is known to be needed given what is done, most important first."""
    chosen = choose(rows)
    if chosen is None:
        return tuning_cells()
    found = tuning_cells() + main_cells(chosen) + noise_cells() + form_cells(chosen) + edge_cells(chosen)
    found += sweep_cells(chosen)
    return list(dict.fromkeys(found))
