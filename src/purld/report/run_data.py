"""Read a run directory for the report. What a run did not write is empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from purld.evaluation.recorded import Row, read_recorded_answers
from purld.runs.files import read_intact_rows, read_json, read_last_rows, read_rows
from purld.runs.run_dir import RunDir
from purld.runs.thumbnails import thumbnail_folder

OPPONENT = "opponent"

_FIRST = ("base", "sft")


@dataclass(frozen=True)
class RunData:
    """The contents of one run directory, finished or not.

    Attributes:
        name: the run's name on the page.
        config_text: the text of config.yaml.
        config: the same, parsed.
        results: results.json.
        metrics: the rows of metrics.jsonl.
        anchors: the teacher's answers by prompt id.
        groups: Stage II's groups, oldest first. Those measured again at its end also have `policy_after` and
            `label_divergence_after`.
        answers: held-out answers by model: base, sft, the method, the opponent.
        greedy: greedy held-out answers by model.
        verdicts: the judge's verdicts by model.
        images: the image files that rows refer to, by name.
        kept_steps: the step of each finished training stage whose model was kept.
    """

    name: str
    config_text: str
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    metrics: Sequence[Row]
    anchors: Mapping[str, str]
    groups: Sequence[Row]
    answers: Mapping[str, Sequence[Row]]
    greedy: Mapping[str, Sequence[Row]]
    verdicts: Mapping[str, Sequence[Row]]
    images: Mapping[str, Path]
    kept_steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """The name of the method; None if neither the results nor the configuration name one."""
        name: str | None = self.results.get("method") or self.config.get("align", {}).get("method")
        return name

    def stage_metrics(self, name: str) -> list[Row]:
        """Return the metrics of one stage, by step."""
        return sorted((r for r in self.metrics if r.get("stage") == name), key=lambda r: r["step"])


def read_run(run: RunDir, newest: int | None = None) -> RunData:
    """Read a run directory.

    Args:
        run: the run.
        newest: to read a run that is being written, the number of groups to read, newest first, one per prompt. Its
            files are not compared with the manifest, and damaged rows are left out. None reads everything.

    Raises:
        UserError: a file in it is damaged.
    """
    if newest is None:
        run.check_files(run.config, run.results, run.metrics, run.anchors, run.groups.parent)
    read = read_rows if newest is None else read_intact_rows
    config_text = run.config.read_text(encoding="utf-8") if run.config.exists() else ""
    folder = run.groups.parent
    not_answers = (run.groups, run.revisited)
    stems = {path.name.split(".")[0] for path in folder.glob("*.jsonl") if path not in not_answers}
    recorded = {model: read_recorded_answers(run, model) for model in sorted(stems, key=_display_order)}
    return RunData(
        name=run.path.resolve().name,
        config_text=config_text,
        config=yaml.safe_load(config_text) or {},
        results=read_json(run.results) if run.results.exists() else {},
        metrics=read(run.metrics),
        anchors={row["prompt_id"]: row["text"] for row in read(run.anchors)},
        groups=_read_groups(run) if newest is None else _newest_groups(run, newest),
        answers={model: rows.drawn for model, rows in recorded.items() if rows.drawn},
        greedy={model: rows.greedy for model, rows in recorded.items() if rows.greedy},
        verdicts={model: rows.verdicts for model, rows in recorded.items() if rows.verdicts},
        images={path.stem: path for path in thumbnail_folder(run.groups).glob("[!.]*")},
        kept_steps=_kept_steps(run.finished_stages()),
    )


def _newest_groups(run: RunDir, count: int) -> list[Row]:
    """Return the newest groups, newest first, one per prompt."""
    by_prompt: dict[str, Row] = {}
    for row in reversed(read_last_rows(run.groups, count)):
        by_prompt.setdefault(row["prompt_id"], row)
    return list(by_prompt.values())


def _kept_steps(finished: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return by stage the step whose model was kept, as the manifest records it; the last where it records none."""
    recorded = {
        "sft": finished.get("sft", {}).get("best_step"),
        "align": (finished.get("align", {}).get("validation") or {}).get("kept_step"),
    }
    steps = {stage: kept or finished.get(stage, {}).get("steps") for stage, kept in recorded.items()}
    return {stage: step for stage, step in steps.items() if step}


def _read_groups(run: RunDir) -> list[Row]:
    """Return the rows of the groups, with the second measurement of those that have one."""
    after = {
        (row["step"], row["prompt_id"]): {
            "policy_after": row["policy_after"],
            "label_divergence_after": row["label_divergence"],
        }
        for row in read_rows(run.revisited)
    }
    return [row | after.get((row["step"], row["prompt_id"]), {}) for row in read_rows(run.groups)]


def _display_order(model: str) -> tuple[int, str]:
    if model in _FIRST:
        return _FIRST.index(model), model
    return (len(_FIRST) + (model == OPPONENT)), model
