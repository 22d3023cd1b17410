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

from purld.runs.files import read_rows, sync_folder, write_rows
from purld.runs.run_dir import RunDir


@dataclass(frozen=True)
class Rounds:
    """Where a build works until it is complete.

    Attributes:
        out: where the complete build goes.
        made_of: a hash of all that makes the build what it is: another build goes on from other weights.
    """

    out: Path
    made_of: str

    @property
    def folder(self) -> Path:
        """What will be at `out`."""
        return self._beside / self.made_of[:12]

    @property
    def log(self) -> Path:
        """Rows of the losses."""
        return self.folder / "build_log.jsonl"

    @property
    def _beside(self) -> Path:
        return self.out.with_name(f".{self.out.name}.build")

    @property
    def _weights(self) -> Path:
        return self._beside / f"{self.made_of[:12]}.pt"

    @property
    def _aside(self) -> Path:
        return self._beside / "old"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Build at `out` alone; what a kill had set aside there is put back first.

        Raises:
            UserError: another process builds at `out`.
        """
        with RunDir(self._beside).lock():
            if self._aside.exists() and not self.out.exists():
                os.replace(self._aside, self.out)
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
        sync_folder(self._beside)

    def seconds(self) -> float:
        """What the rows of the log took together, over all sittings."""
        rows = read_rows(self.log)
        return float(rows[-1]["seconds"]) if rows else 0.0

    def publish(self) -> None:
        """Put the complete build in its place.

        What was there is set aside for a moment, and put back by the next build if a kill falls into it; the weights
        between rounds go last, so that this costs no more than measuring once more.
        """
        for path in self.folder.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        if self.out.exists():
            shutil.rmtree(self._aside, ignore_errors=True)
            os.replace(self.out, self._aside)
        os.replace(self.folder, self.out)
        sync_folder(self.out.parent)
        shutil.rmtree(self._beside)
