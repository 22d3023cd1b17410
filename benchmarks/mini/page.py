"""docs/miniature.md: the parts of it that are made of rows, between markers that name them.

Prose is written by hand around the markers and never touched. A table shows what is done; what is not done yet is
missing from it and counted at the end of the page.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mini import plan
from mini.cells import Cell, named, stage_two
from mini.plan import OfSeed
from mini.results import FIGURES, NON_ANCHOR, Comparison, Results, best_on_validation, comparisons
from mini.stats import LEVEL, Mean, holm
from purld.display.titles import model_title
from purld.errors import UserError
from purld.runs.files import atomic_write, write_json, write_rows

SHOWN = ("sft", "sft_sft", "singlepair_dpo", "anchor_grpo", "self_ppo", "anchorrank_dpo", "ldl_grpo")
"""The rows of Table 1 in the paper's order."""

_BASELINES = tuple(method for method in SHOWN if method != "ldl_grpo")


def write_page(rows: Mapping[str, Mapping[str, Any]], docs: Path, chosen: Path | None = None) -> None:
    """Put the tables into docs/miniature.md and draw the figures beside it.

    Args:
        rows: finished cells by id.
        docs: the folder of the page.
        chosen: where to write the settings that the tuning chose.

    Raises:
        UserError: the page is not there, or lacks a marker.
    """
    from mini.figures import draw_figures

    path = docs / "miniature.md"
    if not path.exists():
        raise UserError(f"{path}: no such page; --docs names the folder that holds it.")
    results = Results(rows)
    text = path.read_text(encoding="utf-8")
    for name, make in PARTS.items():
        text = replaced(text, name, make(results), str(path))
    with atomic_write(path) as handle:
        handle.write(text)
    draw_figures(results, docs)
    write_rows(docs / "miniature.jsonl", brief(results))
    if chosen and results.chosen:
        write_json(chosen, results.chosen)


def brief(results: Results) -> list[dict[str, Any]]:
    """What was measured of every finished cell of the plan, without its problems and curves."""
    found = []
    for cells in suites(results).values():
        for cell in cells:
            if cell in results:
                names = [name for name in FIGURES if name != "greedy" or cell.split == "test"]
                figures = {name: round(results.figure(cell, name), 5) for name in names}
                score = results.row(cell).get("score")
                found.append(asdict(cell) | {"settings": dict(cell.settings)} | figures | {"score_quality": score})
    return found


def quick_table(rows: Mapping[str, Mapping[str, Any]], cells: Sequence[Cell]) -> str:
    """One seed's figures, with the interval over its problems."""
    results = Results(rows)
    heads = ["task", "method", "Raw", "LC", "accuracy", "Raw − SFT", "teacher calls", "seconds"]
    lines = []
    for cell in cells:
        if cell not in results:
            continue
        raw, lc, right, calls, seconds = (
            results.figure(cell, name) for name in ("raw", "lc", "accuracy", "calls", "seconds")
        )
        line = [cell.task, model_title(cell.method), f"{raw:.3f}", f"{lc:.3f}", f"{right:.3f}", ""]
        if cell.method != "sft" and cell.stage_one in results:
            mean, (low, high) = results.within_seed(cell, cell.stage_one, "raw")
            line[-1] = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([*line, f"{calls:,.0f}", f"{seconds:.0f}"])
    return table(heads, lines)


def replaced(text: str, name: str, content: str, source: str) -> str:
    """The page with another content between the markers of a part.

    Raises:
        UserError: the markers are not there exactly once.
    """
    opening, closing = f"<!-- {name}: made by benchmarks/miniature.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise UserError(f"{source}: needs the markers {opening!r} and {closing!r} once.")
    return pattern.sub(lambda _: f"{opening}\n{content}\n{closing}", text)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def level(mean: Mean | None) -> str:
    """A figure with its interval over seeds."""
    if mean is None:
        return ""
    interval = "" if mean.low is None else f" [{mean.low:.3f}, {mean.high:.3f}]"
    return f"{mean.mean:.3f}{interval}"


