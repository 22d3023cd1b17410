"""Stage II: the policy samples, the frozen p_sft scores, the labels pull (section 3.3, Algorithm 1).

One step takes a batch of prompts; for each it draws K candidates from the moving policy, scores them against
the anchor with p_sft, forms the label distribution D, and accumulates the group's gradient.
`transformers.Trainer` supplies what is not ours: the optimiser, the schedule, clipping, checkpoints, devices.
Nothing here talks to a network.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from purld.config import LdlGrpo, Student
from purld.errors import UserError
from purld.method.labels import log_label_distribution, margins
from purld.records import Anchor, Prompt
from purld.rundir import RunDir, append_rows, read_rows
from purld.student.encode import Encoder
from purld.student.load import Roles, load_roles, save_policy
from purld.student.sample import Completion, Decoding, GenerateSampler, Sampler, seed_from
from purld.student.selfeval import SelfEvaluator
from purld.training.checkpoints import Progress, RunCallback, device_arguments, last_checkpoint
from purld.training.measures import LOGGED, StepMeasures, group_record
from purld.training.trackers import tracker_arguments
from purld.training.update import GroupUpdate


@dataclass(frozen=True)
class AlignFacts:
    """What the run should say of Stage II."""

    prompts: int
    steps: int
    candidates: int
    truncated: int
    unscored: int
    dropped_groups: int
    sharper_than_labels: float

    @property
    def warnings(self) -> list[str]:
        """What the user should look at, a sentence each."""
        found = []
        if self.truncated > self.candidates // 10:
            found.append(f"{self.truncated} of {self.candidates} candidates met the limit align.max_new_tokens.")
        if self.unscored:
            found.append(f"{self.unscored} of {self.candidates} candidates got no score from the evaluator.")
        if self.dropped_groups:
            found.append(f"{self.dropped_groups} groups were left out: fewer than two members had a score.")
        if self.sharper_than_labels > 0.5:
            found.append(
                f"in {self.sharper_than_labels:.0%} of the groups the policy was sharper than its labels, so the "
                "update flattened it; raise align.gamma, lower align.tau, or use align.q=ratio."
            )
        return found


@dataclass(frozen=True)
class Question:
    """A prompt with its anchor, tokenised once for the whole stage."""

    prompt: Prompt
    anchor: str
    head: list[int]


def align(
    student: Student,
    settings: LdlGrpo,
    examples: Sequence[tuple[Prompt, Anchor]],
    encoder: Encoder,
    run: RunDir,
    seed: int,
    progress: Progress,
    report_to: Sequence[str] = (),
) -> AlignFacts:
    """Align p_sft on its own candidates and save the policy to `run.align`; resumes like Stage I.

    Raises:
        UserError: there are no anchors, or the evaluator never gave a usable score.
    """
    if not examples:
        raise UserError("Stage II: there are no anchors to align with.")
    checkpoints = run.align / "checkpoints"
    checkpoint, step = last_checkpoint(checkpoints)
    run.rewind_log("align", step)
    roles = load_roles(student, run.sft)
    trainer = AlignTrainer(
        roles,
        encoder,
        [Question(p, a.text, encoder.prompt(p)) for p, a in examples],
        settings,
        run,
        _arguments(settings, str(checkpoints), seed, tracker_arguments(report_to, run, "align")),
        callbacks=[RunCallback(run, "align", LOGGED, progress)],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    facts = _facts(run, settings, len(examples))
    if facts.dropped_groups == settings.steps * settings.prompts_per_step:
        raise UserError("Stage II: the evaluator never gave a score; use align.score=expected with this student.")
    save_policy(student, roles, run.sft, encoder.tokenizer, run.align)
    shutil.rmtree(checkpoints)
    return facts


class AlignTrainer(Trainer):
    """A Trainer whose step is one LDL-GRPO update of `prompts_per_step` groups.

    Args:
        roles: the policy and the frozen p_sft.
        encoder: the run's encoder.
        questions: prompts with anchors.
        settings: `align` of the configuration.
        run: where groups are logged.
        args: the trainer's own arguments.
        sampler: draws candidates; transformers' `generate` unless another engine is given.
    """

    def __init__(
        self,
        roles: Roles,
        encoder: Encoder,
        questions: Sequence[Question],
        settings: LdlGrpo,
        run: RunDir,
        args: TrainingArguments,
        sampler: Sampler | None = None,
        **trainer_options: Any,
    ) -> None:
        super().__init__(
            model=roles.policy,
            args=args,
            train_dataset=list(range(len(questions))),  # type: ignore[arg-type]
            data_collator=lambda rows: {"questions": rows},
            **trainer_options,
        )
        self.remove_callback(PrinterCallback)
        self._roles = roles
        self._encoder = encoder
        self._questions = questions
        self._settings = settings
        self._run = run
        self._measures = StepMeasures()
        self._evaluator = SelfEvaluator(encoder, settings.score, settings.score_batch_size)
        decoding = Decoding(settings.temperature, settings.max_new_tokens, settings.top_p)
        self._sampler = sampler or GenerateSampler(encoder, decoding)
        self._group_update = GroupUpdate(
            roles,
            settings.q,
            settings.beta,
            settings.micro_batch_size,
            encoder.pad,
            backward=self.accelerator.backward,
            autocast=self.accelerator.autocast,
        )

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Sample, score, label, accumulate the gradient of a batch of prompts; returns Eq. 4's value."""
        model.eval()  # dropout off: the policy that is updated is the one that was sampled
        questions = [self._questions[i] for i in inputs["questions"]]
        seed = seed_from("candidates", self.args.seed, self.state.global_step)
        with self.accelerator.autocast():
            heads = [question.head for question in questions]
            groups = self._sampler(model, heads, self._settings.candidates, seed)
        values = [
            self._step_group(model, question, completions, share=1.0 / len(questions))
            for question, completions in zip(questions, groups)
        ]
        return torch.stack(values).mean()

    def _step_group(self, model: Any, question: Question, completions: list[Completion], share: float) -> Tensor:
        """Add one group's gradient, times `share`; returns the group's objective, zero if it is left out."""
        settings = self._settings
        texts = [self._encoder.text(c.ids) for c in completions]
        with self._roles.frozen() as evaluator, self.accelerator.autocast():
            scores = self._evaluator.score(evaluator, question.prompt, question.anchor, texts)
        scored = [(c.ids, s) for c, s in zip(completions, scores.candidates) if s is not None]
        used = scores.anchor is not None and len(scored) >= 2
        self._measures.add_scores(completions, scores, used)
        if not used:
            return torch.zeros((), device=self.args.device)
        ids = [i for i, _ in scored]
        margin = margins(torch.tensor([s for _, s in scored]), scores.anchor or 0.0)
        log_labels = log_label_distribution(margin, settings.gamma, settings.tau)
        objective = self._group_update(model, question.head, ids, log_labels, share)
        self._measures.add_update(objective, log_labels, margin, torch.tensor([float(len(i)) for i in ids]))
        group = group_record(
            self.state.global_step + 1,
            question.prompt,
            question.anchor,
            texts,
            completions,
            scores,
            log_labels,
            objective,
            settings.gamma,
        )
        append_rows(self._run.groups, [asdict(group) | {"prompt": question.prompt.question}])
        return objective.value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured since the last log to the trainer's own values."""
        logs.update(self._measures.drain())
        super().log(logs, start_time)


def _arguments(settings: LdlGrpo, folder: str, seed: int, reporting: dict[str, Any]) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts_per_step,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=1,
        save_steps=min(settings.checkpoint_steps, settings.steps),
        save_total_limit=2,
        seed=seed,
        **device_arguments(),
        **reporting,
    )


def _facts(run: RunDir, settings: LdlGrpo, prompts: int) -> AlignFacts:
    rows = [row for row in read_rows(run.metrics) if row["stage"] == "align"]

    def total(key: str) -> float:
        return sum(row.get(key, 0.0) for row in rows)

    return AlignFacts(
        prompts=prompts,
        steps=settings.steps,
        candidates=settings.steps * settings.prompts_per_step * settings.candidates,
        truncated=int(total("truncated")),
        unscored=int(total("unscored")),
        dropped_groups=int(total("dropped_groups")),
        sharper_than_labels=total("sharper_than_labels") / max(1, len(rows)),
    )
