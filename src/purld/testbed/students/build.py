"""Build the tiny students from scratch: tokenizer, a model of one million weights, a curriculum, a quality card.

The curriculum makes so small a model able to judge: first the bare comparison, then judgements of whole answers, then
everything mixed. Each lesson's loss is weighted within its own sequence, so that a short score does not drown among
answer tokens. A student that reads images learns to see first: its tower is trained to express what is in a cell in the
language model's embeddings of the words for it, then the whole model to find one thing among more and more.
With the same torch and thread count a seed gives the same student. Nothing is downloaded.
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
from purld.testbed.shipped import STUDENT_FOLDERS
from purld.testbed.students import card
from purld.testbed.students.card import MAX_ANCHOR_TOKENS
from purld.testbed.students.learner import Learner, to_prompt_images
from purld.testbed.students.lessons import Phase, Sample
from purld.testbed.students.muon import Muon
from purld.testbed.students.rounds import Rounds
from purld.testbed.students.students import DESIGNS, Design, start_from_text
from purld.testbed.students.tokenizer import train_tokenizer
from purld.testbed.world import scene_image
from purld.testbed.world.scenes import COLOURS, COLUMNS, PLACES, ROWS, SHAPES, Scene, draw_scene

WARMUP_STEPS = 100
LOG_EVERY = 50
# The student samples new candidates each time after this many steps.
OWN_SAMPLES_EVERY = 100
LEARNING_RATE = 1e-3
VISION_STEPS, VISION_BATCH_SIZE = 500, 32

# Called with (done, total, note), like the terminal's progress.
Progress = Callable[[int, int, str], None]


def build_student(
    out: Path, seed: int = 0, scale: float = 1.0, progress: Progress | None = None, student: str = "text"
) -> dict[str, Any]:
    """Train a student from scratch, save it at `out` as a Hugging Face directory, and return its quality card.

    A build that was stopped continues after the last finished round of its curriculum; the student that reads text has
    only one round.

    Args:
        out: the directory to write; replaced only when the build is complete.
        seed: seeds the weights, the corpus and the sampling.
        scale: multiplies the steps and the size of the quality card; tests use a small one.
        progress: called with (steps done, steps in all, a note).
        student: a key of DESIGNS.

    Raises:
        UserError: there is no such student, or another process builds at `out`.
    """
    if student not in DESIGNS:
        raise UserError(f"--student {student}: the testbed's students are {', '.join(DESIGNS)}.")
    design = DESIGNS[student]
    rounds = Rounds(out, build_hash(student, seed, scale))
    with rounds.lock():
        rng = random.Random(f"student/{seed}")
        torch.manual_seed(seed)
        learner = new_learner(design, rounds.folder, rng, scale)
        finished = rounds.restore_weights(learner.model)
        started = time.monotonic() - rounds.elapsed_seconds()
        for row in train_curriculum(learner, design, rng, seed, scale, rounds, finished):
            row["seconds"] = round(time.monotonic() - started, 1)
            append_rows(rounds.log, [row])
            if progress:
                losses = ", ".join(f"{key} {value}" for key, value in row.items() if key.endswith("loss"))
                progress(row["step"], row["of"], f"{row['phase']}: {losses}")
        quality = make_quality_card(learner, design, seed, scale) | {"seconds": round(time.monotonic() - started, 1)}
        learner.model.save_pretrained(rounds.folder)
        write_json(rounds.folder / "quality_card.json", quality)
        rounds.publish_build()
    return quality


def build_hash(student: str, seed: int, scale: float) -> str:
    """Return a hash of what a build depends on: arguments, versions, the testbed's code, the student it starts from."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    if DESIGNS[student].reads_images:
        sources += sorted(STUDENT_FOLDERS["text"].iterdir())
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    return content_hash([student, seed, scale, torch.__version__, transformers.__version__, *digests])


