"""One line of `purld doctor`: what was looked at, whether it is in order, and what to do if it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What was found about one subject.

    Attributes:
        verdict: `wrong` keeps a run from starting or from finishing; `warning` may.
        subject: what was looked at, in a word.
        text: what was found.
        remedy: what to do; empty if nothing has to be done.
    """

    verdict: Verdict
    subject: str
    text: str
    remedy: str = ""
