"""Loading, roles and saving: what is written loads on its own with the ordinary classes."""

import pytest
import torch
from log_prob_sums import sequence_log_probs
from peft import PeftModel
from transformers import AutoModelForCausalLM

from purld.config.schema import Lora, Student
from purld.errors import UserError
from purld.model.load import (
    check_model_directory,
    count_parameters,
    load_encoder,
    load_model,
    load_roles,
    make_trainable,
    save_model,
    save_policy,
)
from purld.model.vision import EncodedPrompt

PROMPT, COMPLETIONS = EncodedPrompt(list(range(5, 20))), [[7, 8, 9], [30, 31]]


def log_probs(model):
    with torch.no_grad():
        return sequence_log_probs(model, PROMPT, COMPLETIONS, pad=0)


def stir(model, seed):
    """Move every trainable weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def lora_student(random_student):
    return Student(model=str(random_student), lora=Lora(r=2))


@pytest.fixture
def lora_sft(lora_student, tmp_path):
    """A Stage I adapter that is not zero."""
    model = make_trainable(lora_student, load_model(lora_student, lora_student.model))
    stir(model, 1)
    save_model(lora_student, model, load_encoder(lora_student), tmp_path / "sft")
    return tmp_path / "sft"


def test_frozen_role_with_lora_is_p_sft_and_not_p_base(lora_student, lora_sft):
    roles = load_roles(lora_student, lora_sft)
    p_sft = log_probs(load_model(lora_student, lora_sft))
    stir(roles.policy, 2)
    with roles.frozen() as frozen:
        assert torch.equal(log_probs(frozen), p_sft)
    assert not torch.allclose(log_probs(roles.policy), p_sft)
    assert not torch.allclose(p_sft, log_probs(load_model(lora_student, lora_student.model)))


def test_with_lora_there_is_one_copy_of_the_weights(lora_student, lora_sft, random_student):
    roles = load_roles(lora_student, lora_sft)
    trainable = sum(p.numel() for p in roles.policy.parameters() if p.requires_grad)
    base = count_parameters(AutoModelForCausalLM.from_pretrained(random_student))
    assert count_parameters(roles.policy) == base + trainable
    assert trainable < base / 2


def test_saved_policy_is_one_adapter_on_the_base(lora_student, lora_sft, random_student, tmp_path):
    roles = load_roles(lora_student, lora_sft)
    stir(roles.policy, 2)
    save_policy(lora_student, roles, lora_sft, load_encoder(lora_student), tmp_path / "align")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_student), tmp_path / "align")
    assert torch.allclose(log_probs(plain.eval()), log_probs(roles.policy), atol=1e-4)
    assert torch.allclose(log_probs(load_model(lora_student, tmp_path / "align")), log_probs(roles.policy), atol=1e-4)


def test_without_lora_the_reference_is_a_frozen_copy(random_student):
    student = Student(model=str(random_student))
    roles = load_roles(student, random_student)
    before = log_probs(roles.policy)
    stir(roles.policy, 3)
    with roles.frozen() as frozen:
        assert torch.equal(log_probs(frozen), before)
        assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder", "broken"])
def test_what_is_no_model_directory_is_named(kind, tmp_path):
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("weights")
    elif kind != "missing":
        path.mkdir()
    if kind == "broken":
        (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="student"):
        check_model_directory(str(path))


def test_a_directory_of_another_kind_of_thing_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(UserError) as error:
        load_encoder(Student(model=str(tmp_path)))
    assert "\n" not in str(error.value)
