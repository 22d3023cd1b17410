"""With LoRA one copy of the weights is policy, reference, evaluator and sampler, also after a resume."""

import gc

import pytest
import torch
from log_prob_sums import sequence_log_probs
from torch import nn

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.model.load import count_parameters, load_model, load_roles
from purld.model.vision import EncodedPrompt
from purld.pipeline.pipeline import Pipeline
from purld.runs.run_dir import RunDir
from purld.training import align as align_module
from purld.training.align_trainer import AlignTrainer

HEAD, ANSWERS = EncodedPrompt(list(range(30, 50))), [[60, 61, 62], [70, 71, 72, 73, 74], [80]]
LORA = "student.lora={r: 4}"


def log_probs(model):
    with torch.no_grad():
        return sequence_log_probs(model, HEAD, ANSWERS, pad=0)


def frozen_log_probs(roles):
    with roles.frozen() as model:
        return log_probs(model)


def in_memory():
    """Parameters that this process holds, each storage once."""
    gc.collect()
    held = [x for x in gc.get_objects() if issubclass(type(x), nn.Parameter)]  # isinstance wakes lazy proxies
    return sum({p.data_ptr(): p.numel() for p in held}.values())


@pytest.fixture(scope="module")
def tuned(module_config, tmp_path_factory):
    """A run with an adapter whose Stage I is done."""
    run = RunDir(tmp_path_factory.mktemp("run"))
    config = load_config(module_config, [LORA, "align.steps=4", "align.method=self_ppo"])
    Pipeline(config, run, Reporter()).execute(["anchors", "sft"])
    return config, run


def test_the_weights_are_in_memory_once(tuned):
    """As many parameters as the student has, and the adapter's; not twice as many."""
    config, run = tuned
    before = in_memory()
    alone = load_model(config.student, config.student.model)
    student = count_parameters(alone)
    del alone
    roles = load_roles(config.student, run.sft)
    adapter = sum(p.numel() for p in roles.policy.parameters() if p.requires_grad)
    assert 0 < adapter < student
    assert in_memory() - before == student + adapter
    with roles.frozen() as reference:
        assert reference is roles.policy


def test_adapter_off_is_p_sft_bit_for_bit_before_and_after_a_resume(tuned, monkeypatch):
    config, run = tuned
    p_sft = log_probs(load_model(config.student, run.sft))
    p_base = log_probs(load_model(config.student, config.student.model))
    assert not torch.allclose(p_sft, p_base)
    assert torch.equal(frozen_log_probs(load_roles(config.student, run.sft)), p_sft)
    held = []

    def keeping(*arguments):
        held.append(load_roles(*arguments))
        return held[-1]

    monkeypatch.setattr(align_module, "load_roles", keeping)
    step = AlignTrainer.training_step

    def killing(self, *arguments):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AlignTrainer, "training_step", killing)
        Pipeline(config, run, Reporter()).execute(["align"])
    Pipeline(config, run, Reporter()).execute(["align"])
    killed, resumed = held
    for roles in held:
        assert torch.equal(frozen_log_probs(roles), p_sft)
        assert not torch.allclose(log_probs(roles.policy), p_sft)
    # What is saved is the policy itself, on the base weights.
    assert torch.allclose(log_probs(load_model(config.student, run.align)), log_probs(resumed.policy), atol=1e-4)
    assert not torch.equal(log_probs(killed.policy), log_probs(resumed.policy))
