"""What is shown on a terminal holds nothing that a terminal obeys."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from purld.display.progress import Reporter
from purld.errors import one_line, printable

CASES = {
    "plain, é, 超长 🤝": "plain, é, 超长 🤝",
    "two\nlines": "two\nlines",
    "\x1b[31mred\x1b[0m": "red",
    "\x1b]0;title\x07text": "text",
    "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\": "link",
    "\x1b(B\x1b=a": "a",
    "\x9b2Ja\x9dtitle\x9c": "2Jatitle",
    "a\rb\tc\x0bd": "a b c d",
    "a\x00b\x07c\x7fd\x08": "abcd",
    "\u202ereversed\u2066\u200f\u061c": "reversed",
    "zero\u200bwidth\ufeff\u00ad": "zerowidth",
    "lone \ud800": "lone ",
    "no\u00a0break\u2028line": "no break line",
}


@pytest.mark.parametrize("text", CASES, ids=ascii)
def test_printable(text):
    assert printable(text) == CASES[text]
    assert printable(printable(text)) == printable(text)


def test_one_line_is_short_and_takes_little_time_on_a_long_text():
    assert one_line("a \n\t b" + "c" * 10**7, 10) == "a bccccccc"


def test_a_reporter_shows_no_escape_sequence():
    out = io.StringIO()
    reporter = Reporter(Console(file=out, force_terminal=False))
    for show in (reporter.headline, reporter.say, reporter.warn):
        show("\x1b[2J[bold]\u202ewords\x07")
    with reporter.progress("what") as progress:
        progress(1, 1, "note\x1b[2J\u202e")
    shown = out.getvalue()
    assert shown.count("[bold]words") == 3 and "note" in shown
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
