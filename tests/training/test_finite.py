"""Numbers that are not finite stop a stage in one sentence, and what it had before is kept."""

import math

import pytest
import torch

from purld.config.load import load_config
from purld.config.schema import Student
from purld.display.progress import Reporter
from purld.errors import NotFiniteError, UserError
from purld.model.encode import Encoder
from purld.model.load import load_model
from purld.model.sample import Decoding, generate_completions
from purld.model.vision import EncodedPrompt
from purld.pipeline.pipeline import Pipeline
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.training.checkpoints import last_checkpoint
from purld.training.schedule import NoIdleSteps

EXPLODES = "learning_rate=1e30"


def pipeline(config, run, *overrides):
    shorter = ("sft.epochs=1", "sft.checkpoint_steps=1", "align.steps=3", "align.checkpoint_steps=1")
    return Pipeline(load_config(config, [*shorter, *overrides]), run, Reporter())


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def assert_stopped(run, stage, rate, stages, pipeline):
    with pytest.raises(
        UserError, match=rf"^{stage} stopped at step \d of \d: .* is not finite .*{rate}=1e\+30"
    ) as stop:
        pipeline.execute(stages)
    assert "\n" not in str(stop.value)
    finished = run.finished_stages()
    assert stages[-1] not in finished
    values = [value for row in read_rows(run.metrics) for value in row.values() if not isinstance(value, str)]
    assert values and all(map(math.isfinite, values))


@pytest.fixture
def idle_first_step(monkeypatch):
    """The first step, of rate 0, changes nothing, so that a stage that breaks down in its second has a checkpoint."""
    monkeypatch.delattr(NoIdleSteps, "create_scheduler")


@pytest.mark.usefixtures("idle_first_step")
@pytest.mark.parametrize("fraction", ["0.2", "0.0"])
def test_stage_one_stops(fraction, tiny_config, run):
    failing = pipeline(tiny_config, run, f"sft.{EXPLODES}", f"sft.validation_fraction={fraction}")
    assert_stopped(run, "Stage I", r"sft\.learning_rate", ["anchors", "sft"], failing)
    assert not (run.sft / "model.safetensors").exists()
    checkpoint = last_checkpoint(run, run.checkpoints("sft")).path
    assert checkpoint is not None
    assert torch.isfinite(load_model_at(checkpoint, tiny_config)).all()


def load_model_at(checkpoint, config):
    """Return the logits of the model in a checkpoint."""
    student = load_config(config).student
    model = load_model(student.model_copy(update={"model": str(checkpoint)}), checkpoint)
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7]])).logits


@pytest.mark.usefixtures("idle_first_step")
def test_stage_two_stops(tiny_config, run):
    pipeline(tiny_config, run).execute(["anchors", "sft"])
    failing = pipeline(tiny_config, run, f"align.{EXPLODES}")
    assert_stopped(run, "Stage II", r"align\.learning_rate", ["align"], failing)
    assert last_checkpoint(run, run.checkpoints("align")).path is not None
    assert not (run.align / "model.safetensors").exists()


def test_a_policy_that_breaks_down_in_a_validation_is_named_with_its_rate(tiny_config, run, monkeypatch):
    """The update before it made the policy's distribution overflow; the student's files are not to blame."""
    measured, validated = [], ("align.validate_every=1", "sft.validation_fraction=0.4")

    def measure(self):
        measured.append(1)
        if len(measured) == 3:
            raise NotFiniteError("the distribution that tokens are drawn from")
        return {}

    monkeypatch.setattr("purld.training.best_step.BestStep.measure", measure)
    with pytest.raises(UserError, match=r"^Stage II stopped at step 2 of 3: the distribution .* is not finite .*align"):
        pipeline(tiny_config, run, *validated).execute(["anchors", "sft", "align"])
    assert last_checkpoint(run, run.checkpoints("align")).step < 2


def test_a_student_whose_numbers_overflow_is_told_before_any_update(tiny_config, run, monkeypatch):
    failing = pipeline(tiny_config, run)
    failing.execute(["anchors"])
    monkeypatch.setattr("purld.training.sft.load_model", lambda student, path: overflowing(load_model(student, path)))
    with pytest.raises(UserError, match=r"^Stage I stopped at step 1 of .*nothing was trained yet"):
        failing.execute(["sft"])
    assert not read_rows(run.metrics)


def overflowing(model):
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_not_drawn_from_what_is_no_distribution(temperature, random_student, tokenizer):
    model = overflowing(load_model(Student(model=str(random_student)), random_student))
    encoder = Encoder(tokenizer, 64)
    prompt = encoder.encode_literal("How many?")
    with pytest.raises(NotFiniteError, match="not finite"):
        generate_completions(model, encoder, [EncodedPrompt(prompt)], 2, Decoding(temperature, 3), seeds=[0])


def test_a_rate_that_is_no_number_is_refused(tiny_config):
    with pytest.raises(UserError, match=r"sft\.learning_rate must be a finite number"):
        load_config(tiny_config, ["sft.learning_rate=.inf"])
