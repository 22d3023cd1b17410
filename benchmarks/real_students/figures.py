"""Draw the figures of docs/results-real.md, from the rows of finished cells and from the curves of Stage II."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from real_students.page import best_on_validation, differences_from_p_sft, p_sft_by_seed, pairs_with_p_sft
from real_students.plan import METHODS

Row = Mapping[str, Any]

_SMOOTHED = 5  # steps of a moving mean
_TONES = plt.get_cmap("tab20").colors  # pairs of a dark and a light tone
_COLOURS = dict(zip(METHODS, (*_TONES[::2], *_TONES[1::2]), strict=False))


def draw_figures(rows: Sequence[Row], student: str, folder: Path) -> list[Path]:
    """Write a student's figures of the test cells as PNG files and return their paths; one without points is left out.

    Args:
        rows: finished cells; those of other students and of validation problems are left out.
        student: the student's name.
        folder: where the files go.
    """
    chosen = [row for row in rows if row["student"] == student and row["split"] == "test"]
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    written = []
    for name, draw in (("updates", _draw_updates), ("auc", _draw_auc), ("differences", _draw_differences)):
        figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
        if draw(axes, chosen):
            written.append(folder / f"results-real-{student}-{name}.png")
            figure.savefig(written[-1], dpi=120, metadata={"Software": None})
        plt.close(figure)
    return written


def draw_gains(curves: Sequence[Row], path: Path) -> None:
    """Draw the gain of the methods that were run with several seeds: over the groups drawn, and against the KL.

    Args:
        curves: runs of Stage II with their method, seed, prompts of an update, and gain and KL by update; those without
            a seed are left out.
        path: the PNG file to write.
    """
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, (over_groups, against_kl) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    runs: dict[str, list[Row]] = {}
    for curve in curves:
        if "seed" in curve:
            runs.setdefault(curve["method"], []).append(curve)
    for method, of_seeds in runs.items():
        (updates, gain), (_, divergence) = (_smoothed_mean([run[key] for run in of_seeds]) for key in ("gain", "kl"))
        groups = of_seeds[0]["prompts_per_step"] * updates
        over_groups.plot(groups, gain, label=method, color=_COLOURS[method], linewidth=1.8)
        for run in of_seeds:
            _, smooth = _smoothed_mean([run["gain"]])
            over_groups.plot(groups, smooth[: len(gain)], color=_COLOURS[method], linewidth=0.6, alpha=0.6)
        against_kl.plot(divergence, gain, marker=".", color=_COLOURS[method], linewidth=1.0)
    for axes in (over_groups, against_kl):
        axes.axhline(0, color="0.7", linewidth=0.8)
    over_groups.set_xlabel(f"groups drawn (mean of the last {_SMOOTHED} updates; thin: each seed)")
    over_groups.set_ylabel("gain over p_sft in agreement\nwith the anchor, own estimate")
    against_kl.set_xlabel("KL from p_sft, nats per answer")
    over_groups.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _smoothed_mean(curves: Sequence[Sequence[float]]) -> tuple[Any, Any]:
    """Return the moving mean of the mean of curves, over the updates that all of them have, after each one's number."""
    length = min(map(len, curves))
    mean = np.mean([curve[:length] for curve in curves], axis=0)
    window = min(_SMOOTHED, length)
    return np.arange(window, length + 1), np.convolve(mean, np.ones(window) / window, mode="valid")


def _draw_updates(axes: Any, rows: Sequence[Row]) -> bool:
    """Draw the share of right candidates over updates: every prompt is new when its candidates are drawn."""
    curves: dict[str, list[list[float]]] = {}
    for row in rows:
        if row["training_accuracy"]:
            curves.setdefault(row["method"], []).append([step["right"] for step in row["training_accuracy"]])
    for method, of_seeds in curves.items():
        axes.plot(*_smoothed_mean(of_seeds), label=method, color=_COLOURS[method])
    axes.set_xlabel(f"update (mean of the last {_SMOOTHED})")
    axes.set_ylabel("right candidates, on problems\nseen for the first time")
    if curves:
        axes.legend(frameon=False, fontsize=7)
    return bool(curves)


def _draw_differences(axes: Any, rows: Sequence[Row]) -> bool:
    """Draw each method's difference from p_sft with its interval, with the settings that do best on validation."""
    chosen = best_on_validation(rows)
    found = differences_from_p_sft(chosen)
    methods = [method for method in METHODS if method in found]
    for place, method in enumerate(methods):
        for number, (answers, difference) in enumerate(found[method].items()):
            low, high = difference.interval
            colour = "tab:orange" if answers.startswith("test") else "tab:blue"
            axes.errorbar(
                difference.mean,
                place + 0.17 * (number - 1.5),
                xerr=[[difference.mean - low], [high - difference.mean]],
                fmt="s" if answers.startswith("test") else "o",
                color=colour,
                markerfacecolor="white" if answers.endswith("greedy") else colour,
                markersize=4,
                linewidth=1.0,
                label=answers if place == 0 else None,
            )
    seeds = {method: len({row["seed"] for row in chosen if row["method"] == method}) for method in methods}
    axes.set_yticks(range(len(methods)), [f"{method}\n({seeds[method]} seeds)" for method in methods])
    axes.invert_yaxis()
    axes.axvline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("share of right answers, minus SFT's (95% over problems)")
    if methods:
        axes.legend(frameon=False, fontsize=7)
    return bool(methods)


def _draw_auc(axes: Any, rows: Sequence[Row]) -> bool:
    """Draw each cell's gain over p_sft of its seed against its score's AUC within a prompt."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row, base in pairs_with_p_sft(rows, p_sft_by_seed(rows)):
        auc = (row["score_quality"] or {}).get("auc_within")
        if auc is not None:
            points.setdefault(row["method"], []).append((auc, float(np.mean(row["right"]) - np.mean(base["right"]))))
    for method, pairs in points.items():
        axes.scatter(*zip(*pairs, strict=True), label=method, color=_COLOURS[method], s=18)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("AUC of the score within a prompt")
    axes.set_ylabel("gain over SFT in sampled accuracy")
    if points:
        axes.legend(frameon=False, fontsize=7)
    return bool(points)
