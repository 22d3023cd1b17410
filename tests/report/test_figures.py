"""Test the figures: what they draw and leave out, and that a page can restyle them."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from synthetic import Build, metrics

from purld.report.figures import COLOURS, describe_score_quality, draw_convergence, draw_figures
from purld.report.run_data import RunData, read_run
from purld.runs.files import write_rows


def logged(build: Build, *stages: str, **changes: float | None) -> RunData:
    """Return a run that logged these stages, with some metrics overwritten, or removed if None."""
    run = build(held_out=1, groups=1)
    rows = [row | changes for row in metrics(random.Random(0)) if row["stage"] in stages]
    write_rows(run.metrics, [{k: v for k, v in row.items() if v is not None} for row in rows])
    return read_run(run)


def headings(run: RunData) -> list[str]:
    """Return the headings of the figures, none of which is written as SVG, which takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purld.report.figures.figure_to_svg", lambda *_: "")
        return [drawing.heading for drawing in draw_figures(run)]


def test_two_stages_share_one_axis_of_steps_and_have_one_each_of_values(build: Build) -> None:
    figure = draw_convergence(logged(build, "sft", "align"))
    assert figure is not None
    left, right = figure.axes
    assert left.get_ylabel() == "Stage I: SFT loss"
    assert right.get_ylabel() == "Stage II: LDL-GRPO objective"
    (turn,) = {line.get_xdata()[0] for line in left.lines if line.get_linestyle() == "--"}
    assert turn == 75
    steps = right.lines[0].get_xdata()
    assert (steps[0], steps[-1]) == (76, 195)
    assert {line.get_color() for line in right.lines} == {COLOURS["stage2"]}
    assert left.lines[0].get_color() == COLOURS["stage1"]
    assert list(left.lines[2].get_xdata()) == [25, 50, 75]  # the validation loss


@pytest.mark.parametrize(("stage", "label"), [("sft", "Stage I: SFT loss"), ("align", "Stage II: LDL-GRPO objective")])
def test_one_stage_alone_has_one_axis_and_no_transition(build: Build, stage: str, label: str) -> None:
    figure = draw_convergence(logged(build, stage))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_ylabel() == label
    assert not [line for line in axes.lines if line.get_linestyle() == "--"]


def test_no_training_no_figures(build: Build) -> None:
    run = logged(build)
    assert draw_figures(run) == []
    assert draw_convergence(run) is None


def test_a_metric_that_was_not_logged_has_no_panel(build: Build) -> None:
    assert "KL from the SFT model" in headings(logged(build, "align"))
    assert "KL from the SFT model" not in headings(logged(build, "align", kl=None))
    assert headings(logged(build, "sft")) == ["Two-stage convergence"]


def test_accuracy_over_training_is_drawn_where_gold_checked_it(build: Build) -> None:
    run = logged(build)
    assert headings(run) == []
    rows = [{"step": step, "n": 64, "right": 0.2 + 0.01 * step} for step in range(1, 41)]
    checked = RunData(**(vars(run) | {"results": {"training_accuracy": rows}}))
    (drawing,) = draw_figures(checked)
    assert drawing.heading == "Accuracy over training"
    assert "60%" in drawing.svg and "right candidates" in drawing.svg


def test_nothing_lost_is_not_drawn(build: Build) -> None:
    assert "Candidates lost" not in headings(logged(build, "align", truncated=0, unscored=0))


def test_values_that_are_not_finite_are_gaps(build: Build) -> None:
    run = logged(build, "align")
    rows = [dict(row) for row in run.metrics]
    rows[5]["objective"], rows[6]["objective"] = float("nan"), float("inf")
    figure = draw_convergence(RunData(**(vars(run) | {"metrics": rows})))
    assert figure is not None
    assert np.isfinite(figure.axes[0].lines[0].get_ydata()).all()
    assert len(figure.axes[0].lines[0].get_ydata()) == 118


