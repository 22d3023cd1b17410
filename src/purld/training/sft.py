"""Stage I: maximum likelihood on the teacher's answers (Eq. 1), by TRL's SFTTrainer.

The loss is taken on the answer alone. Part of the anchors is held out for validation by content, and the
checkpoint with the lowest validation loss becomes p_sft. Choosing the learning rate is left to its user.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from purld.config.schema import Sft, Student
from purld.errors import UserError
from purld.model.encode import Encoder, training_batch
from purld.model.load import load_model, make_trainable, save_model
from purld.model.vision import EncodedPrompt
from purld.records import Anchor, Prompt, content_hash
from purld.runs.run_dir import RunDir
from purld.training.checkpoints import ModelNamedCheckpoints, Progress, RunCallback, device_arguments, last_checkpoint
from purld.training.trackers import tracker_arguments

Lesson = tuple[EncodedPrompt, list[int]]  # a prompt and the token ids of its answer

_LOGGED = frozenset({"loss", "eval_loss", "learning_rate", "grad_norm", "epoch"})


@dataclass(frozen=True)
class SftFacts:
    """What the run should say of Stage I."""

    trained_on: int
    validated_on: int
    anchors_cut: int
    best_step: int
    steps: int


def fine_tune(
    student: Student,
    settings: Sft,
    examples: Sequence[tuple[Prompt, Anchor]],
    encoder: Encoder,
    run: RunDir,
    seed: int,
    progress: Progress,
    report_to: Sequence[str] = (),
) -> SftFacts:
    """Fine-tune p_base on the anchors and save p_sft to `run.sft`; resumes from the last whole checkpoint.

    Raises:
        UserError: no anchors are left to train on.
    """
    rows, held_out, cut = _encoded(examples, encoder, settings.validation_fraction)
    if not rows:
        raise UserError("Stage I: there are no anchors to train on.")
    checkpoints = run.sft / "checkpoints"
    checkpoint, step = last_checkpoint(checkpoints)
    run.rewind_log("sft", step)
    model = make_trainable(student, load_model(student, student.model))
    lessons = [*rows, *held_out]
    trainer = _SftTrainer(
        model=model,
        args=_arguments(
            settings,
            str(checkpoints),
            len(rows),
            seed,
            validate=bool(held_out),
            reporting=tracker_arguments(report_to, run, "sft"),
        ),
        train_dataset=_places(range(len(rows))),
        eval_dataset=_places(range(len(rows), len(lessons))) if held_out else None,
        processing_class=encoder.tokenizer,
        data_collator=lambda batch: training_batch([lessons[row["place"]] for row in batch], encoder.pad),
        callbacks=[RunCallback(run, "sft", _LOGGED, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    # TRL's loss takes the count of tokens itself; some image models deny it, and then micro-batches count alike.
    trainer.model_accepts_loss_kwargs = True
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = True
    save_model(student, trainer.model, encoder, run.sft)
    best = trainer.state.best_global_step or trainer.state.global_step
    shutil.rmtree(checkpoints)
    return SftFacts(len(rows), len(held_out), cut, best, trainer.state.global_step)


class _SftTrainer(ModelNamedCheckpoints, SFTTrainer):
    """TRL's trainer with checkpoints that it can load."""


def in_validation_part(prompt: Prompt, fraction: float) -> bool:
    """Whether a prompt belongs to the validation part: decided by its content, not its place."""
    return int(content_hash(["validation", prompt.id]), 16) / 16**16 < fraction


def _encoded(
    examples: Sequence[tuple[Prompt, Anchor]], encoder: Encoder, fraction: float
) -> tuple[list[Lesson], list[Lesson], int]:
    """Prompts and answers to train on, those to validate on, and how many anchors were cut."""
    train: list[Lesson] = []
    held_out: list[Lesson] = []
    cut = 0
    for prompt, anchor in examples:
        answer = encoder.answer(anchor.text)
        cut += answer.cut
        (held_out if in_validation_part(prompt, fraction) else train).append((encoder.prompt(prompt), answer.ids))
    if not train:  # a pool of a few prompts may fall on one side
        train, held_out = held_out, []
    return train, held_out, cut


def _places(places: Sequence[int]) -> Dataset:
    """What the trainer shuffles: where lessons are; batches are made of the lessons themselves, pictures included."""
    return Dataset.from_dict({"place": list(places)})


def _arguments(
    settings: Sft, folder: str, rows: int, seed: int, validate: bool, reporting: dict[str, Any]
) -> SFTConfig:
    micro = min(settings.micro_batch_size, settings.batch_size)
    accumulate = math.ceil(settings.batch_size / micro)
    steps = math.ceil(math.ceil(rows / (micro * accumulate)) * settings.epochs)
    every = min(settings.checkpoint_steps, steps)
    return SFTConfig(
        output_dir=folder,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        weight_decay=0.0,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        logging_steps=max(1, steps // 100),
        save_steps=every,
        eval_strategy="steps" if validate else "no",
        eval_steps=every,
        load_best_model_at_end=validate,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_total_limit=2,
        gradient_checkpointing=torch.cuda.is_available(),
        seed=seed,
        **device_arguments(),
        **reporting,
    )
