"""Stop Stage II early where no candidate ever gets a score: the rest would be drawn, and paid for, in vain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from purld import ranks
from purld.config.methods import SelfScoringSettings, StageTwoSettings
from purld.errors import UserError
from purld.model.self_evaluation import GroupScores

ENOUGH_ASKED = 32
"""So many candidates without a single score are no chance: an evaluator that scores one in five would have by then."""


def describe_no_score(settings: StageTwoSettings) -> str:
    """Say that no candidate of the stage got a score, and what to do."""
    if isinstance(settings, SelfScoringSettings):
        other = "in_context" if settings.score == "expected" else "expected"
        return f"Stage II: the evaluator never gave a score; use align.score={other} with this student."
    return (
        "Stage II: no candidate got a score from the teacher: purld ledger RUN --export FILE writes what it said, or "
        "that it did not answer; raise align.max_tokens_per_score, or take another teacher."
    )


class FirstScore:
    """The wait for the first score of a stage, in all ranks together.

    Args:
        settings: the method's section of the configuration.
        awaited: whether candidates are scored one by one; else nothing is awaited.
    """

    def __init__(self, settings: StageTwoSettings, awaited: bool) -> None:
        self._settings = settings
        self._awaited = awaited
        self._asked = 0

    def continue_from(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the logged steps of a stage that was stopped."""
        self._awaited = self._awaited and not any("score" in row for row in rows)
        self._asked = int(sum(row.get("unscored", 0.0) for row in rows))

    def note(self, scores: Sequence[GroupScores]) -> None:
        """Note the scores of the groups that this rank drew.

        Raises:
            UserError: enough candidates of all ranks were asked about, and none has a score.
        """
        if not self._awaited:  # the same in every rank
            return
        scored = ranks.gather_rows([score is not None for group in scores for score in group.candidates])
        self._awaited = not any(scored)
        self._asked += len(scored)
        if self._awaited and self._asked >= ENOUGH_ASKED:
            raise UserError(describe_no_score(self._settings))
