"""The page's figures: convergence, noise, and one key at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mini import plan
from mini.cells import PLAIN
from mini.page import few_differences
from mini.results import OfSeed, Results

_BLUE, _RED, _GREY = "#2c6fbb", "#c44e52", "#777777"
_COLOURS = {"ldl_grpo": _BLUE, "anchor_grpo": _RED}
_TITLES = {"gamma": "γ", "tau": "τ", "beta": "β", "candidates": "K"}


def draw_figures(results: Results, docs: Path) -> None:
    """Write the PNG files beside the page; a figure without points is left as it is."""
    if results.chosen is None:
        return
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    for name, draw in (("convergence", _convergence), ("noise", _noise), ("sensitivity", _sensitivity)):
        figure = draw(results)
        if figure is not None:
            figure.savefig(docs / f"miniature-{name}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)


def _convergence(results: Results) -> Any:
    """Figure 2's counterpart: Stage I's loss, then Stage II's objective, with the share of right candidates below."""
    figure, axes = plt.subplots(2, len(plan.TASKS), figsize=(7.2, 4.2), squeeze=False)
    for column, task in enumerate(plan.TASKS):
        sft, ldl = results.of_method(task, "sft"), results.of_method(task, "ldl_grpo")
        seeds = results.seeds(sft, ldl)
        if not seeds:
            plt.close(figure)
            return None
        first = [results.row(sft(seed))["curve"] for seed in seeds]
        second = [results.row(ldl(seed))["curve"] for seed in seeds]
        top, below = axes[0, column], axes[1, column]
        best = [results.row(sft(seed))["best_step"] for seed in seeds]
        _band(top, *_columns(first, "loss"), _BLUE, "Stage I: training loss")
        _band(top, *_columns(first, "eval_loss"), _GREY, "Stage I: validation loss")
        offset = max(step for curve in first for step in [row["step"] for row in curve])
        top.axvspan(min(best), max(best), color=_GREY, alpha=0.15, lw=0)
        top.axvline(offset, color=_GREY, ls="--", lw=0.8)
        steps, values = _columns(second, "objective")
        twin = top.twinx()
        twin.spines["right"].set_visible(True)
        _band(twin, steps + offset, values, _RED, "LDL-GRPO: objective")
        top.set(title=task, xlabel="step (Stage I, then Stage II)")
        if column == 0:
            top.set_ylabel("Stage I loss")
            lines = [*top.get_legend_handles_labels()[0], *twin.get_legend_handles_labels()[0]]
            top.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=7)
        for method, colour in _COLOURS.items():
            curves = [
                results.row(of(s))["curve"] for of in [results.of_method(task, method)] for s in results.seeds(of)
            ]
            if curves:
                _band(
                    below,
                    *_columns(curves, "right", smooth=5),
                    colour,
                    "LDL-GRPO" if method == "ldl_grpo" else "Anchor-GRPO",
                )
        below.set(xlabel="step of Stage II", ylabel="right candidates" if column == 0 else "")
        if column == 0:
            below.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return figure


def _columns(curves: Sequence[Sequence[dict[str, Any]]], key: str, smooth: int = 1) -> tuple[Any, Any]:
    """Steps (n,) and values (curves, n) of a key at the steps that all curves have."""
    found = [{row["step"]: row[key] for row in curve if key in row} for curve in curves]
    steps = sorted(set.intersection(*(set(values) for values in found)))
    values = np.array([[curve[step] for step in steps] for curve in found])
    if smooth > 1:
        window = np.ones(smooth) / smooth
        values = np.array([np.convolve(row, window, mode="valid") for row in values])
        steps = steps[smooth - 1 :]
    return np.array(steps), values


def _band(axis: Any, steps: Any, values: Any, colour: str, label: str) -> None:
    """The mean over seeds, and from the lowest to the highest seed."""
    axis.plot(steps, values.mean(axis=0), color=colour, lw=1.2, label=label)
    axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0)


def _noise(results: Results) -> Any:
    """LDL-GRPO and Anchor-GRPO against SFT by the noise on their scores."""
    names = ("raw", "accuracy")
    figure, axes = plt.subplots(len(names), len(plan.TASKS), figsize=(7.2, 4.4), squeeze=False)
    drawn = False
    for column, task in enumerate(plan.TASKS):
        sft = results.of_method(task, "sft")
        for line, name in enumerate(names):
            axis = axes[line, column]
            for shift, (method, colour) in zip((-0.02, 0.02), _COLOURS.items()):
                points = [(d, results.of_method(task, method, noise=d)) for d in (0.0, *plan.NOISE)]
                drawn |= _errors(axis, results, [(d + shift, of) for d, of in points], sft, name, colour, method)
            axis.axhline(0, color=_GREY, lw=0.8)
            axis.set(title=task if line == 0 else "", xlabel="standard deviation of the noise" if line else "")
            if column == 0:
                axis.set_ylabel(f"{'Raw' if name == 'raw' else name} − SFT")
    if not drawn:
        plt.close(figure)
        return None
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return figure


def _errors(
    axis: Any, results: Results, points: Sequence[tuple[float, OfSeed]], sft: OfSeed, name: str, colour: str, label: str
) -> bool:
    """Means over the few seeds with every seed as a dot; returns whether there was a point."""
    found = [(x, few_differences(results, of, sft, name)) for x, of in points]
    found = [(x, mean) for x, mean in found if mean is not None]
    if not found:
        return False
    title = "LDL-GRPO" if label == "ldl_grpo" else "Anchor-GRPO" if label == "anchor_grpo" else label
    axis.plot(
        [x for x, _ in found], [mean.mean for _, mean in found], color=colour, lw=1.2, marker="o", ms=3, label=title
    )
    for x, mean in found:
        axis.plot([x] * mean.n, mean.values, color=colour, ls="", marker=".", ms=3, alpha=0.5)
    return True


def _sensitivity(results: Results) -> Any:
    """Figure 3's counterpart and more: one key at a time around the chosen settings."""
    keys = list(_TITLES)
    figure, axes = plt.subplots(2, len(keys), figsize=(7.8, 4.0), squeeze=False)
    for column, key in enumerate(keys):
        for task, colour in zip(plan.TASKS, (_BLUE, _RED)):
            assert results.chosen is not None
            own = (dict(PLAIN["ldl_grpo"]) | dict(results.chosen[task]["ldl_grpo"]))[key]
            values = sorted({own, *plan.SWEEPS[key]})
            sft = results.of_method(task, "sft")
            points = [(v, results.of_method(task, "ldl_grpo", settings={key: v})) for v in values]
            for line, name in enumerate(("raw", "accuracy")):
                axis = axes[line, column]
                _errors(axis, results, points, sft, name, colour, task)
                axis.axhline(0, color=_GREY, lw=0.8)
                if key in ("gamma", "candidates"):
                    axis.set_xscale("log", base=2)
                if key == "beta":
                    axis.set_xscale("symlog", linthresh=0.01)
                if line:
                    axis.set_xlabel(_TITLES[key])
                if column == 0:
                    axis.set_ylabel(f"{'Raw' if name == 'raw' else name} − SFT")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if not handles:
        plt.close(figure)
        return None
    axes[0, 0].legend(handles, labels, frameon=False, fontsize=7)
    figure.tight_layout()
    return figure
