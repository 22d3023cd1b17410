"""Tell where a run stands, from the files in its directory, while it runs or after it was stopped.

Nothing is locked, written or loaded: the manifest, the logs, the ledger and results.json say all of it, and no module
that imports torch is needed. What a stage is doing is in `purld.pipeline.stage_progress`.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from purld.clients.batch_records import BatchRecord
from purld.clients.ledger import BUDGETS, LedgerView, is_blank
from purld.config.clients import OpenAIEndpoint
from purld.config.load import load_config
from purld.config.methods import SelfPpo, SelfScoringSettings, StageTwoSettings
from purld.config.schema import Config
from purld.display.titles import ANSWER_TITLES, METRIC_TITLES, model_title
from purld.errors import UserError
from purld.pipeline.stage_progress import describe_done, describe_progress, describe_seconds
from purld.runs.files import read_json
from purld.runs.lock_holder import find_lock_holder
from purld.runs.results import training_warnings
from purld.runs.run_dir import STAGES, RunDir
from purld.runs.shortfalls import may_ask_again, stage_shortfalls

# "capped" is a finished stage in which a cap left something unasked that a higher one still buys.
State = Literal["done", "capped", "running", "stopped", "begun", "to do"]
_ENDED = ("done", "capped")


@dataclass(frozen=True)
class StageStatus:
    """Where a stage stands: its name, its state, what it did or is doing, and the time that it took so far."""

    name: str
    state: State
    detail: str = ""
    time: str = ""


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Attributes:
        headline: one line about the whole run.
        stages: the stages that take part, in order.
        spending: a line for each budget from which something was spent.
        batches: a line for each batch at an endpoint whose results are not here yet.
        figures: the last figures of a finished evaluation, a line each.
        warnings: a sentence each.
        commands: what goes on from here.
    """

    headline: str
    stages: list[StageStatus]
    spending: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def read_status(run: RunDir, now: float) -> RunStatus:
    """Return where a run stands.

    Args:
        run: the run directory.
        now: the time in seconds since 1970.

    Raises:
        UserError: the manifest or the ledger is damaged, or the manifest is missing.
    """
    run.check_manifest()
    warnings: list[str] = []
    config = _read_config(run, warnings)
    holder = find_lock_holder(run.path / ".lock")
    stages = [_stage_status(name, run, config, holder, now) for name in STAGES if takes_part(name, config, run)]
    finished = run.finished_stages()
    return RunStatus(
        headline=_headline(run, stages, holder, now),
        stages=stages,
        spending=_spending(run, config),
        batches=_batches(run, now),
        figures=_figures(run) if "evaluate" in finished else [],
        warnings=warnings + _warnings(run, finished),
        commands=_commands(run, config, stages, holder),
    )


def takes_part(stage: str, config: Config | None, run: RunDir) -> bool:
    """Return whether a stage is part of a run by its configuration; without one, whether it has begun."""
    if config is None:
        return stage in run.begun_stages()
    if stage == "probe":
        return isinstance(config.align, SelfScoringSettings) and not isinstance(config.align, SelfPpo)
    return stage != "align" or isinstance(config.align, StageTwoSettings)


def _read_config(run: RunDir, warnings: list[str]) -> Config | None:
    try:
        return load_config(run.config)
    except UserError as problem:  # also that of another version, whose run can be looked at all the same
        warnings.append(str(problem))
        return None


def _stage_status(name: str, run: RunDir, config: Config | None, holder: int | None, now: float) -> StageStatus:
    finished = run.finished_stages()
    if name in finished:
        facts, shortfalls = finished[name], stage_shortfalls(run, name)
        detail = "; ".join([describe_done(name, facts, run), *map(str, shortfalls)])
        ended: State = "capped" if shortfalls and may_ask_again(run, name) else "done"
        return StageStatus(name, ended, detail, describe_seconds(facts.get("seconds", 0.0)))
    if name not in run.begun_stages():
        return StageStatus(name, "to do")
    state: State = "running" if holder else "stopped" if holder == 0 else "begun"
    progress = describe_progress(name, run, config, now if holder else None)
    return StageStatus(name, state, progress.detail, progress.time)


def _headline(run: RunDir, stages: list[StageStatus], holder: int | None, now: float) -> str:
    if holder:
        state = f"running (process {holder})"
    elif all(stage.state in _ENDED for stage in stages):
        capped = [stage.name for stage in stages if stage.state == "capped"]
        return f"{run.path}: finished" + (f", but a cap cut {' and '.join(capped)} short" if capped else "")
    elif any(stage.state == "begun" for stage in stages):
        state = "begun and not finished"
    else:
        state = "not running"
    written = _last_write(run)
    return f"{run.path}: {state}" + (f", last wrote {describe_seconds(now - written)} ago" if written else "")


def _last_write(run: RunDir) -> float | None:
    """Return the time at which the run last wrote one of its files."""
    ledger = [run.ledger, run.ledger.with_name(run.ledger.name + "-wal")]
    files = [run.manifest, run.metrics, run.anchors, *ledger, *run.groups.parent.glob("*.jsonl")]
    return max((path.stat().st_mtime for path in files if path.exists()), default=None)


