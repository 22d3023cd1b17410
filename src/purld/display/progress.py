"""Report the progress of a run: a headline per stage, facts, warnings, and a progress bar or plain lines.

A terminal gets a moving bar, a log file a line every few seconds. Everything goes to stderr, so that stdout holds only
a command's result. No error of the display reaches the work: what cannot be shown is dropped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from purld import ranks
from purld.display.streams import make_unfailing
from purld.errors import printable

_SECONDS_BETWEEN_LINES = 5.0


def _shown(text: str) -> str:
    """Return `text` so that neither the terminal nor rich takes any of it as a command."""
    return escape(printable(text))


class Reporter:
    """A writer of the stages, facts and warnings of a run to a console."""

    def __init__(self, console: Console | None = None) -> None:
        # Of several processes the first alone prints.
        self.console = console or Console(stderr=True, highlight=False, quiet=not ranks.is_first())
        self.console.file = make_unfailing(self.console.file)

    def headline(self, text: str) -> None:
        """Print the headline of a stage."""
        self.console.print(f"[bold]{_shown(text)}[/bold]")

    def say(self, text: str) -> None:
        """Print a fact."""
        self.console.print(f"  {_shown(text)}", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning that the user may want to act on."""
        self.console.print(f"  [yellow]Warning:[/yellow] {_shown(text)}", soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int, str], None]]:
        """Yield a function that shows (done, total, note) under the title `what`."""
        if self.console.is_terminal:
            yield from self._bar(what)
        else:
            yield from self._lines(what)

    def _bar(self, what: str) -> Iterator[Callable[[int, int, str], None]]:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=None, note="")

            def update(done: int, total: int, note: str) -> None:
                bar.update(task, completed=done, total=total, note=_shown(note))

            yield update

    def _lines(self, what: str) -> Iterator[Callable[[int, int, str], None]]:
        last, last_done = time.monotonic(), 0

        def update(done: int, total: int, note: str) -> None:
            nonlocal last, last_done
            now = time.monotonic()
            if done >= total or now - last >= _SECONDS_BETWEEN_LINES:
                # Estimated from the speed since the last line: what an earlier run had done is reported all at once.
                seconds_left = (total - done) * (now - last) / max(1, done - last_done)
                # Nothing done since then says nothing about the rest, as while a batch waits for its turn.
                known = seconds_left and done > last_done
                remaining = f"  about {_format_duration(seconds_left)} left" if known else ""
                self.console.print(
                    f"  {what} {done}/{total}  {printable(note)}{remaining}".rstrip(), markup=False, soft_wrap=True
                )
                last, last_done = now, done

        yield update


def _format_duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
