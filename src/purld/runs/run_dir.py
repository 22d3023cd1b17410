"""The directory of a run: its file names, its manifest, its metrics log and its lock.

A stage is finished when `manifest.json` lists it; the manifest is written after all files of the stage. It also records
size and SHA-256 of these files, which are compared before another stage or command reads them. A manifest of an older
version records none, and then nothing is compared.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purld.errors import UserError
from purld.locks import describe_holder, open_locked
from purld.records import content_hash
from purld.runs.checksums import FileRecord, find_damage, record_file
from purld.runs.files import (
    append_rows,
    nearest_folder,
    read_intact_rows,
    read_json,
    read_rows,
    sync_folder,
    write_json,
    write_rows,
)

STAGES = ("anchors", "sft", "probe", "align", "evaluate", "report")
"""The stages of a run by name, in order; a method or a configuration may leave some of them out."""

_SIGNS_OF_A_RUN = ("config.yaml", "manifest.json", "ledger.sqlite", ".lock", "sweep.log", "demo")
TRAINED = ("sft", "align")  # stages that take long, and whose result another machine may not repeat to the bit
_GO_ON = ("anchors", "evaluate")  # stages that use what they have when they are begun again, so that their time adds up
START_OVER = (
    "restore it from a backup, or start again with another --run-dir beside this one, where the answers in the ledger "
    "are not paid for again"
)


@dataclass(frozen=True)
class DamagedFile:
    """A file that is not what the manifest recorded: the stage that wrote it, and what is wrong, in words."""

    path: Path
    stage: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@dataclass(frozen=True)
class _Clock:
    """When this process began a stage, by the monotonic clock, and the seconds that others had spent on it before."""

    started: float
    before: float = 0.0


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
        self._intact: set[Path] = set()  # recorded or compared by this object; nothing else writes during a command
        self._clocks: dict[str, _Clock] = {}  # of the stages that this object has begun

    def check_place(self) -> None:
        """Check that the run can be written here, before anything is paid for.

        Raises:
            UserError: the path is a file, a folder of other things, or on a disk or in a folder that cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file, and a run needs a folder; give another --run-dir.")
        if self.path.is_dir():
            others = [path.name for path in self.path.iterdir() if not path.name.startswith(".")]
            if others and not any((self.path / name).exists() for name in _SIGNS_OF_A_RUN):
                raise UserError(
                    f"{self.path}: holds other things than a run, such as {min(others)}; give a new folder with "
                    "--run-dir."
                )
        nearest = nearest_folder(self.path)
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"{nearest}: cannot be written; change its permissions or give another --run-dir.")

    def check_manifest(self) -> None:
        """Check that the manifest is there, if stages have left files.

        Raises:
            UserError: it is missing; the message says what to do.
        """
        if not self.manifest.exists() and any(p.exists() for p in (self.anchors, self.sft, self.align, self.groups)):
            raise UserError(f"{self.manifest}: is missing, so it is not known which stages are finished; {START_OVER}.")

    def generations(self, model: str) -> Path:
        """Return the path of the held-out answers of `model`: `base`, `sft` or a method."""
        return self.path / "generations" / f"{model}.jsonl"

    def verdicts(self, model: str) -> Path:
        """Return the path of the judge's verdicts on the answers of `model`."""
        return self.path / "generations" / f"{model}.verdicts.jsonl"

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of a stage's checkpoints, which is removed once the stage is finished."""
        return self.path / stage / "checkpoints"

    @property
    def engine_files(self) -> Path:
        """Return the folder of what Stage II writes for a rollout engine; it goes when the stage is finished."""
        return self.checkpoints("align") / "engine"

    def stage_files(self, stage: str) -> list[Path]:
        """Return the files of a stage that are there; none for the report, which nothing reads."""
        rows = sorted(self.groups.parent.rglob("*.*")) if stage in ("align", "evaluate") else []
        listed = {
            "anchors": [self.anchors, self.opponent],
            "sft": [*self._model_files("sft"), self.metrics],
            "probe": [self.probe],
            "align": [*self._model_files("align"), self.metrics, *rows],
            "evaluate": [*rows, self.results],
        }
        return [path for path in listed.get(stage, []) if path.is_file() and not path.name.startswith(".")]

    def finished_stages(self) -> dict[str, dict[str, Any]]:
        """Return the finished stages by name, with the facts that each recorded."""
        return dict(self._manifest()["finished"])

    def begun_stages(self) -> set[str]:
        """Return the names of all stages that were started, finished or not."""
        return set(self._manifest()["begun"])

    def begin_facts(self, stage: str) -> dict[str, Any]:
        """Return what was recorded of a stage that began: `started` in seconds since 1970, and what it was told of.

        Empty for a stage that has not begun, and for a run of an older version.
        """
        return dict(self._manifest()["begun"].get(stage, {}))

    def begun_after(self, stage: str) -> set[str]:
        """Return the stages that build on the result of `stage` and were started; a probe is only repeated."""
        begun = list(self._manifest()["begun"])
        return set(begun[begun.index(stage) + 1 :]) - {"probe", "report"} if stage in begun else set()

    def begin(self, stage: str, **facts: Any) -> None:
        """Record that `stage` has started, when, and what it goes by; call it before the stage's first write.

        If it was finished before, it no longer is, nor is any stage that was begun after it. A stage that was begun and
        is not finished keeps the facts that it began with.
        """
        manifest = self._manifest()
        begun, kept = list(manifest["begun"]), set(manifest["begun"])
        if stage in begun and stage not in manifest["finished"]:
            self._clocks[stage] = _Clock(time.monotonic(), manifest["begun"][stage].get("seconds", 0.0))
            return
        before = manifest["finished"].get(stage, {}).get("seconds", 0.0) if stage in _GO_ON else 0.0
        self._clocks[stage] = _Clock(time.monotonic(), before)
        if stage in begun:
            kept -= set(begun[begun.index(stage) :])
        self._write_manifest(
            {name: facts for name, facts in manifest["finished"].items() if name in kept},
            {name: manifest["begun"][name] for name in begun if name in kept}
            | {stage: {"started": round(time.time(), 3), "seconds": before, **facts}},
            {name: entry for name, entry in manifest["files"].items() if entry["stage"] in (*kept, "config")},
        )

    def note_facts(self, stage: str, **facts: Any) -> None:
        """Record more about a stage that has begun, such as how much it has to do, as soon as it is known."""
        manifest = self._manifest()
        known = manifest["begun"].get(stage)
        if known is not None and known != known | facts:
            self._write_manifest(manifest["finished"], manifest["begun"] | {stage: known | facts}, manifest["files"])

    def seconds_spent(self, stage: str) -> float:
        """Return the seconds spent on a stage: by this process since it began it, and by others as they noted them."""
        clock = self._clocks.get(stage)
        if clock is None:
            return float(self.begin_facts(stage).get("seconds", 0.0))
        return clock.before + time.monotonic() - clock.started

    def note_seconds(self, stage: str) -> None:
        """Record the seconds spent on a stage so far, so that a process that continues it counts them too."""
        self.note_facts(stage, seconds=round(self.seconds_spent(stage), 3))

    def finish(self, stage: str, seconds: float, **facts: Any) -> None:
        """Record `stage` as finished, with its facts and its files; call it after the stage's last write.

        A file that an earlier stage wrote stays its own, unless it has grown.
        """
        manifest = self._manifest()
        earlier = {self.path / name for name, entry in manifest["files"].items() if entry["stage"] != stage}
        own = [path for path in self.stage_files(stage) if path not in earlier or path == self.metrics]
        finished = manifest["finished"] | {stage: {"seconds": round(seconds, 3)} | facts}
        self._write_manifest(finished, manifest["begun"], self._with_records(manifest["files"], stage, own))

    def record_file(self, stage: str, path: Path) -> None:
        """Record the content of one file that was written outside of a stage, as that of `stage`."""
        manifest = self._manifest()
        self._write_manifest(
            manifest["finished"], manifest["begun"], self._with_records(manifest["files"], stage, [path])
        )

    def forget_file(self, path: Path) -> None:
        """Drop the record of a file that is about to change, and create the manifest if there is none."""
        manifest = self._manifest()
        files = {name: entry for name, entry in manifest["files"].items() if self.path / name != path}
        if files != manifest["files"] or not self.manifest.exists():
            self._write_manifest(manifest["finished"], manifest["begun"], files)

    def recorded(self, path: Path) -> FileRecord | None:
        """Return the record of a file; None if it has none."""
        entry = self._manifest()["files"].get(self._name_of(path))
        return None if entry is None else FileRecord.from_json(entry)

    def damaged_files(self, *places: Path) -> list[DamagedFile]:
        """Return the files that are not what the manifest recorded.

        Args:
            places: files and folders to look at.
        """
        return self._compare(lambda path, stage: any(path == place or place in path.parents for place in places))

    def damaged_files_of(self, stage: str) -> list[DamagedFile]:
        """Return the files of a stage that are not what the manifest recorded."""
        return self._compare(lambda path, owner: owner == stage)

    def _compare(self, selects: Callable[[Path, str], bool]) -> list[DamagedFile]:
        found = []
        for name, entry in self._manifest()["files"].items():
            path = self.path / name
            if path in self._intact or not selects(path, entry["stage"]):
                continue
            problem = find_damage(path, FileRecord.from_json(entry), grows=path == self.metrics)
            if problem is None:
                self._intact.add(path)
            else:
                found.append(DamagedFile(path, entry["stage"], problem))
        return found

    def check_files(self, *places: Path, writer: str | None = None) -> None:
        """Check that files are what the manifest recorded, before they are read.

        Args:
            places: files and folders; what was not recorded in them is not checked.
            writer: a stage whose own files are not checked, because it writes them.

        Raises:
            UserError: one of them is damaged; the message names it and says what to do.
        """
        for damaged in self.damaged_files(*places):
            if damaged.stage != writer:
                raise UserError(f"{damaged} (manifest.json); {self._remedy(damaged)}.")

    def _remedy(self, damaged: DamagedFile) -> str:
        """Say what to do about a damaged file."""
        stage = damaged.stage
        if stage == "config":
            return "run the run's own configuration again (purld run), which writes it anew"
        if damaged.path == self.metrics or (stage in TRAINED and self.begun_after(stage)):
            return START_OVER
        if stage in TRAINED:
            return f"run `purld {stage}`, which trains the stage again"
        return f"run `purld {stage}` again, which writes it anew"

    def _model_files(self, stage: str) -> list[Path]:
        files = sorted((self.path / stage).rglob("*"))
        return [path for path in files if self.checkpoints(stage) not in path.parents]

    def _name_of(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _with_records(self, files: Mapping[str, Any], stage: str, paths: Iterable[Path]) -> dict[str, Any]:
        """Return the records with those of a stage's files; folders are synced, so that no file is lost."""
        records = {name: entry for name, entry in files.items() if entry["stage"] != stage}
        paths = list(paths)
        for path in paths:
            records[self._name_of(path)] = {"stage": stage, **record_file(path).to_json()}
            self._intact.add(path)
        for folder in {path.parent for path in paths}:
            sync_folder(folder)
        return records

    def _manifest(self) -> dict[str, dict[str, Any]]:
        if not self.manifest.exists():
            return {"finished": {}, "begun": {}, "files": {}}
        try:
            values = dict(read_json(self.manifest))
            intact = "hash" not in values or values.pop("hash") == content_hash(values)
            files = values.get("files", {})  # which older versions did not write
            manifest = {"finished": dict(values["finished"]), "begun": dict(values["begun"]), "files": dict(files)}
        except (UserError, KeyError, TypeError, ValueError):
            intact = False
        if not intact:
            raise UserError(f"{self.manifest}: is damaged, so it is not known which stages are finished; {START_OVER}.")
        return manifest

    def _write_manifest(self, finished: Mapping[str, Any], begun: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        values = {"finished": dict(finished), "begun": dict(begun), "files": dict(files)}
        write_json(self.manifest, values | {"hash": content_hash(values)})

    def log_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Append one row to metrics.jsonl."""
        append_rows(self.metrics, [{"stage": stage, "step": step, **values}])

    def log_records(self) -> dict[str, Any]:
        """Return the records of the logs as they are now; a checkpoint keeps them."""
        logs = [path for path in (self.metrics, self.groups) if path.exists()]
        return {self._name_of(path): record_file(path).to_json() for path in logs}

    def find_log_damage(self, records: Mapping[str, Any]) -> str | None:
        """Return what is wrong with the logs since `records` were taken, rows added aside; None if nothing is."""
        for name, entry in records.items():
            if problem := find_damage(self.path / name, FileRecord.from_json(entry), grows=True):
                return f"{self.path / name}: {problem}"
        return None

    def rewind_log(self, stage: str, step: int, records: Mapping[str, Any] | None = None) -> None:
        """Remove the rows that `stage` logged after `step`, because a resumed run logs them again.

        Args:
            stage: `sft` or `align`.
            step: the step that the stage resumes from; 0 if it starts again.
            records: the records of the logs at that step; None if they are not known.

        Raises:
            UserError: a log is damaged, and its records are not known.
        """
        if stage == "align":  # these rows are computed from the log at the end of the stage
            self.revisited.unlink(missing_ok=True)
            if step == 0:
                self.groups.unlink(missing_ok=True)
        before = self.recorded(self.metrics)  # as the last finished stage left it
        if records is None and step == 0 and before is not None:
            records = {self._name_of(self.metrics): before.to_json()}
        for path in (self.metrics, self.groups):
            if not path.exists():
                continue
            if records is not None:
                os.truncate(path, records[self._name_of(path)]["bytes"] if self._name_of(path) in records else 0)
                continue
            # A first stage that starts again keeps no row, so a damaged one does not stop it.
            rows = read_intact_rows(path) if stage == "sft" and step == 0 else read_rows(path)
            kept = [row for row in rows if row.get("stage", "align") != stage or row["step"] <= step]
            if len(kept) != len(rows) or stage == "sft":
                write_rows(path, kept)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process.

        Raises:
            UserError: another process holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / ".lock"
        handle = open_locked(lock)
        if handle is None:
            raise UserError(f"{self.path}: {describe_holder(lock)} is working on this run.")
        with handle:
            yield
