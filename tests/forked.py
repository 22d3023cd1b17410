"""Processes that begin at once: forks of one that has imported everything, where a new interpreter takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO

import pytest

PURLD = "from purld.cli import main; main()"
# Before PURLD: no curves in reports, more than a second each, where a test is of something else.
NO_FIGURES = "import purld.report.page; purld.report.page.draw_figures = lambda *_, **__: []; "


def fork_context() -> ForkServerContext:
    """Return the context whose processes are forks of a server that has imported the commands and the collector."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["command_imports", "collect_helpers"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks for the two where this process would
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


class ForkedPython:
    """What `python -c CODE ARGUMENT…` does, in a fork; it has the interface of `subprocess.Popen` as far as needed.

    Attributes:
        pid: the number of the process.
        said: the file with all that it prints.
    """

    def __init__(self, code: str, *arguments: object, said: Path, env: Mapping[str, str] | None = None) -> None:
        work = (code, [str(argument) for argument in arguments], str(said), dict(env or os.environ), os.getcwd())
        self.said = said
        self._process = fork_context().Process(target=_run, args=work, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, f"it still runs after {timeout} s"
        return self.returncode

    def send_signal(self, number: int) -> None:
        assert self.pid
        os.kill(self.pid, number)


class ForkedPopen(ForkedPython):
    """Stands in for `subprocess.Popen` where purld starts commands of its own that log to a file."""

    def __class_getitem__(cls, item: object) -> type:
        return cls

    def __init__(self, command: Sequence[str], stdout: IO[bytes], env: Mapping[str, str], **_: object) -> None:
        assert list(command[:2]) == [sys.executable, "-c"]
        super().__init__(*command[2:], said=Path(stdout.name), env=env)


def _run(code: str, arguments: list[str], said: str, environment: dict[str, str], folder: str) -> None:
    output = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
