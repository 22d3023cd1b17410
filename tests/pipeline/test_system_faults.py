"""Make every durable system call of `purld anchors` fail in turn, and run the same command again.

It ends with the anchors of an undisturbed run, or in one sentence until the fault is repaired; the server sees no
question twice, and what a kill may have lost is `unknown`, never asked again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_tiny_config
from faulty_server import Server, completion, running_server

from purld.clients.ledger import Ledger
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir

HERE = Path(__file__).parent
NO_SPACE, DISK_FULL, IO_ERROR, KILL_BEFORE, KILL_AFTER, TORN_WRITE, POWER_CUT = range(1, 8)
NO_CALL = 10**6


class FaultyCommand:
    """`purld anchors` in a process in which one durable system call fails."""

    def __init__(self, shim: Path, config: Path, server: Server, folder: Path) -> None:
        self.server, self.folder, self.run = server, folder, RunDir(folder / "run")
        self.config = config
        self.said = folder.with_name("said")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_runner.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, nth: int = NO_CALL, mode: int = 0) -> int:
        teacher = f"teacher={{kind: openai, base_url: '{self.server.url}', model: m, concurrency: 2}}"
        order = {
            "arguments": ["anchors", str(self.config), teacher, "--run-dir", str(self.run.path)],
            "root": str(self.folder),
            "nth": nth,
            "mode": mode,
            "said": str(self.said),
        }
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def last_lines(self) -> list[str]:
        return self.said.read_text(errors="replace").strip().splitlines()

    def start_afresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.server.arrived.clear()


@pytest.fixture(scope="module")
def command(random_student, tmp_path_factory) -> Iterator[FaultyCommand]:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux")
    folder = tmp_path_factory.mktemp("faults")
    shim = folder / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(HERE / "fault_shim.c"), "-ldl", "-lpthread"],
        check=True,
    )
    config = write_tiny_config(random_student, folder)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:3]))
    with running_server() as server:
        server.default = lambda handler: handler.reply(completion(f"To {handler.prompt}"))
        made = FaultyCommand(shim, config, server, folder / "runs")
        try:
            yield made
        finally:
            made.process.kill()
            made.process.wait()


@pytest.fixture(scope="module")
def undisturbed(command) -> tuple[list[dict], int]:
    """Return the anchors of an undisturbed run, and how many durable system calls it makes."""
    command.start_afresh()
    assert command() == 0, command.last_lines()
    return read_rows(command.run.anchors), int(command.last_lines()[-1])


def check_fault(command: FaultyCommand, expected: list[dict], nth: int, mode: int) -> None:
    command.start_afresh()
    statuses = [command(nth, mode)]
    killed = statuses[0] == -signal.SIGKILL
    where = f"call {nth}, mode {mode}: {command.last_lines()}"
    assert killed or statuses[0] in (0, 2), where
    assert "Traceback" not in "\n".join(command.last_lines()), where
    if statuses[0] == 2:
        assert sum(line.startswith("purld: ") for line in command.last_lines()) == 1, where
    statuses.append(command())
    where = f"call {nth}, mode {mode}, statuses {statuses}: {command.last_lines()}"
    assert "Traceback" not in "\n".join(command.last_lines()), where
    assert max(Counter(command.server.arrived).values()) == 1, f"bought twice: {where}"
    with Ledger(command.run.ledger) as ledger:
        states = {row["prompt_id"]: row["state"] for row in ledger.iter_requests()}
    lost = {prompt for prompt, state in states.items() if state == "unknown"}
    assert len(lost) <= (2 if statuses[0] else 0), where
    if len(lost) < len(expected):
        assert statuses[-1] == 0, where
        assert read_rows(command.run.anchors) == [row for row in expected if row["prompt_id"] not in lost], where
    assert not list(command.run.path.rglob(".*.partial")), where


MODES = (NO_SPACE, DISK_FULL, IO_ERROR, KILL_BEFORE, KILL_AFTER, TORN_WRITE, POWER_CUT)


def test_a_failing_system_call_costs_no_answer_that_was_paid(command, undisturbed):
    expected, calls = undisturbed
    assert len(expected) == 3 and calls > 50
    rng = random.Random(0)
    for mode in rng.sample(MODES, 3):
        check_fault(command, expected, rng.randint(1, calls), mode)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", MODES)
def test_every_system_call_in_turn(command, undisturbed, mode):
    expected, calls = undisturbed
    for nth in range(1, calls + 1):
        check_fault(command, expected, nth, mode)
