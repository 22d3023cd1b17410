"""kill -9 and Ctrl-C during a collection with sixteen calls in flight."""

from __future__ import annotations

import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from collect_helpers import collect_answers
from faulty_server import Handler, Server, completion

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
            self.over.wait(60)
            raise ConnectionAbortedError
        time.sleep(random.uniform(0, 0.05))
        handler.reply(completion(f"To {handler.prompt}."))


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_kill_at_any_moment(server: Server, tmp_path: Path, kills: int):
    """Every round asks more prompts than are answered and is killed at a random time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["collect_helpers"])
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
        "import sys; from pathlib import Path; from collect_helpers import collect_answers;"
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


@pytest.mark.parametrize("kills", [2, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_runs_in_one_folder_that_are_killed_and_started_again_buy_no_question_twice(server, tmp_path, kills):
    """Three runs ask the same questions at the same time; at the end, all of them know every result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["collect_helpers"])
    rng, count = random.Random(1), 60 + 20 * kills
    server.default = lambda handler: (time.sleep(random.uniform(0, 0.1)), handler.reply(completion("yes")))
    paths = {name: tmp_path / "runs" / name / "ledger.sqlite" for name in "abc"}

    def start(name):
        process = context.Process(
            target=collect_answers, args=(server.url, paths[name], count, tmp_path / f"log-{name}", True)
        )
        process.start()
        return process

    running = {name: start(name) for name in paths}
    for _ in range(kills):
        reached = len(server.arrived) + rng.randint(1, 15)
        wait_until(lambda reached=reached: len(server.arrived) >= min(reached, count))
        name = rng.choice("abc")
        running[name].kill()
        running[name].join()
        running[name] = start(name)
    for process in running.values():
        process.join(120)
        assert process.exitcode == 0
    assert max(Counter(server.arrived).values()) == 1, "a question was bought twice"
    known = {name: states(path) for name, path in paths.items()}
    assert known["a"] == known["b"] == known["c"]
    assert len(known["a"]) == count and set(known["a"].values()) <= {"answered", "unknown"}
    assert list(known["a"].values()).count("unknown") <= 16 * kills
