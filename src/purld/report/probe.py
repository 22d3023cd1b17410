"""Make the section on the probe: what each scorer's scores were worth before Stage II."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from purld.report.markup import PageSection, escape_text, wide_table
from purld.report.run_data import RunData

_HEADINGS = ("Scorer", "Known pairs", "Spread", "Noise", "H(D)/ln K", "With length", "Against anchors", "Against gold")


def probe_section(runs: Sequence[RunData]) -> PageSection:
    """Return the section: the verdict and a table of the measured scorers; empty for runs without a probe."""
    parts = []
    for run in runs:
        probe = run.results.get("probe")
        if probe:
            rows = "".join(_scorer_row(row, probe["chosen"]) for row in probe["scorers"])
            verdict = (
                f'<p class="note">On {probe["prompts"]} prompts, without gold: {escape_text(probe["verdict"])}</p>\n'
            )
            heading = f"<h3>{escape_text(run.name)}</h3>" if len(runs) > 1 else ""
            parts.append(heading + wide_table("Scorers in the probe", _HEADINGS, rows) + verdict)
    return PageSection("probe", "Can the student evaluate itself?", "".join(parts))


def _scorer_row(row: Mapping[str, Any], chosen: str) -> str:
    agreement, anchor, gold = row.get("agreement"), row.get("anchor_auc"), row.get("gold_auc")
    cells = (
        _with_interval(agreement["rate"], *agreement["ci"]) if agreement else "–",
        f"{row['spread']:.3g}",
        f"{row['noise']:.1g}",
        f"{row['label_entropy']:.3f}",
        f"{row['length_correlation']:+.2f}" if "length_correlation" in row else "–",
        *(_with_interval(*auc) if auc else "–" for auc in (anchor, gold)),
    )
    name = f"<b>{escape_text(row['name'])}</b>" if row["name"] == chosen else escape_text(row["name"])
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{escape_text(cell)}</td>" for cell in cells)}</tr>'


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"
