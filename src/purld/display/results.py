"""Print results.json on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from purld.config.clients import CAPS
from purld.display.titles import ANSWER_TITLES, METRIC_TITLES, model_title
from purld.runs.files import read_json
from purld.runs.run_dir import RunDir

_UNJUDGED = {
    "no_opponent": "Questions not put to the judge, as the opponent has no answer (left out of the rates)",
    "no_verdict": "Judge replies that were no verdict (left out of the rates, text kept)",
    "no_reply": "Calls to the judge that failed or were lost (left out of the rates)",
    **{cap: f"Questions that evaluate.judge.{cap} left unasked (left out of the rates)" for cap in CAPS},
}


def print_results(run: RunDir, console: Console | None = None) -> None:
    """Print a run's metrics by model with 95% intervals, the differences, the teacher's cost and the report's path."""
    run.check_files(run.results)
    results = read_json(run.results)
    console = console or Console(highlight=False)
    models = results["models"]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("", *(model_title(name) for name in models)):
        table.add_column(heading, no_wrap=True)
    for key, label in METRIC_TITLES.items():
        if any(key in metrics for metrics in models.values()):
            table.add_row(label, *(_cell(metrics, key) for metrics in models.values()))
    if not any(key in metrics for key in METRIC_TITLES for metrics in models.values()):
        for key, label in ANSWER_TITLES.items():
            table.add_row(label, *(_plain_cell(metrics, key) for metrics in models.values()))
    console.print()
    console.print(table)
    console.print()
    n = max(metrics["n"] for metrics in models.values())
    lines = [
        f"On {n} held-out prompts, with 95% intervals.",
        *_differences(results),
        *describe_self_comparison(results),
        *describe_unjudged(models),
        *_score_quality(results),
    ]
    for line in [*lines, _teacher_spend(results["teacher"]), f"Report: {run.report}"]:
        console.print(line, soft_wrap=True, markup=False)


def format_signed_difference(difference: Mapping[str, Any], key: str) -> str:
    """Return one metric of a difference with its interval, all numbers with their sign."""
    low, high = difference[f"{key}_ci"]
    return f"{difference[key]:+.3f} [{low:+.3f}, {high:+.3f}]"


def describe_self_comparison(results: Mapping[str, Any]) -> list[str]:
    """Describe in sentences how the models compare by p_sft's own scores; empty if they were not compared so."""
    compared = results.get("self_comparison")
    if not compared:
        return []
    lines = [
        f"No gold and no judge: compared by p_sft's own {compared['scorer']} score of {compared['n']} answers to "
        f"{compared['anchors']}, given the teacher's answers. That is the student's opinion, no proof."
    ]
    for pair, values in compared["pairs"].items():
        after, before = (model_title(name) for name in pair.split(" - "))
        low, high = values["preferred_ci"]
        lines.append(f"  {after} scores above {before} on {values['preferred']:.0%} [{low:.0%}, {high:.0%}] of them.")
    if verdict := results.get("probe", {}).get("verdict"):
        lines.append(f"  What that score is worth: {verdict}")
    return lines


def _plain_cell(metrics: Mapping[str, Any], key: str) -> str:
    return f"{metrics[key]:.4g}" if key in metrics else "-"


def _cell(metrics: dict[str, Any], key: str) -> str:
    if key not in metrics:
        return "-"
    low, high = metrics[f"{key}_ci"]
    return f"{metrics[key]:.3f} [{low:.2f}, {high:.2f}]"


def _differences(results: dict[str, Any]) -> list[str]:
    lines = []
    for pair, difference in results.get("difference", {}).items():
        ours, theirs = (model_title(name) for name in pair.split(" - "))
        parts = [
            f"{label} {format_signed_difference(difference, key)}"
            for key, label in METRIC_TITLES.items()
            if key in difference
        ]
        lines.append(f"{ours} minus {theirs}: {', '.join(parts)}.")
    return lines


def describe_unjudged(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say for each reason how many questions to the judge have no verdict, by model; only a reply can be its fault."""
    lines = []
    for reason, what in _UNJUDGED.items():
        counts = [
            f"{model_title(name)} {count}" for name, metrics in models.items() if (count := _count(metrics, reason))
        ]
        if counts:
            lines.append(f"{what}: {', '.join(counts)}.")
    return lines


def _count(metrics: Mapping[str, Any], reason: str) -> int:
    """Return how many questions have no verdict for a reason; of results of older versions, none is known."""
    unknown = {"no_verdict": metrics.get("unjudged", 0)}
    return int(metrics.get("unjudged_reasons", unknown).get(reason, 0))


def _score_quality(results: dict[str, Any]) -> list[str]:
    quality = results.get("score_quality", {})
    if "auc_within" not in quality:
        return []
    low, high = quality["auc_within_ci"]
    return [f"Self-evaluation against gold: AUC within prompts {quality['auc_within']:.3f} [{low:.2f}, {high:.2f}]."]


def _teacher_spend(teacher: dict[str, Any]) -> str:
    spent = f", cost {teacher['cost']:.4f}" if teacher.get("cost") else ""
    tokens = teacher["input_tokens"] + teacher["output_tokens"]
    return (
        f"Teacher: {teacher['calls']} calls for {teacher['prompts']} prompts, "
        f"{teacher['answered']} usable answers, {tokens} tokens{spent}."
    )
