"""The Python API: names, laziness, and docs/api.md as it is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import purld
from purld.runs.run_dir import RunDir

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def test_every_public_name_resolves_and_is_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    for name in purld.__all__:
        assert getattr(purld, name) is not None
        assert name in page or name in ("Config", "Plan", "UserError", "RunResults", "ModelResult", "Estimate")
    assert set(purld.__all__) == set(purld._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'reward_model'"):
        purld.reward_model  # noqa: B018


LOOKING = "import purld.report.page, purld.pipeline.ledger_totals, purld.pipeline.watch, purld.pipeline.sweep"


def test_importing_purld_or_looking_at_a_run_loads_no_model_library():
    """One thing after the other, in one process: what an earlier one has loaded no later one unloads."""
    script = ["import sys"]
    for used in ("import purld", "purld.load_config", "purld.UserError", LOOKING):
        script += [used, f"print({used!r}, {{'torch', 'transformers'}} & set(sys.modules))"]
    run = subprocess.run([sys.executable, "-c", "; ".join(script)], capture_output=True, text=True, check=True)
    assert len(lines := run.stdout.splitlines()) == 4
    assert [line for line in lines if not line.endswith(" set()")] == []


def test_python_m_purld_is_the_command_line():
    run = subprocess.run([sys.executable, "-m", "purld", "methods"], capture_output=True, text=True, check=True)
    assert "ldl_grpo" in run.stdout


@pytest.mark.usefixtures("no_figures")
def test_the_page_s_example_runs(tiny_config, tmp_path, monkeypatch, capsys):
    """The first block of docs/api.md, on a run that takes seconds."""
    values = yaml.safe_load(tiny_config.read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values | {"align": values["align"] | {"steps": 2}}))
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(compile(example.replace("align.steps=100", "align.steps=2"), "docs/api.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Prompts" in printed and "16 for training, 8 held out" in printed
    assert re.search(r"^ldl_grpo 0\.\d{3} \[", printed, re.MULTILINE)
    assert set(RunDir("runs/first").finished_stages()) == {"anchors", "sft", "probe", "align", "evaluate", "report"}


def test_stages_run_one_by_one_and_results_are_objects(tiny_config, tmp_path):
    config = purld.load_config(tiny_config, ["align.steps=2"])
    run_dir = tmp_path / "run"
    with pytest.raises(purld.UserError, match="stage anchors is not finished"):
        purld.sft(config, run_dir)
    assert purld.anchors(config, run_dir)["teacher"]["answered"] == 16
    assert purld.sft(config, run_dir)["trained_on"] > 0
    assert purld.align(config, run_dir)["steps"] == 2
    with pytest.raises(purld.UserError, match=r"no results\.json"):
        purld.load_results(run_dir)
    results = purld.evaluate(config, run_dir)
    accuracy = results.models["sft"].accuracy
    assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1
    assert results.models["sft"].win_rate is None  # there is no judge
    assert results.differences["ldl_grpo - sft"].name == "ldl_grpo - sft"
    assert purld.write_report([run_dir]).exists()
