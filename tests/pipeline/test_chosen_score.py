"""`align.score: auto` takes a scorer by what the run can compare, and says which."""

import pytest

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.pipeline.chosen_score import with_chosen_score
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.plan import make_plan
from purld.runs.files import read_json, read_rows
from purld.runs.run_dir import RunDir


@pytest.mark.parametrize(
    ("check", "score", "reason"),
    [
        ("math", "agreement", "compares"),
        ("exact", "in_context", "finds no"),
        ("none", "in_context", "finds no"),
        ("testbed", "in_context", "finds no"),  # it knows the truth, whatever the anchor says
    ],
)
def test_the_check_decides(tiny_config, tmp_path, check, score, reason):
    config = load_config(tiny_config, ["align.score=auto", f"data.check={check}"])
    assert with_chosen_score(config).align.score == score
    training = make_plan(config, RunDir(tmp_path / "run")).sections["Training"]
    assert any(f"scores: {score} (align.score is auto, and data.check {reason}" in line for line in training)


def test_a_named_score_and_a_method_without_one_are_kept(tiny_config):
    for override in ("align.score=reference", "align.method=sft_sft", "align.method=self_ppo"):
        config = load_config(tiny_config, [override])
        assert with_chosen_score(config) == config


@pytest.mark.parametrize("check", ["none", "testbed"])
def test_agreement_without_a_comparison_is_refused_before_anything_is_bought(tiny_config, tmp_path, check):
    run = RunDir(tmp_path / "run")
    config = load_config(tiny_config, ["align.score=agreement", f"data.check={check}"])
    with pytest.raises(UserError, match=r"align\.score=agreement compares .* needs data\.check=math"):
        Pipeline(config, run, Reporter())
    assert not run.path.exists()


@pytest.mark.usefixtures("no_figures")
def test_auto_runs_and_the_run_directory_names_the_scorer(tiny_config, tmp_path):
    run = RunDir(tmp_path / "run")
    Pipeline(
        load_config(tiny_config, ["align.score=auto", "align.steps=2", "data.check=math"]), run, Reporter()
    ).execute(["anchors", "sft", "align"])
    assert read_json(run.probe)["chosen"] == "agreement" and "score: agreement" in run.config.read_text()
    scores = {score for row in read_rows(run.groups) for score in row["scores"]}
    assert scores <= {0.0, 1.0} and {row["anchor_score"] for row in read_rows(run.groups)} == {1.0}
