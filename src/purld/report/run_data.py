"""What runs left behind, read for showing. Whatever a run did not write is simply empty here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from purld.runs.files import read_json, read_rows
from purld.runs.run_dir import RunDir
from purld.runs.thumbnails import thumbnail_folder

Row = Mapping[str, Any]

OPPONENT = "opponent"

_FIRST = ("base", "sft")


@dataclass(frozen=True)
class RunData:
    """One run, as far as it got.

    Attributes:
        name: what the page calls it.
        config_text: config.yaml as it stands.
        config: the same, parsed.
        results: results.json.
        metrics: the rows of metrics.jsonl.
        anchors: the teacher's answer by prompt id.
        groups: Stage II's groups, oldest first; those measured again at its end have `policy_after` and
            `label_divergence_after` too.
        answers: held-out answers by model: base, sft, the method, the opponent.
        greedy: the greedy answers beside them, where there are any.
        verdicts: the judge's verdicts by model.
        images: the files of the images that rows refer to, by name.
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

    @property
    def method(self) -> str | None:
        """The method's name, or None if neither the results nor the configuration know it."""
        found: str | None = self.results.get("method") or self.config.get("align", {}).get("method")
        return found

    def stage(self, name: str) -> list[Row]:
        """The metrics of one stage, in order of steps."""
        return sorted((r for r in self.metrics if r.get("stage") == name), key=lambda r: r["step"])


def read_run(run: RunDir) -> RunData:
    """Read a run directory.

    Raises:
        UserError: a file in it is damaged.
    """
    config_text = run.config.read_text(encoding="utf-8") if run.config.exists() else ""
    folder = run.groups.parent
    no_answers = (run.groups, run.revisited)
    stems = {path.name.split(".")[0] for path in folder.glob("*.jsonl") if path not in no_answers}
    models = sorted(stems, key=_place)
    return RunData(
        name=run.path.resolve().name,
        config_text=config_text,
        config=yaml.safe_load(config_text) or {},
        results=read_json(run.results) if run.results.exists() else {},
        metrics=read_rows(run.metrics),
        anchors={row["prompt_id"]: row["text"] for row in read_rows(run.anchors)},
        groups=_groups(run),
        answers=_rows(models, run.generations),
        greedy=_rows(models, lambda model: run.generations(f"{model}.greedy")),
        verdicts=_rows(models, run.verdicts),
        images={path.stem: path for path in thumbnail_folder(run.groups).glob("[!.]*")},
    )


def _groups(run: RunDir) -> list[Row]:
    after = {
        (row["step"], row["prompt_id"]): {
            "policy_after": row["policy_after"],
            "label_divergence_after": row["label_divergence"],
        }
        for row in read_rows(run.revisited)
    }
    return [row | after.get((row["step"], row["prompt_id"]), {}) for row in read_rows(run.groups)]


def _rows(models: Sequence[str], place: Callable[[str], Path]) -> dict[str, Sequence[Row]]:
    return {model: rows for model in models if (rows := read_rows(place(model)))}


def _place(model: str) -> tuple[int, str]:
    if model in _FIRST:
        return _FIRST.index(model), model
    return (len(_FIRST) + (model == OPPONENT)), model