def signed(mean: Mean | None, seeds: bool = False) -> str:
    """A difference with its interval over seeds, and on how many seeds it is above 0."""
    if mean is None:
        return ""
    interval = "" if mean.low is None else f" [{mean.low:+.3f}, {mean.high:+.3f}]"
    count = f" ({mean.above}/{mean.n})" if seeds else ""
    return f"{mean.mean:+.3f}{interval}{count}"


# --- parts ----------------------------------------------------------------------------------------------------


def grids(results: Results) -> str:
    """Every setting that was tried, with its validation win rate and accuracy; the chosen ones are bold."""
    start = ["SFT", "as in [results](results.md)"]
    start += [_on_validation(results, Cell(task, plan.TUNING_SEED, "validation", "sft")) for task in plan.TASKS]
    rows = [start]
    for method in plan.TUNED:
        for rate in sorted({*plan.RATES, *plan.BEYOND}):
            setting = {"learning_rate": rate}
            shown = []
            for task in plan.TASKS:
                text = _on_validation(results, stage_two(task, plan.TUNING_SEED, "validation", method, setting))
                best = results.chosen is not None and results.chosen[task][method] == setting
                shown.append(f"**{text}**" if best else text)
            if any(shown) or rate in plan.RATES:
                beyond = "" if rate in plan.RATES else ", beyond the grid"
                rows.append([model_title(method), f"{named(setting)}{beyond}", *shown])
    return table(["method", "setting", *plan.TASKS], rows)


def _on_validation(results: Results, cell: Cell) -> str:
    """Raw and accuracy of a cell that is done."""
    return f"{results.figure(cell, 'raw'):.3f} / {results.figure(cell, 'accuracy'):.3f}" if cell in results else ""


def table_one(results: Results) -> str:
    """Table 1: raw and length-controlled win rates, and what the paper has no column for."""
    return _per_task(results, [*SHOWN, "teacher_judge_grpo"])


def table_two(results: Results) -> str:
    """Table 2: SFT, Anchor-GRPO and LDL-GRPO."""
    heads = ["task", *(f"{model_title(m)} {n}" for m in ("sft", "anchor_grpo", "ldl_grpo") for n in ("Raw", "LC"))]
    rows = []
    for task in plan.TASKS:
        cells = [task]
        for method in ("sft", "anchor_grpo", "ldl_grpo"):
            of = _method(results, task, method)
            cells += [level(of and results.mean(of, name)) for name in ("raw", "lc")]
        rows.append(cells)
    return table(heads, rows)


def _method(results: Results, task: str, method: str) -> OfSeed | None:
    return results.of_method(task, method) if results.chosen is not None or method == "sft" else None


