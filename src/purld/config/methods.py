"""The sections of Stage II: one per method, built from what methods have in common.

To add a method: write its section here, put it into `Align`, and add its row to `purld.methods.table`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from purld.config.base import (
    Count,
    Fraction,
    LearningRate,
    NonNegative,
    Positive,
    SamplingTemperature,
    Section,
)


class StageTwoSettings(Section):
    """Settings of every method of Stage II: updates, prompts per update, and the optimiser."""

    prompts_per_step: Count = 8
    steps: Count = 200  # updates of the policy, whatever the method
    learning_rate: LearningRate = 1.0e-6  # for all weights; with student.lora 5e-5
    warmup_ratio: Fraction = 0.05
    # linear: falls to 0, so that what was noise of the early updates is given up at the end.
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear"
    max_grad_norm: Positive = 1.0
    # Members per backward pass, of one group or of several whole ones; changes memory and time, not the gradient.
    # auto: 8 on a CPU; on a GPU the groups that fill a pass, as far as half of its memory allows.
    micro_batch_size: Count | Literal["auto"] = "auto"
    # Compute layers again in the backward pass instead of keeping what is in them: less memory, the same gradient, and
    # about a fifth more time for it. auto: where an update would not fit the device's memory otherwise.
    recompute: Literal["auto", "always", "never"] = "auto"
    checkpoint_steps: Count = 50
    # Every so many steps, greedy answers to prompts that no stage trains on are compared, and the policy of the best
    # step is kept; null: the policy of the last step is kept, whatever it does.
    validate_every: Count | None = 50
    # score: the mean anchored score; agreement: how many have the anchor's result; gold: how many are right, which
    # needs references; auto: agreement where data.check finds results, else score.
    validate_by: Literal["auto", "score", "agreement", "gold"] = "auto"
    patience: Count | None = None  # end the stage after so many validations in a row without a better one

    @property
    def rate_falls(self) -> bool:
        """Return whether the learning rate falls to 0 after its warm-up."""
        return self.schedule != "constant_with_warmup"

    @property
    def validation_steps(self) -> int | None:
        """Return the steps from one validation to the next, whole rollouts; None if the last step is kept anyway."""
        if self.validate_every is None:
            return None
        every = -(-self.validate_every // self.updates) * self.updates
        return every if every < self.steps else None

    @property
    def drawn(self) -> int:
        """Return the number of candidates drawn per prompt."""
        return 0

    @property
    def updates(self) -> int:
        """Return the number of updates on the same candidates."""
        return 1

    @property
    def anchor_joins(self) -> bool:
        """Return whether the anchor is a member of a group of candidates, with a label of its own."""
        return False

    @property
    def most_groups(self) -> int:
        """Return the number of groups that the stage makes of a large pool; of a small one it makes no more."""
        return -(-self.steps // self.updates) * self.prompts_per_step

    def passes_over(self, prompts: int, steps: int | None = None) -> tuple[int, int, int]:
        """Return the whole passes over a pool, the groups of each, and those of the pass that the steps break off.

        A step has at most the pool's prompts, and the last one of a pass has what is left; with several updates on the
        same candidates it is left out.

        Args:
            prompts: the size of the pool.
            steps: how many steps were taken; all of the stage's unless given.
        """
        if not prompts:
            return 0, 0, 0
        batch = min(self.prompts_per_step, prompts)
        whole = prompts // batch
        batches = whole if self.updates > 1 else -(-prompts // batch)
        passes, rest = divmod(-(-(self.steps if steps is None else steps) // self.updates), batches)
        return passes, min(batches * batch, prompts), rest * batch

    def groups_drawn(self, prompts: int, steps: int | None = None) -> int:
        """Return how many groups are made of a pool, see `passes_over`."""
        passes, groups, rest = self.passes_over(prompts, steps)
        return passes * groups + rest


class SamplingSettings(StageTwoSettings):
    """Settings of a method that draws one candidate per prompt."""

    temperature: SamplingTemperature = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 512
    # Weigh each candidate by p_trainer / p_engine, at most this; null: not at all. Only another engine than `generate`
    # draws from other numbers than the trainer's.
    importance_cap: Annotated[float, Field(ge=1, le=100)] | None = None

    @model_validator(mode="after")
    def _weights_are_of_the_policy_itself(self) -> Self:
        if self.importance_cap is not None and (self.temperature != 1 or self.top_p != 1):
            raise ValueError(
                "importance_cap weighs by log-probs at temperature 1, which are not those that candidates are drawn by "
                "at another temperature or top_p; set temperature and top_p to 1, or leave importance_cap out"
            )
        return self

    @property
    def drawn(self) -> int:
        """Return the number of candidates drawn per prompt."""
        return 1


class GroupSettings(SamplingSettings):
    """Settings of a method that draws a group of candidates per prompt."""

    candidates: Annotated[int, Field(ge=2)] = 8  # K

    @property
    def drawn(self) -> int:
        """Return the number of candidates drawn per prompt."""
        return self.candidates


ScoreName = Literal["auto", "expected", "verbal", "in_context", "reference", "agreement"]


class SelfScoringSettings(Section):
    """Settings of a method whose candidates are scored by the frozen p_sft, or by their agreement with the anchor."""

    # auto: `agreement` where `data.check` can compare a candidate's result with the anchor's, else `in_context`.
    score: ScoreName = "auto"
    score_batch_size: Count | Literal["auto"] = "auto"  # auto: 16 on a CPU; on a GPU the groups that fill a pass
    weak_signal: Literal["stop", "continue"] = "stop"  # what to do where the probe finds scores without a signal


class RepeatingSettings(StageTwoSettings):
    """Settings of a method that may make several updates on the same candidates."""

    updates_per_rollout: Count = 1

    @property
    def updates(self) -> int:
        """Return the number of updates on the same candidates."""
        return self.updates_per_rollout

    @model_validator(mode="after")
    def _checkpoints_between_rollouts(self) -> Self:
        every, updates = min(self.checkpoint_steps, self.steps), self.updates_per_rollout
        if every < self.steps and every % updates:
            raise ValueError(
                f"checkpoint_steps ({every}) must be a multiple of updates_per_rollout ({updates}): "
                "candidates are not part of a checkpoint"
            )
        return self


class ClippingSettings(RepeatingSettings):
    """Settings of a policy-gradient method, whose updates on the same candidates are clipped."""

    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2


class LdlGrpo(GroupSettings, SelfScoringSettings, RepeatingSettings):
    """Stage II by LDL-GRPO (section 3.3)."""

    method: Literal["ldl_grpo"] = "ldl_grpo"
    # Eq. 3 is `likelihood`; `mean` divides by length; `ratio` divides by p_sft. docs/decisions.md compares.
    q: Literal["ratio", "likelihood", "mean"] = "ratio"
    gamma: Positive = 5.0
    tau: Positive = 1.2
    # literal: margins as in Eq. 2; calibrated: in units of the scorer's own spread, as the probe measured it;
    # auto: literal for scores from 0 to 1 that are meant absolutely, calibrated for the others.
    margin_scale: Literal["auto", "literal", "calibrated"] = "auto"
    beta: NonNegative = 0.01  # weight of KL(p || p_sft), as in every method that has one
    anchor_in_group: bool = False  # the anchor is a member beside the K candidates, with the label of its own score
    # equal: every group counts as in Eq. 4, which weighs a prompt by the inverse of its share of good candidates;
    # positives: by that share, which makes the gradient at p_sft that of the expected label (REINFORCE), unless the
    # anchor is in the group, where it counts as one of the positives. Not for scores with a unit of their own.
    group_weight: Literal["equal", "positives"] = "equal"
    # Leave out a group whose scores are all equal: its labels are uniform, which holds the policy at p_sft there.
    skip_equal_scores: bool = False

    @property
    def anchor_joins(self) -> bool:
        """Return whether the anchor is a member of a group of candidates, with a label of its own."""
        return self.anchor_in_group


class AnchorRankDpo(GroupSettings, SelfScoringSettings):
    """Stage II by DPO on the pairs that the candidates' ranking implies."""

    method: Literal["anchorrank_dpo"]
    beta: Positive = 0.1
    pairs: Literal["all", "extremes"] = "all"  # extremes: only the best candidate against the worst
    margin: NonNegative = 0.0  # a pair counts if its scores differ by more than this


