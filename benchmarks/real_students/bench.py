"""Run a cell by the command line, in a folder of runs that share anchors, Stage I and the answers of base and p_sft."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from purld.config.read_yaml import read_yaml
from purld.errors import UserError
from purld.pipeline.sweep import share_stage_one
from purld.runs.files import read_json, read_rows, write_rows
from purld.runs.run_dir import RunDir
from purld.training.gain import final_gain
from real_students.plan import METHODS, QUICK, VALIDATION, Cell, Size

Row = dict[str, Any]

_SHARING = threading.Lock()  # sharing Stage I locks its run, and cells run side by side


@dataclass(frozen=True)
class Machine:
    """What the machine has room for; it changes the speed of a cell, and its figures by rounding alone.

    Attributes:
        dtype: the precision of frozen weights.
        answered: test problems that are answered at a time.
        micro_batch: candidates of a forward and backward pass.
    """

    dtype: str = "auto"
    answered: int = 64
    micro_batch: int = 8


@dataclass(frozen=True)
class Bench:
    """The place of the runs, and what they are made of.

    Attributes:
        out: the folder of all runs and of `rows.jsonl`.
        students: directories of students by name.
        problems: word problems with gold and a teacher's answer.
        test: test problems with gold.
        size: how much of everything.
        machine: what the machine has room for.
    """

    out: Path
    students: Mapping[str, Path]
    problems: Path
    test: Path
    size: Size
    machine: Machine = Machine()

    @property
    def rows(self) -> Path:
        """The file of finished cells."""
        return self.out / "rows.jsonl"

    @property
    def chosen(self) -> Path:
        """The file of the settings that tuning chose, by student and method."""
        return self.out / "chosen.json"

    def run_cell(self, cell: Cell) -> Row:
        """Run one cell and return its row; its weights are removed, its Stage I stays for its family."""
        leader = RunDir(self.out / cell.family / "SFT")
        config = self.write_config(cell)
        if cell.method == "SFT":
            _purld("run", config, leader, ["align.method=sft"])
            return self._row(cell, leader)
        if "report" not in leader.finished_stages():
            _purld("run", config, leader, ["align.method=sft"])
        run = RunDir(self.out / cell.family / cell.name)
        if "sft" not in run.finished_stages():
            with _SHARING:
                share_stage_one(leader, run)
            _copy_answers(leader, run)
        _purld(
            "run", config, run, [f"align.{key}={json.dumps(value)}" for key, value in self.align_settings(cell).items()]
        )
        row = self._row(cell, run)
        shutil.rmtree(run.align, ignore_errors=True)
        return row

    def align_settings(self, cell: Cell) -> dict[str, Any]:
        """Return the keys of `align` that a cell sets."""
        sizes = {name: getattr(self.size, name) for name in ("steps", "prompts_per_step", "candidates")}
        # The quick slice tries every part, whatever the scores of so small a Stage I are worth.
        slice_settings = {"weak_signal": "continue"} if self.size == QUICK else {}
        return {**sizes, **slice_settings, **METHODS[cell.method], **dict(cell.settings)}

    def write_config(self, cell: Cell) -> Path:
        """Write a family's problems and configuration, unless they are there, and return the configuration's path.

        Cells of a family may run side by side, so nothing is written that another one reads.
        """
        folder = self.out / cell.family
        folder.mkdir(parents=True, exist_ok=True)
        train, validation = self.split_problems(cell.seed)
        if cell.pool == "same":
            train = train[: self.size.stage_one]
        measured = [*self.test_problems(cell.split), *validation]
        train_file, measured_file = (str((folder / f"{name}.jsonl").resolve()) for name in ("train", "measured"))
        fraction, micro_batch = self.size.stage_one / len(train), self.machine.micro_batch
        config = {
            "student": {
                "model": str(self.students[cell.student].resolve()),
                "lora": {"r": 16},
                "dtype": self.machine.dtype,
                "max_prompt_tokens": 512,
                "max_anchor_tokens": 128,
            },
            "data": {"prompts": train_file, "eval_prompts": measured_file, "check": "math"},
            "teacher": {"kind": "file", "path": train_file, "columns": {"prompt": "prompt", "answer": "teacher"}},
            "sft": {
                "epochs": 3,
                "learning_rate": 5.0e-4,
                "micro_batch_size": min(16, micro_batch),
                "checkpoint_steps": 20,
            },
            "align": {
                "schedule": "linear",
                "max_new_tokens": 48,
                "micro_batch_size": micro_batch,
                "checkpoint_steps": 20,
            },
            "evaluate": {"samples": self.size.samples, "max_new_tokens": 48, "batch_size": self.machine.answered},
            "seed": cell.seed,
        }
        if cell.pool == "other":
            config["data"]["sft_fraction"] = fraction
        path = folder / "run.yaml"
        text = yaml.safe_dump(config, sort_keys=False)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_rows(Path(train_file), train)
            write_rows(Path(measured_file), measured)
            path.write_text(text, encoding="utf-8")
        return path

    def split_problems(self, seed: int) -> tuple[list[Row], list[Row]]:
        """Return a seed's training problems, Stage I's and Stage II's together, and the validation problems of all."""
        rows = list({row["prompt"]: row for row in read_rows(self.problems)}.values())
        random.Random(0).shuffle(rows)
        validation, rest = rows[:VALIDATION], rows[VALIDATION:]
        random.Random(seed).shuffle(rest)
        count = self.size.stage_one + self.size.stage_two
        return rest[:count], validation[: self.size.measured]

    def test_problems(self, split: str) -> list[Row]:
        """Return the test problems that the cells of a split answer, before the validation problems: all or none."""
        return read_rows(self.test)[: self.size.measured] if split == "test" else []

    def _row(self, cell: Cell, run: RunDir) -> Row:
        """Return what the tables are made of; right answers are means over each problem's answers."""
        results = read_json(run.results)
        name = "sft" if cell.method == "SFT" else next(m for m in results["models"] if m not in ("base", "sft"))
        logged = [row for row in read_rows(run.metrics) if row["stage"] == "align"]
        steps = [row for row in logged if not row.keys() & {"eval_score", "eval_unscored"}]
        settings = read_yaml(run.config)["align"]
        validation = self.split_problems(cell.seed)[1]
        return {
            "id": cell.id,
            "student": cell.student,
            "seed": cell.seed,
            "split": cell.split,
            "pool": cell.pool,
            "method": cell.method,
            "changed": dict(cell.settings),
            "settings": settings,
            "steps": steps[-1]["step"] if steps else 0,
            "prompts_per_step": settings.get("prompts_per_step", 0),
            "size": asdict(self.size),
            **right_answers(run, name, self.test_problems(cell.split) or validation),
            "validation": right_answers(run, name, validation),
            "seconds": results["seconds"],
            "kl": run.finished_stages().get("align", {}).get("kl"),
            "gain": asdict(gain) if (gain := final_gain(steps)) else None,
            "score_quality": results.get("score_quality"),
            "training_accuracy": results.get("training_accuracy"),
            "warnings": results.get("warnings", []),
        }


