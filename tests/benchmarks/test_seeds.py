"""The benchmark of seeds: a demo in a folder of its own, which a new run finds empty, and its log beside it."""

from types import SimpleNamespace

import seeds

from purld.runs.files import write_json
from purld.runs.run_dir import RunDir


def test_a_run_finds_its_folder_empty_and_logs_beside_it(tmp_path, monkeypatch):
    commands = []

    def run_demo(command, check, stdout, stderr, env):
        commands.append(command)
        run = RunDir(command[command.index("--run-dir") + 1])
        run.check_place()
        print("learned", file=stdout)
        write_json(run.results, {"models": {}})

    monkeypatch.setattr(seeds, "subprocess", SimpleNamespace(run=run_demo))
    rows = seeds.run_demo("counting", "text", 3, tmp_path / "out", ["align.steps=2"])
    assert rows == [{"models": {}, "task": "counting", "student": "text"}]
    assert (tmp_path / "out" / "counting-3.log").read_text() == "learned\n"
    assert {"seed=3", "evaluate.samples=8", "align.steps=2"} <= set(commands[0])
