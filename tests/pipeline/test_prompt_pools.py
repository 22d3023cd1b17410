"""Which prompts a run trains on, in which stage, and which it only evaluates on."""

import io
import json

import pytest
from image_factory import save_image
from rich.console import Console
from tiny_vlm import write_model

from purld.config.load import load_config, parse_config
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.model.load import load_encoder
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir


@pytest.fixture
def pools_of(tiny_config):
    def pools_of(*overrides):
        config = load_config(tiny_config, overrides)
        said: list[str] = []
        encoder = load_encoder(config.student)
        return load_prompt_pools(config, encoder, said.append), said

    return pools_of


def test_by_default_both_stages_use_every_training_prompt(pools_of):
    pools, said = pools_of()
    assert pools.sft == pools.align == pools.train
    assert (pools.rows, pools.duplicates, len(pools.train), len(pools.held_out)) == (24, 0, 16, 8)
    assert said == []


def test_stages_can_have_prompts_of_their_own(pools_of):
    pools, _ = pools_of("data.sft_fraction=0.5")
    ids = [{p.id for p in part} for part in (pools.sft, pools.align, pools.held_out)]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    assert ids[0] | ids[1] == {p.id for p in pools.train}
    assert 3 <= len(ids[0]) <= 13
    assert pools_of("data.sft_fraction=0.5")[0].sft == pools.sft
    assert pools_of("data.sft_fraction=0.5", "seed=1")[0].sft != pools.sft
    assert pools_of("data.sft_fraction=0.9")[0].fingerprint == pools.fingerprint, "the teacher is asked the same"


def test_each_stage_trains_on_its_own_part(pools_of, tiny_config, tmp_path):
    overrides = ["data.sft_fraction=0.5", "align.steps=8"]
    pools, _ = pools_of(*overrides)
    run = RunDir(tmp_path / "run")
    quiet = Reporter(Console(file=io.StringIO()))
    Pipeline(load_config(tiny_config, overrides), run, quiet).execute(["anchors", "sft", "align"])
    facts = run.finished_stages()
    assert facts["sft"]["trained_on"] + facts["sft"]["validated_on"] == len(pools.sft)
    assert {row["prompt_id"] for row in read_rows(run.groups)} == {p.id for p in pools.align}
    assert len(read_rows(run.anchors)) == 16, "the teacher is asked about both parts"


def test_the_part_of_stage_one_does_not_follow_that_of_the_held_out_set(pools_of):
    """With one hash for both, the held-out half would leave Stage I nothing."""
    pools, _ = pools_of("data.eval_prompts=null", "data.eval_fraction=0.5", "data.sft_fraction=0.4")
    assert len(pools.sft) > 1


def test_one_prompt_cannot_serve_two_stages(pools_of):
    with pytest.raises(UserError, match=r"prompts\.jsonl: one training prompt cannot be split"):
        pools_of("data.sft_fraction=0.5", "data.max_prompts=1")


def test_a_prompt_in_both_files_is_only_evaluated_on(pools_of, tmp_path):
    first = (tmp_path / "prompts.jsonl").read_text().splitlines()[0]
    with (tmp_path / "held_out.jsonl").open("a") as handle:
        handle.write(f"{first}\n{first}\n")
    pools, said = pools_of()
    assert (len(pools.train), len(pools.held_out), pools.rows, pools.duplicates) == (15, 9, 26, 1)
    assert said[0].endswith("held_out.jsonl: 1 rows repeat a prompt and were dropped.")
    assert said[1] == "1 training prompts are also held out; they are only evaluated on."


TASK = ("data.prompts=null", "data.eval_prompts=null")


def test_a_task_brings_its_own_held_out_set(pools_of, tmp_path):
    for split, numbers in {"train": [1, 2, 3], "test": [3, 4]}.items():
        rows = [{"problem": f"How many, {n}?", "solution": rf"\boxed{{{n}}}", "type": "Geometry"} for n in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("prompts.jsonl", "held_out.jsonl", "answers.jsonl"):
        (tmp_path / name).unlink()
    pools, said = pools_of(*TASK, "data.task=competition_math", f"data.path={tmp_path}")
    assert [p.reference for p in pools.train] == [r"\boxed{1}", r"\boxed{2}"]
    assert [p.reference for p in pools.held_out] == [r"\boxed{3}", r"\boxed{4}"]
    assert "also held out" in said[0]
    pools, _ = pools_of(*TASK, "data.task=competition_math", f"data.path={tmp_path / 'train.jsonl'}")
    assert len(pools.train) + len(pools.held_out) == 3 and pools.held_out


def test_a_student_that_reads_no_images_is_told_by_the_first_row_that_has_some(pools_of, tmp_path):
    entry = {"image_id": 1, "question_id": "x", "question": "What?", "rationales": ["So."]}
    (tmp_path / "aokvqa_v1p0_train.json").write_text(json.dumps([entry]))
    (tmp_path / "train2017").mkdir()
    save_image(tmp_path / "train2017" / "000000000001.jpg")
    with pytest.raises(UserError, match=r"train\.json, entry 1: the prompt has images, and .* reads none"):
        pools_of(*TASK, "data.task=aokvqa_rationale", f"data.path={tmp_path}")


def pool_values(model, folder, last):
    rows = [{"prompt": f"What is {n}?"} for n in range(8)] + [{"prompt": last}]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": {"model": str(model)},
        "data": {"prompts": str(path), "eval_fraction": 0.3},
        "teacher": {"kind": "file", "path": str(path)},
    }


