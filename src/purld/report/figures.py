"""The figures of a run, drawn by matplotlib in one style.

As SVG every colour is a CSS variable with its light value to fall back on, so one drawing serves a light and
a dark page; text stays text. Figures know metrics and nothing of the page around them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from purld.display.titles import model_title
from purld.report.run_data import Row, RunData

# Roles of colour; the page's style sheet has the same names with a value for light and one for dark.
COLOURS = {
    "ink": "#22262e",
    "muted": "#69717f",
    "grid": "#e4e7ec",
    "stage1": "#2563c9",
    "stage2": "#cf3f36",
    "labels": "#c77a08",
    "policy": "#0c8577",
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.borderaxespad": 0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "purld",
    "text.parse_math": False,
}
_SMOOTH_FROM = 20  # fewer points than this are drawn as they are
_WINDOWS = 20  # the smoothed line averages over a twentieth of the stage


@dataclass(frozen=True)
class MetricPanel:
    """A small figure over the steps of Stage II: which metrics, in which colours, and how to read it."""

    heading: str
    unit: str
    series: Mapping[str, tuple[str, str]]  # metric: (label, role of its colour)
    caption: str
    baseline: float | None = None


@dataclass(frozen=True)
class ReportFigure:
    """A figure ready for a page."""

    heading: str
    caption: str
    svg: str
    wide: bool = False


PANELS = (
    MetricPanel(
        "Entropy of D and q",
        "nats",
        {"entropy_labels": ("labels D", "labels"), "entropy_policy": ("policy q", "policy")},
        "How spread the target and the policy are over a group. With q below D the policy is being flattened.",
    ),
    MetricPanel(
        "KL from the SFT model",
        "nats per answer",
        {"kl": ("KL(θ‖SFT)", "stage2")},
        "How far the policy has moved from where Stage I left it.",
        baseline=0,
    ),
    MetricPanel(
        "Scores",
        "score",
        {"anchor_score": ("anchor", "labels"), "score": ("candidates", "policy")},
        "The scores of the teacher's anchor, where it has one, and of the policy's own candidates.",
    ),
    MetricPanel(
        "Margin to the anchor",
        "candidate − anchor",
        {"margin": ("margin", "policy")},
        "Zero: candidates score as well as the teacher's answer.",
        baseline=0,
    ),
    MetricPanel(
        "Answer length",
        "tokens",
        {"length": ("candidates", "policy")},
        "Drift in either direction deserves a look at the answers below.",
    ),
    MetricPanel(
        "Length against q",
        "correlation",
        {"length_correlation": ("correlation", "policy")},
        "Strongly negative: q sits on the shortest candidates, whatever their worth.",
        baseline=0,
    ),
    MetricPanel(
        "Clipped tokens",
        "share",
        {"clipped": ("clipped", "policy")},
        "Tokens whose gradient the clip cut off: zero while every update has candidates of its own.",
        baseline=0,
    ),
    MetricPanel(
        "Error of the critic",
        "squared",
        {"value_loss": ("critic", "policy")},
        "Half the squared distance of the critic's values from the returns.",
        baseline=0,
    ),
    MetricPanel(
        "Pairs in the right order",
        "share",
        {"pair_accuracy": ("chosen above rejected", "policy")},
        "Pairs whose chosen member the policy has raised above the rejected one since the SFT model.",
    ),
    MetricPanel(
        "Candidates lost",
        "per log",
        {"truncated": ("cut off", "labels"), "unscored": ("unscored", "stage2")},
        "Cut off at the token limit, or without a score; unscored candidates take no part in the update.",
        baseline=0,
    ),
    MetricPanel(
        "Gradient norm",
        "before clipping",
        {"grad_norm": ("gradient", "stage2")},
        "Spikes come before trouble.",
    ),
)


def draw_figures(run: RunData, prefix: str = "figure", whole: bool = True) -> list[ReportFigure]:
    """Every figure that the run's metrics allow, or the convergence alone if not the `whole` is wanted.

    `prefix` sets their ids apart from another run's on a page.
    """
    found = []
    if (figure := draw_convergence(run)) is not None:
        caption = "The loss of Stage I and the objective of Stage II have different units, hence two axes."
        found.append(ReportFigure("Two-stage convergence", caption, figure_to_svg(figure, prefix), wide=True))
    if not whole:
        return found
    if "training_accuracy" in run.results:
        found.append(_training_accuracy(run.results["training_accuracy"], prefix))
    rows = run.stage("align")
    for place, panel in enumerate(PANELS):
        if any(_points(rows, key)[1].any() for key in panel.series):
            svg = figure_to_svg(_draw(panel, rows), f"{prefix}-{place}")
            found.append(ReportFigure(panel.heading, panel.caption, svg))
    if "label_divergence" in run.results:
        found += _movement(run, f"{prefix}-movement")
    if "score_quality" in run.results:
        found.append(_score_quality(run.results["score_quality"], prefix))
    return found


def save_convergence(run: RunData, path: Path) -> None:
    """Save the two-stage convergence as a picture for a README, in the format its suffix names, on a white ground.

    Raises:
        ValueError: the run logged no training.
    """
    figure = draw_convergence(run, width=8.6)
    if figure is None:
        raise ValueError(f"{run.name} has logged no training to draw")
    with rc_context(STYLE):
        figure.savefig(path, dpi=200, facecolor="white")


def draw_convergence(run: RunData, width: float = 11.5) -> Figure | None:
    """Stage I's loss (left axis) and Stage II's objective (right axis) over all steps, as in Figure 2.

    `width` is in inches; text keeps its size. None if the run logged no training.
    """
    first, second = run.stage("sft"), run.stage("align")
    losses, objectives = _points(first, "loss"), _points(second, "objective")
    validation = _points(first, "eval_loss")
    if not len(losses[0]) and not len(objectives[0]):
        return None
    turn = max((row["step"] for row in first), default=0)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        left = figure.add_subplot()
        left.margins(x=0.02)
        left.set_xlabel("training step")
        left.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        right = left.twinx() if len(losses[0]) and len(objectives[0]) else left
        right.grid(False)
        if len(losses[0]):
            _line(left, *losses, "stage1")
            if len(validation[0]):
                left.plot(*validation, "o", markersize=4.5, color=COLOURS["stage1"], label="validation loss")
                left.legend(loc="lower left", bbox_to_anchor=(0, 1.01))
            _own_axis(left, "Stage I: SFT loss", "stage1")
        if len(objectives[0]):
            _line(right, objectives[0] + turn, objectives[1], "stage2")
            _own_axis(right, f"Stage II: {model_title(run.method or 'align')} objective", "stage2")
        if right is not left:
            _mark_turn(left, turn)
    return figure


def _mark_turn(axes: Axes, turn: float) -> None:
    """The line between the stages, which are named on either side of its head."""
    axes.axvline(turn, linestyle=(0, (4, 3)), linewidth=1.2, color=COLOURS["muted"])
    for name, side, shift, role in (("Stage I", "right", -8, "stage1"), ("Stage II", "left", 8, "stage2")):
        axes.annotate(
            name,
            (turn, 1.02),
            xycoords=("data", "axes fraction"),
            xytext=(shift, 0),
            textcoords="offset points",
            ha=side,
            va="bottom",
            weight="bold",
            color=COLOURS[role],
        )


def _draw(panel: MetricPanel, rows: Sequence[Row]) -> Figure:
    with rc_context(STYLE):
        figure, axes = _panel(panel.unit)
        if panel.baseline is not None:
            axes.axhline(panel.baseline, linewidth=1, color=COLOURS["muted"])
        for key, (label, role) in panel.series.items():
            steps, values = _points(rows, key)
            if len(steps):
                _line(axes, steps, values, role, label)
        if len(panel.series) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1.01), ncols=len(panel.series))
    return figure


def _training_accuracy(rows: Sequence[Row], prefix: str) -> ReportFigure:
    """The share of Stage II's candidates that is right, over its steps."""
    with rc_context(STYLE):
        figure, axes = _panel("right candidates")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _line(axes, *_points(rows, "right"), "policy")
    caption = "Sampled candidates that are right by the gold of the training prompts, which training never sees."
    return ReportFigure("Accuracy over training", caption, figure_to_svg(figure, f"{prefix}-accuracy"))


