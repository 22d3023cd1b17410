"""The schedule of a training stage's learning rate, by transformers, without steps that change nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments


class NoIdleSteps:
    """A mixin for Trainers whose every step has a learning rate above 0.

    transformers' warm-up begins at 0, and a step at 0 draws, scores and perhaps pays for candidates that teach nothing.
    """

    args: TrainingArguments
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Make the schedule; one that warms up is that of one step more, begun after its first."""
        idle = int(self.args.get_warmup_steps(num_training_steps) > 0)
        scheduler: LambdaLR = super().create_scheduler(num_training_steps + idle, optimizer)  # type: ignore[misc]
        if idle:
            scheduler = LambdaLR(scheduler.optimizer, scheduler.lr_lambdas, last_epoch=scheduler.last_epoch)
        self.lr_scheduler = scheduler
        return scheduler
