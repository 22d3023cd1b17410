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
MEASURES = {"agreement": "known pairs ranked right", "anchor_auc": "AUC against the anchors' results"}


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
    """Return one row per scorer and probe that has an AUC against gold."""
    points = []
    for path in paths:
        for row in read_json(path)["scorers"]:
            if "gold_auc" in row:
                found = {
                    "agreement": row.get("agreement", {}).get("rate"),
                    "anchor_auc": row.get("anchor_auc", [None])[0],
                }
                points.append({"probe": path.stem, "scorer": row["name"], "gold": row["gold_auc"][0]} | found)
    return points


def draw_points(points: list[dict[str, Any]], figure: Path) -> None:
    """Draw each gold-free measure against the AUC with gold, and print the rank correlations and the points."""
    drawing, panels = plt.subplots(1, len(MEASURES), figsize=(9, 4.2), sharey=True)
    scorers = sorted({p["scorer"] for p in points})
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        # `agreement` compares results itself: against the anchors' results its AUC is 1 by definition.
        shown = [p for p in points if p[measure] is not None and p["scorer"] != "agreement"]
        for number, scorer in enumerate(scorers):
            own = [p for p in shown if p["scorer"] == scorer]
            axes.scatter([p[measure] for p in own], [p["gold"] for p in own], color=f"C{number}", label=scorer)
        rank = rank_correlation([p[measure] for p in shown], [p["gold"] for p in shown])
        print(f"{title}: rank correlation with the AUC against gold {rank:+.2f} over {len(shown)} points")
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
        axes.set(xlabel=title, xlim=(0, 1.02), ylim=(0, 1.02), title=f"rank correlation {rank:+.2f}")
    panels[0].set_ylabel("AUC within prompts, against gold")
    handles = {label: handle for handle, label in zip(*panels[0].get_legend_handles_labels()) if label != "agreement"}
    panels[0].legend(handles.values(), handles, frameon=False, fontsize=8)
    drawing.tight_layout()
    drawing.savefig(figure, dpi=150)
    print("| probe | scorer | known pairs | against anchors | against gold |\n|---|---|---|---|---|")
    for p in points:
        cells = ("–" if p[key] is None else f"{p[key]:.3f}" for key in ("agreement", "anchor_auc", "gold"))
        print(f"| {p['probe']} | {p['scorer']} | {' | '.join(cells)} |")


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
