"""Define a cell: one p_sft or one Stage II, with every setting that differs between cells.

A cell is identified by its content, so the same cell in two tables is run once, and an edited setting is another cell.
What all cells share (the student, Stage I, how much is measured) is not part of it: after changing that, use an empty
folder. Nothing here trains, and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from purld.display.titles import model_title
from purld.records import content_hash
from purld.testbed.world.world import Task

Split = Literal["validation", "test"]
Evaluator = Literal["frozen", "moving"]
Pool = Literal["same", "other"]

# Shared by all methods of Stage II: 32 updates of 8 prompts are one pass over 256 prompts. The demo has K=16 and 80
# steps; with fewer the whole table takes three hours on two cores.
SHARED: Mapping[str, Any] = {
    "prompts_per_step": 8,
    "steps": 32,
    "schedule": "linear",
    "max_new_tokens": 64,
    "micro_batch_size": 16,
}
GROUPED = {**SHARED, "candidates": 8}
SCORED = {"score_batch_size": 32}
_LDL = {**GROUPED, **SCORED, "q": "ratio", "gamma": 10.0, "tau": 1.2, "beta": 0.01}
_GRPO = {**GROUPED, **SCORED, "beta": 0.0}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ldl_grpo": _LDL,
    "anchorrank_dpo": {**GROUPED, **SCORED, "beta": 0.1},
    "anchor_grpo": _GRPO,
    "self_ppo": {**SHARED, **SCORED, "beta": 0.05},
    "singlepair_dpo": {**SHARED, "beta": 0.1},
    "sft_sft": SHARED,
    "by_positives": {**_LDL, "method": "ldl_grpo", "group_weight": "positives"},
    "anchor_in_group": {**_LDL, "method": "ldl_grpo", "anchor_in_group": True},
    "self_distillation": GROUPED,
    "rlpr": {**_GRPO, "method": "anchor_grpo", "score": "reference"},
    "teacher_judge_grpo": {**GROUPED, "beta": 0.0},
}
"""Each row's settings, except those that are tuned; a row that is not called by its method names the method."""
VARIANTS: Mapping[str, str] = {
    "by_positives": "LDL-GRPO, groups weighed by positives",
    "anchor_in_group": "LDL-GRPO, the anchor in the group",
    "self_distillation": "Self-distillation",
    "rlpr": "RLPR's reward in GRPO",
}
"""The rows that the paper does not have, with their titles."""

ANCHORS = 256


@dataclass(frozen=True)
class Cell:
    """One unit of work.

    Attributes:
        task: a task of the testbed.
        seed: draws prompts, problems, order, candidates and answers.
        split: the split whose problems the answers are measured on.
        method: a row of the tables, which is a method of Stage II or one of `VARIANTS`, or `sft` for p_sft itself.
        settings: sorted keys and values of `align`; empty for `sft`.
        anchors: number of prompts with a teacher's answer in each stage.
        pool: whether Stage II has the prompts of Stage I or as many others.
        noise: standard deviation of the noise that is added to every score.
        evaluator: whether p_sft or the moving policy gives the scores.
    """

    task: Task
    seed: int
    split: Split
    method: str
    settings: tuple[tuple[str, Any], ...] = ()
    anchors: int = ANCHORS
    pool: Pool = "same"
    noise: float = 0.0
    evaluator: Evaluator = "frozen"

    @cached_property
    def id(self) -> str:
        """A hash of all fields."""
        return content_hash(asdict(self))

    @property
    def stage_one(self) -> Cell:
        """The p_sft that this cell starts from, measured on the same problems."""
        return Cell(self.task, self.seed, self.split, "sft", anchors=self.anchors)

    @property
    def stage_one_key(self) -> str:
        """A key that is equal for cells that start from the same weights, whatever is measured."""
        return f"{self.task}-seed{self.seed}-anchors{self.anchors}"

    @property
    def title(self) -> str:
        """A title for people."""
        defaults = DEFAULTS.get(self.method, {})
        differences = [format_settings({k: v}) for k, v in self.settings if k != "method" and defaults.get(k) != v]
        if self.noise:
            differences.append(f"noise={self.noise:g}")
        if self.evaluator != "frozen":
            differences.append(self.evaluator)
        if self.pool != "same":
            differences.append("other prompts")
        if self.anchors != ANCHORS:
            differences.append(f"N={self.anchors}")
        return " ".join([self.task, f"seed {self.seed}", self.split, self.method, *differences])


def format_settings(settings: Mapping[str, Any]) -> str:
    """Format settings as a short text."""
    values = {key: f"{value:g}" if isinstance(value, float) else value for key, value in settings.items()}
    return ", ".join(f"{key}={value}" for key, value in values.items())


def row_title(method: str) -> str:
    """Return the title of a row of the tables."""
    return VARIANTS.get(method) or model_title(method)


def stage_two_cell(task: Task, seed: int, split: Split, method: str, chosen: Mapping[str, Any], **fields: Any) -> Cell:
    """Return a Stage II cell: the row's defaults overridden by `chosen`; `fields` are fields of `Cell`."""
    settings = {"method": method, **DEFAULTS[method], **chosen}
    return Cell(task, seed, split, method, tuple(sorted(settings.items())), **fields)
