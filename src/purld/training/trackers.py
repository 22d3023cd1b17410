"""Experiment trackers, through the trainer's own `report_to`: off unless asked for, beside metrics.jsonl.

What a tracker does with the numbers is its own affair, and its own settings (addresses, projects, offline mode)
are its own environment variables: with one that writes to a server, training is no longer without a network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from purld.errors import UserError
from purld.runs.run_dir import RunDir

# transformers takes tensorboardX as well.
_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
_TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"  # of transformers, whose own default is below the checkpoints


def check_trackers(names: Sequence[str]) -> None:
    """See that every tracker is there before anything is paid for.

    Raises:
        UserError: its package is not installed.
    """
    for name in names:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
            raise UserError(f"report_to: {name} is not installed; install it (pip install {name}) or leave it out.")


def tracker_arguments(names: Sequence[str], run: RunDir, stage: str) -> dict[str, Any]:
    """What a trainer's arguments say of trackers; no tracker is "none", or transformers would choose some."""
    name = f"{run.path.resolve().name}-{stage}"
    return {"report_to": list(names) or "none", "run_name": name, "project": "purld"}


@contextlib.contextmanager
def stage_tracking(names: Sequence[str], run: RunDir, stage: str) -> Iterator[None]:
    """A stage under the eyes of trackers: each stage is a run of its own to them.

    TensorBoard's files go to `tensorboard/STAGE` in the run directory, unless the environment names a place.
    """
    ours = "tensorboard" in names and _TENSORBOARD_FOLDER not in os.environ
    if ours:
        os.environ[_TENSORBOARD_FOLDER] = str(run.path / "tensorboard" / stage)
    try:
        yield
    finally:
        if ours:
            del os.environ[_TENSORBOARD_FOLDER]
        if "wandb" in names and "wandb" in sys.modules:
            sys.modules["wandb"].finish()  # the trainer leaves it open, and the next stage would log into this one
