"""Signals, dead terminals and failing callbacks while calls are in flight: every answer that arrives is stored."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import time

import pytest
from faulty_server import completion
from rich.console import Console

from purld.cli import main
from purld.clients import endpoint as endpoint_module
from purld.clients.anchors import collect_anchors
from purld.clients.endpoint import EndpointClient
from purld.clients.ledger import LedgerView
from purld.display.progress import Reporter
from purld.errors import PlainWarning
from purld.records import Prompt
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.signals import Stopped, stopping_signals

PROMPTS = [Prompt.from_text(f"question {n}") for n in range(20)]


@pytest.fixture
def in_flight(server):
    """Hold the answers until the test sets this event; `wait_for(n)` waits for n arrivals."""
    release = threading.Event()

    def held(handler):
        release.wait(30)
        handler.reply(completion(f"To {handler.prompt}."))

    server.default = held
    yield release
    release.set()


def send(server, release, *signals, arrivals=8, hold=0.0):
    """Send the signals, one after the other, when calls are in flight; let the answers go `hold` seconds later."""

    def work():
        deadline = time.monotonic() + 30
        while len(server.arrived) < arrivals and time.monotonic() < deadline:
            time.sleep(0.005)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        time.sleep(hold)
        release.set()

    threading.Thread(target=work, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_sending_and_stores_the_answers_in_flight(server, endpoint, ledger, in_flight, number):
    send(server, in_flight, number)
    client = EndpointClient(endpoint(concurrency=8), ledger, "teacher")
    with stopping_signals(), pytest.raises(Stopped) as stopped, pytest.warns(PlainWarning, match="8 calls in flight"):
        client.ask(PROMPTS)
    assert stopped.value.status == {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}[number.name]
    assert len(server.arrived) == 8
    totals = ledger.totals("teacher")
    assert (totals["prompts"], totals["answered"]) == (8, 8)


@pytest.mark.parametrize(("grace", "signals"), [(0.2, ["SIGTERM"]), (60, ["SIGINT", "SIGINT"])])
def test_the_wait_is_bounded_and_a_second_ctrl_c_ends_it(
    server, endpoint, ledger, in_flight, monkeypatch, grace, signals
):
    monkeypatch.setattr(endpoint_module, "GRACE_SECONDS", grace)
    send(server, in_flight, *(getattr(signal, name) for name in signals), hold=20)
    client, started = EndpointClient(endpoint(concurrency=8, timeout=60), ledger, "teacher"), time.monotonic()
    with stopping_signals(), pytest.raises(Stopped), pytest.warns(PlainWarning):
        client.ask(PROMPTS)
    assert time.monotonic() - started < 15
    totals = ledger.totals("teacher")
    assert (totals["prompts"], totals["unknown"]) == (8, 8)


def test_an_ignored_signal_stays_ignored(server, endpoint, ledger, in_flight):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        send(server, in_flight, signal.SIGHUP)
        with stopping_signals():
            EndpointClient(endpoint(concurrency=8), ledger, "teacher").ask(PROMPTS)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ledger.totals("teacher")["answered"] == 20


@pytest.mark.parametrize("error", [OSError(errno.EIO, "gone"), ValueError("odd"), KeyboardInterrupt()])
def test_a_callback_that_fails_costs_no_answer(server, endpoint, ledger, error):
    server.default = lambda handler: (time.sleep(0.2), handler.reply(completion()))
    server.script["question 0"] = [lambda handler: handler.reply(completion())]

    def on_reply(index, reply):
        raise error

    with pytest.raises(type(error)):
        EndpointClient(endpoint(concurrency=8), ledger, "teacher").ask(PROMPTS, on_reply)
    assert ledger.totals("teacher")["answered"] == len(server.arrived) == 8


class DeadTerminal(io.StringIO):
    """A terminal that fails from the third write on."""

    def __init__(self, error):
        super().__init__()
        self.error, self.writes = error, 0

    def write(self, text):
        self.writes += 1
        if self.writes > 2:
            raise self.error
        return super().write(text)

    def flush(self):
        if self.writes > 2:
            raise self.error


@pytest.mark.filterwarnings("error")  # such as that of a thread which ended with an exception
@pytest.mark.parametrize(
    ("error", "terminal"),
    [(OSError(errno.EIO, "gone"), True), (BrokenPipeError(errno.EPIPE, "gone"), False), (ValueError("closed"), True)],
)
def test_no_error_of_the_display_reaches_the_work(server, endpoint, ledger, monkeypatch, error, terminal):
    monkeypatch.setattr("purld.display.progress._SECONDS_BETWEEN_LINES", 0.0)
    dead = DeadTerminal(error)
    reporter = Reporter(Console(file=dead, force_terminal=terminal))
    reporter.headline("Anchors")
    with reporter.progress("answers") as progress:
        client = EndpointClient(endpoint(concurrency=8), ledger, "teacher")
        collected = collect_anchors(PROMPTS, client, None, lambda counts: progress(counts.total(), 20, "so far"))
    reporter.say("done")
    reporter.warn("done")
    assert len(collected.anchors) == 20
    assert dead.writes > 2


def test_a_character_that_the_terminal_lacks_is_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", write_through=True)
    Reporter(Console(file=stream, width=80)).say("3 × faults")
    assert raw.getvalue() == b"  3 \\xd7 faults\n"


def test_anchors_are_collected_behind_a_broken_pipe(server, tiny_config, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    run = RunDir(tmp_path / "run")
    teacher = f"teacher={{kind: openai, base_url: '{server.url}', model: m}}"
    monkeypatch.setattr(sys, "argv", ["purld", "anchors", str(tiny_config), teacher, "--run-dir", str(run.path)])
    with os.fdopen(writing, "w", buffering=1) as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    assert len(read_rows(run.anchors)) == len(server.arrived) == 16
    with LedgerView(run.ledger) as view:
        assert view.totals("teacher")["answered"] == 16
