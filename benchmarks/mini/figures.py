"""Draw the page's figures: convergence, noise, AUC, and one key at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mini import plan
from mini.plan import CellOfSeed
from mini.results import Results, Row
from purld.display.titles import model_title
from purld.testbed.world.world import Task

_BLUE, _RED, _GREY = "#2c6fbb", "#c44e52", "#777777"
_COLOURS = {"ldl_grpo": _BLUE, "anchor_grpo": _RED}
_NAMES = {"raw": "Raw", "accuracy": "accuracy"}
_SWEPT: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "learning_rate": ("learning rate", "log", {}),
    "gamma": ("γ", "log", {"base": 2}),
    "tau": ("τ", "linear", {}),
    "beta": ("β", "symlog", {"linthresh": 0.01}),
    "candidates": ("K", "log", {"base": 2}),
    "anchors": ("N", "log", {}),
}
"""The varied keys that are drawn, each with its axis' label, scale and scale options."""

Point = tuple[float, CellOfSeed, CellOfSeed]
"""x, an experiment, and the p_sft that it starts from."""


def draw_figures(results: Results, docs: Path) -> None:
    """Write the PNG files next to the page; a figure without points is not written."""
    if results.chosen is None:
        return
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    for name, draw in DRAWN.items():
        figure = draw(results)
        if figure is not None:
            figure.savefig(docs / f"miniature-{name}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)


def _convergence(results: Results) -> Any:
    """Draw Figure 2's counterpart: Stage I's loss, then Stage II's objective, with the share of right candidates."""
    figure, axes = plt.subplots(2, len(plan.TASKS), figsize=(7.2, 4.2), squeeze=False)
    for column, task in enumerate(plan.TASKS):
        sft, ldl = results.of_method(task, "sft"), results.of_method(task, "ldl_grpo")
        seeds = results.seeds(sft, ldl)
        if not seeds:
            plt.close(figure)
            return None
        top, bottom = axes[:, column]
        _losses(top, [results.row(sft(seed)) for seed in seeds], [results.row(ldl(seed)) for seed in seeds])
        top.set(title=task, xlabel="step (Stage I, then Stage II)")
        _right_candidates(bottom, results, task)
    axes[0, 0].set_ylabel("Stage I loss")
    axes[1, 0].set_ylabel("right candidates")
    axes[1, 0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return figure


def _losses(axis: Any, first: Sequence[Row], second: Sequence[Row]) -> None:
    """Draw Stage I's losses on the left scale, then LDL-GRPO's objective on the right one."""
    curves = [row["curve"] for row in first]
    best = [row["best_step"] for row in first]
    offset = max(row["step"] for curve in curves for row in curve)
    _band(axis, *_columns(curves, "loss"), _BLUE, "Stage I: training loss")
    _band(axis, *_columns(curves, "eval_loss"), _GREY, "Stage I: validation loss")
    axis.axvspan(min(best), max(best), color=_GREY, alpha=0.15, lw=0)
    axis.axvline(offset, color=_GREY, ls="--", lw=0.8)
    twin = axis.twinx()
    twin.spines["right"].set_visible(True)
    steps, values = _columns([row["curve"] for row in second], "objective")
    _band(twin, steps + offset, values, _RED, "LDL-GRPO: objective")
    lines = [*axis.get_legend_handles_labels()[0], *twin.get_legend_handles_labels()[0]]
    twin.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=7, loc=(0.28, 0.5))


def _right_candidates(axis: Any, results: Results, task: Task) -> None:
    """Draw the share of right candidates along Stage II, for the methods that draw groups."""
    for method, colour in _COLOURS.items():
        experiment = results.of_method(task, method)
        if seeds := results.seeds(experiment):
            curves = [results.row(experiment(seed))["curve"] for seed in seeds]
            _band(axis, *_columns(curves, "right", smooth=5), colour, model_title(method))
    axis.set_xlabel("step of Stage II")


def _columns(curves: Sequence[Sequence[dict[str, Any]]], key: str, smooth: int = 1) -> tuple[Any, Any]:
    """Return steps (n,) and values (curves, n) of a key at the steps that all curves have."""
    values_by_step = [{row["step"]: row[key] for row in curve if key in row} for curve in curves]
    steps = sorted(set.intersection(*(set(values) for values in values_by_step)))
    values = np.array([[curve[step] for step in steps] for curve in values_by_step])
    if smooth > 1:
        window = np.ones(smooth) / smooth
        values = np.array([np.convolve(row, window, mode="valid") for row in values])
        steps = steps[smooth - 1 :]
    return np.array(steps), values


def _band(axis: Any, steps: Any, values: Any, colour: str, label: str) -> None:
    """Draw the mean over seeds and the band from the lowest to the highest seed."""
    axis.plot(steps, values.mean(axis=0), color=colour, lw=1.2, label=label)
    axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0)


