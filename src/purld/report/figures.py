"""Draw the figures of a run with matplotlib, in one style.

In the SVG every colour is a CSS variable with its light value as fallback, so the same drawing suits a light and a dark
page. Text stays text. This module knows metrics, and nothing of the page around the figures.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from purld.display.titles import model_title
from purld.evaluation.recorded import Row
from purld.report.run_data import RunData

# Colours by role; the page's style sheet has a light and a dark value for each role.
COLOURS = {
    "ink": "#22262e",
    "muted": "#69717f",
    "grid": "#e4e7ec",
    "stage1": "#2563c9",
    "stage2": "#cf3f36",
    "labels": "#c77a08",
    "policy": "#0c8577",
    "right": "#2a8f5d",
    "wrong": "#c4483f",
    "paper": "#fffffe",
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
_SMOOTH_FROM = 20  # with fewer points, no smoothed line is drawn
_NARROW = (4.2, 3.4)  # inches of the convergence on a phone
_WINDOWS = 20  # the smoothed line averages over a twentieth of the stage


@dataclass(frozen=True)
class MetricPanel:
    """A small figure over the steps of Stage II: its metrics, their colours and a caption."""

    heading: str
    unit: str
    series: Mapping[str, tuple[str, str]]  # metric: (label, colour role)
    caption: str
    baseline: float | None = None


@dataclass(frozen=True)
class ReportFigure:
    """A figure ready for a page; one with `narrow_svg` takes the whole width, and has that drawing on a phone."""

    heading: str
    caption: str
    svg: str
    narrow_svg: str = ""


PANELS = (
    MetricPanel(
        "Validation",
        "score",
        {"eval_score": ("validation", "stage2")},
        "The measure on validation prompts by which the step to keep is chosen.",
    ),
    MetricPanel(
        "Gain over the SFT model",
        "score",
        {"gain": ("gain", "stage2")},
        "What the candidates score more than the SFT model's would on the same prompts, before the update on them.",
        baseline=0,
    ),
    MetricPanel(
        "Entropy of D and q",
        "nats",
        {"entropy_labels": ("labels D", "labels"), "entropy_policy": ("policy q", "policy")},
        "How widely the labels and the policy spread over a group. If q lies below D, the update flattens the policy.",
    ),
    MetricPanel(
        "KL from the SFT model",
        "nats per answer",
        {"kl": ("KL(θ‖SFT)", "stage2")},
        "How far the policy has moved from the SFT model.",
        baseline=0,
    ),
    MetricPanel(
        "KL from the SFT model that reads the anchor",
        "nats per answer",
        {"kl_anchored": ("KL(θ‖SFT with the anchor)", "stage2")},
        "What self-distillation brings down: the policy without the anchor against the SFT model with it.",
        baseline=0,
    ),
    MetricPanel(
        "Scores",
        "score",
        {"anchor_score": ("anchor", "labels"), "score": ("candidates", "policy")},
        "The scores of the policy's candidates and, if the method scores it, of the teacher's anchor.",
    ),
    MetricPanel(
        "Margin to the anchor",
        "candidate − anchor",
        {"margin": ("margin", "policy")},
        "At zero, candidates score as well as the teacher's answer.",
        baseline=0,
    ),
    MetricPanel(
        "Answer length",
        "tokens",
        {"length": ("candidates", "policy")},
        "If the length drifts either way, look at the answers below.",
    ),
    MetricPanel(
        "Length against q",
        "correlation",
        {"length_correlation": ("correlation", "policy")},
        "Strongly negative: q prefers the shortest candidates, whatever their quality.",
        baseline=0,
    ),
    MetricPanel(
        "Clipped tokens",
        "share",
        {"clipped": ("clipped", "policy")},
        "Tokens whose gradient was clipped; zero while every update draws new candidates.",
        baseline=0,
    ),
    MetricPanel(
        "Error of the critic",
        "squared",
        {"value_loss": ("critic", "policy")},
        "Half the squared difference between the critic's values and the returns.",
        baseline=0,
    ),
    MetricPanel(
        "Pairs in the right order",
        "share",
        {"pair_accuracy": ("chosen above rejected", "policy")},
        "Pairs in which the policy has raised the chosen answer over the rejected one, relative to the SFT model.",
    ),
    MetricPanel(
        "Candidates lost",
        "per log",
        {"truncated": ("cut off", "labels"), "unscored": ("unscored", "stage2")},
        "Candidates cut off at the token limit, or without a score. Unscored candidates are left out of the update.",
        baseline=0,
    ),
    MetricPanel(
        "Gradient norm",
        "before clipping",
        {"grad_norm": ("gradient", "stage2")},
        "Spikes are an early sign of unstable training.",
    ),
)


def draw_figures(run: RunData, prefix: str = "figure", whole: bool = True) -> list[ReportFigure]:
    """Return every figure that the run's metrics allow.

    Args:
        run: the run.
        prefix: starts the ids of the figures; different for each run on a page.
        whole: False to draw the two-stage convergence alone.
    """
    figures = _draw_both_convergences(run, prefix)
    if not whole:
        return figures
    if "training_accuracy" in run.results:
        figures.append(_draw_training_accuracy(run.results["training_accuracy"], prefix))
    rows = run.stage_metrics("align")
    for index, panel in enumerate(PANELS):
        if any(_points(rows, key)[1].any() for key in panel.series):
            svg = figure_to_svg(_draw_panel(panel, rows), f"{prefix}-{index}")
            figures.append(ReportFigure(panel.heading, panel.caption, svg))
    if "label_divergence" in run.results:
        figures += _draw_label_divergence(run, f"{prefix}-movement")
    if "score_quality" in run.results:
        figures.append(_draw_score_quality(run.results["score_quality"], prefix))
    return figures


def _draw_both_convergences(run: RunData, prefix: str) -> list[ReportFigure]:
    """Return the two-stage convergence, drawn for a desk and for a phone; empty if the run logged no training."""
    figure, narrow = draw_convergence(run), draw_convergence(run, _NARROW)
    if figure is None or narrow is None:
        return []
    caption = "The loss of Stage I and the objective of Stage II have different units, so each has its own axis."
    if run.kept_steps:
        caption += " Diamonds: the steps whose models were kept."
    svgs = figure_to_svg(figure, prefix), figure_to_svg(narrow, f"{prefix}-narrow")
    return [ReportFigure("Two-stage convergence", caption, *svgs)]


def draw_convergence(run: RunData, size: tuple[float, float] = (11.5, 3.6)) -> Figure | None:
    """Draw Stage I's loss (left axis) and Stage II's objective (right axis) over all steps, as in Figure 2.

    A diamond marks the step of each stage whose model was kept. Returns None if the run logged no training.

    Args:
        run: the run.
        size: width and height in inches.
    """
    first, second = run.stage_metrics("sft"), run.stage_metrics("align")
    losses, objectives = _points(first, "loss"), _points(second, "objective")
    validation = _points(first, "eval_loss")
    if not len(losses[0]) and not len(objectives[0]):
        return None
    boundary = max((row["step"] for row in first), default=0)
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        left = figure.add_subplot()
        left.margins(x=0.02)
        left.set_xlabel("training step")
        left.xaxis.set_major_locator(MaxNLocator(8 if size[0] > _NARROW[0] else 4, integer=True))
        right = left.twinx() if len(losses[0]) and len(objectives[0]) else left
        right.grid(False)
        if len(losses[0]):
            _line(left, *losses, "stage1")
            if len(validation[0]):
                left.plot(*validation, "o", markersize=4.5, color=COLOURS["stage1"], label="validation loss")
                left.legend(loc="upper left", bbox_to_anchor=(0, -0.17))  # below the name of the axis
            _mark_kept(left, losses, run.kept_steps.get("sft"), "stage1")
            _colour_axis(left, "Stage I: SFT loss", "stage1")
        if len(objectives[0]):
            _line(right, objectives[0] + boundary, objectives[1], "stage2")
            _mark_kept(right, objectives, run.kept_steps.get("align"), "stage2", boundary)
            _colour_axis(right, f"Stage II: {model_title(run.method or 'align')} objective", "stage2")
        if right is not left:
            _mark_boundary(left, boundary, run.kept_steps)
        else:
            stage, role = ("sft", "stage1") if len(losses[0]) else ("align", "stage2")
            _write_above(left, 1.0, "axes fraction", "", run.kept_steps.get(stage), "right", role)
    return figure


def _mark_kept(axes: Axes, points: tuple[Any, Any], kept: int | None, role: str, offset: int = 0) -> None:
    """Mark the step whose model was kept with a diamond on the curve.

    Args:
        axes: the axes with the curve.
        points: the curve's steps and values.
        kept: the step; None marks nothing.
        role: the curve's colour.
        offset: where on the axis of steps the stage begins.
    """
    if kept is None:
        return
    height = float(np.interp(kept, points[0], _smoothed(points[1])))
    edge = COLOURS["paper"]
    axes.plot([kept + offset], [height], "D", markersize=8, color=COLOURS[role], markeredgecolor=edge, zorder=5)


def _mark_boundary(axes: Axes, boundary: float, kept: Mapping[str, int]) -> None:
    """Draw the line between the stages, with their names and kept steps on either side of its upper end."""
    axes.axvline(boundary, linestyle=(0, (4, 3)), linewidth=1.2, color=COLOURS["muted"])
    _write_above(axes, boundary, "data", "Stage I", kept.get("sft"), "right", "stage1")
    _write_above(axes, boundary, "data", "Stage II", kept.get("align"), "left", "stage2")


def _write_above(
    axes: Axes, x: float, unit: str, name: str, kept: int | None, side: Literal["left", "right"], role: str
) -> None:
    """Write a stage's name and the step that was kept above the axes, beside `x`."""
    lines = [(name, "bold")] if name else []
    if kept is not None:
        lines.append((f"◆ step {kept} kept", "normal"))
    shift = 0 if unit == "axes fraction" else 8 if side == "left" else -8
    for row, (text, weight) in enumerate(reversed(lines)):
        axes.annotate(
            text,
            (x, 1.02),
            xycoords=(unit, "axes fraction"),
            xytext=(shift, 14 * row),
            textcoords="offset points",
            ha=side,
            va="bottom",
            weight=weight,
            color=COLOURS[role],
        )


