"""A plan as lines under headings, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console

from purld.errors import UserError


@dataclass
class Plan:
    """Lines under headings, and what stands in the way."""

    sections: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, heading: str, *lines: str) -> None:
        """Add lines under a heading."""
        self.sections.setdefault(heading, []).extend(lines)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan.

    Raises:
        UserError: something stands in the way of the run; named after the plan is shown.
    """
    console = console or Console(highlight=False)
    for heading, lines in plan.sections.items():
        console.print(f"[bold]{heading}[/bold]")
        for line in lines:
            console.print(f"  {line}", markup=False, soft_wrap=True)
    if plan.problems:
        raise UserError(" ".join(plan.problems))
