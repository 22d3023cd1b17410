"""The cells of the comparison on real students: one per student, seed, method and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VALIDATION = 200  # problems of the training sources that nothing trains on
TUNING_SEED = 1000  # of the cells that settings are chosen by; no seed of the table
SEEDS = (0, 1, 2)
RATES = (3.0e-5, 1.0e-4, 3.0e-4)

METHODS: Mapping[str, Mapping[str, Any]] = {
    "SFT": {"method": "sft"},
    "LDL-GRPO, by positives": {"method": "ldl_grpo", "skip_equal_scores": True, "group_weight": "positives"},
    "LDL-GRPO": {"method": "ldl_grpo"},
    "Anchor-GRPO": {"method": "anchor_grpo"},
    "SFT→SFT": {"method": "sft_sft"},
    "LDL-GRPO, the anchor in the group": {"method": "ldl_grpo", "anchor_in_group": True},
    "LDL-GRPO, equal scores skipped": {"method": "ldl_grpo", "skip_equal_scores": True},
    "self-distillation": {"method": "self_distillation"},
    "AnchorRank-DPO": {"method": "anchorrank_dpo"},
    "SinglePair-DPO": {"method": "singlepair_dpo"},
    "RLPR": {"method": "anchor_grpo", "score": "reference", "weak_signal": "continue"},
    "LDL-GRPO, in_context": {"method": "ldl_grpo", "score": "in_context", "weak_signal": "continue"},
    "LDL-GRPO, expected": {"method": "ldl_grpo", "score": "expected", "weak_signal": "continue"},
}
"""The rows of the table, most important first: settings of `align` by name.

The score is `auto` unless named: agreement with the anchor. A weak signal of the others is part of what is measured.
"""

_MOVES_FAR = ("RLPR", "self-distillation")  # at the largest rate RLPR's reward moved SmolLM2-135M by 5.6 nats
CHOSEN: Mapping[str, Mapping[str, Any]] = {
    method: {"learning_rate": RATES[1] if method in _MOVES_FAR else RATES[2]} for method in METHODS if method != "SFT"
}
"""The settings that the table's cells use, by method, unless a file of chosen settings names others."""


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        stage_one: problems of Stage I.
        stage_two: problems of Stage II.
        steps: updates of Stage II.
        prompts_per_step: prompts of an update.
        candidates: candidates of a prompt, where a method draws a group of them.
        measured: the most test problems, and validation problems, that are answered.
        samples: answers sampled to each of them.
    """

    stage_one: int = 1000
    stage_two: int = 1400
    steps: int = 40
    prompts_per_step: int = 8
    candidates: int = 16
    measured: int = 500
    samples: int = 4


QUICK = Size(stage_one=32, stage_two=16, steps=2, prompts_per_step=4, candidates=4, measured=4, samples=2)


@dataclass(frozen=True)
class Cell:
    """One run: a student, a seed, the problems it is measured on, and the settings of Stage II.

    Attributes:
        student: the student's name.
        seed: draws the order of problems, the candidates and the answers.
        split: `validation`, or `test`; the table's cells answer the validation problems as well.
        method: a row of `METHODS`.
        settings: further settings of `align`, sorted.
        pool: `other` problems than Stage I's, or the `same`.
    """

    student: str
    seed: int
    split: str
    method: str
    settings: tuple[tuple[str, Any], ...] = ()
    pool: str = "other"

    @property
    def family(self) -> str:
        """The folder of the runs that share anchors and Stage I."""
        return f"{self.student}-{self.split}-{self.pool}-seed{self.seed}"

    @property
    def name(self) -> str:
        """The name of the run's folder within its family."""
        values = [self.method, *(f"{key}={value}" for key, value in self.settings)]
        return ",".join(values).replace(" ", "_").replace("/", "_")

    @property
    def id(self) -> str:
        """A name that no other cell has."""
        return f"{self.family}/{self.name}"


def chosen_cells(
    students: Sequence[str], chosen: Mapping[str, Mapping[str, Mapping[str, Any]]], seeds: Sequence[int]
) -> list[Cell]:
    """Return the table's cells on the test problems, with the chosen settings by student and method."""
    return [
        Cell(student, seed, "test", method, tuple(sorted(_settings(chosen.get(student, {}), method).items())))
        for method in METHODS
        for seed in seeds
        for student in students
    ]


def _settings(chosen: Mapping[str, Mapping[str, Any]], method: str) -> Mapping[str, Any]:
    """Return the chosen settings of a method; where none were, those of `CHOSEN`."""
    return chosen.get(method, CHOSEN.get(method, {}))


def tuning_cells(students: Sequence[str], rates: Sequence[float] = RATES) -> list[Cell]:
    """Return p_sft, and the learning rates for every method with a Stage II, on validation problems."""
    return [Cell(student, TUNING_SEED, "validation", "SFT") for student in students] + [
        Cell(student, TUNING_SEED, "validation", method, (("learning_rate", rate),))
        for student in students
        for method in METHODS
        if method != "SFT"
        for rate in rates
    ]


def choose_settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the settings with the most right sampled answers on validation problems, by student and method."""
    tuned = [row for row in rows if row["split"] == "validation" and row["method"] != "SFT"]
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(tuned, key=lambda row: (sum(row["right"]), row["id"])):  # the last is the best
        chosen.setdefault(row["student"], {})[row["method"]] = dict(row["changed"])
    return chosen
