"""Where a run keeps its things, and how they get there whole.

A stage is finished when `manifest.json` says so, and the manifest is written after everything it vouches
for. Files are replaced atomically; rows are appended and synced, and a row torn by a kill is dropped on the
next read.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from purld.errors import UserError
from purld.runs.files import append_rows, read_json, read_rows, write_json, write_rows


class RunDir:
    """The folder of one run. Nothing is created until something is written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.ledger = self.path / "ledger.sqlite"
        self.anchors = self.path / "anchors.jsonl"
        self.opponent = self.path / "generations" / "opponent.jsonl"
        self.sft = self.path / "sft"
        self.align = self.path / "align"
        self.metrics = self.path / "metrics.jsonl"
        self.groups = self.path / "generations" / "groups.jsonl"
        self.revisited = self.path / "generations" / "revisited.jsonl"
        self.to_judge = self.path / "to_judge.jsonl"
        self.results = self.path / "results.json"
        self.report = self.path / "report.html"
        self.manifest = self.path / "manifest.json"

    def ledgers_beside(self) -> list[Path]:
        """The ledgers of the other runs in the same folder: what one of them bought is not bought again."""
        own = self.ledger.absolute()
        return [path for path in sorted(own.parent.parent.glob(f"*/{own.name}")) if path != own]

    def generations(self, model: str) -> Path:
        """The held-out answers of `base`, `sft` or a method."""
        return self.path / "generations" / f"{model}.jsonl"

    def verdicts(self, model: str) -> Path:
        """The judge's verdicts on the answers of one model."""
        return self.path / "generations" / f"{model}.verdicts.jsonl"

    def finished(self) -> dict[str, dict[str, Any]]:
        """The finished stages, by name, with what each recorded of itself."""
        return dict(self._stages("finished"))

    def begun(self) -> set[str]:
        """The stages that were started, finished or not."""
        return set(self._stages("begun"))

    def begin(self, stage: str) -> None:
        """Record that `stage` is under way, before its first write."""
        if stage not in self.begun():
            self._write_manifest(self._stages("begun") | {stage: {}}, self.finished())

    def finish(self, stage: str, seconds: float, **facts: Any) -> None:
        """Record `stage` as done; the last write of a stage."""
        done = self.finished() | {stage: {"seconds": round(seconds, 3)} | facts}
        self._write_manifest(self._stages("begun"), done)

    def _stages(self, kind: str) -> dict[str, dict[str, Any]]:
        if not self.manifest.exists():
            return {}
        stages: dict[str, dict[str, Any]] = read_json(self.manifest).get(kind, {})
        return stages

    def _write_manifest(self, begun: Mapping[str, Any], finished: Mapping[str, Any]) -> None:
        write_json(self.manifest, {"finished": dict(finished), "begun": dict(begun)})

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add one row to metrics.jsonl."""
        append_rows(self.metrics, [{"stage": stage, "step": step, **values}])

    def rewind_log(self, stage: str, step: int) -> None:
        """Drop what `stage` logged after `step`: a resumed run will log it again."""
        for path in (self.metrics, self.groups):
            rows = read_rows(path)
            kept = [r for r in rows if r.get("stage", "align") != stage or r["step"] <= step]
            if len(kept) != len(rows):
                write_rows(path, kept)
        if stage == "align":  # measured at its end, on what it logged
            self.revisited.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            UserError: another process works on it.
        """
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another purld process is working on this run.") from None
            yield


















