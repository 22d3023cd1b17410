"""What is run: one cell is one p_sft or one Stage II, with all of it that differs between cells.

A cell is known by its content, so the same cell in two tables is run once, and an edited setting is another cell. What
all cells share (the student, Stage I, how much is measured) is no part of it: after a change of that take an empty
folder. Nothing here trains; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from purld.records import content_hash

Split = Literal["validation", "test"]
Evaluator = Literal["frozen", "moving"]
Pool = Literal["same", "other"]

# What every method of Stage II shares: 32 updates of 8 prompts are one pass over 256. The demo has K=16 and 80 steps;
# less than that is what makes the whole table fit into three hours on two cores.
SHARED: Mapping[str, Any] = {
    "prompts_per_step": 8,
    "steps": 32,
    "schedule": "linear",
    "max_new_tokens": 64,
    "micro_batch_size": 16,
}
GROUPED = SHARED | {"candidates": 8}
SCORED = {"score_batch_size": 32}
PLAIN: Mapping[str, Mapping[str, Any]] = {
    "ldl_grpo": GROUPED | SCORED | {"q": "ratio", "gamma": 10.0, "tau": 1.2, "beta": 0.01},
    "anchorrank_dpo": GROUPED | SCORED | {"beta": 0.1},
    "anchor_grpo": GROUPED | SCORED | {"beta": 0.0},
    "self_ppo": SHARED | SCORED | {"beta": 0.05},
    "singlepair_dpo": SHARED | {"beta": 0.1},
    "sft_sft": SHARED,
    "teacher_judge_grpo": GROUPED | {"beta": 0.0},
}
"""Each method's settings but for what was tuned."""

ANCHORS = 256


@dataclass(frozen=True)
class Cell:
    """One unit of work.

    Attributes:
        task: of the testbed.
        seed: draws prompts, problems, order, candidates and answers.
        split: whose problems the answers are measured on.
        method: of Stage II, or `sft` for p_sft itself.
        settings: `align`'s keys and values, sorted; empty for `sft`.
        anchors: prompts with a teacher's answer in each stage.
        pool: whether Stage II has the prompts of Stage I or as many others.
        noise: standard deviation of what is added to every score.
        evaluator: whether the scores are p_sft's or the moving policy's.
    """

    task: str
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
        """A hash of all of it."""
        return content_hash(asdict(self))

    @property
    def stage_one(self) -> Cell:
        """The p_sft that this cell starts from, measured on the same problems."""
        return Cell(self.task, self.seed, self.split, "sft", anchors=self.anchors)

    @property
    def family(self) -> str:
        """Equal for cells that start from the same weights; what is measured does not change them."""
        return f"{self.task}-seed{self.seed}-anchors{self.anchors}"

    @property
    def title(self) -> str:
        """A line for a person."""
        plain = PLAIN.get(self.method, {})
        special = [named({k: v}) for k, v in self.settings if k != "method" and plain.get(k) != v]
        if self.noise:
            special.append(f"noise={self.noise:g}")
        if self.evaluator != "frozen":
            special.append(self.evaluator)
        if self.pool != "same":
            special.append("other prompts")
        if self.anchors != ANCHORS:
            special.append(f"N={self.anchors}")
        return " ".join([self.task, f"seed {self.seed}", self.split, self.method, *special])


def named(settings: Mapping[str, Any]) -> str:
    """Settings as a short text."""
    values = {key: f"{value:g}" if isinstance(value, float) else value for key, value in settings.items()}
    return ", ".join(f"{key}={value}" for key, value in values.items())


def stage_two(task: str, seed: int, split: Split, method: str, chosen: Mapping[str, Any], **more: Any) -> Cell:
    """A Stage II cell with the method's plain settings and, over them, `chosen`; `more` are fields of `Cell`."""
    settings = {"method": method} | PLAIN[method] | chosen
    return Cell(task, seed, split, method, tuple(sorted(settings.items())), **more)
