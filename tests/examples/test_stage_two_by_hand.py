"""The loop written by hand gives the trainer's parameters."""

import importlib.util
import sys
from pathlib import Path

import torch

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.model.load import load_encoder, load_model, load_roles
from purld.pipeline.pipeline import Pipeline
from purld.records import Prompt
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir

EXAMPLE = Path(__file__).parents[2] / "examples" / "stage_two_by_hand.py"
STEPS = 3


def load_example():
    spec = importlib.util.spec_from_file_location("stage_two_by_hand", EXAMPLE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded_batches(run, prompts):
    """The (prompt, anchor) pairs of each step, in the order in which the trainer used them."""
    rows = read_rows(run.groups)
    return [
        [(prompts[row["prompt_id"]], row["anchor"]) for row in rows if row["step"] == step]
        for step in range(1, STEPS + 1)
    ]


def test_three_steps_by_hand_give_the_parameters_of_the_trainer(tiny_config, tmp_path):
    """Equal to 1e-6, and the steps move the parameters by far more than that."""
    config = load_config(
        tiny_config,
        [
            f"align.steps={STEPS}",
            "align.warmup_ratio=0",
            "align.schedule=constant_with_warmup",
            "align.prompts_per_step=2",
            "align.learning_rate=1e-4",
        ],
    )
    run = RunDir(tmp_path / "run")
    Pipeline(config, run, Reporter()).execute(["anchors", "sft", "align"])
    encoder, roles = load_encoder(config.student), load_roles(config.student, run.sft)
    prompts = {p.id: p for p in (Prompt.from_text(row["prompt"]) for row in read_rows(Path(config.data.prompts)))}
    batches = recorded_batches(run, prompts)
    assert [len(batch) for batch in batches] == [2] * STEPS

    steps = load_example().align_by_hand(roles, encoder, config.align, batches, config.seed)

    trained = dict(load_model(config.student, run.align).named_parameters())
    start = dict(load_model(config.student, run.sft).named_parameters())
    by_hand = dict(roles.policy.named_parameters())
    assert max((by_hand[name] - trained[name]).abs().max().item() for name in trained) < 1e-6
    assert max((start[name] - trained[name]).abs().max().item() for name in trained) > 1e-4
    logged = [row["objective"] for row in read_rows(run.metrics) if row["stage"] == "align"]
    torch.testing.assert_close([step.objective for step in steps], logged, rtol=1e-5, atol=1e-6)


def test_it_fits_on_a_page():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 200
