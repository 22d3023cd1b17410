"""The noise scale of Stage II's gradients: exact on made gradients, and the gradient itself against a small step."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from gradient_noise import WEIGHTS, Estimate, StageTwoStart, mixed_groups, noise_scale, table

from purld.config.load import load_config
from purld.runs.run_dir import RunDir


def test_signal_and_noise_of_gradients_that_are_drawn_from_two():
    """Over all draws of four prompts' gradients, the signal's mean is the squared length of their mean."""
    values = np.array([[3.0, 0.0], [-1.0, 2.0]])
    found = []
    for drawn in itertools.product((0, 1), repeat=4):
        gradients = values[list(drawn)]
        found.append(noise_scale(gradients @ gradients.T, list("abcd"), np.ones(4)))
    assert np.mean([estimate.signal for estimate in found]) == pytest.approx(1.0**2 + 1.0**2)
    assert np.mean([estimate.noise for estimate in found]) == pytest.approx((9 + 5) / 2)
    assert found[0].error == 0 and found[0].groups == pytest.approx(1.0) and found[0].least_groups == 1.0


def test_the_jackknife_is_the_plain_one():
    generator = np.random.default_rng(0)
    gradients, weights = generator.normal(0.5, 1, (9, 3)), generator.uniform(0.5, 1, 9)
    prompts, products = list("abcdefabc"), gradients @ gradients.T

    def signal(kept):
        pairs = [(i, j) for i in kept for j in kept if prompts[i] != prompts[j]]
        return np.mean([weights[i] * weights[j] * products[i, j] for i, j in pairs])

    everything = range(9)
    left_out = [signal([i for i in everything if prompts[i] != name]) for name in "abcdef"]
    estimate = noise_scale(products, prompts, weights)
    assert estimate.signal == pytest.approx(signal(everything))
    assert estimate.error == pytest.approx(np.sqrt(5 / 6 * np.sum((left_out - np.mean(left_out)) ** 2)))


def test_a_signal_that_is_not_found_has_no_number_of_groups():
    gradients = np.array([[1.0], [-1.0], [1.0]])
    estimate = noise_scale(gradients @ gradients.T, list("abc"), np.ones(3))
    assert estimate.signal < 0 and estimate.groups is None and Estimate(-1.0, 0.1, 2.0).least_groups is None
    with pytest.raises(ValueError, match="three prompts"):
        noise_scale(np.ones((3, 3)), list("aab"), np.ones(3))


def test_the_table_weighs_groups_as_the_methods_do():
    half = {"prompts": list("abc"), "shares": [0.5] * 3, "products": np.full((3, 3), 4.0).tolist()}
    lines = table(half).splitlines()[2:]
    assert len(lines) == len(WEIGHTS)
    assert [line.split("|")[2].strip() for line in lines] == ["1 ± 0", "1 ± 0", "0.25 ± 0"]
    assert all("| 1; at least 1 |" in line for line in lines)


def test_the_gradient_is_that_of_right_over_wrong_in_what_stage_two_trains(random_student, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "2 + 2"}\n')
    values = [f"student.model={random_student}", "student.lora.r=4", f"data.prompts={prompts}"]
    (tmp_path / "run.yaml").write_text(
        "teacher: {kind: local, model: unused}\nstudent: {lora: {}}\ndata: {}\nalign: {}\n"
    )
    config, run = load_config(tmp_path / "run.yaml", values), RunDir(tmp_path / "run")
    run.path.mkdir()
    run.sft.symlink_to(random_student)
    start = StageTwoStart(config, run)
    (prompt_id,) = start.prompts
    rows = [
        {"step": step, "prompt_id": prompt_id, "candidates": ["4", "5", "four"], "lengths": [2, 2, 5], "scores": scores}
        for step, scores in [(2, [1.0, 0.0, 1.0]), (1, [0.0, 1.0, 0.0]), (1, [1.0, 1.0, 1.0]), (3, [1.0, 0.0, 0.0])]
    ]
    run.groups.parent.mkdir()
    run.groups.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert mixed_groups([run], last_step=2) == [rows[1], rows[0]]
    gradient, before = start.gradient(rows[0]).double(), start.contrast(rows[0]).item()
    step = gradient / gradient.norm() * 1e-2
    with torch.no_grad():
        for weights, part in zip(start.trained, step.split([w.numel() for w in start.trained])):
            weights += part.view_as(weights)
    assert start.contrast(rows[0]).item() - before == pytest.approx(1e-2 * gradient.norm().item(), rel=0.05)
