"""A student whose weights two processes divide is the student itself, whatever passes each of them runs."""

import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from rank_processes import run_ranks
from test_architectures import SHARED, build
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlavaConfig

from purld import ranks
from purld.config.schema import Student
from purld.errors import PlainWarning, UserError
from purld.model.load import load_encoder, load_model, load_roles, make_trainable, save_model
from purld.model.log_probs import RowGroup, make_prefixes, token_log_probs
from purld.model.sample import Decoding, GenerateSampler
from purld.model.shard import sharding_plan
from purld.model.student_check import check_student
from purld.model.vision import EncodedPrompt
from purld.model.weights import build_skeleton
from purld.model.whole_weights import divide_loaded_state, whole_optimizer_state, whole_weights

LORA = {"r": 4}
GROUPS = [  # of which rank 0 has the first, with more passes
    ([5, 6, 7, 8], [[9, 10, 11], [12, 13], [14] * 6, [15, 16], [17] * 3]),
    ([5, 9], [[3] * 5, [20, 21, 22]]),
    ([30] * 7, [[31, 32], [33]]),
]


@pytest.fixture(scope="module", params=[None, pytest.param(LORA, marks=pytest.mark.slow)], ids=["all weights", "LoRA"])
def student(request, random_student):
    """A student with tied embeddings of an odd number of tokens, so that the shards are of different sizes."""
    student = Student(model=str(random_student), lora=request.param, shard="fsdp")
    config = AutoConfig.from_pretrained(random_student)
    assert config.tie_word_embeddings and config.vocab_size % 2 == 1
    return student


def own_groups():
    return GROUPS if ranks.count() == 1 else GROUPS[:1] if ranks.is_first() else GROUPS[1:]


def gradients_of(model):
    return [whole(weight.grad) for weight in model.parameters() if weight.grad is not None]


def add_gradient(model, groups):
    """Add the gradient of all members' log-probs, two members at a time."""
    for prompt, rows in groups:
        prefix = make_prefixes(model, [RowGroup(EncodedPrompt(prompt), rows)], 0, cut=True)
        for start in range(0, len(rows), 2):
            log_probs, mask = prefix.token_log_probs(rows[start : start + 2])
            (-(log_probs * mask).sum()).backward()
        prefix.backward()
    ranks.sum_gradients(model.parameters())


def whole(values):
    """Return a whole tensor as an array, which another process can read after this one has ended."""
    return (values.full_tensor() if hasattr(values, "full_tensor") else values).numpy().copy()


def train_and_save(student, folder, read=None):
    """Take two steps and save the model; return the gradients and the number of weights that this process holds.

    With `read` the second step is taken by an optimiser that was read from there, and not by the one of the first.
    """
    model = make_trainable(student, load_model(student, student.model), seed=3).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    divide_loaded_state(optimizer)
    found = {"gradients": []}
    for step in range(2):
        optimizer.zero_grad()
        add_gradient(model, own_groups())
        found["gradients"].append(gradients_of(model))
        optimizer.step()
        if step == 0:
            with whole_optimizer_state(optimizer):
                ranks.on_first(lambda: torch.save(optimizer.state_dict(), folder / "optimizer.pt"))
            if read:
                optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    weights = whole_weights(model)
    ranks.on_first(lambda: save_model(student, model, load_encoder(student), folder / "saved", weights))
    found["held"] = sum(ranks.local_part(p.detach()).numel() for p in load_model(student, student.model).parameters())
    return found


