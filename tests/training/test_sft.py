"""Stage I's loss is the cross-entropy of the answers' tokens, and only these get logits."""

import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl import SFTTrainer
from trl.kernels import ChunkedLogProbFunction

from purld.config.load import load_config
from purld.config.schema import Sft, Student
from purld.display.progress import Reporter
from purld.model.encode import training_batch
from purld.model.load import load_encoder, load_model
from purld.model.turn_end import TurnEnd
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.status import read_status
from purld.records import Anchor, Prompt
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.training.context import StageContext
from purld.training.sft import _SftTrainer, fine_tune

EXAMPLES = [
    (prompt, Anchor(prompt.id, answer))
    for prompt, answer in (
        (Prompt.from_text("What is 2 + 3? Think about it for as long as you like."), "5"),
        (Prompt.from_text("Say it."), "It is this and that, and those, and all the others."),
        (Prompt.from_text("And 4 + 4?"), "4 + 4 = 8."),
    )
]


@pytest.fixture
def rows_with_logits(monkeypatch):
    """The number of positions of every pass for which TRL makes logits."""
    counted = []

    apply = ChunkedLogProbFunction.apply

    def counting(hidden, *others):
        counted.append(len(hidden))
        return apply(hidden, *others)

    monkeypatch.setattr(ChunkedLogProbFunction, "apply", counting)
    return counted


@pytest.mark.parametrize("lora", [None, {"r": 4}])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_step_is_on_the_cross_entropy_of_the_answers(random_student, tmp_path, rows_with_logits, lora, micro_batch):
    student = Student(model=str(random_student), max_prompt_tokens=256, max_anchor_tokens=128, lora=lora)
    encoder, run = load_encoder(student), RunDir(tmp_path)
    settings = Sft(epochs=1, batch_size=3, micro_batch_size=micro_batch, validation_fraction=0)
    fine_tune(StageContext(student, encoder, run, 0, lambda *_: None), settings, EXAMPLES)

    rows = [(encoder.encode_prompt(p), encoder.encode_target(a.text).ids) for p, a in EXAMPLES]
    model = load_model(student, student.model)
    loss = model(**training_batch(rows, encoder.pad)).loss
    step = next(row for row in read_rows(run.metrics))
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert sum(rows_with_logits) == sum(len(answer) for _, answer in rows)
    if lora is None:
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_cut_anchor_does_not_teach_the_end_of_a_turn(random_student, tmp_path):
    student = Student(model=str(random_student), max_prompt_tokens=256, max_anchor_tokens=128)
    encoder, run = load_encoder(student), RunDir(tmp_path)
    cut = [(prompt, Anchor(prompt.id, anchor.text, cut=True)) for prompt, anchor in EXAMPLES]
    facts = fine_tune(
        StageContext(student, encoder, run, 0, lambda *_: None),
        Sft(epochs=1, batch_size=3, micro_batch_size=3, validation_fraction=0),
        cut,
    )
    rows = [(encoder.encode_prompt(p), encoder.encode_literal(a.text)) for p, a in EXAMPLES]
    loss = load_model(student, student.model)(**training_batch(rows, encoder.pad)).loss
    assert next(row for row in read_rows(run.metrics))["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert facts.anchors_cut == 0  # by student.max_anchor_tokens


def test_a_mixture_of_experts_has_the_loss_that_trl_gives_it(tokenizer, tmp_path, monkeypatch):
    """With its load balancing, in training and in validation."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.5}
    config = AutoConfig.for_model("qwen3_moe", vocab_size=len(tokenizer), head_dim=8, **shape, **experts)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    student = Student(model=str(tmp_path / "student"), max_prompt_tokens=256, max_anchor_tokens=128)
    settings = Sft(epochs=1, batch_size=2, micro_batch_size=2, validation_fraction=0.5, checkpoint_steps=1)

    def losses(name):
        run = RunDir(tmp_path / name)
        fine_tune(StageContext(student, load_encoder(student), run, 0, lambda *_: None), settings, EXAMPLES * 4)
        return [row.get("loss", row.get("eval_loss")) for row in read_rows(run.metrics)]

    ours = losses("ours")
    monkeypatch.setattr(_SftTrainer, "compute_loss", SFTTrainer.compute_loss)
    assert len(ours) > 2 and ours == pytest.approx(losses("theirs"), rel=1e-5)


def test_a_student_that_will_not_end_its_answers_is_told_and_recorded(module_config, tmp_path, monkeypatch, capsys):
    found = TurnEnd("<end_of_turn>", [0.03, 0.05], answers=2)
    monkeypatch.setattr("purld.training.sft.measure_turn_end", lambda *_: found)
    run = RunDir(tmp_path / "run")
    Pipeline(load_config(module_config, ["sft.epochs=1"]), run, Reporter()).execute(["anchors", "sft"])
    assert "after 2 of 2 anchors '<end_of_turn>' is p_sft's likeliest token" in capsys.readouterr().err
    assert found.warning in read_status(run, time.time()).warnings
