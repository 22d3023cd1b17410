"""One damaged file at a time, in a finished run and in one that was stopped in Stage II.

Every later command must end in one sentence with status 2, or with exactly what it gives on the intact run.
"""

import contextlib
import io
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from case_log import wrong_cases
from rich.console import Console

from purld.cli import main
from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.pipeline.pipeline import Pipeline
from purld.report import figures
from purld.runs.files import read_json
from purld.runs.run_dir import RunDir

HARMS = ("halved", "emptied", "deleted", "flipped")
COMMANDS = ("run", "align", "evaluate", "report", "export", "compare")
# The ledger has tests of its own; the lock holds nothing, and the report is written anew.
NOT_HARMED = ("ledger", ".lock", "report.html")
SMALL = ["sft.epochs=1", "align.steps=3", "align.checkpoint_steps=1", "align.candidates=2", "evaluate.samples=1"]
SLICE = [  # the run, the file, the harm, the command, and what it ends in
    ("finished", "anchors.jsonl", "halved", "report", "run `purld anchors` again"),
    ("finished", "align/model.safetensors", "flipped", "export", "start again with another --run-dir"),
    ("finished", "generations/ldl_grpo.jsonl", "halved", "compare", "run `purld evaluate` again"),
    ("finished", "results.json", "emptied", "report", "run `purld evaluate` again"),
    ("finished", "manifest.json", "deleted", "report", "start again with another --run-dir"),
    ("finished", "config.yaml", "halved", "report", "run the run's own configuration again"),
    ("finished", "generations/ldl_grpo.jsonl", "flipped", "evaluate", None),
    ("stopped", "align/checkpoints/checkpoint-2/optimizer.pt", "halved", "run", None),
    ("stopped", "generations/groups.jsonl", "halved", "report", "continue the run"),
]


