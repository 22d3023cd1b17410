"""Run a function in several processes that know of each other as a launcher's do; forked, they start at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from purld import ranks
from purld.ranks import board

SECONDS = 240


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def assert_only_own_name(log: Path) -> None:
    """Check a log of the network guard: torchrun looks this machine's own name up, and nothing else may be tried."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    attempts = [line for line in text.splitlines() if line.startswith("socket.")]
    others = [line for line in attempts if f" {socket.gethostname()!r} in process" not in line]
    assert not others, text


def run_ranks(work: Callable[[], Any], count: int = 2, joins: bool = True) -> list[Any]:
    """Return what `work` returns or raises in each rank; None for a rank that ends without a word.

    Without `joins` the ranks have not met when `work` is called, and OTHER_PORT is free for it.
    """
    context, ports = multiprocessing.get_context("fork"), (free_port(), free_port())
    pipes, processes = [], []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(work, rank, count, ports, joins, sender))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    outcomes = []
    for pipe, process in zip(pipes, processes, strict=True):
        try:
            outcomes.append(pipe.recv() if pipe.poll(SECONDS) else TimeoutError(f"a rank took over {SECONDS} s"))
        except EOFError:
            outcomes.append(None)
        process.join(10)
        process.kill()
    return outcomes


def _run_rank(work: Callable[[], Any], rank: int, count: int, ports: tuple[int, int], joins: bool, sender: Any) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0]), "OTHER_PORT": str(ports[1])}
    ranks._PATIENCE, board._POLL = 1.0, 0.05  # on one machine the others are heard at once
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)} | address)
    try:
        with ranks.together() if joins else contextlib.nullcontext():
            outcome = work()
    except BaseException as error:
        outcome = error
    sender.send(outcome)
    sender.close()
    os._exit(0)  # a broken group may hang when the interpreter exits
