"""Collects answers in a separate process, for tests that kill it; that process imports this module by name."""

import os
import random
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

from purld.clients.base import Reply
from purld.clients.endpoint import EndpointClient
from purld.clients.folder import FolderLedgers
from purld.clients.ledger import Ledger
from purld.config.clients import OpenAIEndpoint
from purld.display.progress import Reporter
from purld.display.streams import protected_streams
from purld.records import Prompt
from purld.signals import Stopped, stopping_signals


def collect_answers(
    url: str,
    ledger_path: Path,
    count: int,
    log_path: Path,
    share: bool = False,
    show: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> None:
    """Ask for all prompts, and log the index of every announced reply as one complete line.

    With `share`, the ledgers of the runs in the same folder are used as well; `show` is called with each reply.
    """
    config = OpenAIEndpoint(kind="openai", base_url=url, model="m", concurrency=16)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def log_reply(index: int, reply: Reply) -> None:
        show(index, count, reply.state)
        if reply.state == "answered":
            os.write(log, f"{index}\n".encode())

    with Ledger(ledger_path, FolderLedgers(ledger_path) if share else None) as ledger:
        prompts = [Prompt.from_text(f"question {n}") for n in range(count)]
        EndpointClient(config, ledger, "teacher").ask(prompts, log_reply)


def collect_in_terminal(url: str, ledger_path: Path, count: int, log_path: Path, terminal: str, ready: Event) -> None:
    """Do the same as the command line does, with a progress bar in a terminal and a clock that jumps."""
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)  # becomes the controlling terminal, whose end is a SIGHUP
    for standard in range(3):
        os.dup2(descriptor, standard)
    os.environ["TERM"] = "xterm"
    clock = time.time
    time.time = lambda: clock() + random.choice((-86400.0, 0.0, 86400.0))
    try:
        with protected_streams(), stopping_signals(), Reporter().progress("answers") as show:
            ready.set()
            collect_answers(url, ledger_path, count, log_path, True, show)
    except Stopped as stopped:
        sys.exit(stopped.status)
