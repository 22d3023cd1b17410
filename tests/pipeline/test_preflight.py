"""What is checked before anything is paid for: that self-evaluation fits the context, and that its scores can teach."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.model.load import load_encoder
from purld.pipeline.chosen_score import with_chosen_score
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.preflight import TEMPLATE_TOKENS, check_context, check_scoring
from purld.runs.run_dir import RunDir

CONTEXT = 2048  # of the random student
LIMITS = ["student.max_prompt_tokens=200", "align.max_new_tokens=44", "evaluate.max_new_tokens=30"]


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ([], "anchor"),  # scored by the student, behind itself
        (["data.check=math", "align.score=auto"], "candidate"),  # results are compared
        (["data.check=math", "align.score=in_context"], "anchor"),
        (["data.check=math", "align.score=auto", "align.validate_by=score"], "anchor"),
        (["data.check=math", "align.score=auto", "evaluate.max_new_tokens=90"], "longer candidate"),
    ],
)
def test_the_longest_self_evaluation_fits_to_the_token(settings, answer, tiny_config):
    room = CONTEXT - TEMPLATE_TOKENS - 200
    anchor = {"anchor": room // 2, "candidate": room - 44, "longer candidate": room - 90}[answer]
    check_context(load_config(tiny_config, [*LIMITS, f"student.max_anchor_tokens={anchor}", *settings]))
    with pytest.raises(UserError, match="or the anchor itself, add up to"):
        check_context(load_config(tiny_config, [*LIMITS, f"student.max_anchor_tokens={anchor + 1}", *settings]))


@pytest.mark.parametrize(
    ("score", "check", "refused"),
    [
        ("in_context", "none", "in_context"),
        ("reference", "math", "reference"),
        ("auto", "none", "in_context"),
        ("auto", "math", None),
        ("agreement", "math", None),
        ("expected", "none", None),
    ],
)
def test_groups_are_not_weighed_by_positives_that_a_score_does_not_have(score, check, refused, tiny_config, tmp_path):
    chosen = [f"align.score={score}", f"data.check={check}"]
    weighed = with_chosen_score(load_config(tiny_config, [*chosen, "align.group_weight=positives"]))
    encoder = load_encoder(weighed.student)
    run = RunDir(tmp_path / "run")
    if refused is None:
        check_scoring(weighed, encoder, run)
        return
    with pytest.raises(UserError, match=rf"align\.group_weight=positives .* with align\.score={refused} .*=equal"):
        check_scoring(weighed, encoder, run)
    check_scoring(with_chosen_score(load_config(tiny_config, chosen)), encoder, run)


@pytest.mark.parametrize(("score", "refused"), [("reference", True), ("in_context", True), ("expected", False)])
def test_an_anchor_whose_score_lies_far_above_all_is_no_member_of_the_group(score, refused, tiny_config, tmp_path):
    chosen = [f"align.score={score}", "data.check=none", "align.anchor_in_group=true"]
    config, run = load_config(tiny_config, chosen), RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=r"^align\.anchor_in_group .* leave it out") if refused else nullcontext():
        check_scoring(config, load_encoder(config.student), run)
    run.begin("align")
    check_scoring(config, load_encoder(config.student), run)


def test_a_run_that_cannot_be_weighed_so_is_refused_before_anything_is_bought(tiny_config, tmp_path):
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=r"align\.group_weight=positives"):
        config = load_config(tiny_config, ["align.score=auto", "data.check=none", "align.group_weight=positives"])
        Pipeline(config, run, Reporter())
    assert not run.path.exists()


def test_a_run_that_is_in_stage_two_with_such_weights_goes_on(tiny_config, tmp_path):
    weighed = ["align.score=in_context", "data.check=none", "align.group_weight=positives", "align.steps=1"]
    run = RunDir(tmp_path / "run")
    config = load_config(tiny_config, [*weighed[:2], "align.steps=1"])
    Pipeline(config, run, Reporter()).execute(["anchors", "sft"])
    with pytest.raises(UserError, match=r"align\.group_weight=positives"):  # its Stage II is still to begin
        Pipeline(load_config(tiny_config, weighed), run, Reporter())
    run.begin("align")
    Pipeline(load_config(tiny_config, weighed), run, Reporter())
