"""What a user may write, and the one sentence they get for what they may not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from purld.config.load import load_config, parse_config
from purld.config.methods import LdlGrpo
from purld.config.schema import Config
from purld.errors import UserError
from purld.methods.table import METHODS

MINIMAL = {
    "student": {"model": "m"},
    "data": {"prompts": "p.jsonl"},
    "teacher": {"kind": "file", "path": "a.jsonl"},
}
CONFIGS = [  # configs/launch/ is for launchers
    path for path in sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")) if path.parent.name != "launch"
]


def with_values(**sections):
    return MINIMAL | sections


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path):
    assert isinstance(load_config(path), Config)


def test_defaults_are_the_vetted_method():
    config = parse_config(MINIMAL, "x")
    assert config.align == LdlGrpo()
    assert (config.align.tau, config.align.beta) == (1.2, 0.01)


def test_method_may_be_left_out():
    assert parse_config(with_values(align={"tau": 0.9}), "x").align.tau == 0.9


ALIGN = {"candidates": 4, "gamma": 3.0, "tau": 0.9, "beta": 0.02, "steps": 7, "learning_rate": 1e-4, "top_p": 0.9}


@pytest.mark.parametrize("method", METHODS)
def test_changing_the_method_is_enough(method):
    """What all methods have is kept, what only others have is set aside, what none has is an error."""
    values = MINIMAL | {"teacher": {"kind": "local", "model": "t"}}
    section = parse_config(values | {"align": ALIGN | {"method": method}}, "x").align
    assert section.method == method
    kept = {key: value for key, value in ALIGN.items() if key in type(section).model_fields}
    assert kept == {key: getattr(section, key) for key in kept}
    assert method == "sft" or {"steps", "learning_rate"} <= kept.keys()
    with pytest.raises(UserError, match=r"unknown key align\.temprature"):
        parse_config(values | {"align": ALIGN | {"method": method, "temprature": 1.0}}, "x")


def test_what_only_other_methods_have_is_named():
    values = with_values(align={"method": "anchor_grpo", "gamma": 3.0, "tau": 0.9, "clip": 0.1})
    assert parse_config(values, "x").set_aside == (
        "align.gamma and align.tau are set aside: only other methods than anchor_grpo have such a setting."
    )
    alone = parse_config(with_values(align={"margin": 0.1}), "x").set_aside
    assert alone == "align.margin is set aside: only other methods than ldl_grpo have such a setting."
    assert parse_config(with_values(align={"gamma": 3.0}), "x").set_aside is None


def test_updates_count_their_candidates_once():
    settings = {"method": "anchor_grpo", "steps": 10, "updates_per_rollout": 4, "checkpoint_steps": 4}
    section = parse_config(with_values(align=settings | {"candidates": 3, "prompts_per_step": 2}), "x").align
    assert section.most_groups == 3 * 2  # three rollouts of two prompts


@pytest.mark.parametrize(
    ("values", "prompts", "steps", "groups"),
    [
        ({"prompts_per_step": 8, "steps": 10}, 100, None, 80),
        ({"prompts_per_step": 8, "steps": 10}, 3, None, 30),  # no step has more prompts than there are
        ({"prompts_per_step": 4, "steps": 6}, 10, None, 2 * (4 + 4 + 2)),  # a pass ends with what is left
        ({"prompts_per_step": 4, "steps": 8}, 10, None, 2 * 10 + 4 + 4),
        ({"prompts_per_step": 4, "steps": 50}, 10, 4, 10 + 4),  # that ended early
        ({"prompts_per_step": 4, "steps": 6, "updates_per_rollout": 2, "checkpoint_steps": 2}, 10, None, 8 + 4),
        ({"prompts_per_step": 4, "steps": 6}, 0, None, 0),
    ],
)
def test_groups_of_a_pool_are_counted_as_the_trainer_draws_them(values, prompts, steps, groups):
    section = parse_config(with_values(align={"method": "anchor_grpo"} | values), "x").align
    assert section.groups_drawn(prompts, steps) == groups


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"student": {}}, "key student.model is missing"),
        ({"student": {"modle": "m"}}, "did you mean model?"),
        ({"student": {"model": "m", "lora": {"rank": 8}}}, "unknown key student.lora.rank"),
        ({"alignment": {}}, "did you mean align?"),
        ({"teacher": {"kind": "gpt", "path": "x"}}, "teacher.kind is 'gpt'; it can be openai, file, local"),
        ({"teacher": {"path": "x"}}, "key teacher.kind is missing"),
        (
            {"teacher": {"kind": "openai", "base_url": "http://t/v1", "model": "m", "max_image_side": 8}},
            "teacher.max_image_side must be greater than or equal to 32",
        ),
        ({"teacher": {"kind": "file", "path": "x", "colums": {}}}, "unknown key teacher.colums; did you mean columns?"),
        ({"align": {"tau": -1}}, "align.tau must be greater than 0 (found -1)"),
        ({"align": {"candidates": 1}}, "align.candidates"),
        ({"align": {"method": "ppo2"}}, "align.method is 'ppo2'"),
        ({"align": {"q": "prob"}}, "align.q"),
        ({"align": {"method": "anchorrank_dpo", "beta": 0}}, "align.beta must be greater than 0"),
        ({"align": {"method": "anchor_grpo", "clip": 1.0}}, "align.clip"),
        (
            {"align": {"method": "anchor_grpo", "updates_per_rollout": 4}},
            "align: checkpoint_steps (50) must be a multiple of updates_per_rollout (4)",
        ),
        (
            {"align": {"importance_cap": 2, "temperature": 0.7}},
            "align: importance_cap weighs by log-probs at temperature 1",
        ),
        ({"align": {"importance_cap": 2, "top_p": 0.9}}, "set temperature and top_p to 1, or leave importance_cap out"),
        ({"align": {"method": "teacher_judge_grpo"}}, "teacher.kind file holds answers only"),
        ({"data": {"prompts": "p", "eval_fraction": 1.0}}, "data.eval_fraction"),
        ({"data": {}}, "data: give either prompts, or task and path"),
        ({"data": {"prompts": "p", "task": "aokvqa_mc", "path": "d"}}, "data: give either prompts, or task and path"),
        ({"data": {"task": "aokvqa_mc"}}, "data: task and path go together"),
        ({"data": {"task": "poetry", "path": "d"}}, "data.task is 'poetry'; it can be writingprompts_cw"),
        ({"data": {"task": "aokvqa_mc", "path": "d", "eval_prompts": "e"}}, "eval_prompts and columns go with prompts"),
        ({"data": {"prompts": "p", "sft_fraction": 1.0}}, "data.sft_fraction"),
        ({"seed": "one"}, "seed must be a whole number (found 'one')"),
        (
            {"align": {"micro_batch_size": "most"}},
            "align.micro_batch_size must be a whole number or auto (found 'most').",
        ),
        ({"align": {"steps": 2.5}}, "align.steps must be a whole number (found 2.5)"),
        ({"align": {"learning_rate": "1e-4x"}}, "align.learning_rate must be a number (found '1e-4x')"),
        ({"evaluate": {"opponent": {"kind": "teacher"}}}, "go together"),
        ({"student": None}, "student"),
        ({"anchors": {"thinking": "keep"}}, "so student.thinking must be keep as well"),
        ({"student": {"model": "m", "thinking": "off"}}, "student.thinking is 'off'; it can be strip, keep, fail"),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(sections, sentence):
    with pytest.raises(UserError) as error:
        parse_config(with_values(**sections), "run.yaml")
    assert str(error.value).startswith("run.yaml: ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_name_of_one_of_the_models_chat_templates_stays_a_name():
    named = parse_config(with_values(student={"model": "m", "chat_template": "tool_use"}), "run.yaml")
    assert named.student.chat_template == "tool_use"


def test_a_chat_template_is_read_from_its_file_once(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}\n")
    for given in (str(file), "{{ messages }}\n"):
        student = parse_config(with_values(student={"model": "m", "chat_template": given}), "run.yaml").student
        assert student.chat_template == "{{ messages }}\n"
    with pytest.raises(UserError, match=r"student.chat_template: .*other.jinja cannot be read \(No such file"):
        parse_config(with_values(student={"model": "m", "chat_template": str(tmp_path / "other.jinja")}), "run.yaml")


def test_a_cap_on_cost_needs_prices():
    endpoint = {"kind": "openai", "base_url": "http://127.0.0.1/v1", "model": "m", "max_cost": 1.0}
    with pytest.raises(UserError, match="max_cost needs input_price"):
        parse_config(with_values(teacher=endpoint), "x")


def test_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(path, ["align.tau=0.9", "sft.learning_rate=1e-5", "student.lora={r: 4}", "seed=3"])
    assert (config.align.tau, config.sft.learning_rate, config.student.lora.r, config.seed) == (0.9, 1e-5, 4, 3)


@pytest.mark.parametrize("override", ["align.tau", "=3", "student.model.x=1", "align.tau=[1"])
def test_bad_overrides_are_named(tmp_path, override):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(UserError, match="override"):
        load_config(path, [override])


@pytest.mark.parametrize("content", [b"student: [", b"\xff\xfe\x00", b"just text", b"", b"- a\n- b\n"])
def test_what_is_no_configuration_is_named(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"run\.yaml") as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "module",
    [
        *("purld.cli", "purld.cli.status", "purld.config.schema", "purld.pipeline.status", "purld.records"),
        *("purld.setup.questions", "purld.templates"),
    ],
)
def test_quick_modules_import_nothing_heavy(module):
    heavy = "torch transformers trl peft openai matplotlib datasets numpy"
    code = f"import {module}, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def problem_of(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path, list(overrides))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("student.dtype=bf16", "did you mean bfloat16? Write student.dtype=bfloat16"),
        ("align.method=grpo", "Write align.method=ldl_grpo"),
        ("align.method=LDL-GRPO", "Write align.method=ldl_grpo"),
        ("student.lora=true", "write student.lora.r=16, or student.lora=null"),
        ("teacher=openai", "write teacher.kind=openai"),
        ("align=sft_sft", "write align.method=sft_sft"),
        ("report_to=wandb", "write report_to=[wandb]"),
        ("data=pool.jsonl", "write data.prompts=VALUE"),
    ],
)
def test_a_value_that_is_nearly_right_is_answered_with_how_to_write_it(tmp_path, override, words):
    assert words in problem_of(tmp_path, yaml.safe_dump(MINIMAL), override)


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "seed=4294967296",
        f"seed={'9' * 5000}",
        "align.steps=0",
        "align.steps=1e400",
        "align.steps=9999999999999",
        "align.tau=.inf",
        "align.tau=.nan",
        "align.tau=nan",
        "sft.epochs=inf",
        "align.temperature=1e-300",
        "evaluate.temperature=1e-300",
        "align.learning_rate=1:30",
        "teacher={kind: openai, base_url: 'http://a', model: m, extra_body: {top_k: .nan}}",
        "teacher={kind: openai, base_url: 'http://a', model: m, retries: -1}",
        "align.tau=!!timestamp 2026-01-01",
    ],
)
def test_numbers_that_no_stage_can_use_are_refused_when_they_are_read(tmp_path, override):
    problem_of(tmp_path, yaml.safe_dump(MINIMAL), override)


def test_zero_is_a_temperature_for_evaluation_and_a_date_is_text(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(path, ["evaluate.temperature=0", "student.model=2026-01-01"])
    assert (config.evaluate.temperature, config.student.model) == (0, "2026-01-01")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2\n", "line 2: is not valid YAML: key seed occurs twice"),
        ("align: {tau: 1, tau: 2}\n", "key tau occurs twice"),
        ("a: &a [*a]\n", "contains itself"),
        ("[" * 1_000, "nested too deeply"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{name}: &{name} [{','.join(['*' + chr(ord(name) - 1)] * 9)}]\n" for name in "bcdefghi"
        ), "more than 100,000 values"),
        ("seed: " + "9" * 5000, "a value cannot be read"),
        ("x: !!python/object:os.x {}", "tag"),
    ],
)  # fmt: skip
def test_yaml_that_is_not_plain_is_named(tmp_path, text, words):
    assert words in problem_of(tmp_path, text)


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (2 << 20))
    for path in ("/dev/zero", tmp_path, tmp_path / "pipe.yaml", tmp_path / "huge.yaml", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match=r"give a YAML file|at most|File name too long"):
            load_config(path)


@pytest.mark.parametrize(
    ("student", "rates", "origin"),
    [
        ({}, (1e-5, 1e-6), "(default for all weights)"),
        ({"lora": {}}, (1e-4, 5e-5), "(default for LoRA)"),
    ],
)
@pytest.mark.parametrize("method", ["ldl_grpo", "singlepair_dpo", "sft_sft"])
def test_the_learning_rates_follow_what_is_trained(student, rates, origin, method):
    config = parse_config(with_values(student={"model": "m"} | student, align={"method": method}), "x")
    assert (config.sft.learning_rate, config.align.learning_rate) == rates
    assert all(origin in config.describe_rate(section) for section in ("sft", "align"))
    written = parse_config(config.model_dump(mode="json"), "x")
    assert (written.sft.learning_rate, written.align.learning_rate) == rates


def test_a_configured_learning_rate_is_kept():
    values = with_values(student={"model": "m", "lora": {"r": 4}}, sft={"learning_rate": 1e-5, "epochs": 2})
    config = parse_config(values, "x")
    assert config.describe_rate("sft") == "learning rate 1e-05 (as configured)"
    assert config.describe_rate("align") == "learning rate 5e-05, falling to 0 (default for LoRA)"
    constant = parse_config(values | {"align": {"schedule": "constant_with_warmup", "learning_rate": 2e-5}}, "x")
    assert constant.describe_rate("align") == "learning rate 2e-05 (as configured)"
    assert config.sft.epochs == 2 and config.align.learning_rate == 5e-5
    alone = parse_config(with_values(student={"model": "m", "lora": {}}, align={"method": "sft"}), "x")
    assert alone.sft.learning_rate == 1e-4