def test_a_text_that_looks_like_a_picture_is_text(shipped_student, tmp_path):
    """A question about the <image> element of SVG can be asked of a model that marks its pictures so."""
    model = write_model("llava", shipped_student, tmp_path / "model")
    config = parse_config(pool_values(model, tmp_path, "What is the <image> element of SVG?"), "run.yaml")
    pools = load_prompt_pools(config, load_encoder(config.student), print)
    assert len(pools.train) + len(pools.held_out) == 9


def test_a_chat_that_the_template_refuses_is_a_bad_row_or_folded(shipped_student, tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 9?"}]
    values = pool_values(shipped_student, tmp_path, chat)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    template = refusing + (shipped_student / "chat_template.jinja").read_text()
    values["student"] |= {"chat_template": template}
    config = parse_config(values, "run.yaml")
    encoder = load_encoder(config.student)
    with pytest.raises(UserError, match=r"line 9: student.chat_template does not accept this chat \(no system turn\);"):
        load_prompt_pools(config, encoder, print)
    said = []
    skipping = parse_config(values | {"data": values["data"] | {"bad_rows": "skip"}}, "run.yaml")
    pools = load_prompt_pools(skipping, encoder, said.append)
    assert len(pools.train) + len(pools.held_out) == 8
    assert any("1 rows that this student cannot read were skipped, first: " in line for line in said)
    folding = parse_config(values | {"student": values["student"] | {"system_turn": "fold"}}, "run.yaml")
    pools = load_prompt_pools(folding, load_encoder(folding.student), print)
    assert len(pools.train) + len(pools.held_out) == 9


def test_a_column_that_is_named_and_that_no_row_has_ends_the_run(pools_of):
    for key in ("reference", "images"):
        with pytest.raises(
            UserError, match=rf"prompts\.jsonl: no row has anything in the column 'x', .*columns\.{key}"
        ):
            pools_of(f"data.columns.{key}=x", "data.check=none")


JUDGED = ("data.check=none", "evaluate.judge={kind: file, path: v.jsonl}", "evaluate.opponent={kind: teacher}")


def test_a_judge_without_references_is_told(pools_of, tmp_path):
    assert not any("the judge compares" in line for line in pools_of(*JUDGED)[1])
    path = tmp_path / "held_out.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for lacking, words in [(1, "1 of 8 lack a reference"), (8, "no held-out prompt has a reference")]:
        kept = [row | ({"reference": None} if n < lacking else {}) for n, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        said = pools_of(*JUDGED)[1]
        assert any(words in line and "the judge compares their answers without one" in line for line in said)


def test_ids_that_repeat_are_told(pools_of, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) | {"id": n // 2} for n, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any("8 rows have an id that another prompt has too (the first is" in line for line in pools_of()[1])


def test_files_are_described_with_the_columns_that_nothing_reads(pools_of, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) | {"topic": "sums"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = pools_of()[0].formats
    assert train.endswith("is JSONL, prompts in the column 'prompt'; columns that are not used: answer, topic")
    assert held_out.endswith("columns that are not used: answer")
    assert pools_of(f"teacher.path={path}")[0].formats[0].endswith("not used: topic")


QUESTION = "How many blue boats lie in the harbour today?"
COPIES = [QUESTION.upper(), QUESTION[:-1], f"  {QUESTION}", f"{QUESTION}!", QUESTION.lower()]


def test_near_copies_of_held_out_prompts_are_not_trained_on(pools_of, tmp_path):
    with (tmp_path / "prompts.jsonl").open("a") as handle:
        handle.writelines(json.dumps({"prompt": text}) + "\n" for text in COPIES)
    with (tmp_path / "held_out.jsonl").open("a") as handle:
        handle.write(json.dumps({"prompt": QUESTION, "reference": "3"}) + "\n")
    pools, said = pools_of()
    assert (len(pools.train), len(pools.held_out)) == (16, 9)
    assert any(line.startswith("5 prompts are near-copies of others, 1 questions in several") for line in said)
    assert any(
        line.startswith("5 training prompts are near-copies of held-out ones") and "prompts.jsonl, line 17, of" in line
        for line in said
    )
    assert len(pools_of("data.near_duplicates=ignore")[0].train) == 21


def test_near_copies_are_on_one_side_of_the_split(pools_of, tmp_path):
    with (tmp_path / "prompts.jsonl").open("a") as handle:
        handle.writelines(json.dumps({"prompt": text}) + "\n" for text in [QUESTION, *COPIES])
    for seed in range(4):
        pools, _ = pools_of("data.eval_prompts=null", "data.eval_fraction=0.5", f"seed={seed}")
        inside = sum(QUESTION[:-1].lower() in prompt.question.lower() for prompt in pools.train)
        assert inside in (0, 6)
