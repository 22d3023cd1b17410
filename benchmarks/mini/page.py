"""Write docs/miniature.md: the tables between its named markers, and the figures next to it.

Prose around the markers is written by hand and never touched. A table shows the finished cells; unfinished ones are
missing from it and counted at the end of the page.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mini import plan
from mini.cells import VARIANTS, Cell, format_settings, row_title, stage_two_cell
from mini.plan import CellOfSeed
from mini.results import FIGURES, NON_ANCHOR, Comparison, Results, best_on_validation, list_comparisons
from mini.stats import LEVEL, Mean, adjust_by_holm
from purld.errors import UserError
from purld.runs.files import atomic_write, write_json, write_rows
from purld.testbed.world.world import Task

TABLE_ONE_METHODS = ("sft", "sft_sft", "singlepair_dpo", "anchor_grpo", "self_ppo", "anchorrank_dpo", "ldl_grpo")
"""The methods of Table 1 in the paper's order."""
ALL_ROWS = (*TABLE_ONE_METHODS, *VARIANTS, "teacher_judge_grpo")
"""The rows of the table here."""

_BASELINES = tuple(method for method in TABLE_ONE_METHODS if method != "ldl_grpo")


def write_page(rows: Mapping[str, Mapping[str, Any]], docs: Path, chosen: Path | None = None) -> None:
    """Put the tables into docs/miniature.md and draw the figures next to it.

    Args:
        rows: finished cells by id.
        docs: the folder of the page.
        chosen: where to write the settings that the tuning chose.

    Raises:
        UserError: the page is missing, or lacks a marker.
    """
    from mini.figures import draw_figures

    path = docs / "miniature.md"
    if not path.exists():
        raise UserError(f"{path}: no such page; set --docs to the folder that holds it.")
    results = Results(rows)
    text = path.read_text(encoding="utf-8")
    for name, make in PARTS.items():
        text = replace_part(text, name, make(results), str(path))
    with atomic_write(path) as handle:
        handle.write(text)
    draw_figures(results, docs)
    write_rows(docs / "miniature.jsonl", summary_rows(results))
    if chosen and results.chosen:
        write_json(chosen, results.chosen)


def summary_rows(results: Results) -> list[dict[str, Any]]:
    """Return the figures of every finished cell of the plan, without its problems and curves."""
    summary = []
    for cells in cells_by_suite(results).values():
        for cell in cells:
            if cell in results:
                names = [name for name in FIGURES if name != "greedy" or cell.split == "test"]
                figures = {name: round(results.figure(cell, name), 5) for name in names}
                score = results.row(cell).get("score")
                summary.append(asdict(cell) | {"settings": dict(cell.settings)} | figures | {"score_quality": score})
    return summary


def quick_table(rows: Mapping[str, Mapping[str, Any]], cells: Sequence[Cell]) -> str:
    """Return one seed's figures, with the interval over its problems."""
    results = Results(rows)
    headers = ["task", "method", "Raw", "LC", "accuracy", "Raw − SFT", "teacher calls", "seconds"]
    lines = []
    for cell in cells:
        if cell not in results:
            continue
        raw, lc, right, calls, seconds = (
            results.figure(cell, name) for name in ("raw", "lc", "accuracy", "calls", "seconds")
        )
        line = [cell.task, row_title(cell.method), f"{raw:.3f}", f"{lc:.3f}", f"{right:.3f}", ""]
        if cell.method != "sft" and cell.stage_one in results:
            mean, (low, high) = results.within_seed(cell, cell.stage_one, "raw")
            line[-1] = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([*line, f"{calls:,.0f}", f"{seconds:.0f}"])
    return markdown_table(headers, lines)


def replace_part(text: str, name: str, content: str, source: str) -> str:
    """Return the page with other content between the markers of a part.

    Raises:
        UserError: the markers do not occur exactly once.
    """
    opening, closing = f"<!-- {name}: made by benchmarks/miniature.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise UserError(f"{source}: needs the markers {opening!r} and {closing!r} once.")
    return pattern.sub(lambda _: f"{opening}\n{content}\n{closing}", text)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_mean(mean: Mean | None) -> str:
    """Format a figure with its interval over seeds."""
    if mean is None:
        return ""
    interval = "" if mean.low is None else f" [{mean.low:.3f}, {mean.high:.3f}]"
    return f"{mean.mean:.3f}{interval}"


