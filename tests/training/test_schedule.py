"""Every step of a training stage has a learning rate above 0, and the warm-up reaches the configured one.

A stage of a single step has no time for it, and trains at half the rate.
"""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from purld.training.schedule import NoIdleSteps


class Scheduled(NoIdleSteps, Trainer):
    pass


def scheduled(tmp_path, schedule, steps, warmup_ratio):
    """Return a trainer whose optimizer and schedule are made."""
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
    return trainer


def rates(trainer, steps):
    """Take steps and return the learning rate of each."""
    found = []
    for _ in range(steps):
        found.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 20, 80])
def test_no_step_has_a_rate_of_zero(tmp_path, schedule, steps):
    found = rates(scheduled(tmp_path, schedule, steps, 0.05), steps)
    assert min(found) > 0 and max(found) == pytest.approx(0.5 if steps == 1 else 1)


def test_a_linear_schedule_falls_by_equal_parts(tmp_path):
    assert rates(scheduled(tmp_path, "linear", 4, 0.2), 4) == pytest.approx([1 / 2, 1, 2 / 3, 1 / 3])
    assert rates(scheduled(tmp_path, "linear", 5, 0.4), 5) == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    assert rates(scheduled(tmp_path, "linear", 3, 0.0), 3) == pytest.approx([1, 2 / 3, 1 / 3])


def test_a_run_that_is_resumed_in_its_warm_up_has_the_rates_of_one_that_was_not(tmp_path):
    calm, first, resumed = (scheduled(tmp_path, "linear", 5, 0.4) for _ in range(3))
    rates(first, 1)
    for part in ("optimizer", "lr_scheduler"):
        getattr(resumed, part).load_state_dict(getattr(first, part).state_dict())
    assert rates(resumed, 4) == pytest.approx(rates(calm, 5)[1:])
