"""Sweep settings on the testbed with a validation split: how the demo's own settings were chosen.

    .venv/bin/python benchmarks/tune.py --task counting --out runs/tune align.learning_rate=3e-4,1e-3 seed=0,1

It uses the demo's prompts and configuration, but not its held-out problems: answers are measured on other problems of
the training split. The grid itself is an ordinary `purld sweep`; no server is needed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import yaml

from purld.runs.files import write_rows
from purld.testbed.demo import HELD_OUT_PROMPTS, TRAIN_PROMPTS, demo_values
from purld.testbed.shipped import DEMOS, demo_problems
from purld.testbed.world.world import Problem, teacher_answer, to_prompt, write_prompts

# Not a demo's seed, so it draws other problems.
VALIDATION_SEED = 777


def main() -> None:
    """Write the task's files, then run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=DEMOS)
    parser.add_argument("--student", help="qwen2_5_vl or llava, with scenes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("grid", nargs="+", metavar="key.path=value,value")
    arguments = parser.parse_args()
    config = write_config(arguments.task, arguments.student, arguments.out / arguments.task)
    purld = Path(sys.executable).with_name("purld")
    command = [purld, "sweep", config, *arguments.grid, "--jobs", str(arguments.jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([*command, "--run-dir", config.parent / "runs"], env=environment).returncode)


def write_config(task: str, student: str | None, folder: Path) -> Path:
    """Write the demo's configuration with files: seed 0's prompts, their anchors, and validation problems."""
    prompts = demo_problems(task, "train", TRAIN_PROMPTS, 0)
    trained_on = {(p.question, p.scene) for p in prompts}
    others = demo_problems(task, "train", HELD_OUT_PROMPTS + TRAIN_PROMPTS, VALIDATION_SEED)
    write_prompts(folder / "prompts.jsonl", prompts)
    validation = [p for p in others if (p.question, p.scene) not in trained_on]
    write_prompts(folder / "held_out.jsonl", validation[:HELD_OUT_PROMPTS])
    # Two images may have the same question, so answers are matched by the prompt's id.
    write_rows(folder / "answers.jsonl", map(_answer, prompts))
    values = demo_values(task, folder, "http://127.0.0.1/v1", student)
    values["teacher"] = {"kind": "file", "path": str(folder / "answers.jsonl")}
    del values["evaluate"]["judge"], values["evaluate"]["opponent"]
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def _answer(problem: Problem) -> dict[str, str]:
    return {"id": to_prompt(problem).id, "answer": teacher_answer(problem)}


if __name__ == "__main__":
    main()
