"""The API key of a run is nowhere: not in its files, not in what it prints, not in its export."""

import base64
import os
from urllib.parse import quote

import yaml
from faulty_server import SECRET, answer, error, running_server
from forked import ForkedPython

from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir

FORMS = [form.encode() for form in (SECRET, quote(SECRET, safe=""), SECRET.replace("/", "\\/"))]
FORMS.append(base64.b64encode(SECRET.encode()))
COMMANDS = """
import sys
from purld.cli import main
config, run = sys.argv[1:]
for arguments in (["run", config, "--run-dir", run], ["ledger", run, "--export", run + "/audit.jsonl"]):
    sys.argv = ["purld", *arguments]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, arguments
"""


def test_no_file_and_no_line_of_a_whole_run_holds_the_key(tiny_config, tmp_path):
    run = RunDir(tmp_path / "run")
    prompts = [row["prompt"] for row in read_rows(tmp_path / "prompts.jsonl")]
    with running_server() as server:
        server.script = {
            prompts[0]: [error(400, "bad", f"Incorrect API key provided: {SECRET}")],
            prompts[1]: [answer(f"Your key is {SECRET}.")],
            prompts[2]: [error(503, "busy", SECRET)],
            prompts[3]: [error(400, "bad", "Bad header: " + quote(SECRET, safe=""))],
            prompts[4]: [answer("In base64: " + base64.b64encode(SECRET.encode()).decode())],
        }
        values = yaml.safe_load(tiny_config.read_text())
        endpoint = {"kind": "openai", "base_url": server.url, "model": "m", "api_key_env": "TEST_KEY"}
        values["teacher"] = endpoint
        values["sft"]["epochs"], values["align"]["steps"], values["evaluate"]["samples"] = 1, 2, 1
        values["evaluate"] |= {"judge": endpoint, "opponent": {"kind": "teacher"}}
        tiny_config.write_text(yaml.safe_dump(values))
        process = ForkedPython(
            COMMANDS, tiny_config, run.path, said=tmp_path / "said", env=os.environ | {"TEST_KEY": SECRET}
        )
        assert process.wait() == 0, process.said.read_text()
        assert all(headers["authorization"] == f"Bearer {SECRET}" for headers in server.headers)
    files = {path.name: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert {"ledger.sqlite", "config.yaml", "anchors.jsonl", "results.json", "report.html", "audit.jsonl"} <= set(files)
    assert b"Your key is [key]." in files["audit.jsonl"], "the server did say it"
    for name, content in (files | {"what it printed": process.said.read_bytes()}).items():
        assert not any(form in content for form in FORMS), name
