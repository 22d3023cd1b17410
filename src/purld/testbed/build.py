"""Makes the tiny student from nothing: tokenizer, a Qwen2 of one million weights, a curriculum, a quality card.

The curriculum is what lets so small a model judge: first the bare comparison, then judgements of whole answers, then
everything mixed. Each sequence is weighted by itself, else a short score drowns among answer tokens.
On a machine with the same torch and thread count a seed gives the same student. The world's questions and answers are
in `corpus`; nothing is downloaded.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from purld.rundir import append_rows, write_json
from purld.testbed import card, corpus
from purld.testbed.corpus import Kind, Lesson, Sample
from purld.testbed.muon import Muon
from purld.testbed.tokenizer import render, train_tokenizer
from purld.testbed.world import TASKS

ASSET = Path(__file__).parent / "assets" / "student"
LEARNING_RATE = 1e-3
# Next to the reply the user turn is read too, at this weight: predicting words that are copied from the question
# teaches copying many times faster than the reply alone. A bare comparison is of random words: nothing to predict.
READING: dict[Kind, float] = {"answer": 1.0, "judgement": 0.3, "comparison": 0.0}
WARMUP_STEPS = 100
LOG_EVERY = 50

# Told (done, total, note) now and then, as the terminal's progress is.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Phase:
    """A stretch of the curriculum.

    `judging` is the share of judgements among the lessons; of these, `bare` are bare comparisons and `own` have a
    candidate that the student drew itself.
    """

    name: str
    steps: int
    judging: float
    own: float = 0.0
    bare: float = 0.0


CURRICULUM = (
    Phase("compare", 600, judging=1.0, bare=1.0),
    Phase("judge", 600, judging=0.75, bare=0.25),
    Phase("mixed", 700, judging=0.5, bare=0.05, own=0.3),
    Phase("settle", 500, judging=0.4, own=0.5),
)
BATCH = 64
# The student draws this many candidates of its own every so many steps.
OWN_SAMPLES, OWN_EVERY = 384, 100


def build_student(out: Path, seed: int = 0, scale: float = 1.0, progress: Progress | None = None) -> dict[str, Any]:
    """Train a student from scratch and save it at `out` as a Hugging Face directory; returns its quality card.

    Args:
        out: replaced when the build is complete, not before.
        seed: of the weights, the corpus and the sampling.
        scale: multiplies the steps and the size of the quality card; tests use a small one.
        progress: told (steps done, steps in all, how it stands).
    """
    started = time.monotonic()
    work = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rng = random.Random(f"student/{seed}")
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(corpus.tokenizer_texts(rng, max(200, int(6000 * scale))))
    model = new_model(tokenizer)
    for row in train(model, tokenizer, rng, scale):
        append_rows(work / "build_log.jsonl", [row])
        if progress:
            progress(row["step"], row["of"], f"answers {row['answer_loss']}, judgements {row['judge_loss']}")
    quality = quality_card(model, tokenizer, seed, scale) | {"seconds": round(time.monotonic() - started, 1)}
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    write_json(work / "quality_card.json", quality)
    replace_folder(work, out)
    return quality


def new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """An untrained student; its weights follow torch's random state."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        # Tied, the output's gradient would blur the input embeddings, and comparing words needs them distinct.
        tie_word_embeddings=False,
        # The usual 0.02 suits wide models; at this width attention would start out uniform and stay so for long.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def train(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rng: random.Random, scale: float
) -> Iterator[dict[str, Any]]:
    """Run the curriculum; yields rows for the build log."""
    plan = [phase for phase in CURRICULUM for _ in range(max(1, int(phase.steps * scale)))]
    optimizers = make_optimizers(model)
    warmup, decay = min(WARMUP_STEPS, len(plan) // 10 + 1), round(0.4 * len(plan))
    schedules = [
        transformers.get_wsd_schedule(
            o, num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=len(plan) + 1
        )
        for o in optimizers
    ]
    own: list[Sample] = []
    losses: list[tuple[float, float]] = []
    started = time.monotonic()
    for step, phase in enumerate(plan, 1):
        if phase.own and (not own or step % OWN_EVERY == 0):
            own = (own + draw_own(model, tokenizer, rng, max(8, int(OWN_SAMPLES * min(1, scale)))))[-4 * OWN_SAMPLES :]
        losses.append(update(model, tokenizer, optimizers, lessons(phase, own, rng)))
        for schedule in schedules:
            schedule.step()
        if step % LOG_EVERY == 0 or step == len(plan):
            answering, judging = (sum(part) / len(losses) for part in zip(*losses))
            losses.clear()
            yield {
                "step": step,
                "of": len(plan),
                "phase": phase.name,
                "answer_loss": round(answering, 4),
                "judge_loss": round(judging, 4),
                "seconds": round(time.monotonic() - started, 1),
            }


def make_optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for everything else."""
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    held = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in held]
    return [Muon(matrices, LEARNING_RATE), torch.optim.AdamW(rest, LEARNING_RATE, (0.9, 0.99), weight_decay=0.0)]


def lessons(phase: Phase, own: list[Sample], rng: random.Random) -> list[Lesson]:
    """The lessons of one step."""
    batch = []
    for index in range(BATCH):
        if index >= round(phase.judging * BATCH):
            batch.append(corpus.answer_lesson(rng))
        elif rng.random() < phase.bare:
            batch.append(corpus.comparison_lesson(rng))
        else:
            sample = rng.choice(own) if own and rng.random() < phase.own else None
            batch.append(corpus.judging_lesson(rng, sample))
    return batch


def draw_own(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rng: random.Random, n: int) -> list[Sample]:
    """Answers the student draws itself, to training questions."""
    problems = [corpus.training_problem(rng.choice(TASKS), rng) for _ in range(n)]
    drawn = card.answers(model, tokenizer, [p.question for p in problems])
    return [Sample(problem, text) for problem, (text,) in zip(problems, drawn)]


def update(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    optimizers: list[torch.optim.Optimizer],
    batch: list[Lesson],
) -> tuple[float, float]:
    """One optimizer step on a batch; returns the mean loss of its answers and of its judgements."""
    sequences = sorted((encode(tokenizer, lesson) for lesson in batch), key=lambda s: len(s.ids))
    middle, total = len(sequences) // 2, [0.0, 0.0]
    # The shorter half and the longer half by themselves: less padding.
    for part in (sequences[:middle], sequences[middle:]):
        loss = sequence_losses(model, part)
        (loss.sum() / len(batch)).backward()
        for sequence, value in zip(part, loss.tolist()):
            total[sequence.kind != "answer"] += value
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    judged = sum(lesson.judging for lesson in batch)
    return total[0] / max(1, len(batch) - judged), total[1] / max(1, judged)


@dataclass(frozen=True)
class Sequence:
    """A lesson in tokens; the reply starts at `start`."""

    ids: list[int]
    start: int
    kind: Kind


def encode(tokenizer: PreTrainedTokenizerBase, lesson: Lesson) -> Sequence:
    """The lesson as the student will see it, closed by the end of the turn."""
    prompt = tokenizer(render(tokenizer, lesson.prompt))["input_ids"]
    reply = tokenizer(lesson.reply)["input_ids"]
    return Sequence([*prompt, *reply, tokenizer.eos_token_id], len(prompt), lesson.kind)


def sequence_losses(model: Qwen2ForCausalLM, part: list[Sequence]) -> torch.Tensor:
    """Cross-entropy of each sequence in nats, shape (B,): twice the mean over an answer's tokens, the sum over a
    score's, and the mean over the user turn at its READING weight.

    A score's tokens but one or two are always the same, and a mean would thin out the one that matters.
    """
    width = max(len(s.ids) for s in part)
    ids = torch.zeros(len(part), width, dtype=torch.long)
    weights = torch.zeros(len(part), width)
    for row, sequence in enumerate(part):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        length = len(sequence.ids) - sequence.start
        weights[row, : sequence.start] = READING[sequence.kind] / sequence.start
        weights[row, sequence.start : len(sequence.ids)] = 2.0 / length if sequence.kind == "answer" else 1.0
    # Padding on the right needs no mask: nothing that counts attends to it.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    weights, targets = weights[:, 1:], ids[:, 1:]
    counted = weights > 0
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), targets[counted], reduction="none")
    return torch.zeros_like(weights).masked_scatter(counted, losses * weights[counted]).sum(1)


def quality_card(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, scale: float = 1.0
) -> dict[str, Any]:
    """The figures of both tasks with what is needed to make them again."""
    n = max(8, int(300 * min(1, scale)))
    return {
        "tasks": {task: card.to_json(card.measure(model, tokenizer, task, n, 8, seed)) for task in TASKS},
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "steps": {phase.name: max(1, int(phase.steps * scale)) for phase in CURRICULUM},
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def replace_folder(new: Path, target: Path) -> None:
    """Put the folder `new` in the place of `target`."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)
