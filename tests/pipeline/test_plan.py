"""Test the plan: prompts, gold and the machine."""

import json

import pytest

from purld.config.load import load_config
from purld.config.schema import Student
from purld.errors import UserError
from purld.model.load import Roles, load_model, make_trainable
from purld.pipeline import plan_machine as machine
from purld.pipeline.plan import make_plan
from purld.pipeline.plan_sheet import print_plan
from purld.runs.run_dir import RunDir


@pytest.fixture
def plan(tiny_config, tmp_path):
    def plan(*overrides):
        return make_plan(load_config(tiny_config, overrides), RunDir(tmp_path / "deep" / "run"))

    return plan


def test_rows_duplicates_and_stages(plan, tmp_path):
    first = (tmp_path / "prompts.jsonl").read_text().splitlines()[0]
    with (tmp_path / "prompts.jsonl").open("a") as handle:
        handle.write(first + "\n")
    sheet = plan("data.sft_fraction=0.5")
    assert "25 rows, 1 of them duplicates" in sheet.sections["Prompts"]
    assert any("others for Stage II" in line for line in sheet.sections["Training"])


def test_three_prompts_are_shown_as_the_student_reads_them(plan, tmp_path):
    sheet = plan()
    shown = {heading: lines for heading, lines in sheet.sections.items() if heading.startswith("Prompt as the student")}
    first = json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    assert len(shown) == 3
    assert shown[f"Prompt as the student reads it ({tmp_path / 'prompts.jsonl'}, line 1)"] == [
        "<|im_start|>user", f"{first}<|im_end|>", "<|im_start|>assistant"
    ]  # fmt: skip


def test_settings_of_other_methods_are_told(plan):
    assert not any("set aside" in line for line in plan().sections["Training"])
    told = plan("align.method=anchor_grpo", "align.gamma=3", "align.q=mean").sections["Training"]
    assert any("align.q" in line and "set aside" in line for line in told)


def test_a_check_without_gold_is_told(plan, tmp_path):
    assert not any("reference" in line for line in plan().sections["Prompts"])
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    for keep, words in [(3, "5 of 8 held-out prompts have no reference"), (0, "8 of 8 held-out prompts have no")]:
        kept = [row if n < keep else {"prompt": row["prompt"]} for n, row in enumerate(rows)]
        (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        sheet = plan()
        assert any(words in line for line in sheet.sections["Prompts"])
        with pytest.raises(UserError, match=f"^{words}.*data.check=none"):
            print_plan(sheet)
    assert any("no accuracy will be reported" in line for line in plan("data.check=none").sections["Prompts"])


def test_what_will_be_measured_is_told(plan):
    assert plan().sections["Evaluation"] == [
        "accuracy on 8 held-out prompts, of answers sampled (2 for each prompt) and greedy, by data.check: testbed",
        "no win rates: there is no judge (evaluate.judge and evaluate.opponent)",
    ]
    judge = "evaluate.judge={kind: openai, base_url: 'http://127.0.0.1:1/v1', model: m}"
    assert plan("data.check=none", judge, "evaluate.opponent={kind: teacher}").sections["Evaluation"] == [
        "no accuracy: answers are not checked against gold (data.check)",
        "win rates on 8 held-out prompts against evaluate.opponent, by evaluate.judge",
    ]
    assert "neither checked against gold nor judged" in plan("data.check=none").sections["Evaluation"][0]


def test_disk_is_counted_and_a_full_one_stands_in_the_way(plan, tmp_path, monkeypatch):
    assert any("of disk at most" in line for line in plan().sections["Student"])
    usage = machine.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"deep/run: the run needs about .* MiB of disk"):
        print_plan(plan())


def test_an_adapter_trains_few_weights_and_a_wrong_one_is_told(plan):
    assert any("LoRA r=2" in line for line in plan("student.lora={r: 2}").sections["Student"])
    with pytest.raises(UserError, match=r"^student\.lora: no adapter can be made"):
        plan("student.lora={r: 2, target_modules: [nowhere]}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["align.method=ldl_grpo"], "6 steps of 2 prompts × 3 candidates (36 in all, 0.8 passes"),
        (
            ["align.method=anchor_grpo", "align.updates_per_rollout=2"],
            "6 steps of 2 prompts × 3 candidates, 2 on the same candidates (18 in all, 0.4 passes",
        ),
        (["align.method=self_ppo"], "6 steps of 2 prompts, one candidate each (12 in all, 0.8 passes"),
        (["align.method=sft_sft"], "6 steps of 2 prompts (0.8 passes over the prompts), sft_sft"),
    ],
)
def test_stage_two_of_every_kind(plan, overrides, words):
    [line] = [line for line in plan(*overrides).sections["Training"] if line.startswith("Stage II")]
    assert words in line


