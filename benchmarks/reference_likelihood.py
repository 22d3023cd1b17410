"""Measure without gold or judge how likely a run's models find another teacher's answers to its held-out prompts.

    python benchmarks/reference_likelihood.py RUN --answers ROWS.jsonl [--column reference]

The answers are of a teacher that the run never saw. Every prompt counts alike, by the mean log-prob of the first tokens
of its answer, `student.max_anchor_tokens` at most: a sum would be decided by the longest answers, and no length is
preferred by this one. It says how far a model moved toward such answers, not how good the answers are that the model
writes itself: a policy that draws its best answers more often, and nothing else, loses here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from purld.config.schema import Student
from purld.evaluation.intervals import bca_interval, bootstrap_values
from purld.model.encode import Encoder
from purld.model.load import load_encoder, load_model
from purld.model.log_probs import RowGroup, group_log_probs
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.records import Prompt
from purld.runs.files import read_rows
from purld.runs.open import final_model, open_run

Values = NDArray[np.float64]


def main() -> None:
    """Print the mean of the base and of every finished model, and paired differences with intervals over prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--answers", type=Path, required=True, help="rows of prompt and the other teacher's answer")
    parser.add_argument("--column", default="reference", help="the column of that answer")
    options = parser.parse_args()
    run, config = open_run(options.run)
    encoder = load_encoder(config.student)
    answers = {row["prompt"]: row[options.column] for row in read_rows(options.answers)}
    held_out = [prompt for prompt in load_prompt_pools(config, encoder, print).held_out if prompt.question in answers]
    if not held_out:
        parser.error(f"{options.answers} has no answer to any of the run's held-out prompts")
    texts = [answers[prompt.question] for prompt in held_out]
    final = final_model(config.align.method)
    before: Values | None = None
    folders = {"sft": run.sft, final.name: final.folder(run)}
    finished = {name: folder for name, folder in folders.items() if folder.exists()}
    for name, folder in {"base": Path(config.student.model), **finished}.items():
        values = mean_log_probs(config.student, folder, encoder, held_out, texts)
        line = f"{name}: {values.mean():.4f} nats per token on {len(values)} prompts"
        if before is not None:
            line += f"; {format_difference(values - before)} against the one before"
        print(line, flush=True)
        before = values


def mean_log_probs(
    student: Student, folder: Path, encoder: Encoder, prompts: Sequence[Prompt], answers: Sequence[str]
) -> Values:
    """Return each answer's mean log-prob per token under the model in a folder, in nats."""
    model = load_model(student, folder)
    groups = [
        RowGroup(encoder.encode_prompt(prompt, direct=True), [encoder.encode_answer(text).ids])
        for prompt, text in zip(prompts, answers, strict=True)
    ]
    return np.array([rows[0].mean().item() for rows in group_log_probs(model, groups, encoder.pad, 4)])


def format_difference(values: Values) -> str:
    """Format the mean of paired differences with its 95% interval over prompts."""
    resampled = bootstrap_values(lambda index: values[index].mean(axis=1), len(values), 0)
    low, high = bca_interval(float(values.mean()), resampled, values)
    return f"{values.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    main()
