"""Print a probe on a terminal: one row per scorer, then the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_probe(probe: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the measures of every scorer and the verdict.

    Args:
        probe: the content of probe.json.
        console: where to print; stdout by default.
    """
    console = console or Console(highlight=False)
    aucs = [key for key in ("anchor_auc", "gold_auc") if any(key in row for row in probe["scorers"])]
    titles = {"anchor_auc": "AUC against anchors", "gold_auc": "AUC against gold"}
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    columns = [
        "scorer",
        "known pairs",
        "spread",
        "noise",
        "H(D)/ln K",
        "with length",
        "unscored",
        "s/group",
    ]
    for heading in [*columns, *(titles[key] for key in aucs)]:
        table.add_column(heading, no_wrap=heading == "scorer")
    for row in probe["scorers"]:
        cells = [
            row["name"],
            _rate(row.get("agreement")),
            f"{row['spread']:.3g}",
            f"{row['noise']:.1g}",
            f"{row['label_entropy']:.3f}",
            f"{row['length_correlation']:+.2f}" if "length_correlation" in row else "-",
            f"{row['unscored']:.0%}",
            f"{row['seconds_per_group']:.2f}",
        ]
        table.add_row(*cells, *(_auc(row.get(key)) for key in aucs))
    console.print(table)
    console.print()
    for row in probe["scorers"]:
        if "weakness" in row:
            console.print(f"{row['name']} carries no signal: {row['weakness']}.", soft_wrap=True, markup=False)
    console.print(f"On {probe['prompts']} prompts: {probe['verdict']}", soft_wrap=True, markup=False)


def _rate(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return "-"
    low, high = rate["ci"]
    return f"{rate['rate']:.3f} [{low:.2f}, {high:.2f}]"


def _auc(auc: Sequence[float] | None) -> str:
    if auc is None:
        return "-"
    value, low, high = auc
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"
