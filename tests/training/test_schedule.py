"""Every step of a training stage has a learning rate above 0, and the warm-up reaches the configured one."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from purld.training.schedule import NoIdleSteps


class Scheduled(NoIdleSteps, Trainer):
    pass


def rates(tmp_path, schedule, steps, warmup_ratio):
    """Return the learning rate of every step."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        lr_scheduler_type=schedule,
        warmup_steps=warmup_ratio,
        learning_rate=1.0,
        use_cpu=True,
        report_to=[],
    )
    trainer = Scheduled(torch.nn.Linear(1, 1), arguments)
    trainer.create_optimizer_and_scheduler(steps)
    found = []
    for _ in range(steps):
        found.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 20, 80])
def test_no_step_has_a_rate_of_zero(tmp_path, schedule, steps):
    found = rates(tmp_path, schedule, steps, 0.05)
    assert min(found) > 0 and max(found) <= 1
    assert steps < 20 or max(found) == pytest.approx(1, abs=0.02)


def test_a_linear_schedule_falls_by_equal_parts(tmp_path):
    assert rates(tmp_path, "linear", 4, 0.2) == pytest.approx([1 / 2, 1, 2 / 3, 1 / 3])
    assert rates(tmp_path, "linear", 5, 0.4) == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    assert rates(tmp_path, "linear", 3, 0.0) == pytest.approx([1, 2 / 3, 1 / 3])
