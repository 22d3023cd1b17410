"""Run the demo on several seeds and all domains: base, SFT and LDL-GRPO with intervals, as JSON lines and a table.

    .venv/bin/python benchmarks/seeds.py --out runs/seeds [key.path=value ...]

Each run is the ordinary `purld demo` in its own process on one thread, `--jobs` at once; finished runs are not
repeated. A demo of several tasks has a row for each. The table goes to stdout as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from purld.evaluation.recorded import read_recorded_answers
from purld.evaluation.summary import EvaluatedModel, model_difference, model_metrics
from purld.runs.files import read_json, read_rows
from purld.runs.run_dir import RunDir
from purld.testbed.demo import HELD_OUT_PROMPTS
from purld.testbed.shipped import DEMOS, demo_problems, students_of
from purld.testbed.world.world import to_prompt

# The default demos: a demo of several tasks stands for each of them.
DEFAULT = ("counting", "writing", "scenes")
# Twice the demo's, which shrinks the intervals of the differences by a quarter.
SAMPLES = 8
MODELS = ("base", "sft", "ldl_grpo")


def main() -> None:
    """Run the missing demos, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT), choices=DEMOS)
    parser.add_argument("--students", nargs="+", help="only these; unless given, all that can do a task")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    jobs = [
        (task, student, seed)
        for seed in arguments.seeds
        for task in arguments.tasks
        for student in students_of(task)
        if not arguments.students or student in arguments.students
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = pool.map(lambda job: run_demo(job[0], job[1], job[2], arguments.out, arguments.overrides), jobs)
        rows = [row for of_run in results for row in of_run]
    with (arguments.out / "seeds.jsonl").open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    print(format_table(rows))


def run_demo(demo: str, student: str, seed: int, out: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Run one demo; return the results of each of its tasks, with the names of task and student."""
    folder = out / "-".join([demo, *([student] if len(students_of(demo)) > 1 else []), str(seed)])
    out.mkdir(parents=True, exist_ok=True)
    settings = [f"seed={seed}", f"evaluate.samples={SAMPLES}", *overrides]
    command: list[str | Path] = [
        Path(sys.executable).with_name("purld"),
        "demo",
        "--task",
        demo,
        "--student",
        student,
        *settings,
    ]
    # Beside the run: a new run directory must be empty.
    with (out / f"{folder.name}.log").open("a", encoding="utf-8") as log:
        subprocess.run(
            [*command, "--run-dir", folder],
            check=True,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    results = read_json(folder / "results.json")
    of_tasks = [results] if len(DEMOS[demo]) == 1 else task_results(RunDir(folder), demo, seed)
    return [
        results | {"task": task, "student": student} | parts for task, parts in zip(DEMOS[demo], of_tasks, strict=True)
    ]


def task_results(run: RunDir, demo: str, seed: int) -> list[dict[str, Any]]:
    """Return the part of results.json about answers, for each task of a run of several tasks."""
    task_of = {to_prompt(p).id: p.task for p in demo_problems(demo, "heldout", HELD_OUT_PROMPTS, seed)}
    opponents = {row["prompt_id"]: row["text"] for row in read_rows(run.opponent)}
    results = []
    for task in DEMOS[demo]:
        ids = {prompt_id for prompt_id, prompt_task in task_of.items() if prompt_task == task}
        models = {name: select_prompts(read_recorded_answers(run, name).to_evaluated_model(), ids) for name in MODELS}
        pairs = {
            f"{a} - {b}": model_difference(models[a], models[b], opponents, seed) for a, b in pairwise(MODELS[::-1])
        }
        metrics = {name: model_metrics(model, opponents, seed) for name, model in models.items()}
        results.append({"models": metrics, "difference": pairs})
    return results


def select_prompts(model: EvaluatedModel, ids: set[str]) -> EvaluatedModel:
    """Return a model's answers to some of the prompts."""
    prompts = list(dict.fromkeys(g.prompt_id for g in model.generations))
    kept = np.array([prompt_id in ids for prompt_id in prompts])
    return replace(
        model,
        generations=[g for g in model.generations if g.prompt_id in ids],
        correct=None if model.correct is None else model.correct[kept],
        greedy_correct=None if model.greedy_correct is None else model.greedy_correct[kept],
        verdicts=[v for v in model.verdicts if v.prompt_id in ids],
    )


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format the accuracy of every model and the paired difference, one line per run and task."""
    lines = [
        "| task | student | seed | base | SFT | LDL-GRPO | difference | greedy: SFT | LDL-GRPO | win rate: SFT "
        "| LDL-GRPO |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda r: (r["task"], r["student"], r["seed"])):
        base, sft, ours = (row["models"][name] for name in MODELS)
        cells = [
            row["task"],
            row["student"],
            str(row["seed"]),
            *(_interval(model, "accuracy") for model in (base, sft, ours)),
            _interval(row["difference"]["ldl_grpo - sft"], "accuracy", "+.3f"),
            *(f"{model['greedy_accuracy']:.3f}" for model in (sft, ours)),
            *(f"{model['win_rate']:.3f}" for model in (sft, ours)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(metrics: dict[str, Any], key: str, style: str = ".3f") -> str:
    low, high = metrics[f"{key}_ci"]
    return f"{metrics[key]:{style}} [{low:{style}}, {high:{style}}]"


if __name__ == "__main__":
    main()
