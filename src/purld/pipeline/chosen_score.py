"""Choose the scorer of a run whose `align.score` is auto: by what the run can compare, before anything is paid for.

The choice reads the configuration alone, no gold and no scores. docs/decisions.md says why it is not made by a
measurement.
"""

from __future__ import annotations

from purld.config.methods import ScoreName, SelfScoringSettings
from purld.config.schema import Config
from purld.tasks.checks import reads_results


def with_chosen_score(config: Config) -> Config:
    """Return the configuration with the scorer's name in place of `auto`."""
    align = config.align
    if not isinstance(align, SelfScoringSettings) or align.score != "auto":
        return config
    score: ScoreName = "agreement" if reads_results(config.data) else "in_context"
    return config.model_copy(update={"align": align.model_copy(update={"score": score})})


def describe_score(config: Config, chosen: Config) -> str | None:
    """Describe the run's scorer in one line and why it was chosen; None for a method without one."""
    before, align = config.align, chosen.align
    if not isinstance(before, SelfScoringSettings) or not isinstance(align, SelfScoringSettings):
        return None
    if before.score != "auto":
        return f"scores: {align.score}"
    reason = "compares results with the anchor's" if align.score == "agreement" else "finds no result to compare"
    return f"scores: {align.score} (align.score is auto, and data.check {reason})"
