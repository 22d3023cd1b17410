"""Set up the demo: an ordinary run whose prompts, teacher and judge come from the testbed.

It writes a prompt file, a held-out file and a configuration, starts the testbed's server, and yields the same
configuration and run directory that `purld run` builds. Nothing else in purld knows about the demo.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from purld.config.clients import OpenAIEndpoint
from purld.config.load import load_config
from purld.config.schema import Config
from purld.errors import UserError
from purld.runs.files import atomic_write
from purld.runs.open import open_run
from purld.runs.run_dir import RunDir
from purld.testbed.server import TestbedServer
from purld.testbed.shipped import DEMOS, STUDENT_FOLDERS, demo_problems, students_of
from purld.testbed.world.world import write_prompts

KEY_VARIABLE = "PURLD_TESTBED_KEY"
TRAIN_PROMPTS = 256
HELD_OUT_PROMPTS = 200


@contextlib.contextmanager
def prepare_demo(
    task: str, run_dir: Path | None, overrides: Sequence[str], student: str | None = None
) -> Iterator[tuple[Config, RunDir]]:
    """Yield the configuration and run directory of a demo while the testbed's server runs.

    Raises:
        UserError: the task is unknown or not for this student, an override is wrong, or the server cannot start.
    """
    # The matrices are too small for two threads: a step took 0.8 s on one thread and 1.2 s on two.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if task not in DEMOS:
        raise UserError(f"--task {task}: the testbed has {', '.join(DEMOS)}.")
    capable = students_of(task)
    if student is not None and student not in capable:
        raise UserError(f"--student {student}: of the testbed's students {' and '.join(capable)} can do {task}.")
    seed = _seed(overrides)
    name = "-".join(["demo", task, *([student] if student else []), *([f"seed{seed}"] if seed else [])])
    folder = run_dir or Path("runs") / name
    RunDir(folder).check_place()
    key = secrets.token_urlsafe(16)
    with TestbedServer(api_key=key, port=_former_port(folder)) as server:
        os.environ[KEY_VARIABLE] = key
        source = folder / "demo"
        write_prompts(source / "prompts.jsonl", demo_problems(task, "train", TRAIN_PROMPTS, seed))
        write_prompts(source / "held_out.jsonl", demo_problems(task, "heldout", HELD_OUT_PROMPTS, seed))
        path = source / "demo.yaml"
        with atomic_write(path) as handle:
            yaml.safe_dump(demo_values(task, source, server.base_url, student), handle, sort_keys=False)
        yield load_config(path, overrides), RunDir(folder)


def demo_values(task: str, source: Path, base_url: str, student: str | None = None) -> dict[str, Any]:
    """Return the demo's configuration as plain values. docs/results.md says how its numbers were chosen."""
    endpoint = {"kind": "openai", "base_url": base_url, "api_key_env": KEY_VARIABLE}
    student = student or students_of(task)[0]
    # The students that read images reach their lowest validation loss after one or two epochs.
    epochs = 16 if student == "text" else 4
    return {
        "student": {
            "model": str(STUDENT_FOLDERS[student]),
            "max_prompt_tokens": 256,
            "max_anchor_tokens": 128,
            # The towers do not improve further; frozen, they encode an image once.
            **({} if student == "text" else {"train_vision": False}),
        },
        "data": {
            "prompts": str(source / "prompts.jsonl"),
            "eval_prompts": str(source / "held_out.jsonl"),
            "check": "testbed",
            "near_duplicates": "ignore",  # the world writes every question from a few templates
        },
        "teacher": endpoint | {"model": "testbed-teacher", "max_calls": 2 * (TRAIN_PROMPTS + HELD_OUT_PROMPTS)},
        "sft": {
            "epochs": epochs,
            "learning_rate": 3.0e-4,
            "batch_size": 16,
            "micro_batch_size": 16,
            "checkpoint_steps": 16,
        },
        "align": {
            "method": "ldl_grpo",
            "steps": 80,
            "validate_every": None,  # the published figures are the last step's, with every prompt in Stage II
            "learning_rate": 1.5e-4,
            "schedule": "linear",
            "gamma": 10.0,
            "candidates": 16,
            "score": "expected",  # the shipped students are trained to write scores
            "margin_scale": "literal",
            "micro_batch_size": 16,
            "score_batch_size": 32,
            "max_new_tokens": 64,
        },
        "evaluate": {
            "samples": 4,
            "max_new_tokens": 64,
            "batch_size": 256,
            "judge": endpoint | {"model": "testbed-judge", "max_tokens_per_answer": 4},
            "opponent": {"kind": "teacher"},
        },
        "seed": 0,
    }


def _seed(overrides: Sequence[str]) -> int:
    """Return the seed that the overrides ask for, which also draws the prompts."""
    seeds = [o.partition("=")[2] for o in overrides if o.partition("=")[0].strip() == "seed"]
    try:
        seed = int(seeds[-1]) if seeds else 0
    except ValueError:
        raise UserError(f"override seed={seeds[-1]}: a seed is a whole number.") from None
    if not 0 <= seed < 2**32:
        raise UserError(f"override seed={seed}: a seed is at least 0 and less than 2**32.")
    return seed


def _former_port(folder: Path) -> int:
    """Return the port of an interrupted demo, so that its ledger recognises the endpoint; 0 means any free port."""
    if not (folder / "config.yaml").exists():
        return 0
    teacher = open_run(folder)[1].teacher
    return (urlsplit(teacher.base_url).port or 0) if isinstance(teacher, OpenAIEndpoint) else 0
