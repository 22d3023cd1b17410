"""The command line.

Each command imports what it needs, so that `purld --help` is instant. An error that the user can fix is one sentence on
stderr and exit status 2. Ctrl-C, SIGTERM and SIGHUP are exit status 130, 143 and 129, and the same command continues.

To add a command: write it in a module of this package, with `purld.cli.common.app`, and import the module below.
"""

from __future__ import annotations

import codecs
import io
import locale
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from purld import ranks
from purld.cli import chat, commands, common, completion, doctor, init, status, watch
from purld.cli.common import app, make_reporter
from purld.display.streams import protected_streams
from purld.errors import PlainWarning, UserError, printable
from purld.failures import TRACEBACK_VARIABLE, describe_failure
from purld.signals import Stopped, stopping_signals

__all__ = ["app", "chat", "commands", "completion", "doctor", "init", "main", "status", "watch"]


def main() -> None:
    """Run the `purld` command."""
    _use_utf8()
    with protected_streams(), stopping_signals():
        _configure_libraries()
        _configure_warnings()
        status = _run_command()
    ranks.exit_process(status)


def _run_command() -> int:
    """Run the command and return its exit status; an error or a signal is one sentence on stderr."""
    try:
        with ranks.quiet_unless_first(), ranks.together(_describe_end, interrupt=True):
            status = _status_of(app)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has left, as `head` does; stderr raises nothing
        return 1
    except (Stopped, Exception) as error:
        if TRACEBACK_VARIABLE in os.environ and not isinstance(error, UserError | Stopped):
            raise
        return _fail(*_describe_end(error))
    return status


@lru_cache(maxsize=1)  # the log of an error is written once
def _describe_end(error: BaseException) -> tuple[str, int]:
    """Return the sentence about what ended the command, and the exit status."""
    if isinstance(error, Stopped):
        how = "interrupted" if error.signum == signal.SIGINT else f"stopped by {error}"
        again = "; run the same command again to continue" if common.continues() else ""
        return f"{how}{again}.", error.status
    if isinstance(error, ranks.PeerError):
        return str(error), error.status
    if isinstance(error, Exception):
        return describe_failure(error, common.run_directory(), common.continues())
    return f"{type(error).__name__} ended this command.", 1


def _status_of(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as end:  # how typer ends a command
        return _fail(end.code, 1) if isinstance(end.code, str) else end.code or 0
    return 0


def _fail(sentence: str, status: int = 2) -> int:
    ranks.print_ending(f"purld: {printable(sentence)}")
    return status


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale is ASCII, and never fail at a character of the result.

    Paths, prompts and answers hold any character, and an ASCII locale (LANG=C) can neither name nor print most of them.
    """
    ascii_only = codecs.lookup(locale.getpreferredencoding(False)).name == "ascii"
    if ascii_only and not sys.flags.utf8_mode and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace" if sys.stdout.encoding.lower() == "utf-8" else "replace")


def _configure_libraries() -> None:
    """Set what libraries read when they are imported: no progress bars and advice, and OpenMP threads that sleep.

    While they wait, OpenMP threads spin by default. Where another process uses a core, that made a training step on two
    threads 19 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _configure_warnings() -> None:
    """Print our own warnings as a line for the user; hide the deprecation warnings of libraries."""
    show_others = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if issubclass(category, PlainWarning):
            make_reporter().warn(str(message))
        else:
            show_others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    if not sys.warnoptions:
        libraries = "transformers|trl|peft|torch|accelerate"
        # A newer release warns at purld's own line of what the oldest one in the range still needs.
        warnings.filterwarnings("ignore", category=FutureWarning, module=f"purld|{libraries}")
        # peft says this of the experts' ranks, which it sets itself and does apply.
        warnings.filterwarnings(
            "ignore", message="The following (rank|alpha)_pattern keys did not match", module="peft"
        )
