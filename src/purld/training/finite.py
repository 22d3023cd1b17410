"""Stop a training stage at the first number that is not finite, before it is saved or logged as a result.

What counts: the loss, the gradient, the weights of a checkpoint, a score, and every logged value, such as the
validation loss. A checkpoint that gives a loss or a score that is not finite no longer counts as complete, so the last
one kept is one that the model computed finite numbers from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from purld import ranks
from purld.errors import UserError
from purld.model.causal_lm import CausalLM
from purld.model.weights import WeightsError, check_finite
from purld.training.checkpoints import unmark_checkpoint


class FiniteGuard(TrainerCallback):
    """The checks of one stage; put it before the callback that logs.

    Args:
        stage: the stage's name in messages.
        rate_key: the key of its learning rate.
        rate: the rate.
        checkpoints: the folder of its checkpoints.
    """

    def __init__(self, stage: str, rate_key: str, rate: float, checkpoints: Path) -> None:
        self._stage = stage
        self._rate_key = rate_key
        self._rate = rate
        self._checkpoints = checkpoints

    def check_loss(self, loss: Tensor, state: TrainerState) -> None:
        """Check the loss, a scalar, of the step that is being made.

        Raises:
            UserError: it is not finite.
        """
        if not torch.isfinite(loss):
            raise self.step_error("the loss", state)

    def step_error(self, what: str, state: TrainerState) -> UserError:
        """Return the error for a number, named by `what`, that the model gave in the step that is being made."""
        unmark_checkpoint(self._checkpoints, state.global_step)
        return self._error(what, state, state.global_step + 1)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Check the gradient."""
        groups = [] if optimizer is None else optimizer.param_groups
        gradients = [ranks.local_part(p.grad) for group in groups for p in group["params"] if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise self._error("the gradient", state, state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Check every value that is about to be logged."""
        for name, value in (logs or {}).items():
            if isinstance(value, (int, float)) and not math.isfinite(value):
                raise self._error(_NAMES.get(name, name), state, state.global_step)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: CausalLM | None = None,
        **_: Any,
    ) -> None:
        """Check the trained weights before the checkpoint counts as complete."""
        if model is not None:
            self.check_weights(model.named_parameters(), state)

    def check_weights(self, weights: Iterable[tuple[str, Tensor]], state: TrainerState) -> None:
        """Check the trained ones of named weights.

        Raises:
            UserError: one is not finite.
        """
        try:
            check_finite((name, p.detach()) for name, p in weights if p.requires_grad)
        except WeightsError:
            raise self._error("a weight", state, state.global_step) from None

    def check_result(self, values: Tensor, state: TrainerState) -> None:
        """Check numbers that the trained model gives.

        Raises:
            UserError: one is not finite.
        """
        if not values.isfinite().all():
            raise self.result_error("the trained model's output", state)

    def result_error(self, what: str, state: TrainerState) -> UserError:
        """Return the error of a number that the policy of the last step gave; its checkpoint is not continued from."""
        unmark_checkpoint(self._checkpoints, state.global_step)
        return self._error(what, state, state.global_step)

    def _error(self, what: str, state: TrainerState, step: int) -> UserError:
        if state.global_step == 0:
            advice = "nothing was trained yet, so check the student's weights and student.dtype"
        else:
            advice = "lower it and give the new run another --run-dir; answers that are paid for are not bought again"
        return UserError(
            f"{self._stage} stopped at step {step} of {state.max_steps}: {what} is not finite (NaN or infinity) with "
            f"{self._rate_key}={self._rate:g}; {advice}."
        )


_NAMES = {"eval_loss": "the validation loss", "loss": "the loss", "grad_norm": "the gradient", "score": "a score"}
