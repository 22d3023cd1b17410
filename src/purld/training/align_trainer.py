"""The trainer of Stage II: a `transformers.Trainer` whose step is one update on a few groups.

`transformers.Trainer` supplies the optimiser, the schedule, gradient clipping, checkpoints and devices. What differs
between methods is in their rows of `purld.methods.table`; who samples and who scores is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler as IndexSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerState, TrainingArguments

from purld import ranks
from purld.clients.base import Client
from purld.config.methods import GroupSettings, SamplingSettings, SelfPpo, StageTwoSettings
from purld.errors import NotFiniteError
from purld.methods.losses import GroupLoss, GroupTokens
from purld.methods.table import METHODS, StageTwoMethod
from purld.model.causal_lm import CausalLM
from purld.model.critic import ValueHead, model_hidden_size
from purld.model.load import Roles
from purld.model.out_of_memory import is_out_of_memory
from purld.model.sample import Decoding, Sampler, seed_from_content
from purld.model.samplers import make_sampler
from purld.model.shard import divides_gradients
from purld.records import GroupRecord
from purld.runs.files import append_rows, read_rows, write_rows
from purld.runs.thumbnails import prompt_fields
from purld.training.best_step import BestStep, load_state
from purld.training.checkpoints import ModelNamedCheckpoints, RunCallback, make_arguments
from purld.training.context import StageContext
from purld.training.finite import FiniteGuard
from purld.training.first_score import FirstScore
from purld.training.group_update import GroupUpdate, UnmeasuredGroup
from purld.training.memory import divided_memory_error, form_of_update, use_less_memory
from purld.training.metrics import StepMetrics, group_record
from purld.training.remeasure import REMEASURED_GROUPS, remeasure_groups
from purld.training.rollout import AnchoredPrompt, Rollout, RolloutMaker
from purld.training.schedule import NoIdleSteps
from purld.training.scoring import Scorer, ScorerContext, awaits_scores, make_scorer
from purld.training.trackers import tracker_arguments
from purld.training.validation import ValidationSet, Validator

Result = TypeVar("Result")

_CRITIC_FILE = "critic.pt"
# The trainer's own values: its loss is the objective under another name, and the rest are timings and totals.
_NOT_LOGGED = frozenset({"loss", "epoch", "total_flos", "num_input_tokens_seen"})


class AlignTrainer(NoIdleSteps, ModelNamedCheckpoints, Trainer):
    """A Trainer whose step is one update on the groups of `prompts_per_step` prompts, which the ranks of a job share.

    Args:
        context: the student, the run directory and the seed.
        settings: the method's section of the configuration.
        roles: the policy and the frozen p_sft.
        questions: prompts with their anchors.
        sampler: draws candidates; the student's engine unless another is given.
        teacher: the teacher's client, for a method that asks it about candidates.
        change_scorer: replaces the method's scorer by another, for experiments on scores.
        margin_scale: the factor of the margins; 1 is the paper's literal form.
        validation: the prompts that steps are compared on to keep the best; None to keep the last.
        trainer_options: further arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        context: StageContext,
        settings: StageTwoSettings,
        roles: Roles,
        questions: Sequence[AnchoredPrompt],
        sampler: Sampler | None = None,
        teacher: Client | None = None,
        change_scorer: Callable[[Scorer], Scorer] | None = None,
        margin_scale: float = 1.0,
        validation: ValidationSet | None = None,
        **trainer_options: Any,
    ) -> None:
        rate, folder = settings.learning_rate, context.run.checkpoints("align")
        guard = FiniteGuard("Stage II", "align.learning_rate", rate, folder)
        super().__init__(
            model=cast(PreTrainedModel, roles.policy),  # or one under adapters
            args=_trainer_arguments(context, settings, len(questions)),
            train_dataset=list(range(len(questions))),
            data_collator=lambda rows: {"questions": rows},
            callbacks=[guard, RunCallback(context.run, "align", _is_logged, context.progress)],
            **trainer_options,
        )
        self.remove_callback(PrinterCallback)
        self._guard = guard
        self._questions = questions
        self._settings = settings
        self._run = context.run
        self._progress = context.progress
        self._divides_gradients = divides_gradients(context.student)
        self._metrics = StepMetrics()
        self._method = stage_two_method(settings)
        self._measures_kl = _draws_of_policy(settings) and not self._method.anchored_reference
        self._measures_gain = self._measures_kl and _scores_every_draw(self._method, settings)
        self._critic = _make_critic(roles.policy) if self._method.critic else None
        accelerator, encoder = self.accelerator, context.encoder
        form = form_of_update(settings, context.student, roles, questions, half=self.args.bf16)
        self._update = GroupUpdate(
            roles,
            form.micro_batch,
            encoder.pad,
            accelerator.backward,
            accelerator.autocast,
            self._critic,
            settings.importance_cap if isinstance(settings, SamplingSettings) else None,
            form.recompute,
        )
        anchored = self._method.scorer == "anchored"
        parts = ScorerContext(encoder, roles, settings, anchored, accelerator.autocast, teacher, context.check)
        scorer = make_scorer(self._method, parts)
        engine_sampler = partial(make_sampler, context.student, encoder, context.run.engine_files)
        self._make_rollouts = RolloutMaker(
            self._method,
            settings,
            encoder,
            sampler or engine_sampler(_decoding(settings)),
            change_scorer(scorer) if change_scorer else scorer,
            self._update,
            margin_scale,
        )
        self._rollouts: list[Rollout] = []
        self._first_score = FirstScore(settings, awaits_scores(self._method, settings))
        self._best: BestStep | None = None
        if validation is not None and settings.validation_steps is not None:
            validator = Validator(validation, settings, parts, engine_sampler)
            self._best = BestStep(settings.validation_steps, settings.patience, lambda: validator(self.model))
            self.add_callback(self._best)

    def train_from(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the start, and load the step that is kept; `state` tells the steps taken.

        A checkpoint of the last step is only loaded: `train` would take a step before it sees that it is done.
        """
        state = None if checkpoint is None else load_state(checkpoint)
        if checkpoint is not None and state is not None and self._is_over(state):
            self.state = state
            self._load_from_checkpoint(str(checkpoint))
        else:
            ranks.check_same_weights(self.model.parameters())
            if checkpoint is None:
                self._measure_start()
            else:
                self._first_score.continue_from(ranks.on_first(self._logged_steps))
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.kept_step != self.state.global_step:
            self._load_from_checkpoint(str(Path(self.args.output_dir or "") / f"checkpoint-{self.kept_step}"))

    @property
    def kept_step(self) -> int:
        """The step whose policy is kept: the best one, or the last where none were compared."""
        return self.state.best_global_step or self.state.global_step

    def _logged_steps(self) -> list[dict[str, Any]]:
        return [row for row in read_rows(self._run.metrics) if row["stage"] == "align"]

    def _measure_start(self) -> None:
        """Measure p_sft, which the steps are compared with."""
        metrics = {} if self._best is None else self._best.measure()
        if metrics and ranks.is_first():
            self._run.log_metrics("align", 0, metrics)

    def _is_over(self, state: TrainerState) -> bool:
        return state.global_step >= self.args.max_steps if self._best is None else self._best.is_over(state)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compare the policy with those of earlier steps; `_best` says when."""
        assert self._best is not None
        self.model.eval()
        try:
            metrics = self._best.measure()
        except NotFiniteError as error:
            raise self._guard.result_error(error.what, self.state) from None
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._best.decide(self.state, self.control, metrics)
        return metrics

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Make new groups if the last ones are used up, accumulate their gradient, and return the mean objective.

        Raises:
            UserError: the objective or a score is not finite, or the policy's distribution is none.
        """
        try:
            objective = self._make_step(model, inputs)
        except NotFiniteError as error:
            raise self._guard.step_error(error.what, self.state) from None
        self._guard.check_loss(objective, self.state)
        return objective

    def _make_step(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        model.eval()  # dropout off: the policy that is updated is the one that was sampled
        if self._critic is not None:
            self._critic.zero_grad()  # the trainer clears only its own model's gradients
        is_fresh = self.state.global_step % self._settings.updates == 0
        if is_fresh:
            seed = seed_from_content("candidates", self.args.seed, self.state.global_step)
            mine = [self._questions[i] for i in inputs["questions"][ranks.my_share(len(inputs["questions"]))]]
            # A rank that drew again alone would meet the others, where they meet while they draw, at another point.
            meets = self._method.across is not None or self._method.scorer == "teacher"
            draw = partial(self._draw, model, mine, seed)
            self._rollouts = draw() if meets and ranks.count() > 1 else self._within_memory(draw, with_graph=False)
            self._first_score.note([rollout.scores for rollout in self._rollouts])
            for rollout in self._rollouts:
                self._metrics.add_rollout(rollout, scored=self._method.scorer is not None)
        share = 1.0 / len(inputs["questions"])  # of a group, in the step of all ranks
        updated = self._within_memory(lambda: self._step_groups(model, self._rollouts, share), with_graph=True)
        objective, records = torch.zeros((), device=self.args.device), []
        for rollout, found in zip(self._rollouts, updated, strict=True):
            if is_fresh and self._measures_gain:
                self._metrics.add_gain(rollout, None if found is None else found[1])
            if found is not None:
                loss, tokens = found
                objective += share * loss.value
                self._metrics.add_update(loss, tokens, len(rollout.member_candidates), is_fresh and self._measures_kl)
            if is_fresh and rollout.completions:
                early = self.state.global_step * self._settings.prompts_per_step < REMEASURED_GROUPS
                loss_of_group = None if found is None else found[0]
                records.append(group_record(self.state.global_step + 1, rollout, loss_of_group, keep_ids=early))
        self._update.roles.check_trained()
        ranks.sum_gradients(self._trained_weights())
        if is_fresh:
            self._log_groups(records)
        return ranks.sum_tensor(objective)

    def _draw(self, model: CausalLM, questions: Sequence[AnchoredPrompt], seed: int) -> list[Rollout]:
        with self.accelerator.autocast():
            return self._make_rollouts(model, questions, seed)

    def _within_memory(self, work: Callable[[], Result], with_graph: bool) -> Result:
        """Return what `work` returns; where memory is too small to measure or update, do it again with less.

        Sampler and scorers themselves work on less at once where they run out of it.

        Raises:
            UserError: micro-batches of one member with recomputed layers do not fit either, or the ranks divide the
                gradients, so that none of them can begin again by itself.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if with_graph and self._divides_gradients:  # other ranks have added theirs to what is here
                    remedy = "set align.recompute=always, lower align.micro_batch_size"
                    raise divided_memory_error("Stage II", self._step_under_way, remedy) from None
            self.model.zero_grad()
            if self._critic is not None:
                self._critic.zero_grad()
            self._update = use_less_memory(self._update, self._step_under_way, with_graph)
            self._make_rollouts = replace(self._make_rollouts, update=self._update)

    @property
    def _step_under_way(self) -> int:
        """The number of the step that is under way, or of the last one where all have been taken."""
        return min(self.state.global_step + 1, self.args.max_steps)

    def _trained_weights(self) -> list[nn.Parameter]:
        """Return the weights that a step changes, the critic's among them."""
        critic = [] if self._critic is None else self._critic.parameters()
        return [weight for weight in (*self.model.parameters(), *critic) if weight.requires_grad]

    def _step_groups(
        self, model: CausalLM, rollouts: Sequence[Rollout], share: float
    ) -> list[tuple[GroupLoss, GroupTokens] | None]:
        """Add groups' gradients and return their objectives and the tokens they are computed on; None if left out."""

        def objective(rollout: Rollout, tokens: GroupTokens) -> GroupLoss:
            loss: GroupLoss = self._method.loss(tokens, rollout.signal, self._settings)
            return loss

        used = [(r.members, partial(objective, r)) for r in rollouts if r.members is not None and r.usable]
        found = iter(self._update(model, [m for m, _ in used], [o for _, o in used], share))
        return [next(found) if rollout.usable else None for rollout in rollouts]

    def _log_groups(self, records: Sequence[GroupRecord]) -> None:
        """Write the records of a step's groups, in the order of its prompts."""
        records = ranks.gather_rows(records)
        if records and ranks.is_first():
            prompts = {question.prompt.id: question.prompt for question in self._questions}
            path = self._run.groups
            append_rows(path, [asdict(record) | prompt_fields(prompts[record.prompt_id], path) for record in records])

    @torch.no_grad()
    def check_policy(self) -> None:
        """Check that the trained policy's weights and its log-probs of an anchor are finite.

        Raises:
            UserError: they are not.
        """
        self._guard.check_weights(self.model.named_parameters(), self.state)
        question = self._questions[0]
        anchor = self._make_rollouts.encoder.encode_answer(question.anchor, question.anchor_cut).ids
        with self.accelerator.autocast():
            (members,) = self._update.members(self.model, [UnmeasuredGroup(question.encoded, [anchor])], keep_old=True)
        assert members.old is not None
        self._guard.check_result(members.old, self.state)

    def remeasure(self) -> None:
        """Measure the run's first groups under the current policy, if the method has a q to measure."""
        self.model.eval()
        groups = ranks.on_first(lambda: read_rows(self._run.groups))
        if any(group.get("completions") for group in groups):  # minutes for a model on a CPU
            steps = self.state.global_step
            self._progress(steps, steps, "measuring the first groups under the final policy")

        def measure() -> list[dict[str, Any]]:
            return list(remeasure_groups(self.model, self._make_rollouts, self._questions, groups))

        rows = ranks.gather_rows(self._within_memory(measure, with_graph=False))
        if rows and ranks.is_first():
            write_rows(self._run.revisited, rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured since the last log to the trainer's own values."""
        logs.update(self._metrics.drain())
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the trainer's own optimiser, with the critic's weights added at their own learning rate."""
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
            torch.save(self._critic.state_dict(), Path(output_dir) / _CRITIC_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._update.roles.use_policy()
        if self._critic is not None:
            self._critic.load_state_dict(torch.load(Path(resume_from_checkpoint) / _CRITIC_FILE, weights_only=True))


class RepeatedBatches(IndexSampler[int]):
    """Indices of prompts in a random order, each batch `times` over; an epoch's incomplete batch is left out.

    Args:
        count: the number of prompts, at least `batch`.
        batch: prompts per step, on all devices.
        times: steps on the same batch.
        seed: the seed of the order, which is another one in every epoch.
    """

    def __init__(self, count: int, batch: int, times: int, seed: int) -> None:
        self._count, self._batch, self._times, self._seed = count, batch, times, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the trainer calls this, also when it resumes within an epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_from_content("order", self._seed, self._epoch))
        order = torch.randperm(self._count, generator=generator).tolist()
        for start in range(0, self._count - self._batch + 1, self._batch):
            yield from order[start : start + self._batch] * self._times

    def __len__(self) -> int:
        return self._count // self._batch * self._batch * self._times


def stage_two_method(settings: StageTwoSettings) -> StageTwoMethod[Any]:
    """Return the table's row for the method that `settings` belong to.

    Raises:
        ValueError: the method has no second stage.
    """
    name = getattr(settings, "method", None)
    row = METHODS[name].stage_two if name in METHODS else None
    if row is None:
        raise ValueError(f"{name} has no second stage")
    return row


def _draws_of_policy(settings: StageTwoSettings) -> bool:
    """Say whether candidates are drawn from the policy as it is, so that their means are its expectations."""
    return isinstance(settings, SamplingSettings) and settings.temperature == settings.top_p == 1


def _scores_every_draw(method: StageTwoMethod[Any], settings: StageTwoSettings) -> bool:
    """Say whether groups tell what the policy gained over p_sft: they have scores, and none is left out by a margin.

    A margin leaves out the groups whose scores differ least, whose gain is small.
    """
    return isinstance(settings, GroupSettings) and method.scorer is not None and not getattr(settings, "margin", 0)


def _is_logged(key: str) -> bool:
    return key not in _NOT_LOGGED and not key.startswith("train_")


def _make_critic(policy: CausalLM) -> ValueHead:
    # Without touching the global random state: a method with a critic sees the prompts in the order of the others.
    with torch.random.fork_rng(devices=[]):
        return ValueHead(model_hidden_size(policy)).to(next(policy.parameters()).device)


def _decoding(settings: StageTwoSettings) -> Decoding:
    if not isinstance(settings, SamplingSettings):
        return Decoding(temperature=0.0, max_new_tokens=1)  # never used: the method draws nothing
    return Decoding(settings.temperature, settings.max_new_tokens, settings.top_p)


def _trainer_arguments(context: StageContext, settings: StageTwoSettings, prompts: int) -> TrainingArguments:
    return make_arguments(
        TrainingArguments,
        output_dir=str(context.run.checkpoints("align")),
        max_steps=settings.steps,
        per_device_train_batch_size=min(settings.prompts_per_step, prompts),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=1,
        save_steps=min(settings.checkpoint_steps, settings.steps),
        seed=context.seed,
        **tracker_arguments(context.report_to, context.run, "align"),
    )
