"""Compare the steps of Stage II on prompts that no stage trains on, so that the best of them can be kept.

The policy answers every prompt greedily, and its answers are measured by the frozen p_sft's score given the anchor, by
their agreement with the anchor's result, or, only where the configuration asks for it, by gold. Nothing is random here,
so a resumed run finds the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from purld import ranks
from purld.config.methods import LdlGrpo, SamplingSettings, SelfScoringSettings, StageTwoSettings
from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.log_probs import BatchSize, micro_batches
from purld.model.sample import Completion, Decoding, Sampler
from purld.model.self_evaluation import GroupScores
from purld.records import Anchor, Prompt
from purld.tasks.checks import Check, gold_check, result_check
from purld.training.memory import largest_share
from purld.training.rollout import AnchoredPrompt, candidates_to_score
from purld.training.scoring import GroupToScore, Scorer, ScorerContext, find_scorer

GOLD = "gold"
METRIC = "eval_score"  # of the rows in metrics.jsonl
UNSCORED = "eval_unscored"  # the number of answers without a score, in every row of a validation
_LEAST_SCORED = 0.5  # of the answers: the mean of fewer is of other prompts than at the other steps


@dataclass(frozen=True)
class ValidationSet:
    """The prompts that steps are compared on, and how.

    Attributes:
        examples: prompts that no stage trains on, with their anchors.
        measure: the name of a scorer, or `gold`.
        check: for `gold` the check of answers; for `agreement` a check that reads the reference alone.
        max_new_tokens: the longest answer, for a method that draws none itself.
    """

    examples: Sequence[tuple[Prompt, Anchor]]
    measure: str
    check: Check | None = None
    max_new_tokens: int = 512

    def measurable(self) -> ValidationSet:
        """Return the set without the prompts on which the check has nothing to compare with."""
        if self.check is None or self.measure not in (GOLD, "agreement"):
            return self
        kept = [(p, a) for p, a in self.examples if _reads_reference(self.check, p, a, self.measure)]
        return ValidationSet(kept, self.measure, self.check, self.max_new_tokens)


@dataclass(frozen=True)
class ValidationFacts:
    """The outcome of the validations, for the manifest and results.json.

    Attributes:
        measure: see `ValidationSet`.
        prompts: how many prompts there were.
        kept_step: the step whose policy is kept.
        steps: the validated steps; 0 is p_sft.
        scores: what was measured at them, the mean over prompts.
        unmeasured: the steps at which too few answers got a score, so that they were not compared.
    """

    measure: str
    prompts: int
    kept_step: int
    steps: Sequence[int]
    scores: Sequence[float]
    unmeasured: Sequence[int] = ()

    def describe(self) -> str:
        """Describe which step is kept and why."""
        by_step = dict(zip(self.steps, self.scores, strict=True))
        if self.kept_step not in by_step:
            return (
                f"At no step of Stage II did half of the answers to the {self.prompts} validation prompts get a score; "
                "the last step is kept."
            )
        others = [f"{by_step[0]:.3f} before Stage II"] if 0 in by_step else []
        if self.steps[-1] != self.kept_step:
            others.append(f"{self.scores[-1]:.3f} at step {self.steps[-1]}")
        return (
            f"Kept the policy of step {self.kept_step}: {self.measure} {by_step[self.kept_step]:.3f} on "
            f"{self.prompts} validation prompts ({', '.join(others) or 'the only validation'})."
        )

    @property
    def warnings(self) -> list[str]:
        """Return a sentence if no step was better than p_sft, and one if steps could not be compared."""
        by_step = dict(zip(self.steps, self.scores, strict=True))
        warnings = []
        if 0 in by_step and self.kept_step in by_step and by_step[self.kept_step] <= by_step[0]:
            warnings.append(
                f"no step of Stage II was better than p_sft on the {self.prompts} validation prompts ({self.measure} "
                f"{by_step[self.kept_step]:.3f} against {by_step[0]:.3f}); the best of them is kept, and "
                "`purld export --stage sft` exports p_sft."
            )
        if self.unmeasured:
            outcome = "none of these could be kept as the best"
            if self.kept_step in self.unmeasured:
                outcome = (
                    "the last step, which could not be compared with p_sft, is kept, and `purld export --stage sft` "
                    "exports p_sft"
                )
            warnings.append(
                f"under half of the answers to the {self.prompts} validation prompts got a score at "
                f"{len(self.unmeasured)} of {len(self.steps) + len(self.unmeasured)} validations (first at step "
                f"{self.unmeasured[0]}), and {outcome}; use another align.score."
            )
        return warnings


class Validator:
    """Measures a policy on a validation set.

    Args:
        chosen: the prompts and the measure.
        settings: the method's section of the configuration.
        context: what scorers are made of.
        make_sampler: makes the sampler of a way of decoding.
    """

    def __init__(
        self,
        chosen: ValidationSet,
        settings: StageTwoSettings,
        context: ScorerContext,
        make_sampler: Callable[[Decoding], Sampler],
    ) -> None:
        limit = settings.max_new_tokens if isinstance(settings, SamplingSettings) else chosen.max_new_tokens
        self._encoder: Encoder = context.encoder
        self._autocast: Callable[[], AbstractContextManager[Any]] = context.autocast
        self._questions = [AnchoredPrompt(p, a.text, self._encoder.encode_prompt(p), a.cut) for p, a in chosen.examples]
        self._sampler = make_sampler(Decoding(0.0, limit))
        self._scorer = _make_scorer(chosen, settings, context)
        self._batch = largest_share(settings) * max(1, settings.drawn)  # as many sequences as a step draws here at once

    @torch.no_grad()
    def __call__(self, policy: CausalLM) -> dict[str, float]:
        """Return the row of metrics for greedy answers, which the ranks share; see `validation_metrics`."""
        scores: list[float | None] = []
        mine = self._questions[ranks.my_share(len(self._questions))]
        for rows in micro_batches(len(mine), self._batch):
            batch = mine[rows]
            with self._autocast():
                drawn = self._sampler(policy, [question.encoded for question in batch], 1, [0] * len(batch))
            groups = [self._to_score(question, completions) for question, completions in zip(batch, drawn)]
            scores += [scored.candidates[0] for scored in self._scorer(groups)]
        return validation_metrics(ranks.gather_rows(scores))

    def _to_score(self, question: AnchoredPrompt, completions: Sequence[Completion]) -> GroupToScore:
        return candidates_to_score(self._encoder, question, completions)


def validation_metrics(scores: Sequence[float | None]) -> dict[str, float]:
    """Return how many of the answers have no score, and the mean of the others, without which a step is not compared.

    The mean is left out where under half have a score: a policy whose answers mostly get none would be told by the few
    that do.
    """
    known = [score for score in scores if score is not None]
    metrics = {UNSCORED: float(len(scores) - len(known))}
    if known and len(known) >= _LEAST_SCORED * len(scores):
        metrics[METRIC] = sum(known) / len(known)
    return metrics


def validation_rows(settings: StageTwoSettings) -> BatchSize:
    """Return how many rows a validation scores at once."""
    return settings.score_batch_size if isinstance(settings, SelfScoringSettings) else settings.micro_batch_size


def _make_scorer(chosen: ValidationSet, settings: StageTwoSettings, context: ScorerContext) -> Scorer:
    if chosen.measure == GOLD:
        assert chosen.check is not None
        return _GoldScorer(chosen.check)
    own = LdlGrpo.model_validate({"score": chosen.measure, "score_batch_size": validation_rows(settings)})
    found = ScorerContext(context.encoder, context.roles, own, True, context.autocast, None, chosen.check)
    return find_scorer(chosen.measure).make(found)


@dataclass(frozen=True)
class _GoldScorer:
    """Score 1 for a right answer and 0 for a wrong one."""

    check: Check

    def __call__(self, groups: Sequence[GroupToScore]) -> list[GroupScores]:
        return [GroupScores(None, [float(self.check(g.prompt, text)) for text in g.candidates]) for g in groups]


def _reads_reference(check: Check, prompt: Prompt, anchor: Anchor, measure: str) -> bool:
    found = gold_check(check, prompt) if measure == GOLD else result_check(check, prompt, anchor.text)
    return found is not None
