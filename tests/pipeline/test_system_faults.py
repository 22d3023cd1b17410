"""Make every durable system call of every stage fail in turn, and run the same command again.

It ends with the files of an undisturbed run, or in one sentence until the fault is repaired; the server sees no
question twice, and what a kill may have lost is `unknown`, never asked again.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from case_log import REPEATED, wrong_cases
from conftest import make_random_student, write_tiny_config
from faulty_command import MODES, Call, CommandRunner, Ended, command_runner, some_of_each_class, worthwhile_faults
from faulty_server import Server, completion, running_server

from purld.clients.ledger import LedgerView

SMALL = {
    "sft": {"epochs": 2, "batch_size": 2, "checkpoint_steps": 1, "validation_fraction": 0.34},
    "align": {"steps": 2, "candidates": 2, "prompts_per_step": 1, "max_new_tokens": 4, "checkpoint_steps": 1},
    "evaluate": {"samples": 1, "max_new_tokens": 4, "opponent": {"kind": "teacher"}},
}
LEDGER = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "ledger.sqlite.lock", ".ledger.sqlite.calls")
MODE_NAMES = {mode: name for name, mode in MODES.items()}
SWEPT, RUN = "evaluate.max_new_tokens", "max_new_tokens=4"  # every run has the name that a sweep gives it
NOT_COMPARED = (*LEDGER, ".lock", "report.html", "sweep.log")


@dataclass(frozen=True)
class Subject:
    """A command whose calls fail: what it is given, what has run before it, and whether it sends requests."""

    name: str
    before: tuple[str, ...] = ()
    talks: bool = False

    def __str__(self) -> str:
        return self.name


SUBJECTS = (
    Subject("anchors", talks=True),
    Subject("sft", ("anchors",)),
    Subject("align", ("anchors", "sft")),
    Subject("evaluate", ("anchors", "sft", "align"), talks=True),
    Subject("report", ("anchors", "sft", "align", "evaluate")),
    Subject("export", ("anchors", "sft", "align")),
    Subject("sweep", ("anchors", "sft")),
)


@dataclass
class Workbench:
    """Folders, a server and a runner that all tests of this module share."""

    runner: CommandRunner
    server: Server
    folder: Path
    config: Path
    sweep_config: Path
    prepared: dict[tuple[str, ...], Path] = field(default_factory=dict)
    undisturbed: dict[str, tuple[dict[str, Any], tuple[Call, ...]]] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The folder whose files are watched, with one run in it or one sweep."""
        return self.folder / "work"

    def arguments(self, command: str) -> list[object]:
        run = self.root / RUN
        if command == "export":
            return ["export", run]
        if command == "sweep":
            return ["sweep", self.sweep_config, f"{SWEPT}=4,5", "--run-dir", self.root]
        return [command, self.config, f"{SWEPT}=4", "--run-dir", run]

    def __call__(self, command: str, nth: int = 0, mode: int = 0) -> Ended:
        return self.runner(self.arguments(command), self.root, nth, mode)

    def start(self, subject: Subject) -> None:
        """Put the state before a command into the folder of work."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        self.server.arrived.clear()
        for count in range(len(subject.before), 0, -1):
            if kept := self.prepared.get(subject.before[:count]):
                shutil.copytree(kept, self.root, dirs_exist_ok=True)
                break
        else:
            count = 0
        for position in range(count, len(subject.before)):
            ended = self(subject.before[position])
            assert ended.status == 0, ended
            self._keep(subject.before[: position + 1])
        self.server.arrived.clear()

    def _keep(self, done: tuple[str, ...]) -> None:
        if done not in self.prepared:
            self.prepared[done] = self.folder / "-".join(done)
            shutil.copytree(self.root, self.prepared[done])

    def expected(self, subject: Subject) -> tuple[dict[str, Any], tuple[Call, ...]]:
        """Return what an undisturbed command leaves, and its calls."""
        if subject.name not in self.undisturbed:
            self.start(subject)
            ended = self(subject.name)
            assert ended.status == 0, ended
            assert ended.calls and not ended.sentences
            self._keep((*subject.before, subject.name))
            self.undisturbed[subject.name] = self.left(), ended.calls
        return self.undisturbed[subject.name]

    def left(self) -> dict[str, Any]:
        """Return what two equal commands must share: every file but logs, and what was measured but times."""
        files = [path for path in sorted(self.root.rglob("*")) if path.is_file() and path.name not in NOT_COMPARED]
        return {path.relative_to(self.root).as_posix(): _content(path) for path in files}

    def lost(self) -> int:
        """Return how many questions were sent and never answered."""
        ledgers = [LedgerView(path) for path in self.root.glob("*/ledger.sqlite") if path.stat().st_size]
        return sum(row["state"] == "unknown" for ledger in ledgers for row in ledger.iter_requests())


def _content(path: Path) -> Any:
    if path.name == "manifest.json":
        manifest = json.loads(path.read_text())
        return sorted(manifest["finished"]), sorted(manifest["files"])
    if path.suffix == ".json" and path.parent.name not in ("sft", "align", "export"):
        return _without_times(json.loads(path.read_text()))
    return path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if not key.startswith("seconds")}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def bench(tokenizer, tmp_path_factory) -> Iterator[Workbench]:
    folder = tmp_path_factory.mktemp("faults")
    student = make_random_student(tokenizer, folder / "student", hidden_size=8, layers=1)
    config = write_tiny_config(student, folder)
    for name, count in (("prompts", 4), ("held_out", 2)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
    with running_server() as server:
        server.default = lambda handler: handler.reply(completion(_reply_to(handler.prompt)))
        values = yaml.safe_load(config.read_text())
        endpoint = {"kind": "openai", "base_url": server.url, "model": "m", "concurrency": 2}
        values |= {section: values[section] | SMALL[section] for section in SMALL} | {"teacher": endpoint}
        values["evaluate"]["judge"] = endpoint | {"max_tokens_per_answer": 8}
        config.write_text(yaml.safe_dump(values))
        sweep_config = folder / "sweep.yaml"  # without Stage II, which is no matter of the sweep and takes seconds
        sweep_config.write_text(yaml.safe_dump(values | {"align": {"method": "sft"}}))
        with command_runner(folder, config) as runner:
            yield Workbench(runner, server, folder, config, sweep_config)


def _reply_to(question: str) -> str:
    return "A" if "Response A" in question else f"To {question}"


def check_fault(bench: Workbench, subject: Subject, nth: int, mode: int) -> None:
    expected, _ = bench.expected(subject)
    bench.start(subject)
    first = bench(subject.name, nth, mode)
    assert first.status in (0, 2, -signal.SIGKILL), first
    assert "Traceback" not in first.said, first
    assert len(first.sentences) == (first.status == 2), first
    if first.status == 0 and not bench.lost():
        shutil.rmtree(bench.root / RUN / subject.name / "checkpoints", ignore_errors=True)  # the next one would
        check_left(bench, expected, first)
    second = bench(subject.name)
    repeated = Counter(bench.server.arrived)
    assert not repeated or max(repeated.values()) == 1, f"bought twice: {first} / {second}"
    assert "Traceback" not in second.said, second
    lost = bench.lost()
    assert lost <= (2 if first.status else 0), first
    if not lost:
        assert second.status == 0, f"{first} / {second}"
        check_left(bench, expected, first)
    else:  # too few answers may be left, in one sentence
        assert second.status in (0, 2) and len(second.sentences) == (second.status == 2), f"{first} / {second}"


def check_left(bench: Workbench, expected: dict[str, Any], ended: Ended) -> None:
    left = bench.left()
    assert left.keys() == expected.keys(), f"{ended}: {left.keys() ^ expected.keys()}"
    assert not [name for name in left if left[name] != expected[name]], ended


def draw(bench: Workbench, subject: Subject, count: int) -> Sequence[tuple[int, int]]:
    calls = bench.expected(subject)[1]
    return random.Random(subject.name).sample(worthwhile_faults(calls, subject.talks), count)


@pytest.mark.parametrize(("subject", "count"), [(SUBJECTS[0], 2), (SUBJECTS[1], 1)], ids=str)
def test_a_failing_system_call_costs_nothing_but_time(bench, subject, count):
    for nth, mode in draw(bench, subject, count):
        check_fault(bench, subject, nth, mode)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_every_system_call_in_turn(bench, subject):
    """An hour of one core; it can stop and go on, and take fewer or all repetitions of a call: see case_log.py."""
    calls = bench.expected(subject)[1]
    chosen = some_of_each_class(calls, worthwhile_faults(calls, subject.talks), REPEATED)
    cases = [(*calls[nth - 1].shape, MODE_NAMES[mode], nth) for nth, mode in chosen]
    assert not wrong_cases(subject.name, cases, lambda *case: check_fault(bench, subject, case[-1], MODES[case[-2]]))
