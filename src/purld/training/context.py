"""What both training stages work with, as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from purld.config.schema import Student
from purld.model.encode import Encoder
from purld.runs.run_dir import RunDir
from purld.tasks.checks import Check

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the total, and a short note."""


@dataclass(frozen=True)
class StageContext:
    """The student, and where and how its training is recorded.

    Attributes:
        student: `student` of the configuration.
        encoder: the student's tokenizer with the run's conventions.
        run: the run directory; checkpoints, metrics and the trained model go there.
        seed: the seed of everything random in the stage.
        progress: called after every step.
        report_to: experiment trackers, by name.
        check: compares an answer with a reference; training gives it the anchor as the reference, never gold.
    """

    student: Student
    encoder: Encoder
    run: RunDir
    seed: int
    progress: Progress
    report_to: Sequence[str] = ()
    check: Check | None = None
