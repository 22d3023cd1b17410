"""Run `purld` commands in which one durable system call fails, for tests; see fault_shim.c."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
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
class Call:
    """A durable system call: its letter (see fault_shim.c), its name, and its file relative to the folder of work."""

    letter: str
    name: str
    path: str

    @property
    def shape(self) -> tuple[str, str, str]:
        """The call without what differs between repetitions: numbers, temporary names, names in a model's folder."""
        folder, _, name = self.path.rpartition("/")
        if (folder.count("/") and not name.startswith(".")) or not folder:
            name = "*"
        name = re.sub(r"^\.tmp\w+", ".tmp", name)
        return self.letter, self.name.removesuffix("64"), re.sub(r"\d+", "#", f"{folder}/{name}")


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status (negative: the signal), the calls that it made undisturbed, what it printed."""

    status: int
    calls: tuple[Call, ...]
    said: str

    @property
    def sentences(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("purld: ")]

    def __str__(self) -> str:
        return f"status {self.status}: {self.said.strip()[-600:]}"


class CommandRunner:
    """A process that runs commands about a configuration in forks of itself, each with or without a fault."""

    def __init__(self, shim: Path, folder: Path, config: Path) -> None:
        self._said, self._calls = folder / "said", folder / "calls"
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
            "calls": str(self._calls),
        }
        assert self._process.stdin and self._process.stdout
        self._calls.write_text("")
        print(json.dumps(order), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        calls = tuple(Call(*line.split(" ", 2)) for line in self._calls.read_text().splitlines())
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


def worthwhile_faults(calls: Sequence[Call], talks: bool) -> list[tuple[int, int]]:
    """Return the faults (number of the call, mode) that can differ from each other.

    Args:
        calls: an undisturbed command's calls.
        talks: the command sends requests between its calls; else a kill after one call is a kill before the next.
    """
    faults = []
    for nth, call in enumerate(calls, start=1):
        kind, last = call.letter.lower(), nth == len(calls)
        faults += [(nth, mode) for mode in (NO_SPACE, IO_ERROR, KILL_BEFORE)]
        if kind in "wc":
            faults.append((nth, DISK_FULL))  # the disk is full from here on
        if talks or last:
            faults.append((nth, KILL_AFTER))
        if kind == "w":
            faults.append((nth, TORN_WRITE))
        if call.letter.isupper():
            faults.append((nth, POWER_CUT))  # with nothing to undo, it is a kill
    return faults


def some_of_each_class(
    calls: Sequence[Call], faults: Sequence[tuple[int, int]], repeated: str
) -> list[tuple[int, int]]:
    """Return the first, last, second and middle fault of each class, the first of all classes first.

    A class is a mode, the shape of a call and the shape of the call before it, which together tell what step of what
    protocol it is: the sync of a temporary file before its rename, or the third write of a transaction.

    Args:
        calls: an undisturbed command's calls.
        faults: the faults (number of the call, mode) to choose from.
        repeated: "some" for these four, "one" for only the first, "all" for all faults.
    """
    if repeated == "all":
        return list(faults)
    classes: dict[object, list[tuple[int, int]]] = defaultdict(list)
    for nth, mode in faults:
        before = calls[nth - 2].shape if nth > 1 else None
        classes[mode, calls[nth - 1].shape, before].append((nth, mode))
    if repeated == "one":
        return [members[0] for members in classes.values()]
    orders = [(members[0], members[-1], members[:2][-1], members[len(members) // 2]) for members in classes.values()]
    return list(dict.fromkeys(itertools.chain.from_iterable(zip(*orders, strict=True))))