def _spending(run: RunDir, config: Config | None) -> list[str]:
    """Describe what was spent, and the caps on it."""
    if not run.ledger.exists():
        return []
    clients = {"teacher": config.teacher, "judge": config.evaluate.judge} if config else {}
    lines = []
    with LedgerView(run.ledger) as ledger:
        for budget in dict.fromkeys(BUDGETS.values()):
            rows = [ledger.totals(role) for role, owner in BUDGETS.items() if owner == budget]
            total = {key: sum(row[key] for row in rows) for key in rows[0]}
            if total["prompts"]:
                lines.append(_describe_spending(budget, total, clients.get(budget)))
    return lines


def _batches(run: RunDir, now: float) -> list[str]:
    """Describe each batch that an endpoint may be working on: who is asked, how much, since when, its last state."""
    if is_blank(run.ledger):
        return []
    with LedgerView(run.ledger) as ledger:
        return [_describe_batch(batch, now) for batch in ledger.open_batches() if batch.calls and batch.submitted_at]


def _describe_batch(batch: BatchRecord, now: float) -> str:
    noun = "verdict" if batch.role == "judge" else "prompt"
    submitted = batch.submitted_at or now
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(submitted))
    state = batch.status if batch.batch_id and batch.status else "not known yet whether it was created"
    return (
        f"{batch.role}: {batch.name}, {batch.calls:,} {noun}{'s' * (batch.calls != 1)}, submitted {since} "
        f"({describe_seconds(now - submitted)} ago): {state}"
    )


def _describe_spending(budget: str, total: Mapping[str, float], client: object) -> str:
    tokens = int(total["input_tokens"] + total["output_tokens"])
    amounts = {"max_calls": int(total["calls"]), "max_tokens": tokens, "max_cost": total["cost"]}
    caps = {name: getattr(client, name) for name in amounts} if isinstance(client, OpenAIEndpoint) else {}
    shown = [
        f"{amounts['max_calls']:,} calls{_of_cap(amounts['max_calls'], caps.get('max_calls'))}",
        f"{tokens:,} tokens{_of_cap(tokens, caps.get('max_tokens'))}",
    ]
    if total["cost"] or total["unsettled_cost"]:
        shown.append(f"cost {total['cost']:,.4f}{_of_cap(total['cost'], caps.get('max_cost'))}")
    if total["unsettled_cost"]:
        shown.append(f"at most {total['unsettled_cost']:,.4f} more for calls without a bill")
    counts = [f"{int(total[name]):,} {name.replace('_', ' ')}" for name in ("failed", "unknown", "under_way")]
    return f"{budget}: {', '.join([*shown, *(count for count in counts if not count.startswith('0 '))])}"


def _of_cap(amount: float, cap: float | None) -> str:
    return "" if cap is None else f" of at most {cap:,} ({amount / cap:.0%})"


def _figures(run: RunDir) -> list[str]:
    """Return the metrics of results.json, from model to model."""
    models: Mapping[str, Mapping[str, Any]] = read_json(run.results)["models"]
    titles = {key: title for key, title in METRIC_TITLES.items() if any(key in m for m in models.values())}
    titles = titles or {key: title for key, title in ANSWER_TITLES.items() if any(key in m for m in models.values())}
    order = " → ".join(model_title(name) for name in models)
    lines = [
        f"{title}: {' → '.join(f'{m[key]:.3f}' if key in m else '-' for m in models.values())}"
        for key, title in titles.items()
    ]
    return [f"{order}, on {max(m['n'] for m in models.values())} held-out prompts", *lines]


def _warnings(run: RunDir, finished: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the warnings of the stages, and the logs of errors that nobody foresaw."""
    if "evaluate" in finished:
        found = list(read_json(run.results).get("warnings", []))
    else:
        found = training_warnings(finished)
        if _found_no_signal(finished):
            found.append(finished["probe"]["verdict"])
    logs = sorted(run.path.glob("purld-error-*.log"))
    return [*dict.fromkeys(found), *(f"an error ended a command; its traceback is in {log}." for log in logs[-1:])]


def _found_no_signal(finished: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether the probe found no signal in the scores that Stage II would learn from."""
    probe = finished.get("probe", {})
    return any("weakness" in row and row["name"] == probe.get("chosen") for row in probe.get("scorers", []))


def _commands(run: RunDir, config: Config | None, stages: list[StageStatus], holder: int | None) -> list[str]:
    """Return the commands that go on from here; while the run is running, the one to watch it with."""
    path = shlex.quote(str(run.path))
    if holder:
        return [f"purld watch {path}"]
    ended = all(stage.state in _ENDED for stage in stages)
    there = f"{shlex.quote(str(Path(run.config)))} --run-dir {path}"
    raised = [
        f"purld run {there} {shortfall.key}=N, with N above {shortfall.limit}, which asks for the rest"
        for stage in stages
        if stage.state == "capped"
        for shortfall in stage_shortfalls(run, stage.name)
    ]
    if ended:
        return [*raised, f"purld chat {path}", f"purld export {path}"]
    if (run.path / "demo").is_dir():
        return [f"purld demo --run-dir {path}, with the task, student and keys that it began with"]
    stops = config is not None and getattr(config.align, "weak_signal", "") == "stop"
    if stops and _found_no_signal(run.finished_stages()) and "align" not in run.begun_stages():
        return [
            f"purld probe {there}, which measures every scorer",
            f"purld run {there} align.score=NAME, with one that tells candidates apart",
        ]
    return [*raised, f"purld run {there}{', which goes on with what was bought' if raised else ''}"]