@pytest.mark.parametrize(
    ("gib", "override", "words"),
    [
        (100, "align.steps=6", "fits this machine, which has 100.0 GiB"),
        (0.001, "align.recompute=always", "in any micro-batch; set student.lora"),
    ],
)
def test_the_memory_of_an_update_is_told_with_its_parts_and_what_would_fit(gib, override, words, plan, monkeypatch):
    monkeypatch.setattr(machine, "device_memory", lambda: int(gib * 2**30))
    told = plan(override, "align.micro_batch_size=8").sections["Student"]  # two groups of three
    assert any("Stage II with prompts of" in line and "micro-batches of 6" in line for line in told)
    assert any(words in line for line in told)
    parts = next(line for line in told if "at its peak" in line)
    assert all(part in parts for part in ("weights", "gradients and optimiser", "activations", "logits", "samples"))
    assert any("layers computed again" in line for line in told) == (override == "align.recompute=always")


@pytest.mark.parametrize("lora", [None, 2, 64])
def test_all_weights_are_counted_an_adapter_on_top_of_its_base(lora, plan, monkeypatch, random_student):
    seen = []
    estimate = machine.estimate_memory
    monkeypatch.setattr(machine, "estimate_memory", lambda *args: seen.append(args) or estimate(*args))
    plan(*([f"student.lora={{r: {lora}}}"] if lora else []))
    student = Student(model=str(random_student), lora=None if lora is None else {"r": lora})
    model = load_model(student, random_student)
    roles = Roles(make_trainable(student, model), None if lora else load_model(student, random_student))
    _, _, weights, trained, *_ = seen[0]
    assert weights == sum({id(p): p.nbytes for p in roles.weights()}.values())
    assert trained == sum(p.numel() for p in roles.policy.parameters() if p.requires_grad)


def test_four_bits_are_those_of_linear_layers_alone(plan, monkeypatch, random_student):
    """Embeddings and the LM head stay as they are, which is much of a small student."""
    seen = []
    estimate = machine.estimate_memory
    monkeypatch.setattr(machine, "estimate_memory", lambda *args: seen.append(args) or estimate(*args))
    monkeypatch.setattr("purld.model.student_check.check_quantizing", lambda student: None)  # bitsandbytes is there
    plan("student.lora={r: 2}", "student.quantize=nf4")
    model = load_model(Student(model=str(random_student)), random_student)
    linear = sum(m.weight.numel() for name, m in model.named_modules() if name.endswith("_proj"))
    _, _, weights, trained, *_ = seen[0]
    in_all = sum(weight.numel() for weight in model.parameters())
    assert 0 < linear < in_all and weights == int(machine.NF4_BYTES * linear) + 4 * (in_all - linear) + 4 * trained


@pytest.mark.parametrize("lora", [None, 2])
def test_what_each_of_several_processes_needs_is_told(lora, plan, monkeypatch):
    seen = []
    estimate = machine.estimate_memory
    monkeypatch.setattr(machine, "estimate_memory", lambda *args: seen.append(args) or estimate(*args))
    told = plan("student.shard=fsdp", *([f"student.lora={{r: {lora}}}"] if lora else [])).sections["Student"]
    (line,) = (line for line in told if "divided among processes" in line)
    assert all(words in line for words in ("in each of 2,", "in each of 4,", "in each of 8"))
    (alone, trained), _, _, (eighth, part) = dict.fromkeys((weights, trained) for _, _, weights, trained, *_ in seen)
    gathered = 4 * seen[0][0].gathered_weights
    own = 4 * trained if lora else 0  # an adapter is whole in every process
    assert eighth == pytest.approx((alone - own) / 8 + own + gathered, abs=8)
    assert part == (trained if lora else -(-trained // 8))
