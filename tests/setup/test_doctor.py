"""`purld doctor`: each thing that can be wrong is found and comes with its remedy; a key is never shown."""

import email.utils
import json
import sys
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from purld.cli import main
from purld.config.clients import OpenAIEndpoint
from purld.config.load import load_config
from purld.model.memory import FIT
from purld.pipeline.plan import make_plan
from purld.pipeline.plan_machine import plan_update
from purld.pipeline.preflight import check_before_spending
from purld.runs.run_dir import RunDir
from purld.setup import check_machine
from purld.setup.check_endpoint import check_endpoint

KEY = "sk-live-4fJ2mQ8sT1vX7yZ0aB3c"
MODELS = json.dumps({"object": "list", "data": [{"id": "big"}, {"id": "small"}]})
REPLIES = {  # by the first part of the address: status, body
    "good": (200, MODELS),
    "other": (200, json.dumps({"data": [{"id": f"m{n}"} for n in range(9)]})),
    "quotes": (200, json.dumps({"data": [{"id": f"for Bearer {KEY}"}, {"id": KEY[8:]}, {"id": "big"}]})),
    "page": (200, "<html>welcome</html>"),
    "none": (404, '{"detail": "Not Found"}'),
    "refuses": (401, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}."}})),
    "pays": (402, "{}"),
    "moves": (308, ""),
    "busy": (503, '{"error": "overloaded"}'),
    "late": (200, MODELS),
}


class Handler(BaseHTTPRequestHandler):
    """Replies as the address says, and notes what it was asked."""

    def do_GET(self):
        case = self.path.split("/")[1]
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        status, body = REPLIES[case]
        self.send_response_only(status)
        self.send_header("Date", email.utils.formatdate(time.time() - (900 if case == "late" else 0), usegmt=True))
        self.send_header("Location", "http://127.0.0.1:9/")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def examine(server, case, monkeypatch, model="big", **settings):
    monkeypatch.setenv("MY_KEY", KEY)
    url = f"http://127.0.0.1:{server.server_port}/{case}/v1"
    given = {"api_key_env": "MY_KEY"} | settings
    found = list(check_endpoint("teacher", OpenAIEndpoint(kind="openai", base_url=url, model=model, **given)))
    assert KEY not in str(found)
    return found


@pytest.mark.parametrize(
    ("case", "verdict", "words"),
    [
        ("good", "ok", "lists big"),
        ("other", "warning", "does not list 'big', but m0, m1, m2, m3, m4, …"),
        ("page", "warning", "its answer is no list of models; whether key and model are right cannot be known"),
        ("none", "warning", "has no list of models (HTTP 404); whether key and model are right cannot be known"),
        ("refuses", "wrong", "refuses the key (HTTP 401: Incorrect API key provided"),
        ("pays", "wrong", "asks for payment"),
        ("moves", "wrong", "redirects to another address (HTTP 308)"),
        ("busy", "warning", "answers with HTTP 503: overloaded"),
    ],
)
def test_what_an_endpoint_answers(server, monkeypatch, case, verdict, words):
    key, answer = examine(server, case, monkeypatch)
    assert (key.verdict, key.text) == ("ok", "is set (MY_KEY)")
    assert (answer.verdict, answer.subject) == (verdict, "teacher")
    assert words in answer.text and bool(answer.remedy) == (verdict != "ok" and case not in ("page", "none"))


def test_a_key_that_the_list_of_models_quotes_is_not_shown(server, monkeypatch):
    *_, answer = examine(server, "quotes", monkeypatch, model="small")
    assert "does not list 'small', but for Bearer [key], [key], big" in answer.text
    *_, answer = examine(server, "quotes", monkeypatch)
    assert answer.verdict == "ok"
    monkeypatch.setenv("PLACEHOLDER", "big")
    *_, answer = examine(server, "good", monkeypatch, api_key_env="PLACEHOLDER")
    assert answer.verdict == "ok", "the model that was asked for keeps its name, whatever the key"


