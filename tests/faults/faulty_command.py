"""Run `purld` commands in which one durable system call fails, for tests; see fault_shim.c."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NO_SPACE, DISK_FULL, IO_ERROR, KILL_BEFORE, KILL_AFTER, TORN_WRITE, POWER_CUT = range(1, 8)
MODES = {
    "no-space": NO_SPACE,
    "disk-full": DISK_FULL,
    "io-error": IO_ERROR,
    "kill-before": KILL_BEFORE,
    "kill-after": KILL_AFTER,
    "torn-write": TORN_WRITE,
    "power-cut": POWER_CUT,
}


def build_shim(folder: Path) -> Path:
    """Compile fault_shim.c; skips the test where that is not possible."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux")
    shim = folder / "shim.so"
    source = str(HERE / "fault_shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), source, "-ldl", "-lpthread"], check=True)
    return shim


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status (negative: the signal), the letters of its calls, and what it printed."""

    status: int
    calls: str
    said: str

    @property
    def sentences(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("purld: ")]

    def __str__(self) -> str:
        return f"status {self.status}: {self.said.strip()[-600:]}"


class CommandRunner:
    """A process that runs commands about a configuration in forks of itself, each with or without a fault."""

    def __init__(self, shim: Path, folder: Path, config: Path) -> None:
        self._said = folder / "said"
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_runner.py"), str(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, arguments: Sequence[object], root: Path, nth: int = 0, mode: int = 0) -> Ended:
        """Run a command; the `nth` durable system call under `root` fails. Call 0 is none."""
        order = {
            "arguments": [str(argument) for argument in arguments],
            "root": str(root),
            "nth": nth,
            "mode": mode,
            "said": str(self._said),
        }
        assert self._process.stdin and self._process.stdout
        print(json.dumps(order), file=self._process.stdin, flush=True)
        status, calls = json.loads(self._process.stdout.readline())
        return Ended(status, calls, self._said.read_text(errors="replace"))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def command_runner(folder: Path, config: Path) -> Iterator[CommandRunner]:
    runner = CommandRunner(build_shim(folder), folder, config)
    try:
        yield runner
    finally:
        runner.close()


def worthwhile_faults(calls: str, talks: bool) -> list[tuple[int, int]]:
    """Return the faults (number of the call, mode) that can differ from each other.

    Args:
        calls: the letters of an undisturbed command's calls.
        talks: the command sends requests between its calls; else a kill after one call is a kill before the next.
    """
    faults = []
    for nth, letter in enumerate(calls, start=1):
        kind, last = letter.lower(), nth == len(calls)
        faults += [(nth, mode) for mode in (NO_SPACE, IO_ERROR, KILL_BEFORE)]
        if kind in "wc":
            faults.append((nth, DISK_FULL))  # the disk is full from here on
        if talks or last:
            faults.append((nth, KILL_AFTER))
        if kind == "w":
            faults.append((nth, TORN_WRITE))
        if letter.isupper():
            faults.append((nth, POWER_CUT))  # with nothing to undo, it is a kill
    return faults
