"""Read results.json as typed objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purld.errors import UserError
from purld.runs.files import read_json
from purld.runs.run_dir import RunDir


def training_warnings(finished: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the warnings of the training stages, given the facts of the finished stages."""
    return [warning for stage in ("sft", "align") for warning in finished.get(stage, {}).get("warnings", [])]


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class ModelResult:
    """The metrics of one model, or of the difference between two; a metric that was not measured is None.

    Attributes:
        name: `base`, `sft` or the method; for a difference `a - b`.
        accuracy: the share of right sampled answers.
        greedy_accuracy: the share of right greedy answers.
        win_rate: the judge's preference over the opponent.
        lc_win_rate: the same, length-controlled.
        values: all fields of results.json for this model.
    """

    name: str
    accuracy: Estimate | None
    greedy_accuracy: Estimate | None
    win_rate: Estimate | None
    lc_win_rate: Estimate | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class RunResults:
    """The results of a finished run.

    Attributes:
        path: the run directory.
        method: the method of Stage II.
        seed: the run's seed.
        models: the models by name, in the order of their training.
        differences: the paired differences by name, such as `ldl_grpo - sft`.
        teacher: calls, tokens and cost.
        values: all of results.json.
    """

    path: Path
    method: str
    seed: int
    models: Mapping[str, ModelResult]
    differences: Mapping[str, ModelResult]
    teacher: Mapping[str, Any]
    values: Mapping[str, Any]


def load_results(run_path: str | Path) -> RunResults:
    """Read the results of a finished run.

    Raises:
        UserError: the run has no results.json, or it is damaged.
    """
    run = RunDir(run_path)
    if not run.results.exists():
        raise UserError(f"{run.path}: has no results.json; finish the run first (purld run).")
    run.check_files(run.results)
    values = read_json(run.results)
    return RunResults(
        run.path,
        values["method"],
        values["seed"],
        {name: _model_result(name, metrics) for name, metrics in values["models"].items()},
        {name: _model_result(name, metrics) for name, metrics in values.get("difference", {}).items()},
        values["teacher"],
        values,
    )


def _model_result(name: str, metrics: Mapping[str, Any]) -> ModelResult:
    def estimate(key: str) -> Estimate | None:
        return Estimate(metrics[key], *metrics[f"{key}_ci"]) if key in metrics else None

    return ModelResult(
        name,
        estimate("accuracy"),
        estimate("greedy_accuracy"),
        estimate("win_rate"),
        estimate("lc_win_rate"),
        metrics,
    )
