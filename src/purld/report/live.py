"""Make the parts of the page that a run has only while it is watched: where it stands, and whether it is well."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from purld.display.titles import STAGE_TITLES
from purld.report.health import Light
from purld.report.markup import PageSection, capitalised, escape_text


@dataclass(frozen=True)
class LiveStatus:
    """What a watched run is doing.

    Attributes:
        stages: the stages that take part, in order, each with its state as in `purld status`.
        running: whether a process works on the run; None if that cannot be known.
        current: the stage that has begun and is not finished; None between stages.
        details: what that stage has done and how long it will take, in words.
        share: the share of its steps that are done; None for a stage without steps.
        lights: the health of Stage II.
        written: when the page is written, in seconds since 1970.
        every: seconds after which the page loads itself again; None if nobody rewrites it any more.
    """

    stages: Sequence[tuple[str, str]]
    running: bool | None
    current: str | None
    details: Sequence[str]
    share: float | None
    lights: Sequence[Light]
    written: float
    every: float | None


def live_headline(status: LiveStatus) -> str:
    """Return the top of the page: the stage with its steps and the time left, all stages, and the page's age."""
    details = "".join(f"{escape_text(capitalised(line))}. " for line in status.details if line)
    numbers = f' <span class="numbers">{details.strip()}</span>' if details else ""
    tone = "worse" if status.running is False else "better"
    bar = ""
    if status.share is not None:
        width = f"{100 * min(1.0, status.share):.1f}%"
        bar = f'<div class="progress" aria-hidden="true"><i style="width:{width}"></i></div>\n'
    claim = escape_text(_claim(status))
    return f'<h1 class="verdict {tone}">{claim}{numbers}</h1>\n{bar}{_stage_list(status)}{_age(status)}'


def _claim(status: LiveStatus) -> str:
    if status.current is None:
        done = all(state in ("done", "capped") for _, state in status.stages)
        return "All stages are finished." if done else "Between two stages."
    title = STAGE_TITLES[status.current]
    stopped = " Nothing works on it now." if status.running is False else ""
    return f"{title.rstrip('?')}{'?' if title.endswith('?') else '.'}{stopped}"


def _stage_list(status: LiveStatus) -> str:
    classes = {"done": "done", "capped": "done", "running": "now", "begun": "now", "stopped": "stopped"}
    items = "".join(
        f'<li class="{classes.get(state, "next")}">{escape_text(short_stage_title(stage))}</li>'
        for stage, state in status.stages
    )
    return f'<ol class="stages" aria-label="Stages">{items}</ol>\n'


def short_stage_title(stage: str) -> str:
    """Return the first words of a stage's title: "Stage II" of "Stage II: alignment"."""
    return STAGE_TITLES.get(stage, stage).partition(":")[0].partition(" on ")[0]


def _age(status: LiveStatus) -> str:
    """Return the note on when the page was written, which live.js keeps up to date."""
    when = time.strftime("%H:%M:%S", time.localtime(status.written))
    told = "it loads itself again" if status.every else "it is not written any more"
    every = f"{status.every:g}" if status.every else "0"
    return (
        f'<p class="note" id="age" data-written="{status.written:.0f}" data-every="{every}">'
        f"Written at {when}; {told}.</p>\n"
    )


def health_section(lights: Sequence[Light]) -> PageSection:
    """Return the section with a light per signal of Stage II; its colour is also a word."""
    items = "".join(
        f'<li class="{light.colour}"><b>{escape_text(light.name)}</b> <span class="state">{light.colour}</span>'
        f'<span class="value">{escape_text(light.value)}</span>'
        f'<span class="why">{escape_text(light.reason)}</span></li>'
        for light in lights
    )
    return PageSection("health", "Health of Stage II", f'<ul class="lights">{items}</ul>\n' if items else "")
