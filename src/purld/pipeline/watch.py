"""Keep a page about a run up to date while it trains, from the files in its directory.

The run is neither locked nor changed: the page is all that is written. A watcher is a process of its own, so a training
step never waits for a page, and no failure of the page reaches the run. `purld run --live` starts one beside itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from purld.config.load import load_config
from purld.config.schema import Config
from purld.display.progress import Reporter
from purld.errors import UserError, reason_of
from purld.evaluation.recorded import Row
from purld.evaluation.score_quality import check_groups, score_quality
from purld.pipeline.stage_progress import describe_seconds
from purld.pipeline.status import RunStatus, read_status
from purld.ranks.launch import PLACES
from purld.records import Prompt
from purld.report.health import GoldAuc, Light, health_lights
from purld.report.live import LiveStatus
from purld.report.page import LIVE_MARK, write_live_page, write_report
from purld.report.run_data import read_run
from purld.runs.lock_holder import find_lock_holder
from purld.runs.run_dir import RunDir
from purld.tasks.checks import Check, find_check
from purld.tasks.registry import load_data

EVERY = 15.0  # seconds from page to page
_SHARE_OF_A_CORE = 0.05  # that writing pages may take at most
_GROUPS = 64  # the newest, for the samples and for the AUC against gold
_WAIT_FOR_WATCHER = 10.0  # seconds that a finished run waits for the watcher that it started

_RUNNING = {"running": True, "stopped": False, "begun": None}  # whether a process works on a stage in this state

Ended = Callable[[float], bool]
"""Waits for some seconds and returns whether watching is over."""


class RunWatcher:
    """A writer of the page of one run.

    Args:
        run: the run.
        out: the page.
        every: seconds after which the page loads itself again.
        say: told of each new reason why a page could not be written.
    """

    def __init__(self, run: RunDir, out: Path, every: float, say: Callable[[str], None]) -> None:
        self._run, self._out, self._every, self._say = run, out, every, say
        self._gold = _Gold(run)
        self._pace = _Pace()
        self._told: set[str] = set()
        self._seen: object = None
        self.cost = 0.0  # seconds of processor time of the last page

    def watch(self, ended: Ended) -> None:
        """Write the page again whenever the run has written something, until `ended`, and then a last time."""
        while not ended(max(self._every, self.cost / _SHARE_OF_A_CORE)):
            self.attempt(lambda: self.write(self._every))
        self.attempt(self._write_last)

    def attempt(self, write: Callable[[], None]) -> None:
        """Write a page; if that fails, as on a full disk, tell the reason once and go on."""
        try:
            write()
        except Exception as error:  # nothing that a page needs is worth an end
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {reason_of(error)}"
            if reason not in self._told:
                self._told.add(reason)
                self._say(f"{self._out}: the page could not be written ({reason}); the run is not touched.")

    def write(self, every: float | None) -> None:
        """Write the page if the run has written anything since the last one.

        Args:
            every: seconds after which the page loads itself again; None for the last page.
        """
        seen = (_files_seen(self._run), every is None)
        if seen == self._seen or not self._run.config.exists():  # a page in a folder that is no run yet would bar it
            return
        started = time.process_time()
        run = read_run(RunDir(self._run.path), newest=_GROUPS)
        status = read_status(RunDir(self._run.path), time.time())
        lights = health_lights(run, self._gold.measure(run.groups))
        write_live_page(run, self._live_status(status, run.metrics, every, lights), self._out)
        self._seen, self.cost = seen, time.process_time() - started

    def _live_status(
        self, status: RunStatus, metrics: Sequence[Row], every: float | None, lights: Sequence[Light]
    ) -> LiveStatus:
        current = next((stage for stage in status.stages if stage.state in _RUNNING), None)
        name = None if current is None else current.name
        total = self._run.begin_facts(name).get("steps", 0) if name else 0
        done = max((row["step"] for row in metrics if row["stage"] == name), default=0)
        details = []
        if current is not None:
            details = [current.detail, current.time]
            remaining = self._pace.describe_rest(current.name, done, total)
            if current.state == "running" and "left" not in current.time and remaining:  # not known of a resumed stage
                details.append(remaining)
        return LiveStatus(
            stages=[(stage.name, stage.state) for stage in status.stages],
            running=None if current is None else _RUNNING[current.state],
            current=name,
            details=details,
            share=done / total if total else None,
            lights=lights,
            written=time.time(),
            every=every,
        )

    def _write_last(self) -> None:
        """Leave a finished run with its report, and any other with a page that no longer loads itself again."""
        if "report" in RunDir(self._run.path).finished_stages():
            if _is_live_page(self._out):
                write_report([RunDir(self._run.path)], self._out)
        else:
            self.write(None)


class _Pace:
    """The pace of a training stage since it was first seen."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}

    def describe_rest(self, stage: str, done: int, total: int) -> str:
        """Return the time that is left in words; empty if nothing was done since the stage was first seen."""
        now = time.monotonic()
        began, before = self._first.setdefault(stage, (now, done))
        if not before < done < total:
            return ""
        return f"about {describe_seconds((now - began) * (total - done) / (done - before))} left"