def format_difference(mean: Mean | None, seeds: bool = False) -> str:
    """Format a difference with its interval over seeds, and on how many seeds it is above 0."""
    if mean is None:
        return ""
    interval = "" if mean.low is None else f" [{mean.low:+.3f}, {mean.high:+.3f}]"
    count = f" ({mean.above}/{mean.n})" if seeds else ""
    return f"{mean.mean:+.3f}{interval}{count}"


# --- parts ----------------------------------------------------------------------------------------------------


def grid_table(results: Results) -> str:
    """Return every setting that was tried, with its validation win rate and accuracy; the chosen ones are bold."""
    start = ["SFT", "as in [results](results.md)"]
    start += [_on_validation(results, Cell(task, plan.TUNING_SEED, "validation", "sft")) for task in plan.TASKS]
    rows = [start]
    for method in plan.TUNED:
        for rate in sorted({*plan.RATES, *plan.RATES_BEYOND}):
            setting = {"learning_rate": rate}
            shown = []
            for task in plan.TASKS:
                text = _on_validation(results, stage_two_cell(task, plan.TUNING_SEED, "validation", method, setting))
                best = results.chosen is not None and results.chosen[task][method] == setting
                shown.append(f"**{text}**" if best else text)
            if any(shown) or rate in plan.RATES:
                beyond = "" if rate in plan.RATES else ", beyond the grid"
                rows.append([row_title(method), f"{format_settings(setting)}{beyond}", *shown])
    return markdown_table(["method", "setting", *plan.TASKS], rows)


def _on_validation(results: Results, cell: Cell) -> str:
    """Format Raw and accuracy of a finished cell; empty for others."""
    return f"{results.figure(cell, 'raw'):.3f} / {results.figure(cell, 'accuracy'):.3f}" if cell in results else ""


def table_one(results: Results) -> str:
    """Return Table 1: raw and length-controlled win rates, and figures that the paper has no column for."""
    return _per_task(results, ALL_ROWS)


def table_two(results: Results) -> str:
    """Return Table 2: SFT, Anchor-GRPO and LDL-GRPO."""
    headers = ["task", *(f"{row_title(m)} {n}" for m in ("sft", "anchor_grpo", "ldl_grpo") for n in ("Raw", "LC"))]
    rows = []
    for task in plan.TASKS:
        cells: list[str] = [task]
        for method in ("sft", "anchor_grpo", "ldl_grpo"):
            experiment = _experiment(results, task, method)
            cells += [format_mean(experiment and results.mean(experiment, name)) for name in ("raw", "lc")]
        rows.append(cells)
    return markdown_table(headers, rows)


def _experiment(results: Results, task: Task, method: str) -> CellOfSeed | None:
    """Return a method as in the tables; None if its setting is not chosen yet."""
    return results.of_method(task, method) if results.chosen is not None or method == "sft" else None


def _per_task(results: Results, methods: Sequence[str]) -> str:
    """Return one table per task with a row per method; the best method is bold."""
    parts = []
    for task in plan.TASKS:
        rows, best = [], _best(results, task, methods)
        for method in methods:
            experiment = _experiment(results, task, method)
            seeds = results.seeds(experiment) if experiment else []
            if experiment is None or not seeds:
                continue
            cells = [f"**{row_title(method)}**" if method == best else row_title(method)]
            cells += [format_mean(results.mean(experiment, name)) for name in ("raw", "lc", "accuracy", "raw_if_right")]
            cells += [f"{_mean(results, experiment, 'greedy'):.3f}", f"{_mean(results, experiment, 'length'):.0f}"]
            cells.append(_mean_of_last_steps(results, experiment, "kl", plan.SEEDS))
            cells += [
                f"{_mean(results, experiment, 'calls'):,.0f}",
                f"{_mean(results, experiment, 'seconds'):.0f}",
                str(len(seeds)),
            ]
            rows.append(cells)
        headers = [
            task,
            "Raw ↑",
            "LC ↑",
            "accuracy",
            "Raw if right",
            "greedy",
            "characters",
            "KL from p_sft",
            "teacher calls in all",
            "seconds of the stage",
            "seeds",
        ]
        parts.append(markdown_table(headers, rows))
    return "\n\n".join(parts)


