"""What single commands print."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
from rich.console import Console
from typer.testing import CliRunner

from purld import __version__
from purld.cli import app, main
from purld.clients.ledger import CallResult, Caps, Ledger, Request, Usage
from purld.config.clients import OpenAIEndpoint
from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.teacher_answers import _collection_status
from purld.runs.run_dir import RunDir
from purld.signals import Stopped
from purld.tasks.registry import TASKS


def purld(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def asked(text):
    return Request("http://a/v1", "m", json.dumps({"model": "m", "messages": text}), prompt_id=text)


def test_the_help_lists_a_new_users_commands_first_and_no_summary_is_cut():
    listed = [line.split(maxsplit=1) for line in purld("--help").partition("Commands:\n")[2].splitlines() if line]
    names = [name for name, _ in listed]
    assert names[:5] == ["demo", "init", "doctor", "check", "run"]
    assert len(names) == len(set(names)) and {"align", "ledger", "testbed"} <= set(names)
    assert all(summary.endswith(".") and not summary.endswith("...") for _, summary in listed)


def test_tasks_lists_every_task():
    shown = purld("tasks").split()
    assert {*TASKS, "counting", "writing"} <= set(shown)


def test_the_ledger_is_shown_and_exported_while_a_run_writes_it(tiny_config, tmp_path):
    run = RunDir(tmp_path / "run")
    Pipeline(load_config(tiny_config), run, Reporter(Console(file=io.StringIO()))).execute(["anchors"])
    with Ledger(run.ledger) as ledger:
        ledger.settle(
            ledger.reserve(asked("a"), "teacher", 9, 1.0, Caps()),
            CallResult("answered", "yes", usage=Usage(1200, 5, 0.25)),
        )
        ledger.mark_sent(ledger.reserve(asked("b"), "teacher", 9, 1.5, Caps()))
        lost = ledger.reserve(asked("c"), "teacher", 9, 1.5, Caps())
        ledger.mark_sent(lost)
        ledger.settle(lost, CallResult("unknown", error="timeout"))
        shown = purld("ledger", run.path, "--export", tmp_path / "audit.jsonl")
    columns = [line.rsplit(maxsplit=3) for line in shown.splitlines()]
    assert [header.strip() for header in columns[0]] == ["teacher", "opponent", "judge"]
    teacher = {name.strip(): amount for name, amount, *_ in columns[1:]}
    assert teacher == {
        "prompts": "3", "answered": "1", "failed": "0", "unknown": "1", "under way": "1", "calls": "2",
        "input tokens": "1,200", "output tokens": "5", "cost": "0.2500", "unsettled cost": "3.0000",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows] == ["answered", "sent", "unknown"]


@pytest.mark.parametrize(("price", "spent"), [(2.0, "0.2500 spent"), (0.0, "1,205 tokens spent")])
def test_progress_tells_states_calls_in_flight_and_what_was_spent(tmp_path, price, spent):
    endpoint = OpenAIEndpoint(kind="openai", base_url="http://a/v1", model="m", input_price=price)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.settle(
            ledger.reserve(asked("a"), "teacher", 9, 1.0, Caps()),
            CallResult("answered", "yes", usage=Usage(1200, 5, 0.25)),
        )
        ledger.reserve(asked("b"), "teacher", 9, 1.5, Caps())
        standing = _collection_status(Counter(answered=1, failed=2, refused=0), ledger, "teacher", endpoint)
    assert standing == f"1 answered, 2 failed, 1 in flight, {spent}"


def test_our_own_warnings_are_a_plain_line():
    code = (
        "import warnings; from purld import cli, errors; cli._configure_warnings();"
        "warnings.warn('a model is slow.', errors.PlainWarning); warnings.warn('of others');"
        "warnings.warn_explicit('is deprecated', FutureWarning, 'sample.py', 1, module='purld.model.sample')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.splitlines()
    assert said[0] == "  Warning: a model is slow."
    assert "UserWarning: of others" in said[1]
    assert "deprecated" not in "".join(said)


def test_a_full_disk_is_one_sentence_wherever_it_shows(tiny_config, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr(sys, "argv", ["purld", "anchors", str(tiny_config), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "purld: the disk is full (No space left on device); free some space and run the same command again, "
        "it continues from here."
    )


GOES_ON = "run the same command again to continue."


@pytest.mark.parametrize(
    ("arguments", "inner", "code", "ending"),
    [
        (["run", "CONFIG"], "purld.cli.commands.execute", None, f"purld: interrupted; {GOES_ON}"),
        (["doctor"], "purld.setup.doctor.examine_machine", None, "purld: interrupted."),
        (["watch", "RUN"], "purld.pipeline.watch.watch_run", None, "purld: interrupted."),
        (["check", "CONFIG"], "purld.pipeline.plan.make_plan", None, "purld: interrupted."),
        (
            ["export", "RUN"],
            "purld.pipeline.export.export_model",
            errno.ENOSPC,
            "space and run the same command again.",
        ),
    ],
)
def test_only_a_command_that_goes_on_says_so(
    arguments, inner, code, ending, tiny_config, tmp_path, monkeypatch, capsys
):
    def stop(*_, **__):
        raise Stopped(signal.SIGINT) if code is None else OSError(code, os.strerror(code))

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    monkeypatch.setattr(inner, stop)
    places = {"CONFIG": str(tiny_config), "RUN": str(tmp_path / "run")}
    monkeypatch.setattr(sys, "argv", ["purld", *(places.get(word, word) for word in arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == (130 if code is None else 2)
    assert capsys.readouterr().err.splitlines()[-1].endswith(ending)


def test_version_and_short_help():
    assert purld("--version") == f"purld {__version__}\n"
    assert "Usage" in purld("-h") and "Usage" in purld("run", "-h")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "CONFIG", "--run-dir", "FILE"], "is a file, and a run needs a folder"),
        (["check", "CONFIG", "--run-dir", "FOLDER"], "holds other things than a run, such as notes.txt"),
        (["run", "CONFIG", "--run-dir", "n" * 300], "255 bytes"),
        (["run", "CONFIG", "student.dtype=bf16"], "Write student.dtype=bfloat16"),
        (["export", "nowhere"], "is not a run directory"),
        (["export", "RUN", "--out", "FOLDER"], "is not empty"),
        (["export", "RUN", "--out", "FILE"], "is a file"),
        (["export", "RUN", "--gguf", "--gguf-type", "q9"], "--gguf-type q9: give auto, f32"),
        (["export", "RUN", "--converter", "FOLDER"], "holds no convert_hf_to_gguf.py"),
        (["report", "RUN", "--out", "FOLDER"], "is a folder; give a file"),
        (["compare", "RUN", "nowhere"], "nowhere: is not a run directory"),
    ],
)
def test_a_slip_is_told_before_torch_is_imported(tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "file.yaml").write_text("student: {model: m}\ndata: {prompts: p}\nteacher: {kind: file, path: a}\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    names = {"CONFIG": "file.yaml", "FILE": "file.yaml", "FOLDER": "folder", "RUN": "run"}
    monkeypatch.setattr(sys, "argv", ["purld", *(names.get(a, a) for a in arguments)])
    for module in ("pipeline.pipeline", "pipeline.plan", "pipeline.export", "pipeline.compare"):
        monkeypatch.setitem(sys.modules, f"purld.{module}", None)  # an import of it fails
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
