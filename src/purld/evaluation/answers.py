"""Draw one model's answers to held-out prompts, batch by batch.

The seed of an answer depends on its prompt alone, and a batch is on disk before the next is drawn. An interrupted
evaluation therefore continues at the next batch and ends with the same answers. The ranks of a job take batches in
turn, so that each batch, and with it every answer, is the same on any number of ranks; rank 0 writes. `recorded` reads
the answers back; `judge` compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from purld import ranks
from purld.evaluation.recorded import rows_to_generations
from purld.model.encode import Encoder
from purld.model.sample import Completion, Sampler, seed_from_content
from purld.records import Generation, Prompt
from purld.runs.files import append_rows, cut_rows, read_intact_rows
from purld.runs.thumbnails import prompt_fields
from purld.tasks.checks import Check


def answer_prompts(
    load: Callable[[], Any],
    prompts: Sequence[Prompt],
    encoder: Encoder,
    sampler: Sampler,
    samples: int,
    batch_size: int,
    seed: int,
    path: Path,
    check: Check | None,
    progress: Callable[[int, int, str], None],
) -> list[Generation]:
    """Draw `samples` answers to each prompt and append them to `path`, continuing after the answers already there.

    Args:
        load: returns the model; not called if all answers are on disk.
        prompts: the held-out prompts, in a fixed order.
        encoder: the run's encoder.
        sampler: draws the answers.
        samples: answers per prompt.
        batch_size: sequences that a process draws at once.
        seed: the run's seed.
        path: the JSONL file of generations. Each row also has the question, its images and, with a check, `correct`.
        check: returns whether an answer is right; None to leave answers unchecked.
        progress: called with (prompts done, prompts in total, note) after every batch.

    Returns:
        The generations, prompt by prompt, sample by sample.
    """
    per_batch = max(1, batch_size // samples)
    rows, done = ranks.on_first(lambda: _complete_batches(path, len(prompts), samples, per_batch))
    model = load() if done < len(prompts) else None
    while done < len(prompts):
        start = done + per_batch * ranks.index()
        batch, drawn = prompts[start : start + per_batch], []
        if batch:
            seeds = [seed_from_content("answers", seed, p.id) for p in batch]
            drawn = sampler(model, [encoder.encode_prompt(p) for p in batch], samples, seeds)
        new_rows = ranks.gather_rows(
            [row for p, answers in zip(batch, drawn) for row in _generation_rows(p, answers, encoder, check)]
        )
        if ranks.is_first():
            fields = [prompt_fields(p, path) for p in prompts[done : done + per_batch * ranks.count()]]
            append_rows(path, [row | fields[index // samples] for index, row in enumerate(new_rows)])
        rows += new_rows
        done = min(len(prompts), done + per_batch * ranks.count())
        progress(done, len(prompts), "")
    return rows_to_generations(rows)


def _complete_batches(path: Path, prompts: int, samples: int, per_batch: int) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of the batches that are complete on disk, and the number of prompts they answer.

    Rows of an incomplete batch are removed from the file, and so is everything from a damaged row on.
    """
    rows = read_intact_rows(path)
    answered = len(rows) // samples
    done = prompts if answered == prompts else answered // per_batch * per_batch
    if path.exists():  # what a kill left of a batch is drawn again
        cut_rows(path, done * samples)
    return rows[: done * samples], done


def _generation_rows(
    prompt: Prompt, answers: Sequence[Completion], encoder: Encoder, check: Check | None
) -> list[dict[str, Any]]:
    rows = []
    for sample, answer in enumerate(answers):
        reply = encoder.read_reply(answer.ids)
        thinking = reply.thinking or None
        generation = Generation(prompt.id, sample, reply.answer, len(answer.ids), answer.finished, thinking)
        values = {name: value for name, value in asdict(generation).items() if value is not None}
        rightness = {} if check is None else {"correct": check(prompt, reply.answer)}
        rows.append(values | rightness)
    return rows