def test_one_request_is_made_and_it_carries_nothing_but_the_key(server, monkeypatch):
    server.seen.clear()
    examine(server, "good", monkeypatch)
    assert server.seen == [("/good/v1/models", f"Bearer {KEY}")]


def test_a_clock_that_differs_from_the_servers(server, monkeypatch):
    *_, clock = examine(server, "late", monkeypatch)
    assert (clock.verdict, clock.subject) == ("warning", "clock") and "s ahead of" in clock.text


def test_an_endpoint_that_is_not_there_and_keys_that_are_not(server, monkeypatch, tmp_path):
    monkeypatch.delenv("NO_KEY", raising=False)
    unreachable = OpenAIEndpoint(kind="openai", base_url="http://127.0.0.1:9", model="m")
    key, answer = check_endpoint("teacher", unreachable)
    assert key.verdict == "ok" and "server on this machine" in key.text
    assert answer.verdict == "wrong" and "cannot be reached: " in answer.text
    missing, reached = examine(server, "refuses", monkeypatch, api_key_env="NO_KEY")
    assert missing.verdict == "wrong" and missing.remedy == "export NO_KEY=…"
    assert reached.verdict == "ok" and "can be reached" in reached.text
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o644)
    readable, _ = examine(server, "good", monkeypatch, api_key_env=None, api_key_file=str(file))
    assert readable.verdict == "warning" and readable.remedy == f"chmod 600 {file}"
    file.chmod(0o600)
    assert examine(server, "good", monkeypatch, api_key_env=None, api_key_file=str(file))[0].verdict == "ok"


def test_versions_outside_the_tested_ranges(monkeypatch):
    installed = {"good": "1.5", "old": "0.9", "optional": "1.0"}
    wanted = ["good>=1,<2", "old>=1", "gone>=3", "optional>=2; extra == 'math'"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(metadata, "metadata", lambda name: SimpleNamespace(get_all=lambda key: [">=99"]))

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    found = list(check_machine.check_versions())
    assert [(f.verdict, f.remedy) for f in found] == [
        ("wrong", "use Python >=99"), ("wrong", "pip install 'old>=1'"), ("wrong", "pip install 'gone>=3'"), ("ok", "")
    ]  # fmt: skip
    assert "good 1.5" in found[-1].text and "optional" not in found[-1].text


def test_memory_disk_clock_and_locale(monkeypatch, tmp_path):
    enough, little = check_machine.check_memory(2**20), check_machine.check_memory(2**60)
    assert (enough.verdict, little.verdict) == ("ok", "wrong") and "student.lora" in little.remedy
    assert [f.verdict for f in check_machine.check_disk(tmp_path / "runs" / "new")][1] == "ok"
    assert list(tmp_path.iterdir()) == []
    assert check_machine.check_clock(1e9).verdict == "wrong" and check_machine.check_clock().verdict == "ok"
    monkeypatch.setenv("LC_ALL", "xx_YY.UTF-8")
    locale = check_machine.check_locale()
    assert locale.verdict == "warning" and "xx_YY.UTF-8 is not installed" in locale.text
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert check_machine.check_locale().verdict == "ok"

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 5))
    assert [f.verdict for f in check_machine.check_disk(tmp_path)] == ["wrong", "wrong"]
    assert list(tmp_path.iterdir()) == []