def _mean(results: Results, experiment: CellOfSeed, name: str) -> float:
    mean = results.mean(experiment, name)
    assert mean is not None
    return mean.mean


def _best(results: Results, task: Task, methods: Sequence[str]) -> str | None:
    rates = {}
    for method in methods:
        experiment = _experiment(results, task, method)
        if experiment and (mean := results.mean(experiment, "raw")):
            rates[method] = mean.mean
    return max(rates, key=lambda m: rates[m]) if rates else None


def difference_table(results: Results) -> str:
    """Compare every method with SFT and with the best baseline."""
    if results.chosen is None:
        return "The settings are not chosen yet."
    best = best_on_validation(results, _BASELINES)
    parts = []
    for task in plan.TASKS:
        rows = []
        rival = results.of_method(task, best[task])
        for method in ALL_ROWS[1:]:
            experiment, sft = results.of_method(task, method), results.of_method(task, "sft")
            cells = [row_title(method)]
            cells += [
                format_difference(results.difference(experiment, sft, name), seeds=True)
                for name in ("raw", "lc", "accuracy")
            ]
            cells.append(
                ""
                if method == best[task]
                else format_difference(results.difference(experiment, rival, "raw"), seeds=True)
            )
            rows.append(cells)
        headers = [
            task,
            "Raw − SFT",
            "LC − SFT",
            "accuracy − SFT",
            f"Raw − {row_title(best[task])}, the best baseline",
        ]
        parts.append(markdown_table(headers, rows))
    return "\n\n".join(parts)


def accuracy_table(results: Results) -> str:
    """Compare every method with SFT at the rate that had the most right answers to validation problems."""
    if results.chosen_by_accuracy is None:
        return "The settings are not chosen yet."
    parts = []
    for task in plan.TASKS:
        rows, sft = [], results.of_method(task, "sft")
        for method in (m for m in ALL_ROWS if m in plan.TUNED):
            setting = results.chosen_by_accuracy[task][method]
            experiment = results.of_method(task, method, settings=setting)
            if not results.seeds(experiment):
                continue
            gains = [results.difference(experiment, sft, name) for name in ("accuracy", "raw")]
            rows.append(
                [
                    row_title(method),
                    format_settings(setting),
                    format_mean(results.mean(experiment, "accuracy")),
                    *(format_difference(gain, seeds=True) for gain in gains),
                    _mean_of_last_steps(results, experiment, "kl", plan.SEEDS),
                    str(len(results.seeds(experiment))),
                ]
            )
        headers = [task, "setting", "accuracy", "accuracy − SFT", "Raw − SFT", "KL from p_sft", "seeds"]
        parts.append(markdown_table(headers, rows))
    return "\n\n".join(parts)


def seed_table(results: Results) -> str:
    """Compare LDL-GRPO with SFT and Anchor-GRPO on each seed, with intervals over its problems."""
    if results.chosen is None:
        return "The settings are not chosen yet."
    rows = []
    for task in plan.TASKS:
        ldl, sft, grpo = (results.of_method(task, m) for m in ("ldl_grpo", "sft", "anchor_grpo"))
        for seed in results.seeds(ldl, sft, grpo):
            cells = [task, str(seed)]
            for rival in (sft, grpo):
                for name in ("raw", "accuracy"):
                    mean, (low, high) = results.within_seed(ldl(seed), rival(seed), name)
                    cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            rows.append(cells)
    return markdown_table(
        ["task", "seed", "Raw − SFT", "accuracy − SFT", "Raw − Anchor-GRPO", "accuracy − Anchor-GRPO"], rows
    )


