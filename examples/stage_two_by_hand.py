"""Stage II of purld (Algorithm 1) as one readable loop: LDL-GRPO on a tiny student, in a minute on a CPU.

    python examples/stage_two_by_hand.py

Every step samples K candidates per prompt from the policy, lets the frozen p_sft score them against the anchor, turns
the scores into a label distribution D, and moves the policy's distribution q towards D. The functions are the ones that
the trainer uses, and a test checks that three steps of this loop give the trainer's parameters.

What the trainer adds, and this page leaves out on purpose:
- members of a group go backward in micro-batches, so that K does not set the memory (`purld.training.group_update`);
- checkpoints, resume, mixed precision, the learning rate's warm-up and its fall to 0, logs and the report;
- candidates without a score (the `verbal` score) are left out of their group;
- the other methods of the table, a critic, and several updates on the same candidates;
- LoRA: with an adapter, `Roles.frozen()` is the policy with its adapter switched off, and no second copy is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from purld import Decoding, GroupTokens, Prompt
from purld.config.methods import LdlGrpo
from purld.config.schema import Student
from purld.methods.labels import pu_labels
from purld.methods.losses import ldl_loss
from purld.model.encode import Encoder
from purld.model.load import Roles, load_encoder, load_roles
from purld.model.log_probs import token_log_probs
from purld.model.sample import GenerateSampler, seed_from_content
from purld.model.self_evaluation import SelfEvaluator


@dataclass(frozen=True)
class Step:
    """What one update saw: the mean objective, the mean score of the candidates, and the anchors' mean score."""

    objective: float
    score: float
    anchor_score: float


def align_by_hand(
    roles: Roles,
    encoder: Encoder,
    settings: LdlGrpo,
    batches: Iterable[Sequence[tuple[Prompt, str]]],
    seed: int,
) -> list[Step]:
    """Run Stage II, one update per batch of (prompt, anchor) pairs; the policy in `roles` is changed in place."""
    policy = roles.policy.eval()  # dropout off: the policy that is updated is the one that was sampled
    sampler = GenerateSampler(encoder, Decoding(settings.temperature, settings.max_new_tokens, settings.top_p))
    evaluator = SelfEvaluator(encoder, settings.score, settings.score_batch_size)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    steps = []

    for number, batch in enumerate(batches):
        # 1. Sample K candidates per prompt from the policy. The same seed draws the same candidates.
        prompts = [encoder.encode_prompt(prompt) for prompt, _ in batch]
        of_step = seed_from_content("candidates", seed, number)
        drawn = sampler(policy, prompts, settings.candidates, [seed_from_content(of_step, p.id) for p, _ in batch])
        objectives, scores, anchor_scores = [], [], []

        for (prompt, anchor), encoded, completions in zip(batch, prompts, drawn, strict=True):
            ids = [completion.ids for completion in completions]
            texts = [encoder.decode_text(completion) for completion in ids]

            # 2. Score the anchor and the candidates by the frozen p_sft, which is the reference policy as well.
            with roles.frozen() as p_sft:
                group = evaluator.score(p_sft, prompt, anchor, texts)
                reference, mask = token_log_probs(p_sft, encoded, ids, encoder.pad)  # (K, C), in nats

            # 3. Labels: margins r_k = s_k - s*, and D_k proportional to sigmoid(gamma r_k) exp(r_k / tau) (Eq. 2).
            candidate_scores = torch.tensor(group.candidates)
            labels = pu_labels(candidate_scores, group.anchor, settings.gamma, settings.tau)

            # 4. Loss: KL(D || q) + beta KL(policy || p_sft) (Eq. 4). q is the policy on the group (Eq. 3).
            log_probs, _ = token_log_probs(policy, encoded, ids, encoder.pad)  # (K, C), with a graph
            tokens = GroupTokens(log_probs, reference, log_probs.detach(), mask.float())
            loss = ldl_loss(tokens, labels.log_distribution, form=settings.q, beta=settings.beta)

            # 5. Gradient: the mean over the prompts of the step.
            backward(loss.value / len(batch))
            objectives.append(loss.value.item())
            scores.append(candidate_scores.mean().item())
            anchor_scores.append(group.anchor)

        # 6. Update.
        torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(Step(mean(objectives), mean(scores), mean(anchor_scores)))
    return steps


def backward(loss: Tensor) -> None:
    """Add the gradient of a loss to the weights."""
    loss.backward()


def mean(values: Sequence[float]) -> float:
    """Return the mean of some numbers."""
    return sum(values) / len(values)


def main() -> None:
    """Align the demo's tiny student for a few steps on counting problems."""
    from purld.testbed.world.world import generate_problems, teacher_answer

    torch.set_num_threads(1)
    disable_progress_bar()
    folder = Path(str(files("purld.testbed") / "assets" / "student"))
    student = Student(model=str(folder), max_prompt_tokens=256, max_anchor_tokens=128)
    settings = LdlGrpo(steps=8, prompts_per_step=8, candidates=8, learning_rate=2e-4, max_new_tokens=64)
    pairs = [
        (Prompt.from_text(problem.question), teacher_answer(problem))
        for problem in generate_problems("counting", "train", settings.steps * settings.prompts_per_step, seed=0)
    ]
    size = settings.prompts_per_step
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    roles, encoder = load_roles(student, folder), load_encoder(student)  # the shipped student plays p_sft
    for number, step in enumerate(align_by_hand(roles, encoder, settings, batches, seed=0), start=1):
        print(
            f"step {number}: objective {step.objective:.3f}, candidates' score {step.score:.3f}, "
            f"anchors' score {step.anchor_score:.3f}"
        )


if __name__ == "__main__":
    main()
