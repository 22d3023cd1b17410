"""Score the candidates of Stage II: by the frozen p_sft, by their results, by the teacher, or not at all.

A scorer is looked up by name in `SCORERS`; `make_scorer` is the one place that decides who scores. A score that could
not be had is None, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from purld import ranks
from purld.clients.base import Client, Reply
from purld.config.methods import SelfScoringSettings, StageTwoSettings
from purld.errors import NotFiniteError, UserError
from purld.methods.table import StageTwoMethod
from purld.model.at_once import AtOnce
from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.likelihood import AnchoredRows, in_context_scores, reference_scores
from purld.model.load import Roles
from purld.model.self_evaluation import GroupScores, GroupTexts, SelfEvaluator, parse_score, score_rows_at_once
from purld.records import Prompt
from purld.tasks.checks import Check, result_check
from purld.templates import rating_turn
from purld.thinking import split_thinking
from purld.training.scoring_tokens import (
    CountTokens,
    expected_tokens,
    in_context_tokens,
    reference_tokens,
    verbal_tokens,
)


@dataclass(frozen=True)
class GroupToScore:
    """One prompt with its anchor and its candidates.

    Attributes:
        prompt: the prompt.
        anchor: the anchor's text.
        candidates: the K candidates' texts.
        ids: the K candidates' token ids as they were drawn, without thinking, with an end-of-turn token if they
            finished; empty if unknown.
        thinking: the number of candidates with thinking before their answer.
        anchor_cut: whether the teacher's reply broke off; see `Anchor`.
    """

    prompt: Prompt
    anchor: str
    candidates: Sequence[str]
    ids: Sequence[Sequence[int]] = ()
    thinking: int = 0
    anchor_cut: bool = False


class Scorer(Protocol):
    """Score groups of candidates; the scores of several groups come back in their order."""

    def __call__(self, groups: Sequence[GroupToScore]) -> list[GroupScores]: ...


@dataclass(frozen=True)
class ScorerContext:
    """The parts that a scorer is made of.

    Attributes:
        encoder: the run's encoder.
        roles: the policy and the frozen p_sft.
        settings: the method's section of the configuration.
        anchored: whether the scorer sees the anchor.
        autocast: the precision to compute in.
        teacher: the teacher's client, for a method that asks it about candidates.
        check: the check of `data.check`, for the scorer that compares results with the anchor's.
    """

    encoder: Encoder
    roles: Roles
    settings: StageTwoSettings
    anchored: bool
    autocast: Callable[[], AbstractContextManager[Any]]
    teacher: Client | None = None
    check: Check | None = None


@dataclass(frozen=True)
class SelfScorer:
    """Score by self-evaluation of the frozen p_sft.

    Attributes:
        roles: which weights are p_sft.
        evaluator: how they are asked.
        anchored: whether they are shown the anchor.
        autocast: the precision to compute in.
    """

    roles: Roles
    evaluator: SelfEvaluator
    anchored: bool
    autocast: Callable[[], AbstractContextManager[Any]]

    def __call__(self, groups: Sequence[GroupToScore]) -> list[GroupScores]:
        """Score groups; see `Scorer`.

        Raises:
            NotFiniteError: a score is not finite.
        """
        with self.roles.frozen() as model, self.autocast():
            texts = [GroupTexts(g.prompt, g.anchor if self.anchored else None, g.candidates) for g in groups]
            scored = self.evaluator.score_groups(model, texts)
        for group, scores in zip(groups, scored, strict=True):
            _check_finite(group, [scores.anchor, *scores.candidates])
        return scored


@dataclass(frozen=True)
class TeacherScorer:
    """Score by the teacher, one question per candidate (Figure 1b), through its client's ledger and caps.

    Every score is in the ledger before it is used, so a resumed run, which draws the same candidates, buys none of
    them again.
    """

    client: Client

    def __call__(self, groups: Sequence[GroupToScore]) -> list[GroupScores]:
        """Score groups; see `Scorer`.

        Raises:
            UserError: a cap of the teacher is reached, or it cannot be asked at all.
        """
        replies = self.client.ask([rating_prompt(g.prompt, text) for g in groups for text in g.candidates])
        capped = [reply for reply in replies if reply.state == "capped"]
        if capped:
            raise UserError(
                f"Stage II: teacher.{capped[0].detail} with {len(capped)} candidates of this step unscored; "
                "raise the cap and run the same command again, no score is paid for twice."
            )
        scores = iter([_score_of(reply) for reply in replies])
        return [GroupScores(None, [next(scores) for _ in g.candidates]) for g in groups]


@dataclass(frozen=True)
class FirstRankScorer:
    """Score the groups of all ranks by a scorer that rank 0 alone may use, because it pays.

    Attributes:
        scorer: the scorer; never called in the other ranks.
    """

    scorer: Scorer

    def __call__(self, groups: Sequence[GroupToScore]) -> list[GroupScores]:
        """Score groups; see `Scorer`."""
        offset, every = ranks.gather_with_offset(groups)
        return ranks.on_first(lambda: self.scorer(every))[offset : offset + len(groups)]


@dataclass(frozen=True)
class LikelihoodScorer:
    """Score by the likelihoods of the frozen p_sft, given the anchor.

    Attributes:
        roles: which weights are p_sft.
        encoder: the run's encoder.
        score_groups: scores token ids; see `purld.model.likelihood`.
        at_once: how many rows go through a forward pass.
        autocast: the precision to compute in.
    """

    roles: Roles
    encoder: Encoder
    score_groups: Callable[[CausalLM, Encoder, Sequence[AnchoredRows], int], list[GroupScores]]
    at_once: AtOnce
    autocast: Callable[[], AbstractContextManager[Any]]

    def __call__(self, groups: Sequence[GroupToScore]) -> list[GroupScores]:
        """Score groups; see `Scorer`.

        Raises:
            NotFiniteError: a score is not finite.
        """
        rows = []
        for group in groups:
            ids = group.ids or [self.encoder.encode_answer(text).ids for text in group.candidates]
            rows.append(AnchoredRows(group.prompt, group.anchor, ids, group.anchor_cut))
        with self.roles.frozen() as model, self.autocast():
            scored = self.at_once(
                lambda size: self.score_groups(model, self.encoder, rows, size),
                sum(1 + len(group.candidates) for group in rows),  # the anchor's row
            )
        for group, scores in zip(groups, scored, strict=True):
            _check_finite(group, [scores.anchor, *scores.candidates])
        # Ids made of the texts need not be the ones that were drawn, nor their log-probs those of the members.
        return [s if group.ids else replace(s, log_probs=None) for group, s in zip(groups, scored)]


@dataclass(frozen=True)
class AgreementScorer:
    """Score 1 if a candidate's result is the anchor's, by the check of `data.check`, and 0 if not.

    The anchor stands in the reference's place: the prompt's own reference is not read. Where the check finds no result
    in the anchor itself, the group is unscored. No model is run.

    Attributes:
        check: compares an answer with a prompt's reference.
    """

    check: Check

    def __call__(self, groups: Sequence[GroupToScore]) -> list[GroupScores]:
        """Score groups; see `Scorer`."""
        return [self._score_group(group) for group in groups]

    def _score_group(self, group: GroupToScore) -> GroupScores:
        agrees = result_check(self.check, group.prompt, group.anchor)
        if agrees is None:
            return GroupScores(None, [None for _ in group.candidates])
        return GroupScores(1.0, [float(agrees(text)) for text in group.candidates])


def _check_finite(group: GroupToScore, scores: Sequence[float | None]) -> None:
    if not all(score is None or math.isfinite(score) for score in scores):
        raise NotFiniteError("the student's score of a candidate", group.prompt.location or group.prompt.id)


def score_nothing(groups: Sequence[GroupToScore]) -> list[GroupScores]:
    """Leave every candidate without a score, for a method that uses none."""
    return [GroupScores(None, [None for _ in g.candidates]) for g in groups]


def rating_prompt(prompt: Prompt, candidate: str) -> Prompt:
    """Return the question that the teacher is asked about a candidate."""
    return Prompt.from_text(rating_turn(prompt.question, candidate), images=prompt.images)


def _score_of(reply: Reply) -> float | None:
    if reply.text is None or reply.state == "refused":
        return None
    return parse_score(split_thinking(reply.text).answer, cut=reply.state == "truncated")


def _make_self_scorer(context: ScorerContext) -> Scorer:
    settings = context.settings
    assert isinstance(settings, SelfScoringSettings) and settings.score in ("expected", "verbal")
    evaluator = SelfEvaluator(context.encoder, settings.score, settings.score_batch_size)
    return SelfScorer(context.roles, evaluator, context.anchored, context.autocast)


def _make_likelihood_scorer(context: ScorerContext, score_groups: Callable[..., list[GroupScores]]) -> Scorer:
    settings = context.settings
    assert isinstance(settings, SelfScoringSettings) and context.anchored
    at_once = score_rows_at_once(settings.score_batch_size)
    return LikelihoodScorer(context.roles, context.encoder, score_groups, at_once, context.autocast)


def _make_teacher_scorer(context: ScorerContext) -> Scorer:
    if context.teacher is None and ranks.is_first():
        raise ValueError("this method asks the teacher about candidates, and there is no teacher")
    return FirstRankScorer(score_nothing if context.teacher is None else TeacherScorer(context.teacher))


def _make_agreement_scorer(context: ScorerContext) -> Scorer:
    assert context.check is not None and context.anchored
    return AgreementScorer(context.check)


def _check_expected(encoder: Encoder, check: Check | None) -> None:
    SelfEvaluator(encoder, "expected", batch_size=1)


def _check_agreement(encoder: Encoder, check: Check | None) -> None:
    if check is None:
        raise UserError(
            "align.score=agreement compares the candidates' results with the anchor's, which needs data.check=math, "
            "choice or exact; set it, or take another score."
        )


@dataclass(frozen=True)
class ScorerEntry:
    """A scorer in the registry.

    Attributes:
        make: makes the scorer.
        check: raises a UserError if this student, or this run's check of answers, cannot score in this way; called
            before anything is paid for.
        count_tokens: counts the tokens that scoring a group sends through the student, for `purld check`; None if no
            model is run, or none of the student's.
        has_own_unit: whether scores have a unit of their own, such as nats, so that `align.margin_scale: auto`
            calibrates their margins; False for scores whose 0 and 1 have a meaning.
        by_prompt: whether a prompt's candidates have a score all or none, as its anchor decides.
    """

    make: Callable[[ScorerContext], Scorer]
    check: Callable[[Encoder, Check | None], None] | None = None
    count_tokens: CountTokens | None = None
    has_own_unit: bool = False
    by_prompt: bool = False


SCORERS: dict[str, ScorerEntry] = {
    "expected": ScorerEntry(_make_self_scorer, _check_expected, expected_tokens),
    "verbal": ScorerEntry(_make_self_scorer, count_tokens=verbal_tokens),
    "in_context": ScorerEntry(
        partial(_make_likelihood_scorer, score_groups=in_context_scores),
        count_tokens=in_context_tokens,
        has_own_unit=True,
    ),
    "reference": ScorerEntry(
        partial(_make_likelihood_scorer, score_groups=reference_scores),
        count_tokens=reference_tokens,
        has_own_unit=True,
    ),
    "agreement": ScorerEntry(_make_agreement_scorer, _check_agreement, by_prompt=True),
    "teacher": ScorerEntry(_make_teacher_scorer),
}
"""Every scorer by name. To add one, add its entry here and its name to `purld.config.methods.ScoreName`."""


def make_scorer(method: StageTwoMethod[Any], context: ScorerContext) -> Scorer:
    """Make the scorer that a method's row and its settings name.

    Raises:
        KeyError: there is no scorer of that name.
    """
    if method.scorer is None:
        return score_nothing
    return find_scorer(scorer_name(method, context.settings)).make(context)


def awaits_scores(method: StageTwoMethod[Any], settings: StageTwoSettings) -> bool:
    """Return whether a method's candidates are scored one by one, so that many without a score say that none will."""
    return method.scorer is not None and not find_scorer(scorer_name(method, settings)).by_prompt


def scorer_name(method: StageTwoMethod[Any], settings: StageTwoSettings) -> str:
    """Return the name of a method's scorer: `teacher`, or what `align.score` says for self-evaluation."""
    return "teacher" if method.scorer == "teacher" else getattr(settings, "score", "")


def find_scorer(name: str) -> ScorerEntry:
    """Return the registry's entry of a scorer.

    Raises:
        KeyError: there is no scorer of that name.
    """
    if name not in SCORERS:
        raise KeyError(f"there is no scorer {name!r}; there are {', '.join(sorted(SCORERS))}")
    return SCORERS[name]
