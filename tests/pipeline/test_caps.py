"""An opponent added after the anchors, and caps that end a stage, through the real command line and a real server."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
import yaml
from faulty_server import completion, error, running_server
from typer.testing import CliRunner

from purld.cli import app
from purld.errors import UserError
from purld.evaluation import intervals
from purld.pipeline import evaluate, pipeline
from purld.records import Generation
from purld.runs.files import read_json, read_rows, write_rows
from purld.runs.run_dir import RunDir

PROMPTS, HELD_OUT, QUESTIONS = 16, 8, 32  # questions about two models, in both orders


@pytest.fixture
def server():
    """Answers the judge's questions with A, and all others with a text of their own."""
    with running_server() as server:

        def answer(handler):
            judging = "=== Response B ===" in handler.prompt
            handler.reply(completion("A" if judging else f"Answer to {handler.prompt}"))

        server.default = answer
        yield server


@pytest.fixture
def config(tiny_config, server, monkeypatch):
    """A run that ends with Stage I, with a teacher and a judge behind HTTP, and models whose answers are made up."""

    def made_up(load, prompts, encoder, sampler, samples, batch_size, seed, path, check, progress):
        rows = [Generation(p.id, 0, f"{path.stem} answers {p.id}", 4, True) for p in prompts]
        write_rows(path, map(asdict, rows))
        return rows

    monkeypatch.setattr(evaluate, "answer_prompts", made_up)
    monkeypatch.setattr(intervals, "RESAMPLES", 50)  # no interval is looked at
    values = yaml.safe_load(tiny_config.read_text())
    endpoint = {"kind": "openai", "base_url": server.url, "model": "m", "concurrency": 1}
    values["teacher"] = endpoint | {"max_tokens_per_answer": 100}
    values["align"] = {"method": "sft"}
    values["data"] |= {"check": "none"}
    values["evaluate"] |= {"samples": 1}
    values["evaluate"] |= {"judge": endpoint | {"max_tokens_per_answer": 1}, "opponent": {"kind": "teacher"}}
    tiny_config.write_text(yaml.safe_dump(values))
    return tiny_config


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def purld(config, run):
    """Return what a command writes, in one line; it must end with status 0."""

    def call(command, *arguments):
        result = CliRunner().invoke(app, [command, str(config), *arguments, "--run-dir", str(run.path)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0
        return " ".join(result.output.split())

    return call


def status_of(run, stage):
    shown = CliRunner().invoke(app, ["status", str(run.path)]).stdout
    return next(line.strip() for line in shown.splitlines() if line.strip().startswith(f"{stage} "))


def train(run):
    """Leave what Stage I leaves, without its hours."""
    run.begin("sft")
    run.sft.mkdir()
    run.finish("sft", 1.0)


def test_an_opponent_that_is_added_after_stage_one_is_bought_by_the_evaluation(config, server, run, purld):
    purld("anchors", "evaluate.judge=null", "evaluate.opponent=null")
    train(run)
    assert len(server.bodies) == PROMPTS and not run.opponent.exists()
    plan = purld("check", "teacher.max_calls=20")
    assert "teacher: 8 calls" in plan
    assert "max_calls may leave the last of these calls unsent, as 16 of 20 are spent" in plan
    assert "may leave" not in purld("check", "teacher.max_calls=24")
    said = purld("evaluate")
    assert len(read_rows(run.opponent)) == HELD_OUT and len(server.bodies) == PROMPTS + HELD_OUT + QUESTIONS
    results = read_json(run.results)["models"]["sft"]
    assert (results["judged"], results["win_rate"], results["unjudged"]) == (HELD_OUT, 0.5, 0)
    assert "Held-out prompts answered: 8 answered" in said and "left" not in said
    assert "done before" in purld("evaluate") and len(server.bodies) == PROMPTS + HELD_OUT + QUESTIONS
    damage = run.opponent.read_text()
    run.opponent.write_text(damage[:-9])
    purld("evaluate")
    assert run.opponent.read_text() == damage and len(server.bodies) == PROMPTS + HELD_OUT + QUESTIONS


def test_an_opponent_that_is_added_before_stage_one_is_bought_with_the_anchors(config, server, run, purld):
    purld("anchors", "evaluate.judge=null", "evaluate.opponent=null")
    purld("anchors")
    assert len(read_rows(run.opponent)) == HELD_OUT and len(server.bodies) == PROMPTS + HELD_OUT
    assert "done before" in purld("anchors")


def test_the_judges_key_is_looked_for_before_the_opponent_is_bought(config, server, run, purld):
    purld("anchors", "evaluate.judge=null", "evaluate.opponent=null")
    train(run)
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        purld("evaluate", "evaluate.judge.api_key_env=NO_SUCH_KEY")
    assert len(server.bodies) == PROMPTS and "evaluate" not in run.finished_stages()


def test_what_the_opponent_did_not_answer_is_no_fault_of_the_judge(config, server, run, purld):
    prompts = [json.loads(line)["prompt"] for line in (config.parent / "held_out.jsonl").read_text().splitlines()]
    server.script = {prompts[0]: [error(400)] * 9, prompts[1]: [error(400)] * 9}
    purld("anchors")
    train(run)
    purld("evaluate")
    for metrics in read_json(run.results)["models"].values():
        assert metrics["judged"] == HELD_OUT - 2
        assert metrics["unjudged_reasons"] == {"no_opponent": 4}
    assert server.arrived.count(prompts[0]) == 1, "what failed is not asked again"


def test_an_answer_file_without_the_opponents_answers_is_refused(config, server, run, purld, tmp_path):
    train_on = ("evaluate.opponent.kind=file", f"evaluate.opponent.path={tmp_path / 'others.jsonl'}")
    (tmp_path / "others.jsonl").write_text(json.dumps({"prompt": "another question", "answer": "yes"}) + "\n")
    purld("anchors", *train_on)
    train(run)
    with pytest.raises(UserError, match="answers none of the 8 held-out prompts"):
        purld("evaluate", *train_on)
    assert len(server.bodies) == PROMPTS


def test_a_capped_collection_goes_on_with_a_higher_cap(config, server, run, purld):
    left = "teacher.max_calls (5) left 11 of 16 prompts unasked; raise it"
    capped = ("evaluate.judge=null", "evaluate.opponent=null", "teacher.max_calls=5")
    assert left in purld("anchors", *capped)
    again = purld("anchors", *capped)
    assert "done before" in again and left in again and len(server.bodies) == 5
    assert re.match(r"anchors +capped +5 of 16 prompts answered; teacher.max_calls", status_of(run, "anchors"))
    assert "teacher.max_calls (6) left 10 of 16" in purld("anchors", *capped[:2], "teacher.max_calls=6")
    said = purld("anchors", *capped[:2], "teacher.max_calls=99")
    assert len(server.bodies) == len(set(server.arrived)) == PROMPTS == len(read_rows(run.anchors))
    assert "left" not in said and re.match(r"anchors +done +16 of 16", status_of(run, "anchors"))


def test_what_a_cap_bought_can_be_trained_on_and_then_the_rest_is_not_used(config, server, run, purld, monkeypatch):
    capped = ("evaluate.judge=null", "evaluate.opponent=null", "teacher.max_calls=5")
    purld("anchors", *capped)
    rest = "left 11 of 16 prompts unasked; Stage I has begun without them, so they are not used."
    monkeypatch.setitem(pipeline._RUNNERS, "sft", lambda context: run.sft.mkdir() or {})
    assert rest in purld("sft", *capped)
    said = purld("anchors", *capped[:2], "teacher.max_calls=99")
    assert rest in said
    assert len(server.bodies) == 5 == len(read_rows(run.anchors))
    assert "teacher: 0 calls" in purld("check", *capped[:2])
    assert re.match(r"anchors +done +5 of 16 .*left 11 of 16 prompts unasked", status_of(run, "anchors"))


def test_a_capped_evaluation_goes_on_with_higher_caps(config, server, run, purld):
    """The teacher's cap leaves six of the opponent's answers, the judge's all questions about the second model."""
    assert "or the evaluation asks for the rest" in purld("anchors", "teacher.max_calls=18")
    assert re.match(r"anchors +capped +16 of 16 .*left 6 of 8 held-out prompts", status_of(run, "anchors"))
    train(run)
    caps = ("teacher.max_calls=18", "evaluate.judge.max_calls=4")
    said = purld("evaluate", *caps)
    assert "teacher.max_calls (18) left 6 of 8 held-out prompts without the opponent's answer; raise it" in said
    assert "evaluate.judge.max_calls (4) left 4 of 8 questions to the judge unasked; raise it" in said
    models = read_json(run.results)["models"]
    assert models["base"]["unjudged_reasons"] == {"no_opponent": 12} and models["base"]["judged"] == 2
    assert models["sft"]["unjudged_reasons"] == {"max_calls": 4, "no_opponent": 12} and models["sft"]["judged"] == 0
    again = purld("evaluate", *caps)
    assert "done before" in again and "left 4 of 8 questions" in again and len(server.bodies) == 18 + 4
    assert re.match(r"evaluate +capped ", status_of(run, "evaluate"))
    said = purld("evaluate")
    assert len(server.bodies) == PROMPTS + HELD_OUT + QUESTIONS and "left" not in said
    assert {metrics["judged"] for metrics in read_json(run.results)["models"].values()} == {HELD_OUT}
    assert re.match(r"evaluate +done ", status_of(run, "evaluate"))


@pytest.mark.parametrize("trained", [True, False])
def test_damaged_anchors_are_made_again_from_the_ledger_alone(config, server, run, purld, trained):
    """A prompt that failed, and those that a cap left out, stay without an anchor, whatever the cap is now."""
    prompts = [json.loads(line)["prompt"] for line in (config.parent / "prompts.jsonl").read_text().splitlines()]
    server.script = {prompts[2]: [error(400)]}
    cap = ("evaluate.judge=null", "evaluate.opponent=null", "teacher.max_calls=9")
    purld("anchors", *cap)
    if trained:
        train(run)
        cap = (*cap[:2], "teacher.max_calls=99")
    whole, sent = run.anchors.read_bytes(), len(server.bodies)
    assert len(whole.splitlines()) == 8 and sent == 9
    run.anchors.write_bytes(whole[: len(whole) // 2])
    assert "it is made again" in purld("anchors", *cap)
    assert run.anchors.read_bytes() == whole and len(server.bodies) == sent
    assert "anchors" in run.finished_stages() and ("sft" in run.finished_stages()) == trained


def test_a_file_may_take_the_place_of_a_teacher_that_was_asked(config, server, run, purld):
    """The opponent's answers are then the evaluation's file, and no damage to the anchors."""
    purld("anchors")
    train(run)
    file = ("evaluate.opponent.kind=file", f"evaluate.opponent.path={config.parent / 'answers.jsonl'}")
    purld("evaluate", *file)
    assert run.damaged_files_of("anchors") == [] and run.recorded(run.opponent) is not None
    assert "done before" in purld("evaluate", *file)


def test_settings_that_bought_nothing_can_be_corrected(config, server, run, purld):
    """The remedy of a refused request is another setting; with the first answer the run is bound to its settings."""
    answer, server.default = server.default, error(400)
    offline = ("evaluate.judge=null", "evaluate.opponent=null")
    with pytest.raises(UserError, match="http_400"):
        purld("anchors", *offline)
    assert run.begun_stages() == {"anchors"}
    server.default = answer
    corrected = ("teacher.token_limit_field=max_completion_tokens", "teacher.model=n")
    purld("anchors", *offline, *corrected)
    assert "max_completion_tokens" in json.loads(server.bodies[-1])
    with pytest.raises(UserError, match=r"teacher\.model: n, and now it is m"):
        purld("anchors", *offline)


def test_a_field_of_a_request_does_not_change_because_a_cap_has_its_name(config, run, purld):
    """Caps and addresses may change in a run that has begun; what the answers were asked with may not."""
    asked = ("evaluate.judge=null", "evaluate.opponent=null", "teacher.max_calls=5")
    purld("anchors", *asked, "teacher.extra_body.reasoning.max_tokens=100")
    with pytest.raises(UserError, match=r"teacher.extra_body.reasoning.max_tokens: 100, and now it is 200"):
        purld("anchors", *asked, "teacher.extra_body.reasoning.max_tokens=200")