def right_answers(run: RunDir, name: str, problems: Sequence[Row]) -> dict[str, list[float]]:
    """Return the share of right answers to each problem: of the sampled ones (`right`) and of the greedy one."""
    return {"right": _right(run, name, problems), "greedy": _right(run, f"{name}.greedy", problems)}


def _right(run: RunDir, name: str, problems: Sequence[Row]) -> list[float]:
    """Return the share of right answers to each problem among those that a model drew."""
    answers: dict[str, list[bool]] = {row["prompt"]: [] for row in problems}
    for row in read_rows(run.generations(name)):
        if row["prompt"] in answers:
            answers[row["prompt"]].append(bool(row["correct"]))
    return [round(sum(right) / len(right), 4) for right in answers.values() if right]


def _copy_answers(leader: RunDir, run: RunDir) -> None:
    """Give a run the answers of the base and of p_sft, which every cell of a family would draw alike."""
    for name in ("base", "base.greedy", "sft", "sft.greedy"):
        source, target = leader.generations(name), run.generations(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _purld(command: str, config: Path, run: RunDir, overrides: Sequence[str]) -> None:
    """Run the command line; its output is in a log beside the run directory.

    Raises:
        UserError: it failed.
    """
    log = Path(f"{run.path}.log")
    arguments = [command, str(config), *overrides, "--run-dir", str(run.path)]
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run([sys.executable, "-m", "purld", *arguments], stdout=file, stderr=file).returncode
    if code:
        raise UserError(f"{log}: purld {' '.join(arguments)} ended with status {code}")
