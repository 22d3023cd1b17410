"""Stage II: the policy samples, somebody scores, the signal pulls (section 3.3, Algorithm 1).

One step takes a batch of prompts; for each it draws candidates from the moving policy, has them scored, makes a signal
of the scores, and accumulates the gradient of the method's objective. What differs between methods is in a row of
`purld.methods.table`. `transformers.Trainer` supplies what is not ours: the optimiser, the schedule, clipping,
checkpoints, devices. Only a method that the teacher judges talks to a network here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler as IndexSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from purld.clients.base import Client
from purld.config.methods import SelfPpo
from purld.config.methods import SelfScoringSettings as SelfScoringSettings
from purld.config.methods import StageTwoSettings as Settings
from purld.config.schema import Student
from purld.errors import UserError
from purld.methods.losses import GroupLoss, GroupTokens
from purld.methods.table import METHODS, StageTwoMethod
from purld.model.critic import ValueHead, model_hidden_size
from purld.model.encode import Encoder
from purld.model.load import Roles, load_roles, save_policy
from purld.model.sample import Decoding, GenerateSampler, Sampler, seed_from_content
from purld.model.self_evaluation import SelfEvaluator
from purld.records import Anchor, Prompt
from purld.runs.files import append_rows, read_rows, write_rows
from purld.runs.run_dir import RunDir
from purld.runs.thumbnails import logged_question
from purld.training.checkpoints import ModelNamedCheckpoints, Progress, RunCallback, device_arguments, last_checkpoint
from purld.training.group_update import GroupUpdate
from purld.training.metrics import LOGGED, StepMetrics, group_record
from purld.training.remeasure import REMEASURED_GROUPS, remeasure_groups
from purld.training.rollout import AnchoredPrompt, Rollout, RolloutMaker
from purld.training.scoring import Scorer, SelfScorer, TeacherScorer, score_nothing
from purld.training.trackers import tracker_arguments

_CRITIC = "critic.pt"


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
    against_flattening: str

    @property
    def warnings(self) -> list[str]:
        """What the user should look at, a sentence each."""
        found = []
        if self.truncated > self.candidates // 10:
            found.append(f"{self.truncated} of {self.candidates} candidates met the limit align.max_new_tokens.")
        if self.unscored:
            found.append(f"{self.unscored} of {self.candidates} candidates got no score.")
        if self.dropped_groups:
            found.append(f"{self.dropped_groups} groups were left out: their scores gave no signal to learn from.")
        if self.sharper_than_labels > 0.5:
            found.append(
                f"in {self.sharper_than_labels:.0%} of the groups the policy was sharper than its labels, so the "
                f"update flattened it; {self.against_flattening}."
            )
        return found


def align(
    student: Student,
    settings: Settings,
    examples: Sequence[tuple[Prompt, Anchor]],
    encoder: Encoder,
    run: RunDir,
    seed: int,
    progress: Progress,
    report_to: Sequence[str] = (),
    teacher: Client | None = None,
    rescore: Callable[[Scorer], Scorer] | None = None,
) -> AlignFacts:
    """Align p_sft by the method that `settings` are of and save the policy to `run.align`; resumes like Stage I.

    Raises:
        UserError: there are no anchors, or no group ever gave a signal.
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
        [AnchoredPrompt(p, a.text, encoder.prompt(p)) for p, a in examples],
        settings,
        run,
        _arguments(settings, len(examples), str(checkpoints), seed, tracker_arguments(report_to, run, "align")),
        teacher=teacher,
        rescore=rescore,
        callbacks=[RunCallback(run, "align", LOGGED, progress)],
    )
    trainer.go_on(checkpoint, step)
    rows = [row for row in read_rows(run.metrics) if row["stage"] == "align"]
    if not any("objective" in row for row in rows):
        raise UserError(_no_signal(rows, settings))
    trainer.revisit()
    save_policy(student, roles, run.sft, encoder, run.align)
    shutil.rmtree(checkpoints)
    return _facts(rows, settings, len(examples))


