"""Say what Stage II gained by its own estimate: the candidates' scores against those that p_sft's would have."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from purld.t_distribution import t_quantile

METRIC = "gain"
"""The metric of a step: the mean over its groups of `purld.methods.score_gain.score_gain`, before the update."""
_LEAST_STEPS = 8  # whose spread tells how sure their mean is


@dataclass(frozen=True)
class GainFacts:
    """The gain over p_sft in the last quarter of the steps, in units of the score, with an interval of about 95%."""

    gain: float
    low: float
    high: float

    def describe(self) -> str:
        """Return the gain as a sentence."""
        told = "" if self.low > 0 or self.high < 0 else ", not told apart from zero"
        return f"Gain in score over the SFT model, by its own estimate: {self._in_words}{told}."

    @property
    def warning(self) -> str | None:
        """Return what the user should look at; None where nothing was lost."""
        if self.high >= 0:
            return None
        return (
            f"by its own estimate Stage II lost score against the SFT model ({self._in_words}); lower "
            "align.learning_rate or raise align.prompts_per_step."
        )

    @property
    def _in_words(self) -> str:
        return f"{self.gain:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def final_gain(rows: Sequence[Mapping[str, Any]]) -> GainFacts | None:
    """Return the gain in the last quarter of the steps; None if too few measured it.

    Args:
        rows: the logged steps of Stage II.
    """
    gains = [row[METRIC] for row in rows if METRIC in row]
    last = gains[-max(_LEAST_STEPS, len(gains) // 4) :]
    if len(last) < _LEAST_STEPS:
        return None
    mean, n = statistics.fmean(last), len(last)
    error = t_quantile(0.975, n - 1) * statistics.stdev(last) / math.sqrt(n)
    return GainFacts(mean, mean - error, mean + error)
