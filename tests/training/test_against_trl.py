"""Our objectives against TRL's own trainers: the same model, batch, reference and settings, in float32.

What is compared is the loss and the gradient in every parameter. TRL's side is its trainers' own loss functions, for
GRPO its own advantages and for self-distillation its own teacher prompts too, so a change on either side fails here.
"""

import contextlib

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from purld.config.schema import Student
from purld.methods.advantages import group_advantages
from purld.methods.losses import dpo_loss, grpo_loss, reverse_kl_loss
from purld.model.load import Roles, load_encoder
from purld.model.vision import EncodedPrompt
from purld.records import Prompt
from purld.templates import IN_CONTEXT_TAIL
from purld.training.group_update import GroupUpdate, UnmeasuredGroup

HEAD_LENGTH, LENGTHS = 19, (5, 12, 9, 12)
TOLERANCE = 1e-5


def load(path, noise_seed=None):
    """The random student, moved away from where it was by some noise."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    if noise_seed is not None:
        generator = torch.Generator().manual_seed(noise_seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def group():
    generator = torch.Generator().manual_seed(4)
    draw = lambda n: torch.randint(20, 200, (n,), generator=generator).tolist()  # noqa: E731
    return EncodedPrompt(draw(HEAD_LENGTH)), [draw(n) for n in LENGTHS]


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def ours(policy, reference, members, objective, micro_batch_size=3):
    """Loss and gradient by the update that Stage II runs, in micro-batches."""
    update = GroupUpdate(Roles(policy, reference), micro_batch_size, 0, torch.Tensor.backward, contextlib.nullcontext)
    policy.zero_grad()
    [(loss, _)] = update(policy, members(update), [objective], share=1.0)
    return loss.value.item(), gradient(policy)


def theirs(policy, loss):
    policy.zero_grad()
    loss.backward()
    return loss.item(), gradient(policy)


def agree(ours, theirs):
    (our_loss, our_gradient), (their_loss, their_gradient) = ours, theirs
    # The parts of a GRPO loss are of size 1 and cancel, wholly where every ratio is 1: 1e-6 is relative to them.
    assert our_loss == pytest.approx(their_loss, rel=TOLERANCE, abs=1e-6)
    assert their_gradient.norm() > 1e-3
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() < TOLERANCE


def arguments(kind, folder, **settings):
    shared = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False}
    return kind(**shared, gradient_checkpointing=False, **settings)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo(random_student, tokenizer, tmp_path, group, beta):
    head, ids = group
    pairs = [(0, 1), (0, 2), (3, 1)]
    policy, reference = load(random_student, 1), load(random_student)
    words = Dataset.from_list([{"prompt": "How many?", "chosen": "4", "rejected": "5"}])
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments(DPOConfig, tmp_path, beta=beta, max_length=None),
        train_dataset=words,
        processing_class=tokenizer,
    )
    policy.eval()
    rows = [{"prompt_ids": head.ids, "chosen_ids": ids[a], "rejected_ids": ids[b]} for a, b in pairs]
    their = theirs(policy, trainer.compute_loss(policy, trainer.data_collator(rows)))
    our = ours(
        policy,
        reference,
        lambda update: update.members(policy, [UnmeasuredGroup(head, ids)], keep_old=False),
        lambda tokens: dpo_loss(tokens, torch.tensor(pairs), beta=beta),
    )
    agree(our, their)


def rewards_of(completion_ids):
    return [(sum(ids) % 17) / 17 for ids in completion_ids]


def reward(completions, completion_ids, **_):
    return rewards_of(completion_ids)


@pytest.mark.parametrize(("beta", "moved"), [(0.0, False), (0.0, True), (0.3, False), (0.3, True)])
def test_grpo(random_student, tokenizer, tmp_path, beta, moved):
    """TRL draws, rewards and standardises a group; with `moved`, the policy is then another than the one that drew it,
    so that ratios differ from 1 and some are clipped. The KL is TRL's with its bias correction."""
    policy, reference = load(random_student, 1), load(random_student)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=arguments(
            GRPOConfig,
            tmp_path,
            beta=beta,
            epsilon=0.2,
            loss_type="grpo",
            use_bias_correction_kl=True,
            num_generations=4,
            num_iterations=2,  # so that TRL keeps the old log-probabilities
            per_device_train_batch_size=4,
            max_completion_length=12,
            steps_per_generation=1,
            temperature=1.0,
            seed=3,
        ),
        train_dataset=Dataset.from_list([{"prompt": "How many?"}]),
        processing_class=tokenizer,
    )
    if beta:
        trainer.ref_model.load_state_dict(reference.state_dict())
    policy.eval()
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions([{"prompt": "How many?"}] * 4)
    lengths = batch["completion_mask"].sum(dim=1).tolist()
    head = EncodedPrompt(batch["prompt_ids"][0][batch["prompt_mask"][0] > 0].tolist())
    ids = [row[:n] for row, n in zip(batch["completion_ids"].tolist(), lengths)]
    assert len(set(lengths)) > 1 or len(set(map(tuple, ids))) > 1
    advantages = group_advantages(torch.tensor(rewards_of(ids)))
    assert torch.allclose(advantages, batch["advantages"], rtol=TOLERANCE, atol=1e-6)
    drawn = GroupUpdate(Roles(policy, reference), 8, 0, torch.Tensor.backward, contextlib.nullcontext)
    members = drawn.members(policy, [UnmeasuredGroup(head, ids)], keep_old=True)
    if moved:
        with torch.no_grad():
            for parameter, other in zip(policy.parameters(), load(random_student, 7).parameters()):
                parameter.lerp_(other, 0.3)
    their = theirs(policy, trainer._compute_loss(policy, batch))
    objective = lambda tokens: grpo_loss(tokens, advantages, clip=0.2, beta=beta)  # noqa: E731
    agree(ours(policy, reference, lambda _: members, objective), their)
    if moved:
        [clipped] = trainer._metrics["eval"]["clip_ratio/region_mean"]
        assert 0 < clipped < 1


