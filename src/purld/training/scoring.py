"""Who scores candidates in Stage II: the frozen p_sft with or without the anchor, the teacher, or nobody.

A score that could not be had is None, never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from purld.clients.base import Client, Reply
from purld.errors import UserError
from purld.model.load import Roles
from purld.model.self_evaluation import GroupScores, SelfEvaluator, parse_score
from purld.records import Prompt
from purld.templates import rating_turn


@dataclass(frozen=True)
class GroupToScore:
    """One prompt with its anchor and the texts of its candidates."""

    prompt: Prompt
    anchor: str
    candidates: Sequence[str]


Scorer = Callable[[Sequence[GroupToScore]], list[GroupScores]]
"""Scores of several groups, in their order."""


@dataclass(frozen=True)
class SelfScorer:
    """Scores by the frozen p_sft.

    Attributes:
        roles: who p_sft is.
        evaluator: how it is asked.
        anchored: whether it is shown the anchor.
        autocast: the precision to compute in.
    """

    roles: Roles
    evaluator: SelfEvaluator
    anchored: bool
    autocast: Callable[[], AbstractContextManager[Any]]

    def __call__(self, groups: Sequence[GroupToScore]) -> list[GroupScores]:
        """See `Scorer`."""
        with self.roles.frozen() as model, self.autocast():
            return [
                self.evaluator.score(model, g.prompt, g.anchor if self.anchored else None, g.candidates) for g in groups
            ]


@dataclass(frozen=True)
class TeacherScorer:
    """Scores by the teacher, one question a candidate (Figure 1b), through its client's ledger and caps.

    Every score is in the ledger before it is used, so that a resumed run, which draws the same candidates, buys none
    of them again.
    """

    client: Client

    def __call__(self, groups: Sequence[GroupToScore]) -> list[GroupScores]:
        """See `Scorer`.

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
        scores = iter([_score(reply) for reply in replies])
        return [GroupScores(None, [next(scores) for _ in g.candidates]) for g in groups]


def score_nothing(groups: Sequence[GroupToScore]) -> list[GroupScores]:
    """Nobody scores."""
    return [GroupScores(None, [None for _ in g.candidates]) for g in groups]


def rating_prompt(prompt: Prompt, candidate: str) -> Prompt:
    """What the teacher is asked about a candidate."""
    return Prompt.from_text(rating_turn(prompt.question, candidate), images=prompt.images)


def _score(reply: Reply) -> float | None:
    return None if reply.text is None or reply.state == "refused" else parse_score(reply.text)
