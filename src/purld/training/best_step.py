"""Keep the best step of a training stage by a measure of our own, and end the stage when it no longer improves.

`transformers.Trainer` keeps the checkpoint of `state.best_global_step` beside the newest one, and its state is part of
every checkpoint. So a resumed run knows the best step, and how many validations have gone by since.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from purld.config.methods import StageTwoSettings
from purld.training.validation import METRIC, UNSCORED

_STATE = "trainer_state.json"


def validated_steps(settings: StageTwoSettings) -> list[int]:
    """Return the steps after which a stage validates, unless it ends early; 0 is before the first."""
    every = settings.validation_steps
    return [] if every is None else [*range(0, settings.steps, every), settings.steps]


class BestStep(TrainerCallback):
    """Says when to validate, and what a validation decides.

    Args:
        every: steps from one validation to the next; the last step is validated too.
        patience: validations in a row without a better one that end the training; None to train on.
        measure: measures the policy as it is, as a row of metrics.
    """

    def __init__(self, every: int, patience: int | None, measure: Callable[[], dict[str, float]]) -> None:
        self._every, self._patience, self._measure = every, patience, measure

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a validation after every few steps and after the last one."""
        if state.global_step % self._every == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True

    def measure(self) -> dict[str, float]:
        """Measure the policy, as a row of metrics."""
        return self._measure()

    def decide(self, state: TrainerState, control: TrainerControl, metrics: dict[str, float]) -> None:
        """Note whether this step is the best so far, save it if so, and stop if the patience is at its end.

        Of equal steps the later one is kept: it has learnt from more prompts. One that could not be measured is never
        the best.
        """
        value = metrics.get(METRIC)
        if value is not None and (state.best_metric is None or value >= state.best_metric):
            state.best_metric, state.best_global_step = value, state.global_step
            control.should_save = True
        if self.is_over(state):
            control.should_save = control.should_training_stop = True

    def is_over(self, state: TrainerState) -> bool:
        """Return whether training is finished: by its steps, or because nothing was better for too long."""
        if state.global_step >= state.max_steps:
            return True
        rows = [row for row in state.log_history if METRIC in row or UNSCORED in row]
        values = [row.get(METRIC, -math.inf) for row in rows]  # one that could not be measured is not better
        best = [max(values[: end + 1]) for end in range(len(values))]
        since_better = len(values) - best.index(best[-1]) - 1 if max(values, default=-math.inf) > -math.inf else 0
        return self._patience is not None and since_better >= self._patience


def load_state(checkpoint: Path) -> TrainerState:
    """Return the trainer's state in a checkpoint."""
    state: TrainerState = TrainerState.load_from_json(str(checkpoint / _STATE))
    return state