def doctor(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["purld", "doctor", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().out


def test_the_command_ends_with_2_if_something_is_wrong(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("purld.setup.doctor.examine_machine", lambda run: iter(()))
    there = ["--run-dir", tmp_path / "run"]
    status, shown = doctor(monkeypatch, capsys, tiny_config, *there)
    assert status == 0 and "is whole:" in shown and shown.splitlines()[-1].startswith("0 wrong, ")
    status, shown = doctor(
        monkeypatch, capsys, tiny_config, "student.max_prompt_tokens=9000", "data.prompts=none.jsonl", *there
    )
    assert status == 2 and "lower one of them" in shown and "none.jsonl: no such file" in shown
    assert shown.splitlines()[-1].startswith("2 wrong, ")
    status, shown = doctor(monkeypatch, capsys, tiny_config, "align.tua=1")
    assert status == 2 and "did you mean tau" in shown
    assert not Path(tmp_path / "run").exists()


def data_lines(shown):
    """Return the verdict and the words of each line about files, by subject."""
    lines = [line.split(maxsplit=2) for line in shown.splitlines() if not line.startswith(" ")]
    return {line[1]: (line[0], line[2]) for line in lines if line[1] in ("data", "teacher", "evaluate.opponent")}


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "there are no prompts"), ("\n\n", "there are no prompts"), ('{"words": 1}\n', "words"), ("{", "line 1")],
)
def test_a_file_of_prompts_is_read_as_a_run_reads_it(tiny_config, tmp_path, monkeypatch, capsys, content, words):
    monkeypatch.setattr("purld.setup.doctor.examine_machine", lambda run: iter(()))
    empty = tmp_path / "prompts.jsonl"
    empty.write_text(content)
    status, shown = doctor(monkeypatch, capsys, tiny_config, f"data.prompts={empty}", "--run-dir", tmp_path / "run")
    verdict, said = data_lines(shown)["data"]
    assert (status, verdict) == (2, "wrong") and str(empty) in said and words in said


def test_a_file_of_answers_is_read_too(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("purld.setup.doctor.examine_machine", lambda run: iter(()))
    others, empty = tmp_path / "others.jsonl", tmp_path / "empty.jsonl"
    others.write_text('{"prompt": "an unknown prompt", "answer": "a"}\n')
    empty.write_text("")
    judge = "evaluate.judge={kind: local, model: " + str(load_config(tiny_config).student.model) + "}"
    given = [f"teacher.path={others}", judge, "evaluate.opponent.kind=file", f"evaluate.opponent.path={empty}"]
    status, shown = doctor(monkeypatch, capsys, tiny_config, *given, "--run-dir", tmp_path / "run")
    lines = data_lines(shown)
    assert status == 2 and lines["data"][0] == "ok"
    assert lines["teacher"][0] == "wrong" and "others.jsonl answers 0 of " in lines["teacher"][1]
    assert lines["evaluate.opponent"][0] == "wrong" and "empty.jsonl" in lines["evaluate.opponent"][1]


def test_memory_is_that_of_the_plan(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("purld.setup.doctor.examine_machine", lambda run: iter(()))
    run = RunDir(tmp_path / "run")
    _, shown = doctor(monkeypatch, capsys, tiny_config, "--run-dir", run.path)
    planned = next(line for line in make_plan(load_config(tiny_config), run).sections["Student"] if "peak" in line)
    assert planned.strip().removeprefix("about ") in shown
    needed = plan_for_memory(tiny_config, run)
    cases = {
        10 * needed.need.total: ("ok", ""),
        int(needed.needed(8).total / FIT) + 1: ("warning", "align.micro_batch_size=8,"),
        int(needed.needed(1).total / FIT) - 1: ("wrong", "align.max_new_tokens"),
    }
    for free, (verdict, remedy) in cases.items():
        monkeypatch.setattr(check_machine, "_free_memory", lambda free=free: ("memory", free))
        found = check_machine.check_memory(needed.need.weights, needed)
        assert (found.verdict, remedy in found.remedy) == (verdict, True), found


def plan_for_memory(path, run):
    """Return what an update needs whose activations are most of it."""
    config = load_config(path, ["align.max_new_tokens=600", "align.candidates=64", "align.micro_batch_size=64"])
    _, sizes = check_before_spending(config, run)
    return plan_update(config, sizes, 100)


def test_an_installation_without_torch_is_told_and_no_error(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("purld.setup.doctor.examine_machine", lambda run: iter(()))
    monkeypatch.setitem(sys.modules, "purld.setup.check_config", None)
    status, shown = doctor(monkeypatch, capsys, tiny_config, "--run-dir", tmp_path / "run")
    assert status == 2 and "nothing in it can be looked at: " in shown