def test_svg_is_well_formed_follows_the_page_shares_no_id_and_is_the_same_again(build: Build) -> None:
    run = logged(build, "sft", "align")
    figures, again = draw_figures(run, prefix="run0"), draw_figures(run, prefix="run1")
    assert [drawing.svg for drawing in figures] == [drawing.svg.replace("run1-", "run0-") for drawing in again]
    ids: list[str] = []
    for drawing in (*figures, *again):
        root = ET.fromstring(drawing.svg.replace("xlink:href", "href"))
        own = {element.get("id") for element in root.iter() if element.get("id")}
        ids += own
        used = {e.get("href", "#")[1:] for e in root.iter() if e.get("href")}
        assert used <= own
        bare = drawing.svg
        for role, colour in COLOURS.items():
            bare = bare.replace(f"var(--fig-{role}, {colour})", "")
        assert not [colour for colour in COLOURS.values() if colour in bare]
        assert "var(--fig-" in drawing.svg
        assert "<text" in drawing.svg
    assert len(ids) == len(set(ids))


def test_the_way_of_q_towards_d_is_drawn_and_said(build: Build) -> None:
    run = logged(build)
    assert headings(run) == []
    divergence = {"groups": 5, "before": 0.33, "after": 0.11, "closer": 4}
    measured = RunData(**(vars(run) | {"results": {"label_divergence": divergence}}))
    (drawing,) = draw_figures(measured)
    assert drawing.heading == "KL(D‖q) before and after"
    assert "first 5 groups the mean was 0.330 under the policy that drew them and is 0.110" in drawing.caption
    assert "in 4 of them" in drawing.caption
    without = RunData(**(vars(measured) | {"groups": []}))
    assert headings(without) == []


def test_score_quality_is_drawn_and_said(build: Build) -> None:
    bins = [{"n": 30, "score": 0.15, "right": 0.1}, {"n": 10, "score": 0.95, "right": 0.9}]
    quality = {"n": 40, "prompts": 8, "right": 0.3, "auc": 0.91, "auc_within": 0.882, "auc_within_ci": [0.81, 0.94]}
    run = logged(build)
    assert headings(run) == []
    scored = RunData(**(vars(run) | {"results": {"score_quality": quality | {"ece": 0.05, "bins": bins}}}))
    (drawing,) = draw_figures(scored)
    assert drawing.heading == "Scores against gold"
    assert "88.2% of the time (95% interval 81.0 to 94.0; chance is 50)" in drawing.caption
    assert "AUC over all prompts 0.910" in drawing.caption
    assert "self-evaluated score" in drawing.svg
    none = {key: value for key, value in quality.items() if not key.startswith("auc")} | {"ece": 0.3, "bins": bins}
    assert "No prompt has both" in describe_score_quality(none)


def test_the_step_whose_model_was_kept_is_marked_on_each_curve(build: Build) -> None:
    run = RunData(**(vars(logged(build, "sft", "align")) | {"kept_steps": {"sft": 50, "align": 90}}))
    figure = draw_convergence(run)
    assert figure is not None
    marks = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "D"]
    assert [mark.get_xdata()[0] for mark in marks] == [50, 75 + 90]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "◆ step 50 kept" in texts and "◆ step 90 kept" in texts
    alone = draw_convergence(RunData(**(vars(logged(build, "sft")) | {"kept_steps": {"sft": 50}})))
    assert alone is not None and [text.get_text() for text in alone.axes[0].texts] == ["◆ step 50 kept"]
    assert "the steps whose models were kept" in draw_figures(run, whole=False)[0].caption


def test_the_manifest_says_which_step_was_kept(build: Build) -> None:
    run = build(held_out=1, groups=1, logged=False)
    for stage in ("sft", "align"):
        run.begin(stage)
    run.finish("sft", 1.0, best_step=48, steps=240)
    assert read_run(run).kept_steps == {"sft": 48}
    run.finish("align", 1.0, steps=80)
    assert read_run(run).kept_steps == {"sft": 48, "align": 80}, "the last step where none is recorded"
    run.finish("align", 1.0, steps=80, validation={"kept_step": 60})
    assert read_run(run).kept_steps == {"sft": 48, "align": 60}


def test_the_convergence_has_a_drawing_for_a_phone(build: Build) -> None:
    (drawing,) = draw_figures(logged(build, "sft", "align"), whole=False)
    wide, narrow = (float(svg.split('viewBox="0 0 ')[1].split()[0]) for svg in (drawing.svg, drawing.narrow_svg))
    assert narrow < wide / 2