def _draw_panel(panel: MetricPanel, rows: Sequence[Row]) -> Figure:
    with rc_context(STYLE):
        figure, axes = _empty_panel(panel.unit)
        if panel.baseline is not None:
            axes.axhline(panel.baseline, linewidth=1, color=COLOURS["muted"])
        for key, (label, role) in panel.series.items():
            steps, values = _points(rows, key)
            if len(steps):
                _line(axes, steps, values, role, label)
        if len(panel.series) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1.01), ncols=len(panel.series))
    return figure


def _draw_training_accuracy(rows: Sequence[Row], prefix: str) -> ReportFigure:
    """Draw the share of right candidates over the steps of Stage II."""
    with rc_context(STYLE):
        figure, axes = _empty_panel("right candidates")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _line(axes, *_points(rows, "right"), "policy")
    caption = "Share of sampled candidates that are right by gold, which training never sees."
    return ReportFigure("Accuracy over training", caption, figure_to_svg(figure, f"{prefix}-accuracy"))


def _empty_panel(unit: str) -> tuple[Figure, Axes]:
    """Return an empty small figure over the steps of Stage II."""
    figure = Figure(figsize=(4.2, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("Stage II step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def _draw_score_quality(quality: Row, prefix: str) -> ReportFigure:
    """Draw the share of right candidates by score; on the diagonal, scores are probabilities."""
    bins = quality["bins"]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("self-evaluated score")
        axes.set_ylabel("share right")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.04, 1.04)
        axes.plot([0, 1], [0, 1], linewidth=1, color=COLOURS["muted"])
        scores, shares = [b["score"] for b in bins], [b["right"] for b in bins]
        sizes = [20 + 180 * b["n"] / quality["n"] for b in bins]
        axes.plot(scores, shares, linewidth=1.2, color=COLOURS["policy"])
        axes.scatter(scores, shares, s=sizes, color=COLOURS["policy"])
    return ReportFigure(
        "Scores against gold", describe_score_quality(quality), figure_to_svg(figure, f"{prefix}-scores")
    )


def describe_score_quality(quality: Row) -> str:
    """Describe score quality; the AUC within prompts comes first, because labels compare within a prompt only."""
    parts = []
    if "auc_within" in quality:
        low, high = quality["auc_within_ci"]
        parts.append(
            f"A right candidate outscores a wrong one of the same prompt {100 * quality['auc_within']:.1f}% of the "
            f"time (95% interval {100 * low:.1f} to {100 * high:.1f}; chance is 50)."
        )
    else:
        parts.append("No prompt has both a right and a wrong candidate.")
    if "auc" in quality:
        parts.append(f"AUC over all prompts {quality['auc']:.3f}.")
    candidates = f"{quality['n']:,} candidates, {quality['right']:.0%} right."
    parts.append(
        f"Calibration error {quality['ece']:.3f} over {candidates}" if "ece" in quality else f"Over {candidates}"
    )
    return " ".join(parts)


def _draw_label_divergence(run: RunData, prefix: str) -> list[ReportFigure]:
    """Draw KL(D || q) of the groups measured twice; below the diagonal, q came closer to D. Empty if there are none."""
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
        before, after = zip(*pairs)
        axes.scatter(before, after, s=20, alpha=0.6, linewidths=0, color=COLOURS["policy"])
    caption = describe_label_divergence(run.results["label_divergence"])
    return [ReportFigure("KL(D‖q) before and after", caption, figure_to_svg(figure, prefix))]


def describe_label_divergence(divergence: Row) -> str:
    """Describe how KL(D || q) on the candidates of the first groups changed over Stage II."""
    return (
        f"On the candidates of the first {divergence['groups']} groups the mean was {divergence['before']:.3f} under "
        f"the policy that drew them and is {divergence['after']:.3f} under the final policy; q came closer to D "
        f"(below the line) in {divergence['closer']} of them."
    )


def _colour_axis(axes: Axes, label: str, role: str) -> None:
    axes.set_ylabel(label, color=COLOURS[role])
    axes.tick_params(axis="y", colors=COLOURS[role])


def _line(axes: Axes, steps: Any, values: Any, role: str, label: str | None = None) -> None:
    """Draw the values; if there are many, draw them faintly under their running mean."""
    colour = COLOURS[role]
    if len(values) < _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, _smoothed(values), color=colour, linewidth=1.8, label=label)


def _smoothed(values: Any) -> Any:
    """Return the running mean of many values; few values are returned as they are."""
    return values if len(values) < _SMOOTH_FROM else _running_mean(values, len(values) // _WINDOWS)


def _running_mean(values: Any, half: int) -> Any:
    """Return the mean over `half` neighbours on either side, over fewer at the ends."""
    window = np.ones(2 * half + 1)
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / counts


def _points(rows: Sequence[Row], key: str) -> tuple[Any, Any]:
    """Return the steps and values of one metric where it was logged and is finite."""
    pairs = [(r["step"], r[key]) for r in rows if r.get(key) is not None and np.isfinite(r[key])]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], dtype=float)


def figure_to_svg(figure: Figure, prefix: str) -> str:
    """Return the figure as an SVG element with colours that follow the page, and ids that start with `prefix`."""
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