def finding_table(results: Results) -> str:
    """Return every claim of the paper that one method beats another, with its verdict by rule."""
    if results.chosen is None:
        return "The settings are not chosen yet."
    claims = list_comparisons(best_on_validation(results, _BASELINES), best_on_validation(results, NON_ANCHOR))
    tested = {claim.test: mean for claim in claims if (mean := _tested(results, claim))}
    p_values = {test: mean.p for test, mean in tested.items() if mean.p is not None}
    adjusted = adjust_by_holm(p_values, len({claim.test for claim in claims}))
    rows = [_finding(claim, tested[claim.test], adjusted.get(claim.test)) for claim in claims if claim.test in tested]
    return markdown_table(["finding", "task", "claim", "difference over seeds", "p", "Holm's p", "verdict"], rows)


def _tested(results: Results, claim: Comparison) -> Mean | None:
    a, b = (results.of_method(claim.task, method) for method in (claim.a, claim.b))
    return results.difference(a, b, claim.name)


def _finding(claim: Comparison, mean: Mean, adjusted: float | None) -> list[str]:
    claim_text = f"{row_title(claim.a)} > {row_title(claim.b)}, {'LC' if claim.name == 'lc' else 'Raw'}"
    p = "" if mean.p is None else f"{mean.p:.3f}"
    corrected = "" if adjusted is None else f"{adjusted:.3f}"
    return [
        claim.finding,
        claim.task,
        claim_text,
        format_difference(mean, seeds=True),
        p,
        corrected,
        claim_verdict(mean, adjusted),
    ]


def claim_verdict(mean: Mean, adjusted: float | None) -> str:
    """Return a verdict by the interval over seeds: reproduced if above 0, reversed if below, else not reproduced.

    "alone" marks a verdict that does not hold for all claims of the table together.
    """
    if mean.low is None or mean.high is None or adjusted is None:
        return "one seed"
    if mean.low <= 0 <= mean.high:
        return "not reproduced"
    word = "reproduced" if mean.low > 0 else "reversed"
    return word if adjusted < 1 - LEVEL else f"{word}, alone"


def noise_table(results: Results) -> str:
    """Compare LDL-GRPO and Anchor-GRPO by how noisy the scores are."""
    if results.chosen is None:
        return "The settings are not chosen yet."
    rows = []
    for task in plan.TASKS:
        sft = results.of_method(task, "sft")
        for deviation in (0.0, *plan.NOISE):
            ldl, grpo = (results.noisy(task, method, deviation) for method in ("ldl_grpo", "anchor_grpo"))
            seeds = results.seeds(ldl, grpo, sft, among=plan.FEW_SEEDS)
            if not seeds:
                continue
            aucs = [results.row(ldl(seed))["score"]["auc_within"] for seed in seeds]
            cells = [task, f"{deviation:g}", f"{sum(aucs) / len(aucs):.3f}"]
            for name in ("raw", "accuracy"):
                cells += [
                    format_difference(results.difference(experiment, sft, name, among=seeds))
                    for experiment in (ldl, grpo)
                ]
                cells.append(format_difference(results.difference(ldl, grpo, name, among=seeds), seeds=True))
            held_back = results.noisy(task, "anchor_grpo", deviation, **plan.HELD_SETTINGS)
            rows.append([*cells, format_difference(results.difference(held_back, sft, "accuracy", among=seeds))])
    headers = ["task", "noise", "AUC (LDL-GRPO's)"]
    for name in ("Raw", "accuracy"):
        headers += [f"LDL-GRPO − SFT, {name}", f"Anchor-GRPO − SFT, {name}", f"LDL-GRPO − Anchor-GRPO, {name}"]
    return markdown_table([*headers, f"Anchor-GRPO with {format_settings(plan.HELD_SETTINGS)} − SFT, accuracy"], rows)


FORM_FIGURES = ("raw", "lc", "accuracy", "greedy")


def form_table(results: Results) -> str:
    """Compare the three forms of q."""
    if results.chosen is None:
        return "The settings are not chosen yet."
    rows = []
    for task in plan.TASKS:
        sft = results.of_method(task, "sft")
        for q in ("likelihood", "mean", "ratio"):
            experiment = results.of_method(task, "ldl_grpo", settings={"q": q})
            if not results.seeds(experiment, among=plan.FEW_SEEDS):
                continue
            cells = [
                task,
                q,
                *(
                    format_difference(results.difference(experiment, sft, name, among=plan.FEW_SEEDS))
                    for name in FORM_FIGURES
                ),
            ]
            cells += [
                _mean_of_last_steps(results, experiment, key, plan.FEW_SEEDS)
                for key in ("length", "length_correlation", "sharper_than_labels", "kl")
            ]
            rows.append(cells)
    headers = ["task", "q", "Raw − SFT", "LC − SFT", "accuracy − SFT", "greedy − SFT"]
    return markdown_table([*headers, "tokens", "corr(q, length)", "sharper than D", "KL from p_sft"], rows)


