"""Without gold and without a judge, models are compared by p_sft's own scores on prompts that no stage trained on."""

from pathlib import Path

import pytest
import yaml

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.display.results import describe_self_comparison, print_results
from purld.model.likelihood import AnchoredRows, in_context_scores
from purld.model.load import load_encoder, load_model
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.pipeline.self_comparison import describe_comparison
from purld.pipeline.stage_two_split import plan_split
from purld.runs.files import read_json, read_rows
from purld.runs.run_dir import RunDir
from purld.training.sft import in_validation_part


@pytest.fixture
def unmeasured(tiny_config):
    """The tiny run without a check of answers, and with a file of answers to the training prompts alone."""
    values = yaml.safe_load(tiny_config.read_text())
    values["data"]["check"] = "none"
    values["align"] |= {"score": "in_context", "steps": 2}
    values["sft"] |= {"validation_fraction": 0.5, "epochs": 1}
    values["evaluate"]["samples"] = 1
    answers = Path(values["teacher"]["path"])
    rows = answers.read_text().splitlines(keepends=True)
    Path(values["data"]["prompts"] + ".all").write_text("".join(rows))
    answers.write_text("".join(rows[:16]))
    tiny_config.write_text(yaml.safe_dump(values))
    return tiny_config


def pools_of(config):
    return load_prompt_pools(config, load_encoder(config.student), lambda line: None)


def described(config, pools):
    return describe_comparison(config, pools, RunDir("no-run"))


@pytest.mark.usefixtures("no_figures")
def test_the_slice_is_kept_out_of_both_stages_and_the_verdict_is_called_an_opinion(unmeasured, tmp_path, capsys):
    config, run = load_config(unmeasured), RunDir(tmp_path / "run")
    pools = pools_of(config)
    slice_ids = {p.id for p in pools.sft if in_validation_part(p, config.sft.validation_fraction)}
    assert len(slice_ids) >= 2
    assert not slice_ids & {p.id for p in plan_split(config, pools).training}
    assert f"{len(slice_ids)} prompts of Stage I's validation part" in " ".join(described(config, pools))

    Pipeline(config, run, Reporter()).execute()
    assert not slice_ids & {row["prompt_id"] for row in read_rows(run.groups)}
    assert {row["prompt_id"] for row in read_rows(run.generations("sft.validation"))} == slice_ids
    compared = read_json(run.results)["self_comparison"]
    assert compared["n"] == len(slice_ids)
    assert list(compared["score"]) == ["base", "sft", "ldl_grpo"]
    assert 0 <= compared["pairs"]["sft - base"]["preferred"] <= 1
    capsys.readouterr()
    print_results(run)
    shown = capsys.readouterr().out
    assert "the student's opinion, no proof" in shown and "What that score is worth" in shown
    assert "tokens per answer" in shown


@pytest.mark.usefixtures("no_figures")
def test_answers_are_scored_whole_and_one_that_the_limit_cut_has_no_end(unmeasured, tmp_path):
    limits = ["evaluate.max_new_tokens=24", "student.max_anchor_tokens=16"]
    config, run = load_config(unmeasured, limits), RunDir(tmp_path / "run")
    Pipeline(config, run, Reporter()).execute()
    encoder, model = load_encoder(config.student), load_model(config.student, run.sft)
    anchors = {row["prompt_id"]: row["text"] for row in read_rows(run.anchors)}
    prompts = {p.id: p for p in pools_of(config).sft}
    found = read_json(run.results)["self_comparison"]["score"]
    lengths = []
    for name, score in found.items():
        rows = read_rows(run.generations(f"{name}.validation"))
        assert not all(row["finished"] for row in rows)
        drawn = []
        for row in rows:
            ids = [*encoder.encode_literal(row["text"]), *([encoder.end] if row["finished"] else [])]
            lengths.append(len(ids))
            drawn.append(AnchoredRows(prompts[row["prompt_id"]], anchors[row["prompt_id"]], [ids]))
        scores = [scores.candidates[0] for scores in in_context_scores(model, encoder, drawn, 8)]
        assert score == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    assert max(lengths) > config.student.max_anchor_tokens


def test_held_out_answers_of_the_file_are_taken_first(unmeasured):
    config = load_config(unmeasured)
    Path(config.teacher.path).write_text(Path(config.data.prompts + ".all").read_text())
    pools = pools_of(config)
    assert plan_split(config, pools).training == pools.align
    assert "8 held-out prompts, given the teacher's answers in" in " ".join(described(config, pools))


@pytest.mark.parametrize(
    ("override", "expected"),
    [("sft.validation_fraction=0", "only diversity and length"), ("data.check=testbed", "")],
)
def test_what_cannot_or_need_not_be_compared_is_said(unmeasured, override, expected):
    config = load_config(unmeasured, [override])
    pools = pools_of(config)
    assert expected in " ".join(described(config, pools))
    assert bool(described(config, pools)) == bool(expected)
    assert plan_split(config, pools).training == pools.align


def test_the_sentences_name_score_anchors_pairs_and_probe():
    compared = {
        "scorer": "in_context",
        "anchors": "held-out prompts",
        "n": 8,
        "score": {"base": 0.1, "sft": 0.2},
        "pairs": {"sft - base": {"preferred": 0.75, "preferred_ci": [0.5, 0.9]}},
    }
    lines = describe_self_comparison({"self_comparison": compared, "probe": {"verdict": "It tells candidates apart."}})
    assert "own in_context score of 8 answers to held-out prompts" in lines[0]
    assert lines[1:] == [
        "  SFT scores above Base on 75% [50%, 90%] of them.",
        "  What that score is worth: It tells candidates apart.",
    ]
    assert describe_self_comparison({}) == []