@pytest.mark.parametrize("adapter", [False, True])
def test_self_distillation(random_student, tokenizer, tmp_path, adapter):
    """TRL draws with its student and writes the teacher's prompt around the anchor, by our template. With an adapter
    the teacher is the student with its adapter off, on both sides."""
    question, anchor = "How many apples has Ana?", "Ana has 3 + 4 = 7 apples."
    row = {"prompt": [{"role": "user", "content": question}], "privileged_context": anchor}
    trainer = SDFTTrainer(
        model=load(random_student),  # its teacher is the model of this directory
        args=arguments(
            SDFTConfig,
            tmp_path,
            distillation_mode="sampled_token",
            distillation_alpha=1.0,
            teacher_model_kind="base",
            teacher_prompt_template="{prompt}" + IN_CONTEXT_TAIL.format(anchor="{privileged_context}"),
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=12,
            seed=3,
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.1) if adapter else None,
    )
    policy = trainer.model.eval()
    if not adapter:
        policy.load_state_dict(load(random_student, 1).state_dict())
    torch.manual_seed(0)
    batch = trainer._prepare_training_batch([row] * 4)
    encoder = load_encoder(Student(model=str(random_student), max_anchor_tokens=64))
    prompt = Prompt.from_text(question)
    lengths = batch["completion_mask"].sum(dim=1).tolist()
    ids = [row[:n] for row, n in zip(batch["completion_ids"].tolist(), lengths)]
    anchored = encoder.encode_anchored_prompt(prompt, anchor)
    assert batch["teacher_input_ids"][0].tolist()[: len(anchored)] == anchored.ids
    assert len(set(map(tuple, ids))) > 1
    their = theirs(policy, trainer.compute_loss(policy, batch))
    our = ours(
        policy,
        None if adapter else load(random_student),
        lambda update: update.members(
            policy, [UnmeasuredGroup(encoder.encode_prompt(prompt), ids, anchored)], keep_old=False
        ),
        reverse_kl_loss,
    )
    agree(our, their)
