"""The finished rounds of a build on disk: one that was stopped goes on after the last of them.

Weights and log are all that has to be kept: every round begins with optimizers, samples and random numbers of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from purld.rundir import RunDir, read_rows, sync_folder, write_rows


@dataclass(frozen=True)
class Rounds:
    """Where a build works until it is complete.

    Attributes:
        out: where the complete build goes.
        made_of: a hash of all that makes the build what it is: another build works in another folder.
    """

    out: Path
    made_of: str

    @property
    def folder(self) -> Path:
        """What is there of the build."""
        return self.out.with_name(f".{self.out.name}.{self.made_of[:12]}.partial")

    @property
    def log(self) -> Path:
        """Rows of the losses."""
        return self.folder / "build_log.jsonl"

    @property
    def _weights(self) -> Path:
        return self.folder / "round.pt"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Work on the build alone.

        Raises:
            UserError: another process builds the same.
        """
        with RunDir(self.folder).lock():
            yield

    def restore(self, model: PreTrainedModel) -> int:
        """Give the model the weights after the last finished round; returns how many rounds are finished.

        Rows of the log that came after it are cut off, for they will come again.
        """
        saved = {"rounds": 0, "rows": 0}
        if self._weights.exists():
            saved = torch.load(self._weights, weights_only=True)
            model.load_state_dict(saved["weights"])
        write_rows(self.log, read_rows(self.log)[: saved["rows"]])
        return int(saved["rounds"])

    def save(self, model: PreTrainedModel, rounds: int) -> None:
        """Keep the weights after so many rounds in the place of earlier ones."""
        partial = self._weights.with_suffix(".partial")
        with partial.open("wb") as handle:
            torch.save({"rounds": rounds, "rows": len(read_rows(self.log)), "weights": model.state_dict()}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, self._weights)
        sync_folder(self.folder)

    def seconds(self) -> float:
        """What the rows of the log took together, over all sittings."""
        rows = read_rows(self.log)
        return float(rows[-1]["seconds"]) if rows else 0.0

    def publish(self) -> None:
        """Put the complete build in its place; what is there steps aside until then.

        The weights between rounds go last, so that a kill on the way costs no more than measuring once more.
        """
        aside = self.out.with_name(f".{self.out.name}.old")
        if self.out.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.out, aside)
        os.replace(self.folder, self.out)
        shutil.rmtree(aside, ignore_errors=True)
        for name in (".lock", self._weights.name):
            (self.out / name).unlink(missing_ok=True)
        for other in self.out.parent.glob(f".{self.out.name}.*.partial"):
            shutil.rmtree(other, ignore_errors=True)
