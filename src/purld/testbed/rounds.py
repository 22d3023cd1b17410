"""The finished rounds of a build on disk: one that was stopped goes on after the last of them.

Nothing else has to be kept: every round begins with optimizers, samples and random numbers of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from purld.rundir import read_rows, sync_folder, write_rows


@dataclass(frozen=True)
class Rounds:
    """Where a build keeps its weights and its log.

    Attributes:
        folder: of the build, until it is complete.
        of: what is built; what lies in the folder of another build is not used.
    """

    folder: Path
    of: dict[str, Any]

    @property
    def log(self) -> Path:
        """Rows of the losses."""
        return self.folder / "build_log.jsonl"

    @property
    def _weights(self) -> Path:
        return self.folder / "round.pt"

    def restore(self, model: PreTrainedModel) -> int:
        """Give the model the weights after the last finished round; returns how many rounds are finished.

        Rows of the log that came after it are cut off, for they will come again.
        """
        saved = torch.load(self._weights, weights_only=True) if self._weights.exists() else {}
        if saved.get("of") != self.of:
            self._weights.unlink(missing_ok=True)
            self.log.unlink(missing_ok=True)
            return 0
        model.load_state_dict(saved["weights"])
        write_rows(self.log, read_rows(self.log)[: saved["rows"]])
        return int(saved["rounds"])

    def save(self, model: PreTrainedModel, rounds: int) -> None:
        """Keep the weights after so many rounds in the place of earlier ones."""
        partial = self._weights.with_suffix(".partial")
        rows = len(read_rows(self.log))
        with partial.open("wb") as handle:
            torch.save({"of": self.of, "rounds": rounds, "rows": rows, "weights": model.state_dict()}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, self._weights)
        sync_folder(self.folder)

    def seconds(self) -> float:
        """What the rows of the log took together, over all sittings."""
        rows = read_rows(self.log)
        return float(rows[-1]["seconds"]) if rows else 0.0

    def forget(self) -> None:
        """Remove the weights between rounds: the build is complete."""
        self._weights.unlink(missing_ok=True)
