"""The schedule of a training stage's learning rate, by transformers, without steps that change nothing."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler


class NoIdleSteps:
    """A mixin for Trainers whose every step has a learning rate above 0.

    transformers' warm-up begins at 0, and a step at 0 draws, scores and perhaps pays for candidates that teach nothing.
    """

    args: TrainingArguments
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Make the schedule; one that warms up does so for one step more, and is begun after its first.

        W steps of warm-up have the rates 1/(W+1) to W/(W+1) of the configured one.
        """
        plain: LambdaLR = super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if warm_up := self.args.get_warmup_steps(num_training_steps):
            kind = self.args.lr_scheduler_type
            longer: Any = get_scheduler(kind, plain.optimizer, warm_up + 1, num_training_steps + 1)
            self.lr_scheduler = LambdaLR(plain.optimizer, longer.lr_lambdas, last_epoch=0)
        return cast(LambdaLR, self.lr_scheduler)
