"""Hold a plan as lines under headings, and print it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rich.console import Console

from purld.errors import UserError


@dataclass
class Plan:
    """The lines of a plan under their headings, and the problems that keep the run from starting."""

    sections: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add_lines(self, heading: str, *lines: str) -> None:
        """Add lines under a heading."""
        self.sections.setdefault(heading, []).extend(lines)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan.

    Raises:
        UserError: the plan has problems; raised after the plan is printed.
    """
    console = console or Console(highlight=False)
    for heading, lines in plan.sections.items():
        console.print(f"[bold]{heading}[/bold]")
        for line in lines:
            console.print(f"  {line}", markup=False, soft_wrap=True)
    if plan.problems:
        raise UserError(" ".join(plan.problems))


def format_bytes(count: float) -> str:
    """Return a number of bytes in GiB, or in MiB if it is less than one."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{math.ceil(count / 2**20)} MiB"
