"""Makes the tiny students from nothing: tokenizer, a model of one million weights, a curriculum, a quality card.

The curriculum is what lets so small a model judge: first the bare comparison, then judgements of whole answers, then
everything mixed. Each sequence is weighted by itself, else a short score drowns among answer tokens. A student that
sees learns to see first: its tower is taught to tell what is in a cell in the embeddings of the words for it, and then
the whole to find one thing among ever more.
On a machine with the same torch and thread count a seed gives the same student. The world's questions and answers are
in `corpus` and `scene_corpus`; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from purld.errors import UserError
from purld.model.encode import Encoder
from purld.model.processor import read_processor
from purld.model.sample import seed_from_content
from purld.records import Image, Prompt, content_hash
from purld.runs.files import append_rows, write_json
from purld.testbed.shipped import STUDENTS as SHIPPED
from purld.testbed.students import card
from purld.testbed.students.card import MAX_ANCHOR_TOKENS
from purld.testbed.students.learner import Learner, as_images
from purld.testbed.students.lessons import Phase, Sample
from purld.testbed.students.muon import Muon
from purld.testbed.students.rounds import Rounds
from purld.testbed.students.students import STUDENTS, Design, start_from_text
from purld.testbed.students.tokenizer import train_tokenizer
from purld.testbed.world import scene_image
from purld.testbed.world.scenes import COLOURS, COLUMNS, PLACES, ROWS, SHAPES, Scene, draw_scene

WARMUP_STEPS = 100
LOG_EVERY = 50
# The student draws candidates of its own every so many steps.
OWN_EVERY = 100
LEARNING_RATE = 1e-3
LOOKING_STEPS, PICTURES = 500, 32

# Told (done, total, note) now and then, as the terminal's progress is.
Progress = Callable[[int, int, str], None]


def build_student(
    out: Path, seed: int = 0, scale: float = 1.0, progress: Progress | None = None, student: str = "text"
) -> dict[str, Any]:
    """Train a student from scratch and save it at `out` as a Hugging Face directory; returns its quality card.

    A build that was stopped goes on after the last round of its curriculum that was finished; the student that reads
    has but one.

    Args:
        out: replaced when the build is complete, not before.
        seed: of the weights, the corpus and the sampling.
        scale: multiplies the steps and the size of the quality card; tests use a small one.
        progress: told (steps done, steps in all, how it stands).
        student: one of STUDENTS.

    Raises:
        UserError: there is no such student, or another process builds at `out`.
    """
    if student not in STUDENTS:
        raise UserError(f"--student {student}: the testbed's students are {', '.join(STUDENTS)}.")
    design = STUDENTS[student]
    rounds = Rounds(out, made_of(student, seed, scale))
    with rounds.lock():
        rng = random.Random(f"student/{seed}")
        torch.manual_seed(seed)
        learner = new_learner(design, rounds.folder, rng, scale)
        done = rounds.restore(learner.model)
        started = time.monotonic() - rounds.seconds()
        for row in train(learner, design, rng, seed, scale, rounds, done):
            row["seconds"] = round(time.monotonic() - started, 1)
            append_rows(rounds.log, [row])
            if progress:
                losses = ", ".join(f"{key} {value}" for key, value in row.items() if key.endswith("loss"))
                progress(row["step"], row["of"], f"{row['phase']}: {losses}")
        quality = quality_card(learner, design, seed, scale) | {"seconds": round(time.monotonic() - started, 1)}
        learner.model.save_pretrained(rounds.folder)
        write_json(rounds.folder / "quality_card.json", quality)
        rounds.publish()
    return quality


def made_of(student: str, seed: int, scale: float) -> str:
    """A hash of what a build depends on: arguments, versions, the testbed's code, and the student it starts from."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    if STUDENTS[student].sees:
        sources += sorted(SHIPPED["text"].iterdir())
    read = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    return content_hash([student, seed, scale, torch.__version__, transformers.__version__, *read])


