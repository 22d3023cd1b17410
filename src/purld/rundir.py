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


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[str]]:
    """A text file that appears at `path` whole and synced, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically. Text is escaped to ASCII, so lone surrogates survive."""
    with atomic_write(path) as handle:
        json.dump(value, handle, indent=2)
        handle.write("\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that purld wrote.

    Raises:
        UserError: it is missing or was changed into something else.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; the run is incomplete.") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}).") from None


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSONL file atomically."""
    with atomic_write(path) as handle:
        for row in rows:
            handle.write(json.dumps(row) + "\n")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSONL file and sync them to disk; a torn last row is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with path.open("ab+") as handle:
        _cut_torn_row(handle)
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _cut_torn_row(handle: IO[bytes]) -> None:
    end = handle.seek(0, os.SEEK_END)
    if end == 0:
        return
    handle.seek(end - 1)
    if handle.read(1) == b"\n":
        return
    position = end
    while position > 0:
        start = max(0, position - 4096)
        handle.seek(start)
        newline = handle.read(position - start).rfind(b"\n")
        if newline >= 0:
            handle.truncate(start + newline + 1)
            return
        position = start
    handle.truncate(0)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSONL file that purld wrote; a last row without its newline was torn by a kill."""
    if not path.exists():
        return []
    rows = []
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith(b"\n"):
                break
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: is not valid JSON ({error}).") from None
    return rows


@contextlib.contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Yields a list that holds the seconds spent inside, once left."""
    started, seconds = time.monotonic(), [0.0]
    try:
        yield seconds
    finally:
        seconds[0] = time.monotonic() - started