def new_learner(design: Design, work: Path, rng: random.Random, scale: float) -> Learner:
    """Create an untrained student and save it at `work`; its weights follow torch's random state."""
    texts = design.corpus.draw_tokenizer_texts(rng, max(200, int(design.corpus.TOKENIZER_TEXTS * scale)))
    tokenizer = train_tokenizer(texts, design.chat_template, design.image_tokens)
    model = design.model(tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    if design.reads_images:
        start_from_text(model, tokenizer)
    model.save_pretrained(work)
    design.save_processor(tokenizer, work)
    return Learner(model, Encoder(read_processor(str(work)), MAX_ANCHOR_TOKENS))


def train_curriculum(
    learner: Learner, design: Design, rng: random.Random, seed: int, scale: float, rounds: Rounds, finished: int
) -> Iterator[dict[str, Any]]:
    """Run the rounds of the curriculum after the first `finished`; yield rows for the build log.

    The first round continues `rng`, which has created the student; each later round seeds its own random numbers.
    """
    vision_steps = max(1, int(VISION_STEPS * scale)) if design.reads_images else 0
    lengths = [sum(scaled_steps(phase, scale) for phase in phases) for phases in design.corpus.CURRICULUM]
    total = vision_steps + sum(lengths)
    if vision_steps and not finished:
        for row in train_vision_tower(learner, rng, vision_steps):
            yield row | {"of": total}
    for number, phases in list(enumerate(design.corpus.CURRICULUM))[finished:]:
        if number:
            rng = random.Random(f"student/{seed}/round {number}")
            torch.manual_seed(seed_from_content("student", seed, number))
        steps_before = vision_steps + sum(lengths[:number])
        for row in train_round(learner, design.corpus, phases, rng, scale):
            yield row | {"step": steps_before + row["step"], "of": total}
        rounds.save_weights(learner.model, number + 1)


def train_round(
    learner: Learner, corpus: ModuleType, phases: Sequence[Phase], rng: random.Random, scale: float
) -> Iterator[dict[str, Any]]:
    """Train some phases under one rise and fall of the learning rate; yield rows for the build log."""
    plan = [phase for phase in phases for _ in range(scaled_steps(phase, scale))]
    optimizers = make_optimizers(learner.model, LEARNING_RATE)
    warmup, decay = min(WARMUP_STEPS, len(plan) // 10 + 1), round(0.4 * len(plan))
    schedules = [
        transformers.get_wsd_schedule(
            optimizer, num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=len(plan) + 1
        )
        for optimizer in optimizers
    ]
    own: list[Sample] = []
    losses: list[tuple[float, float]] = []
    for step, phase in enumerate(plan, 1):
        if phase.own and (not own or step % OWN_SAMPLES_EVERY == 0):
            samples = sample_own_answers(learner, corpus, rng, max(8, int(corpus.OWN_SAMPLES * min(1, scale))))
            own = (own + samples)[-4 * corpus.OWN_SAMPLES :]
        losses.append(
            learner.accumulate_gradients(
                corpus.draw_lessons(phase, corpus.LESSONS_PER_STEP, own, rng), corpus.MICRO_BATCHES
            )
        )
        update_weights(learner.model, optimizers)
        for schedule in schedules:
            schedule.step()
        if step % LOG_EVERY == 0 or step == len(plan):
            answer_loss, judge_loss = (round(sum(part) / len(losses), 4) for part in zip(*losses))
            losses.clear()
            yield {"step": step, "phase": phase.name, "answer_loss": answer_loss, "judge_loss": judge_loss}


def scaled_steps(phase: Phase, scale: float) -> int:
    """Return the number of steps of a phase in a build of some scale."""
    return max(1, int(phase.steps * scale))


def train_vision_tower(learner: Learner, rng: random.Random, steps: int) -> Iterator[dict[str, Any]]:
    """Train the tower to express what a cell holds, and which cell it is, in the language model's own words.

    The target of a cell's vector is the sum of the embeddings of its words, so that attention which looks for a word in
    a text finds it in an image too. Yields rows for the build log; the loss is a share of the targets' variance.
    """
    optimizers = make_optimizers(learner.model, LEARNING_RATE)
    words = {word: learner.word_embedding(word) for word in (*COLOURS, *SHAPES, *ROWS, *COLUMNS)}
    losses = []
    for step in range(1, steps + 1):
        scenes = [draw_scene(rng) for _ in range(VISION_BATCH_SIZE)]
        features = learner.image_features([scene_image.render_scene(scene, rng) for scene in scenes])
        targets = torch.stack(
            [torch.stack([_target_features(scene, place, words) for place in PLACES]) for scene in scenes]
        )
        loss = (features - targets).pow(2).mean() / (targets - targets.mean((0, 1))).pow(2).mean()
        loss.backward()
        update_weights(learner.model, optimizers)
        losses.append(loss.item())
        if step % LOG_EVERY == 0 or step == steps:
            yield {"step": step, "phase": "look", "look_loss": round(sum(losses) / len(losses), 4)}
            losses.clear()


def _target_features(scene: Scene, place: str, words: Mapping[str, Tensor]) -> Tensor:
    """Return the target (hidden,) of a cell's vector."""
    thing = scene.thing_at(place)
    words_of_cell = [*place.split(), *([thing.colour, thing.shape] if thing else [])]
    return torch.stack([words[word] for word in words_of_cell]).sum(0)


def make_optimizers(model: PreTrainedModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Create Muon for the layers' matrices and AdamW for everything else."""
    layer_names = (".layers.", ".blocks.")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and any(part in n for part in layer_names)]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in matrix_ids]
    return [Muon(matrices, learning_rate), torch.optim.AdamW(rest, learning_rate, (0.9, 0.99), weight_decay=0.0)]


def update_weights(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """Take one optimizer step on the accumulated gradients."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def sample_own_answers(learner: Learner, corpus: ModuleType, rng: random.Random, n: int) -> list[Sample]:
    """Sample the student's own answers to training questions."""
    problems = corpus.draw_problems(n, rng)
    images = to_prompt_images([image for _, image in problems if image is not None])
    prompt_images: list[tuple[Image, ...]] = [(image,) for image in images] or [()] * len(problems)
    prompts = [
        Prompt.from_text(p.question, images=images_of_prompt)
        for (p, _), images_of_prompt in zip(problems, prompt_images, strict=True)
    ]
    samples = card.sample_answers(learner.model, learner.encoder, prompts)
    return [Sample(problem, text, image) for (problem, image), (text,) in zip(problems, samples)]


def make_quality_card(learner: Learner, design: Design, seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Measure a student on its tasks; return the figures with what is needed to reproduce them."""
    n = max(8, int(300 * min(1, scale)))
    model, encoder = learner.model, learner.encoder
    return {
        "tasks": {
            task: card.figures_to_json(card.measure_student(model, encoder, task, n, 8, seed)) for task in design.tasks
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(encoder.tokenizer),
        "steps": {phase.name: scaled_steps(phase, scale) for phases in design.corpus.CURRICULUM for phase in phases},
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