class StoppedError(Exception):
    pass


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "flipped" and data:
        data[len(data) // 2] ^= 4
    path.write_bytes({"halved": data[: len(data) // 2], "emptied": b"", "flipped": data}[how])


class StoppingReporter(Reporter):
    """Stops the run at the last step of Stage II, before its checkpoint."""

    @contextlib.contextmanager
    def progress(self, what):
        with super().progress(what) as update:

            def stop(done, total, note):
                update(done, total, note)
                if what == "steps" and (done, total) == (3, 3):
                    raise StoppedError

            yield stop


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Put an empty figure into the place of each curve: drawing them is most of the time of many commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "figure_to_svg", lambda *_, **__: "<svg/>")
        yield


@pytest.fixture(scope="module")
def small_config(module_config):
    """The shared configuration with the fewest steps that leave two checkpoints behind."""
    path = module_config.with_name("small.yaml")
    path.write_text(yaml.safe_dump(load_config(module_config, SMALL).model_dump(mode="json")))
    return path


@pytest.fixture(scope="module")
def runs(small_config, tmp_path_factory):
    """A folder with two runs of one configuration: `finished`, and `stopped` in Stage II."""
    folder = tmp_path_factory.mktemp("runs")
    config, silent = load_config(small_config), Console(file=io.StringIO())
    with pytest.raises(StoppedError):
        Pipeline(config, RunDir(folder / "stopped"), StoppingReporter(silent)).execute()
    shutil.copytree(folder / "stopped", folder / "finished")
    Pipeline(config, RunDir(folder / "finished"), Reporter(silent)).execute()
    shutil.copytree(folder / "finished", folder / "other")
    return folder


def outcome(command: str, config: Path, run: Path, monkeypatch, capsys) -> tuple[int, list[str], dict[str, object]]:
    """Run a command; returns its status, its sentences on stderr, and everything that it leaves."""
    arguments = {
        "run": ["run", config, "--run-dir", run],
        "align": ["align", config, "--run-dir", run],
        "evaluate": ["evaluate", config, "--run-dir", run],
        "report": ["report", run, "--out", run / "out.html"],
        "export": ["export", run],
        "compare": ["compare", run, run.parent / "other"],
    }
    monkeypatch.setattr(sys, "argv", ["purld", *map(str, arguments[command])])
    capsys.readouterr()
    status = 0
    try:
        main()
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    shown = capsys.readouterr()
    sentences = [line for line in shown.err.splitlines() if line.startswith("purld: ")]
    assert "Traceback" not in shown.err
    return status, sentences, left_by(command, run, shown.out)


def left_by(command: str, run: Path, shown: str) -> dict[str, object]:
    """Return what two equal commands must share."""
    if command in ("compare", "export"):
        files = {path.name: path.read_bytes() for path in sorted((run / "export").glob("*"))}
        return {"shown": shown.replace(run.name, "RUN") if command == "compare" else "", **files}
    if command == "report":
        return {"report": (run / "out.html").read_text() if (run / "out.html").exists() else ""}
    try:
        results = read_json(run / "results.json")
        results.pop("seconds", None)
    except (OSError, UserError):
        results = None
    kept = [run / "metrics.jsonl", *(run / "generations").glob("*.jsonl"), *run.glob("*/*.safetensors")]
    files = {str(path.relative_to(run)): path.read_bytes() for path in sorted(kept) if path.exists()}
    return {"results.json": results, **files}


def harmed_files(run: Path) -> list[str]:
    files = [path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file()]
    return [name for name in files if not any(part in name for part in NOT_HARMED)]


@pytest.fixture
def expected(runs, small_config, monkeypatch, capsys):
    """What a command leaves on an intact copy, worked out once for each kind of run and command."""
    known: dict[tuple[str, str], object] = runs_known(runs)

    def of(kind: str, command: str):
        if command in ("run", "align", "evaluate"):  # however it got there, it ends as the calm run did
            return 0, [], left_by(command, runs / "finished", "")
        if (kind, command) not in known:
            copy = copied(runs, kind)
            known[kind, command] = outcome(command, small_config, copy, monkeypatch, capsys)
        return known[kind, command]

    return of


_KNOWN: dict[Path, dict] = {}


def runs_known(runs: Path) -> dict:
    return _KNOWN.setdefault(runs, {})


def copied(runs: Path, kind: str) -> Path:
    copy = runs / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(runs / kind, copy)
    return copy


def check(case, runs, expected, config, monkeypatch, capsys):
    kind, name, how, command = case
    copy = copied(runs, kind)
    damage(copy / name, how)
    status, sentences, left = outcome(command, config, copy, monkeypatch, capsys)
    if status == 2:
        assert len(sentences) == 1 and sentences[0].endswith("."), sentences
        return sentences[0]
    calm_status, _, calm = expected(kind, command)
    # A command that has no need of the damaged file may leave it as it is; everything else must be the same.
    assert status == calm_status and left | {name: None} == calm | {name: None}, case
    return None


@pytest.mark.parametrize("case", SLICE, ids=lambda case: "-".join(case[:4]))
def test_a_damaged_file_is_a_sentence_or_changes_nothing(runs, expected, small_config, monkeypatch, capsys, case):
    said = check(case[:4], runs, expected, small_config, monkeypatch, capsys)
    assert said is None if case[4] is None else (case[1] in said and case[4] in said)


class KilledReporter(Reporter):
    """Stops the run after Stage I has saved its model, before the manifest knows."""

    def say(self, text):
        if text.startswith("Trained on"):
            raise StoppedError


def test_a_kill_between_a_stage_and_its_record_costs_no_training(small_config, tmp_path):
    config, silent = load_config(small_config, ["sft.epochs=0.6"]), Console(file=io.StringIO())
    run = RunDir(tmp_path / "run")
    with pytest.raises(StoppedError):
        Pipeline(config, run, KilledReporter(silent)).execute(["anchors"])
        Pipeline(config, run, KilledReporter(silent)).execute(["sft"])
    before = (run.sft / "model.safetensors").read_bytes(), run.metrics.read_bytes()
    Pipeline(config, run, Reporter(silent)).execute(["sft"])
    assert ((run.sft / "model.safetensors").read_bytes(), run.metrics.read_bytes()) == before
    assert not run.checkpoints("sft").exists()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["finished", "stopped"])
def test_every_file_of_a_run(runs, expected, small_config, monkeypatch, capsys, kind):
    """Half an hour; PURLD_TEST_CASES, see case_log.py."""
    commands = COMMANDS if kind == "finished" else ("run", "report")
    cases = [(kind, *case) for case in itertools.product(harmed_files(runs / kind), HARMS, commands)]
    assert not wrong_cases(
        "damage", cases, lambda *case: check(case, runs, expected, small_config, monkeypatch, capsys)
    )