def _mean_of_last_steps(
    results: Results, experiment: CellOfSeed, key: str, among: Sequence[int], steps: int = 10
) -> str:
    """Return the mean of a logged value over the last steps and some seeds; empty if it was not logged."""
    seeds = results.seeds(experiment, among=among)
    values = [row[key] for seed in seeds for row in results.row(experiment(seed))["curve"][-steps:] if key in row]
    return f"{sum(values) / len(values):.2f}" if values else ""


def sweep_table(results: Results) -> str:
    """Vary one key at a time."""
    if results.chosen is None:
        return "The settings are not chosen yet."
    rows = []
    for task in plan.TASKS:
        tables_cell = results.of_method(task, "ldl_grpo")(0)
        for point in plan.sweep_points(results.chosen[task], task):
            seeds = results.seeds(point.cell, point.start, among=plan.SWEEP_SEEDS)
            if not seeds:
                continue
            label = f"{point.label} (the tables')" if point.cell(0) == tables_cell else point.label
            gains = [results.difference(point.cell, point.start, name, among=seeds) for name in ("raw", "accuracy")]
            rows.append([task, label, *(format_each_seed(mean) for mean in gains)])
    return markdown_table(["task", "setting", "Raw − SFT", "accuracy − SFT"], rows)


def format_each_seed(mean: Mean | None) -> str:
    """Format a difference with its value on every seed, for too few seeds to have an interval."""
    return "" if mean is None else f"{mean.mean:+.3f} ({', '.join(f'{value:+.3f}' for value in mean.values)})"


def account_table(results: Results) -> str:
    """Return how many cells are done and left, and the time they took."""
    rows, left = [], 0
    for name, cells in cells_by_suite(results).items():
        done = [cell for cell in cells if cell in results]
        seconds = sum(results.row(c)["seconds"] + results.row(c)["measured"]["seconds"] for c in done)
        left += len(cells) - len(done)
        rows.append([name, str(len(cells)), str(len(done)), f"{seconds / 60:.0f}"])
    later = "" if results.chosen is not None else ", and then those of the tables"
    closing = f"{left} cells are not run; `make miniature` runs them{later}." if left else "Everything is run."
    return markdown_table(["what", "cells", "done", "minutes of one core"], rows) + f"\n\n{closing}"


def cells_by_suite(results: Results) -> dict[str, list[Cell]]:
    """Return the cells by purpose; each is counted where it comes first."""
    suites: dict[str, list[Cell]] = {"tuning": plan.tuning_cells()}
    if results.chosen is not None:
        suites["Tables 1 and 2"] = plan.main_cells(results.chosen)
        assert results.chosen_by_accuracy is not None  # both choices need the same cells
        suites["rates chosen by accuracy"] = plan.accuracy_cells(results.chosen_by_accuracy)
        suites["noise"] = plan.noise_cells()
        suites["forms of q"] = plan.form_cells(results.chosen)
        suites["beyond the grid"] = plan.edge_cells(results.chosen)
        suites["sensitivity"] = plan.sweep_cells(results.chosen)
    seen: set[Cell] = set()
    for name, cells in suites.items():
        suites[name] = [cell for cell in dict.fromkeys(cells) if cell not in seen]
        seen.update(suites[name])
    return suites


PARTS: Mapping[str, Callable[[Results], str]] = {
    "grids": grid_table,
    "table 1": table_one,
    "differences": difference_table,
    "by accuracy": accuracy_table,
    "by seed": seed_table,
    "table 2": table_two,
    "findings": finding_table,
    "noise": noise_table,
    "forms": form_table,
    "sensitivity": sweep_table,
    "account": account_table,
}
