"""What p_sft's scores prefer among its own candidates, beside right answers: long ones or short ones?

    .venv/bin/python benchmarks/what_scores_like.py    # after `make miniature`, whose first stages it reads

All figures are within prompts: candidates of one prompt are compared with each other, then prompts are averaged, then
seeds. Stage II moves a policy along these preferences, so they say where a method drifts before it is run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mini import plan
from mini.cells import Cell
from mini.page import level, table
from mini.stats import over_seeds
from mini.work import answers, encoder, problems_trained_on, student

from purld.errors import UserError
from purld.model.load import load_model
from purld.model.sample import Decoding
from purld.model.self_evaluation import SelfEvaluator
from purld.records import Prompt
from purld.runs.run_dir import RunDir
from purld.testbed.world.world import answer_quality, is_right, teacher_answer

CANDIDATES = 8

Figures = dict[str, float]


def main() -> None:
    """Print one row a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), help="the miniature's folder")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    try:
        found = {task: [figures(task, seed, out) for seed in plan.SEEDS] for task in plan.TASKS}
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    names = list(found[plan.TASKS[0]][0])
    rows = [[name, *(level(over_seeds([f[name] for f in of_task])) for of_task in found.values())] for name in names]
    print(table(["within prompts, on p_sft's own candidates", *found], rows))


def figures(task: str, seed: int, out: Path) -> Figures:
    """What the scores of one p_sft prefer.

    Raises:
        UserError: the miniature has not trained it.
    """
    cell = Cell(task, seed, "test", "sft")
    run = RunDir(out / "stage_one" / cell.family)
    if "sft" not in run.finished_stages():
        raise UserError(f"{run.path}: no finished Stage I; run benchmarks/miniature.py first.")
    model = load_model(student(), run.sft)
    problems = problems_trained_on(cell)
    with tempfile.TemporaryDirectory() as folder:
        drawn = answers(cell, problems, lambda: model, Decoding(1.0, 64), CANDIDATES, Path(folder))
    score = SelfEvaluator(encoder(), "expected", CANDIDATES + 1).score
    anchored, alone, lengths, right, judged = [], [], [], [], []
    for problem, texts in zip(problems, drawn, strict=True):
        prompt = Prompt.from_text(problem.question)
        anchored.append(score(model, prompt, teacher_answer(problem), texts).candidates)
        alone.append(score(model, prompt, None, texts).candidates)
        lengths.append([len(text) for text in texts])
        right.append([is_right(problem, text) for text in texts])
        judged.append([answer_quality(problem, text) for text in texts])
    among_right = partial(within, kept=right)
    return {
        "right": float(np.mean(right)),
        "characters: right minus wrong": within(_right_minus_wrong, lengths, right),
        "anchored score: right minus wrong": within(_right_minus_wrong, anchored, right),
        "anchored score among right ones: standard deviation": among_right(_spread, anchored, lengths),
        "anchored score among right ones: correlation with length": among_right(_correlation, anchored, lengths),
        "score without anchor: correlation with length": within(_correlation, alone, lengths),
        "score without anchor: correlation with being right": within(_correlation, alone, right),
        "verdict among right ones: correlation with length": among_right(_correlation, judged, lengths),
    }


def within(
    measure: Callable[[np.ndarray, np.ndarray], float],
    a: Sequence[Sequence[float | None]],
    b: Sequence[Sequence[float]],
    kept: Sequence[Sequence[bool]] | None = None,
) -> float:
    """The mean over prompts of a measure of two values (K,) of their candidates, where it has one."""
    masks = [[True] * len(row) for row in b] if kept is None else kept
    rows = [(np.array(x, dtype=float)[m], np.array(y, dtype=float)[m]) for x, y, m in zip(a, b, map(np.array, masks))]
    found = [measure(x, y) for x, y in rows]
    return float(np.nanmean(found))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN if one of them does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _right_minus_wrong(values: np.ndarray, right: np.ndarray) -> float:
    """NaN if all are right or all wrong."""
    yes = right.astype(bool)
    return float(values[yes].mean() - values[~yes].mean()) if 0 < yes.sum() < len(yes) else float("nan")


def _spread(values: np.ndarray, _: np.ndarray) -> float:
    """NaN if there is but one."""
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()
