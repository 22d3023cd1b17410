"""What a cap left unasked in a finished stage, as the stage's facts in the manifest have it.

A stage that a cap ended is finished, because a user may want to go on with what was bought. Its facts say what is
missing, so that a higher cap lets the same command ask for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from purld.config.clients import CAPS
from purld.config.schema import Config
from purld.runs.run_dir import RunDir

# By who is asked: the section of the configuration that has the caps, and what is asked, of how many.
_ASKED = {
    "teacher": ("teacher", "prompts unasked"),
    "opponent": ("teacher", "held-out prompts without the opponent's answer"),
    "judge": ("evaluate.judge", "questions to the judge unasked"),
}


@dataclass(frozen=True)
class CapShortfall:
    """What one cap left unasked.

    Attributes:
        role: who was to be asked: `teacher`, `opponent` or `judge`.
        cap: the key of the cap in the section of that client, such as `max_calls`.
        limit: its value.
        left: how many prompts or questions were not asked.
        of: of how many.
    """

    role: str
    cap: str
    limit: float
    left: int
    of: int

    @property
    def key(self) -> str:
        """Return the whole key of the cap, such as `evaluate.judge.max_calls`."""
        return f"{_ASKED[self.role][0]}.{self.cap}"

    def is_raised(self, config: Config) -> bool:
        """Return whether the cap is higher now, or gone."""
        value: Any = config
        for name in self.key.split("."):
            value = getattr(value, name, None)
        return value is None or value > self.limit

    def __str__(self) -> str:
        return f"{self.key} ({self.limit}) left {self.left:,} of {self.of:,} {_ASKED[self.role][1]}"


def find_shortfalls(role: str, counts: Mapping[str, int], client: object, of: int) -> list[CapShortfall]:
    """Return what the caps of a client left unasked.

    Args:
        role: who was asked: `teacher`, `opponent` or `judge`.
        counts: how many prompts or questions each cap left unasked, by its key; other keys are ignored.
        client: the client's section of the configuration.
        of: how many were to be asked.
    """
    return [CapShortfall(role, cap, getattr(client, cap), counts[cap], of) for cap in CAPS if counts.get(cap)]


def as_facts(shortfalls: list[CapShortfall]) -> dict[str, Any]:
    """Return shortfalls as facts of a stage; none if nothing is missing."""
    return {"capped": [asdict(shortfall) for shortfall in shortfalls]} if shortfalls else {}


def stage_shortfalls(run: RunDir, stage: str) -> list[CapShortfall]:
    """Return what caps left unasked in a stage; empty if it is not finished.

    Once Stage I has begun, what the anchors lack of the opponent's answers is the evaluation's to ask for.
    """
    found = [CapShortfall(**row) for row in run.finished_stages().get(stage, {}).get("capped", [])]
    return [shortfall for shortfall in found if shortfall.role != "opponent" or may_ask_again(run, stage)]


def may_ask_again(run: RunDir, stage: str) -> bool:
    """Return whether a finished stage may still ask for what a cap left out: the anchors until Stage I has begun."""
    return stage != "anchors" or "sft" not in run.begun_stages()


def describe_shortfalls(run: RunDir, stage: str, shortfalls: Iterable[CapShortfall]) -> list[str]:
    """Return a sentence for each cap that left something out of a stage, with what to do about it."""
    return [f"{shortfall}; {_remedy(run, stage, shortfall.role)}." for shortfall in shortfalls]


def _remedy(run: RunDir, stage: str, role: str) -> str:
    if stage != "anchors":
        return "raise it and run the same command again, which asks for the rest alone"
    if role == "opponent":
        return "raise it, and the same command or the evaluation asks for the rest"
    if may_ask_again(run, stage):
        return "raise it and run the same command again for the rest, as long as Stage I has not begun"
    return "Stage I has begun without them, so they are not used"
