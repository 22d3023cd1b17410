"""Held-out answers of one model, drawn batch by batch and kept as they come.

Each batch has its own seed from content and place, and is on disk before the next is drawn, so an interrupted
evaluation goes on at the next batch and ends with the same answers. Judging them is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from purld.model.encode import Encoder
from purld.model.sample import Completion, Decoding, GenerateSampler, seed_from_content
from purld.records import Generation, Prompt
from purld.runs.files import append_rows, read_rows, write_rows
from purld.runs.thumbnails import logged_question
from purld.tasks.checks import Check


def answer_prompts(
    load: Callable[[], Any],
    prompts: Sequence[Prompt],
    encoder: Encoder,
    decoding: Decoding,
    samples: int,
    batch_size: int,
    seed: int,
    path: Path,
    check: Check | None,
    progress: Callable[[int, int, str], None],
) -> list[Generation]:
    """Draw `samples` answers to each prompt and append them to `path`, going on from what is there.

    Args:
        load: gives the model; not called if nothing is left to do.
        prompts: the held-out prompts, in a fixed order.
        encoder: the run's encoder.
        decoding: how answers are drawn.
        samples: answers per prompt.
        batch_size: sequences drawn at once.
        seed: the run's seed.
        path: a JSONL file of generations, with the question, its images and, given a check, whether it is right.
        check: says whether an answer is right.
        progress: told of every batch.

    Returns:
        The generations, prompt by prompt, sample by sample.
    """
    per_batch = max(1, batch_size // samples)
    rows, done = _whole_batches(path, len(prompts), samples, per_batch)
    sampler = GenerateSampler(encoder, decoding)
    model = load() if done < len(prompts) else None
    for start in range(done, len(prompts), per_batch):
        batch = prompts[start : start + per_batch]
        batch_seed = seed_from_content("answers", seed, start, [p.id for p in batch])
        drawn = sampler(model, [encoder.prompt(p) for p in batch], samples, batch_seed)
        new = [row for p, answers in zip(batch, drawn) for row in _rows(p, answers, encoder, check, path)]
        append_rows(path, new)
        rows += new
        progress(start + len(batch), len(prompts), "")
    names = [field.name for field in fields(Generation)]
    return [Generation(**{name: row[name] for name in names}) for row in rows]


def _whole_batches(path: Path, prompts: int, samples: int, per_batch: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of the batches that are complete on disk, and the number of prompts they answer."""
    rows = read_rows(path)
    answered = len(rows) // samples
    done = prompts if answered == prompts else answered // per_batch * per_batch
    if len(rows) != done * samples:  # a batch torn by a kill is drawn again
        rows = rows[: done * samples]
        write_rows(path, rows)
    return rows, done


def _rows(
    prompt: Prompt, answers: Sequence[Completion], encoder: Encoder, check: Check | None, path: Path
) -> list[dict[str, Any]]:
    asked, rows = logged_question(prompt, path), []
    for sample, answer in enumerate(answers):
        text = encoder.text(answer.ids)
        generation = Generation(prompt.id, sample, text, len(answer.ids), answer.finished)
        verdict = {} if check is None else {"correct": check(prompt, text)}
        rows.append(asdict(generation) | asked | verdict)
    return rows