def distance(ours, theirs):
    ours, theirs = (np.concatenate([np.ravel(values) for values in side]) for side in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def saved_weights(student, folder):
    return [p.detach() for p in load_model(student, folder).parameters()]


def test_steps_of_two_processes_are_those_of_one_and_so_is_what_they_save(student, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    alone = train_and_save(student, one)
    outcomes = run_ranks(lambda: train_and_save(student, two, read=True))
    assert all(isinstance(outcome, dict) for outcome in outcomes), outcomes
    for outcome in outcomes:
        assert len(outcome["gradients"][0]) == len(alone["gradients"][0]) > 0
        assert distance(outcome["gradients"][0], alone["gradients"][0]) < 1e-5
        assert distance(outcome["gradients"][1], alone["gradients"][1]) < 1e-3
        assert outcome["held"] < 0.51 * alone["held"] + 200
    start = saved_weights(student, student.model)
    changes = [[a - b for a, b in zip(saved_weights(student, f / "saved"), start)] for f in (two, one)]
    assert distance(*changes) < 1e-4
    states = [torch.load(folder / "optimizer.pt")["state"] for folder in (two, one)]
    for name in ("exp_avg", "exp_avg_sq"):
        assert distance(*([values[name] for values in state.values()] for state in states)) < 1e-5
    assert sorted(p.name for p in (two / "saved").iterdir()) == sorted(p.name for p in (one / "saved").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "qwen3_moe", "smollm3"])
def test_the_gradient_of_other_families_is_that_of_one_process(family, tmp_path):
    """With embeddings that are not tied, sliding windows, experts of which a rank may use others."""
    build(family, SHARED[family] | {"tie_word_embeddings": False}).save_pretrained(tmp_path)
    student = Student(model=str(tmp_path), shard="fsdp")

    def work():
        model = load_model(student, student.model)
        add_gradient(model, own_groups())
        return gradients_of(model)

    expected = work()
    for outcome in run_ranks(work):
        assert len(outcome) == len(expected) and distance(outcome, expected) < 1e-5


def read_p_sft(student, sft):
    """Return log-probs of p_sft as Stage II has it, of its reference, and of the policy."""
    roles = load_roles(student, sft, seed=1)
    prompt, rows = EncodedPrompt(GROUPS[0][0]), GROUPS[0][1][: 2 + ranks.index()]
    with roles.frozen() as frozen:
        reference = token_log_probs(frozen, prompt, rows, 0)[0]
    with torch.no_grad():
        policy = token_log_probs(roles.policy, prompt, rows, 0)[0]
    return whole(reference), whole(policy), isinstance(roles.policy, PeftModel)


@pytest.mark.slow
def test_stage_two_begins_at_p_sft(student, tmp_path):
    train_and_save(student, tmp_path)
    expected = read_p_sft(student, tmp_path / "saved")[0]
    for rank, outcome in enumerate(run_ranks(lambda: read_p_sft(student, tmp_path / "saved"))):
        reference, policy, adapted = outcome
        assert adapted == (student.lora is not None)
        assert reference == pytest.approx(policy, abs=1e-6)
        assert reference[:2, :3] == pytest.approx(expected[:2, :3], abs=1e-4), rank


@pytest.mark.slow
def test_a_rank_alone_cannot_run_a_divided_model(random_student):
    student = Student(model=str(random_student), shard="fsdp")

    def work():
        model = load_model(student, student.model)
        ranks.on_first(lambda: token_log_probs(model, EncodedPrompt([5]), [[6]], 0))

    first, second = run_ranks(work)
    assert isinstance(first, RuntimeError) and "in one of them alone" in str(first)
    assert isinstance(second, ranks.PeerError)


@pytest.mark.slow
def test_memory_that_does_not_suffice_to_gather_a_layer_ends_the_job_with_one_sentence(random_student, monkeypatch):
    from purld.model import shard_units

    student = Student(model=str(random_student), shard="fsdp")

    def fail(*_):
        raise torch.OutOfMemoryError

    def work():
        model = load_model(student, student.model)
        if ranks.index() == 1:
            monkeypatch.setattr(shard_units.torch, "cat", fail)
            ranks.barrier()
        token_log_probs(model, EncodedPrompt([5]), [[6]], 0)
        ranks.barrier()

    other, failed = run_ranks(work)
    assert isinstance(failed, UserError) and "too small to gather a layer's weights" in str(failed)
    assert isinstance(other, ranks.PeerError)


SMALL = LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
SMALL_QUANTIZED = LlamaConfig(num_hidden_layers=1, quantization_config={"quant_method": "bitsandbytes"})
REFUSED = {
    "without a plan": (GPT2Config(n_layer=1), "no plan to shard all of a GPT2LMHeadModel, such as transformer.wte"),
    "that reads images": (LlavaConfig(text_config=SMALL), "does not work with models that read images"),
    "quantized already": (SMALL_QUANTIZED, "quantized cannot be"),
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED)
def test_a_student_that_cannot_be_divided_is_refused(config, words):
    with pytest.raises(UserError, match=f"^student.shard: .*{words}"):
        sharding_plan(build_skeleton(config))


def test_what_cannot_be_divided_is_told_before_anything_is_paid_for(tmp_path, tokenizer):
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student = Student(model=str(tmp_path), shard="fsdp")
    with pytest.raises(UserError, match=r"^student.shard: transformers has no plan"):
        check_student(student, load_encoder(student))


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_while_it_draws_draws_again_with_less(random_student):
    """It fails in the middle of a pass, with a layer gathered, while the other rank draws on; then both train."""
    student = Student(model=str(random_student), shard="fsdp")
    prompts = [EncodedPrompt([5, 6, 7]), EncodedPrompt([9] * 4)]

    def work():
        model = load_model(student, student.model)
        failures = [torch.OutOfMemoryError("CUDA out of memory.")] if ranks.index() == 1 else []

        def fail(*_):
            if failures:
                raise failures.pop()

        model.base_model.layers[1].mlp.register_forward_pre_hook(fail)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlainWarning)
            drawn = GenerateSampler(load_encoder(student), Decoding(1.0, 9))(model, prompts, 2, [7, 8])
        assert not failures
        add_gradient(model, own_groups())
        return [[completion.ids for completion in group] for group in drawn], gradients_of(model)

    drawn, gradients = work()
    for outcome in run_ranks(work):
        assert outcome[0] == drawn
        assert distance(outcome[1], gradients) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_the_body_is_gathered_apart_from_the_head(tied):
    plan = sharding_plan(build_skeleton(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=tied)))
    assert plan.pop("lm_head") == "keep_full_weight"
    assert plan and set(plan.values()) == {"free_full_weight"}


def test_four_bits_are_not_divided(random_student):
    with pytest.raises(ValueError, match="leave quantize out"):
        Student(model=str(random_student), lora=LORA, quantize="nf4", shard="fsdp")
