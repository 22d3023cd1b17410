"""The command line, run in the process of the test."""

import sys

from purld.cli import main


def purld(monkeypatch, *arguments) -> int:
    """Run the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["purld", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0
