"""An answer of the teacher that broke off and was kept is taught and scored without an end of turn, in every stage."""

import pytest

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.model.likelihood import AnchoredRows, in_context_scores
from purld.model.load import load_encoder, load_model
from purld.pipeline.context import examples_of_pool
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.records import Anchor
from purld.runs.files import read_rows, write_rows
from purld.runs.run_dir import RunDir


def test_a_kept_cut_anchor_stays_one_from_the_teacher_to_stage_two(tiny_config, random_student, tmp_path):
    teacher = f"teacher={{kind: local, model: {random_student}, max_tokens_per_answer: 6}}"
    settings = [teacher, "anchors.truncated=keep", "align.score=in_context", "align.steps=1", "sft.epochs=1"]
    config, run = load_config(tiny_config, settings), RunDir(tmp_path / "run")
    Pipeline(config, run, Reporter()).execute(["anchors", "sft", "align"])
    assert all(row["cut"] for row in read_rows(run.anchors))
    encoder, model = load_encoder(config.student), load_model(config.student, run.sft)
    prompts = {p.id: p for p in load_prompt_pools(config, encoder, lambda line: None).train}
    for group in read_rows(run.groups):
        row = AnchoredRows(prompts[group["prompt_id"]], group["anchor"], [encoder.encode_literal(group["anchor"])])
        (unended,) = in_context_scores(model, encoder, [row], 8)
        assert group["anchor_score"] == pytest.approx(unended.candidates[0], abs=1e-5)


def test_damaged_anchors_of_a_version_that_did_not_tell_cut_ones_are_made_again(tiny_config, random_student, tmp_path):
    teacher = f"teacher={{kind: local, model: {random_student}, max_tokens_per_answer: 6}}"
    config, run = load_config(tiny_config, [teacher, "anchors.truncated=keep"]), RunDir(tmp_path / "run")
    Pipeline(config, run, Reporter()).execute(["anchors"])
    for cut in (True, False):
        rows = [{key: value for key, value in row.items() if cut or key != "cut"} for row in read_rows(run.anchors)]
        write_rows(run.anchors, rows)
        run.record_file("anchors", run.anchors)
        run.begin("sft")
        whole = run.anchors.read_bytes()
        run.anchors.write_bytes(whole[:-9])
        Pipeline(config, RunDir(run.path), Reporter()).execute(["anchors"])
        assert run.anchors.read_bytes() == whole


def test_a_file_of_whole_anchors_is_as_it_was_and_one_of_an_older_version_is_read(tiny_config, tmp_path):
    config, run = load_config(tiny_config), RunDir(tmp_path / "run")
    Pipeline(config, run, Reporter()).execute(["anchors"])
    rows = read_rows(run.anchors)
    assert {tuple(row) for row in rows} == {("prompt_id", "text")}
    pools = load_prompt_pools(config, load_encoder(config.student), lambda line: None)
    assert not any(anchor.cut for _, anchor in examples_of_pool(run, pools.train))
    write_rows(run.anchors, [Anchor(row["prompt_id"], row["text"], cut=True).to_row() for row in rows])
    assert all(anchor.cut for _, anchor in examples_of_pool(run, pools.train))
