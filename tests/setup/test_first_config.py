"""`purld init`: what it asks, finds and writes; and what it writes passes `purld check`."""

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import typer

from purld.cli import main
from purld.config.load import load_config
from purld.errors import UserError
from purld.setup.first_config import prepare_config
from purld.setup.questions import Interview, Wishes, clean_key_variable
from purld.signals import Stopped
from purld.testbed.world.world import generate_problems, teacher_answer

PROBLEMS = generate_problems("counting", "train", 30, 0)
ENDPOINT = {"teacher": "http://127.0.0.1:9/v1", "teacher_model": "t"}
KEY = "sk-proj-4fJ2mQ8sT1vX7yZ0aB3c"


def purld(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["purld", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def alpaca():
    return lines({"instruction": p.question, "input": f"case {n}", "output": "Yes."} for n, p in enumerate(PROBLEMS))


def word_problems():
    return lines({"question": p.question, "gold": 7 + n, "response": f"It is {n}."} for n, p in enumerate(PROBLEMS))


def worked(marks):
    return lines(
        {"question": f"{p.question} ({n})", "answer": f"3 + 4 = 7\n{marks} {n}"} for n, p in enumerate(PROBLEMS)
    )


def choices():
    return lines(
        {"problem": f"{p.question} ({n})", "choices": ["red", "blue"], "label": "AB"[n % 2]}
        for n, p in enumerate(PROBLEMS)
    )


def chats():
    turns = ({"role": "user", "content": p.question} for p in PROBLEMS)
    return lines({"messages": [turn, {"role": "assistant", "content": "Well."}]} for turn in turns)


def texts():
    return "".join(f"{p.question}\n" for p in PROBLEMS)


def table():
    return "id;prompt;topic\n" + "".join(f'{n};"{p.question}";x\n' for n, p in enumerate(PROBLEMS))


CASES = {  # file, content, wishes, what the configuration has to say
    "answers in the file": (
        "a.jsonl",
        lambda: lines({"prompt": p.question, "answer": teacher_answer(p)} for p in PROBLEMS),
        {"teacher": "data"},
        {"teacher.path": "a.jsonl", "data.check": "math", "data.columns.reference": "answer"},
    ),
    "alpaca": (
        "alpaca.json",
        lambda: json.dumps([json.loads(line) for line in alpaca().splitlines()]),
        {"teacher": "data"},
        {"teacher.columns.answer": "answer", "data.check": "auto"},
    ),
    "plain text and an endpoint": (
        "pool.txt",
        texts,
        ENDPOINT | {"input_price": 2.5, "output_price": 10.0, "max_cost": 3.0},
        {"teacher.max_calls": 43, "teacher.max_cost": 3.0, "teacher.api_key_env": None, "data.eval_fraction": 0.2},
    ),
    "word problems with gold": (
        "wp.jsonl",
        word_problems,
        {"teacher": "data"},
        {"data.check": "math", "data.columns.reference": "gold", "teacher.columns.answer": "response"},
    ),
    "worked answers, and a teacher elsewhere": (
        "gsm.jsonl",
        lambda: worked("####"),
        ENDPOINT | {"api_key_env": "TEACHER_API_KEY"},
        {"data.check": "math", "data.columns.reference": "answer", "data.columns.prompt": "question"},
    ),
    "worked answers that are anchors and gold": (
        "gsm.jsonl",
        lambda: worked("The answer is"),
        {},
        {"data.check": "math", "data.columns.reference": "answer", "teacher.columns.answer": "answer"},
    ),
    "choices": ("c.jsonl", choices, ENDPOINT, {"data.check": "choice", "data.columns.reference": "label"}),
    "chats": ("chats.jsonl", chats, {"teacher": "chats.jsonl"}, {"teacher.path": "chats.jsonl", "data.format": "auto"}),
    "a table": ("table.csv", table, ENDPOINT, {"data.check": "auto", "teacher.kind": "openai"}),
}

CHECKED = list(CASES)[:5]  # the others differ in what is written alone


def value_of(config, path):
    for part in path.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_says_what_the_data_are_and_passes_the_check(
    case, random_student, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    name, content, wishes, expected = CASES[case]
    Path(name).write_text(content())
    first = prepare_config(Wishes(model=str(random_student), data=name, **wishes), Path("run.yaml"))
    Path("run.yaml").write_text(first.text)
    config = load_config("run.yaml")
    assert config == first.config
    assert {path: value_of(config, path) for path in expected} == expected
    if case in CHECKED:
        assert purld(monkeypatch, "check", "run.yaml") == 0
        assert "What leaves this machine" in capsys.readouterr().out and not Path("runs").exists()
    # Only what a user needs to see, and all of it within what the student reads.
    assert len([line for line in first.text.splitlines() if line.strip() and not line.strip().startswith("#")]) < 35


@pytest.mark.parametrize(
    ("name", "content", "where"), [("a.jsonl", alpaca, "a.jsonl"), ("wp.jsonl", word_problems, "the column 'response'")]
)
def test_the_answers_in_the_file_are_said_to_be_where_they_are(
    name, content, where, random_student, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content())
    told = []
    prepare_config(Wishes(str(random_student), name, "data"), Path("run.yaml"), say=told.append)
    assert told[-1] == f"teacher: the answers in {where}"


def test_answers_that_are_trained_on_are_not_called_gold_that_only_the_evaluation_reads(
    random_student, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("gsm.jsonl").write_text(worked("The answer is"))
    for teacher, words in (("data", "gold where held out"), ("http://127.0.0.1:9/v1", "only the evaluation reads")):
        wishes = Wishes(str(random_student), "gsm.jsonl", teacher, teacher_model="t")
        assert words in prepare_config(wishes, Path("run.yaml")).text


def test_a_model_without_tokenizer_is_not_asked_for_a_chat_template(random_student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(random_student / name, tmp_path / "bare")
    Path("pool.txt").write_text(texts())
    with pytest.raises(UserError, match="bare holds no tokenizer that can read"):
        prepare_config(Wishes("bare", "pool.txt", **ENDPOINT), Path("run.yaml"))


def test_the_command_writes_shows_the_plan_and_overwrites_nothing(random_student, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_KEY", KEY)
    Path("pool.txt").write_text(texts())
    flags = ["--model", random_student, "--data", "pool.txt", "--teacher", "https://host.test/v1/chat/completions"]
    flags += ["--teacher-model", "t", "--api-key-env", "MY_KEY", "align.tau=0.9", "student.lora={r: 4}"]
    assert purld(monkeypatch, "init", "mine.yaml", *flags) == 0
    shown = capsys.readouterr()
    config = load_config("mine.yaml")
    assert (config.align.tau, config.student.lora.r) == (0.9, 4)
    assert (config.teacher.base_url, config.teacher.api_key_env) == ("https://host.test/v1", "MY_KEY")
    assert "30 rows, 0 of them duplicates" in shown.out and shown.out.rstrip().endswith("purld run mine.yaml")
    assert KEY not in shown.out + shown.err + Path("mine.yaml").read_text()
    before = Path("mine.yaml").read_bytes()
    assert purld(monkeypatch, "init", "mine.yaml", *flags) == 2
    assert "mine.yaml: exists; --force overwrites it" in capsys.readouterr().err
    assert Path("mine.yaml").read_bytes() == before
    assert purld(monkeypatch, "init", "other.yaml") == 2
    assert "--model is missing, and there is no terminal to ask at" in capsys.readouterr().err
    assert not Path("other.yaml").exists()


def test_the_judge_that_is_left_to_the_user_is_valid(random_student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pool.txt").write_text(texts())
    text = prepare_config(Wishes(str(random_student), "pool.txt", **ENDPOINT), Path("run.yaml")).text
    start = text.index("  # judge:")
    Path("run.yaml").write_text(text[:start] + text[start:].replace("  # ", "  "))
    evaluate = load_config("run.yaml").evaluate
    assert (evaluate.judge.base_url, evaluate.opponent.kind) == (ENDPOINT["teacher"], "teacher")


def test_what_is_not_given_is_asked_for_until_it_can_be_used(random_student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pool.txt").write_text(texts())
    typed = iter([
        *("nowhere", str(random_student), "none.txt", "pool.txt", "ftp://x", "https://host.test/v1", "gpt-4o"),
        *(KEY, "TEACHER_API_KEY", "much", "2.5", "10", ""),
    ])  # fmt: skip
    questions, told = [], []

    def ask(question, default):
        questions.append(question)
        return next(typed)

    text = prepare_config(Wishes(), Path("run.yaml"), ask, told.append).text
    assert next(typed, None) is None
    assert len(questions) == 13 and len(set(questions)) == 8
    refused = [line for line in told if line.startswith(("--", "the name"))]
    assert [line.split(":")[0].split(" ")[0] for line in refused] == [
        "--model", "--data", "--teacher", "the", "--input-price"
    ]  # fmt: skip
    assert KEY not in text + "".join(told)
    assert "api_key_env: TEACHER_API_KEY" in text and "max_cost" not in text and "input_price: 2.5" in text


@pytest.mark.parametrize("name", [KEY, "hf_aBcDeFgHiJkLmNoPqRsTuVwX", "AKIAIOSFODNN7EXAMPLE", "my key", "a" * 70])
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_repeated(name):
    with pytest.raises(UserError) as refused:
        clean_key_variable(name)
    assert name not in str(refused.value)


def test_names_of_variables_are_accepted(monkeypatch):
    monkeypatch.setenv("lower_case", "x")
    for name in ("TEACHER_API_KEY", "OPENAI_KEY_2", "K", "lower_case"):
        assert clean_key_variable(name) == name
    assert clean_key_variable("") is None


@pytest.mark.parametrize(
    ("name", "content", "wishes", "words"),
    [
        ("a.jsonl", '{"a": "x", "b": "y"}\n', {}, "not clear which column holds the prompts; add data.columns.prompt"),
        ("a.jsonl", '{"prompt": "x"}\n', {}, "--teacher is missing"),
        ("a.jsonl", '{"prompt": "x"}\n', {"teacher": "data"}, "has no column of answers"),
        ("a.jsonl", '{"prompt": ""}\n{"prompt": "x"}\n', ENDPOINT, "1 of 2 rows cannot be used; a.jsonl, line 1"),
        ("a.txt", "x\n", ENDPOINT | {"max_cost": 1.0}, "max_cost needs input_price"),
        ("a.txt", "x\n", ENDPOINT | {"overrides": ["align.tua=1"]}, "did you mean tau"),
        ("a.txt", "x\n", ENDPOINT | {"overrides": [f"teacher.api_key_env={KEY}"]}, "never the key itself"),
        ("a.txt", "x\n", ENDPOINT | {"overrides": ["data.columns.promt=q"]}, "did you mean prompt"),
        ("a.txt", "x\n", ENDPOINT | {"overrides": ["data.columns=q"]}, "write data.columns.prompt"),
        ("a.txt", "x\n", {"teacher": "b.jsonl", "overrides": ["teacher.colums=3"]}, "did you mean columns"),
        ("a.txt", "x\n", {"teacher": "b.jsonl"}, "answers none of the 1 prompts"),
    ],
)
def test_what_cannot_become_a_configuration_is_told_in_a_sentence(
    name, content, wishes, words, random_student, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    Path("b.jsonl").write_text('{"prompt": "other", "answer": "A"}\n')
    with pytest.raises(UserError) as refused:
        prepare_config(Wishes(model=str(random_student), data=name, **wishes), Path("run.yaml"))
    assert words in str(refused.value) and "\n" not in str(refused.value) and KEY not in str(refused.value)


def test_a_default_is_taken_where_there_is_no_terminal():
    interview = Interview(None, lambda line: None)
    assert interview.answer(None, "--x", "X", str.upper, default="a") == "A"


def test_the_comments_give_the_figures_of_the_plan(random_student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pool.txt").write_text(texts())
    wishes = Wishes(
        model=str(random_student),
        data="pool.txt",
        **ENDPOINT,
        overrides=["sft.batch_size=4", "align.prompts_per_step=2"],
    )
    first = prepare_config(wishes, Path("run.yaml"))
    # 30 prompts, of which 24 are trained on and 21.6 of these in Stage I, or 6 batches of 4 a pass.
    assert "# about 24 updates of 4 answers" in first.text
    assert "# of 2 prompts: about 4.0 passes over the prompts" in first.text
    wishes = dataclasses.replace(wishes, overrides=["align.prompts_per_step=50"])
    # A step has no more prompts than there are: 25 steps are 25 passes over 24 prompts.
    assert "about 25.0 passes over the prompts" in prepare_config(wishes, Path("run.yaml")).text


@pytest.mark.parametrize(
    "key, said", [("data.eval_fraction=abc", "data.eval_fraction"), ("sft.batch_size=0", "sft.batch_size")]
)
def test_a_key_whose_value_is_wrong_is_told_in_a_sentence(key, said, random_student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pool.txt").write_text(texts())
    with pytest.raises(UserError, match=said):
        prepare_config(
            Wishes(model=str(random_student), data="pool.txt", **ENDPOINT, overrides=[key]), Path("run.yaml")
        )


def test_prompts_held_out_in_a_file_of_their_own_leave_no_share_to_hold_out(random_student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pool.txt").write_text(texts())
    wishes = Wishes(
        model=str(random_student),
        data="pool.txt",
        **ENDPOINT,
        overrides=["data.eval_prompts=held.txt", "align.method=sft"],
    )
    text = prepare_config(wishes, Path("run.yaml")).text
    assert "eval_fraction" not in text and "candidates" not in text and "method: sft" in text


def test_a_file_that_cannot_be_written_is_told_before_anything_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("pool.txt").write_text(texts())
    assert purld(monkeypatch, "init", "pool.txt/run.yaml") == 2
    assert "pool.txt is a file; give a path in a folder" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert purld(monkeypatch, "init", "run.yaml") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "end, said, status",
    [
        (typer.Abort(), "the input ended at a question; nothing was written", 2),
        (Stopped(signal.SIGINT), "stopped; nothing was written", 130),
    ],
)
def test_an_end_at_a_question_writes_nothing_and_says_so(end, said, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)

    def prompt(*arguments, **options):
        raise end

    monkeypatch.setattr("typer.prompt", prompt)
    assert purld(monkeypatch, "init") == status
    assert f"purld: {said}." in capsys.readouterr().err and not Path("run.yaml").exists()