class AnchorGrpo(GroupSettings, SelfScoringSettings, ClippingSettings):
    """Stage II by GRPO, with the anchor-conditioned score as the reward."""

    method: Literal["anchor_grpo"]
    beta: NonNegative = 0.0


class TeacherJudgeGrpo(GroupSettings, ClippingSettings):
    """Stage II by GRPO, with the teacher's score of every candidate as the reward."""

    method: Literal["teacher_judge_grpo"]
    beta: NonNegative = 0.0
    max_tokens_per_score: Count = 16


class SelfPpo(SamplingSettings, SelfScoringSettings, ClippingSettings):
    """Stage II by PPO on the student's score of one candidate, without an anchor."""

    method: Literal["self_ppo"]
    score: Literal["expected", "verbal"] = "expected"  # the others need an anchor
    beta: NonNegative = 0.05  # subtracted from the reward at every token
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    trace: Annotated[float, Field(ge=0, le=1)] = 0.95  # GAE's lambda
    value_clip: Positive = 0.2
    value_learning_rate: LearningRate = 1.0e-3


class SinglePairDpo(SamplingSettings):
    """Stage II by DPO, the anchor preferred over one candidate."""

    method: Literal["singlepair_dpo"]
    beta: Positive = 0.1


class SelfDistillation(GroupSettings):
    """Stage II by distillation of p_sft with the anchor in its context into the policy without it."""

    method: Literal["self_distillation"]
    candidates: Count = 8  # nothing compares them, so one is enough


class SftSft(StageTwoSettings):
    """Stage II by further fine-tuning on the anchors of its prompts."""

    method: Literal["sft_sft"]


class SftOnly(Section):
    """No Stage II: stop after Stage I."""

    method: Literal["sft"]


Align = Annotated[
    LdlGrpo
    | AnchorRankDpo
    | AnchorGrpo
    | SelfDistillation
    | SelfPpo
    | SinglePairDpo
    | SftSft
    | TeacherJudgeGrpo
    | SftOnly,
    Field(discriminator="method"),
]


def has_stage_two(method: str) -> bool:
    """Return whether a method trains in Stage II; one that is not known, as in a run of another version, does."""
    sections = get_args(get_args(Align)[0])
    return not any(
        method in get_args(section.model_fields["method"].annotation) and not issubclass(section, StageTwoSettings)
        for section in sections
    )
