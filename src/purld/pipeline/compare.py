"""Compare the final models of two finished runs on the same held-out prompts.

Everything is paired by prompt: accuracy, verdicts against a common opponent and, on request, a judge's verdicts on the
two models' answers head to head. No answer is drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from purld.config.clients import TRANSPORT
from purld.config.schema import Config
from purld.display.progress import Reporter
from purld.display.results import describe_unjudged, format_signed_difference
from purld.display.titles import METRIC_TITLES, model_title
from purld.errors import UserError
from purld.evaluation.recorded import read_recorded_answers
from purld.evaluation.summary import EvaluatedModel, model_difference, model_metrics
from purld.evaluation.verdicts import collect_verdicts
from purld.model.load import load_encoder
from purld.pipeline.context import open_ledger
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.pipeline.teacher_answers import read_opponent
from purld.records import Prompt
from purld.report.headline import compare_models
from purld.runs.open import final_model, open_run
from purld.runs.run_dir import RunDir

_DECODING_KEYS = ("samples", "temperature", "top_p", "max_new_tokens")


@dataclass(frozen=True)
class ComparedModel:
    """One run's final model and its answers, in the order of its held-out prompts."""

    run: RunDir
    config: Config
    model: str
    answers: EvaluatedModel

    @property
    def name(self) -> str:
        """The run and its model, for display."""
        return f"{self.run.path.resolve().name} ({model_title(self.model)})"

    @property
    def prompt_ids(self) -> list[str]:
        """The ids of the held-out prompts, in the order of the answers."""
        return list(dict.fromkeys(g.prompt_id for g in self.answers.generations))


@dataclass(frozen=True)
class Comparison:
    """The comparison of model A with model B.

    Attributes:
        a, b: the names of the two models.
        n: number of held-out prompts.
        metrics: each model's metrics, named as in results.json.
        difference: A's metrics minus B's, paired, with the same names.
        head_to_head: A's win rates against B's answers; empty if no judge was asked.
        notes: sentences about what prevents or weakens the comparison.
    """

    a: str
    b: str
    n: int
    metrics: tuple[dict[str, Any], dict[str, Any]]
    difference: dict[str, Any]
    head_to_head: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def compare_runs(path_a: Path, path_b: Path, judge: bool, reporter: Reporter) -> Comparison:
    """Compare the final models of two runs.

    Args:
        path_a, path_b: run directories.
        judge: ask A's judge about A's answers against B's. The calls are booked in A's ledger, under its caps.
        reporter: shows progress.

    Raises:
        UserError: a run is missing or not evaluated, the held-out prompts differ, or A has no judge to ask.
    """
    a, b = _read_final_model(path_a), _read_final_model(path_b)
    b = _reordered_as(a, b)
    opponents, notes = _common_opponent(a, b)
    if not opponents:
        a, b = (replace(side, answers=replace(side.answers, verdicts=())) for side in (a, b))
    seed = a.config.seed
    return Comparison(
        a=a.name,
        b=b.name,
        n=len(a.prompt_ids),
        metrics=(model_metrics(a.answers, opponents, seed), model_metrics(b.answers, opponents, seed)),
        difference=model_difference(a.answers, b.answers, opponents, seed),
        head_to_head=_head_to_head(a, b, reporter) if judge else {},
        notes=(*_decoding_notes(a, b), *notes),
    )


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print a comparison as a table, a conclusion and notes."""
    console = console or Console(highlight=False)
    console.print(
        f"A: {comparison.a}\nB: {comparison.b}\n{comparison.n} held-out prompts, with 95% intervals.\n", markup=False
    )
    table = Table("", "A", "B", "A minus B", "p", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for key, label in METRIC_TITLES.items():
        if key in comparison.difference:
            p_value = comparison.difference.get(f"{key}_p")
            table.add_row(
                label,
                *(f"{metrics[key]:.3f}" for metrics in comparison.metrics),
                format_signed_difference(comparison.difference, key),
                "" if p_value is None else f"{p_value:.3g}",
            )
    if table.row_count:
        console.print(table)
        console.print()
    for line in [*_conclusions(comparison), *comparison.notes]:
        console.print(line, soft_wrap=True, markup=False)


def _conclusions(comparison: Comparison) -> list[str]:
    sentence = compare_models(("A", "B"), comparison.metrics, comparison.difference)
    lines = [] if sentence is None else [sentence.text]
    if "accuracy_p" in comparison.difference or "greedy_accuracy_p" in comparison.difference:
        lines.append("p is that of McNemar's exact two-sided test.")
    duel = comparison.head_to_head
    if "win_rate" in duel:
        low, high = duel["win_rate_ci"]
        lc_low, lc_high = duel["lc_win_rate_ci"]
        flips = f", {duel['flip_rate']:.0%} of the pairs changed with the order" if "flip_rate" in duel else ""
        lines.append(
            f"Head to head A wins {duel['win_rate']:.3f} [{low:.3f}, {high:.3f}], length-controlled "
            f"{duel['lc_win_rate']:.3f} [{lc_low:.3f}, {lc_high:.3f}]; {duel['unjudged']} verdicts unjudged{flips}."
        )
    elif duel:
        lines.append(f"Head to head there is no verdict ({duel['unjudged']} unjudged).")
    lines += describe_unjudged({"A": duel})
    if not comparison.difference and not duel:
        lines.append("The runs have no metric in common to compare; --judge asks A's judge about the answers.")
    return lines


def _read_final_model(path: Path) -> ComparedModel:
    """Return the final model of an evaluated run with its answers."""
    run, config = open_run(path)
    if "evaluate" not in run.finished_stages():
        raise UserError(f"{path}: stage evaluate is not finished; run `purld evaluate` first.")
    model = final_model(config.align.method).name
    answers = (run.generations(model), run.generations(f"{model}.greedy"), run.verdicts(model), run.opponent)
    run.check_files(*answers)
    return ComparedModel(run, config, model, read_recorded_answers(run, model).to_evaluated_model())


def _reordered_as(a: ComparedModel, b: ComparedModel) -> ComparedModel:
    """Return B with its prompts in A's order.

    Raises:
        UserError: the two have different held-out prompts.
    """
    ours, theirs = a.prompt_ids, b.prompt_ids
    if set(ours) != set(theirs):
        raise UserError(
            f"{b.run.path}: its held-out prompts are not those of {a.run.path} "
            f"({len(set(ours) - set(theirs))} are missing, {len(set(theirs) - set(ours))} are others), "
            "so the two runs cannot be compared."
        )
    index_a, index_b = ({prompt_id: n for n, prompt_id in enumerate(ids)} for ids in (ours, theirs))
    order = [index_b[prompt_id] for prompt_id in ours]
    answers = b.answers
    return replace(
        b,
        answers=replace(
            answers,
            generations=sorted(answers.generations, key=lambda g: (index_a[g.prompt_id], g.sample)),
            correct=None if answers.correct is None else answers.correct[order],
            greedy_correct=None if answers.greedy_correct is None else answers.greedy_correct[order],
        ),
    )


def _common_opponent(a: ComparedModel, b: ComparedModel) -> tuple[dict[str, str], list[str]]:
    """Return the opponent's answers if both models have the same opponent and judge; else none, and a note on why."""
    if not a.answers.verdicts or not b.answers.verdicts:
        return {}, []
    answers, other_answers = (read_opponent(side.run) for side in (a, b))
    if answers != other_answers:
        return {}, ["Win rates are not compared: the runs have different opponents."]
    if _judge_settings(a) != _judge_settings(b):
        return {}, ["Win rates are not compared: the runs have different judges."]
    return answers, _address_notes(a, b)


