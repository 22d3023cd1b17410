"""Compare how a probe's scorers rank known pairs, which needs no gold, with their AUC against gold.

    python benchmarks/probe_predicts.py testbed OUT           # probes of the shipped student, before and after Stage I
    python benchmarks/probe_predicts.py plot FIGURE.png PROBE.json [PROBE.json ...]

A point is one scorer of one student on one task. The first command takes some minutes and writes OUT/*.json; the
probe.json of any run whose prompts have a `reference` can be added. The second draws the figure and prints the rank
correlations.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.pipeline.pipeline import Pipeline
from purld.runs.files import read_json
from purld.runs.run_dir import RunDir
from purld.testbed.shipped import STUDENT_FOLDERS
from purld.testbed.world.world import Task, generate_problems, teacher_answer

TASKS: tuple[Task, ...] = ("counting", "writing")
PROMPTS, HELD_OUT = 192, 8


def probe_testbed(out: Path) -> None:
    """Probe the shipped student on both text tasks: its own weights, then p_sft."""
    for task in TASKS:
        folder = out / task
        config = load_config(write_config(task, folder))
        pipeline = Pipeline(config, RunDir(folder / "run"), Reporter())
        pipeline.execute(["anchors"])
        if not (out / f"{task}-base.json").exists():
            pipeline.probe()
            shutil.copy(folder / "run" / "probe.json", out / f"{task}-base.json")
        pipeline.execute(["sft"])
        pipeline.probe()
        shutil.copy(folder / "run" / "probe.json", out / f"{task}-sft.json")


def write_config(task: Task, folder: Path) -> Path:
    """Write a configuration whose answers are in a file, with Stage I as in the demo, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = generate_problems(task, "train", PROMPTS + HELD_OUT, 0)
    rows = [{"prompt": p.question, "reference": p.truth, "answer": teacher_answer(p)} for p in problems]
    for name, part in (("prompts", rows[:PROMPTS]), ("held_out", rows[PROMPTS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    values = {
        "student": {"model": str(STUDENT_FOLDERS["text"]), "max_prompt_tokens": 256, "max_anchor_tokens": 128},
        "data": {
            "prompts": str(folder / "prompts.jsonl"),
            "eval_prompts": str(folder / "held_out.jsonl"),
            "check": "testbed",
        },
        "teacher": {"kind": "file", "path": str(folder / "prompts.jsonl")},
        "sft": {"epochs": 16, "learning_rate": 3e-4, "micro_batch_size": 16},
        "align": {"steps": 160, "max_new_tokens": 64},
        "evaluate": {"max_new_tokens": 64},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def read_points(paths: list[Path]) -> list[dict[str, Any]]:
    """Return one row per scorer and probe that has known pairs and an AUC against gold."""
    return [
        {"probe": path.stem, "scorer": row["name"], "pairs": row["agreement"]["rate"], "gold": row["gold_auc"][0]}
        for path in paths
        for row in read_json(path)["scorers"]
        if "gold_auc" in row and "agreement" in row
    ]


def draw_points(points: list[dict[str, Any]], figure: Path) -> None:
    """Draw the rate of known pairs against the AUC with gold, and print the rank correlation and the points."""
    rank = rank_correlation([p["pairs"] for p in points], [p["gold"] for p in points])
    drawing, axes = plt.subplots(figsize=(5, 4.2))
    for number, scorer in enumerate(sorted({p["scorer"] for p in points})):
        own = [p for p in points if p["scorer"] == scorer]
        axes.scatter([p["pairs"] for p in own], [p["gold"] for p in own], color=f"C{number}", label=scorer)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="known pairs ranked right, without gold", ylabel="AUC within prompts, against gold")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)
    drawing.tight_layout()
    drawing.savefig(figure, dpi=150)
    print(f"rank correlation {rank:+.2f} over {len(points)} points")
    print("| probe | scorer | known pairs | against gold |\n|---|---|---|---|")
    for p in points:
        print(f"| {p['probe']} | {p['scorer']} | {p['pairs']:.3f} | {p['gold']:.3f} |")


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Return Spearman's correlation, ties at their mean rank."""

    def ranks(values: list[float]) -> np.ndarray:
        array = np.asarray(values)
        return np.array([(array < v).sum() + (array == v).sum() / 2 for v in array])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def main() -> None:
    """Measure or draw, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("testbed").add_argument("out", type=Path)
    plot = commands.add_parser("plot")
    plot.add_argument("figure", type=Path)
    plot.add_argument("probes", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "testbed":
        probe_testbed(arguments.out)
    else:
        draw_points(read_points(arguments.probes), arguments.figure)


if __name__ == "__main__":
    main()