class _Gold:
    """The check of candidates against gold, for a run whose data have it. Training never sees what it says."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._loaded: tuple[Check, list[Prompt]] | None = None
        self._failed = False

    def measure(self, groups: Sequence[Row]) -> GoldAuc | None:
        """Return the AUC within prompts of the groups' scores; None without gold or without mixed groups."""
        if not groups or self._failed:
            return None
        if self._loaded is None:
            with contextlib.suppress(Exception):  # the data are elsewhere, or their check is not installed
                self._loaded = self._load(load_config(self._run.config))
            if self._loaded is None:
                self._failed = True
                return None
        check, prompts = self._loaded
        checked = [group for group in check_groups(groups, prompts, check) if any(s is not None for s in group.scores)]
        quality = score_quality(checked) if checked else None
        if quality is None or quality.auc_within is None or quality.auc_within_ci is None:
            return None
        return GoldAuc(quality.auc_within, *quality.auc_within_ci, groups=len(checked))

    def _load(self, config: Config) -> tuple[Check, list[Prompt]] | None:
        check = find_check(config.data)
        return None if check is None else (check, load_data(config.data)[0].prompts)


def watch_run(run: RunDir, out: Path | None, every: float, reporter: Reporter) -> Path:
    """Watch a run from another terminal until it is finished; return the page's path.

    Raises:
        UserError: the first page cannot be made.
        OSError: it cannot be written.
    """
    page = out or run.report
    watcher = RunWatcher(run, page, every, reporter.warn)
    watcher.write(every)
    reporter.say(f"Open {page} in a browser; it loads itself again. Ctrl-C ends watching, and not the run.")

    def ended(seconds: float) -> bool:
        if "report" in RunDir(run.path).finished_stages():
            return True
        time.sleep(seconds)
        return False

    try:
        watcher.watch(ended)
    except BaseException:  # a signal
        watcher.attempt(lambda: watcher.write(None))
        raise
    return page


def watch_for_parent(run: RunDir, every: float, reporter: Reporter) -> None:
    """Watch the run of the process that started this one, until that ends: it holds the other end of stdin."""

    def ended(seconds: float) -> bool:
        ready, _, _ = select.select([0], [], [], seconds)
        return bool(ready)  # nothing is ever written, so this is the end

    RunWatcher(run, run.report, every, reporter.warn).watch(ended)


@contextlib.contextmanager
def live_page(run: RunDir, reporter: Reporter) -> Iterator[None]:
    """Keep the run's page up to date during the block, by a process with the lowest priority beside this one."""
    command = [sys.executable, "-m", "purld", "watch", str(run.path), "--for-parent"]
    try:
        watcher = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # the watcher ends with it, and so with this process, whatever ends that
            stdout=subprocess.DEVNULL,
            env=_environment_of_watcher(),
            start_new_session=True,  # Ctrl-C is not meant for it
        )
    except OSError as error:
        reporter.warn(f"the page could not be started ({reason_of(error)}); the run goes on without it.")
        yield
        return
    reporter.say(f"Live page: {run.report}")
    try:
        yield
    finally:
        assert watcher.stdin is not None
        watcher.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            watcher.wait(_WAIT_FOR_WATCHER)


def _environment_of_watcher() -> dict[str, str]:
    """Return the environment for one thread, without a launcher's variables: a watcher is no part of the job."""
    launchers = {name for names in PLACES for name in names}
    return {name: value for name, value in os.environ.items() if name not in launchers} | {"OMP_NUM_THREADS": "1"}


def lower_priority() -> None:
    """Let every other process of this machine go first."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(19)


def _files_seen(run: RunDir) -> tuple[object, ...]:
    """Return what changes whenever the run has written something that the page shows, or has ended."""
    files = [run.manifest, run.metrics, run.anchors, run.results, *sorted(run.groups.parent.glob("*.jsonl"))]
    stats = [(path.name, path.stat()) for path in files if path.exists()]
    holder = find_lock_holder(run.path / ".lock")
    return holder, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _is_live_page(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as handle:
            return LIVE_MARK in handle.read(4096)
    except (OSError, UnicodeDecodeError):
        return False
