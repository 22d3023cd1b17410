"""Keep the finished rounds of a build on disk, so that a stopped build continues after the last of them.

Only weights and log are kept, because every round starts with new optimizers, samples and random numbers.
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
    """The working files of a build until it is complete.

    Attributes:
        out: where the complete build goes.
        build_hash: a hash of everything that the build depends on; builds with other hashes keep other weights.
    """

    out: Path
    build_hash: str

    @property
    def folder(self) -> Path:
        """The directory that will be moved to `out`."""
        return self._work_folder / self.build_hash[:12]

    @property
    def log(self) -> Path:
        """The build log: one row per logged loss."""
        return self.folder / "build_log.jsonl"

    @property
    def _work_folder(self) -> Path:
        return self.out.with_name(f".{self.out.name}.build")

    @property
    def _weights(self) -> Path:
        return self._work_folder / f"{self.build_hash[:12]}.pt"

    @property
    def _replaced(self) -> Path:
        return self._work_folder / "old"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock `out` for this process, and first put back an earlier build that a killed `publish_build` had set aside.

        Raises:
            UserError: another process builds at `out`.
        """
        with RunDir(self._work_folder).lock():
            if self._replaced.exists() and not self.out.exists():
                os.replace(self._replaced, self.out)
            yield

    def restore_weights(self, model: PreTrainedModel) -> int:
        """Load the weights after the last finished round into the model; return how many rounds are finished.

        Later rows of the log are cut off, because their steps are repeated.
        """
        saved = {"rounds": 0, "rows": 0}
        if self._weights.exists():
            saved = torch.load(self._weights, weights_only=True)
            model.load_state_dict(saved["weights"])
        write_rows(self.log, read_rows(self.log)[: saved["rows"]])
        return int(saved["rounds"])

    def save_weights(self, model: PreTrainedModel, rounds: int) -> None:
        """Save the weights after `rounds` rounds, replacing earlier ones."""
        partial = self._weights.with_suffix(".partial")
        with partial.open("wb") as handle:
            torch.save({"rounds": rounds, "rows": len(read_rows(self.log)), "weights": model.state_dict()}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, self._weights)
        sync_folder(self._work_folder)

    def elapsed_seconds(self) -> float:
        """Return the time that the logged rows took together, over all sittings."""
        rows = read_rows(self.log)
        return float(rows[-1]["seconds"]) if rows else 0.0

    def publish_build(self) -> None:
        """Move the complete build to `out`.

        An earlier build there is set aside first; if the process is killed in between, the next build puts it back. The
        weights between rounds are removed last, so that a kill costs only another measurement.
        """
        for path in self.folder.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        if self.out.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.replace(self.out, self._replaced)
        os.replace(self.folder, self.out)
        sync_folder(self.out.parent)
        shutil.rmtree(self._work_folder)
