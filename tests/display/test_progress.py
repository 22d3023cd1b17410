"""Test progress in a log file: a line every few seconds, with the time left."""

import io

import pytest
from rich.console import Console

from purld.display import progress as console
from purld.display.progress import Reporter


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_lines_tell_the_time_left_by_the_present_speed(clock):
    out = io.StringIO()
    with Reporter(Console(file=out, width=200)).progress("answers") as progress:
        progress(500, 1000, "500 answered")  # done by an earlier run, reported at once
        clock[0] += 10
        progress(600, 1000, "600 answered, 3 in flight")
        clock[0] += 10
        progress(610, 1000, "")
        progress(611, 1000, "too soon for a line")
        clock[0] += 1
        progress(1000, 1000, "")
    assert out.getvalue().splitlines() == [
        "  answers 600/1000  600 answered, 3 in flight  about 1 min left",
        "  answers 610/1000    about 7 min left",
        "  answers 1000/1000",
    ]


def test_hours(clock):
    out = io.StringIO()
    with Reporter(Console(file=out, width=200)).progress("answers") as progress:
        clock[0] += 60
        progress(1, 131, "")
    assert "about 2 h 10 min left" in out.getvalue()
