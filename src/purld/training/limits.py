"""The limits beyond which a finished Stage II warns, and a figure that is held against one.

The live page turns its lights red or amber at the same limits.
"""

import math
from collections.abc import Mapping
from typing import Any

COLLAPSED_SPREAD = 0.1
"""Of the spread that the candidates' scores had at the start: below it they hardly differ any more."""
UNMOVED_KL = 1e-3
"""In nats per answer: a policy nearer to p_sft answers like it."""
MOST_TRUNCATED = 0.1
"""The share of candidates that may meet the limit on their length."""


def label_uniformity(row: Mapping[str, Any], members: int) -> float | None:
    """Return the entropy of a step's labels over that of uniform ones; None for a method without labels.

    Args:
        row: the step's row of metrics. One of an earlier version has the entropy in nats alone.
        members: the members of a group whose candidates all have a score, which is what is known of such a step.
    """
    share: float | None = row.get("label_uniformity")
    entropy: float | None = row.get("entropy_labels")
    return entropy / math.log(members) if share is None and entropy is not None and members > 1 else share


def loses_spread_by_success(score: str | None) -> bool:
    """Return whether scores of this name grow alike where candidates are right: agreement with the anchor is 0 or 1."""
    return score == "agreement"