def _panel(unit: str) -> tuple[Figure, Axes]:
    """An empty small figure over the steps of Stage II."""
    figure = Figure(figsize=(4.2, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("Stage II step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def _score_quality(found: Row, prefix: str) -> ReportFigure:
    """How often candidates are right at each score: on the diagonal, a score is a probability."""
    bins = found["bins"]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("self-evaluated score")
        axes.set_ylabel("share right")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.04, 1.04)
        axes.plot([0, 1], [0, 1], linewidth=1, color=COLOURS["muted"])
        sizes = [20 + 180 * b["n"] / found["n"] for b in bins]
        axes.plot([b["score"] for b in bins], [b["right"] for b in bins], linewidth=1.2, color=COLOURS["policy"])
        axes.scatter([b["score"] for b in bins], [b["right"] for b in bins], s=sizes, color=COLOURS["policy"])
    return ReportFigure("Scores against gold", describe_score_quality(found), figure_to_svg(figure, f"{prefix}-scores"))


def describe_score_quality(found: Row) -> str:
    """Score quality in words; the AUC within prompts comes first, because labels compare within a prompt only."""
    parts = []
    if "auc_within" in found:
        low, high = found["auc_within_ci"]
        parts.append(
            f"A right candidate outscores a wrong one of the same prompt {100 * found['auc_within']:.1f}% of the "
            f"time (95% interval {100 * low:.1f} to {100 * high:.1f}; chance is 50)."
        )
    else:
        parts.append("No prompt has both a right and a wrong candidate.")
    if "auc" in found:
        parts.append(f"AUC over all prompts {found['auc']:.3f}.")
    parts.append(f"Calibration error {found['ece']:.3f} over {found['n']:,} candidates, {found['right']:.0%} right.")
    return " ".join(parts)


def _movement(run: RunData, prefix: str) -> list[ReportFigure]:
    """KL(D || q) of the groups that were measured twice: below the diagonal, q came closer to D. None if none is."""
    twice = [(g["label_divergence"], g["label_divergence_after"]) for g in run.groups if "label_divergence_after" in g]
    pairs = [pair for pair in twice if np.isfinite(pair).all()]
    if not pairs:
        return []
    top = 1.05 * max(value for pair in pairs for value in pair)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("nats before")
        axes.set_ylabel("nats after")
        axes.plot([0, top], [0, top], linewidth=1, color=COLOURS["muted"])
        axes.scatter(*zip(*pairs), s=20, alpha=0.6, linewidths=0, color=COLOURS["policy"])
    caption = describe_movement(run.results["label_divergence"])
    return [ReportFigure("KL(D‖q) before and after", caption, figure_to_svg(figure, prefix))]


def describe_movement(found: Row) -> str:
    """In words, what Stage II did to its objective on the candidates of its first groups."""
    return (
        f"On the candidates of the first {found['groups']} groups the mean was {found['before']:.3f} under the policy "
        f"that drew them and is {found['after']:.3f} under the final one; q came closer to D, below the line, in "
        f"{found['closer']} of them."
    )


def _own_axis(axes: Axes, label: str, role: str) -> None:
    axes.set_ylabel(label, color=COLOURS[role])
    axes.tick_params(axis="y", colors=COLOURS[role])


def _line(axes: Axes, steps: Any, values: Any, role: str, label: str | None = None) -> None:
    """The values, faint under their running mean once there are many."""
    colour = COLOURS[role]
    if len(values) < _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, _running_mean(values, len(values) // _WINDOWS), color=colour, linewidth=1.8, label=label)


def _running_mean(values: Any, half: int) -> Any:
    """The mean over the `half` neighbours on either side, over fewer at the ends."""
    window = np.ones(2 * half + 1)
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / counts


def _points(rows: Sequence[Row], key: str) -> tuple[Any, Any]:
    """The steps and values of one metric where it was logged and is finite."""
    pairs = [(r["step"], r[key]) for r in rows if r.get(key) is not None and np.isfinite(r[key])]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], dtype=float)


def figure_to_svg(figure: Figure, prefix: str) -> str:
    """The figure as an SVG element whose colours follow the page and whose ids no other figure has."""
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    for role, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--fig-{role}, {colour})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
