"""Describe what a stage did, or how far it is, from the files of its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purld.clients.ledger import LedgerView
from purld.config.clients import TeacherAnchors
from purld.config.methods import StageTwoSettings
from purld.config.schema import Config
from purld.display.titles import model_title
from purld.runs.files import read_intact_rows
from purld.runs.run_dir import TRAINED, RunDir

_FIGURES = ("loss", "eval_loss", "objective", "score", "margin", "kl", "length")
_CLOCK_SECONDS = 1.0  # by which the times of files and of the clock may differ
_LEAST_SHARE = 0.02  # of a stage, before the time that is left is estimated from it


@dataclass(frozen=True)
class Progress:
    """How far a stage is: what it has done, and how long it took and will take, in words."""

    detail: str
    time: str = ""


def describe_done(stage: str, facts: Mapping[str, Any], run: RunDir) -> str:
    """Describe the result of a finished stage by the facts that the manifest has of it."""
    words = {
        "anchors": "{teacher[answered]:,} of {teacher[prompts]:,} prompts answered",
        "sft": "{steps:,} steps on {trained_on:,} anchors, the model of step {best_step:,} kept",
        "probe": "{verdict}",
        "align": "{steps:,} steps, {candidates:,} candidates drawn",
        "evaluate": f"{run.results}",
        "report": f"{run.report}",
    }
    try:
        return words.get(stage, "").format(**facts)
    except (KeyError, IndexError, ValueError):  # the facts of another version
        return ""


def describe_progress(stage: str, run: RunDir, config: Config | None, now: float | None) -> Progress:
    """Describe how far a stage is that has begun and is not finished.

    Args:
        stage: its name.
        run: the run directory.
        config: the run's configuration, if it can be read.
        now: the time in seconds since 1970 if it is running; None if it was stopped.
    """
    facts = run.begin_facts(stage)
    if stage in TRAINED:
        done, total, detail = _training(stage, run, config, facts)
    elif stage == "anchors":
        done, total, detail = _anchors(run, config, facts)
    elif stage == "evaluate":
        done, total, detail = _evaluation(run, config, facts)
    else:
        return Progress("", _elapsed(facts, now))
    return Progress(detail, _elapsed(facts, now, done, total, _is_resumed(run, facts)))


def describe_seconds(seconds: float) -> str:
    """Return a time in the largest unit that fits: "44 s", "7 min", "1 h 5 min"."""
    if seconds < 60:
        return f"{max(0, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _training(stage: str, run: RunDir, config: Config | None, facts: Mapping[str, Any]) -> tuple[int, int, str]:
    """Return the last logged step, the number of steps (0: not known), and both with the last figures."""
    rows = [row for row in read_intact_rows(run.metrics) if row.get("stage") == stage]
    total = facts.get("steps", 0)
    if not total and stage == "align" and config is not None and isinstance(config.align, StageTwoSettings):
        total = config.align.steps
    if not rows:
        return 0, total, f"no step of {total:,} logged yet" if total else "no step logged yet"
    figures: dict[str, float] = {}
    for row in rows[-20:]:  # some figures are not in every row
        figures |= {name: row[name] for name in _FIGURES if name in row}
    shown = "".join(f", {name.replace('_', ' ')} {value:.3g}" for name, value in figures.items())
    step = int(rows[-1]["step"])
    return step, total, f"step {step:,}{f' of {total:,}' if total else ''}{shown}"


def _anchors(run: RunDir, config: Config | None, facts: Mapping[str, Any]) -> tuple[int, int, str]:
    if not run.ledger.exists():
        return 0, 0, ""
    with LedgerView(run.ledger) as ledger:
        counts = [ledger.totals(role) for role in ("teacher", "opponent")]
    answered, failed, waiting = (int(sum(c[key] for c in counts)) for key in ("answered", "failed", "under_way"))
    total = facts.get("prompts", 0)
    if config is not None and isinstance(config.evaluate.opponent, TeacherAnchors):
        total += facts.get("held_out", 0)
    detail = f"{answered:,}{f' of {total:,}' if total else ''} prompts answered"
    others = ((failed, "failed"), (waiting, "under way"))
    return answered, total, detail + "".join(f", {count:,} {name}" for count, name in others if count)


def _evaluation(run: RunDir, config: Config | None, facts: Mapping[str, Any]) -> tuple[int, int, str]:
    """Return no numbers, and the answers drawn of those that will be, by file of generations."""
    samples = config.evaluate.samples if config is not None else 1
    held_out = facts.get("held_out", 0)
    parts = []
    for path in sorted(run.groups.parent.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        name, _, kind = path.stem.partition(".")
        if name in ("groups", "revisited", "opponent") or kind == "verdicts":
            continue
        rows = _count_rows(path)
        wanted = held_out * (samples if not kind else 1) if kind != "validation" else 0
        parts.append(f"{model_title(name)}{f' {kind}' if kind else ''} {rows:,}{f' of {wanted:,}' if wanted else ''}")
    judged = _judged(run)
    return 0, 0, f"answers: {', '.join(parts) or 'none yet'}" + (f"; {judged:,} verdicts" if judged else "")


def _judged(run: RunDir) -> int:
    if not run.ledger.exists():
        return 0
    with LedgerView(run.ledger) as ledger:
        return int(ledger.totals("judge")["answered"])


def _count_rows(path: Path) -> int:
    with path.open("rb") as handle:
        return sum(piece.count(b"\n") for piece in iter(lambda: handle.read(1 << 20), b""))


def _is_resumed(run: RunDir, facts: Mapping[str, Any]) -> bool:
    """Return whether the process that works on the run started after the stage did: the lock file is then newer."""
    lock = run.path / ".lock"
    return lock.exists() and lock.stat().st_mtime > facts.get("started", 0.0) + _CLOCK_SECONDS


def _elapsed(facts: Mapping[str, Any], now: float | None, done: int = 0, total: int = 0, resumed: bool = False) -> str:
    """Describe the time since a stage began, and the time that is left where its pace is known."""
    if now is None or "started" not in facts:
        return ""
    seconds = now - facts["started"]
    text = f"began {describe_seconds(seconds)} ago"
    if total and not resumed and _LEAST_SHARE * total <= done < total and done:
        text += f", about {describe_seconds(seconds * (total - done) / done)} left"
    return text