class AlignTrainer(ModelNamedCheckpoints, Trainer):
    """A Trainer whose step is one update on `prompts_per_step` groups.

    Args:
        roles: the policy and the frozen p_sft.
        encoder: the run's encoder.
        questions: prompts with anchors.
        settings: `align` of the configuration.
        run: where groups are logged.
        args: the trainer's own arguments.
        sampler: draws candidates; transformers' `generate` unless another engine is given.
        teacher: whom to ask about candidates, for a method that does.
        rescore: puts another scoring in the place of the method's own, for experiments on scores.
    """

    def __init__(
        self,
        roles: Roles,
        encoder: Encoder,
        questions: Sequence[AnchoredPrompt],
        settings: Settings,
        run: RunDir,
        args: TrainingArguments,
        sampler: Sampler | None = None,
        teacher: Client | None = None,
        rescore: Callable[[Scorer], Scorer] | None = None,
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
        self._questions = questions
        self._settings = settings
        self._run = run
        self._measures = StepMetrics()
        self._method = stage_two_method(settings)
        self._critic = _critic(roles.policy) if self._method.critic else None
        accelerator = self.accelerator
        self._update = GroupUpdate(
            roles, settings.micro_batch_size, encoder.pad, accelerator.backward, accelerator.autocast, self._critic
        )
        scoring = _scoring(self._method, settings, encoder, roles, self._update, teacher)
        scoring = rescore(scoring) if rescore else scoring
        sample = sampler or GenerateSampler(encoder, _decoding(settings))
        self._draw = RolloutMaker(self._method, settings, encoder, sample, scoring, self._update)
        self._rollouts: list[Rollout] = []

    def go_on(self, checkpoint: Path | None, step: int) -> None:
        """Train from a checkpoint at `step`, or from the start; at the last step it only loads it."""
        if checkpoint is not None and step >= self.args.max_steps:
            self._load_from_checkpoint(str(checkpoint))  # `train` would take a step before it sees that it is done
        else:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Draw groups if the last ones are used up, accumulate their gradient; returns the objective's mean."""
        model.eval()  # dropout off: the policy that is updated is the one that was sampled
        if self._critic is not None:
            self._critic.zero_grad()  # the trainer does it for its own model alone
        fresh = self.state.global_step % self._settings.updates == 0
        if fresh:
            seed = seed_from_content("candidates", self.args.seed, self.state.global_step)
            with self.accelerator.autocast():
                self._rollouts = self._draw(model, [self._questions[i] for i in inputs["questions"]], seed)
            for rollout in self._rollouts:
                self._measures.add_rollout(rollout, scored=self._method.scorer is not None)
        values = [self._step_group(model, rollout, fresh) for rollout in self._rollouts]
        return torch.stack(values).mean()

    def _step_group(self, model: Any, rollout: Rollout, fresh: bool) -> Tensor:
        """Add one group's gradient; returns the group's objective, zero if it is left out."""
        if rollout.members is None or not rollout.usable:
            return torch.zeros((), device=self.args.device)

        def objective(tokens: GroupTokens) -> GroupLoss:
            loss: GroupLoss = self._method.loss(tokens, rollout.signal, self._settings)
            return loss

        loss, tokens = self._update(model, rollout.members, objective, share=1.0 / len(self._rollouts))
        self._measures.add_update(loss, tokens, candidates=len(rollout.places))
        if fresh and rollout.completions:
            early = self.state.global_step * self._settings.prompts_per_step < REMEASURED_GROUPS
            group = group_record(self.state.global_step + 1, rollout, loss, keep_ids=early)
            asked = logged_question(rollout.question.prompt, self._run.groups)
            append_rows(self._run.groups, [asdict(group) | asked])
        return loss.value

    def revisit(self) -> None:
        """Measure the run's first groups under the policy as it is now, if the method has a q to measure."""
        self.model.eval()
        found = list(remeasure_groups(self.model, self._draw, self._questions, read_rows(self._run.groups)))
        if found:
            write_rows(self._run.revisited, found)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured since the last log to the trainer's own values."""
        logs.update(self._measures.drain())
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The trainer's own, with the critic's weights and their learning rate beside the policy's."""
        optimizer = super().create_optimizer(model)
        if self._critic is not None and isinstance(self._settings, SelfPpo):
            rate = self._settings.value_learning_rate
            optimizer.add_param_group({"params": list(self._critic.parameters()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> IndexSampler[int] | None:
        if self._settings.updates == 1:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.per_device_train_batch_size * self.args.world_size
        return RepeatedBatches(len(self._questions), batch, self._settings.updates, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._critic is not None and output_dir is not None:
            torch.save(self._critic.state_dict(), Path(output_dir) / _CRITIC)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._critic is not None:
            self._critic.load_state_dict(torch.load(Path(resume_from_checkpoint) / _CRITIC, weights_only=True))


class RepeatedBatches(IndexSampler[int]):
    """Places of prompts in a random order, each batch of them `times` over; an epoch's incomplete batch is left out.

    Args:
        count: how many prompts there are, at least `batch`.
        batch: prompts of a step, on all devices.
        times: steps on the same batch.
        seed: of the order, which is another one in every epoch.
    """

    def __init__(self, count: int, batch: int, times: int, seed: int) -> None:
        self._count, self._batch, self._times, self._seed = count, batch, times, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer, also when it resumes within an epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_from_content("order", self._seed, self._epoch))
        order = torch.randperm(self._count, generator=generator).tolist()
        for start in range(0, self._count - self._batch + 1, self._batch):
            yield from order[start : start + self._batch] * self._times

    def __len__(self) -> int:
        return self._count // self._batch * self._batch * self._times


def stage_two_method(settings: Settings) -> StageTwoMethod[Any]:
    """The row of the table that `settings` are of.

    Raises:
        ValueError: the method has no second stage.
    """
    name = getattr(settings, "method", None)
    row = METHODS[name].stage_two if name in METHODS else None
    if row is None:
        raise ValueError(f"{name} has no second stage")
    return row


def _critic(policy: Any) -> ValueHead:
    with torch.random.fork_rng(devices=[]):  # a method with a critic sees the prompts in the order of the others
        return ValueHead(model_hidden_size(policy)).to(next(policy.parameters()).device)


def _decoding(settings: Settings) -> Decoding:
    if not settings.drawn:
        return Decoding(0.0, 1)
    return Decoding(settings.temperature, settings.max_new_tokens, settings.top_p)


def _scoring(
    method: StageTwoMethod[Any],
    settings: Settings,
    encoder: Encoder,
    roles: Roles,
    update: GroupUpdate,
    teacher: Client | None,
) -> Scorer:
    if isinstance(settings, SelfScoringSettings):
        evaluator = SelfEvaluator(encoder, settings.score, settings.score_batch_size)
        return SelfScorer(roles, evaluator, method.scorer == "anchored", update.autocast)
    if method.scorer != "teacher":
        return score_nothing
    if teacher is None:
        raise ValueError("this method asks a teacher, and there is none")
    return TeacherScorer(teacher)


def _arguments(
    settings: Settings, prompts: int, folder: str, seed: int, reporting: dict[str, Any]
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=settings.steps,
        per_device_train_batch_size=min(settings.prompts_per_step, prompts),
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


def _total(rows: Sequence[dict[str, Any]], key: str) -> float:
    return sum(row.get(key, 0.0) for row in rows)


def _no_signal(rows: Sequence[dict[str, Any]], settings: Settings) -> str:
    if any("score" in row for row in rows):
        return "Stage II: no two candidates of a prompt ever had scores that differ enough; lower align.margin."
    if isinstance(settings, SelfScoringSettings):
        return "Stage II: the evaluator never gave a score; use align.score=expected with this student."
    return "Stage II: the teacher never answered with a score between 0 and 1; purld ledger shows what it said."


def _facts(rows: Sequence[dict[str, Any]], settings: Settings, prompts: int) -> AlignFacts:
    return AlignFacts(
        prompts=prompts,
        steps=settings.steps,
        candidates=settings.candidates_in_all,
        truncated=int(_total(rows, "truncated")),
        unscored=int(_total(rows, "unscored")),
        dropped_groups=int(_total(rows, "dropped_groups")),
        sharper_than_labels=_total(rows, "sharper_than_labels") / max(1, len(rows)),
        against_flattening=_advice(settings),
    )


def _advice(settings: Settings) -> str:
    """What mends a policy that is sharper than its labels: against p_sft that is noise, else what it knew before."""
    if getattr(settings, "q", None) == "ratio":
        return "lower align.learning_rate or let it decay (align.schedule)"
    return "raise align.gamma, lower align.tau, or use align.q=ratio"
