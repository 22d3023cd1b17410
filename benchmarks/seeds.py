"""The demo on several seeds and both domains: base, SFT and LDL-GRPO with intervals, as JSON lines and a table.

    .venv/bin/python benchmarks/seeds.py --out runs/seeds [key.path=value ...]

Each run is the ordinary `purld demo` in a process of its own on one thread, as many at once as asked for; a run that
is finished is not repeated. The table goes to stdout as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TASKS = ("counting", "writing")
# Twice the demo's: a benchmark has the time, and the intervals of the differences shrink by a quarter.
SAMPLES = 8


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    jobs = [(task, seed) for seed in arguments.seeds for task in arguments.tasks]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda job: run(*job, arguments.out, arguments.overrides), jobs))
    with (arguments.out / "seeds.jsonl").open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))


def run(task: str, seed: int, out: Path, overrides: list[str]) -> dict[str, Any]:
    """One demo; returns its results with the task's name."""
    folder = out / f"{task}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = [f"seed={seed}", f"evaluate.samples={SAMPLES}", *overrides]
    command = [Path(sys.executable).with_name("purld"), "demo", "--task", task, *settings]
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        subprocess.run(
            [*command, "--run-dir", folder],
            check=True,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {"task": task} | results


def table(rows: list[dict[str, Any]]) -> str:
    """Sampled and greedy accuracy of every model and the paired difference, a line a run."""
    lines = [
        "| task | seed | base | SFT | LDL-GRPO | difference | greedy: SFT | LDL-GRPO | win rate: SFT | LDL-GRPO |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda r: (r["task"], r["seed"])):
        base, sft, ours = (row["models"][name] for name in ("base", "sft", "ldl_grpo"))
        cells = [
            row["task"],
            str(row["seed"]),
            *(_interval(model, "accuracy") for model in (base, sft, ours)),
            _interval(row["difference"]["ldl_grpo - sft"], "accuracy", "+.3f"),
            *(f"{model['greedy_accuracy']:.3f}" for model in (sft, ours)),
            *(f"{model['win_rate']:.3f}" for model in (sft, ours)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(found: dict[str, Any], key: str, style: str = ".3f") -> str:
    low, high = found[f"{key}_ci"]
    return f"{found[key]:{style}} [{low:{style}}, {high:{style}}]"


if __name__ == "__main__":
    main()
