"""The directory of a run: its file names, its manifest, its metrics log and its lock.

A stage is finished when `manifest.json` lists it; the manifest is written after all files of the stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from purld.errors import UserError
from purld.runs.files import append_rows, read_json, read_rows, write_json, write_rows


class RunDir:
    """The directory of one run. Nothing is created before the first write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.ledger = self.path / "ledger.sqlite"
        self.anchors = self.path / "anchors.jsonl"
        self.opponent = self.path / "generations" / "opponent.jsonl"
        self.sft = self.path / "sft"
        self.align = self.path / "align"
        self.probe = self.path / "probe.json"
        self.metrics = self.path / "metrics.jsonl"
        self.groups = self.path / "generations" / "groups.jsonl"
        self.revisited = self.path / "generations" / "revisited.jsonl"
        self.to_judge = self.path / "to_judge.jsonl"
        self.results = self.path / "results.json"
        self.report = self.path / "report.html"
        self.manifest = self.path / "manifest.json"

    def sibling_ledgers(self) -> list[Path]:
        """Return the ledgers of the other runs in the same folder, whose answers need not be bought again."""
        own = self.ledger.absolute()
        return [path for path in sorted(own.parent.parent.glob(f"*/{own.name}")) if path != own]

    def generations(self, model: str) -> Path:
        """Return the path of the held-out answers of `model`: `base`, `sft` or a method."""
        return self.path / "generations" / f"{model}.jsonl"

    def verdicts(self, model: str) -> Path:
        """Return the path of the judge's verdicts on the answers of `model`."""
        return self.path / "generations" / f"{model}.verdicts.jsonl"

    def finished_stages(self) -> dict[str, dict[str, Any]]:
        """Return the finished stages by name, with the facts that each recorded."""
        return dict(self._stages("finished"))

    def begun_stages(self) -> set[str]:
        """Return the names of all stages that were started, finished or not."""
        return set(self._stages("begun"))

    def begin(self, stage: str) -> None:
        """Record that `stage` has started; call it before the stage's first write."""
        if stage not in self.begun_stages():
            self._write_manifest(self._stages("begun") | {stage: {}}, self.finished_stages())

    def finish(self, stage: str, seconds: float, **facts: Any) -> None:
        """Record `stage` as finished, with its facts; call it after the stage's last write."""
        finished = self.finished_stages() | {stage: {"seconds": round(seconds, 3)} | facts}
        self._write_manifest(self._stages("begun"), finished)

    def _stages(self, kind: str) -> dict[str, dict[str, Any]]:
        if not self.manifest.exists():
            return {}
        stages: dict[str, dict[str, Any]] = read_json(self.manifest).get(kind, {})
        return stages

    def _write_manifest(self, begun: Mapping[str, Any], finished: Mapping[str, Any]) -> None:
        write_json(self.manifest, {"finished": dict(finished), "begun": dict(begun)})

    def log_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Append one row to metrics.jsonl."""
        append_rows(self.metrics, [{"stage": stage, "step": step, **values}])

    def rewind_log(self, stage: str, step: int) -> None:
        """Remove the rows that `stage` logged after `step`, because a resumed run logs them again."""
        for path in (self.metrics, self.groups):
            rows = read_rows(path)
            kept = [row for row in rows if row.get("stage", "align") != stage or row["step"] <= step]
            if len(kept) != len(rows):
                write_rows(path, kept)
        if stage == "align":  # these rows are computed from the log at the end of the stage
            self.revisited.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process.

        Raises:
            UserError: another process holds the lock.
        """
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another purld process is working on this run.") from None
            yield
