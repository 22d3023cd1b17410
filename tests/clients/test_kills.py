"""Kills, signals, dead terminals and a clock that jumps, during collections with sixteen calls in flight."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from collect_helpers import collect_answers, collect_in_terminal
from faulty_server import Handler, Server, completion
from forked import fork_context

from purld.clients.ledger import Ledger
from purld.records import Prompt

PER_ROUND = 40


class Round:
    """A server that answers a fixed number of arrivals and no others, so that no round ends before the kill."""

    def __init__(self, server: Server, answers: int) -> None:
        self.last = len(server.arrived) + answers
        self.over = threading.Event()
        server.default = self.now_and_then

    def now_and_then(self, handler: Handler) -> None:
        if len(handler.server.arrived) > self.last:
            self.over.wait(240)
            raise ConnectionAbortedError
        time.sleep(random.uniform(0, 0.05))
        handler.reply(completion(f"To {handler.prompt}."))


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_kill_at_any_moment(server: Server, tmp_path: Path, kills: int):
    """Every round asks more prompts than are answered and is killed at a random time."""
    context = fork_context()
    ledger_path, log_path, rng = tmp_path / "l.sqlite", tmp_path / "log_path", random.Random(0)
    for kill in range(1, kills + 1):
        answered_before = states(ledger_path)
        arrived_before = len(server.arrived)
        answers = rng.randint(0, PER_ROUND - 17) if kill > 1 else 10
        this_round = Round(server, answers)
        process = context.Process(target=collect_answers, args=(server.url, ledger_path, kill * PER_ROUND, log_path))
        process.start()
        wait_until(lambda wanted=arrived_before + answers: len(server.arrived) >= wanted)
        if kill == 1:  # at least this round leaves both an answered and a lost call
            wait_until(lambda: log_path.exists() and log_path.stat().st_size and len(server.arrived) > 10)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        this_round.over.set()
        time.sleep(0.05)  # requests sent before the kill arrive
        new = set(server.arrived[arrived_before:])
        assert not {prompt for prompt in new if answered_before.get(prompt) in ("answered", "unknown")}
    assert process.exitcode == -signal.SIGKILL
    check_books(server, ledger_path, log_path)


def states(ledger_path: Path) -> dict[str, str]:
    with Ledger(ledger_path) as ledger:
        return {row["request"]["messages"][0]["content"]: row["state"] for row in ledger.iter_requests()}


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.001)


def check_books(server: Server, ledger_path: Path, log_path: Path) -> None:
    final = states(ledger_path)
    by_state = {name: {p for p, state in final.items() if state == name} for name in ("answered", "unknown")}
    assert set(final) == by_state["answered"] | by_state["unknown"], "a kill leaves nothing else"
    assert max(Counter(server.arrived).values()) == 1, "a prompt was sent twice"
    assert by_state["answered"] <= set(server.finished)
    announced = {f"question {line}" for line in log_path.read_text().split()}
    assert announced <= by_state["answered"], "an answer was announced and lost"
    assert set(server.arrived) <= set(final), "something left that the ledger does not know"
    assert by_state["unknown"] >= set(server.arrived) - by_state["answered"]
    assert by_state["unknown"] and by_state["answered"]
    with Ledger(ledger_path) as ledger:
        texts = {row["prompt_id"]: row["answer"] for row in ledger.iter_requests() if row["state"] == "answered"}
        totals = ledger.totals("teacher")
    assert texts == {Prompt.from_text(p).id: f"To {p}." for p in by_state["answered"]}
    assert totals["calls"] == len(final)
    assert totals["unknown"] == len(by_state["unknown"])


def test_ctrl_c_ends_after_the_grace_and_keeps_the_books(server: Server, tmp_path: Path):
    prompts = [f"question {n}" for n in range(40)]
    server.script = {prompt: [lambda handler: time.sleep(90)] for prompt in prompts[20:]}
    code = (
        "import sys; from pathlib import Path; from collect_helpers import collect_answers, collect_in_terminal;"
        "from purld.clients import endpoint; endpoint.GRACE_SECONDS = 0.5;"
        "collect_answers(sys.argv[1], Path(sys.argv[2]), 40, Path(sys.argv[3]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url, str(tmp_path / "l.sqlite"), str(tmp_path / "log_path")],
        cwd=Path(__file__).parent,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores SIGINT
    )
    # Twenty calls were answered and announced, sixteen were not answered.
    wait_until(lambda: len(server.arrived) == 36 and len((tmp_path / "log_path").read_text().split()) == 20)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in stderr
    call_states = states(tmp_path / "l.sqlite")
    assert Counter(call_states.values()) == {"answered": 20, "unknown": 16}
    assert {prompt for prompt, state in call_states.items() if state == "answered"} == set(prompts[:20])


class Terminal:
    """A pseudo-terminal that somebody looks at until it is closed."""

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        self.name = os.ttyname(self._slave)
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._closed.is_set():
            if select.select([self._master], [], [], 0.02)[0]:
                os.read(self._master, 65536)

    def close(self) -> None:
        self._closed.set()
        self._reader.join()
        os.close(self._slave)
        os.close(self._master)


class RunInTerminal:
    """A process that collects answers in a terminal of its own, beside others in the same folder."""

    def __init__(self, url: str, ledger: Path, count: int) -> None:
        context = fork_context()
        ledger.parent.mkdir(parents=True, exist_ok=True)
        self.terminal = Terminal()
        self._ready = context.Event()
        arguments = (url, ledger, count, ledger.with_name("log"), self.terminal.name, self._ready)
        self._process = context.Process(target=collect_in_terminal, args=arguments)
        self._process.start()

    def end(self, how: str) -> int | None:
        """Send the process a signal, or close its terminal, once it listens; return its exit status."""
        assert self._ready.wait(60)
        if how == "hang up":
            self.terminal.close()
        else:
            with contextlib.suppress(ProcessLookupError):  # it has finished
                os.kill(self._process.pid, getattr(signal, how))
        return self.join()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def join(self) -> int | None:
        self._process.join(120)
        return self._process.exitcode


STATUS = {"SIGKILL": -9, "SIGTERM": 143, "SIGHUP": 129, "hang up": 129}


@pytest.mark.parametrize(
    "ends",
    [
        ["SIGKILL", "SIGKILL"],
        ["hang up", "SIGTERM"],
        pytest.param(["SIGKILL"] * 60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param(["hang up", "SIGHUP", "SIGTERM"] * 20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
    ids=lambda ends: f"{ends[-1]}-{len(ends)}",
)
def test_runs_in_one_folder_that_end_and_start_again_buy_no_question_twice(server, tmp_path, ends):
    """Three runs with jumping clocks ask the same questions at the same time; at the end, all know every result.

    Only a kill loses answers: those in flight, of which nobody knows whether they arrived.
    """
    rng, count = random.Random(1), 60 + 20 * len(ends)
    server.default = lambda handler: (time.sleep(random.uniform(0, 0.1)), handler.reply(completion("yes")))
    paths = {name: tmp_path / "runs" / name / "ledger.sqlite" for name in "abc"}
    running = {name: RunInTerminal(server.url, path, count) for name, path in paths.items()}
    for how in ends:
        reached = len(server.arrived) + rng.randint(1, 15)
        wait_until(
            lambda reached=reached: (
                len(server.arrived) >= reached or not any(run.is_alive() for run in running.values())
            )
        )
        name = rng.choice("abc")
        assert running[name].end(how) in (STATUS[how], 0)  # 0: it had finished
        running[name] = RunInTerminal(server.url, paths[name], count)
    assert [run.join() for run in running.values()] == [0, 0, 0]
    assert max(Counter(server.arrived).values()) == 1, "a question was bought twice"
    known = {name: states(path) for name, path in paths.items()}
    assert known["a"] == known["b"] == known["c"]
    assert len(known["a"]) == count and set(known["a"].values()) <= {"answered", "unknown"}
    assert list(known["a"].values()).count("unknown") <= 16 * ends.count("SIGKILL")
