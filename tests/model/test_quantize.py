"""A base in four bits: Stage I's adapter stays beside it, and p_sft, the policy and what is saved are exact.

These tests need bitsandbytes (`pip install 'purld[nf4]'`), but for the first ones.
"""

import importlib.util
import shutil

import pytest
import torch
from peft import PeftModel

from purld.config.load import load_config
from purld.config.schema import Lora, Student
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.model.load import load_encoder, load_model, load_roles, make_trainable, save_model, save_policy
from purld.model.log_probs import token_log_probs
from purld.model.quantize import check_quantizing, is_quantized
from purld.model.vision import EncodedPrompt
from purld.pipeline.export import export_model
from purld.pipeline.pipeline import Pipeline
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.training.align_trainer import AlignTrainer

PROMPT, ANSWERS = EncodedPrompt(list(range(5, 30))), [[7, 8, 9, 10], [40, 41]]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def test_without_bitsandbytes_one_sentence_says_what_to_install(random_student, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nf4 needs bitsandbytes.*pip install 'purld\[nf4\]'"):
        check_quantizing(Student(model=str(random_student), lora=Lora(r=2), quantize="nf4"))


def test_four_bits_are_not_trained_themselves(random_student):
    with pytest.raises(ValueError, match="quantize: weights in four bits cannot be trained themselves; set lora"):
        Student(model=str(random_student), quantize="nf4")


@pytest.fixture(scope="module")
def student(random_student):
    return Student(model=str(random_student), lora=Lora(r=2), quantize="nf4")


@torch.no_grad()
def log_probs(model):
    return token_log_probs(model, PROMPT, ANSWERS, 0)[0]


def disturb(model, scale=0.05):
    """Move the trained weights, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(scale * torch.randn(weight.shape, generator=generator))


@pytest.fixture(scope="module")
def after_stage_one(student, tmp_path_factory):
    """The folder of a Stage I adapter, and the log-probs of the model it was saved from."""
    folder = tmp_path_factory.mktemp("sft")
    model = make_trainable(student, load_model(student, student.model))
    disturb(model, 0.3)
    save_model(student, model, load_encoder(student), folder)
    return folder, log_probs(model)


@needs_bitsandbytes
def test_p_sft_the_reference_and_the_saved_policy_are_exact(student, after_stage_one, tmp_path):
    folder, expected = after_stage_one
    base, p_sft = load_model(student, student.model), load_model(student, folder)
    assert is_quantized(base) and isinstance(p_sft, PeftModel)
    assert {"Linear4bit"} <= {type(module).__name__ for module in base.modules()}
    assert torch.allclose(log_probs(p_sft), expected, atol=1e-5)
    assert not torch.allclose(log_probs(base), expected, atol=0.1)
    roles = load_roles(student, folder)
    assert torch.allclose(log_probs(roles.policy), expected, atol=1e-5)  # a new adapter adds nothing
    disturb(roles.policy)
    moved = log_probs(roles.policy)
    assert not torch.allclose(moved, expected, atol=1e-2)
    for _ in range(2):
        with roles.frozen() as frozen:
            assert torch.equal(log_probs(frozen), log_probs(p_sft))
        assert torch.equal(log_probs(roles.policy), moved)
        roles.check_trained()
    save_policy(student, roles, folder, load_encoder(student), tmp_path)
    assert torch.allclose(log_probs(load_model(student, tmp_path)), moved, atol=1e-4)


@needs_bitsandbytes
def test_a_weight_that_begins_to_move_is_noticed(student, after_stage_one):
    roles = load_roles(student, after_stage_one[0])
    trained = [name for name, p in roles.policy.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name for name in trained)
    roles.policy.base_model.set_adapter(["default", "stage_one"])  # as peft does, which switches both on
    with pytest.raises(RuntimeError, match="changed between trained and frozen"):
        roles.check_trained()


@needs_bitsandbytes
@pytest.mark.slow
def test_a_run_trains_stops_goes_on_and_exports_its_model_in_full_precision(tiny_config, tmp_path, monkeypatch):
    overrides = ["student.lora={r: 2}", "student.quantize=nf4", "align.validate_every=null", "evaluate.samples=1"]
    config = load_config(tiny_config, [*overrides, "align.steps=4", "sft.epochs=1"])
    calm, killed = (Pipeline(config, RunDir(tmp_path / name / "run"), Reporter()) for name in ("calm", "killed"))
    calm.execute(["anchors", "sft"])
    shutil.copytree(calm.run.path, killed.run.path)
    calm.execute()
    step = AlignTrainer.training_step

    def kill(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignTrainer, "training_step", kill)
        with pytest.raises(KeyboardInterrupt):
            killed.execute(["align"])
    Pipeline(config, killed.run, Reporter()).execute(["align"])
    weights = [(p.run.align / "adapter_model.safetensors").read_bytes() for p in (calm, killed)]
    assert weights[0] == weights[1]
    assert read_rows(calm.run.groups) == read_rows(killed.run.groups)
    exported = load_model(Student(model=str(export_model(calm.run.path, None))), calm.run.path / "export")
    assert not is_quantized(exported)
    whole = load_model(config.student.model_copy(update={"quantize": None}), calm.run.align)
    assert torch.allclose(log_probs(exported), log_probs(whole), atol=1e-5)