def _noise(results: Results) -> Any:
    """Draw LDL-GRPO and Anchor-GRPO against SFT by the noise on their scores."""
    figure, axes = plt.subplots(len(_NAMES), len(plan.TASKS), figsize=(7.2, 4.4), squeeze=False)
    drawn = False
    for column, task in enumerate(plan.TASKS):
        sft = results.of_method(task, "sft")
        for line, (name, shown) in enumerate(_NAMES.items()):
            axis = axes[line, column]
            for shift, (method, colour) in zip((-0.02, 0.02), _COLOURS.items()):
                points = [(d + shift, results.noisy(task, method, d), sft) for d in (0.0, *plan.NOISE)]
                drawn |= _points(axis, results, points, plan.FEW_SEEDS, name, colour, model_title(method))
            axis.axhline(0, color=_GREY, lw=0.8)
            axis.set(title=task if line == 0 else "", xlabel="standard deviation of the noise" if line else "")
            if column == 0:
                axis.set_ylabel(f"{shown} − SFT")
    return _finished(figure, axes[0, 0], drawn)


def _auc(results: Results) -> Any:
    """Draw Stage II's gain in accuracy by the AUC of its scores, right against wrong candidates; a dot is a run."""
    figure, axes = plt.subplots(1, len(plan.TASKS), figsize=(7.2, 2.6), squeeze=False)
    drawn = False
    for axis, task in zip(axes[0], plan.TASKS):
        for method, colour in _COLOURS.items():
            aucs, gains = _by_auc(results, task, method)
            drawn |= bool(aucs)
            axis.plot(aucs, gains, color=colour, ls="", marker=".", label=model_title(method))
        axis.axhline(0, color=_GREY, lw=0.8)
        axis.set(title=task, xlabel="AUC of the scores within prompts")
    axes[0, 0].set_ylabel("accuracy − SFT")
    return _finished(figure, axes[0, 0], drawn)


def _by_auc(results: Results, task: Task, method: str) -> tuple[list[float], list[float]]:
    """Return AUC and gain of every run, with and without noise."""
    sft = results.of_method(task, "sft")
    aucs: list[float] = []
    gains: list[float] = []
    for deviation in (0.0, *plan.NOISE):
        experiment = results.noisy(task, method, deviation)
        aucs += [results.row(experiment(seed))["score"]["auc_within"] for seed in results.seeds(experiment, sft)]
        difference = results.difference(experiment, sft, "accuracy")
        gains += difference.values if difference else ()
    return aucs, gains


def _points(
    axis: Any, results: Results, points: Sequence[Point], among: Sequence[int], name: str, colour: str, label: str
) -> bool:
    """Draw means over some seeds, with a dot per seed; return whether there was a point."""
    means = [
        (x, mean) for x, experiment, start in points if (mean := results.difference(experiment, start, name, among))
    ]
    if not means:
        return False
    axis.plot(*zip(*[(x, mean.mean) for x, mean in means]), color=colour, lw=1.2, marker="o", ms=3, label=label)
    for x, mean in means:
        axis.plot([x] * mean.n, mean.values, color=colour, ls="", marker=".", ms=3, alpha=0.5)
    return True


def _finished(figure: Any, first: Any, drawn: bool) -> Any:
    """Return the figure with its legend in the first panel; None if nothing was drawn."""
    if not drawn:
        plt.close(figure)
        return None
    first.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return figure


def _sensitivity(results: Results) -> Any:
    """Draw Figure 3's counterpart and more: one key at a time around the chosen settings."""
    figure, axes = plt.subplots(2, len(_SWEPT), figsize=(8.4, 4.0), squeeze=False, sharey="row")
    drawn = False
    for column, (key, (label, scale, scale_options)) in enumerate(_SWEPT.items()):
        by_task = {task: _swept(results, task, key) for task in plan.TASKS}
        values = sorted({x for points in by_task.values() for x, _, _ in points})
        for (task, points), colour in zip(by_task.items(), (_BLUE, _RED)):
            for axis, name in zip(axes[:, column], _NAMES):
                drawn |= _points(axis, results, points, plan.SWEEP_SEEDS, name, colour, task)
        for axis in axes[:, column]:
            axis.axhline(0, color=_GREY, lw=0.8)
            axis.set_xscale(scale, **scale_options)
            axis.set_xticks(values, [f"{value:g}" for value in values], rotation=45, fontsize=6)
            axis.set_xticks([], minor=True)
        axes[1, column].set_xlabel(label)
    for axis, shown in zip(axes[:, 0], _NAMES.values()):
        axis.set_ylabel(f"{shown} − SFT")
    return _finished(figure, axes[0, 0], drawn)


def _swept(results: Results, task: Task, key: str) -> list[Point]:
    """Return the points of one key."""
    assert results.chosen is not None
    return [(p.value, p.cell, p.start) for p in plan.sweep_points(results.chosen[task], task) if p.key == key]


DRAWN = {"convergence": _convergence, "noise": _noise, "auc": _auc, "sensitivity": _sensitivity}
"""The figures by the last part of their file names."""
