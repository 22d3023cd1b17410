"""Send metrics to experiment trackers through the trainer's own `report_to`; none unless the configuration asks.

metrics.jsonl is written in any case. A tracker is configured by its own environment variables (address, project,
offline mode); with one that writes to a server, training uses the network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from purld import ranks
from purld.errors import UserError
from purld.runs.run_dir import RunDir

# transformers takes tensorboardX as well.
_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
_TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"  # read by transformers, whose default is inside the checkpoints folder


def check_trackers(names: Sequence[str]) -> None:
    """Check that every tracker is installed, before anything is paid for.

    Raises:
        UserError: its package is not installed.
    """
    for name in names:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
            raise UserError(f"report_to: {name} is not installed; install it (pip install {name}) or leave it out.")


def tracker_arguments(names: Sequence[str], run: RunDir, stage: str) -> dict[str, Any]:
    """Return the trainer's arguments for trackers; without "none" transformers would use all that are installed.

    Of several processes the first alone reports.
    """
    name = f"{run.path.resolve().name}-{stage}"
    return {"report_to": (list(names) if ranks.is_first() else []) or "none", "run_name": name, "project": "purld"}


@contextlib.contextmanager
def stage_tracking(names: Sequence[str], run: RunDir, stage: str) -> Iterator[None]:
    """Track one stage, as a tracker run of its own.

    TensorBoard's files go to `tensorboard/STAGE` in the run directory, unless the environment names a folder.
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