def _address_notes(a: ComparedModel, b: ComparedModel) -> list[str]:
    """Return a note if the judges have one name at two addresses, where they need not be the same model."""
    ours, theirs = (getattr(side.config.evaluate.judge, "base_url", None) for side in (a, b))
    if ours == theirs:
        return []
    return [f"The judges have the same name, and answered at different addresses: {ours} and {theirs}."]


def _judge_settings(side: ComparedModel) -> dict[str, Any]:
    """Return the settings that a verdict depends on: the judge without its transport settings, and how it is asked."""
    settings = side.config.evaluate.model_dump(mode="json", include={"judge", "judge_retries", "both_orders"})
    settings["judge"] = {key: value for key, value in settings["judge"].items() if key not in TRANSPORT}
    return settings


def _decoding_notes(a: ComparedModel, b: ComparedModel) -> list[str]:
    pairs = {key: (getattr(a.config.evaluate, key), getattr(b.config.evaluate, key)) for key in _DECODING_KEYS}
    differing = [f"evaluate.{key} {ours} and {theirs}" for key, (ours, theirs) in pairs.items() if ours != theirs]
    return [f"The answers were drawn with different settings: {', '.join(differing)}."] if differing else []


def _head_to_head(a: ComparedModel, b: ComparedModel, reporter: Reporter) -> dict[str, Any]:
    """Return the win rates of A's first answers against B's, by A's judge.

    Raises:
        UserError: A's configuration names no judge, or its held-out prompts have changed.
    """
    if a.config.evaluate.judge is None:
        raise UserError(f"{a.run.path}: its configuration names no judge; set evaluate.judge.")
    theirs = {g.prompt_id: g.text for g in b.answers.generations if g.sample == 0}
    ours = [g for g in a.answers.generations if g.sample == 0]
    with a.run.lock(), open_ledger(a.run, reporter) as ledger:
        verdicts = collect_verdicts(
            a.config.evaluate,
            _held_out_prompts(a),
            {a.model: ours},
            theirs,
            ledger,
            a.run.to_judge,
            reporter.progress,
        )[a.model]
    metrics = model_metrics(replace(a.answers, verdicts=verdicts), theirs, a.config.seed)
    names = (
        "judged",
        "unjudged",
        "unjudged_reasons",
        "flip_rate",
        "win_rate",
        "win_rate_ci",
        "lc_win_rate",
        "lc_win_rate_ci",
    )
    return {name: metrics[name] for name in names if name in metrics}


def _held_out_prompts(side: ComparedModel) -> list[Prompt]:
    encoder = load_encoder(side.config.student)
    pools = load_prompt_pools(side.config, encoder, lambda line: None)
    ids = {prompt.id for prompt in pools.held_out}
    if not ids.issuperset(side.prompt_ids):
        raise UserError(
            f"{side.config.data.source}: the held-out prompts have changed since {side.run.path} was evaluated, "
            "so the judge cannot be asked about them."
        )
    return pools.held_out
