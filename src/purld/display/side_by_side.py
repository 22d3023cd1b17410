"""Print models' answers to one prompt: in columns where the terminal is wide enough, else one below the other."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from purld.errors import printable

LEAST_WIDTH = 30  # characters of a column; in narrower ones prose is hard to read
_GAP = 3


def print_side_by_side(titles: Sequence[str], texts: Sequence[str], console: Console) -> None:
    """Print texts under their titles.

    Args:
        titles: one per text.
        texts: the texts; nothing in them is taken as a command to the terminal.
        console: where to print; its width decides.
    """
    if console.width < len(titles) * (LEAST_WIDTH + _GAP):
        for title, text in zip(titles, texts, strict=True):
            console.print(Text(title, style="bold"))
            console.print(Text(printable(text)))
        console.print()
        return
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(Text(title), ratio=1, overflow="fold")
    table.add_row(*(Text(printable(text)) for text in texts))
    console.print(table)
    console.print()
