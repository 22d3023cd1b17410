"""Loading, roles and saving: what is written loads on its own with the ordinary classes."""

import json

import pytest
import torch
from log_prob_sums import sequence_log_probs
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from purld.config.schema import Lora, Student
from purld.errors import UserError
from purld.model.directory import check_model_directory
from purld.model.load import (
    count_parameters,
    load_encoder,
    load_model,
    load_roles,
    make_trainable,
    save_model,
    save_policy,
)
from purld.model.vision import EncodedPrompt

ADAPTER = "adapter_model.safetensors"
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


@pytest.fixture(scope="module")
def experts_student(tokenizer, tmp_path_factory):
    """A student whose experts are one parameter of three dimensions."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("experts") / "student"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("modules", ["all-linear", ["embed_tokens", "q_proj"]])
def test_two_adapters_are_combined_exactly(modules, experts_student, tmp_path):
    student = Student(model=str(experts_student), lora=Lora(r=2, target_modules=modules))
    encoder = load_encoder(student)
    first = make_trainable(student, load_model(student, student.model))
    stir(first, 1)
    save_model(student, first, encoder, tmp_path / "sft")
    roles = load_roles(student, tmp_path / "sft")
    stir(roles.policy, 2)
    save_policy(student, roles, tmp_path / "sft", encoder, tmp_path / "align")
    assert torch.allclose(log_probs(load_model(student, tmp_path / "align")), log_probs(roles.policy), atol=1e-4)
    assert not torch.allclose(log_probs(first), log_probs(roles.policy), atol=1e-2)


def test_saved_weights_are_as_readable_as_the_umask_says(lora_student, lora_sft, random_student, tmp_path):
    save_policy(lora_student, load_roles(lora_student, lora_sft), lora_sft, load_encoder(lora_student), tmp_path / "a")
    full = Student(model=str(random_student))
    save_model(full, load_model(full, random_student), load_encoder(full), tmp_path / "b")
    plain = tmp_path / "plain"
    plain.touch()
    for file in (lora_sft / ADAPTER, tmp_path / "a" / ADAPTER, tmp_path / "b" / "model.safetensors"):
        assert file.stat().st_mode == plain.stat().st_mode


def test_a_new_adapter_depends_on_its_seed_alone(lora_student, lora_sft):
    def adapter(disturbance, seed):
        torch.manual_seed(disturbance)
        policy = load_roles(lora_student, lora_sft, seed).policy
        return torch.cat([p.flatten() for p in policy.parameters() if p.requires_grad])

    assert torch.equal(adapter(1, 0), adapter(2, 0))
    assert not torch.equal(adapter(1, 0), adapter(1, 3))


@pytest.mark.parametrize("damage", ["cut", "lacking", "missing"])
def test_a_damaged_adapter_is_one_sentence(damage, lora_student, lora_sft):
    file = lora_sft / ADAPTER
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "lacking":
        weights = load_file(file)
        weights.popitem()
        save_file(weights, file)
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_model(lora_student, lora_sft)


def test_every_saved_model_stops_where_training_does(lora_student, random_student, tmp_path):
    encoder = load_encoder(lora_student)
    encoder.ends = encoder.ends | {7}
    full = Student(model=str(random_student))
    model = make_trainable(lora_student, load_model(lora_student, random_student))
    save_model(lora_student, model, encoder, tmp_path / "sft")
    save_policy(lora_student, load_roles(lora_student, tmp_path / "sft"), tmp_path / "sft", encoder, tmp_path / "align")
    save_model(full, load_model(full, random_student), encoder, tmp_path / "full")
    save_model(lora_student, load_model(lora_student, tmp_path / "align"), encoder, tmp_path / "export")
    for name in ("sft", "align", "full", "export"):
        settings = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert set(settings["eos_token_id"]) == encoder.ends
    for name in ("full", "export"):
        assert set(json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"]) == encoder.ends
