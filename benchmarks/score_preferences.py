"""Show what p_sft's scores prefer among its own candidates besides right answers: long ones or short ones.

    .venv/bin/python benchmarks/score_preferences.py    # after `make miniature`, whose first stages it reads

All figures are within prompts: candidates of one prompt are compared with each other, then averaged over prompts, then
over seeds. Stage II moves a policy along these preferences, so they show where a method drifts before it is run.
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
from mini.page import format_mean, markdown_table
from mini.stats import over_seeds
from mini.work import problems_trained_on, sample_answers, testbed_encoder, testbed_student

from purld.errors import UserError
from purld.model.load import load_model
from purld.model.sample import Decoding
from purld.model.self_evaluation import SelfEvaluator
from purld.records import Prompt
from purld.runs.run_dir import RunDir
from purld.testbed.world.world import Task, answer_quality, is_right, teacher_answer

CANDIDATES = 8

Figures = dict[str, float]


def main() -> None:
    """Print one row per figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), help="the miniature's folder")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    try:
        by_task = {task: [measure_preferences(task, seed, out) for seed in plan.SEEDS] for task in plan.TASKS}
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    names = list(by_task[plan.TASKS[0]][0])
    rows = [
        [name, *(format_mean(over_seeds([f[name] for f in of_task])) for of_task in by_task.values())] for name in names
    ]
    print(markdown_table(["within prompts, on p_sft's own candidates", *by_task], rows))


def measure_preferences(task: Task, seed: int, out: Path) -> Figures:
    """Measure what the scores of one p_sft prefer.

    Raises:
        UserError: the miniature has not trained it.
    """
    cell = Cell(task, seed, "test", "sft")
    run = RunDir(out / "stage_one" / cell.stage_one_key)
    if "sft" not in run.finished_stages():
        raise UserError(f"{run.path}: no finished Stage I; run benchmarks/miniature.py first.")
    model = load_model(testbed_student(), run.sft)
    problems = problems_trained_on(cell)
    with tempfile.TemporaryDirectory() as folder:
        samples = sample_answers(cell, problems, lambda: model, Decoding(1.0, 64), CANDIDATES, Path(folder))
    score = SelfEvaluator(testbed_encoder(), "expected", CANDIDATES + 1).score
    anchored, alone, lengths, right, qualities = [], [], [], [], []
    for problem, texts in zip(problems, samples, strict=True):
        prompt = Prompt.from_text(problem.question)
        anchored.append(score(model, prompt, teacher_answer(problem), texts).candidates)
        alone.append(score(model, prompt, None, texts).candidates)
        lengths.append([len(text) for text in texts])
        right.append([is_right(problem, text) for text in texts])
        qualities.append([answer_quality(problem, text) for text in texts])
    among_right = partial(mean_within_prompts, kept=right)
    return {
        "right": float(np.mean(right)),
        "characters: right minus wrong": mean_within_prompts(_right_minus_wrong, lengths, right),
        "anchored score: right minus wrong": mean_within_prompts(_right_minus_wrong, anchored, right),
        "anchored score among right ones: standard deviation": among_right(_spread, anchored, lengths),
        "anchored score among right ones: correlation with length": among_right(_correlation, anchored, lengths),
        "score without anchor: correlation with length": mean_within_prompts(_correlation, alone, lengths),
        "score without anchor: correlation with being right": mean_within_prompts(_correlation, alone, right),
        "verdict among right ones: correlation with length": among_right(_correlation, qualities, lengths),
    }


def mean_within_prompts(
    measure: Callable[[np.ndarray, np.ndarray], float],
    a: Sequence[Sequence[float | None]],
    b: Sequence[Sequence[float]],
    kept: Sequence[Sequence[bool]] | None = None,
) -> float:
    """Return the mean over prompts of a measure of two values (K,) of their candidates, where it is defined.

    `kept` selects candidates; all are used if it is None.
    """
    masks = [[True] * len(row) for row in b] if kept is None else kept
    rows = [(np.array(x, dtype=float)[m], np.array(y, dtype=float)[m]) for x, y, m in zip(a, b, map(np.array, masks))]
    values = [measure(x, y) for x, y in rows]
    return float(np.nanmean(values))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation; NaN if one of them does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _right_minus_wrong(values: np.ndarray, right: np.ndarray) -> float:
    """Return the difference of means; NaN if all are right or all wrong."""
    yes = right.astype(bool)
    return float(values[yes].mean() - values[~yes].mean()) if 0 < yes.sum() < len(yes) else float("nan")


def _spread(values: np.ndarray, _: np.ndarray) -> float:
    """Return the standard deviation; NaN for a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()
