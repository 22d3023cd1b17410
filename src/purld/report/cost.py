"""Make the section on cost: calls to the teacher, tokens, money and time."""

from __future__ import annotations

from collections.abc import Sequence

from purld.report.live import short_stage_title
from purld.report.markup import PageSection, escape_text
from purld.report.run_data import RunData

_SPEND = {
    "prompts": "prompts",
    "answered": "answered",
    "calls": "calls",
    "input_tokens": "tokens in",
    "output_tokens": "tokens out",
    "cost": "cost",
}


def cost_section(runs: Sequence[RunData]) -> PageSection:
    """Return the section: calls, tokens and cost, the calls that were saved, and the time of each stage."""
    parts = []
    for run in runs:
        body = _teacher_tiles(run) + _saved_calls(run) + _stage_times(run)
        parts.append(f"<h3>{escape_text(run.name)}</h3>{body}" if body and len(runs) > 1 else body)
    return PageSection("spend", "Cost and time", "".join(parts))


def _teacher_tiles(run: RunData) -> str:
    teacher = run.results.get("teacher", {})
    tiles = "".join(
        f"<div><dd>{_format_amount(teacher[key])}</dd><dt>{name}</dt></div>"
        for key, name in _SPEND.items()
        if key in teacher and (key != "cost" or teacher[key])
    )
    return f'<h3>Calls to the teacher</h3><dl class="tiles">{tiles}</dl>\n' if tiles else ""


def _format_amount(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _saved_calls(run: RunData) -> str:
    """Return a note on the number of calls that a teacher judging every candidate would have answered."""
    align, steps = run.config.get("align", {}), run.stage_metrics("align")
    if not steps or "candidates" not in align or "prompts_per_step" not in align:
        return ""
    if not any("score" in row for row in steps):
        return ""
    if "score" not in align:  # no scorer of the student's is configured, so it was the teacher
        return '<p class="note">The teacher scored every candidate; the calls above include these.</p>\n'
    scored = int(sum(row.get("drawn", 0) for row in steps))
    if not scored:  # a run of an earlier version; of a small pool a step has fewer prompts than this
        scored = steps[-1]["step"] * align["prompts_per_step"] * align["candidates"]
        scored //= align.get("updates_per_rollout", 1)
    return (
        f'<p class="note">Stage II sampled and scored {scored:,} candidates without the teacher; '
        f"with the teacher as judge, each would have been one more call.</p>\n"
    )


def _stage_times(run: RunData) -> str:
    seconds = {stage: s for stage, s in run.results.get("seconds", {}).items() if s > 0}
    if not seconds:
        return ""
    longest = max(seconds.values())
    rows = "".join(
        f'<div><dt>{escape_text(short_stage_title(stage))}</dt><dd><i style="width:{70 * s / longest:.1f}%"></i>'
        f"{_format_duration(s)}</dd></div>"
        for stage, s in seconds.items()
    )
    return f'<h3>Time</h3><dl class="times">{rows}</dl>\n'


def _format_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