def new_learner(design: Design, work: Path, rng: random.Random, scale: float) -> Learner:
    """An untrained student, saved at `work`; its weights follow torch's random state."""
    texts = design.corpus.tokenizer_texts(rng, max(200, int(design.corpus.TOKENIZER_TEXTS * scale)))
    tokenizer = train_tokenizer(texts, design.chat_template, design.marks)
    model = design.model(tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    if design.sees:
        start_from_text(model, tokenizer)
    model.save_pretrained(work)
    design.save_processor(tokenizer, work)
    return Learner(model, Encoder(read_processor(str(work)), MAX_ANCHOR_TOKENS))


def train(
    learner: Learner, design: Design, rng: random.Random, seed: int, scale: float, rounds: Rounds, done: int
) -> Iterator[dict[str, Any]]:
    """Run what is left of the curriculum after `done` rounds; yields rows for the build log.

    The first round goes on with `rng`, which has made the student; later ones have random numbers of their own.
    """
    looking = max(1, int(LOOKING_STEPS * scale)) if design.sees else 0
    lengths = [sum(steps_of(phase, scale) for phase in phases) for phases in design.corpus.CURRICULUM]
    total = looking + sum(lengths)
    if looking and not done:
        for row in look(learner, rng, looking):
            yield row | {"of": total}
    for number, phases in list(enumerate(design.corpus.CURRICULUM))[done:]:
        if number:
            rng = random.Random(f"student/{seed}/round {number}")
            torch.manual_seed(seed_from_content("student", seed, number))
        before = looking + sum(lengths[:number])
        for row in train_round(learner, design.corpus, phases, rng, scale):
            yield row | {"step": before + row["step"], "of": total}
        rounds.save(learner.model, number + 1)


def train_round(
    learner: Learner, corpus: ModuleType, phases: Sequence[Phase], rng: random.Random, scale: float
) -> Iterator[dict[str, Any]]:
    """Some phases under one rise and fall of the learning rate; yields rows for the build log."""
    plan = [phase for phase in phases for _ in range(steps_of(phase, scale))]
    optimizers = make_optimizers(learner.model, LEARNING_RATE)
    warmup, decay = min(WARMUP_STEPS, len(plan) // 10 + 1), round(0.4 * len(plan))
    schedules = [
        transformers.get_wsd_schedule(
            o, num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=len(plan) + 1
        )
        for o in optimizers
    ]
    own: list[Sample] = []
    losses: list[tuple[float, float]] = []
    for step, phase in enumerate(plan, 1):
        if phase.own and (not own or step % OWN_EVERY == 0):
            drawn = draw_own(learner, corpus, rng, max(8, int(corpus.OWN_SAMPLES * min(1, scale))))
            own = (own + drawn)[-4 * corpus.OWN_SAMPLES :]
        losses.append(learner.backward(corpus.lessons(phase, corpus.LESSONS, own, rng), corpus.PARTS))
        update(learner.model, optimizers)
        for schedule in schedules:
            schedule.step()
        if step % LOG_EVERY == 0 or step == len(plan):
            answering, judging = (round(sum(part) / len(losses), 4) for part in zip(*losses))
            losses.clear()
            yield {"step": step, "phase": phase.name, "answer_loss": answering, "judge_loss": judging}


def steps_of(phase: Phase, scale: float) -> int:
    """A phase's steps in a build of some scale."""
    return max(1, int(phase.steps * scale))


def look(learner: Learner, rng: random.Random, steps: int) -> Iterator[dict[str, Any]]:
    """Teach the tower to say what a cell holds and which it is in the language model's own words.

    A cell's vector shall be the sum of the embeddings of its words, so that what looks for a word in a text finds it in
    a picture too. Yields rows for the build log; the loss is a share of the variance of what is to be told.
    """
    optimizers = make_optimizers(learner.model, LEARNING_RATE)
    words = {word: learner.embedding(word) for word in (*COLOURS, *SHAPES, *ROWS, *COLUMNS)}
    losses = []
    for step in range(1, steps + 1):
        scenes = [draw_scene(rng) for _ in range(PICTURES)]
        features = learner.features([scene_image.draw(scene, rng) for scene in scenes])
        told = torch.stack([torch.stack([_told(scene, place, words) for place in PLACES]) for scene in scenes])
        loss = (features - told).pow(2).mean() / (told - told.mean((0, 1))).pow(2).mean()
        loss.backward()
        update(learner.model, optimizers)
        losses.append(loss.item())
        if step % LOG_EVERY == 0 or step == steps:
            yield {"step": step, "phase": "look", "look_loss": round(sum(losses) / len(losses), 4)}
            losses.clear()


def _told(scene: Scene, place: str, words: Mapping[str, Tensor]) -> Tensor:
    """(H,): what a cell's vector shall be."""
    thing = scene.at(place)
    said = [*place.split(), *([thing.colour, thing.shape] if thing else [])]
    return torch.stack([words[word] for word in said]).sum(0)


def make_optimizers(model: PreTrainedModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for everything else."""
    inside = (".layers.", ".blocks.")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and any(part in n for part in inside)]
    held = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in held]
    return [Muon(matrices, learning_rate), torch.optim.AdamW(rest, learning_rate, (0.9, 0.99), weight_decay=0.0)]


def update(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """One optimizer step on the gradients that are there."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def draw_own(learner: Learner, corpus: ModuleType, rng: random.Random, n: int) -> list[Sample]:
    """Answers the student draws itself, to training questions."""
    problems = corpus.problems(n, rng)
    images = as_images([picture for _, picture in problems if picture is not None])
    shown: list[tuple[Image, ...]] = [(image,) for image in images] or [()] * len(problems)
    prompts = [Prompt.from_text(p.question, images=seen) for (p, _), seen in zip(problems, shown, strict=True)]
    drawn = card.answers(learner.model, learner.encoder, prompts)
    return [Sample(problem, text, picture) for (problem, picture), (text,) in zip(problems, drawn)]


def quality_card(learner: Learner, design: Design, seed: int, scale: float = 1.0) -> dict[str, Any]:
    """The figures of a student's tasks with what is needed to make them again."""
    n = max(8, int(300 * min(1, scale)))
    model, encoder = learner.model, learner.encoder
    return {
        "tasks": {task: card.to_json(card.measure(model, encoder, task, n, 8, seed)) for task in design.tasks},
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(encoder.tokenizer),
        "steps": {phase.name: steps_of(phase, scale) for phases in design.corpus.CURRICULUM for phase in phases},
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