def _per_task(results: Results, methods: Sequence[str]) -> str:
    parts = []
    for task in plan.TASKS:
        rows, best = [], _best(results, task, methods)
        for method in methods:
            of = _method(results, task, method)
            seeds = results.seeds(of) if of else []
            if of is None or not seeds:
                continue
            cells = [f"**{model_title(method)}**" if method == best else model_title(method)]
            cells += [level(results.mean(of, name)) for name in ("raw", "lc", "accuracy", "raw_if_right")]
            cells += [f"{_mean(results, of, 'greedy'):.3f}", f"{_mean(results, of, 'length'):.0f}"]
            cells.append(_last(results, of, "kl", plan.SEEDS))
            cells += [f"{_mean(results, of, 'calls'):,.0f}", f"{_mean(results, of, 'seconds'):.0f}", str(len(seeds))]
            rows.append(cells)
        heads = [
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
        parts.append(table(heads, rows))
    return "\n\n".join(parts)


def _mean(results: Results, of: OfSeed, name: str) -> float:
    found = results.mean(of, name)
    assert found is not None
    return found.mean


def _best(results: Results, task: str, methods: Sequence[str]) -> str | None:
    rates = {}
    for method in methods:
        of = _method(results, task, method)
        if of and (found := results.mean(of, "raw")):
            rates[method] = found.mean
    return max(rates, key=lambda m: rates[m]) if rates else None


def differences(results: Results) -> str:
    """Every method against SFT and against the best baseline."""
    if results.chosen is None:
        return "The settings are not chosen yet."
    best = best_on_validation(results, _BASELINES)
    parts = []
    for task in plan.TASKS:
        rows = []
        rival = results.of_method(task, best[task])
        for method in [*SHOWN[1:], "teacher_judge_grpo"]:
            of, sft = results.of_method(task, method), results.of_method(task, "sft")
            cells = [model_title(method)]
            cells += [signed(results.difference(of, sft, name), seeds=True) for name in ("raw", "lc", "accuracy")]
            cells.append("" if method == best[task] else signed(results.difference(of, rival, "raw"), seeds=True))
            rows.append(cells)
        heads = [task, "Raw − SFT", "LC − SFT", "accuracy − SFT", f"Raw − {model_title(best[task])}, the best baseline"]
        parts.append(table(heads, rows))
    return "\n\n".join(parts)


def by_seed(results: Results) -> str:
    """LDL-GRPO against SFT and Anchor-GRPO on each seed, with intervals over its problems."""
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
    return table(["task", "seed", "Raw − SFT", "accuracy − SFT", "Raw − Anchor-GRPO", "accuracy − Anchor-GRPO"], rows)


def findings(results: Results) -> str:
    """Every claim of the paper that one method beats another, with its verdict by rule."""
    if results.chosen is None:
        return "The settings are not chosen yet."
    claims = comparisons(best_on_validation(results, _BASELINES), best_on_validation(results, NON_ANCHOR))
    tested = {claim.test: found for claim in claims if (found := _tested(results, claim))}
    p_values = {test: found.p for test, found in tested.items() if found.p is not None}
    adjusted = holm(p_values, len({claim.test for claim in claims}))
    rows = [_finding(claim, tested[claim.test], adjusted.get(claim.test)) for claim in claims if claim.test in tested]
    return table(["finding", "task", "claim", "difference over seeds", "p", "Holm's p", "verdict"], rows)


def _tested(results: Results, claim: Comparison) -> Mean | None:
    a, b = (results.of_method(claim.task, method) for method in (claim.a, claim.b))
    return results.difference(a, b, claim.name)


def _finding(claim: Comparison, found: Mean, adjusted: float | None) -> list[str]:
    what = f"{model_title(claim.a)} > {model_title(claim.b)}, {'LC' if claim.name == 'lc' else 'Raw'}"
    p = "" if found.p is None else f"{found.p:.3f}"
    corrected = "" if adjusted is None else f"{adjusted:.3f}"
    return [claim.finding, claim.task, what, signed(found, seeds=True), p, corrected, verdict(found, adjusted)]


def verdict(found: Mean, adjusted: float | None) -> str:
    """By the interval over seeds: above 0 the claim is reproduced, below it is reversed, else it is not reproduced.

    Alone: a verdict that does not hold for all claims of the table together.
    """
    if found.low is None or found.high is None or adjusted is None:
        return "one seed"
    if found.low <= 0 <= found.high:
        return "not reproduced"
    word = "reproduced" if found.low > 0 else "reversed"
    return word if adjusted < 1 - LEVEL else f"{word}, alone"


def noise(results: Results) -> str:
    """LDL-GRPO and Anchor-GRPO by how noisy the scores are."""
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
                cells += [signed(results.difference(of, sft, name, among=seeds)) for of in (ldl, grpo)]
                cells.append(signed(results.difference(ldl, grpo, name, among=seeds), seeds=True))
            held = results.noisy(task, "anchor_grpo", deviation, **plan.HELD)
            rows.append([*cells, signed(results.difference(held, sft, "accuracy", among=seeds))])
    heads = ["task", "noise", "AUC (LDL-GRPO's)"]
    for name in ("Raw", "accuracy"):
        heads += [f"LDL-GRPO − SFT, {name}", f"Anchor-GRPO − SFT, {name}", f"LDL-GRPO − Anchor-GRPO, {name}"]
    return table([*heads, f"Anchor-GRPO with {named(plan.HELD)} − SFT, accuracy"], rows)


FORM_FIGURES = ("raw", "lc", "accuracy", "greedy")


def forms(results: Results) -> str:
    """The three forms of q."""
    if results.chosen is None:
        return "The settings are not chosen yet."
    rows = []
    for task in plan.TASKS:
        sft = results.of_method(task, "sft")
        for q in ("likelihood", "mean", "ratio"):
            of = results.of_method(task, "ldl_grpo", settings={"q": q})
            if not results.seeds(of, among=plan.FEW_SEEDS):
                continue
            cells = [
                task,
                q,
                *(signed(results.difference(of, sft, name, among=plan.FEW_SEEDS)) for name in FORM_FIGURES),
            ]
            cells += [
                _last(results, of, key, plan.FEW_SEEDS)
                for key in ("length", "length_correlation", "sharper_than_labels", "kl")
            ]
            rows.append(cells)
    heads = ["task", "q", "Raw − SFT", "LC − SFT", "accuracy − SFT", "greedy − SFT"]
    return table([*heads, "tokens", "corr(q, length)", "sharper than D", "KL from p_sft"], rows)


def _last(results: Results, of: OfSeed, key: str, among: Sequence[int], steps: int = 10) -> str:
    """The mean of a logged value over the last steps and some seeds; empty if it was not logged."""
    seeds = results.seeds(of, among=among)
    values = [row[key] for seed in seeds for row in results.row(of(seed))["curve"][-steps:] if key in row]
    return f"{sum(values) / len(values):.2f}" if values else ""


def sweeps(results: Results) -> str:
    """One key at a time."""
    if results.chosen is None:
        return "The settings are not chosen yet."
    rows = []
    for task in plan.TASKS:
        own = results.of_method(task, "ldl_grpo")(0)
        for point in plan.points(results.chosen[task], task):
            seeds = results.seeds(point.cell, point.start, among=plan.SWEEP_SEEDS)
            if not seeds:
                continue
            label = f"{point.label} (the tables')" if point.cell(0) == own else point.label
            found = [results.difference(point.cell, point.start, name, among=seeds) for name in ("raw", "accuracy")]
            rows.append([task, label, *(each(mean) for mean in found)])
    return table(["task", "setting", "Raw − SFT", "accuracy − SFT"], rows)


def each(mean: Mean | None) -> str:
    """A difference with its value on every seed: what may be shown of two."""
    return "" if mean is None else f"{mean.mean:+.3f} ({', '.join(f'{value:+.3f}' for value in mean.values)})"


def account(results: Results) -> str:
    """What was run and what was not, and what it took."""
    rows, left = [], 0
    for name, cells in suites(results).items():
        done = [cell for cell in cells if cell in results]
        seconds = sum(results.row(c)["seconds"] + results.row(c)["measured"]["seconds"] for c in done)
        left += len(cells) - len(done)
        rows.append([name, str(len(cells)), str(len(done)), f"{seconds / 60:.0f}"])
    later = "" if results.chosen is not None else ", and then those of the tables"
    closing = f"{left} cells are not run; `make miniature` runs them{later}." if left else "Everything is run."
    return table(["what", "cells", "done", "minutes of one core"], rows) + f"\n\n{closing}"


def suites(results: Results) -> dict[str, list[Cell]]:
    """The cells by what they are for; each is counted where it comes first."""
    found: dict[str, list[Cell]] = {"tuning": plan.tuning_cells()}
    if results.chosen is not None:
        found["Tables 1 and 2"] = plan.main_cells(results.chosen)
        found["noise"] = plan.noise_cells()
        found["forms of q"] = plan.form_cells(results.chosen)
        found["beyond the grid"] = plan.edge_cells(results.chosen)
        found["sensitivity"] = plan.sweep_cells(results.chosen)
    seen: set[Cell] = set()
    for name, cells in found.items():
        found[name] = [cell for cell in dict.fromkeys(cells) if cell not in seen]
        seen.update(found[name])
    return found


PARTS: Mapping[str, Callable[[Results], str]] = {
    "grids": grids,
    "table 1": table_one,
    "differences": differences,
    "by seed": by_seed,
    "table 2": table_two,
    "findings": findings,
    "noise": noise,
    "forms": forms,
    "sensitivity": sweeps,
    "account": account,
}
